"""Data-parallel runs, two processes on one CPU: the same curve as one process, one writer, and an end for all."""

import os
import re
import signal
import time
from pathlib import Path

import pytest
import torch

import train_dba
from helpers import (
    TRAIN,
    TRAINER,
    assert_done,
    assert_error,
    call,
    finish,
    last_step,
    losses,
    make_text,
    read_log,
    snapshot,
    start,
)

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
RUN = f"{TRAIN} --lr 1e-2 --grad-accum 2 --eval-every 3 --eval-iters 5 --save-every 3 --grad-clip 0.5"
ENDLESS = f"{RUN} --steps 1000000 --save-every 3 --out-dir run"


def start_both(args, cwd, script=TRAINER, **how):
    return start(args, cwd, [*TORCHRUN, "2", str(script)], **how)


def both(args, cwd, script=TRAINER):
    return finish(start_both(args, cwd, script))


def assert_same_curve(folder, one, two):
    a, b = losses(folder / one), losses(folder / two)
    assert [(line["type"], line["step"]) for line in a] == [(line["type"], line["step"]) for line in b]
    for x, y in zip(a, b):
        for key in x.keys() - {"type"}:
            assert y[key] == pytest.approx(x[key], rel=1e-5), (x, y)


def wait_for_steps(process, folder, steps):
    until = time.monotonic() + 300
    while process.poll() is None and last_step(folder) < steps and time.monotonic() < until:
        time.sleep(0.01)
    assert last_step(folder) >= steps, process.poll()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    make_text(folder)
    assert_done(call(f"{RUN} --steps 10 --out-dir one", folder))
    result = both(f"{RUN} --steps 10 --out-dir two", folder)
    assert_done(result)
    (folder / "two.out").write_text(result.stdout)
    (folder / "two.err").write_text(result.stderr)
    return folder


def test_torchrun_with_one_rank_follows_the_curve_too(folder):
    assert_done(finish(start(f"{RUN} --steps 10 --out-dir alone", folder, [*TORCHRUN, "1", str(TRAINER)])))
    assert_same_curve(folder, "one", "alone")


def test_two_ranks_follow_the_curve_of_one(folder):
    assert_same_curve(folder, "one", "two")
    assert len([line for line in losses(folder / "one") if line["type"] == "train"]) == 10
    one, two = (read_log(folder / name)[0] for name in ("one", "two"))
    assert {**one["config"], "out_dir": "two"} == two["config"] and one["data"] == two["data"]
    a, b = (train_dba.load_checkpoint(folder / name / "last.pt") for name in ("one", "two"))
    assert a["rng"] == b["rng"]
    assert all(torch.allclose(a["model"][name], b["model"][name], atol=1e-4) for name in a["model"])


def test_evaluation_is_the_same(folder):
    one, two = ([line for line in read_log(folder / name) if line["type"] == "eval"] for name in ("one", "two"))
    assert len(one) == 4
    assert [(line["step"], line["val_tokens"]) for line in one] == [(line["step"], line["val_tokens"]) for line in two]
    assert [line["val_bpb"] for line in two] == pytest.approx([line["val_bpb"] for line in one], rel=1e-5)


def test_only_rank_0_writes_and_speaks(folder):
    assert {p.name for p in (folder / "two").iterdir()} == {p.name for p in (folder / "one").iterdir()}
    assert len(read_log(folder / "two")) == len(read_log(folder / "one"))
    said = (folder / "two.out").read_text()
    assert said.count("parameters:") == 1 and "2 rank(s)" in said
    assert (folder / "two.err").read_text().count("validation loss") == 4
    env = train_dba.json.loads((folder / "two/env.json").read_text())
    assert env["ranks"] == 2 and env["threads"] == max(1, len(os.sched_getaffinity(0)) // 2)


def test_rank_count_may_change_on_resume_with_dropout(folder):
    flags = f"{RUN} --dropout 0.3 --micro-batch 2"
    assert_done(call(f"{flags} --steps 12 --out-dir straight", folder))
    assert_done(call(f"{flags} --steps 3 --out-dir turns", folder))
    assert_done(both(f"{flags} --steps 9 --out-dir turns", folder))
    assert_done(call(f"{flags} --steps 12 --out-dir turns", folder))
    assert_same_curve(folder, "straight", "turns")
    assert [line["type"] for line in read_log(folder / "turns")].count("resume_meta") == 2


REFUSED = {"--batch-size 3 --grad-accum 1": "--batch-size 3", "--dropout 0.1": "--micro-batch",
           "--micro-batch 4 --grad-accum 1": "2 ranks"}


@pytest.mark.parametrize("flags, word", REFUSED.items())
def test_shares_that_are_not_even(folder, flags, word):
    cfg = train_dba.make_config(**train_dba.parse_args(f"{RUN} --steps 3 {flags}".split()))
    with pytest.raises(train_dba.UserError, match=word):
        train_dba.share_out(cfg, train_dba.Ranks(0, 2, torch.device("cpu")))


def test_the_refusal_ends_all_ranks(folder):
    result = both(f"{RUN} --steps 3 --batch-size 3 --grad-accum 1 --out-dir uneven", folder)
    assert result.code != 0 and not (folder / "uneven").exists()
    assert re.search(r"(?m)^error: --batch-size 3", result.stderr)
    assert "UserError" not in result.stderr, "the trainer's own traceback"


@pytest.mark.parametrize("world, micro", [(1, None), (1, 2), (2, None), (2, 1), (4, 1)])
def test_every_row_is_taken_once(world, micro):
    cfg = train_dba.make_config(data="x", batch_size=4, grad_accum=2, micro_batch=micro)
    rows = []
    for rank in range(world):
        size, mine = train_dba.share_out(cfg, train_dba.Ranks(rank, world, torch.device("cpu")))
        rows += [row for m in mine for row in range(m * size, (m + 1) * size)]
    assert sorted(rows) == list(range(8))


FAILING = """
import os, sys
sys.path.insert(0, {path!r})
import train_dba
draw, drawn = train_dba.sample_batch, []
def failing(*args):
    drawn.append(1)
    if os.environ["RANK"] == "1" and len(drawn) == 5:
        raise RuntimeError("planted failure")
    return draw(*args)
train_dba.sample_batch = failing
if __name__ == "__main__":
    train_dba.leave(train_dba.main())
"""


def assert_intact(folder, at_least):
    ckpt = train_dba.load_checkpoint(folder / "run/last.pt")
    assert ckpt["step"] >= at_least and not list((folder / "run").glob("*.tmp"))
    train_dba.load_model(ckpt)


def test_failure_of_one_rank_ends_all(tmp_path):
    make_text(tmp_path)
    (tmp_path / "failing.py").write_text(FAILING.format(path=str(Path(TRAINER).parent)))
    result = both(ENDLESS, tmp_path, tmp_path / "failing.py")
    assert result.code != 0 and "planted failure" in result.stderr
    assert_intact(tmp_path, 3)
    assert last_step(tmp_path / "run") == 4


def workers(process):
    found = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(pid) for pid in found if b"--out-dir" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def gone(pid):
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"


def test_kill_of_one_worker_ends_all_and_sigterm_saves(tmp_path):
    make_text(tmp_path)
    process = start_both(ENDLESS, tmp_path)
    wait_for_steps(process, tmp_path / "run", 4)
    pids = workers(process)
    assert len(pids) == 2
    os.kill(pids[1], signal.SIGKILL)
    result = finish(process)
    assert result.code != 0 and "[rank0]: Traceback" not in result.stderr
    assert re.search(r"(?m)^error: rank 0 lost another rank", result.stderr)
    assert all(map(gone, pids))
    assert_intact(tmp_path, 3)
    before = train_dba.load_checkpoint(tmp_path / "run/last.pt")["step"]

    for to_all in (True, False):                           # to torchrun, then to one of its ranks
        process = start_both(f"{ENDLESS} --save-every 1000000", tmp_path)
        wait_for_steps(process, tmp_path / "run", before + 20)
        pids = workers(process)
        os.kill(process.pid if to_all else pids[1], signal.SIGTERM)
        result = finish(process)
        assert result.code != 0 and all(map(gone, pids))
        assert "saved; the same command goes on" in result.stderr
        step = train_dba.load_checkpoint(tmp_path / "run/last.pt")["step"]
        assert step == last_step(tmp_path / "run") >= before + 20
        before = step
    files = snapshot(tmp_path / "run")
    assert not any(name.endswith(".tmp") for name in files)


APART = """
import os, sys
sys.path.insert(0, {path!r})
os.chdir("rank" + os.environ["RANK"])                      # machines without a file system that they share
import train_dba
train_dba.leave(train_dba.main())
"""


@pytest.fixture
def apart(tmp_path):
    """A folder for each rank, with the same data."""
    for rank in range(2):
        (tmp_path / f"rank{rank}").mkdir()
        make_text(tmp_path / f"rank{rank}")
    (tmp_path / "apart.py").write_text(APART.format(path=str(Path(TRAINER).parent)))
    return tmp_path


@pytest.mark.parametrize("holder", (0, 1))
def test_ranks_that_do_not_see_the_same_run_folder_are_refused(apart, holder):
    """Also where one of them sees a run that is finished: it must not leave the other waiting."""
    flags = f"{RUN} --steps 3 --out-dir run"
    assert_done(call(flags, apart / f"rank{holder}"))
    before = snapshot(apart)
    for steps in (3, 9):
        result = both(f"{flags} --steps {steps}", apart, apart / "apart.py")
        assert result.code != 0
        assert re.search(r"(?m)^error: the ranks don't see the same run \(step (0 and 3|3 and 0)", result.stderr)
        assert snapshot(apart) == before


def test_ranks_that_read_other_data_are_refused(apart):
    make_text(apart / "rank1", seed=1)
    before = snapshot(apart)
    result = both(f"{RUN} --steps 3 --out-dir run", apart, apart / "apart.py")
    assert result.code != 0 and "the ranks don't see the same run (data" in result.stderr
    assert snapshot(apart) == before


@pytest.mark.parametrize("variables", (dict(RANK="0"), dict(RANK="0", WORLD_SIZE="x"), dict(RANK="x", WORLD_SIZE="1"),
                                       dict(RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="0"),
                                       dict(RANK="2", WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT="29999"),
                                       dict(RANK="0", WORLD_SIZE="1", MASTER_ADDR="localhost", MASTER_PORT="x")))
def test_a_stray_rank_in_the_environment_is_said(tmp_path, monkeypatch, variables):
    make_text(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    result = call(f"{TRAIN} --steps 1 --out-dir run", tmp_path)
    assert_error(result, f"RANK={variables['RANK']}", "torchrun", "unset RANK")
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_what_schedulers_set_beside_no_rank_means_nothing(tmp_path, monkeypatch):
    make_text(tmp_path)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert_done(call(f"{TRAIN} --steps 1 --out-dir run", tmp_path))
    assert (tmp_path / "run/command.txt").read_text().startswith("python3 train_dba.py --data ")
    assert '"ranks": 1' in (tmp_path / "run/env.json").read_text()
