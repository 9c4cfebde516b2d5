"""The one loader, the identity of data, and files that are read back."""

import json

import numpy as np
import pytest
import torch
from trained import BLOCK, EVALUATE, evaluate, result_of

import train_dba
from evals import probes, subject, tasks
from helpers import TINY, assert_done, assert_error, call, write_tokens
from paper.shapes import read_json
from subjects import write_checkpoint
from train_dba import UserError

# --- What is measured


def test_a_run_folder_and_its_checkpoint_are_one_subject(runs):
    one, other = subject.load_subject(runs / "mla", "cpu"), subject.load_subject(runs / "mla/best.pt", "cpu")
    assert one.sha256 == other.sha256 == train_dba.file_hash(runs / "mla/best.pt")
    assert one.folder == runs / "mla" and one.step == 12 and not one.model.training
    assert one.data["sha256"] == train_dba.file_hash(runs / "text.txt")


@pytest.mark.parametrize("ckpt", ("nowhere", "nowhere/best.pt", "empty"))
def test_a_missing_checkpoint_names_the_command_that_makes_one(tmp_path, ckpt):
    (tmp_path / "empty").mkdir()
    assert_error(evaluate(f"ppl {EVALUATE} {ckpt}", tmp_path), ckpt, "make checkpoints")


# --- On which tokens

def trained_on_words(folder, text):
    (folder / "a.tokens").write_text(text)
    assert_done(call(f"--data a.tokens {TINY} --steps 2 --out-dir run", folder))


def test_only_the_very_data_of_the_checkpoint_is_measured(tmp_path):
    text = "".join(f"sun moon {i % 7} river stone bird\n" for i in range(200))
    trained_on_words(tmp_path, text)
    first = result_of(f"ppl {EVALUATE} run", tmp_path, "run/eval_ppl_fp16.json")
    (tmp_path / "a.tokens").write_text("bird stone river moon sun\n" + text)    # another order: other ids
    for command in ("ppl", "rank", "policy --max-delta-nll 1", "sweep"):
        assert_error(evaluate(f"{command} {EVALUATE} run --out other", tmp_path), "trained on other data", "--data")
    again = result_of(f"ppl {EVALUATE} run --data a.tokens --out b.json", tmp_path, "b.json")
    assert again["loss"] == pytest.approx(first["loss"], abs=1.0), "the checkpoint's own ids"
    (tmp_path / "moved.tokens").write_text(text)
    (tmp_path / "a.tokens").write_text(text)
    assert result_of(f"ppl {EVALUATE} run", tmp_path, "run/eval_ppl_fp16.json")["loss"] == first["loss"]


def test_a_tokenizer_that_came_with_the_weights_reads_the_data(folder, monkeypatch):
    """As --init-from brings it: no flag of the run names it, and a text would be taken for GPT-2's."""
    flags = f"--data text.txt --block {BLOCK} --batch-size 2 --dtype float32 --device cpu --steps 1"
    assert_done(call(f"{flags} --init-from standard --out-dir further", folder))
    monkeypatch.chdir(folder)
    ids = [subject.own_validation(subject.load_subject(name, "cpu")).ids for name in ("standard", "further")]
    assert torch.equal(*ids)


def test_a_checkpoint_that_does_not_say_what_it_read_needs_data(tmp_path):
    write_checkpoint(tmp_path / "run")
    assert_error(evaluate(f"ppl {EVALUATE} run", tmp_path), "--data is missing")


def test_word_ids_of_another_vocabulary_are_refused(tmp_path):
    """As many types, but other words."""
    trained_on_words(tmp_path, "sun moon river stone bird\n" * 100)
    words = subject.load_subject(tmp_path / "run", "cpu").tokenizer.words
    for name, vocabulary in (("same", words), ("other", words[::-1])):
        (tmp_path / f"{name}.vocab").write_text(json.dumps(vocabulary))
        write_tokens(tmp_path, name, np.arange(60) % len(words), tokenizer="word", vocab_size=len(words),
                     vocab=f"{name}.vocab", eot=words.index("<eos>"))
    assert_done(evaluate(f"ppl {EVALUATE} run --data same.npy", tmp_path))
    assert_error(evaluate(f"ppl {EVALUATE} run --data other.npy", tmp_path), "other.npy", "other words")


def test_bytes_of_a_part_are_known_of_byte_tokens(runs):
    decoupled = subject.load_subject(runs / "decoupled", "cpu")
    decoupled.cfg.__dict__["data"] = str(runs / "text.txt")
    whole, part = subject.held_out(decoupled, None), subject.held_out(decoupled, None, 100)
    assert len(part.ids) == part.text_bytes == 100 and part.ids.equal(whole.ids[:100])
    assert whole.text_bytes == len(whole.ids) - 1, "all but the end of the document"


# --- Results

def test_cache_names():
    assert subject.cache_name("q4_0", False, 0) == "q4_0"
    assert subject.cache_name("hetero", True, 32) == "hetero_rotated_residual32"


def test_results_are_json_with_a_line_a_record():
    result = dict(a=dict(b=[1, 2], c="x\ny"), rows=[dict(i=1), dict(i=2)], none=[], d=None)
    text = subject.json_text(result)
    assert json.loads(text) == result and '\n  {"i": 1},\n  {"i": 2}\n' in text


GOOD = dict(tasks=dict(piqa=dict(items=["0-a"], correct=dict(acc=[1]))))
DAMAGED = {
    "nesting": "[" * 100_000,
    "an object nested": '{"tasks":' * 50_000,
    "a huge number": '{"tasks": 1' + "0" * 10_000 + "}",
    "bytes": b"\xff\xfe{",
    "nothing": "",
    "a list": "[]",
    "tasks as a list": json.dumps(dict(tasks=[])),
    "items as numbers": json.dumps(dict(tasks=dict(piqa=dict(items=[1], correct={})))),
    "correct as text": json.dumps(dict(tasks=dict(piqa=dict(items=["a"], correct=dict(acc="1"))))),
    "an infinite float": json.dumps(dict(tasks=dict(piqa=dict(items=["a"], correct=dict(acc=[float("inf")]))))),
    "null": "null",
}


@pytest.mark.parametrize("shape", (tasks.COMPARABLE, probes.COMPARABLE))
@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_results_are_one_line(tmp_path, name, shape):
    path, content = tmp_path / "a.json", DAMAGED[name]
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match="a.json is damaged") as e:
        read_json(path, shape)
    assert "\n" not in str(e.value) and len(str(e.value)) < 300


def test_a_whole_result_is_read(tmp_path):
    (tmp_path / "good.json").write_text(json.dumps(GOOD))
    assert read_json(tmp_path / "good.json", tasks.COMPARABLE) == GOOD


def test_a_bar_counts_units(capsys, monkeypatch):
    """Without a terminal, a line of each state that is shown."""
    monkeypatch.setattr(train_dba, "LINE_SECONDS", 0)
    with subject.Progress("window", "policies") as report:
        for done, total in ((3, 10), (7, 10), (10, 10), (2, 4), (4, 4)):        # it begins again
            report(done, total)
    said = capsys.readouterr().err
    for state in ("30 %, 3 of 10 window", "100 %, 10 of 10 window", "100 %, 4 of 4 window"):
        assert f"policies: {state}" in said
    assert " left" in said and "\r" not in said
