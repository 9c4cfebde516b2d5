"""What the tests of the trainer's command line share: running it, reading its log, making small data."""

import contextlib
import hashlib
import io
import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np

import train_dba

TRAINER = Path(train_dba.__file__).resolve()
TINY = "--d-model 32 --layers 1 --n-head 2 --d-ff 64 --block 16 --batch-size 4 --dtype float32 --device cpu"
TRAIN = f"--data text.txt --tokenizer byte {TINY} --warmup-steps 0 --log-every 1"
Result = namedtuple("Result", "code stdout stderr")


def environment():
    return {**os.environ, "OMP_WAIT_POLICY": "passive", "PYTHONDONTWRITEBYTECODE": "1"}


def start(args, cwd, program=(), **how):
    """The trainer as a process of its own. program: what to run in place of train_dba.py."""
    command = [sys.executable, *(program or [str(TRAINER)]), *shlex.split(args)]
    return subprocess.Popen(command, cwd=cwd, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, **how)


def finish(process, timeout=120):
    """Result of a started process; it's killed when it outlives the timeout."""
    try:
        out, err = process.communicate(timeout=timeout)
        return Result(process.returncode, out.decode(errors="replace"), err.decode(errors="replace"))
    finally:
        process.kill()


def cli(args, cwd, **how):
    return finish(start(args, cwd, **how))


def call(args, cwd, main=train_dba.main):
    """The trainer, or another main(argv), in this process, which is quicker; an exception that would be a traceback is
    raised."""
    out, err, before = io.StringIO(), io.StringIO(), Path.cwd()
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    os.chdir(cwd)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(shlex.split(args))
    except SystemExit as e:
        code = e.code
    finally:
        os.chdir(before)
        for s, handler in handlers.items():
            signal.signal(s, handler)
    return Result(code, out.getvalue(), err.getvalue())


def lines(text):
    """What was printed, less the states of the progress bar."""
    return [line for line in re.split(r"[\r\n]", text) if line.strip() and "tok/s" not in line]


def assert_error(result, *words, code=1):
    """The run failed with one line, which holds the words."""
    assert result.code == code, result
    assert "Traceback" not in result.stderr
    said = lines(result.stderr)
    assert said and said[-1].startswith("error: "), result.stderr
    assert sum(line.startswith("error: ") for line in said) == 1
    missing = [word for word in words if word not in said[-1]]
    assert not missing, f"{missing} not in: {said[-1]}"


def assert_done(result):
    assert result.code == 0, result.stderr


def make_text(folder, name="text.txt", count=1500, seed=0):
    rng = random.Random(seed)
    text = "".join(rng.choice(["ab", "cde", "fghi", "j", "kl\n", "mnö", "op.", "q"]) + " " for _ in range(count))
    (folder / name).write_text(text, encoding="utf-8")
    return text


def write_tokens(folder, name, ids, dtype=np.uint16, **sidecar):
    """A token file and its sidecar, as prepare_fineweb.py would write them for bytes; sidecar: fields that differ."""
    ids = np.asarray(ids, dtype=dtype)
    path = folder / f"{name}.npy"
    np.save(path, ids)
    info = dict(dataset="made up", revision=None, tokenizer="byte", vocab_size=257, eot=256, tokens=len(ids),
                documents=1, sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
                text_bytes=int((ids != 256).sum()), val=None, vocab=None)
    (folder / f"{name}.json").write_text(json.dumps({**info, **sidecar}))
    return ids


def edit_sidecar(path, **fields):
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def read_log(folder):
    return [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]


def losses(folder):
    """What must be equal, bit for bit, however often a run was stopped; in the order of the log."""
    keys = ("type", "step", "tokens", "loss", "lr", "grad_norm", "val_loss", "best_val_loss")
    log = [line for line in read_log(folder) if line["type"] in ("train", "eval")]
    return [{key: line[key] for key in keys if key in line} for line in log]


def last_step(folder):
    """The last step in a log that a running process may be writing to; 0 before there is one."""
    log = folder / "train.jsonl"
    steps = re.findall(r'"step": (\d+), "tokens"', log.read_text()) if log.exists() else []
    return int(steps[-1]) if steps else 0


def snapshot(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}
