"""What becomes of eval_dba.py's files: numbers, figures, the report's tables, the claims on ranks and loops."""

import dataclasses
import json
from pathlib import Path

import pytest

import plot_results
from paper import claims, collect, report
from train_dba import Config, bytes_per_token, make_config

LEDGER = Path(claims.__file__).with_name("claims.json")
ENV = dict(device="cpu", cpu="A CPU", threads=2, commit="0123456789", dirty=False)


def write(folder, name, command, cfg=None, settings=(), **result):
    folder.mkdir(parents=True, exist_ok=True)
    cfg = cfg or make_config(data="-")
    whole = dict(settings=dict(command=command, dtype="float32", **dict(settings)), env=ENV,
                 model=dict(config=dataclasses.asdict(cfg)), **result)
    (folder / f"{name}.json").write_text(json.dumps(whole))


def write_ppl(folder, cache, loss, cfg=None):
    cfg = cfg or make_config(data="-")
    write(folder, f"eval_ppl_{cache}", "ppl", cfg, loss=loss, ppl=2.0**loss, bpb=None, tokens=100, block=64, stride=32,
          bytes_per_token=bytes_per_token(cfg, cache))


def rank_record(layer, of, value, rope, channels, **more):
    ranks = {name: value for name in collect.RANKS}
    return dict(layer=layer, path="total", rope=rope, of=of, channels=channels, ranks=ranks, **more)


def write_rank(folder, queries, keys, rope="after", channels=8):
    """Three layers whose ranks are `queries` and `keys`."""
    qk = dict(share={8: 0.5}, least_share={8: 0.25}, spectra=[[0.5, 0.3, 0.2], [0.7, 0.2, 0.1], [0.9, 0.1, 0.0]])
    records = [rank_record(i, of, values[i], rope, channels, **more) for i in range(3) for of, values, more in
               (("Q merged", queries, {}), ("K merged", keys, {}), ("QK head", queries, qk))]
    if rope == "before":                                   # what RoPE makes of them is far from it
        records += [dict(record, rope="after", ranks=dict.fromkeys(collect.RANKS, 99.0)) for record in records]
    write(folder, "eval_rank", "rank", trained=records, initial=records, moment="not centred", tokens=10, block=5)


def write_all(root):
    """A result of every command."""
    a = root / "a"
    write_ppl(a, "fp16", 2.0)
    write_ppl(a, "q4_0", 2.125)
    score = dict(n=20, version=1, data_sha256="0", acc=0.5, acc_stderr=0.1, items=["0"], correct=dict(acc=[1]))
    write(a, "eval_tasks", "tasks", tasks=dict(piqa=score, boolq=score))
    count = dict(set="literal", kind="all", n=4, margin=0.5, exact=[1, 0.1, 0.6], content=[2, 0.2, 0.7],
                 preferred=[3, 0.3, 0.8], loop=[0, 0.0, 0.5])
    difference = dict(set="literal", n=4, **dict.fromkeys(("exact", "content", "preferred", "loop"), [1, 2, 0.25]))
    write(a, "eval_probes", "probes", counts=[count, dict(count, kind="copy")], compare=[difference])
    write_rank(a, (2.0, 3.0, 7.0), (1.0, 1.0, 1.0))
    times = dict(kernel="torch", prefill_seconds=1.0, ratio_to_fp16=1.0, share_of_copy=0.5)
    write(a, "eval_latency", "latency", rows=[
        dict(times, prompt=prompt, cache=cache, ms_per_token=2.0, tokens_per_second=500.0)
        for prompt in (128, 1024) for cache in ("fp16", "q4_0")])
    write(a, "eval_memory", "memory", rows=[
        dict(tokens=tokens, cache="fp16", bytes_per_token=1, formula_bytes=2**20, cache_bytes=2**20,
             fill_extra_bytes=None, decode_extra_bytes=2**19) for tokens in (512, 1024)])
    write(a, "eval_sweep", "sweep", formats=dict(k="q8_0"), rows=[
        dict(context=2048, cache_bytes=2**20, prefill_seconds=1.0, ms_per_token=2.0, loss=3.0, status="ok"),
        dict(context=4096, status="not run: too long")])
    measured = dict(delta_nll=0.001, kl=0.002, max_delta_logit=0.5, tokens=64)
    write(a, "kv_policy", "policy", formats=dict(k="q8_0", v="nf4"), rotate=True, residual=32, bytes_per_token=9,
          bytes_per_token_with_residual=9.5, thresholds={}, short=measured, long=measured, tried=[1, 2, 3],
          kernel="torch", kernel_ms=dict(auto=2.0, torch=1.5),
          settings=dict(max_delta_nll=0.005, max_kv_bytes_per_token=None, tokens=64, long_factor=4))


def results_of(root, series=()):
    evals, problems = collect.read_evals(root)
    assert not problems
    return dict(runs=[], evals=evals, series=list(series), benchmarks={}, manifest={}, claims=[], contrasts=[])


def test_every_command_has_its_numbers_in_the_report_and_its_figure(tmp_path):
    write_all(tmp_path)
    results = results_of(tmp_path)
    assert {file["command"] for file in results["evals"]["a"].values()} == set(collect.KEPT)
    text = "\n".join(report.eval_lines(results))
    for cell in ("| +0.1250 |", "50.0 ± 19.6 %", "| 3.0 / 3.0 |", "1 (10-60 %)", "exact +1 -2 (p 0.25)", "2.00 (1.00)",
                 "not run: too long", "k q8_0, v nf4, rotated, 32 newest fp16", "torch, auto 2.0 ms, torch 1.5 ms",
                 "| 1,024 | fp16 | 1 | 1.00 | 1.00 | - | 0.50 |", "commit `0123456`"):
        assert cell in text, cell
    assert "copy" not in text.split("robes")[1].split("olicies")[0]             # single kinds stay in the file
    missing = plot_results.draw(results, tmp_path)
    drawn = {path.stem for path in tmp_path.glob("*.png")}
    assert drawn == {"fig_decode", "fig_tasks", "fig_rank"} and not drawn & set(missing)
    assert all(path.stat().st_size > 5000 for path in tmp_path.glob("*.png"))


def test_energy_left_out_is_per_head():
    """Not of a median spectrum, which sums to less than 1."""
    spectra = [[0.5, 0.3, 0.2], [0.7, 0.2, 0.1], [0.9, 0.1, 0.0]]
    assert collect.left_out(dict(spectra=spectra)) == pytest.approx([0.3, 0.1])


def test_nothing_measured(tmp_path):
    results = results_of(tmp_path)
    assert set(plot_results.draw(results, tmp_path)) >= {"fig_decode", "fig_tasks", "fig_rank"}
    assert report.eval_lines(results) == [] and not list(tmp_path.glob("*.png"))


@pytest.mark.parametrize("cache, bits", (("fp16", 16), ("q8_0", 8.5), ("q4_0", 4.5), ("nf4", 4.5)))
def test_bits_per_value_count_the_scales(tmp_path, cache, bits):
    write_ppl(tmp_path / "a", cache, 1.0)
    assert results_of(tmp_path)["evals"]["a"][f"ppl_{cache}"]["result"]["bits_per_value"] == bits


def test_differences_between_caches_are_paired_by_seed(tmp_path):
    """Losses that differ between seeds by far more than between caches: the interval is of the difference."""
    cfg, losses = make_config(data="-"), (1.0, 2.0, 3.0)
    for seed, loss in enumerate(losses):
        write_ppl(tmp_path / f"m_s{seed}", "fp16", loss)
        write_ppl(tmp_path / f"m_s{seed}", "q4_0", loss + 0.1 + 0.01 * seed)
    shared = dict(series="m", row="m", best_of_sweep=None, curve=[], train_curve=[], mode="standard", label="m",
                  data="d", hashes=dict(sha256="d"), context=8, batch=1, steps=1, lr=1e-3, params=1, layers=1,
                  kv_bytes_fp16=bytes_per_token(cfg, "fp16"), tokens_per_second=1.0)
    evals, _ = collect.read_evals(tmp_path)
    runs = [dict(shared, run=f"m_s{seed}", seed=seed, last_val_loss=loss, best_val_loss=loss,
                 caches=collect.caches(evals, f"m_s{seed}")) for seed, loss in enumerate(losses)]
    (series,), problems = collect.make_series(runs)
    assert not problems
    delta = series["caches"]["q4_0"]["delta"]
    assert delta["mean"] == pytest.approx(0.11) and delta["half"] == pytest.approx(4.303 * 0.01 / 3**0.5, rel=1e-3)
    lines = report.eval_lines(dict(runs=runs, evals={}, series=[series], benchmarks={}))
    assert "+0.1100 ± 0.0248" in "\n".join(lines)


def test_runs_of_other_data_make_no_series():
    """One file name, two contents."""
    shared = dict(series="m", row="m", best_of_sweep=None, curve=[[1, 2.0]], train_curve=[], mode="standard", label="m",
                  data="d", context=8, batch=1, steps=1, lr=1e-3, params=1, layers=1, kv_bytes_fp16=1, caches={},
                  tokens_per_second=1.0, last_val_loss=2.0, best_val_loss=2.0)
    runs = [dict(shared, run=f"m_s{seed}", seed=seed, hashes=dict(sha256=f"content {seed}")) for seed in range(2)]
    (series,), problems = collect.make_series(runs)
    assert series["seeds"] == [0] and len(problems) == 1 and "m_s1" in problems[0]


STANDARD = "wikitext2/compare/standard512_s1337"


@pytest.mark.parametrize("run, channels, queries, agrees", (
    (STANDARD, 512, (12.0, 31.0, 90.0), True), (STANDARD, 512, (12.0, 33.0, 33.0), claims.UNDECIDED),
    (STANDARD, 512, (2.0, 10.0, 31.0), claims.UNDECIDED), (STANDARD, 256, (12.0, 31.0, 90.0), None),   # another width
    ("checkpoints/standard", 512, (12.0, 31.0, 90.0), None)))
def test_claim_on_ranks(tmp_path, run, channels, queries, agrees):
    """Whatever is found: one checkpoint gives no verdict."""
    write_rank(tmp_path / run, queries, (20.0, 20.0, 20.0), "before", channels)
    results = results_of(tmp_path)
    claim, = [claim for claim in json.loads(LEDGER.read_text()) if claim["id"] == "effective-rank"]
    assert claims.effective_rank(claim, results).agrees == agrees
    row, = [row for row in claims.ledger(results) if row["id"] == "effective-rank"]
    assert row["verdict"] == ("not yet run" if agrees is None else "undecided (n = 1)")
    if agrees is not None:
        assert row["ours"] == max(20.0, sorted(queries)[1])


@pytest.mark.parametrize("split, agrees", (([1, 9, 0.02], True), ([9, 1, 0.02], False)))
def test_claim_on_loops(tmp_path, split, agrees):
    row = dict(set="template", n=50, loop=split, preferred=[0, 0, 1.0], exact=[0, 0, 1.0], content=[0, 0, 1.0])
    write(tmp_path / "checkpoints/decoupled", "eval_probes", "probes", counts=[],
          compare=[dict(row, set="literal"), row])
    results = results_of(tmp_path)
    claim, = [claim for claim in json.loads(LEDGER.read_text()) if claim["id"] == "loops-here"]
    finding = claims.probe_difference(claim, results)
    assert finding.agrees == agrees and finding.value == split[0] - split[1]
    row, = [row for row in claims.ledger(results) if row["id"] == "loops-here"]
    assert row["verdict"] == "undecided (n = 1)"


def test_damaged_files_are_named_and_left_out(tmp_path):
    write_ppl(tmp_path / "a", "fp16", 2.0)
    (tmp_path / "a/eval_tasks.json").write_text('{"settings"')
    (tmp_path / "a/eval_rank.json").write_text("{}")
    (tmp_path / "a/eval_probes.json").write_text("[" * 100_000 + "]" * 100_000)
    evals, problems = collect.read_evals(tmp_path)
    assert evals["a"].keys() == {"ppl_fp16"} and len(problems) == 3
    assert all("damaged" in problem or "eval_rank" in problem for problem in problems)


def test_config_of_a_result_is_a_config():
    assert Config(**dataclasses.asdict(make_config(data="-"))) == make_config(data="-")
