"""Kill a training run at random moments, start it again until it is done, and compare its log with a run never stopped.

    python3 tests/kill_run.py --kills 20

Of three kills one comes at a random moment of training, one while a checkpoint is being written, one just after best.pt
has been replaced, when last.pt is still older.
"""

import argparse
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from helpers import TRAIN, cli, last_step, losses, make_text, read_log, start

FLAGS = (f"{TRAIN} --dropout 0.1 --grad-accum 2 --lr 1e-3 --min-lr 1e-4 --attn-mode decoupled --null-attn --layers 2 "
         "--eval-every 7 --eval-iters 3 --save-every 5")
MOMENTS = ("random", "writing", "best.pt")


def kill_at(process, folder, moment, delay):
    """Kill a run that has resumed, at the moment named. Returns whether it was still running."""
    def changed(name):
        return (folder / name).stat().st_mtime_ns if (folder / name).exists() else 0

    resumed, best = changed("command.txt"), changed("best.pt")
    while process.poll() is None and changed("command.txt") == resumed:
        time.sleep(0.005)                                  # until it has read the folder and trains
    until = time.monotonic() + delay
    while process.poll() is None and time.monotonic() < until:
        time.sleep(0.001)
    while process.poll() is None and (moment == "writing" and not any(folder.glob("last.pt.*.tmp"))
                                      or moment == "best.pt" and changed("best.pt") == best):
        pass                                               # a save lasts for a millisecond or two
    running = process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return running


def kill_and_compare(folder, kills, steps, seed=0):
    """Returns what happened, as a dict of counts. Raises AssertionError where the logs differ."""
    rng, counts = random.Random(seed), dict.fromkeys((*MOMENTS, "during a save", "with a torn line", "resumed"), 0)
    make_text(folder)
    whole, killed = f"{FLAGS} --steps {steps} --out-dir whole", f"{FLAGS} --steps {steps} --out-dir killed"
    result = cli(whole, folder)
    assert result.code == 0, result.stderr
    run = folder / "killed"
    for i in range(kills):
        before = last_step(run)
        moment = MOMENTS[i % 3]
        assert kill_at(start(killed, folder), run, moment, rng.uniform(0, 0.25)), \
            f"done after {i} kills, from step {before}: more --steps are needed"
        counts[moment] += 1
        counts["during a save"] += any(run.glob("*.tmp"))
        log = run / "train.jsonl"
        counts["with a torn line"] += log.exists() and not log.read_bytes().endswith(b"\n")
        if log.exists() and i % 4 == 1:                    # what a power failure would leave
            log.write_bytes(log.read_bytes() + b'{"type": "train", "st')
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
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        counts = kill_and_compare(Path(folder), args.kills, args.steps or 20 * args.kills, args.seed)
    print(f"{args.kills} kills, the same log bit for bit, {time.monotonic() - started:.0f} s:",
          ", ".join(f"{name} {n}" for name, n in counts.items()))


if __name__ == "__main__":
    main()
