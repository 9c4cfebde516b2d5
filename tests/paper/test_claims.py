"""The papers' manifest and its runner, the ledger of claims, and the statistics behind the figures."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import run_paper_manifest as runner
from estimate import training_memory
from helpers import environment
from paper import claims, rules
from paper.collect import choose_rates, read_run
from train_dba import UserError, bytes_per_token, count_params, make_config, parse_args

ROOT = Path(__file__).parent.parent.parent
MANIFEST = runner.read_manifest(ROOT / "paper_manifest.json")
RUNS = runner.list_runs(MANIFEST, list(MANIFEST), "data", "runs")
TINY = dict(d_model=16, layers=1, n_head=2, d_ff=16, block=8, batch_size=2, steps=3, tokenizer="byte")


def series_of(run):
    return run.name.rsplit("_s", 1)[0]


def test_every_run_has_its_own_folder_and_its_flags_resolve_to_its_config():
    assert len({run.cfg.out_dir for run in RUNS}) == len(RUNS) > 200
    for run in RUNS:
        assert parse_args(run.command()) == run.given


def test_groups_of_the_issue_are_there():
    assert set(MANIFEST) == {"wikitext2", "fineweb100m", "local_12l", "a100_1b", "cpu_mini", "equal_cache"}
    modes = {run.cfg.attn_mode for run in RUNS if run.name.startswith("cpu_mini/modes")}
    assert modes == {"standard", "bottleneck", "decoupled", "gqa", "mla"}


@pytest.mark.parametrize("prefix, standard", (("wikitext2/fair", "standard512"), ("cpu_mini/modes", "standard192")))
def test_fair_rows(prefix, standard):
    """One protocol for all; matched rows have the parameters of standard, and most rows one size of cache."""
    runs = [run for run in RUNS if run.name.startswith(prefix)]
    protocol = {(r.cfg.batch_size, r.cfg.steps, r.cfg.block, r.cfg.warmup_steps, r.cfg.min_lr, r.cfg.weight_decay,
                 r.cfg.grad_clip, r.cfg.dropout, r.cfg.data) for r in runs}
    assert len(protocol) == 1
    target, = {count_params(r.cfg, r.vocab_size)["total"] for r in runs if standard in r.name}
    matched = [r for r in runs if "_matched" in r.name]
    assert matched and all(abs(count_params(r.cfg, r.vocab_size)["total"] / target - 1) < 0.001 for r in matched)
    seeds = {}
    for run in runs:
        seeds.setdefault(series_of(run), set()).add(run.cfg.seed)
    assert all(len(s) >= 3 for s in seeds.values())


@pytest.mark.parametrize("prefix, elements", (("wikitext2/fair", 192), ("cpu_mini/modes", 144),
                                              ("equal_cache/headline", 144), ("equal_cache/split", 144),
                                              ("equal_cache/long", 144), ("equal_cache/larger", 240)))
def test_rows_but_standard_cache_the_same(prefix, elements):
    sizes = {bytes_per_token(r.cfg, "fp16") // 2 // r.cfg.layers for r in RUNS
             if r.name.startswith(prefix) and "standard" not in r.name}
    assert sizes == {elements}


@pytest.mark.parametrize("name", ("headline", "split", "long", "larger"))
def test_sets_of_equal_cache_have_equal_parameters(name):
    sizes = {count_params(r.cfg, r.vocab_size)["total"] for r in RUNS if r.name.startswith(f"equal_cache/{name}/")}
    assert max(sizes) / min(sizes) - 1 < 0.001


def test_flops_are_those_of_the_products():
    """Counted product by product: weights twice per token forward, scores and values over the causal half."""
    run = next(r for r in RUNS if r.name.startswith("cpu_mini/modes/standard192_s"))
    D, L, F, T, V = 192, 4, 512, 256, 320
    weights = L * (4 * D * D + 3 * D * F) + V * D          # the embedding multiplies once, as output
    forward = 2 * weights + L * 2 * 2 * D * T / 2
    assert run.flops == pytest.approx(3 * forward * run.tokens, rel=2e-3)       # norms apart


def sweep_results():
    """{series without learning rate: {lr: loss}} of the committed sweep."""
    losses = {}
    for log in sorted((ROOT / "runs").glob("cpu_mini/lr/*/train.jsonl")):
        if run := read_run(log.parent, f"cpu_mini/lr/{log.parent.name}"):
            losses.setdefault(run["series"].rsplit("_lr", 1)[0], {})[run["lr"]] = run["last_val_loss"]
    return losses


@pytest.mark.parametrize("row, losses", sweep_results().items())
def test_learning_rates_are_those_that_the_sweep_chose(row, losses):
    name = row.removeprefix("cpu_mini/lr/")
    chosen = {r.cfg.lr for r in RUNS if series_of(r) in (f"cpu_mini/modes/{name}", f"cpu_mini/modes/{name}_matched")}
    assert chosen == {best := min(losses, key=losses.get)} and min(losses) < best < max(losses)


@pytest.mark.parametrize("change, message", (
    (dict(rows={"a": {"atn_mode": "standard"}}), "no setting atn_mode"),
    (dict(rows={"a": {"attn_mode": "standard", "kv_head": 2}}), "kv_head|--kv-head"),
    (dict(extra=1), "unknown key extra")))
def test_wrong_manifests(tmp_path, change, message):
    part = {"base": dict(TINY), "rows": {"a": {}}, "seeds": [1], **change}
    path = tmp_path / "m.json"
    path.write_text(json.dumps({"g": {"data": "text.txt", "vocab_size": 257, "sets": {"s": part}}}))
    with pytest.raises(UserError, match=message):
        runner.list_runs(runner.read_manifest(path), ["g"], "data", "runs")


def manifest_command(tmp_path, flags):
    command = [sys.executable, ROOT / "run_paper_manifest.py", "--manifest", "m.json", "--group", "g", "--data-dir",
               ".", "--device", "cpu", *shlex.split(flags)]
    return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment())


@pytest.fixture
def small(tmp_path):
    rows = {"good": {}, "bad": {"val_frac": 0.00001}, "other": {"attn_mode": "decoupled", "sem_dim": 4, "geo_dim": 8}}
    (tmp_path / "text.txt").write_text("a few words of text. " * 100)
    (tmp_path / "m.json").write_text(json.dumps({"g": {"data": "text.txt", "vocab_size": 257, "sets": {
        "s": {"about": "", "base": TINY, "rows": rows, "seeds": [1]}}}}))
    return tmp_path


def test_a_failed_run_does_not_stop_the_others(small):
    result = manifest_command(small, "--jobs 2")
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "g/s/bad_s1: exit code 1" in result.stderr and "2 of 3 runs" in result.stdout
    assert "validation part" in (small / "runs/g/s/bad_s1.console").read_text()
    for name in ("good", "other"):
        log = (small / f"runs/g/s/{name}_s1/train.jsonl").read_bytes()
        assert b'"done"' in log.splitlines()[-1] and not (small / f"runs/g/s/{name}_s1.console").exists()
    again = manifest_command(small, "--only s/good s/other --steps 3")
    assert again.returncode == 0
    assert (small / "runs/g/s/other_s1/train.jsonl").read_bytes() == log        # a finished run is left alone


@pytest.mark.parametrize("flags", ("--steps 0 --dry-run", "--jobs 0"))
def test_numbers_that_cannot_be_are_refused(small, flags):
    result = manifest_command(small, flags)
    assert result.returncode == 1 and "must be at least 1" in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize("flag", ("--seed 3", "--out-dir elsewhere", "--data other.txt"))
def test_flags_that_runs_are_named_by_are_refused(small, flag):
    """They would be ignored, or all runs be another one than its folder says."""
    result = manifest_command(small, f"--dry-run -- {flag}")
    assert result.returncode == 1 and result.stderr.startswith(f"error: {flag.split()[0]} after --"), result.stderr
    assert result.stderr.count("\n") == 1


def test_a_rate_that_a_run_is_named_by_is_refused(small):
    manifest = json.loads((small / "m.json").read_text())
    manifest["g"]["sets"]["s"]["lrs"] = [0.1, 0.2]
    (small / "m.json").write_text(json.dumps(manifest))
    result = manifest_command(small, "--dry-run --only s/other -- --lr 0.3")
    assert result.returncode == 1 and result.stderr.startswith("error: --lr after --"), result.stderr


def test_a_dry_run_of_any_length(small):
    result = manifest_command(small, "--dry-run --steps 1000000000000000")
    assert result.returncode == 0, result.stderr


def test_what_follows_a_run(small):
    """Measurements of its checkpoint, in the formats that its mode has; a run without a checkpoint is left alone."""
    result = manifest_command(small, "--only s/good s/other --post-ppl --post-mem128k")
    assert result.returncode == 0, result.stderr
    measured = {path.relative_to(small / "runs").as_posix() for path in (small / "runs").rglob("*.json")}
    for name, caches in (("good", ("fp16", "q8_0", "q4_0", "q4_0_rotated")),
                         ("other", ("fp16", "q8_0", "q4_0", "q4_0_rotated", "hetero"))):
        read = {path for path in measured if path.startswith(f"g/s/{name}_s1/")}
        assert read - {f"g/s/{name}_s1/{kept}.json" for kept in ("resolved_config", "env")} == {
            f"g/s/{name}_s1/mem128k.json", *(f"g/s/{name}_s1/eval_ppl_{cache}.json" for cache in caches)}
    for path in (small / "runs").rglob("*.pt"):
        path.unlink()
    again = manifest_command(small, "--only s/good s/other --post-ppl")
    assert again.returncode == 0 and "2 of them are logs without a checkpoint" in again.stdout


def test_dry_run_needs_no_data(small):
    (small / "text.txt").unlink()
    result = manifest_command(small, "--dry-run")
    assert result.returncode == 0 and "3 of 3 runs are to be made" in result.stdout and "memory" not in result.stdout
    for dtype in ("float32", "bfloat16"):                  # of the runs, not of the device
        said = manifest_command(small, f"--dry-run -- --dtype {dtype}").stdout
        assert said.count(f"TFLOP/s in {dtype}") == 1 and " 0 TFLOP/s" not in said
    assert not (small / "runs").exists()
    assert manifest_command(small, "").returncode == 1
    wrong = manifest_command(small, "--only nothing")
    assert wrong.returncode == 1 and wrong.stderr.count("\n") == 1


def test_dry_run_marks_what_is_finished(small):
    assert manifest_command(small, "--only s/good").returncode == 0
    said = manifest_command(small, "--dry-run --only s/good s/other").stdout
    rows = {line.split()[0]: line.split()[1:3] for line in said.splitlines() if line.startswith("  ")}
    assert rows["good"] == ["1", "all"] and rows["other"] == ["1", "0"]
    assert "1 of 2 runs are to be made" in said


def test_dry_run_for_a_gpu(small, tmp_path):
    """What `make launch_1b` says: the memory of training by formula, the time at a share of the peak that was measured,
    the command."""
    manifest = ["--manifest", str(ROOT / "paper_manifest.json")]
    said = {}
    for gpu in ("h100", "a100"):
        flags = f"--dry-run --for {gpu} -- --compile --micro-batch 8"
        command = [sys.executable, str(ROOT / "run_paper_manifest.py"), *manifest, "--group", "a100_1b", "--only",
                   "modes/baseline_s", *flags.split()]
        said[gpu] = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
        assert "--exp paper_baseline" in said[gpu] and "measured on NVIDIA" in said[gpu] and "655M" in said[gpu]
        cfg = make_config(data="-", exp="paper_baseline", batch_size=8, grad_accum=4, compile=True)
        assert f" {training_memory(cfg, 50_257)['peak'] / 2**30:.1f} GiB " in said[gpu]
    times = [float(re.search(r"([\d.]+) h$", text.strip())[1]) for text in said.values()]
    assert times[1] / times[0] == pytest.approx(989 / 312, rel=0.05)
    refused = manifest_command(small, "--for h100")
    assert refused.returncode == 1 and refused.stderr.count("\n") == 1 and "--dry-run" in refused.stderr


@pytest.mark.parametrize(("n", "text"), [(0, "0"), (999, "999"), (1000, "1.00k"), (999_600, "1.00M"),
                                         (655_360_000, "655M"), (20_000_000_000, "20.0B"), (2 * 10**12, "2.00T"),
                                         (2 * 10**15, "2.00e+03T")])
def test_counts_in_three_digits(n, text):
    assert runner.short(n) == text


# --- Claims

def fake(series, losses, row=None, **more):
    return [dict(run=f"{series}_s{seed}", series=series, row=row or series, seed=seed, last_val_loss=loss,
                 best_val_loss=loss, hardware="a CPU", best_of_sweep=None, identity=dict(sha256="data"), **more)
            for seed, loss in losses.items()]


def finding_of(claim, runs):
    """What a rule finds, corrected as the ledger corrects it."""
    finding = rules.RULES[claim["rule"]](claim, dict(runs=runs, benchmarks={}, evals={}))
    claims.correct([finding])
    return finding


def decide(claim, runs):
    claim = dict(source="December 2025", **claim)
    finding = finding_of(claim, runs)
    return finding.value, finding.half, claims.verdict(claim, finding)


def test_paired_differences_decide():
    claim = dict(rule="below", pairs=[["nobody", "b"], ["a", "b"]])
    base = {1: 2.0, 2: 3.0, 3: 4.0}
    better = {seed: loss - 0.1 - 0.001 * seed for seed, loss in base.items()}
    value, half, verdict = decide(claim, fake("a", better) + fake("b", base))
    assert verdict == "reproduced" and value == pytest.approx(-0.102) and half < 0.01
    assert decide(claim, fake("b", better) + fake("a", base))[2] == "not reproduced"
    mixed = {1: 1.9, 2: 3.1, 3: 3.95}
    assert decide(claim, fake("a", mixed) + fake("b", base))[2] == "undecided"
    assert decide(claim, fake("a", {1: 1.0}) + fake("b", base))[2] == "undecided (n = 1)"   # one seed: no interval
    assert decide(claim, fake("b", base))[2] == "not yet run"
    wide, narrow = fake("a", mixed) + fake("b", base), fake("a", better) + fake("b", base)
    assert decide(dict(claim, rule="not_worse", margin=0.02), wide)[2] == "undecided"
    assert decide(dict(claim, rule="not_worse", margin=-0.09), narrow)[2] == "reproduced"
    assert decide(dict(claim, rule="not_worse", margin=-0.11), narrow)[2] == "not reproduced"
    assert "3 seeds; a CPU" in finding_of(claim, wide).where


def test_a_control_holds_or_does_not():
    """Nobody claimed it, so it can't be reproduced."""
    better = fake("a", {1: 1.0, 2: 2.01, 3: 3.02}) + fake("b", {1: 2.0, 2: 3.0, 3: 4.0})
    for pair, verdict in ((["a", "b"], "holds"), (["b", "a"], "does not hold")):
        claim = dict(rule="below", source="control", pairs=[pair])
        assert claims.verdict(claim, finding_of(claim, better)) == verdict
        target = dict(claim, source="a report", target=True)                    # set, not claimed
        assert claims.verdict(target, finding_of(target, better)) == verdict


def test_holm_makes_a_lone_small_p_undecided():
    """Five differences with p just below 0.05: one alone would count, five don't."""
    differences = {1: 1.0, 2: 1.9, 3: 2.9}
    runs = fake("a", differences) + fake("b", {1: 2.0, 2: 2.9 + 0.06, 3: 3.9 + 0.1})
    alone = rules.RULES["below"](dict(pairs=[["a", "b"]]), dict(runs=runs))
    assert alone.p < 0.05
    alone.p = 0.02
    five = [rules.Finding(-1.0, 0.1, True, "", 3, p) for p in (0.02, 0.02, 0.02, 0.02, 0.02)]
    claims.correct([alone])
    claims.correct(five)
    assert alone.agrees is True and all(finding.agrees == rules.UNDECIDED for finding in five)


@pytest.mark.parametrize("seeds,verdict", ((3, "reproduced"), (4, "undecided (seeds missing)")))
def test_nothing_is_decided_before_the_seeds_that_were_registered(seeds, verdict):
    """Whatever its p, and whether or not the group has contrasts."""
    claim = dict(id="c", source="a paper", rule="below", pairs=[["g/set/a", "g/set/b"]])
    runs = fake("g/set/a", {1: 1.0, 2: 2.01, 3: 3.02}) + fake("g/set/b", {1: 2.0, 2: 3.0, 3: 4.0})
    manifest = {"g": dict(sets={"set": dict(seeds=range(seeds))})}
    results = dict(runs=runs, registered=claims.registered(manifest))
    assert results["registered"] == {"g/set": seeds}
    finding = rules.RULES["below"](claim, results)
    claims.correct([finding])
    assert claims.verdict(claim, finding) == verdict


def test_a_pair_with_several_seeds_goes_before_one_with_one():
    claim = dict(rule="below", pairs=[["big", "b"], ["a", "b"]])
    base = {1: 2.0, 2: 3.0, 3: 4.0}
    runs = fake("big", {1: 0.0}) + fake("a", {s: x + 1 + s / 100 for s, x in base.items()}) + fake("b", base)
    assert decide(claim, runs)[2] == "not reproduced"


def test_best_of_run_and_last_loss_are_both_shown():
    claim = dict(rule="below", pairs=[["a", "b"]])
    runs = fake("a", {1: 1.0, 2: 1.01}) + fake("b", {1: 2.0, 2: 2.0})
    for run in runs[:2]:
        run["last_val_loss"] = 5.0
    finding = finding_of(claim, runs)
    assert finding.value == pytest.approx(-0.995) and finding.agrees is True and "last losses +3.0000" in finding.where


def test_runs_of_other_data_are_no_pair():
    """Identity of data is its hash, not a path."""
    runs = fake("a", {1: 1.0, 2: 1.1}) + fake("b", {1: 2.0, 2: 2.0})
    for run in runs:
        run["identity"] = dict(sha256=run["series"])
    assert decide(dict(rule="below", pairs=[["a", "b"]]), runs)[2] == "not yet run"


def test_a_ratio_of_speeds_decides_on_its_own_device_only():
    claim = dict(rule="speed_ratio", device="mps", reported=2.0, tolerance=0.1, pairs=[["a", "b"]])
    runs = fake("a", {1: 1.0, 2: 1.0}, tokens_per_second=20.0) + fake("b", {1: 1.0, 2: 1.0}, tokens_per_second=10.0)
    assert decide(claim, runs)[2] == "undecided"
    assert decide(dict(claim, device="a cpu"), runs)[2] == "reproduced"


def listed_sweep(*series, seeds=(1, 2, 7)):
    """Runs that a manifest lists: seeds 1 and 2 choose the rate, 7 is the test's."""
    return [runner.Run(f"{name}_s{seed}", name, name.rsplit("_lr", 1)[0], {}, None, 0, for_rate=seed < 7)
            for name in series for seed in seeds]


def test_the_best_rate_is_chosen_by_seeds_that_the_test_does_not_use():
    """Where the test's own seed would choose the other rate."""
    runs = [*fake("g/fair/x_lr0.1", {1: 2.0, 2: 2.2, 7: 0.5}, "g/fair/x"),
            *fake("g/fair/x_lr0.2", {1: 1.9, 2: 2.1, 7: 1.7}, "g/fair/x"),
            *fake("g/fair/y_lr0.1", {1: 0.0, 7: 0.0}, "g/fair/y")]
    choose_rates(runs, listed_sweep("g/fair/x_lr0.1", "g/fair/x_lr0.2", "g/fair/y_lr0.1", "g/fair/y_lr0.2"))
    assert [run["best_of_sweep"] for run in runs] == [None] * 5 + ["g/fair/x"] + [None] * 2        # y lacks a rate
    chosen = rules.runs_of(dict(runs=runs), "g/fair/x")
    assert {seed: run["best_val_loss"] for seed, run in chosen.items()} == {7: 1.7}


def test_seeds_of_a_rate_and_of_a_test_are_disjoint(tmp_path):
    part = dict(base=dict(TINY), rows={"a": {}}, seeds=[1, 2], rate_seeds=[2], lrs=[0.1])
    path = tmp_path / "m.json"
    path.write_text(json.dumps({"g": {"data": "text.txt", "vocab_size": 257, "sets": {"s": part}}}))
    with pytest.raises(UserError, match="seed 2 is for tests"):
        runner.read_manifest(path)
    for group in MANIFEST.values():
        for part in group["sets"].values():
            assert not set(part["seeds"]) & set(part.get("rate_seeds", []))
    assert {run.for_rate for run in RUNS if run.name.startswith("wikitext2/fair")} == {True, False}


# Three pairs of runs, a below b by these differences.
def contrast_results(differences):
    b = {seed: 2.0 + seed for seed in range(len(differences))}
    a = {seed: b[seed] + difference for seed, difference in enumerate(differences)}
    return dict(runs=fake("g/s/a", a) + fake("g/s/b", b))


def one_contrast(differences, kind, others=0, seeds=None):
    contrast = dict(name="a against b", set="s", a="a", b="b", kind=kind, margin=0.01)
    family = [contrast] + [dict(contrast, a="c")] * others                      # others: not run, counted all the same
    sets = dict(s=dict(seeds=range(seeds or len(differences))))
    return claims.contrasts({"g": dict(contrasts=family, alpha=0.05, sets=sets)}, contrast_results(differences))[0]


@pytest.mark.parametrize("differences, kind, verdict", (
    ((-0.101, -0.1, -0.099), "better", "holds"), ((0.101, 0.1, 0.099), "better", "does not hold"),
    ((-0.1, 0.1, 0.05), "better", "undecided"), ((-0.1,), "better", "undecided (n = 1)"), ((), "better", "not yet run"),
    ((0.001, 0.002, 0.0), "no_worse", "holds"), ((0.03, 0.031, 0.029), "no_worse", "does not hold"),
    ((0.001, 0.002, 0.0), "equivalent", "holds"), ((-0.03, -0.031, -0.029), "equivalent", "does not hold"),
    ((-0.03, 0.031, 0.0), "equivalent", "undecided")))               # a missing difference is no equivalence
def test_contrasts(differences, kind, verdict):
    assert one_contrast(differences, kind)["verdict"] == verdict


def test_no_contrast_is_decided_before_its_seeds_are_run():
    differences = (-0.101, -0.1, -0.099)
    assert one_contrast(differences, "better", seeds=4)["verdict"] == "undecided (seeds missing)"
    assert one_contrast(differences, "better", seeds=3)["verdict"] == "holds"


@pytest.mark.parametrize("sign, verdict", ((1, "holds"), (-1, "does not hold")))
def test_contrasts_are_corrected_over_the_whole_family(sign, verdict):
    """Whichever way they are decided."""
    differences = [sign * difference for difference in (-0.1, -0.09, -0.13)]
    alone, among = one_contrast(differences, "better"), one_contrast(differences, "better", others=30)
    assert alone["verdict"] == verdict and among["verdict"] == "undecided"
    assert among["p"] == alone["p"] and among["p_holm"] == pytest.approx(min(1, 31 * among["p"]))
    assert among["p_against_holm"] == pytest.approx(min(1, 31 * (1 - among["p"])))


def test_a_contrast_is_shown_in_other_sets_but_tested_in_its_own():
    """Of the sets that have both rows; nothing of them enters the p."""
    runs = contrast_results((-0.1, -0.09, -0.13))["runs"] + fake("g/long/a", {1: 1.5, 2: 1.7}) + fake(
        "g/long/b", {1: 1.4, 2: 1.5, 3: 9.0}) + fake("g/part/a", {1: 1.0})
    contrast = dict(name="a against b", set="s", a="a", b="b", kind="better", margin=0.01)
    sets = dict(s=dict(seeds=range(3)), long={}, part={})
    row, = claims.contrasts({"g": dict(contrasts=[contrast], alpha=0.05, sets=sets)}, dict(runs=runs))
    other, = row["elsewhere"]
    assert (other["set"], other["pairs"]) == ("long", 2) and other["mean"] == pytest.approx(0.15)
    assert row["p"] == one_contrast((-0.1, -0.09, -0.13), "better")["p"]


@pytest.mark.parametrize("id, value, verdict", (
    ("compression-168", 64 / 3.375, "arithmetic error"), ("compression-96-q4", 151.70, "arithmetic error"),
    ("compression-96-hetero", 117.03, "does not hold"), ("fineweb-gap", 48.1, "arithmetic error"),
    ("memory-gqa-q4", 2.0, "right by arithmetic"),                               # at its stated ideal
    ("memory-mla", 4.5, "undecided"), ("memory-gqa-2025", 8.0, "undecided"),     # width, key heads not said
    ("memory-standard", 64, "right by arithmetic"), ("probes", 0.0625, "not supported by its own counts"),
    ("winogrande", 0.5, "not supported by its own counts"), ("a100-throughput-percent", 29.63, "arithmetic error"),
    ("arc-easy", 2**-15, "undecided"), ("wikitext-gap", 24.6, "arithmetic error"),
    ("fineweb-ppl-standard", 60.28, "right by arithmetic"), ("average-16", -2.99, "arithmetic error"),
    ("average-8", -1.325, "right by arithmetic"), ("attention-share", 62.5, "arithmetic error"),
    ("kv-elements-gqa", 1024, "arithmetic error"), ("dba-under-gqa", 1952 / 288, "does not hold"),
    ("dba-under-standard-q4", 1952 / 2304, "holds")))
def test_arithmetic(id, value, verdict):
    row, = [row for row in claims.ledger(dict(runs=[], evals={}, benchmarks={})) if row["id"] == id]
    assert row["ours"] == pytest.approx(value, rel=2e-3) and row["verdict"] == verdict


def test_every_claim_names_runs_of_the_manifest():
    """By the name of a series, or of a row that is swept over learning rates."""
    known = {run.series for run in RUNS} | {run.row for run in RUNS}
    for claim in json.loads((ROOT / "paper/claims.json").read_text()):
        series = claim.get("series", [])
        named = [*([series] if isinstance(series, str) else series), *sum(claim.get("pairs", []), [])]
        assert {name.removesuffix("_s1337") for name in named} <= known, claim["id"]


@pytest.mark.parametrize("damage", ("[", "{}", '[{"id": 1}]', '[{"id": "a", "rule": "loss", "source": "", "statement": '
                                    '"", "unit": "", "reported": null}]'))
def test_damaged_claims_are_one_line(tmp_path, damage):
    path = tmp_path / "claims.json"
    path.write_text(damage)
    with pytest.raises(UserError, match="claims.json") as error:
        claims.ledger(dict(runs=[], evals={}, benchmarks={}), path)
    assert "\n" not in str(error.value)
