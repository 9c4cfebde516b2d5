"""What is made of eval_dba.py's files and of runs: numbers, figures, text, the claims that rest on them; damaged files,
and a user's own runs."""

import dataclasses
import json
import os
import random
from pathlib import Path
from statistics import fmean

import pytest

import plot_results
from helpers import call
from paper import claims, collect, report, rules, style
from paper.shapes import COMMANDS, RANKS
from train_dba import Config, UserError, bytes_per_token, make_config

LEDGER = Path(claims.__file__).with_name("claims.json")
ENV = dict(device="cpu", cpu="A CPU", threads=2, commit="0123456789", dirty=False)
IDENTITY = dict(sha256="data", val_sha256=None, train_tokens=100, val_tokens=10)


# -----------------------------------------------------------------------------
# Files as eval_dba.py and train_dba.py write them

def write(folder, name, command, cfg=None, settings=(), **result):
    folder.mkdir(exist_ok=True, parents=True)
    cfg = cfg or make_config(data="-")
    whole = dict(settings=dict(command=command, dtype="float32", **dict(settings)), env=ENV,
                 model=dict(config=dataclasses.asdict(cfg)), **result)
    (folder / f"{name}.json").write_text(json.dumps(whole))


def write_ppl(folder, cache, loss, cfg=None, ppl=4.0):
    cfg = cfg or make_config(data="-")
    write(folder, f"eval_ppl_{cache}", "ppl", cfg, loss=loss, ppl=ppl, bpb=None, tokens=100, block=64, stride=32,
          bytes_per_token=bytes_per_token(cfg, cache))


def rank_record(layer, of, value, rope, channels, **more):
    ranks = dict.fromkeys(RANKS, value)
    return dict(layer=layer, path="total", rope=rope, of=of, channels=channels, ranks=ranks, **more)


def write_rank(folder, queries, keys, rope="after", channels=8):
    """Three layers whose ranks are `queries` and `keys`."""
    qk = dict(share={8: 0.5}, least_share={8: 0.25}, left_out=[0.3, 0.1])
    records = [rank_record(i, of, values[i], rope, channels, **more) for i in range(3) for of, values, more in
               (("Q merged", queries, {}), ("K merged", keys, {}), ("QK head", queries, qk))]
    if rope == "before":                                   # what RoPE makes of them is far from it
        records += [dict(record, rope="after", ranks=dict.fromkeys(RANKS, 99.0)) for record in records]
    write(folder, "eval_rank", "rank", trained=records, initial=records, moment="not centred", tokens=10, block=5)


def write_all(root):
    """A result of every command."""
    a = root / "a"
    write_ppl(a, "fp16", 2.0)
    write_ppl(a, "q4_0", 2.125, ppl=5.0)
    score = dict(n=20, version=1, data_sha256="0", acc=0.5, acc_stderr=0.1, items=["0"], correct=dict(acc=[1]))
    write(a, "eval_tasks", "tasks", tasks=dict(piqa=score, boolq=score))
    count = dict(set="literal", kind="all", n=4, margin=0.5, exact=[1, 0.1, 0.6], content=[2, 0.2, 0.7],
                 preferred=[3, 0.3, 0.8], loop=[0, 0.0, 0.5])
    difference = dict(set="literal", n=4, **dict.fromkeys(("exact", "content", "preferred", "loop"), [1, 2, 0.25]))
    write(a, "eval_probes", "probes", counts=[count, dict(count, kind="copy")], compare=[difference])
    write_rank(a, (2.0, 3.0, 7.0), (1.0, 1.0, 1.0))
    times = dict(kernel="torch", prefill_seconds=1.0, ratio_to_fp16=1.0, share_of_copy=0.5)
    write(a, "eval_latency", "latency", rows=[
        dict(times, prompt=prompt, cache=cache, ms_per_token=2.0, tokens_per_second=512.0)
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
    write(a, "eval_mask", "mask", summary=[
        dict(text="t", length=1024, choice="gates", windows=3, tokens=1536, kept=0.4125, kl=0.0075, kl_half=0.001,
             accuracy_kept=99.5, accuracy_kept_half=None, delta_nll=0.002, mass=0.987)],
        costs=[dict(length=1024, attention="SDPA", layer_ms=17.0, layer_bytes=None, forward_ms=90.0,
                    forward_bytes=2**21, ms_per_token=0.25)])


def write_run(folder, losses=(3.0, 2.0), identity=(), env=(), drop=(), **settings):
    """A finished run's folder. drop: settings that its log lacks, as if they were younger than it."""
    folder.mkdir(parents=True, exist_ok=True)
    cfg = make_config(**{**dict(data="data/text.txt", steps=len(losses), batch_size=2, block=8), **settings})
    config = {name: value for name, value in dataclasses.asdict(cfg).items() if name not in drop}
    lines = [dict(type="meta", config=config, params=dict(total=1000), data={**IDENTITY, **dict(identity)},
                  kv_bytes_per_token=dict(fp16=bytes_per_token(cfg, "fp16")))]
    for step, loss in enumerate(losses, 1):
        lines.append(dict(type="train", step=step, tokens=16 * step, loss=loss, tok_s=123456.0, mem_bytes=None))
        lines.append(dict(type="eval", step=step, tokens=16 * step, val_loss=loss, val_tokens=10,
                          best_val_loss=min(losses[:step])))
    lines.append(dict(type="done", step=len(losses), tokens=16 * len(losses)))
    (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "env.json").write_text(json.dumps({**ENV, **dict(env)}))


def empty(**more):
    return dict(runs=[], series=[], evals={}, surgery={}, benchmarks={}, claims=[], contrasts=[], manifest={},
                problems=[]) | more


def eval_text(evals, series=(), runs=()):
    return "\n".join(report.eval_lines(empty(evals=evals, series=series, runs=runs)))


# -----------------------------------------------------------------------------
# Evaluations

def test_every_command_has_its_numbers_in_the_section_and_its_figure(tmp_path):
    write_all(tmp_path)
    evals, problems = collect.read_evals(tmp_path)
    assert not problems and {file["command"] for file in evals["a"].values()} == set(COMMANDS)
    text = eval_text(evals)
    for cell in ("| +0.1250 |", "50.0 ± 19.6 %", "| 3.0 / 3.0 |", "1 (10-60 %)", "exact +1 -2 (p 0.25)", "2.00 (1.00)",
                 "not run: too long", "k q8_0, v nf4, rotated, 32 newest fp16", "torch, auto 2.0 ms, torch 1.5 ms",
                 "| 1,024 | fp16 | 1 | 1.00 | 1.00 | - | 0.50 |", "commit `0123456`",
                 "| gates | 41.2 % | 0.987 | - | 0.00750 ± 0.001 | +0.0020 | 99.5 % | - |", "| SDPA | 17 | - | 0.25 |"):
        assert cell in text, cell
    assert "copy" not in text.split("Probes")[1].split("Cache policies")[0]     # single kinds stay in the file
    drawn = {"fig_decode", "fig_tasks", "fig_rank"}
    missing = plot_results.draw(empty(evals=evals), tmp_path)
    assert not drawn & set(missing) and all((tmp_path / f"{name}.png").stat().st_size > 5000 for name in drawn)


def test_energy_left_out_is_per_head():
    """Not of a median spectrum, which sums to less than 1."""
    spectra = [[0.5, 0.3, 0.2], [0.7, 0.2, 0.1], [0.9, 0.1, 0.0]]
    assert collect.left_out(dict(spectra=spectra)) == pytest.approx([0.3, 0.1])
    assert collect.left_out(dict(left_out=[0.3, 0.1, 1e-7])) == [0.3, 0.1]      # what is left of the axis stays away


def test_nothing_measured(tmp_path):
    assert len(plot_results.draw(empty(), tmp_path)) == 9
    assert eval_text({}) == ""


@pytest.mark.parametrize("cache, bits", (("fp16", 16), ("q8_0", 8.5), ("q4_0", 4.5), ("nf4", 4.5)))
def test_bits_per_value_count_the_scales(tmp_path, cache, bits):
    write_ppl(tmp_path / "a", cache, 1.0)
    assert collect.read_evals(tmp_path)[0]["a"][f"ppl_{cache}"]["result"]["bits_per_value"] == bits


def test_a_loss_without_perplexity_is_shown(tmp_path):
    write_ppl(tmp_path / "a", "fp16", 2.0)
    write_ppl(tmp_path / "a", "q4_0", 800.0, ppl=None)
    assert "| 800.0000 | - | +798.0000 | - |" in eval_text(collect.read_evals(tmp_path)[0])


def test_differences_between_caches_are_paired_by_seed(tmp_path):
    """Losses that differ between seeds by far more than between caches: the interval is of the difference."""
    for seed, loss in enumerate((1.0, 2.0, 3.0)):
        folder = tmp_path / f"m_s{seed}"
        write_run(folder, (5.0, loss), seed=seed)
        write_ppl(folder, "fp16", loss)
        write_ppl(folder, "q4_0", loss + 0.1 + 0.01 * seed)
    results = collect.collect(tmp_path, {})
    series, = results["series"]
    delta = series["caches"]["q4_0"]["delta"]
    assert delta["mean"] == pytest.approx(0.11) and delta["half"] == pytest.approx(4.303 * 0.01 / 3**0.5, rel=1e-3)
    assert "+0.1100 ± 0.0248" in "\n".join(report.eval_lines({**results, "claims": []}))
    assert results["evals"] == {}                          # what was measured of a run stands with the run


# -----------------------------------------------------------------------------
# Claims that rest on one checkpoint, or one pair, are undecided

STANDARD = "wikitext2/compare/standard512_s1337"


@pytest.mark.parametrize("run, channels, queries, agrees", (
    (STANDARD, 512, (12.0, 31.0, 90.0), True), (STANDARD, 512, (12.0, 33.0, 33.0), rules.UNDECIDED),
    (STANDARD, 512, (2.0, 10.0, 31.0), rules.UNDECIDED), (STANDARD, 256, (12.0, 31.0, 90.0), None),   # another width
    ("checkpoints/standard", 512, (12.0, 31.0, 90.0), None)))
def test_claim_on_ranks(tmp_path, run, channels, queries, agrees):
    """Whatever is found: one checkpoint gives no verdict."""
    write_rank(tmp_path / run, queries, (20.0, 20.0, 20.0), "before", channels)
    results = empty(evals=collect.read_evals(tmp_path)[0])
    claim, = [claim for claim in json.loads(LEDGER.read_text()) if claim["id"] == "effective-rank"]
    assert rules.effective_rank(claim, results).agrees == agrees
    row, = [row for row in claims.ledger(results) if row["id"] == "effective-rank"]
    assert row["verdict"] == ("not yet run" if agrees is None else "undecided (n = 1)")
    if agrees is not None:
        assert row["ours"] == max(20.0, sorted(queries)[1])


@pytest.mark.parametrize("split, agrees", (([1, 9, 0.02], True), ([9, 1, 0.02], False)))
def test_claim_on_loops(tmp_path, split, agrees):
    row = dict(set="template", n=50, loop=split, preferred=[0, 0, 1.0], exact=[0, 0, 1.0], content=[0, 0, 1.0])
    write(tmp_path / "checkpoints/decoupled", "eval_probes", "probes", counts=[],
          compare=[dict(row, set="literal"), row])
    results = empty(evals=collect.read_evals(tmp_path)[0])
    claim, = [claim for claim in json.loads(LEDGER.read_text()) if claim["id"] == "loops-here"]
    finding = rules.probe_difference(claim, results)
    assert finding.agrees == agrees and finding.value == split[0] - split[1]
    row, = [row for row in claims.ledger(results) if row["id"] == "loops-here"]
    assert row["verdict"] == "undecided (n = 1)"


# -----------------------------------------------------------------------------
# Runs

def test_names_are_folders_at_any_depth(tmp_path):
    write_run(tmp_path / "g/set/row_lr0.002_s7", seed=7, lr=2e-3)
    write_run(tmp_path / "mine", seed=7)
    (swept, plain), problems = collect.read_runs(tmp_path)
    assert not problems
    assert (swept["run"], swept["series"], swept["row"]) == ("g/set/row_lr0.002_s7", "g/set/row_lr0.002", "g/set/row")
    assert (plain["run"], plain["series"], plain["row"]) == ("mine", "mine", "mine")
    (alone,), _ = collect.read_runs(tmp_path / "mine")
    assert alone["run"] == "mine"


def test_a_log_from_before_a_flag_has_its_default(tmp_path):
    write_run(tmp_path / "old", drop=("one_temperature", "schedule", "mlp"))
    (run,), problems = collect.read_runs(tmp_path)
    assert not problems and run["label"] == "standard 512"


@pytest.mark.parametrize("settings, label", (
    (dict(attn_mode="gqa", kv_head=2, attn_dim=128), "gqa 8Q/2KV"),
    (dict(attn_mode="decoupled", sem_dim=32, geo_dim=64, null_attn=True, tie_qk=True), "decoupled 32/64 null tied"),
    (dict(attn_mode="decoupled", sem_dim=64, geo_dim=64, kv_lora_rank=48, kv_head=4),
     "decoupled 64/64 latent 48 4 groups")))
def test_labels_say_what_a_model_caches(settings, label):
    assert collect.label(dataclasses.asdict(make_config(data="-", **settings))) == label


def test_runs_of_other_data_share_no_series_panel_or_difference(tmp_path):
    """By what the log says of the data; the path is the same."""
    write_run(tmp_path / "a_s1", seed=1)
    write_run(tmp_path / "a_s2", seed=2, identity=dict(sha256="other"))
    write_run(tmp_path / "b_s1", seed=1, identity=dict(val_sha256="other"))
    results = collect.collect(tmp_path, {})
    assert [series["runs"] for series in results["series"]] == [["a_s1"], ["b_s1"]]
    assert "a_s2: other data or settings than a_s1" in results["problems"][0]
    titles = [title for title, _ in collect.panels(results["series"])]
    assert len(titles) == 2
    a, b = results["series"]
    assert report.difference(results, a, b) == (None, None, 0)


def test_two_sets_of_the_manifest_share_no_panel(tmp_path):
    """Their schedules and types may differ, whatever else is equal."""
    for group in ("cpu_mini/modes", "equal_cache/headline"):
        write_run(tmp_path / group / "standard_s1", seed=1)
        write_run(tmp_path / group / "gqa_s1", seed=1, attn_mode="gqa", kv_head=2)
    drawn = collect.panels(collect.collect(tmp_path, {})["series"])
    assert [(title.split(":")[0], len(members)) for title, members in drawn] == [("cpu_mini/modes", 2),
                                                                                ("equal_cache/headline", 2)]


def test_moved_data_are_the_same(tmp_path):
    write_run(tmp_path / "a_s1", seed=1)
    write_run(tmp_path / "b_s1", seed=1, data="elsewhere/other.txt")
    (_, members), = collect.panels(collect.collect(tmp_path, {})["series"])
    assert len(members) == 2


def test_a_users_runs_make_a_users_report(tmp_path, capsys):
    write_run(tmp_path / "runs/mine", attn_mode="decoupled")
    write_run(tmp_path / "runs/deep/er/standard")
    assert plot_results.main(["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out/report.md").read_text()
    for words in ("## Runs", "## Sizes", "decoupled 32/64", "fig_convergence.png"):
        assert words in text
    for words in ("claim", "Ledger", "paper", "123,456"):    # no ledger, and no tokens/s
        assert words not in text
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results["claims"] == [] and len(results["series"]) == 2
    assert (tmp_path / "out/fig_convergence.png").is_file()
    assert "of the manifest" not in capsys.readouterr().err


def test_no_runs_is_one_line(tmp_path, capsys):
    assert plot_results.main(["--runs", str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.startswith("error: no finished run under ")


def test_sweeps_are_listed_once(tmp_path):
    """In the LaTeX table, by their best rate; a sweep that only chooses a rate not at all."""
    for lr, loss in ((0.1, 2.0), (0.2, 1.0)):
        write_run(tmp_path / f"g/fair/x_lr{lr}_s1", (3.0, loss), lr=lr, seed=1)
    runs, _ = collect.read_runs(tmp_path)
    for run in runs:
        run["best_of_sweep"] = "g/fair/x" if run["lr"] == 0.2 else None
    series, _ = collect.make_series(runs)
    assert report.scale_table(series, small=True).count(r"standard 512 &") == 1


@pytest.mark.parametrize("differences, word", (((0.03, 0.031), "which does not pass"),
                                               ((-0.01, -0.011), "which passes"), ((-0.01,), "which does not pass"),
                                               ((-0.05, 0.03), "which does not pass")))
def test_the_positive_control_stands_beside_every_ranking(tmp_path, differences, word):
    for seed, difference in enumerate(differences):
        write_run(tmp_path / f"g/s/standard_s{seed}", (9.0, 2.0 + seed), seed=seed)
        write_run(tmp_path / f"g/s/mla_s{seed}", (9.0, 2.0 + seed + difference), seed=seed, attn_mode="mla")
    contrast = dict(name="a", kind="better", margin=0.01, mean=None, p=None, pairs=0, registered=2,
                    verdict="not yet run")
    results = {**empty(), **collect.collect(tmp_path, {}), "contrasts": [contrast], "claims": []}
    sentence = report.positive_control(results)
    assert word in sentence and f"{len(differences)} seed" in sentence and f"{fmean(differences):+.2f}" in sentence
    for lines in (report.findings(results), report.contrast_lines(results), report.run_lines(results)):
        assert sentence in lines
    assert report.positive_control(empty()) is None and report.beside_ranking(empty()) == []


def test_divisions_of_a_heads_channels_are_paired_with_the_headlines(tmp_path):
    """What differs in anything else (temperatures, key heads, no rotation of both paths) is not among them."""
    shared = dict(attn_mode="decoupled", kv_head=4, attn_dim=192)
    models = {"s/standard": (dict(), 3.0), "s/gqa": (dict(attn_mode="gqa", attn_dim=192, kv_head=4), 2.0),
              "s/two": (dict(attn_mode="gqa", attn_dim=384, kv_head=2), 2.5),
              "s/dba": (dict(shared, sem_dim=64, geo_dim=128), 1.9),
              "s/one": (dict(shared, sem_dim=64, geo_dim=128, one_temperature=True), 1.8),
              "s/norope": (dict(shared, sem_dim=64, geo_dim=128, rope=False), 1.7),
              "split/half": (dict(shared, sem_dim=96, geo_dim=96), 1.6),
              "split/none": (dict(attn_mode="gqa", attn_dim=192, kv_head=4, rope=False), 2.6)}
    for name, (settings, loss) in models.items():
        for seed in (1, 2):
            write_run(tmp_path / f"g/{name}_s{seed}", (9.0, loss + seed), seed=seed, **settings)
    rows = plot_results.divisions({**empty(), **collect.collect(tmp_path, {})})
    found = [(series["score_channels"], fmean(differences)) for series, differences in rows]
    assert found == [([0, 24], pytest.approx(0.1)), ([8, 16], 0.0), ([12, 12], pytest.approx(-0.3)),
                     ([24, 0], pytest.approx(0.7))]
    plot_results.draw_split({**empty(), **collect.collect(tmp_path, {})}, tmp_path / "split.png")
    assert plot_results.divisions(empty()) == []


@pytest.mark.parametrize("ours, latent, count", ((1.9, 2.5, "1"), (2.1, 2.5, "none"), (1.9, 1.8, "2")))
def test_the_moonshot_takes_gqa_and_mla_alike(tmp_path, ours, latent, count):
    """Losses through fp16 caches, GQA's at 2.0, MLA's at 2.2, paired by seed."""
    shared = dict(attn_mode="decoupled", kv_head=4)
    models = {"standard": (dict(), 2.0), "gqa": (dict(attn_mode="gqa", attn_dim=192, kv_head=4), 2.0),
              "mla": (dict(attn_mode="mla", kv_lora_rank=160, rope_dim=32), 2.2),
              "dba": (dict(shared, sem_dim=64, geo_dim=128, attn_dim=192), ours),
              "norope": (dict(shared, sem_dim=64, geo_dim=128, attn_dim=192, rope=False), 1.0),
              "small": (dict(shared, sem_dim=32, geo_dim=64, attn_dim=192), 1.0)}
    for name, (settings, loss) in models.items():
        for seed in (1, 2, 3):
            folder = tmp_path / f"g/s/{name}_s{seed}"
            write_run(folder, (9.0, loss + seed), seed=seed, **settings)
            write_ppl(folder, "fp16", loss + seed + 0.001 * seed)
    for seed in (1, 2):                                    # of another set, fewer seeds
        folder = tmp_path / f"g/other/latent_s{seed}"
        write_run(folder, (9.0, latent + seed), seed=seed, **shared, sem_dim=64, geo_dim=128, attn_dim=192,
                  kv_lora_rank=128)
        write_ppl(folder, "fp16", latent + seed + 0.001 * seed)
    results = {**empty(), **collect.collect(tmp_path, {})}
    sentence = report.find_moonshot(results)               # the nearest, and what has a latent
    assert f"Of 2 configurations {count} is shown" in sentence and "rotated" not in sentence
    assert (f"decoupled 64/128 4 groups {ours - 2.0:+.4f}" in sentence) == (ours < latent)
    assert f"latent 128 4 groups {latent - 2.0:+.4f}" in sentence and f"{latent - 2.2:+.4f}" in sentence
    assert sentence in report.findings(results) and report.find_moonshot(empty()) is None


def test_the_block_of_the_readme():
    text = f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n"
    replaced = report.replace_block(text, "new")
    assert replaced == f"before\n{report.BEGIN}\nnew\n{report.END}\nafter\n"
    assert report.replace_block(replaced, "new") == replaced
    for wrong in ("", report.BEGIN, text + text, f"{report.END}{report.BEGIN}"):
        with pytest.raises(UserError, match="lacks the marks"):
            report.replace_block(wrong, "new")


def test_a_readme_that_cannot_be_rewritten_is_said_before_anything_is_written(tmp_path, capsys):
    manifest = plot_results.read_manifest(plot_results.HERE / "paper_manifest.json")
    name = plot_results.list_runs(manifest, [next(iter(manifest))], "data", "runs")[0].name
    write_run(tmp_path / "runs" / name)
    (tmp_path / "folder").mkdir()
    (tmp_path / "bytes").write_bytes(b"\xff")
    (tmp_path / "unmarked").write_text("text")
    for readme, words in (("nowhere", "nowhere can't be read"), ("folder", "folder can't be read"),
                          ("bytes", "bytes can't be read"), ("unmarked", "lacks the marks")):
        args = ("--runs", tmp_path / "runs", "--out", tmp_path / "out", "--readme", tmp_path / readme)
        assert plot_results.main([*map(str, args)]) == 1
        said = capsys.readouterr().err.splitlines()[-1]
        assert said.startswith("error: ") and words in said and not (tmp_path / "out").exists()


# -----------------------------------------------------------------------------
# Damaged files

def test_a_run_folder_whose_name_is_no_text_is_left_out(tmp_path):
    """No file of results could hold it."""
    odd = tmp_path / "runs" / os.fsdecode(b"caf\xe9")
    write_run(odd)
    write_ppl(odd, "fp16", 2.0)
    write_run(tmp_path / "runs/whole")
    result = call("--runs runs --out out", tmp_path, plot_results.main)
    assert result.code == 0 and result.stderr.count("UnicodeEncodeError") == 2
    assert [run["run"] for run in json.loads((tmp_path / "out/runs.json").read_text())["runs"]] == ["whole"]


def test_damaged_files_are_named_and_left_out(tmp_path):
    write_ppl(tmp_path / "a", "fp16", 2.0)
    (tmp_path / "a/eval_tasks.json").write_text('{"settings"')
    (tmp_path / "a/eval_rank.json").write_text("{}")
    evals, problems = collect.read_evals(tmp_path)
    assert evals["a"].keys() == {"ppl_fp16"} and len(problems) == 2
    assert all("damaged (" in problem and "\n" not in problem for problem in problems)


WRONG = ("x", None, True, [], {}, -1, 1.5, float("nan"), float("inf"), 10**400, "x" * 1000, [[]], {"a": {}})


def nested(depth):
    return "[" * depth + "]" * depth


def places(value, path=()):
    """Paths of everything in nested objects and lists."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


def damage(text, rng):
    """A text of JSON with one thing wrong with it."""
    kind = rng.randrange(4)
    if kind == 0:
        return text[:rng.randrange(len(text))]
    if kind == 1:
        return nested(rng.choice((10, 100_000)))
    value = json.loads(text)
    *parents, last = rng.choice([path for path in places(value) if path])
    target = value
    for key in parents:
        target = target[key]
    if kind == 2 and isinstance(target, dict):
        del target[last]
    else:
        target[last] = rng.choice(WRONG)
    return json.dumps(value)


@pytest.mark.parametrize("seed", range(120))
def test_damage_gives_one_line_and_no_traceback(tmp_path, seed):
    """Any file of a run folder with anything wrong: it is used rightly or left out with a line, and the rest is
    reported."""
    rng = random.Random(seed)
    write_all(tmp_path)
    write_run(tmp_path / "a")
    write_run(tmp_path / "whole")
    bench = tmp_path / "bench"
    bench.mkdir()
    (bench / "tokenize_speed.json").write_text(json.dumps(dict(cores=2, ratio=0.9)))
    row = dict(run="a", policy="q4_0", rotate=False, tokens=9, bytes_per_token=3, delta_nll=0.1, standard_error=0.1,
               kl=0.1, top1=0.5)
    (bench / "cache_quality.json").write_text(json.dumps(dict(env=ENV, rows=[row])))
    path = rng.choice(sorted([*tmp_path.glob("a/*.json*"), *bench.glob("*.json")]))
    if path.suffix == ".jsonl":
        lines = path.read_text().splitlines()
        i = rng.randrange(len(lines))
        lines[i] = damage(lines[i], rng)
        path.write_text("\n".join(lines) + "\n")
    else:
        path.write_text(damage(path.read_text(), rng))
    results = collect.collect(tmp_path, {})
    results.update(claims=claims.ledger(results), contrasts=[])
    assert len(results["problems"]) <= 1 and all(problem.count("\n") == 0 for problem in results["problems"])
    assert "whole" in {run["run"] for run in results["runs"]}
    assert report.user_report(results) and report.paper_report(results)


def test_endless_and_missing_files_are_refused(tmp_path):
    write_run(tmp_path / "a")
    for name in ("env.json", "train.jsonl"):
        write_run(tmp_path / "a")
        (tmp_path / "a" / name).unlink()
        (tmp_path / "a" / name).symlink_to("/dev/zero")
        runs, problems = collect.read_runs(tmp_path)
        assert not runs and len(problems) == 1
        (tmp_path / "a" / name).unlink()


def test_config_of_a_result_is_a_config():
    assert Config(**dataclasses.asdict(make_config(data="-"))) == make_config(data="-")


# -----------------------------------------------------------------------------
# Style

def test_a_training_curve_ends_in_a_mean_of_as_many_lines_as_before():
    """Of 61 logged steps in at most 25 parts the odd one is the first, which no panel shows, not a noisy last."""
    train = [dict(tokens=step, loss=float(step)) for step in range(61)]
    points = collect.thin(train)
    assert len(points) == 21 and points[0] == [0, 0.0] and points[-1] == [60, 59.0]
    assert {second[0] - first[0] for first, second in zip(points, points[1:])} == {3}
    assert collect.thin(train[:2]) == [[0, 0.0], [1, 1.0]] and collect.thin([]) == []


def test_a_small_value_is_not_rounded_to_nothing():
    row = dict(ours=1.08e-07, interval=6.5e-09, rule="mask_bound")
    assert report.ours_of(row) == "1.1e-07 ± 6.5e-09"
    assert report.ours_of(dict(row, ours=0.0, interval=0.01)) == "0.0000 ± 0.0100"


def test_the_code_that_was_measured_is_said_and_what_is_no_more():
    row = dict(run="r", policy="q4_0", rotate=True, tokens=8, bytes_per_token=4, delta_nll=0.1, standard_error=0.1,
               kl=0.1, top1=0.5)
    old, new = (" ".join(report.quality_lines(dict(rows=[row], env=dict(ENV, dirty=True), **more)))
                for more in ({}, dict(sources={})))
    assert "A CPU, 2 threads, commit `0123456+`." in old and "is younger" in old and "is younger" not in new
    assert "kernels/decode.cpp" in report.replaced(["torch", report.REPLACED]) and report.replaced(["torch"]) == ""


def test_without_rope_is_off_the_axis_of_a_panel():
    def member(label, loss):
        return dict(label=label, mode="decoupled", matched=True, kv_bytes_fp16=4, last_val_loss=dict(mean=loss, half=0),
                    caches={})
    rope, none = member("decoupled 1/2", 1.7), member("decoupled 1/2 no RoPE", 2.3)
    assert plot_results.most_telling([none, rope]) == [rope] and plot_results.most_telling([none]) == [none]


def test_labels_are_spread_as_little_as_needed():
    assert style.spread([1.0, 5.0, 2.5], 1.0) == [1.0, 5.0, 2.5]
    assert style.spread([1.0, 1.0], 1.0) == [0.5, 1.5]
    places_ = style.spread([0.3, 0.1, 0.2, 9.0], 1.0)
    assert sorted(places_) == [places_[1], places_[2], places_[0], places_[3]] and places_[3] == 9.0
    assert all(b - a >= 1 - 1e-9 for a, b in zip(sorted(places_), sorted(places_)[1:]))


def test_json_has_a_line_an_item():
    content = dict(runs=[dict(a=1), dict(a=2)], evals={"x" * 60: 1, "y" * 60: [1, 2]}, n=3)
    text = style.json_lines(content)
    assert json.loads(text) == content and text.count("\n") == 10


def test_tables():
    assert style.markdown(("a", "b"), [(1, "x")]) == ["| a | b |", "| --- | --- |", "| 1 | x |"]
    table = style.latex_table(("a_b", "c"), [("50 %", "1 ± 2"), r"\midrule"], "x_y", label="tab:x")
    for line in (r"\caption{x\_y}", r"\label{tab:x}", r"\begin{tabular}{lr}", r"a\_b & c \\", r"50 \% & 1 $\pm$ 2 \\"):
        assert line in table.splitlines()
    assert table.count(r"\midrule") == 2


def test_a_mode_has_one_colour_and_nothing_else_has_it():
    colors = [*style.COLORS.values(), *style.OTHERS, style.REPORTED["color"]]
    assert len(set(colors)) == len(colors)


def test_conversions_stand_among_the_findings():
    row = dict(rule="conversion_contrast", statement="a is nearer than b", verdict="holds", ours=-0.25, interval=0.125)
    rows = [row, dict(row, ours=None, statement="c"), dict(row, rule="below", statement="d")]
    text = report.find_surgery(empty(claims=rows))
    assert "\n  - a is nearer than b: **holds**, -0.2500 ± 0.1250" in text and len(text.splitlines()) == 2
    assert report.find_surgery(empty(claims=rows[1:])) is None


def test_conversions_are_read_and_damaged_ones_left_out(tmp_path):
    env = dict(cpu="a CPU", device="cpu", threads=1, commit=None, dirty=None)
    rows = {"latent": dict(bytes=0.5, formats=dict(k="q4_0"), text=dict(kls=[0.1, 0.2], kl=0.15))}
    content = dict(env=env, teacher="t", rows=rows)
    broken = dict(content, rows={"latent": dict(bytes=0.5, text=dict(kls=["x"]))})
    for name, text in (("good", json.dumps(content)), ("broken", json.dumps(broken)), ("cut", "{"), ("list", "[]")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "surgery.json").write_text(text)
    surgery, problems = collect.read_surgery(tmp_path)
    assert surgery == dict(good=dict(latent=dict(bytes=0.5, texts=dict(text=[0.1, 0.2]))))
    assert len(problems) == 3 and all("left out" in line for line in problems)
