"""KV memory: the papers' arithmetic by formula, measured caches beside it, what the command writes."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import plot_memory
import train_dba
from evals.timing import cache_bytes
from helpers import assert_done, assert_error, call, environment
from plot_memory import GIB, MODELS, POLICIES, estimate, factors, measure_fill, model_configs, policies, what_fits
from reference import MODES, config, settings
from train_dba import CACHE_BLOCK, GPT, KVCache, bytes_per_token

ROOT = Path(__file__).parent.parent
TOKENS = 131_072
CPU = torch.device("cpu")


def plot(*argv):
    return call(shlex.join(map(str, argv)), ".", plot_memory.main)


@pytest.mark.parametrize("scale, name, policy, gib", [
    ("7B", "standard", "fp16", 64), ("7B", "standard", "q4_0", 18), ("7B", "GQA 32Q/8KV", "fp16", 16),
    ("7B", "GQA 32Q/4KV", "fp16", 8), ("7B", "GQA 32Q/4KV", "q4_0", 2.25), ("7B", "MLA 512+64", "fp16", 4.5),
    ("7B", "bottleneck 96", "fp16", 1.5), ("7B", "DBA 32/64/96", "q4_0", 64 / (2 * 4096 / 192 * 16 / 4.5)),
    ("7B", "DBA 256/512/768", "q4_0", 3.375), ("1B", "standard", "fp16", 22),
])
def test_gib_at_128k(scale, name, policy, gib):
    assert estimate(model_configs(scale)[name], TOKENS)[policy] == gib * GIB


@pytest.mark.parametrize("name, policy, n", [
    ("DBA 8+32 a head", "fp16", 5120), ("DBA 8+32 a head", "hetero", 1952), ("GQA 32Q/4KV", "fp16", 1024),
    ("GQA 32Q/4KV", "q4_0", 288), ("MLA 512+64", "fp16", 1152), ("standard", "q4_0", 2304), ("standard", "fp16", 8192),
])
def test_bytes_per_token_and_layer_at_1b(name, policy, n):
    assert bytes_per_token(model_configs("1B")[name], policy) == 22 * n


def test_factors_of_the_168x_claim():
    configs = model_configs("7B")
    controls = {name: configs[name] for name in plot_memory.CONTROLS}
    ratios = factors(configs["DBA 32/64/96"], controls, TOKENS)
    assert round(ratios["q4_0"]["end_to_end"]) == 152 and round(ratios["hetero"]["end_to_end"]) == 117
    assert round(factors(configs["DBA 256/512/768"], controls, TOKENS)["q4_0"]["end_to_end"]) == 19
    for f in ratios.values():
        assert f["architecture"] * f["quantisation_of_own"] == pytest.approx(f["end_to_end"])
    assert ratios["q4_0"]["architecture"] == pytest.approx(8192 / 192)
    assert ratios["q4_0"]["quantisation"] == pytest.approx(16 / 4.5)
    assert ratios["q4_0"]["control"] == pytest.approx({"standard": 8192 / 192, "GQA 32Q/4KV": 1024 / 192,
                                                      "MLA 512+64": 3})
    hetero = ratios["hetero"]                               # 140 bytes: k_sem 18, k_geo 68, v 54
    assert hetero["quantisation"] == pytest.approx(16384 / (4096 * (34 + 18) / 32))
    assert hetero["control"]["MLA 512+64"] == pytest.approx((512 * 18 + 64 * 34) / 32 / 140)


def test_every_scale_has_every_kind_of_model():
    for scale in MODELS:
        configs = model_configs(scale).values()
        assert {cfg.attn_mode for cfg in configs} == {"standard", "gqa", "mla", "bottleneck", "decoupled"}
        assert any(cfg.attn_mode == "decoupled" and cfg.kv_head for cfg in configs)
        assert all(("hetero" in policies(cfg)) == (cfg.attn_mode == "decoupled") for cfg in configs)


@pytest.mark.parametrize("mode", MODES)
def test_measured_is_what_the_formula_says(mode):
    cfg = config(settings(mode))
    for policy, limit in zip(policies(cfg), (10**9, 1, 10**9, 1)):              # all tokens, or 512 of them
        fill = measure_fill(cfg, policy, 3 * CACHE_BLOCK, limit, CPU)
        assert fill["tokens"] == (CACHE_BLOCK if limit == 1 else 3 * CACHE_BLOCK)
        assert fill["scaled_owned_bytes"] == cache_bytes(cfg, 1, 3 * CACHE_BLOCK, policy)


FILL = f"""
import json, torch, plot_memory
cfg, cpu = plot_memory.model_configs("7B")["standard"], torch.device("cpu")
plot_memory.warm_up(cpu)
print(json.dumps(plot_memory.measure_fill(cfg, "fp16", {TOKENS}, 2**25, cpu)))
"""


def test_filled_memory_is_taken():
    """In a process of its own, as the command has one: here, other tests may have left memory that is used again."""
    run = subprocess.run([sys.executable, "-c", FILL], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    measured = json.loads(run.stdout)
    assert measured["tokens"] == 2048 and measured["layers"] == 1 and measured["scale_factor"] == 64 * 32
    assert measured["peak"]["taken_bytes"] == pytest.approx(measured["owned_bytes"], rel=0.1)


def test_fewer_layers_then_fewer_tokens():
    cfg = config(settings("standard", layers=3))
    layer = cache_bytes(cfg, 1, 2048, "fp16") // 3
    assert what_fits(cfg, "fp16", 2048, 3 * layer) == (3, 2048)
    assert what_fits(cfg, "fp16", 2048, 3 * layer - 1) == (2, 2048)
    assert what_fits(cfg, "fp16", 2048, layer - 1) == (1, 1536)
    assert what_fits(cfg, "fp16", 2048, 1) == (1, 512)


def test_fill_fills_every_slot():
    cfg = config(settings("decoupled"))
    cache = KVCache(cfg, 1, 1000, "hetero")
    for stream in (stream for layer in cache.layers for stream in layer.values()):
        stream.scales.fill_(torch.nan)
    plot_memory.fill(cache, 1000)
    assert cache.length.item() == 1000
    for stream in (stream for layer in cache.layers for stream in layer.values()):
        values = stream.read("settled", 0, 1000)
        assert values.isfinite().all() and 0.8 < values.std() < 1.2


@pytest.fixture
def checkpoint(tmp_path):
    def save(mode="decoupled"):
        cfg = config(settings(mode))
        model = GPT(cfg, 257).init_weights()
        train_dba.save_checkpoint(tmp_path / "best.pt", cfg, train_dba.ByteTokenizer(), model, step=1)
        return tmp_path
    return save


@pytest.mark.parametrize("mode", MODES)
def test_checkpoint(checkpoint, mode):
    run = checkpoint(mode)
    cfg = train_dba.load_checkpoint(run / "best.pt")["config"]
    assert_done(plot("--ckpt", run, "--tokens", 2048, "--device", "cpu"))
    result = json.loads((run / "mem2k.json").read_text())
    assert {"estimate_bytes", "measured", "decomposition", "env", "tokens"} <= result.keys()
    assert set(result["decomposition"]) == {"estimate_bytes", "measured", "factors"}
    assert list(result["estimate_bytes"]) == list(result["measured"]) == policies(cfg)
    for policy, measured in result["measured"].items():
        assert measured["attended_tokens"] == measured["tokens"] == 2048 and measured["layers"] == cfg.layers
        assert measured["owned_bytes"] == result["estimate_bytes"][policy] == cache_bytes(cfg, 1, 2048, policy)
        assert measured["peak"]["peak_bytes"] > measured["owned_bytes"]
    standard = result["decomposition"]["estimate_bytes"]["standard fp16"]
    assert standard == 2048 * 2 * 2 * cfg.d_model * cfg.layers
    assert result["decomposition"]["factors"]["q4_0"]["end_to_end"] == standard / result["estimate_bytes"]["q4_0"]


def test_checkpoint_with_too_little_memory_says_so(checkpoint):
    run = checkpoint()
    result = plot("--ckpt", run, "--tokens", 2048, "--memory", 2 * 2048 * 68 / GIB, "--device", "cpu")
    assert_done(result)
    measured = json.loads((run / "mem2k.json").read_text())["measured"]["fp16"]
    assert (measured["layers"], measured["tokens"], measured["scale_factor"]) == (1, 1024, 4)
    assert "measured 1,024 tokens of 1 layers, x 4" in result.stdout


def without_peaks(x):
    return {key: without_peaks(value) for key, value in x.items() if key != "peak"} if isinstance(x, dict) else x


def test_comparison_is_written_and_the_same_again(tmp_path, monkeypatch):
    monkeypatch.setattr(plot_memory, "MODELS", {scale: {name: flags for name, flags in models.items() if name in (
        *plot_memory.CONTROLS, "DBA 32/64/96", "DBA 8+32 a head")} for scale, models in MODELS.items()})
    results = []
    for out in (tmp_path / "a", tmp_path / "b"):
        assert_done(plot("--out", out, "--memory", 0.0005, "--device", "cpu"))
        assert {p.name for p in out.iterdir()} == {"memory.json", "table_memory.tex", "fig_memory_128k.png"}
        results.append(without_peaks(json.loads((out / "memory.json").read_text())))
    assert results[0] == results[1]
    table = (tmp_path / "a/table_memory.tex").read_text()
    rows = [line for line in table.splitlines() if line.endswith(r"\\")]
    assert r"\toprule" in table and len({row.count("&") for row in rows if "multicolumn" not in row}) == 1
    assert (tmp_path / "a/fig_memory_128k.png").stat().st_size > 30_000


@pytest.mark.parametrize("argv, word", [
    (("--tokens", 1), "--tokens"), (("--memory", 0), "--memory"), (("--memory", "nan"), "--memory"),
    (("--ckpt", "nowhere"), "nowhere"), (("--device", "toaster"), "toaster"),
])
def test_bad_input_is_one_line(argv, word):
    assert_error(plot(*argv), word)


def test_formats_are_the_codebases():
    assert set(POLICIES) <= {*train_dba.FORMATS, "hetero"}
