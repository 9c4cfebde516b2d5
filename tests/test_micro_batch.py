"""--micro-batch auto: the formula's choice, halved where memory runs out, the same on every rank and on resume. Memory
is pretended; no GPU is asked."""

import dataclasses

import pytest
import torch

import estimate
import train_dba
from estimate import ROOM, fits_by_formula, training_memory
from helpers import TRAIN, assert_done, assert_error, call, losses, make_text, read_log
from test_shard import ranks, script
from train_dba import make_config

RUN = f"{TRAIN} --batch-size 12 --lr 1e-2 --steps 2 --eval-iters 2"
# A program whose rank 1 runs out of memory at more than `most` sequences.
PRETEND = """
import estimate
estimate.free_memory = lambda device: {free}
steps = train_dba.step_gradients
def limited(model, batch, cfg, step, micro, *rest):
    if micro > {most} and os.environ.get("RANK", "1") == "1":
        raise torch.OutOfMemoryError("pretended")
    return steps(model, batch, cfg, step, micro, *rest)
train_dba.step_gradients = limited
"""


def pretend(monkeypatch, free=2**40, most=12):
    """Let this process believe it; returns a list of the micro-batches that are tried, and then trained with."""
    steps, tried = train_dba.step_gradients, []

    def limited(model, batch, cfg, step, micro, mine, *rest):
        tried.append((micro, len(mine)))
        if micro > most:
            raise torch.OutOfMemoryError("pretended")
        return steps(model, batch, cfg, step, micro, mine, *rest)

    monkeypatch.setattr(estimate, "free_memory", lambda device: free)
    monkeypatch.setattr(train_dba, "step_gradients", limited)
    return tried


def chosen(folder):
    return [line["config"]["micro_batch"] for line in read_log(folder) if "config" in line]


@pytest.fixture
def folder(tmp_path):
    make_text(tmp_path)
    return tmp_path


def test_the_formula_chooses(folder, monkeypatch):
    """As many as fit, and no more is tried; the curve is that of the same number given by hand."""
    cfg = make_config(**train_dba.parse_args(f"{RUN} --micro-batch 4".split()))
    tried = pretend(monkeypatch, training_memory(cfg, 257)["peak"] / ROOM + 1)
    assert_done(call(f"{RUN} --micro-batch auto --out-dir auto", folder))
    assert tried == 2 * [(4, 2)] + 2 * [(4, 3)]            # two steps that try it, two of the run
    assert chosen(folder / "auto") == [4]
    assert_done(call(f"{RUN} --micro-batch 4 --out-dir by_hand", folder))
    assert losses(folder / "auto") == losses(folder / "by_hand")


def test_it_is_halved_while_memory_runs_out_and_kept_on_resume(folder, monkeypatch):
    tried = pretend(monkeypatch, most=3)
    assert_done(call(f"{RUN} --micro-batch auto --out-dir run", folder))
    assert [micro for micro, _ in tried] == [12, 6, 3, 3, 3, 3]
    monkeypatch.undo()                                     # from here on this CPU's memory would have to be asked
    assert_done(call(f"{RUN} --micro-batch auto --out-dir run --steps 4", folder))
    assert chosen(folder / "run") == [3, 3]


def test_a_whole_step_in_one_part_is_tried_without_gradients_beside_it(folder, monkeypatch):
    tried = pretend(monkeypatch)
    assert_done(call(f"{RUN} --micro-batch auto --out-dir run", folder))
    assert tried == 4 * [(12, 1)]


def test_nothing_fits(folder, monkeypatch):
    pretend(monkeypatch, most=0)
    assert_error(call(f"{RUN} --micro-batch auto --out-dir run", folder), "no memory for --micro-batch 1 (auto)")
    assert not (folder / "run").exists()


def test_all_ranks_take_what_the_smallest_has_room_for(folder, tmp_path):
    """Rank 1 alone runs out: of the sizes that can be dealt to two ranks evenly, 6, 3, 2 and 1, at 6."""
    program = script(tmp_path, PRETEND.format(free=2**40, most=4))
    assert_done(ranks(2, f"{RUN} --micro-batch auto --out-dir run", folder, program))
    assert chosen(folder / "run") == [3]


def test_a_sharded_model_is_made_anew_for_each_try(folder, tmp_path):
    program = script(tmp_path, PRETEND.format(free=2**40, most=4).replace('"RANK", "1") == "1"', '"RANK") == "0"'))
    assert_done(ranks(1, f"{RUN} --shard --micro-batch auto --out-dir run", folder, program))
    assert chosen(folder / "run") == [3]


def test_sharded_state_leaves_room_for_larger_micro_batches():
    cfg = make_config(data="-", exp="paper_baseline", batch_size=64, compile=True)
    sizes = [64, 32, 16, 8, 4, 2, 1]
    alone, shared = (fits_by_formula(cfg, 50_257, sizes, 60 * 2**30, shards) for shards in (1, 8))
    assert (alone, shared) == (8, 16)
    assert fits_by_formula(cfg, 50_257, sizes, 0) == 1
    for size, shards in ((8, 1), (16, 8)):                 # what is chosen fits, and the next does not
        state = 16 * train_dba.count_params(cfg, 50_257)["total"] * (1 - 1 / shards)
        fits, too_large = (training_memory(dataclasses.replace(cfg, micro_batch=each), 50_257)["peak"] - state
                           for each in (size, 2 * size))
        assert fits <= ROOM * 60 * 2**30 < too_large
