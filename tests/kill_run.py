"""Kill a training run at drawn events, start it again until it is done, and compare its log with a run never stopped.

    python3 tests/kill_run.py --kills 20

A run kills itself, by SIGKILL, at the N-th event of a kind since it was started, so that no kill depends on time:
before a step; with half a line of the log written; with half a file written beside the one that it replaces; just
after best.pt has been replaced, when last.pt is still older.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_dba
from helpers import TRAIN, cli, finish, last_step, losses, make_text, read_log, start

FLAGS = (f"{TRAIN} --dropout 0.1 --grad-accum 2 --lr 1e-3 --min-lr 1e-4 --attn-mode decoupled --null-attn --layers 2 "
         "--eval-every 7 --eval-iters 3 --save-every 5")
MOMENTS = {"step": 16, "line": 16, "writing": 8, "best.pt": 2}                  # and the latest event that is drawn


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def train_until_killed(moment, count, argv):
    """Train in this process, which dies at the count-th event."""
    seen = []
    sample_batch, append_line, replace = train_dba.sample_batch, train_dba.append_line, os.replace

    def is_due(event):
        seen.extend([event] * (event == moment))
        return event == moment and len(seen) == count

    def sampling(*args):
        if is_due("step"):
            die()
        return sample_batch(*args)

    def appending(path, **line):
        if is_due("line"):
            text = json.dumps(line)
            with open(path, "a") as f:
                f.write(text[:len(text) // 2])
            die()
        append_line(path, **line)

    def replacing(temporary, path):
        if is_due("writing"):
            os.truncate(temporary, temporary.stat().st_size // 2)
            die()
        replace(temporary, path)
        if path.name == "best.pt" and is_due("best.pt"):
            die()

    train_dba.sample_batch, train_dba.append_line, os.replace = sampling, appending, replacing
    return train_dba.main(argv)


def kill_and_compare(folder, kills, steps, seed=0):
    """Returns what happened, as a dict of counts. Raises AssertionError where the logs differ."""
    rng, counts = random.Random(seed), dict.fromkeys((*MOMENTS, "during a save", "with a torn line", "resumed"), 0)
    make_text(folder)
    whole, killed = f"{FLAGS} --steps {steps} --out-dir whole", f"{FLAGS} --steps {steps} --out-dir killed"
    result = cli(whole, folder)
    assert result.code == 0, result.stderr
    run = folder / "killed"
    for i in range(kills):
        before, moment = last_step(run), list(MOMENTS)[i % len(MOMENTS)]
        program = [__file__, "--at", moment, str(rng.randint(1, MOMENTS[moment])), "--"]
        result = finish(start(killed, folder, program))
        assert result.code == -signal.SIGKILL, f"kill {i} of {kills}, at {moment}, from step {before}: {result}"
        counts[moment] += 1
        counts["during a save"] += any(run.glob("*.tmp"))
        log = run / "train.jsonl"
        counts["with a torn line"] += log.exists() and not log.read_bytes().endswith(b"\n")
    result = cli(killed, folder)
    assert result.code == 0, result.stderr
    counts["resumed"] = sum(line["type"] == "resume_meta" for line in read_log(run))
    expected, got = losses(folder / "whole"), losses(run)
    assert [line["step"] for line in got if line["type"] == "train"] == list(range(1, steps + 1))
    for a, b in zip(expected, got):
        assert a == b, f"never stopped: {a}\nkilled: {b}"
    assert len(expected) == len(got)
    assert [line["type"] for line in read_log(run)].count("done") == 1
    assert not list(run.glob("*.tmp"))
    return counts


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, help="optimiser steps (20 a kill)")
    parser.add_argument("--seed", type=int, default=0, help="of the events")
    parser.add_argument("--at", nargs=2, metavar=("MOMENT", "N"), help="train, and die at the N-th event of a kind")
    parser.add_argument("flags", nargs="*", metavar="-- FLAG", help="of train_dba.py, with --at")
    args = parser.parse_args()
    if args.at:
        return train_until_killed(args.at[0], int(args.at[1]), args.flags)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        counts = kill_and_compare(Path(folder), args.kills, args.steps or 20 * args.kills, args.seed)
    print(f"{args.kills} kills, the same log bit for bit, {time.monotonic() - started:.0f} s:",
          ", ".join(f"{name} {n}" for name, n in counts.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
