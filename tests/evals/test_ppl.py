"""eval_dba.py ppl: every token once, the loss of the model, one file for each cache."""

import json
import math
import random
import statistics

import pytest
import torch
import torch.nn.functional as F
from trained import BLOCK, EVALUATE, MODES, evaluate, plain_nll, result_of, validation

from evals import ppl
from helpers import assert_done, assert_error
from train_dba import KVCache, load_checkpoint, load_model


@pytest.mark.parametrize("block, stride", ((2, 1), (2, 2), (5, 1), (5, 3), (5, 5), (16, 1), (16, 7), (16, 16)))
@pytest.mark.parametrize("count", (2, 3, 16, 17, 18, 33, 50))
def test_windows_score_each_token_once_and_with_enough_context(count, block, stride):
    seen = []
    for start, ids, first in ppl.windows(torch.arange(count), block, stride):
        assert ids.tolist() == list(range(start, start + len(ids))) and len(ids) <= block + 1
        assert start == 0 or first >= block - stride
        seen += ids[first:].tolist()
    assert seen == list(range(1, count))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("stride", (BLOCK, 50))
def test_ppl_is_that_of_the_model_without_a_cache(runs, tmp_path, mode, stride):
    result = result_of(f"ppl {EVALUATE} {mode} --kv-cache fp32 --stride {stride} --out {tmp_path}/ppl.json", runs,
                      tmp_path / "ppl.json")
    model, ids = load_model(load_checkpoint(runs / mode / "best.pt")), validation(runs)
    total, done = 0.0, 1
    while done < len(ids):                                 # tokens from `done` on, in windows that begin at strides
        start = 0 if done == 1 else -(-(done - BLOCK) // stride) * stride
        window = ids[start:start + BLOCK + 1]
        total += plain_nll(model, window)[done - start - 1:].sum().item()
        done = start + len(window)
    assert result["tokens"] == len(ids) - 1
    assert result["loss"] == pytest.approx(total / (len(ids) - 1), abs=1e-5)
    assert result["ppl"] == pytest.approx(math.exp(result["loss"]))
    assert result["bpb"] == pytest.approx(total / math.log(2) / (len(ids) - 1), rel=1e-2)


def test_several_caches_are_as_many_files_in_one_folder(runs, tmp_path):
    command = f"ppl {EVALUATE} decoupled --kv-cache fp16 hetero q4_0 --max-tokens 200"
    assert_done(evaluate(f"{command} --out {tmp_path}/new.folder", runs))
    written = {path.name: json.loads(path.read_text()) for path in (tmp_path / "new.folder").iterdir()}
    assert written.keys() == {"eval_ppl_fp16.json", "eval_ppl_hetero.json", "eval_ppl_q4_0.json"}
    for cache in ("fp16", "hetero", "q4_0"):
        alone = result_of(f"{command} --kv-cache {cache} --out {tmp_path}/one.json", runs,
                          tmp_path / "one.json")
        assert alone["loss"] == written[f"eval_ppl_{cache}.json"]["loss"]
    assert_error(evaluate(f"{command} --out {tmp_path}/new.json", runs), "--out")
    (tmp_path / "file").write_text("")
    assert_error(evaluate(f"{command} --out {tmp_path}/file/out", runs), "--out")


def one_by_one(model, ids, formats, residual):
    """nll [T] of ids [T + 1], decoded token by token through a cache."""
    cache, nll = KVCache(model.cfg, 1, len(ids) - 1, formats, residual), []
    with torch.inference_mode():
        for token, following in zip(ids[:-1], ids[1:]):
            nll.append(F.cross_entropy(model(token.view(1, 1), cache=cache)[0].double(), following.view(1)))
    return torch.stack(nll)


def test_formats_of_each_stream(runs, tmp_path):
    """What is named stream by stream is that cache: hetero, spelled out, costs the same bytes and loses the same."""
    spelled, mixed = "k_geo=q8_0,k_sem=q4_0,v=q4_0", "k_sem=q4_0,k_geo=q4_0,v=q3_0"
    command = f"ppl {EVALUATE} decoupled --kv-cache fp16 hetero {spelled} {mixed} --max-tokens 200 --out {tmp_path}"
    assert_done(evaluate(command, runs))
    hetero, same, other = (json.loads((tmp_path / f"eval_ppl_{name}.json").read_text()) for name in (
        "hetero", spelled, mixed))
    assert same["loss"] == hetero["loss"] and same["bytes_per_token"] == hetero["bytes_per_token"]
    assert other["loss"] != hetero["loss"] and other["bytes_per_token"] < hetero["bytes_per_token"]
    assert other["formats"] == dict(k_sem="q4_0", k_geo="q4_0", v="q3_0")


@pytest.mark.parametrize("mode, fmt", (("standard", "q4_0"), ("decoupled", "hetero"), ("mla", "nf4"),
                                       ("standard", "q3_0")))
def test_a_loss_through_a_residual_window_is_that_of_decoding(runs, tmp_path, mode, fmt):
    model, ids, total = load_model(load_checkpoint(runs / mode / "best.pt")), validation(runs)[:301], 0.0
    for start in (0, 150):                                 # windows of 150, side by side
        total += one_by_one(model, ids[start:start + 151], fmt, 32).sum().item()
    command = f"ppl {EVALUATE} {mode} --max-tokens 301 --block 150 --stride 150 --kv-cache {fmt} --out {tmp_path}"
    name = f"eval_ppl_{fmt}_residual32.json"
    windowed = result_of(f"{command} --kv-residual 32", runs, tmp_path / name)
    assert windowed["loss"] == pytest.approx(total / 300, abs=2e-6)
    plain = result_of(command, runs, tmp_path / f"eval_ppl_{fmt}.json")
    assert abs(plain["loss"] - windowed["loss"]) > 1e-5, "the window made a difference"


def test_a_difference_is_paired_over_windows():
    """Of equal windows, the mean and t-interval of the differences; of unequal ones, the ratio's linearisation."""
    rng = random.Random(0)
    other = [(rng.uniform(100, 200), 64) for _ in range(20)]
    this = [(nll + rng.gauss(0.5, 0.2), count) for nll, count in other]
    mean, half = ppl.paired_difference(this, other)
    differences = [(a - b) / 64 for (a, _), (b, _) in zip(this, other)]
    assert mean == pytest.approx(statistics.mean(differences))
    assert half == pytest.approx(2.093 * statistics.stdev(differences) / 20 ** 0.5, rel=1e-3)
    twice = [(2.0, 2), (6.0, 6), (12.0, 12)], [(1.0, 2), (3.0, 6), (6.0, 12)]   # half a nat each, however long
    assert ppl.paired_difference(*twice) == pytest.approx((0.5, 0.0))
    assert ppl.paired_difference([(2.0, 4)], [(1.0, 4)]) == (0.25, None)


def test_one_table_compares_with_fp16(runs, tmp_path):
    result = evaluate(f"ppl {EVALUATE} decoupled --kv-cache q4_0 fp16 q8_0 --max-tokens 300 --out {tmp_path}", runs)
    assert_done(result)
    lines = result.stdout.splitlines()
    assert [line.split()[0] for line in lines[:4]] == ["cache", "q4_0", "fp16", "q8_0"]
    assert "±" in lines[1] and "±" not in lines[2] and "±" in lines[3]
    results = {name: json.loads((tmp_path / f"eval_ppl_{name}.json").read_text()) for name in ("fp16", "q4_0", "q8_0")}
    assert results["q4_0"]["delta_nll"] == pytest.approx(results["q4_0"]["loss"] - results["fp16"]["loss"], abs=1e-12)
    assert results["fp16"]["delta_nll"] is None and results["q8_0"]["delta_nll_half"] > 0
    bytes_seen = 300 - validation(runs)[:300].eq(256).sum().item()
    assert results["fp16"]["bpb"] == pytest.approx(results["fp16"]["loss"] / math.log(2) * 299 / bytes_seen)


def test_a_loss_above_709_has_no_perplexity(folder):
    ckpt = torch.load(folder / "standard/best.pt", weights_only=True)
    ckpt["model"]["norm.weight"] *= 1e5
    (folder / "loud").mkdir()
    torch.save(ckpt, folder / "loud/best.pt")
    result = result_of(f"ppl {EVALUATE} loud --max-tokens 100", folder, "loud/eval_ppl_fp16.json")
    assert result["loss"] > 709 and result["ppl"] is None
