"""Damaged files of every kind end in right output or in one error line, and nothing saved is lost: runs tests/fuzz.py.
FUZZ_SEED and FUZZ_VARIANTS choose other damages."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import fuzz
import mutations
from fuzz import CASES, Case, Command, Result

HARNESS = Path(fuzz.__file__)


def fuzzed(folder, part, variants):
    """Report of a part of the table."""
    report = folder / "report.json"
    variants, seed = os.environ.get("FUZZ_VARIANTS", variants), os.environ.get("FUZZ_SEED", fuzz.SEED)
    command = [HARNESS, "--part", part, "--variants", variants, "--seed", seed, "--report", report]
    result = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True)
    assert report.exists(), result.stdout + result.stderr
    return json.loads(report.read_text())


def test_damaged_files(tmp_path):
    report = fuzzed(tmp_path, "base", fuzz.VARIANTS)
    assert report["variants"] >= 300
    assert report["refused"] > report["variants"] / 3      # or what is read isn't what is damaged
    assert not report["idle"]
    assert not report["faults"], "\n".join(report["faults"])


def test_damaged_llamas_and_tasks(tmp_path):
    lacking = sorted({name for case in CASES for name in fuzz.missing_packages(case)})
    if lacking:
        pytest.skip(f"needs {', '.join(lacking)}: pip install -r requirements-eval.txt")
    report = fuzzed(tmp_path, "optional", 60)
    assert not report["idle"]
    assert not report["faults"], "\n".join(report["faults"])


# -----------------------------------------------------------------------------
# The harness itself

CASE = Case("a case", "a.json", "json", Command("script", "", "json out.json", ("out.json",)), "same")
BEFORE = {"a.json": b"{}", "last.pt": b"weights", "train.jsonl": b'{"type": "train", "loss": 1}\n'}


def judged(tmp_path, result, **changed):
    """What the harness says of a command that ended so, after it changed files (None: deleted)."""
    for name, content in {**BEFORE, "out.json": b"[1]", **changed}.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
    return fuzz.judge(CASE, tmp_path, result, BEFORE, ([1], []))[0]


@pytest.mark.parametrize("result", [
    Result(0, "", ""),
    Result(0, "", "note: left out\n"),
    Result(1, "", "a.json: left out\nerror: a.json is damaged; make it again\n"),
    Result(2, "", "  5%|#  | 1.00k/2.00k [00:01, 3.2ktok/s]\rerror: step 3: loss nan\n"),
], ids=str)
def test_what_is_right(tmp_path, result):
    assert judged(tmp_path, result) is None


@pytest.mark.parametrize("result, word", [
    (Result(1, "", "Traceback (most recent call last):\n  File ...\nKeyError: 'x'\n"), "traceback: KeyError"),
    (Result(0, "", "Traceback (most recent call last):\n  File ...\nKeyError: 'x'\n"), "traceback: KeyError"),
    (Result(1, "", ""), "0 error lines"),
    (Result(1, "error: on standard output", ""), "0 error lines"),
    (Result(1, "", "error: one\nerror: two\n"), "2 error lines"),
    (Result(1, "", "error: a tensor([1,\n  2])\n"), "1 error lines"),
    (Result(1, "", f"error: {'x' * 60_000}\n"), "60007 characters"),
    (Result(1, "", "error: \x1b[31m\n"), "unprintable"),
    (Result(-9, "", ""), "SIGKILL"),
    (Result(-11, "", "error: a line before it crashed\n"), "SIGSEGV"),
    (Result(-9, "", "", hung=True), "ran for more than"),
], ids=str)
def test_what_is_wrong(tmp_path, result, word):
    assert word in judged(tmp_path, result)


@pytest.mark.parametrize("content", [b"[2]", b"[NaN]", b"[1e999]", b"[1", b"\xff", None])
def test_wrong_output(tmp_path, content):
    assert "exit 0" in judged(tmp_path, Result(0, "", ""), **{"out.json": content})


@pytest.mark.parametrize("code", [0, 1])
@pytest.mark.parametrize("name, content", [
    ("last.pt", b"other weights"), ("last.pt", None), ("a.json", b"[]"), ("train.jsonl", b""), ("train.jsonl", None)])
def test_harm(tmp_path, code, name, content):
    result = Result(code, "", "error: refused\n" if code else "")
    assert f"changed or left {name}" in judged(tmp_path, result, **{name: content})


def test_a_log_may_grow_before_a_run_fails_and_temporary_files_may_not_stay(tmp_path):
    result = Result(1, "", "error: step 3: loss nan\n")
    assert judged(tmp_path, result, **{"train.jsonl": BEFORE["train.jsonl"] + b'{"type": "resume_meta"}\n'}) is None
    assert "last.pt.1.tmp" in judged(tmp_path, result, **{"last.pt.1.tmp": b""})


# Stand-ins for a script's main(), in a process of their own: forks of this one would keep the locks of its threads.
MAINS = {
    "raise KeyError('x')": "traceback: KeyError",
    "sys.exit('error: said')": None,
    "return 3": "exit 3 with 0 error lines",
    "bytearray(3 << 30)": "traceback: MemoryError",
    "while True: pass": "SIGXCPU",
    "os.kill(os.getpid(), 11)": "SIGSEGV",
    "time.sleep(1000)": "ran for more than",
    "import subprocess; subprocess.run(['sleep', '1000'])": "ran for more than",
}


@pytest.mark.parametrize("body", MAINS)
def test_limits(tmp_path, body):
    code = f"""
import os, sys, time, types
sys.path.insert(0, {str(HARNESS.parent)!r})
import fuzz
from pathlib import Path
def main(argv):
    {body}
sys.modules["script"] = types.SimpleNamespace(main=main)
fuzz.CPU_SECONDS, fuzz.WALL_SECONDS = 1, {10 if "1000" in body else 600}
folder = Path("folder")
folder.mkdir()
def work(note):
    fuzz.limit()
    return fuzz.call("script", "")
print(fuzz.misbehaviour(fuzz.wait(fuzz.fork(folder.resolve(), work), folder)))
"""
    said = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert not said.stderr
    assert MAINS[body] is None and said.stdout == "None\n" or MAINS[body] and MAINS[body] in said.stdout


def samples(folder):
    """{format: a small whole file of it}"""
    content = {"json": '{"a": [1, {"b": 2.5, "c": null}], "d": "naïve"}', "jsonl": '{"a": 1}\n{"b": [2, 3]}\n',
               "text": "naïve text\n" * 9}
    for name, text in content.items():
        (folder / name).write_text(text)
    (folder / "bytes").write_bytes(bytes(range(256)))
    with open(folder / "npy", "wb") as f:
        np.save(f, np.arange(100, dtype=np.uint16))
    return {name: folder / name for name in (*content, "bytes", "npy")}


@pytest.mark.parametrize("kind", ["json", "jsonl", "text", "bytes", "npy"])
def test_mutators_change_the_file_and_a_seed_decides_how(tmp_path, kind):
    def damaged(mutator, seed, name):
        """What a mutator says and leaves; None for what isn't a file."""
        folder = tmp_path / f"{mutator.__name__}_{name}"
        folder.mkdir()
        path = samples(folder)[kind]
        said = mutator(random.Random(seed), path)
        return said, path.read_bytes() if path.is_file() and path.stat().st_size < 1e8 else None

    for mutator in set(mutations.FORMATS[kind]):
        whole = samples(tmp_path)[kind].read_bytes()
        changes = [damaged(mutator, seed, f"{seed}") for seed in range(4)]
        assert any(content != whole for _, content in changes), mutator
        assert changes[1] == damaged(mutator, 1, "again"), mutator
