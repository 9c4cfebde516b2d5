"""A run that is stopped, by a signal or a kill, goes on as if it had not been."""

import signal
import time

import pytest

import train_dba
from helpers import TRAIN, assert_done, call, finish, last_step, lines, losses, make_text, read_log, start
from kill_run import kill_and_compare

ENDLESS = (f"{TRAIN} --dropout 0.1 --grad-accum 2 --steps 1000000 --eval-every 7 --eval-iters 2 --save-every 100000 "
           "--out-dir run")


def stop_after(folder, steps, signum):
    """Result of a run that is sent a signal once it has logged the given steps."""
    process, first = start(ENDLESS, folder), last_step(folder / "run")
    until = time.monotonic() + 300
    while process.poll() is None and last_step(folder / "run") < first + steps and time.monotonic() < until:
        time.sleep(0.005)
    process.send_signal(signum)
    return finish(process)


def test_signals_finish_the_step_and_save(tmp_path):
    make_text(tmp_path)
    steps = [0]
    for signum, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        result = stop_after(tmp_path, 5, signum)
        assert result.code == code
        assert "Traceback" not in result.stderr and "saved" in lines(result.stderr)[-1]
        log, ckpt = read_log(tmp_path / "run"), train_dba.load_checkpoint(tmp_path / "run/last.pt")
        assert log[-1]["step"] == ckpt["step"] >= steps[-1] + 5
        steps.append(ckpt["step"])
    assert [line["type"] for line in log].count("resume_meta") == 1
    assert_done(call(f"{ENDLESS} --steps {steps[-1]} --out-dir whole", tmp_path))
    whole = [line for line in losses(tmp_path / "whole") if line["type"] == "train"]
    assert [line for line in losses(tmp_path / "run") if line["type"] == "train"] == whole
    assert [line["step"] for line in whole] == list(range(1, steps[-1] + 1))


def test_killed_runs_have_the_same_log(tmp_path):
    counts = kill_and_compare(tmp_path, kills=5, steps=60)
    assert counts["during a save"] and counts["with a torn line"] and counts["resumed"]


def test_a_signal_on_the_last_step_leaves_a_run_that_finishes(tmp_path, monkeypatch):
    make_text(tmp_path)
    flags = f"{TRAIN} --steps 3 --out-dir run"
    draw, count = train_dba.sample_batch, []

    def interrupted(*args):
        count.append(1)
        if len(count) == 3:
            signal.raise_signal(signal.SIGTERM)
        return draw(*args)

    with monkeypatch.context() as m:
        m.setattr(train_dba, "sample_batch", interrupted)
        assert call(flags, tmp_path).code == 143
    assert train_dba.load_checkpoint(tmp_path / "run/last.pt")["step"] == 3
    assert_done(call(flags, tmp_path))
    assert [line["type"] for line in read_log(tmp_path / "run")].count("done") == 1


@pytest.mark.parametrize("flags", ["--lr 1e-2 --min-lr 1e-4 --warmup-steps 3",
                                   "--attn-mode mla --learned-temp --dtype bfloat16",
                                   "--attn-mode decoupled --sem-dim 8 --geo-dim 8 --kv-lora-rank 9 --null-attn",
                                   "--attn-mode gqa --kv-head 1 --embed-dim 16 --dropout 0.2 --micro-batch 2"])
def test_resuming_from_every_step(tmp_path, monkeypatch, flags):
    """Stopped at each step in turn, in this process: the same losses, weights and optimiser as in one go."""
    make_text(tmp_path)
    flags = f"{TRAIN} {flags} --steps 6 --eval-every 4 --save-every 100"
    assert_done(call(f"{flags} --out-dir whole", tmp_path))
    draw = train_dba.sample_batch

    def interrupted(*args):
        signal.raise_signal(signal.SIGINT)
        return draw(*args)

    monkeypatch.setattr(train_dba, "sample_batch", interrupted)
    codes = [call(f"{flags} --out-dir stopped", tmp_path).code for _ in range(7)]
    assert codes == [130] * 6 + [0]
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")
    a, b = (train_dba.torch.load(tmp_path / run / "last.pt", weights_only=True) for run in ("whole", "stopped"))
    assert all(train_dba.torch.equal(a["model"][name], b["model"][name]) for name in a["model"])
    assert a["rng"] == b["rng"] and (a["step"], a["best_val_loss"]) == (b["step"], b["best_val_loss"])
    for i, state in a["optimizer"]["state"].items():
        assert all(train_dba.torch.equal(value, b["optimizer"]["state"][i][name]) for name, value in state.items())
