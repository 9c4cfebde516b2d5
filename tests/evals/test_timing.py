"""timing.py latency, memory, sweep: their figures worked out another way, and what stops them."""

import itertools
import json

import pytest
import torch
from trained import BLOCK, EVALUATE, evaluate, plain_nll, result_of, validation

import train_dba
from evals import timing
from evals.subject import load_subject
from evals.timing import cache_bytes
from helpers import assert_done
from train_dba import KVCache, load_checkpoint, load_model, stream_bytes


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(timing, "COPY_BYTES", 2**20)


def test_latency(runs, tmp_path):
    mixed = "k_sem=q4_0,k_geo=bf16,v=q8_0"              # a format for each stream
    result = result_of(f"latency {EVALUATE} decoupled --contexts 5 140 --steps 3 --prefills 1 --kernel torch "
                      f"--kv-cache hetero {mixed} --out {tmp_path}/latency.json", runs, tmp_path / "latency.json")
    rows = result["rows"]
    assert [(r["prompt"], r["cache"]) for r in rows] == [(n, c) for n in (5, 140) for c in ("fp16", "hetero", mixed)]
    model = load_model(load_checkpoint(runs / "decoupled/best.pt"))
    weights = sum(p.numel() for p in model.parameters()) * 4
    per_token = {"fp16": 2 * (16 + 32 + 48), "hetero": (8 + 2) + (32 + 2) + (24 + 4),
                 mixed: (8 + 2) + 2 * 32 + (48 + 4)}
    fp16 = {r["prompt"]: r["ms_per_token"] for r in rows if r["cache"] == "fp16"}
    for row in rows:
        seen = row["prompt"] + timing.WARM_UP + 2
        assert row["kernel"] == "torch" and row["ms_min"] <= row["ms_per_token"] <= row["ms_max"]
        assert row["bytes_read_per_token"] == weights + seen * per_token[row["cache"]]
        assert row["ratio_to_fp16"] == row["ms_per_token"] / fp16[row["prompt"]]
        assert row["tokens_per_second"] == pytest.approx(1000 / row["ms_per_token"])
        assert row["share_of_copy"] == pytest.approx(
            row["bytes_read_per_token"] * row["tokens_per_second"] / row["copy_bytes_per_second"])
        assert 0 < row["prefill_seconds"] < row["first_token_seconds"]


def test_latency_decodes_as_sampling_does(runs):
    subject, prompt = load_subject(runs / "decoupled", "cpu"), torch.arange(30)[None]
    formats = timing.compared_formats(subject, None)
    assert list(formats) == ["fp16", "q8_0", "q4_0", "hetero"]
    runs = timing.decode_times(subject, prompt, formats, steps=4, prefills=2)
    for run, policy in zip(runs.values(), formats.values()):
        cache = KVCache(subject.cfg, 1, 60, policy)
        *_, last = train_dba.generate(subject.model, prompt, 1 + timing.WARM_UP + 4, cache, temperature=0)
        assert run.token.equal(last) and run.cache.length.equal(cache.length)
        assert (len(run.prefill), len(run.steps)) == (2, timing.WARM_UP + 4)


def test_a_prompt_beyond_the_context_is_said_once(runs, tmp_path):
    out = f"--out {tmp_path}/out.json"
    short = evaluate(f"latency {EVALUATE} standard --contexts 5 --steps 1 --prefills 1 --kv-cache fp16 {out}", runs)
    past = evaluate(f"latency {EVALUATE} standard --contexts 99 150 --steps 1 --prefills 1 --kv-cache fp16 {out}", runs)
    assert short.stderr.count("warning: ") == 0 and past.stderr.count("warning: ") == 1
    assert f"{BLOCK} of the model's context" in past.stderr


@pytest.mark.parametrize("mode, residual", (("standard", 0), ("decoupled", 70), ("mla", 0)))
def test_memory(runs, tmp_path, mode, residual):
    result = result_of(
        f"memory {EVALUATE} {mode} --contexts 64 700 --kv-residual {residual} --out {tmp_path}/memory.json", runs,
        tmp_path / "memory.json")
    cfg = load_checkpoint(runs / mode / "best.pt")["config"]
    names = ["fp16", "q8_0", "q4_0"] + ["hetero"] * (mode == "decoupled")
    assert [(r["tokens"], r["cache"]) for r in result["rows"]] == list(itertools.product((64, 700), names))
    for row in result["rows"]:
        assert row["cache_bytes"] == row["formula_bytes"]
        assert row["formula_bytes"] == cache_bytes(cfg, 1, row["tokens"], row["cache"], residual)
        if row["cache"] != "hetero":
            assert row["bytes_per_token"] == sum(stream_bytes(row["cache"], C) for C in cfg.attention.streams.values())
        if row["before_bytes"] is not None:
            assert row["fill_peak_bytes"] >= row["before_bytes"] > 2**20 and row["decode_peak_bytes"] > 2**20


@pytest.mark.skipif(timing.forget_peak(torch.device("cpu")) is None, reason="the peak can't be reset here")
def test_the_peak_is_that_since_it_was_forgotten():
    device = torch.device("cpu")
    big = torch.ones(2**26)                                # 256 MiB
    del big
    before = timing.forget_peak(device)
    assert timing.peak_since(device) - before < 2**26
    big = torch.ones(2**26)
    assert 2**28 - 2**25 < timing.peak_since(device) - before < 2**28 + 2**26
    del big


@pytest.mark.parametrize("mode", ("standard", "mla"))
def test_sweep_on_text_and_on_repeated_text(runs, tmp_path, mode):
    ids = validation(runs)
    long = 2 * len(ids)
    result = evaluate(f"sweep {EVALUATE} {mode} --kv-cache fp32 --contexts {long} 100 --chunk 256 --steps 2 "
                      f"--kernel torch --out {tmp_path}/sweep.json", runs)
    assert_done(result)
    assert "is repeated" in result.stderr
    record, model = json.loads((tmp_path / "sweep.json").read_text()), load_model(load_checkpoint(
        runs / mode / "best.pt"))
    assert [(r["context"], r["status"]) for r in record["rows"]] == [(100, "ok"), (long, "ok")]
    assert record["text_repeated"] and record["text_tokens"] == len(ids)
    for row in record["rows"]:
        nll, last = plain_nll(model, ids.repeat(3)[:row["context"] + 1]), (row["context"] - 1) % 256 + 1
        assert row["loss"] == pytest.approx(nll[-last:].mean().item(), abs=1e-4)
        assert row["cache_bytes"] == cache_bytes(model.cfg, 1, row["context"] + 2, "fp32")
        assert row["prefill_seconds"] > 0 and row["ms_per_token"] > 0


def test_sweep_stops_where_memory_or_time_would_not_suffice(runs, tmp_path, monkeypatch):
    command = f"sweep {EVALUATE} decoupled --steps 1 --contexts 64 2048 4096 --kv-cache q8_0 --out {tmp_path}/s.json"
    subject = load_subject(runs / "decoupled", "cpu")
    room = timing.margin(subject, 1024) + cache_bytes(subject.cfg, 1, 2049, "q8_0")
    for free, ran in ((room, 2), (room - 1, 1)):
        monkeypatch.setattr(timing, "available_memory", lambda device: free)
        rows = result_of(command, runs, tmp_path / "s.json")["rows"]
        assert [row["status"] == "ok" for row in rows] == [i < ran for i in range(3)]
        assert rows[ran]["status"].startswith("not run: needs ") and f"{free:,} are free" in rows[ran]["status"]
    monkeypatch.undo()
    rows = result_of(f"{command} --max-seconds 0", runs, tmp_path / "s.json")["rows"]
    assert [row["status"].split(":")[0] for row in rows] == ["stopped", "not run", "not run"]
    assert "--max-seconds" in rows[2]["status"] and "64 tokens" in rows[2]["status"]


def test_sweep_keeps_what_it_has_where_memory_runs_out_all_the_same(runs, tmp_path, monkeypatch):
    def little_memory(cfg, batch, tokens, *how):
        if tokens > 1000:
            raise RuntimeError("out of memory\nand a long explanation")
        return KVCache(cfg, batch, tokens, *how)

    command = f"sweep {EVALUATE} decoupled --steps 1 --contexts 64 2048 --out {tmp_path}/s.json"
    monkeypatch.setattr(timing, "KVCache", little_memory)
    rows = result_of(command, runs, tmp_path / "s.json")["rows"]
    assert [r["status"] for r in rows] == ["ok", "failed: no memory for a KV cache of 2,049 tokens (out of memory)"]


def test_available_memory_is_less_than_all_there_is():
    assert 2**20 < timing.available_memory(torch.device("cpu")) < 2**50
