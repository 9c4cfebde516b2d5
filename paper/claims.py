"""
The ledger of claims and the pre-registered contrasts: rules that turn results into verdicts. None is typed by hand.

claims.json says what the papers report, and which controls a reader would ask for; paper/rules.py computes our values.
What rests on one seed, or on one pair of checkpoints, is undecided, whatever it shows; what is paired by seed is
corrected by Holm over all of it. Times and bytes of the same shapes on one machine need no seeds, but decide nothing
about another machine, nor where the report leaves out what they depend on. A target that a report sets itself can be
met, not reproduced: it holds where it does on every text that was measured, for the one model that it was measured of.
Arithmetic needs no run: it checks a report's own numbers by its own premises, and what is right by it isn't reproduced.
contrasts() tests what paper_manifest.json fixed before its runs.
"""

from pathlib import Path

from paper.rules import ALPHA, INTERIM, RULES, UNDECIDED, Finding, pair_runs
from paper.shapes import list_of, maybe, number, read_json
from paper.stats import holm, mean_interval, p_below, p_text
from train_dba import BROKEN, UserError, brief

CLAIM = {"id": str, "rule": str, "source": str, "statement": str, "unit": str, "reported": maybe(number),
         "margin?": number, "note?": str, "needs?": str, "target?": bool}
ARITHMETIC = ("perplexity", "perplexity_gap", "share", "percent_more", "mean_difference", "cache_ratio", "cache_gib",
              "cache_layer_bytes", "parameters", "quotients", "bytes_per_value", "cache_percent_less")
OWN_COUNTS = ("best_case", "confounded", "tokens_seen", "work_ratio")           # nothing is run again for them
UNMEASURED = (*ARITHMETIC, *OWN_COUNTS, "contradiction", "other_mixed_caches", "absorbed_work", "disjoint_mse")
ONE, NOT_RUN, HOLDS, FAILS = "undecided (n = 1)", "not yet run", "holds", "does not hold"
REPRODUCED, REFUTED, UNSUPPORTED, CONTRADICTS = ("reproduced", "not reproduced", "not supported by its own counts",
                                                 "contradicts itself")
RIGHT, ERROR = "right by arithmetic", "arithmetic error"
VERDICTS = (REPRODUCED, REFUTED, RIGHT, ERROR, CONTRADICTS, UNSUPPORTED, HOLDS, FAILS, UNDECIDED, INTERIM, ONE, NOT_RUN)


# -----------------------------------------------------------------------------
# Verdicts

def verdict(claim: dict, finding: Finding) -> str:
    if finding.agrees is None:
        return NOT_RUN
    if finding.seeds == 1:
        return ONE
    if finding.agrees in (UNDECIDED, INTERIM):
        return finding.agrees
    if claim["source"] == "control" or claim.get("target"):
        return HOLDS if finding.agrees else FAILS
    if finding.agrees:
        return RIGHT if claim["rule"] in UNMEASURED else REPRODUCED
    if claim["rule"] in ARITHMETIC:
        return ERROR
    if claim["rule"] == "contradiction":
        return CONTRADICTS
    return UNSUPPORTED if claim["rule"] in OWN_COUNTS else REFUTED


def correct(findings: list[Finding]) -> None:
    """Holm over all that is paired by seed: that whose p doesn't survive it is undecided."""
    tested = [finding for finding in findings if finding.p is not None]
    for finding, adjusted in zip(tested, holm([finding.p for finding in tested])):
        finding.p_holm = adjusted
        finding.where += f"; p {p_text(finding.p)}, by Holm over {len(tested)} tests {p_text(adjusted)}"
        if adjusted >= ALPHA and finding.agrees != INTERIM:
            finding.agrees = UNDECIDED


def registered(manifest: dict) -> dict[str, int]:
    """{group/set: how many seeds were fixed before its runs}."""
    sets = {}
    for group, content in manifest.items():
        sets |= {f"{group}/{name}": len(each["seeds"]) for name, each in content["sets"].items()}
    return sets


def ledger(results: dict, path: Path = Path(__file__).parent / "claims.json") -> list[dict]:
    """Every claim with our value, its 95 % interval's half-width, where it is from, and the verdict. Raises UserError
    for a damaged file of claims."""
    claims = read_json(path, list_of(CLAIM))
    findings = []
    for claim in claims:
        try:
            findings.append(RULES[claim["rule"]](claim, results))
        except BROKEN as e:
            raise UserError(f"{path}: the claim {claim['id']} lacks what its rule reads ({brief(e)})") from None
    correct(findings)
    rows = []
    for claim, finding in zip(claims, findings):
        rows.append(dict(id=claim["id"], rule=claim["rule"], source=claim["source"], statement=claim["statement"],
                         unit=claim["unit"], margin=claim.get("margin", 0.0), reported=claim["reported"],
                         ours=finding.value, interval=finding.half, p_holm=finding.p_holm, where=finding.where,
                         verdict=verdict(claim, finding), note=claim.get("note", claim.get("needs", ""))))
    return rows


# -----------------------------------------------------------------------------
# Pre-registered contrasts

def contrast_p(differences: list, kind: str, margin: float) -> float | None:
    """One-sided p in the contrast's direction; for equivalence the larger of its two. None for one pair."""
    if len(differences) < 2:
        return None
    if kind == "better":
        return p_below(differences, 0.0)
    p = p_below(differences, margin)
    if kind == "equivalent":
        p = max(p, p_below([-difference for difference in differences], margin))
    return p


def contrast_verdict(row: dict, alpha: float) -> str:
    """holds: the p that Holm adjusted is below alpha (and, for equivalence, the interval inside the margin); does not
    hold: the p of the other side, corrected by Holm as well, is below alpha / 2, which alone would be a 95 % interval
    there; neither before all seeds that were registered are run."""
    if row["pairs"] == 0:
        return NOT_RUN
    if row["pairs"] == 1:
        return ONE
    if row["pairs"] < row["registered"]:
        return INTERIM
    low, high = row["mean"] - row["half"], row["mean"] + row["half"]
    threshold = 0.0 if row["kind"] == "better" else row["margin"]
    if row["p_holm"] < alpha and (row["kind"] != "equivalent" or -threshold < low and high < threshold):
        return HOLDS
    if row["p_against_holm"] < alpha / 2:
        return FAILS
    return UNDECIDED


def loss_differences(results: dict, group: str, name: str, contrast: dict) -> list[float]:
    """Best losses of a contrast's a minus those of its b in the set of that name, by seed."""
    pairs = pair_runs(results, *(f"{group}/{name}/{contrast[side]}" for side in ("a", "b")), "best_val_loss")
    return [a["best_val_loss"] - b["best_val_loss"] for a, b in pairs]


def difference(values: list[float]) -> dict:
    mean, half = mean_interval(values) if values else (None, None)
    return dict(pairs=len(values), mean=mean, half=half)


def contrasts(manifest: dict, results: dict) -> list[dict]:
    """Every contrast of the manifest: a - b of best losses in nats, paired by seed, mean and half-width of its 95 %
    t-interval, one-sided p, the same by Holm over the group's whole list, that of the other side, and the verdict. A
    contrast that was not run counts in the correction, with p = 1. elsewhere: the same difference in the group's other
    sets, untested."""
    rows = []
    for group, content in manifest.items():
        family = []
        for contrast in content.get("contrasts", []):
            differences = loss_differences(results, group, contrast["set"], contrast)
            elsewhere = []
            for name in content["sets"]:
                others = loss_differences(results, group, name, contrast)
                if others and name != contrast["set"]:
                    elsewhere.append(dict(difference(others), set=name))
            seeds = content["sets"][contrast["set"]]["seeds"]
            family.append(dict(contrast, group=group, **difference(differences), registered=len(seeds),
                               elsewhere=elsewhere, p=contrast_p(differences, contrast["kind"], contrast["margin"])))
        adjusted = holm([1.0 if row["p"] is None else row["p"] for row in family])
        against = holm([1.0 if row["p"] is None else 1 - row["p"] for row in family])
        for row, p, p_against in zip(family, adjusted, against):
            run = row["p"] is not None
            row["p_holm"], row["p_against_holm"] = (p, p_against) if run else (None, None)
            row["verdict"] = contrast_verdict(row, content.get("alpha", ALPHA))
        rows += family
    return rows
