"""eval_dba.py on small trained checkpoints: every command end to end, its figures worked out another way, and what it
refuses."""

import itertools
import json
import math
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_done, assert_error, call, make_text, snapshot

import eval_dba
import train_dba
from train_dba import KVCache, cache_bytes, load_checkpoint, load_model, rotate_cache, stream_bytes

BLOCK = 128
TRAIN = (f"--data text.txt --tokenizer byte --d-model 32 --layers 1 --n-head 2 --d-ff 64 --block {BLOCK} "
         "--batch-size 2 --dtype float32 --device cpu --steps 12 --lr 2e-2 --eval-every 12 --eval-iters 2")
MODES = {"standard": "", "decoupled": "--attn-mode decoupled --sem-dim 16 --geo-dim 32 --null-attn --tie-qk",
         "mla": "--attn-mode mla --kv-lora-rank 24 --rope-dim 8"}
EVALUATE = "--device cpu --ckpt"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with text.txt and a trained run of each mode, which no test changes."""
    folder = tmp_path_factory.mktemp("runs")
    make_text(folder, count=5000)
    for mode, flags in MODES.items():
        assert_done(call(f"{TRAIN} {flags} --out-dir {mode}", folder))
    return folder


@pytest.fixture
def folder(runs, tmp_path):
    """The same, to change."""
    shutil.copytree(runs, tmp_path / "work")
    return tmp_path / "work"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(eval_dba, "COPY_BYTES", 2**20)


def evaluate(args, folder):
    return call(args, folder, eval_dba.main)


def result_of(args, folder, path):
    assert_done(evaluate(args, folder))
    return json.loads((Path(folder) / path).read_text())


def test_several_caches_are_as_many_files_in_one_folder(runs, tmp_path):
    command = f"ppl {EVALUATE} decoupled --kv-cache fp16 hetero q4_0 --max-tokens 200"
    assert_done(evaluate(f"{command} --out {tmp_path}/new.folder", runs))
    found = {path.name: json.loads(path.read_text()) for path in (tmp_path / "new.folder").iterdir()}
    assert found.keys() == {"eval_ppl_fp16.json", "eval_ppl_hetero.json", "eval_ppl_q4_0.json"}
    for cache in ("fp16", "hetero", "q4_0"):
        alone = result_of(f"{command} --kv-cache {cache} --out {tmp_path}/one.json", runs,
                          tmp_path / "one.json")
        assert alone["loss"] == found[f"eval_ppl_{cache}.json"]["loss"]
    assert_error(evaluate(f"{command} --out {tmp_path}/new.json", runs), "--out")
    (tmp_path / "file").write_text("")
    assert_error(evaluate(f"{command} --out {tmp_path}/file/out", runs), "--out")


def validation(runs):
    """Token ids [N] of the text's last tenth, which the runs didn't train on."""
    ids = torch.tensor(list((runs / "text.txt").read_bytes()) + [256])
    return ids[len(ids) - round(len(ids) * 0.1):]


def plain_nll(model, ids):
    """nll [T] of ids [T + 1] without a cache, in float64."""
    with torch.inference_mode():
        return F.cross_entropy(model(ids[None, :-1])[0].double(), ids[1:], reduction="none")


# --- ppl

@pytest.mark.parametrize("block, stride", ((2, 1), (2, 2), (5, 1), (5, 3), (5, 5), (16, 1), (16, 7), (16, 16)))
@pytest.mark.parametrize("count", (2, 3, 16, 17, 18, 33, 50))
def test_windows_score_each_token_once_and_with_enough_context(count, block, stride):
    seen = []
    for start, ids, first in eval_dba.windows(torch.arange(count), block, stride):
        assert ids.tolist() == list(range(start, start + len(ids))) and len(ids) <= block + 1
        assert start == 0 or first >= block - stride
        seen += ids[first:].tolist()
    assert seen == list(range(1, count))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("stride", (BLOCK, 50))
def test_ppl_is_that_of_the_model_without_a_cache(runs, tmp_path, mode, stride):
    found = result_of(f"ppl {EVALUATE} {mode} --kv-cache fp32 --stride {stride} --out {tmp_path}/ppl.json", runs,
                      tmp_path / "ppl.json")
    model, ids = load_model(load_checkpoint(runs / mode / "best.pt")), validation(runs)
    total, done = 0.0, 1
    while done < len(ids):                                 # tokens from `done` on, in windows that begin at strides
        start = 0 if done == 1 else -(-(done - BLOCK) // stride) * stride
        window = ids[start:start + BLOCK + 1]
        total += plain_nll(model, window)[done - start - 1:].sum().item()
        done = start + len(window)
    assert found["tokens"] == len(ids) - 1
    assert found["loss"] == pytest.approx(total / (len(ids) - 1), abs=1e-5)
    assert found["ppl"] == pytest.approx(math.exp(found["loss"]))
    assert found["bpb"] == pytest.approx(total / math.log(2) / (len(ids) - 1), rel=1e-2)


# --- latency, memory, sweep

def test_latency(runs, tmp_path):
    found = result_of(f"latency {EVALUATE} decoupled --prompts 5 140 --steps 3 --prefills 1 --formats hetero q8_0 "
                      f"--kernel torch --out {tmp_path}/latency.json", runs, tmp_path / "latency.json")
    rows = found["rows"]
    assert [(r["prompt"], r["cache"]) for r in rows] == [(n, c) for n in (5, 140) for c in ("fp16", "hetero", "q8_0")]
    model = load_model(load_checkpoint(runs / "decoupled/best.pt"))
    weights = sum(p.numel() for p in model.parameters()) * 4
    per_token = dict(fp16=2 * (16 + 32 + 48), q8_0=(16 + 2) + (32 + 2) + (48 + 4), hetero=(8 + 2) + (32 + 2) + (24 + 4))
    fp16 = {r["prompt"]: r["ms_per_token"] for r in rows if r["cache"] == "fp16"}
    for row in rows:
        seen = row["prompt"] + eval_dba.WARM_UP + 2
        assert row["kernel"] == "torch" and row["ms_min"] <= row["ms_per_token"] <= row["ms_max"]
        assert row["bytes_read_per_token"] == weights + seen * per_token[row["cache"]]
        assert row["ratio_to_fp16"] == row["ms_per_token"] / fp16[row["prompt"]]
        assert row["tokens_per_second"] == pytest.approx(1000 / row["ms_per_token"])
        assert row["share_of_copy"] == pytest.approx(
            row["bytes_read_per_token"] * row["tokens_per_second"] / row["copy_bytes_per_second"])
        assert 0 < row["prefill_seconds"] < row["first_token_seconds"]


def test_latency_decodes_as_sampling_does(runs):
    args = eval_dba.make_parser().parse_args(f"latency {EVALUATE} {runs}/decoupled --steps 4 --prefills 2".split())
    subject, prompt = eval_dba.load_subject(args), torch.arange(30)[None]
    formats = eval_dba.compared_formats(args, subject)
    assert list(formats) == ["fp16", "q8_0", "q4_0", "hetero"]
    for run, policy in zip(eval_dba.decode_times(subject, prompt, formats, args).values(), formats.values()):
        cache = KVCache(subject.cfg, 1, 60, policy)
        *_, last = train_dba.generate(subject.model, prompt, 1 + eval_dba.WARM_UP + 4, cache, temperature=0)
        assert run.token.equal(last) and run.cache.length.equal(cache.length)
        assert (len(run.prefill), len(run.steps)) == (2, eval_dba.WARM_UP + 4)


def test_a_prompt_beyond_the_context_is_said_once(runs, tmp_path):
    out = f"--out {tmp_path}/out.json"
    short = evaluate(f"latency {EVALUATE} standard --prompts 5 --steps 1 --prefills 1 --formats fp16 {out}", runs)
    past = evaluate(f"latency {EVALUATE} standard --prompts 130 150 --steps 1 --prefills 1 --formats fp16 {out}", runs)
    assert short.stderr.count("warning: ") == 0 and past.stderr.count("warning: ") == 1
    assert f"{BLOCK} of the model's context" in past.stderr


@pytest.mark.parametrize("mode, residual", (("standard", 0), ("decoupled", 70), ("mla", 0)))
def test_memory(runs, tmp_path, mode, residual):
    found = result_of(f"memory {EVALUATE} {mode} --tokens 64 700 --kv-residual {residual} --out {tmp_path}/memory.json",
                      runs, tmp_path / "memory.json")
    cfg = load_checkpoint(runs / mode / "best.pt")["config"]
    names = ["fp16", "q8_0", "q4_0"] + ["hetero"] * (mode == "decoupled")
    assert [(r["tokens"], r["cache"]) for r in found["rows"]] == list(itertools.product((64, 700), names))
    for row in found["rows"]:
        assert row["cache_bytes"] == row["formula_bytes"]
        assert row["formula_bytes"] == cache_bytes(cfg, 1, row["tokens"], row["cache"], residual)
        if row["cache"] != "hetero":
            assert row["bytes_per_token"] == sum(stream_bytes(row["cache"], C) for C in cfg.attention.streams.values())
        if row["before_bytes"] is not None:
            assert row["fill_peak_bytes"] >= row["before_bytes"] > 2**20 and row["decode_peak_bytes"] > 2**20


@pytest.mark.skipif(eval_dba.forget_peak(torch.device("cpu")) is None, reason="the peak can't be reset here")
def test_the_peak_is_that_since_it_was_forgotten():
    device = torch.device("cpu")
    big = torch.ones(2**26)                                # 256 MiB
    del big
    before = eval_dba.forget_peak(device)
    assert eval_dba.peak_since(device) - before < 2**26
    big = torch.ones(2**26)
    assert 2**28 - 2**25 < eval_dba.peak_since(device) - before < 2**28 + 2**26
    del big


@pytest.mark.parametrize("mode", ("standard", "mla"))
def test_sweep_on_text_and_on_repeated_text(runs, tmp_path, mode):
    ids = validation(runs)
    long = 2 * len(ids)
    result = evaluate(f"sweep {EVALUATE} {mode} --kv-cache fp32 --contexts {long} 100 --chunk 256 --steps 2 "
                      f"--kernel torch --out {tmp_path}/sweep.json", runs)
    assert_done(result)
    assert "is repeated" in result.stderr
    found, model = json.loads((tmp_path / "sweep.json").read_text()), load_model(load_checkpoint(
        runs / mode / "best.pt"))
    assert [(r["context"], r["status"]) for r in found["rows"]] == [(100, "ok"), (long, "ok")]
    assert found["text_repeated"] and found["text_tokens"] == len(ids)
    for row in found["rows"]:
        nll, last = plain_nll(model, ids.repeat(3)[:row["context"] + 1]), (row["context"] - 1) % 256 + 1
        assert row["loss"] == pytest.approx(nll[-last:].mean().item(), abs=1e-4)
        assert row["cache_bytes"] == cache_bytes(model.cfg, 1, row["context"] + 2, "fp32")
        assert row["prefill_seconds"] > 0 and row["ms_per_token"] > 0


def test_sweep_stops_where_memory_or_time_would_not_suffice(runs, tmp_path, monkeypatch):
    command = f"sweep {EVALUATE} decoupled --steps 1 --contexts 64 2048 4096 --kv-cache q8_0 --out {tmp_path}/s.json"
    args = eval_dba.make_parser().parse_args(command.replace("decoupled", f"{runs}/decoupled").split())
    subject = eval_dba.load_subject(args)
    room = eval_dba.margin(subject, args.chunk) + cache_bytes(subject.cfg, 1, 2049, "q8_0")
    for free, ran in ((room, 2), (room - 1, 1)):
        monkeypatch.setattr(eval_dba, "available_memory", lambda device: free)
        rows = result_of(command, runs, tmp_path / "s.json")["rows"]
        assert [row["status"] == "ok" for row in rows] == [i < ran for i in range(3)]
        assert rows[ran]["status"].startswith("not run: needs ") and f"{free:,} are free" in rows[ran]["status"]
    monkeypatch.undo()
    rows = result_of(f"{command} --max-seconds 0", runs, tmp_path / "s.json")["rows"]
    assert [row["status"].split(":")[0] for row in rows] == ["stopped", "not run", "not run"]
    assert "--max-seconds" in rows[2]["status"] and "64 tokens" in rows[2]["status"]


def test_sweep_keeps_what_it_has_where_memory_runs_out_all_the_same(runs, tmp_path, monkeypatch):
    def little_memory(cfg, batch, tokens, *how):
        if tokens > 1000:
            raise RuntimeError("out of memory\nand a long explanation")
        return KVCache(cfg, batch, tokens, *how)

    command = f"sweep {EVALUATE} decoupled --steps 1 --contexts 64 2048 --out {tmp_path}/s.json"
    monkeypatch.setattr(eval_dba, "KVCache", little_memory)
    rows = result_of(command, runs, tmp_path / "s.json")["rows"]
    assert [r["status"] for r in rows] == ["ok", "failed: no memory for a KV cache of 2,049 tokens (out of memory)"]


def test_available_memory_is_less_than_all_there_is():
    assert 2**20 < eval_dba.available_memory(torch.device("cpu")) < 2**50


# --- policy

POLICY = "--tokens 512 --batch-size 3 --kernel-tokens 100"


def sizes_and_figures(row):
    return row["bytes_per_token"], row["delta_nll"]


def passes(row, limits):
    return all(row[name] <= limit for name, limit in limits.items())


@pytest.mark.parametrize("mode", ("decoupled", "mla"))
def test_policy_is_the_best_of_the_table_within_the_budget(folder, mode):
    cfg = load_checkpoint(folder / mode / "best.pt")["config"]
    found = result_of(f"policy {EVALUATE} {mode} {POLICY} --max-delta-nll 0.002 --max-kl 0.01", folder,
                      f"{mode}/kv_policy.json")
    tried, limits = found["tried"], dict(delta_nll=0.002, kl=0.01)
    assert found["thresholds"] == limits and found["checkpoint_sha256"] == eval_dba.file_hash(folder / mode / "best.pt")
    assert found["formats"].keys() == cfg.attention.streams.keys()
    chosen, = [row for row in tried if all(row[name] == found[name] for name in ("formats", "rotate", "residual"))]
    allowed = [row for row in tried if passes(row, limits)]
    assert chosen in allowed and sizes_and_figures(chosen) == min(map(sizes_and_figures, allowed))
    assert found["bytes_per_token"] == sum(stream_bytes(found["formats"][name], C)
                                           for name, C in cfg.attention.streams.items())
    assert {row["rotate"] for row in tried} == {False, True} and {row["residual"] for row in tried} == {0, 32}
    assert not any(set(row["formats"].values()) == {"fp16"} for row in tried)
    if mode == "decoupled":
        for formats in (dict(k_sem="q4_0", k_geo="q8_0", v="q4_0"), dict(k_sem="q8_0", k_geo="q4_0", v="q4_0")):
            assert sum(row["formats"] == formats and row["residual"] == 0 for row in tried) == 2


def test_policy_figures_are_those_of_the_model(folder):
    found = result_of(f"policy {EVALUATE} decoupled {POLICY} --max-kv-bytes-per-token 100 --max-kl 9 --long "
                      "--long-factor 3", folder, "decoupled/kv_policy.json")
    tried, ids = found["tried"], validation(folder)
    within = [row for row in tried if row["bytes_per_token"] <= 100]
    assert found["short"]["delta_nll"] == min(row["delta_nll"] for row in within)
    model, rotated = (load_model(load_checkpoint(folder / "decoupled/best.pt")) for _ in range(2))
    rotate_cache(rotated)
    for length, last, row in [(BLOCK, BLOCK // 2, row) for row in tried[::9]] + [
            (3 * BLOCK, BLOCK, {**found, **found["long"]})]:
        starts = torch.linspace(0, len(ids) - length - 1, 512 // length).long()
        windows = torch.stack([ids[start:start + length + 1] for start in starts])
        expected, logits = measured = [], []
        for m, formats, residual, into in ((model, "fp16", 0, expected), (
                rotated if row["rotate"] else model, row["formats"], row["residual"], logits)):
            cache = KVCache(model.cfg, len(windows), length, formats, residual)
            with torch.inference_mode():
                for piece in windows[:, :-1].split(residual // 8 or length, 1):
                    into.append(m(piece, cache=cache))
        expected, logits = (torch.cat(parts, 1)[:, -last:].double() for parts in measured)
        nll = [F.cross_entropy(x.flatten(0, 1), windows[:, -last:].flatten()).item() for x in (expected, logits)]
        assert row["delta_nll"] == pytest.approx(nll[1] - nll[0], abs=1e-6)
        kl = F.kl_div(logits.log_softmax(-1), expected.log_softmax(-1), log_target=True, reduction="sum")
        assert row["kl"] == pytest.approx(kl.item() / expected[..., 0].numel(), abs=1e-6)
        assert row["max_delta_logit"] == pytest.approx((logits - expected).abs().max().item(), abs=1e-5)


def test_bytes_of_a_residual_window_count():
    cfg = train_dba.make_config(data="-", attn_mode="decoupled", sem_dim=32, geo_dim=64, n_head=4, layers=2, block=640)
    formats = (("k_sem", "q4_0"), ("k_geo", "q8_0"), ("v", "q4_0"))
    assert eval_dba.Policy(formats).bytes_per_token(cfg) == 2 * (18 + 68 + 54)
    assert eval_dba.Policy(formats, residual=128).bytes_per_token(cfg) == 2 * (0.8 * 140 + 0.2 * 384)
    assert eval_dba.Policy(formats, residual=128).bytes_per_token(cfg) * 640 == cache_bytes(
        cfg, 1, 640, dict(formats), 128)


def test_frontier_by_hand():
    tried = {name: dict(delta_nll=nll) for name, nll in dict(a=0.3, b=0.1, c=0.2, d=0.1, e=math.inf, f=-0.1).items()}
    assert eval_dba.frontier(dict(a=10, b=20, c=20, d=30, e=5, f=40), tried) == ["a", "b", "f"]


def test_the_long_check_rejects(folder, monkeypatch):
    command = f"policy {EVALUATE} standard {POLICY} --max-delta-nll 1 --max-kl 9"
    first = result_of(command, folder, "standard/kv_policy.json")
    assert first["long"] is None
    measure = eval_dba.measure_policies

    def worse(subject, rotated, policies, windows, last, batch_size):
        found = measure(subject, rotated, policies, windows, last, batch_size)
        if windows.size(1) > BLOCK + 1:
            for policy, row in found.items():
                row["delta_nll"] = 2.0 if "nf4" in str(policy) or "q4" in str(policy) else 0.5
        return found

    monkeypatch.setattr(eval_dba, "measure_policies", worse)
    second = result_of(f"{command} --long --long-factor 2", folder, "standard/kv_policy.json")
    assert {*first["formats"].values()} <= {*eval_dba.FOUR_BITS} and second["formats"] == dict(k="q8_0", v="q8_0")
    assert second["long"]["delta_nll"] == 0.5
    assert all(row["long"]["delta_nll"] == 2 for row in second["tried"]
               if row["bytes_per_token"] < second["bytes_per_token"])


def test_policy_is_deterministic_and_writes_nothing_if_nothing_passes(folder):
    command = f"policy {EVALUATE} mla {POLICY} --max-delta-nll 1"
    assert_error(evaluate(f"{command} --max-delta-logit 0", folder), "none of", "policies passes", "bytes per token")
    assert_error(evaluate(f"policy {EVALUATE} mla {POLICY} --max-kv-bytes-per-token 3", folder), "none of")
    assert not (folder / "mla/kv_policy.json").exists()
    result_of(command, folder, "mla/kv_policy.json")
    before = snapshot(folder)
    table = evaluate(command, folder).stdout
    assert snapshot(folder) == before
    assert table.count("<- chosen") == 1 and "frontier" in table


def test_a_nan_fails():
    limits = dict(delta_nll=0.1, kl=0.1)
    assert eval_dba.failures(dict(delta_nll=math.nan, kl=0.0, max_delta_logit=9.0), limits) == ["delta_nll"]


# --- --kv-cache auto

SAMPLE = "--mode sample --device cpu --dtype float32 --prompt-tokens 1,2,3 --max-new-tokens 20 --temperature 0"


@pytest.fixture
def found_policy(folder):
    """A run folder with a policy, and that policy."""
    digest = eval_dba.file_hash(folder / "decoupled/best.pt")
    policy = dict(checkpoint_sha256=digest, formats=dict(k_sem="nf4", k_geo="q8_0", v="q4_0"), rotate=True, residual=4)
    (folder / "decoupled/kv_policy.json").write_text(json.dumps(policy))
    return folder, policy


def test_auto_is_what_the_policy_says(found_policy):
    folder, _ = found_policy
    result = call(f"{SAMPLE} --ckpt decoupled/best.pt --kv-cache auto", folder)
    same = call(f"{SAMPLE} --ckpt decoupled/best.pt --kv-cache q8_0 --kv-cache-k-sem nf4 --kv-cache-v q4_0 --kv-rotate "
                "--kv-residual 4", folder)
    assert_done(result)
    first, rest = result.stderr.split("\n", 1)
    assert result.stdout == same.stdout and rest == same.stderr
    for word in ("auto", "kv_policy.json", "k_sem nf4", "k_geo q8_0", "v q4_0", "rotated", "residual 4"):
        assert word in first


def test_the_faster_kernel_is_the_policys(found_policy, monkeypatch):
    folder, policy = found_policy
    (folder / "decoupled/kv_policy.json").write_text(json.dumps(dict(policy, kernel="torch")))
    result = call(f"{SAMPLE} --ckpt decoupled/best.pt --kv-cache auto", folder)
    assert_done(result)
    assert "kernel torch (asked for)" in result.stderr

    def slow(q, *rest):
        time.sleep(0.02)
        return train_dba.decode_attention(q, *rest)

    for auto, faster in ((slow, "torch"), (train_dba.decode_attention, "")):
        kernels = dict(auto=train_dba.Kernel("other" if faster else "torch", auto), torch=train_dba.TORCH)
        monkeypatch.setattr(eval_dba, "resolve_kernel", lambda name, *rest: (kernels[name], ""))
        subject = eval_dba.load_subject(SimpleNamespace(ckpt=folder / "decoupled", device="cpu", dtype="float32",
                                                        out=None))
        times = eval_dba.kernel_times(subject, eval_dba.Policy(tuple(policy["formats"].items())), 100)
        assert min(times, key=times.get, default="") == faster and len(times) == 2 * bool(faster)


def test_auto_with_the_policy_that_was_searched(folder):
    assert_done(evaluate(f"policy {EVALUATE} mla/best.pt {POLICY} --max-delta-nll 0.5 --max-kl 9", folder))
    assert_done(call(f"{SAMPLE} --ckpt mla/best.pt --kv-cache auto", folder))


@pytest.mark.parametrize("change", (dict(formats=dict(k="q8_0", v="q8_0")), dict(formats="q8_0"), dict(rotate=None),
                                    dict(formats=dict(k_sem="q9", k_geo="q8_0", v="q4_0")), dict(residual=-1),
                                    dict(residual="4"), dict(kernel=3)))
def test_auto_refuses_a_damaged_policy(found_policy, change):
    folder, policy = found_policy
    (folder / "decoupled/kv_policy.json").write_text(json.dumps({**policy, **change}))
    result = call(f"{SAMPLE} --ckpt decoupled/best.pt --kv-cache auto", folder)
    assert_error(result, "kv_policy.json is damaged", "eval_dba.py policy")
    assert result.stdout == ""


def test_auto_refuses_a_missing_torn_or_other_policy(found_policy):
    folder, _ = found_policy
    command = f"{SAMPLE} --ckpt decoupled/%s --kv-cache auto"
    assert_error(call(command % "last.pt", folder), "another checkpoint", "eval_dba.py policy")
    path = folder / "decoupled/kv_policy.json"
    for torn in (path.read_bytes()[:50], b"[]", b"\xff\xfe", b""):
        path.write_bytes(torn)
        assert_error(call(command % "best.pt", folder), "is damaged", "eval_dba.py policy")
    path.unlink()
    assert_error(call(command % "best.pt", folder), "is missing", "eval_dba.py policy")


@pytest.mark.parametrize("flag", ("--kv-rotate", "--kv-residual 0", "--kv-residual 8", "--kv-cache-v fp16",
                                  "--no-kv-rotate"))
def test_auto_contradicts_what_the_policy_says(found_policy, flag):
    result = call(f"{SAMPLE} --ckpt decoupled/best.pt --kv-cache auto {flag}", found_policy[0])
    assert_error(result, "--kv-cache auto", flag.split()[0].replace("--no-", "--"))


# --- what is refused

REFUSED = {
    "ppl --ckpt standard --stride 200 --block 100": ("--stride 200",),
    "ppl --ckpt standard --kv-cache hetero": ("--kv-cache hetero", "standard"),
    "ppl --ckpt nowhere": ("nowhere",),
    "ppl --ckpt text.txt": ("text.txt", "damaged"),
    "ppl --ckpt standard --data nowhere.npy": ("--data nowhere.npy",),
    "latency --ckpt mla --formats hetero": ("--formats hetero", "mla"),
    "latency --ckpt standard --kernel metal": ("--kernel metal",),
    "latency --ckpt standard --device nonsense": ("--device nonsense",),
    "memory --ckpt standard --formats hetero": ("--formats hetero",),
    "sweep --ckpt standard --kv-cache hetero": ("--kv-cache hetero",),
    "sweep --ckpt standard --data empty.txt": ("nothing to predict",),
    "policy --ckpt standard": ("--max-delta-nll", "--max-kv-bytes-per-token"),
    "policy --ckpt standard --max-delta-nll 1 --max-kv-bytes-per-token 99": ("--max-delta-nll",),
    "policy --ckpt standard --max-delta-nll 1 --long --long-factor 999": ("too few", "--data"),
}


@pytest.mark.parametrize("args", REFUSED)
def test_refused_in_one_line(folder, args):
    (folder / "empty.txt").write_text("a")
    before = snapshot(folder)
    assert_error(evaluate(args if "--device" in args else f"{args} --device cpu", folder), *REFUSED[args])
    assert snapshot(folder) == before


@pytest.mark.parametrize("args", ("", "nothing", "ppl", "latency --ckpt a --prompts 0", "policy --ckpt a --max-kl nan",
                                  "policy --ckpt a --max-delta-nll -1", "sweep --ckpt a --max-seconds inf",
                                  "memory --ckpt a --tokens 8", "ppl --ckpt a --kv-cach q8_0"))
def test_bad_flags_are_a_usage_error(runs, args):
    result = evaluate(args, runs)
    assert result.code == 2 and "error: " in result.stderr
