"""What follows a clock: the type of the products; and what all ranks must agree on. No test waits for real time."""

import itertools
import json

import pytest
import torch

import train_dba
from helpers import TRAIN, assert_done, assert_error, call, make_text, read_log
from train_dba import Ranks, UserError, pick_dtype, product_rates

CPU = torch.device("cpu")
AUTO = TRAIN.replace("float32", "auto")
FASTER = {"float32": dict(float32=0.309, bfloat16=0.166), "bfloat16": dict(float32=0.309, bfloat16=2.9)}


def ticks(*durations):
    """A clock of which each pair of readings is the next of the durations apart, over and over."""
    now, going = 0.0, itertools.cycle(durations)
    while True:
        yield now
        now += next(going)
        yield now


@pytest.mark.parametrize("training, products", [(True, 2), (False, 1)])
def test_rates_are_medians_without_the_warm_up(training, products):
    durations = iter([9, 9,  1, 4,  2, 5,  3, 400])        # seconds of float32 and bfloat16 in turn
    clock = ticks(*durations)
    rates = product_rates(8, 16, 32, training, clock=lambda: next(clock))
    flop = products * 2 * 8 * 16 * 32
    assert rates == pytest.approx(dict(float32=flop / 2 / 1e12, bfloat16=flop / 5 / 1e12))


def test_more_rows_are_not_timed():
    clock = ticks(1)
    rates = product_rates(100_000, 4, 4, clock=lambda: next(clock))
    assert rates["float32"] == pytest.approx(2 * 2 * 256 * 4 * 4 / 1e12)


def test_weights_take_turns_up_to_64_mb(monkeypatch):
    seen, linear = [], train_dba.F.linear
    monkeypatch.setattr(train_dba.F, "linear", lambda x, w: seen.append((w.dtype, w.data_ptr())) or linear(x, w))
    for layers, n_out, expected in ((3, 32, 3), (9, 2**22, 3)):
        seen.clear()
        readings = itertools.count()
        product_rates(1, 2, n_out, training=False, clock=lambda: next(readings), layers=layers)
        for dtype in (torch.float32, torch.bfloat16):
            used = [pointer for kind, pointer in seen if kind == dtype]
            assert len(used) == 4 and len(set(used)) == expected and used[3] == used[0]


def test_a_fast_clock_means_more_rounds():
    readings = itertools.count()
    product_rates(1, 4, 4, clock=lambda: next(readings) / 1000)
    assert next(readings) >= 2 * 50                        # of 1 ms each, 50 ms in all


@pytest.mark.parametrize("rates, expected", [
    *((rates, name) for name, rates in FASTER.items()),
    (dict(float32=1.0, bfloat16=1.0), "float32"),          # no gain, so no loss of precision
    (dict(float32=1.0, bfloat16=1.05), "float32"),         # less than what the casts cost
    (dict(float32=1.0, bfloat16=1.2), "bfloat16"),
], ids=str)
def test_auto_takes_the_faster_type_and_says_both_rates(rates, expected):
    dtype, why = pick_dtype("auto", CPU, lambda: rates)
    assert dtype == getattr(torch, expected)
    assert f"{rates['float32']:.3g}" in why and f"{rates['bfloat16']:.3g}" in why


def test_what_is_asked_for_is_not_timed(monkeypatch):
    monkeypatch.setattr(train_dba, "product_rates", None)
    assert pick_dtype("bfloat16", CPU) == (torch.bfloat16, "asked for")


@pytest.mark.parametrize("first, then", [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_a_resumed_run_keeps_its_type(tmp_path, monkeypatch, first, then):
    make_text(tmp_path)
    monkeypatch.setattr(train_dba, "product_rates", lambda *shape: FASTER[first])
    result = call(f"{AUTO} --steps 2 --out-dir run", tmp_path)
    assert_done(result)
    assert f"torch.{first} (timed: 0.309 TFLOP/s in float32" in result.stdout
    assert json.loads((tmp_path / "run/env.json").read_text())["product_tflops"] == FASTER[first]
    assert read_log(tmp_path / "run")[0]["config"]["dtype"] == first

    monkeypatch.setattr(train_dba, "product_rates", lambda *shape: FASTER[then])
    assert_error(call(f"{AUTO} --dtype {then} --steps 4 --out-dir run", tmp_path), "--dtype", first, then)
    result = call(f"{AUTO} --steps 4 --out-dir run", tmp_path)
    assert_done(result)
    assert f"torch.{first} (as this run began)" in result.stdout
    assert train_dba.load_checkpoint(tmp_path / "run/last.pt")["config"].dtype == first


def test_sampling_times_vectors_times_the_models_matrices(tmp_path, monkeypatch):
    make_text(tmp_path)
    assert_done(call(f"{TRAIN} --steps 1 --out-dir run", tmp_path))
    shapes = []
    monkeypatch.setattr(train_dba, "product_rates", lambda *a, **k: shapes.append((a, k)) or FASTER["bfloat16"])
    result = call("--mode sample --ckpt run --device cpu --prompt ab --max-new-tokens 3", tmp_path)
    assert_done(result)
    assert shapes == [((1, 32, 64), dict(training=False, layers=1))]
    assert "torch.bfloat16 (timed: 0.309 TFLOP/s in float32, 2.9 in bfloat16)" in result.stderr


def test_ranks_name_what_differs(monkeypatch):
    """The gathering is torch's; tests/test_ddp.py has two processes."""
    def gathered(seen, facts):
        seen[:] = [facts, {**facts, "step": 6}]

    monkeypatch.setattr(train_dba.dist, "all_gather_object", gathered)
    with pytest.raises(UserError, match="step 0 and 6.*run folder"):
        Ranks(0, 2, CPU).agree(step=0, commit="abc")
    Ranks(0, 2, CPU).agree(step=6, commit="abc")
    Ranks(0, 1, CPU).agree(step=0)


def test_evaluation_in_micro_batches_by_every_rank(tmp_path, monkeypatch):
    """Ranks take part in as many forward passes, of micro rows at most, and together see every token once."""
    make_text(tmp_path)
    monkeypatch.chdir(tmp_path)
    cfg = train_dba.make_config(**train_dba.parse_args(f"{TRAIN} --batch-size 4 --steps 1".split()))
    data = train_dba.load_data(cfg)
    model, rows = train_dba.build(cfg, data.tokenizer.vocab_size, CPU)[0], []
    model.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    expected, tokens = train_dba.evaluate(model, data, cfg, 4, Ranks(0, 1, CPU), torch.float32)
    assert set(rows) == {4} and tokens == len(data.val) - 1

    passes, sums = [], []
    monkeypatch.setattr(Ranks, "sum", lambda ranks, *numbers: sums.append(numbers) or (1.0, 1.0))
    for rank in range(3):                                  # three parts of 2 rows, of which a batch of 4 fills two
        rows.clear()
        train_dba.evaluate(model, data, cfg, 2, Ranks(rank, 3, CPU), torch.float32)
        assert set(rows) == {2}
        passes.append(len(rows))
    nll, counts = zip(*sums)
    assert len(set(passes)) == 1 and sum(counts) == tokens
    assert sum(nll) / tokens == pytest.approx(expected, rel=1e-6)
