"""What the commands of eval_dba.py refuse, in one line."""

import pytest
from trained import evaluate

from helpers import assert_error, snapshot

REFUSED = {
    "ppl --ckpt standard --stride 200 --block 100": ("--stride 200",),
    "ppl --ckpt standard --kv-cache hetero": ("--kv-cache hetero", "standard"),
    "ppl --ckpt standard --kv-cache k=q4_0": ("--kv-cache k=q4_0", "caches k, v"),
    "ppl --ckpt standard --kv-cache k_sem=q4_0,v=q4_0": ("--kv-cache k_sem=q4_0,v=q4_0", "caches k, v"),
    "latency --ckpt standard --kv-cache q3_0 --kernel metal": ("--kernel metal",),
    "ppl --ckpt nowhere": ("nowhere",),
    "ppl --ckpt text.txt": ("text.txt", "damaged"),
    "ppl --ckpt standard --data nowhere.npy": ("--data nowhere.npy",),
    "latency --ckpt mla --kv-cache hetero": ("--kv-cache hetero", "mla"),
    "latency --ckpt standard --kernel metal": ("--kernel metal",),
    "latency --ckpt standard --device nonsense": ("--device nonsense",),
    "memory --ckpt standard --kv-cache hetero": ("--kv-cache hetero",),
    "sweep --ckpt standard --kv-cache hetero": ("--kv-cache hetero",),
    "sweep --ckpt standard --data empty.txt": ("nothing to predict",),
    "latency --ckpt standard --contexts 1000000000000000": ("no memory",),
    "memory --ckpt standard --contexts 1000000000000000": ("no memory",),
    "probes --ckpt standard --instances 10001": ("--instances 10001", "10,000"),
    "policy --ckpt standard": ("--max-delta-nll", "--max-kv-bytes-per-token"),
    "policy --ckpt standard --max-delta-nll 1 --max-kv-bytes-per-token 99": ("--max-delta-nll",),
    "policy --ckpt standard --max-delta-nll 1 --long --long-factor 999": ("too few", "--data"),
}


@pytest.mark.parametrize("args", REFUSED)
def test_refused_in_one_line(folder, args):
    (folder / "empty.txt").write_text("a")
    before = snapshot(folder)
    assert_error(evaluate(args if "--device" in args else f"{args} --device cpu", folder), *REFUSED[args])
    assert snapshot(folder) == before


@pytest.mark.parametrize("args", ("", "nothing", "ppl", "latency --ckpt a --contexts 0", "policy --ckpt a --max-kl nan",
                                  "policy --ckpt a --max-delta-nll -1", "sweep --ckpt a --max-seconds inf",
                                  "memory --ckpt a --contexts 8", "ppl --ckpt a --kv-cach q8_0",
                                  "ppl --ckpt a --kv-cache q5_0", "ppl --ckpt a --kv-cache k=q5_0,v=q4_0",
                                  "ppl --ckpt a --kv-cache k=q4_0,q4_0",
                                  "ppl --ckpt a --kv-cache k=q4_0,v=q4_0,k=fp16"))
def test_bad_flags_are_a_usage_error(runs, args):
    result = evaluate(args, runs)
    assert_error(result, code=2)
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("text", ("x", "1e400", "''", "99999999999999999999999"))
def test_a_number_that_is_none_is_said_in_words(runs, text):
    """Not in the name of the function that reads it."""
    result = evaluate(f"latency --ckpt a --contexts {text}", runs)
    assert result.code == 2 and "argument --contexts" in result.stderr and "parse" not in result.stderr
    assert "whole number" in result.stderr or "must be at least 1" in result.stderr
