"""The ledger of claims, and the statistics behind the figures."""

import json
from pathlib import Path

import pytest

import run_paper_manifest as runner
from paper import claims, rules
from paper.collect import choose_rates
from train_dba import UserError

ROOT = Path(__file__).parent.parent.parent


def fake(series, losses, row=None, **more):
    return [dict(run=f"{series}_s{seed}", series=series, row=row or series, seed=seed, last_val_loss=loss,
                 best_val_loss=loss, hardware="a CPU", best_of_sweep=None, identity=dict(sha256="data"), **more)
            for seed, loss in losses.items()]


def finding_of(claim, runs):
    """What a rule finds, corrected as the ledger corrects it."""
    finding = rules.RULES[claim["rule"]](claim, dict(runs=runs, benchmarks={}, evals={}, surgery={}))
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
    row, = [row for row in claims.ledger(dict(runs=[], evals={}, surgery={}, benchmarks={})) if row["id"] == id]
    assert row["ours"] == pytest.approx(value, rel=2e-3) and row["verdict"] == verdict


def test_every_claim_names_runs_of_the_manifest():
    """By the name of a series, or of a row that is swept over learning rates."""
    manifest = runner.read_manifest(ROOT / "paper_manifest.json")
    runs = runner.list_runs(manifest, list(manifest), "data", "runs")
    known = {run.series for run in runs} | {run.row for run in runs}
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
        claims.ledger(dict(runs=[], evals={}, surgery={}, benchmarks={}), path)
    assert "\n" not in str(error.value)
