"""bench_dba.py at toy size: every block through the command line, in the process of the tests; what it prints and what
it writes."""

import json
from pathlib import Path

import pytest
import torch

import bench_dba
import train_dba
from helpers import assert_error, call
from train_dba import make_config

KEYS = {                                                   # of every row of a block's file
    "ceilings": {"what"},
    "check": {"kernel", "case", "format", "residual", "difference", "ok"},
    "sdpa": {"case", "width", "backend", "ms"},
    "loss": {"case", "ms", "gib", "tflops"},
    "compact": {"tokens", "width", "types", "ms"},
    "train": {"case", "micro", "compiled", "dtype", "params", "tok_s", "times_first"},
    "profile": {"case", "wall_ms", "busy_ms", "ms", "top"},
    "small": {"case", "micro", "tok_s", "ms", "gib", "formula_gib"},
    "growth": {"case", "axis", "value", "params", "seconds", "fastest_s"},
    "decode": {"case", "format", "kernel", "batch", "tokens", "us", "cache_mib", "gb_per_s", "share_of_copy"},
    "generate": {"case", "format", "kernel", "dtype", "tokens", "ttft_ms", "ms", "times_ttft", "times_ms", "cache_mib"},
    "host": {"what", "seconds"},
}


def test_every_block_is_tested():
    assert KEYS.keys() == bench_dba.BLOCKS.keys()


@pytest.mark.parametrize("name", KEYS)
def test_block(name, tmp_path):
    result = call(f"{name} --toy --device cpu --out out", tmp_path, bench_dba.main)
    assert result.code == 0, result.stderr
    document = json.loads((tmp_path / "out" / f"{name}.json").read_text())
    assert (document["block"], document["toy"], document["env"]["device"]) == (name, True, "cpu")
    rows = document["rows"]
    assert result.stdout.count(f"{name:10} ") == len(rows) > 0
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]
    for row in rows:
        assert row.keys() >= KEYS[name]
        for key, value in row.items():
            if isinstance(value, int | float) and key not in ("residual", "difference", "ok", "compiled"):
                assert value > 0, (key, row)
    measured = [row for row in rows if "why" not in row]
    for row in measured:
        absent = {key for key in KEYS[name] if row[key] is None}
        assert absent == ({"formula_gib"} if name == "small" and row["dtype"] == "float32" else set())
    if name == "check":
        assert all(row["ok"] for row in rows)
    if name == "train":
        assert [row["case"] for row in rows] == list(dict.fromkeys(row["case"] for row in rows))
        assert {row["case"] for row in rows} == set(bench_dba.CASES)


def test_the_plan_runs_blocks_in_processes_and_names_what_failed(tmp_path):
    good = call("gpu --toy --device cpu --out out --blocks host", tmp_path, bench_dba.main)
    assert good.code == 0, good.stderr
    document = json.loads(good.stdout.splitlines()[-1])
    assert document["failed"] == [] and [block["block"] for block in document["blocks"]] == ["host"]
    slow = call("gpu --toy --device cpu --out slow --blocks host --limit 0.1", tmp_path, bench_dba.main)
    assert slow.code == 1 and "host: stopped after 0.1 s" in slow.stderr
    assert json.loads(slow.stdout.splitlines()[-1]) == dict(failed=["host"], blocks=[])


def test_an_earlier_result_stays_until_the_new_one_is_whole(tmp_path, monkeypatch):
    """Also where `gpu` runs the blocks; of one that was stopped the rows are in another file."""
    (tmp_path / "out").mkdir()
    result, part = tmp_path / "out/host.json", tmp_path / "out/host.json.part"
    result.write_text("earlier")
    slow = call("gpu --toy --device cpu --out out --blocks host --limit 0.1", tmp_path, bench_dba.main)
    assert slow.code == 1 and result.read_text() == "earlier"
    assert json.loads(slow.stdout.splitlines()[-1])["blocks"] == []

    def stopped(device, toy):
        """One row."""
        yield dict(what="measured")
        raise bench_dba.UserError("stopped")
    monkeypatch.setitem(bench_dba.BLOCKS, "host", stopped)
    assert_error(call("host --toy --device cpu --out out", tmp_path, bench_dba.main), "stopped")
    assert result.read_text() == "earlier" and json.loads(part.read_text())["rows"] == [dict(what="measured")]
    monkeypatch.undo()
    assert call("host --toy --device cpu --out out", tmp_path, bench_dba.main).code == 0
    assert json.loads(result.read_text())["rows"] and not part.exists()


def test_wrong_flags(tmp_path):
    assert_error(call("ceilings --device gpu", tmp_path, bench_dba.main), "device")
    (tmp_path / "file").write_text("")
    for command in ("ceilings --toy", "gpu --toy --blocks ceilings"):
        assert_error(call(f"{command} --out file/x", tmp_path, bench_dba.main), "--out file/x", "can't make")
    assert_error(call("decode --toy --device cpu --tokens 1000000000000000", tmp_path, bench_dba.main), "no memory")
    for flags in ("train --cases nonsense", "train --steps 0", "train --layers -1", "train --micro 0",
                  "decode --tokens 0", "gpu --limit nan", "gpu --limit -1"):
        assert call(flags, tmp_path, bench_dba.main).code == 2


@pytest.fixture
def train_speed(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(bench_dba.__file__).parent / "benchmarks"))
    import train_speed
    small = make_config(data="-", attn_mode="decoupled", attn_dim=128, null_attn=True, tie_qk=True, layers=1, block=16,
                        batch_size=2)
    monkeypatch.setattr(train_speed, "config", lambda: small)
    monkeypatch.setattr(train_speed, "VOCAB", 300)
    return train_speed


def test_contenders(train_speed, monkeypatch):
    """Each takes a step; only ours run under our setting of the allocator."""
    attend, settings = train_dba.attend, []
    monkeypatch.setattr(train_dba, "keep_freed_memory", lambda: settings.append(1))
    for name in ("products bf16", "naive fp32", "naive bf16", "fp32", "bf16"):
        monkeypatch.setattr(train_dba, "attend", attend)
        step, params = train_speed.contender(name, train_speed.config(), torch.device("cpu"))
        step()
        assert params > 300 * 512 and (train_dba.attend is attend) == ("naive" not in name), name
        assert bool(settings) == (name in ("fp32", "bf16")), name
        settings.clear()


def test_naive_attention_is_ours(train_speed):
    q, k, v = torch.randn(2, 4, 7, 9), torch.randn(2, 4, 7, 8), torch.randn(2, 4, 7, 6)
    for null_v, query in ((torch.randn(4, 6), q), (None, q[..., :8])):
        torch.testing.assert_close(train_speed.naive_attend(query, k, v, null_v), train_dba.attend(query, k, v, null_v))


def test_flops_are_those_of_the_matrix_products():
    """Counted by hand of a small model: 6 a weight and token, and the causal half of both products of attention."""
    cfg = make_config(data="-", d_model=32, layers=1, n_head=2, d_ff=64, block=16)
    weights = 4 * 32 * 32 + 3 * 32 * 64 + 64 * 32
    assert bench_dba.model_flops(cfg, 64) == 6 * weights + 6 * 2 * (16 + 16) * 16 / 2
    assert bench_dba.model_flops(cfg, 64, causal=False) == 6 * weights + 6 * 2 * (16 + 16) * 16
