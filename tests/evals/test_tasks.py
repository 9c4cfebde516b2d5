"""The command `tasks`: our scores are those of lm-eval's own Hugging Face model, item by item; McNemar's test."""

import json
import random
import sys
from types import SimpleNamespace

import pytest
import torch

import eval_dba
from evals import tasks
from evals.subject import load_subject
from llamas import byte_level, save_llama
from train_dba import ByteTokenizer, KVCache, UserError, save_checkpoint

WORDS = "Water boils at two lines and tabs test naive °C — 日本語 a the of cats run slowly under old trees".split()
COUNT = 8


def needs_lm_eval():
    for package in ("lm_eval", "transformers", "accelerate", "safetensors", "gguf"):
        pytest.importorskip(package, reason=f"no {package}: pip install -r requirements-eval.txt")


def text(rng, least, most):
    return " ".join(rng.choices(WORDS, k=rng.randint(least, most)))


def make_items(name, seed=0):
    """Items of a task, in the fields of the hub's data set."""
    rng = random.Random(f"{name}{seed}")
    for i in range(COUNT):
        a, b = text(rng, 1, 4), text(rng, 1, 4)
        yield {
            "hellaswag": dict(activity_label=text(rng, 1, 2), ctx_a=text(rng, 3, 6), ctx_b=text(rng, 0, 2),
                              endings=[text(rng, 2, 9) + " [step] x" for _ in range(4)], label=str(rng.randrange(4))),
            "winogrande": dict(sentence=f"{text(rng, 2, 5)} because _ {text(rng, 2, 5)}.", option1=a, option2=b,
                               answer=rng.choice("12")),
            "arc_easy": dict(id=str(i), question=text(rng, 4, 9) + "?", answerKey=rng.choice("ABC"),
                             choices=dict(text=[a, b, text(rng, 1, 3)], label=[*"ABC"])),
            "piqa": dict(goal=text(rng, 3, 9), sol1=a, sol2=b, label=rng.randrange(2)),
            "boolq": dict(passage=text(rng, 5, 60), question=text(rng, 3, 6), label=rng.randrange(2)),
        }[name]


def write_items(folder, names=tuple(tasks.TASKS)):
    folder.mkdir(exist_ok=True)
    for name in names:
        lines = (json.dumps(item, ensure_ascii=False) + "\n" for item in make_items(name))
        path = folder / f"{name}_{'test' if name == 'arc_easy' else 'valid'}.jsonl"
        path.write_text("".join(lines), encoding="utf-8")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A tiny Llama whose window of 48 tokens is shorter than some items, and its folder."""
    needs_lm_eval()
    folder = tmp_path_factory.mktemp("llama")
    return save_llama(folder / "model", max_position_embeddings=48), folder


def subject_of(folder):
    return load_subject(folder / "model", "cpu")


def hflm(model, **how):
    from lm_eval.models.huggingface import HFLM
    return HFLM(pretrained=model, tokenizer=byte_level(), batch_size=3, **how)


def evaluate(lm, names, data, folder):
    import lm_eval
    loaded, missing = tasks.load_tasks(names, data, folder)
    assert not missing
    for task in loaded.values():
        task.set_config("num_fewshot", 0)
    return lm_eval.evaluate(lm, {"tasks": loaded})


def run(*args):
    return eval_dba.main(["tasks", "--device", "cpu", *map(str, args)])


def test_every_item_scores_as_by_lm_evals_own_model(llama, tmp_path):
    model, folder = llama
    write_items(tmp_path / "data")
    (tmp_path / "tasks").mkdir()
    ours, its = (evaluate(lm, [*tasks.TASKS], tmp_path / "data", tmp_path / "tasks")
                 for lm in (tasks.lm_eval_model(subject_of(folder), 4), hflm(model)))
    cut = 0
    for name in tasks.TASKS:
        a, b = tasks.task_result(ours, name), tasks.task_result(its, name)
        assert a == b and a["n"] == COUNT, name
        assert ("acc_norm" in a) == (name in ("hellaswag", "arc_easy", "piqa"))
        for mine, theirs in zip(ours["samples"][name], its["samples"][name]):
            for (x, greedy), (y, likeliest) in zip(mine["filtered_resps"], theirs["filtered_resps"]):
                assert x == pytest.approx(y, abs=1e-3) and greedy == likeliest, name
            cut += any(len(byte_level().encode("".join(pair))) > 49 for pair in mine["arguments"])
    assert cut > 10                                        # items that the window doesn't hold were among them


def request(*args):
    return SimpleNamespace(args=args)


def test_rolling_and_greedy_texts_are_those_of_lm_evals_own_model(llama):
    model, folder = llama
    ours, its, rng = tasks.lm_eval_model(subject_of(folder), 3), hflm(model), random.Random(0)
    texts = [request(text(rng, 1, 60)) for _ in range(7)]
    assert ours.loglikelihood_rolling(texts) == pytest.approx(its.loglikelihood_rolling(texts), abs=1e-2)
    empty = [request("", " Water"), request("Water ", "boils"), request("Water", " boils at two")]
    assert ours.loglikelihood(empty) == [(pytest.approx(x, abs=1e-3), y) for x, y in its.loglikelihood(empty)]
    for until in (["zz"], ["a", "\n"], []):
        prompts = [request(text(rng, 1, 30), dict(until=until, max_gen_toks=12)) for _ in range(5)]
        assert ours.generate_until(prompts) == its.generate_until(prompts)


def byte_checkpoint(path, seed=0, **settings):
    import train_dba
    from reference import randomize
    settings = settings or dict(attn_mode="decoupled", sem_dim=8, geo_dim=8, null_attn=True)
    cfg = train_dba.make_config(data="-", d_model=32, layers=1, n_head=2, d_ff=64, block=512, **settings)
    model = randomize(train_dba.GPT(cfg, ByteTokenizer.vocab_size), seed)
    save_checkpoint(path, cfg, ByteTokenizer(), model, step=0)


def test_command_and_comparison(tmp_path, capsys, monkeypatch):
    """Our own checkpoints, by the command line: a result, what isn't run, and a paired test of two results."""
    needs_lm_eval()
    names = ("piqa", "boolq")
    write_items(tmp_path / "data", names)
    for seed in (0, 1):
        byte_checkpoint(tmp_path / f"{seed}.pt", seed)
    flags = ("--tasks-dir", tmp_path / "data", "--tasks", "boolq", "winogrande", "piqa")
    assert run("--ckpt", tmp_path / "0.pt", "--out", tmp_path / "0.json", *flags) == 0
    assert "winogrande is not run: no winogrande_valid.jsonl" in capsys.readouterr().err
    assert run("--ckpt", tmp_path / "1.pt", "--out", tmp_path / "1.json", *flags, "--limit", 6, "--compare",
               tmp_path / "0.json") == 0
    rotated, rotate_cache = [], tasks.rotate_cache
    monkeypatch.setattr(tasks, "rotate_cache", lambda model: (rotated.append(model), rotate_cache(model)))
    assert run("--ckpt", tmp_path / "0.pt", *flags, "--limit", 2, "--kv-cache", "q4_0", "--kv-rotate") == 0 and rotated
    assert (tmp_path / "eval_tasks_q4_0_rotated.json").is_file() and not (tmp_path / "eval_tasks.json").exists()
    first, second = (json.loads((tmp_path / f"{seed}.json").read_text()) for seed in (0, 1))
    assert first["not_run"].keys() == {"winogrande"} and set(first["tasks"]) == set(names)
    for name in names:
        task = first["tasks"][name]
        assert task["n"] == COUNT == len(set(task["items"])) and task["acc"] == sum(task["correct"]["acc"]) / COUNT
        spread = torch.tensor(task["correct"]["acc"]).double().std().item() / COUNT ** 0.5
        assert task["acc_stderr"] == pytest.approx(spread)
    assert [(row["task"], row["metric"], row["pairs"]) for row in second["compared"]] == [
        ("boolq", "acc", 6), ("piqa", "acc", 6), ("piqa", "acc_norm", 6)]
    row, (mine, its) = second["compared"][1], (result["tasks"]["piqa"]["correct"]["acc"] for result in (second, first))
    assert (row["only_this"], row["only_other"], row["p"]) == tasks.discordant(mine, its[:6])
    assert row["other"] == sum(its[:6]) / 6


@pytest.mark.parametrize("settings", [dict(attn_mode="decoupled", sem_dim=8, geo_dim=8, null_attn=True),
                                      dict(attn_mode="gqa", kv_head=1)], ids=["decoupled", "gqa"])
def test_an_exported_folder_scores_the_same_by_lm_evals_own_adapter(tmp_path, monkeypatch, settings):
    """Both kinds of folders, a Llama and one with modeling_dba.py, loaded by HFLM from their paths."""
    needs_lm_eval()
    from lm_eval.models.huggingface import HFLM

    from surgery.export import export
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    write_items(tmp_path / "data", ("arc_easy", "boolq"))
    (tmp_path / "tasks").mkdir()
    byte_checkpoint(tmp_path / "best.pt", **settings)
    export(tmp_path / "best.pt", tmp_path / "hf")
    its = HFLM(pretrained=str(tmp_path / "hf"), trust_remote_code=True, dtype="float32", device="cpu", batch_size=3)
    ours = tasks.lm_eval_model(load_subject(tmp_path / "best.pt", "cpu"), 4)
    a, b = (evaluate(lm, ["arc_easy", "boolq"], tmp_path / "data", tmp_path / "tasks") for lm in (ours, its))
    for name in ("arc_easy", "boolq"):
        assert tasks.task_result(a, name) == tasks.task_result(b, name) and tasks.task_result(a, name)["n"] == COUNT
        for mine, theirs in zip(a["samples"][name], b["samples"][name], strict=True):
            for (x, greedy), (y, likeliest) in zip(mine["filtered_resps"], theirs["filtered_resps"]):
                assert x == pytest.approx(y, abs=1e-3) and greedy == likeliest, name


@pytest.mark.parametrize("this, other, expected", [
    ([1, 1, 1, 1, 1, 0, 1, 0], [0, 0, 0, 0, 0, 1, 1, 0], (5, 1, 14 / 64)),      # 2 (C(6,0) + C(6,1)) / 2^6
    ([0, 0, 0, 0, 0, 1], [1, 1, 1, 1, 1, 1], (0, 5, 0.0625)),                   # 2 / 2^5
    ([1, 0, 1, 0], [0, 1, 0, 1], (2, 2, 1.0)),
    ([1, 0], [1, 0], (0, 0, 1.0)),
])
def test_mcnemar_by_hand(this, other, expected):
    assert tasks.discordant(this, other) == expected
    assert tasks.discordant(other, this) == (expected[1], expected[0], expected[2])


def test_mcnemar_of_many_items_is_the_sign_test():
    b, c, p = tasks.discordant([1] * 3000 + [0] * 2800, [0] * 3000 + [1] * 2800)
    assert (b, c) == (3000, 2800) and p == pytest.approx(0.0090, abs=2e-4)      # normal: 2 Phi(-199 / sqrt(5800))


def error_of(capsys, *args):
    assert run(*args) == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("error: ")
    return said


def test_mistakes_are_one_line(tmp_path, capsys, monkeypatch):
    needs_lm_eval()
    byte_checkpoint(tmp_path / "0.pt")
    write_items(tmp_path / "data", ("piqa",))
    ckpt, piqa = ("--ckpt", tmp_path / "0.pt"), tmp_path / "data" / "piqa_valid.jsonl"
    where = ("--tasks-dir", tmp_path / "data", "--tasks")
    assert "no boolq_valid.jsonl" in error_of(capsys, *ckpt, *where, "boolq")
    (tmp_path / "a.json").write_text("{}")
    assert "a.json is damaged" in error_of(capsys, *ckpt, *where, "piqa", "--compare", tmp_path / "a.json")
    lines = piqa.read_text().splitlines()
    whole = json.loads(lines[0])
    for line, words in (
            ("{", "piqa_valid.jsonl:2"), ("3", "no dict but int 3"), ('{"goal": "", "sol1": ""}', "lacks sol2"),
            (json.dumps({**whole, "label": 9}), "label is no 0 or 1 but int 9"), ("[" * 10**5, "piqa_valid.jsonl:2"),
            (json.dumps({**whole, "goal": "\ud800"}), "piqa: its items can't be read"),
            (lines[1][:-1] + ', "goal": "again"}', "piqa: its items can't be read")):
        piqa.write_text("\n".join([lines[0], line, *lines[2:]]))
        assert words in error_of(capsys, *ckpt, *where, "piqa")
    piqa.write_text(lines[0])
    assert "piqa: one item has no standard error" in error_of(capsys, *ckpt, *where, "piqa")
    piqa.write_text("\n".join(lines))
    assert "piqa: one item" in error_of(capsys, *ckpt, *where, "piqa", "--limit", 1)
    piqa.write_bytes(b'{"goal": "\xff"}')
    assert "piqa_valid.jsonl:1" in error_of(capsys, *ckpt, *where, "piqa")
    piqa.write_text("")
    assert "empty" in error_of(capsys, *ckpt, *where, "piqa")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert "requirements-eval.txt" in error_of(capsys, *ckpt, *where, "piqa")


@pytest.mark.parametrize("name, change, word", [
    ("hellaswag", dict(endings=["a", "b"]), "four texts"), ("hellaswag", dict(label=""), "'2' or '3'"),
    ("winogrande", dict(sentence="without"), "gap"), ("winogrande", dict(answer="3"), "'1' or '2'"),
    ("arc_easy", dict(answerKey="Z"), "its answer"),
    ("arc_easy", dict(choices=dict(text=["a"], label=[*"ABC"])), "its answer"),
    ("boolq", dict(label=True), "0 or 1")])
def test_a_later_item_that_is_damaged_is_named(tmp_path, capsys, name, change, word):
    """lm-eval would end in a traceback, after the items before it were scored."""
    needs_lm_eval()
    byte_checkpoint(tmp_path / "0.pt")
    write_items(tmp_path, [name])
    path = next(tmp_path.glob("*.jsonl"))
    lines = path.read_text().splitlines()
    lines[5] = json.dumps({**json.loads(lines[5]), **change})
    path.write_text("\n".join(lines))
    said = error_of(capsys, "--ckpt", tmp_path / "0.pt", "--tasks-dir", tmp_path, "--tasks", name)
    assert f"{path.name}:6 " in said and word in said


def test_a_context_is_cut_from_the_left(llama):
    subject = subject_of(llama[1])
    (long, _), (short, _) = tasks.score(subject, [([5] * 90, [2] * 48), ([5], [2] * 48)], 2)
    assert long == pytest.approx(short, abs=1e-4)
    with pytest.raises(UserError, match="no tokens"):
        tasks.score(subject, [([1], [])], 1)


@pytest.mark.parametrize("formats, residual", (("fp32", 0), ("q4_0", 0), (dict(k="q8_0", v="q4_0"), 5)))
def test_scores_through_a_cache_are_those_of_decoding(llama, formats, residual):
    """Requests of several lengths in one batch, against each alone, token by token."""
    subject, rng = subject_of(llama[1]), random.Random(2)
    requests = []
    for length in (30, 11, 40):
        ids = [rng.randrange(40) for _ in range(length)]
        requests.append((ids[:-4], ids[-4:]))
    for (context, tail), (found, _) in zip(requests, tasks.score(subject, requests, 3, formats=formats,
                                                                 residual=residual)):
        cache, log_p = KVCache(subject.cfg, 1, 64, formats, residual), []
        with torch.inference_mode():
            for token in context + tail[:-1]:
                log_p.append(subject.model.logits(subject.model.hidden(torch.tensor([[token]]), cache))[0, 0])
        rows = torch.stack(log_p[-len(tail):]).log_softmax(-1)
        assert found == pytest.approx(sum(row[token].item() for row, token in zip(rows, tail)), abs=2e-3)
    exact = tasks.score(subject, requests, 3)
    assert (exact == tasks.score(subject, requests, 3, formats=formats, residual=residual)) == (formats == "fp32")


def test_a_continuation_longer_than_the_window_is_scored_in_parts_of_half_of_it(llama):
    """Against plain forward passes; the window is 48 tokens."""
    subject, rng = subject_of(llama[1]), random.Random(1)
    ids = [rng.randrange(40) for _ in range(110)]
    (found, greedy), (other, _) = tasks.score(subject, [(ids[:7], ids[7:]), (ids[:7], ids[7:55])], 2)
    expected, like = 0.0, True
    for start in range(7, 110, 24):
        end = min(start + 24, 110)
        with torch.inference_mode():
            log_p = subject.model(torch.tensor([ids[max(0, end - 49):end - 1]])).log_softmax(-1)[0, start - end:]
        expected += sum(row[token].item() for row, token in zip(log_p, ids[start:end]))
        like &= log_p.argmax(-1).tolist() == ids[start:end]
    assert found == pytest.approx(expected, abs=1e-3) and greedy == like
    assert other > found
