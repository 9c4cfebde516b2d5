"""
The ledger of claims and the pre-registered contrasts: rules that turn results into verdicts. None is typed by hand.

claims.json says what the papers report, and which controls a reader would ask for. A rule computes our value from the
results and says whether it agrees. What rests on one seed, or on one pair of checkpoints, is undecided, whatever it
shows; differences of losses are corrected by Holm over all of them. Arithmetic rules need no run: they check a report's
own numbers by its own premises. contrasts() tests what paper_manifest.json fixed before its runs.
"""

import math
from dataclasses import dataclass
from pathlib import Path

from paper.collect import same_data
from paper.shapes import list_of, maybe, number, read_json
from paper.stats import holm, mean_interval, p_below
from train_dba import BROKEN, UserError, brief, bytes_per_token, count_params, make_config

SEVEN_B = dict(data="-", d_model=4096, layers=32, n_head=32, d_ff=11008)        # the Llama-7B scale of the reports
LONG = 131_072                                                                  # tokens of "128k"
ALPHA = 0.05
CLAIM = {"id": str, "rule": str, "source": str, "statement": str, "unit": str, "reported": maybe(number),
         "margin?": number, "note?": str, "needs?": str}
ARITHMETIC = ("perplexity", "perplexity_gap", "share", "percent_more", "mean_difference", "cache_ratio", "cache_gib",
              "cache_layer_bytes", "parameters")
UNDECIDED, ONE, NOT_RUN, HOLDS, FAILS = "undecided", "undecided (n = 1)", "not yet run", "holds", "does not hold"
REPRODUCED, REFUTED, ERROR, UNSUPPORTED = ("reproduced", "not reproduced", "arithmetic error",
                                           "not supported by its own counts")
VERDICTS = (REPRODUCED, REFUTED, ERROR, UNSUPPORTED, HOLDS, FAILS, UNDECIDED, ONE, NOT_RUN)
BY_FORMULA = "formula, tested against allocated caches"


@dataclass
class Finding:
    """What a rule found: our value, its 95 % interval's half-width, whether the claim agrees (None: nothing has been
    run; UNDECIDED: what has been run can't tell), where it was measured, on how many seeds or pairs of checkpoints
    (None for arithmetic), and the two-sided p of a difference of losses against its threshold, alone and by Holm."""
    value: float | None = None
    half: float | None = None
    agrees: bool | str | None = None
    where: str = ""
    seeds: int | None = None
    p: float | None = None
    p_holm: float | None = None


# -----------------------------------------------------------------------------
# Losses

def runs_of(results: dict, series: str) -> dict:
    """{seed: run} of a series, or of a sweep's runs at the learning rate that did best."""
    return {run["seed"]: run for run in results["runs"] if series in (run["series"], run["best_of_sweep"])}


def within(value: float, reported: float, relative: float) -> bool:
    return abs(value - reported) <= relative * abs(reported)


def place(runs: list, *series: str, seeds: int) -> str:
    """Names of series, how many seeds, and the hardware of their runs."""
    hardware = "; ".join(sorted({run["hardware"] for run in runs}))
    plural = "seed" if seeds == 1 else "seeds"
    return f"{' against '.join(f'`{name}`' for name in series)}, {seeds} {plural}; {hardware}"


def pair_runs(results: dict, a: str, b: str, field: str) -> list:
    """[(run of a, run of b)] of the seeds for which both series have a field, measured on the same data."""
    left, right = runs_of(results, a), runs_of(results, b)
    pairs = []
    for seed in sorted(left.keys() & right.keys()):
        pair = left[seed], right[seed]
        if same_data(*pair) and None not in (pair[0][field], pair[1][field]):
            pairs.append(pair)
    return pairs


def best_pair(claim: dict, results: dict, field: str) -> tuple[list, str]:
    """(pairs of runs, their place) of the claim's first pair of series with several seeds, else of the first that has
    been run, else ([], "")."""
    measured = []
    for a, b in claim["pairs"]:
        if pairs := pair_runs(results, a, b, field):
            measured.append((pairs, place([run for pair in pairs for run in pair], a, b, seeds=len(pairs))))
    for pairs, where in measured:
        if len(pairs) > 1:
            return pairs, where
    return measured[0] if measured else ([], "")


def loss(claim: dict, results: dict) -> Finding:
    runs = list(runs_of(results, claim["series"]).values())
    if not runs:
        return Finding()
    mean, half = mean_interval([run[claim.get("field", "best_val_loss")] for run in runs])
    agrees = abs(mean - claim["reported"]) <= claim["tolerance"]
    return Finding(mean, half, agrees, place(runs, claim["series"], seeds=len(runs)), len(runs))


def paired(claim: dict, results: dict, threshold: float) -> Finding:
    """Whether the difference of best losses is below a threshold, paired by seed; ledger() corrects its p."""
    pairs, where = best_pair(claim, results, "best_val_loss")
    if not pairs:
        return Finding()
    differences = [a["best_val_loss"] - b["best_val_loss"] for a, b in pairs]
    mean, half = mean_interval(differences)
    last, _ = mean_interval([a["last_val_loss"] - b["last_val_loss"] for a, b in pairs])
    if abs(last - mean) > 1e-9:
        where += f"; of the last losses {last:+.4f}"
    p = p_below(differences, threshold)
    return Finding(mean, half, mean < threshold, where, len(pairs), None if p is None else 2 * min(p, 1 - p))


def below(claim: dict, results: dict) -> Finding:
    """The difference is below zero."""
    return paired(claim, results, 0.0)


def not_worse(claim: dict, results: dict) -> Finding:
    """The difference is below a margin."""
    return paired(claim, results, claim["margin"])


def ratio(claim: dict, results: dict, field: str) -> Finding:
    pairs, where = best_pair(claim, results, field)
    if not pairs:
        return Finding()
    mean, half = mean_interval([a[field] / b[field] for a, b in pairs])
    return Finding(mean, half, within(mean, claim["reported"], claim["tolerance"]), where, len(pairs))


def speed_ratio(claim: dict, results: dict) -> Finding:
    """A ratio of speeds decides only on the device that the claim is about."""
    finding = ratio(claim, results, "tokens_per_second")
    if finding.agrees is not None and claim["device"].lower() not in finding.where.lower():
        finding.agrees, finding.seeds = UNDECIDED, None
        finding.where += f"; the claim is about {claim['device'].upper()}"
    return finding


def memory_ratio(claim: dict, results: dict) -> Finding:
    return ratio(claim, results, "peak_bytes")


def overfits(claim: dict, results: dict) -> Finding:
    runs = list(runs_of(results, claim["series"]).values())
    if not runs:
        return Finding()
    mean, half = mean_interval([run["last_val_loss"] - run["best_val_loss"] for run in runs])
    return Finding(mean, half, mean > 0.05, place(runs, claim["series"], seeds=len(runs)), len(runs))


# -----------------------------------------------------------------------------
# Measurements of checkpoints

def cache_quality(claim: dict, results: dict) -> Finding:
    benchmark = results["benchmarks"].get("cache_quality", dict(rows=[]))
    for row in benchmark["rows"]:
        if (row["run"], row["policy"], row["rotate"]) == (claim["run"], claim["policy"], False):
            where = f"`{claim['run']}`, {row['tokens']:,} tokens, 1 seed; {benchmark['env']['cpu']}"
            return Finding(row["delta_nll"], 1.96 * row["standard_error"], row["delta_nll"] <= claim["tolerance"],
                           where, seeds=1)
    return Finding()


def effective_rank(claim: dict, results: dict) -> Finding:
    """Entropy ranks of all queries and of all keys of a layer before RoPE, as vectors, medians over layers; the larger.
    Only models of the width that the claim is about count, and as the report names no definition, another rank than its
    own refutes nothing."""
    for name, files in results["evals"].items():
        if "rank" not in files or not name.startswith(tuple(claim["runs"])):
            continue
        ranks = {}
        for row in files["rank"]["result"]["rows"]:
            if row["of"].endswith("merged") and row["rope"] == "before" and row["channels"] == claim["width"]:
                ranks[row["of"][0]] = row["trained"]["entropy_rank_lambda"]
        if ranks.keys() == {"Q", "K"}:
            low, high = claim["range"]
            agrees = all(low <= value <= high for value in ranks.values()) or UNDECIDED
            where = (f"`{name}`, medians over layers: queries {ranks['Q']:.1f}, keys {ranks['K']:.1f}; "
                     f"{files['rank']['from']['hardware']}")
            return Finding(max(ranks.values()), None, agrees, where, seeds=1)
    return Finding()


def probe_difference(claim: dict, results: dict) -> Finding:
    """Cases of the probes' templates that show something in one model only, less those that do in the other only."""
    files = results["evals"].get(claim["run"], {})
    rows = files["probes"]["result"]["compare"] if "probes" in files else []
    for row in rows:
        if row["set"] == "template":
            this, other, p = row[claim["check"]]
            where = (f"`{claim['run']}` against `{claim['against']}`, {row['n']} cases, 1 seed: +{this} -{other}, "
                     f"McNemar's p over cases {p:.2g}")
            return Finding(this - other, None, (this > other) == claim["more"], where, seeds=1)
    return Finding()


def not_run(claim: dict, results: dict) -> Finding:
    return Finding()


# -----------------------------------------------------------------------------
# Arithmetic

def resolve(settings: dict) -> tuple:
    """(Config, cache policy) of a claim's settings, at the 7B scale unless they name a preset."""
    settings = dict(settings)
    policy = settings.pop("cache")
    return make_config(**(dict(data="-") if "exp" in settings else SEVEN_B), **settings), policy


def layer_bytes(settings: dict) -> float:
    """Bytes of KV cache per token and layer."""
    cfg, policy = resolve(settings)
    return bytes_per_token(cfg, policy) / cfg.layers


def cache_gib(claim: dict, results: dict) -> Finding:
    """At the claim's `bits` a value, which a report states as an ideal without scales, or in the policy's own format.
    What depends on something `unstated` refutes nothing."""
    cfg, policy = resolve(claim["config"])
    size, where = bytes_per_token(cfg, policy) * LONG, BY_FORMULA
    if "bits" in claim:
        size *= claim["bits"] / 16                         # of fp16
        where = f"formula, at its stated ideal of {claim['bits']} bits a value"
    agrees = abs(size / 2**30 - claim["reported"]) < 0.05
    if not agrees and "unstated" in claim:
        agrees, where = UNDECIDED, f"{where}; the report doesn't state the {claim['unstated']}"
    return Finding(size / 2**30, None, agrees, where)


def cache_ratio(claim: dict, results: dict) -> Finding:
    value = layer_bytes(claim["against"]) / layer_bytes(claim["config"])
    return Finding(value, None, within(value, claim["reported"], 0.02), BY_FORMULA)


def cache_ratio_below_one(claim: dict, results: dict) -> Finding:
    value = layer_bytes(claim["config"]) / layer_bytes(claim["against"])
    return Finding(value, None, value < 1, BY_FORMULA)


def cache_layer_bytes(claim: dict, results: dict) -> Finding:
    value = layer_bytes(claim["config"])
    return Finding(value, None, value == claim["reported"], BY_FORMULA)


def parameters(claim: dict, results: dict) -> Finding:
    value = count_params(make_config(data="-", **claim["config"]), claim["vocab_size"])["total"]
    return Finding(value, None, within(value, claim["reported"], claim["tolerance"]), "formula, tested against models")


def perplexity(claim: dict, results: dict) -> Finding:
    value = math.exp(claim["loss"])
    return Finding(value, None, within(value, claim["reported"], 0.002), "the report's own loss")


def perplexity_gap(claim: dict, results: dict) -> Finding:
    value = 100 * (math.exp(claim["losses"][0] - claim["losses"][1]) - 1)
    return Finding(value, None, within(value, claim["reported"], 0.02), "the report's own losses")


def share(claim: dict, results: dict) -> Finding:
    value = 100 * claim["numbers"][0] / claim["numbers"][1]
    return Finding(value, None, within(value, claim["reported"], 0.01), "the report's own numbers")


def percent_more(claim: dict, results: dict) -> Finding:
    value = 100 * (claim["numbers"][0] / claim["numbers"][1] - 1)
    return Finding(value, None, within(value, claim["reported"], 0.02), "the report's own numbers")


def mean_difference(claim: dict, results: dict) -> Finding:
    value = math.fsum(a - b for a, b in claim["scores"]) / len(claim["scores"])
    return Finding(value, None, abs(value - claim["reported"]) < 0.051, "the report's own scores")


def best_case(claim: dict, results: dict) -> Finding:
    """McNemar's p if every case in which the two differ favoured the better: the least that these counts allow. Where
    even that isn't significant, nothing was shown; where it is, only the cases themselves could tell."""
    if "counts" in claim:
        a, b = claim["counts"]
    else:
        a, b = (round(percent / 100 * claim["items"]) for percent in claim["percent"])
    p = min(1.0, 2 * 0.5 ** abs(a - b))
    of = f" of {claim['items']}" if "items" in claim else ""
    return Finding(p, None, UNDECIDED if p < ALPHA else False, f"the report's own counts: {a} and {b}{of}")


RULES = {rule.__name__: rule for rule in (
    loss, below, not_worse, speed_ratio, memory_ratio, overfits, cache_quality, effective_rank, probe_difference,
    not_run, cache_gib, cache_ratio, cache_ratio_below_one, cache_layer_bytes, parameters, perplexity, perplexity_gap,
    share, percent_more, mean_difference, best_case)}


# -----------------------------------------------------------------------------
# Verdicts

def verdict(claim: dict, finding: Finding) -> str:
    if finding.agrees is None:
        return NOT_RUN
    if finding.seeds == 1:
        return ONE
    if finding.agrees == UNDECIDED:
        return UNDECIDED
    if claim["source"] == "control":
        return HOLDS if finding.agrees else FAILS
    if finding.agrees:
        return REPRODUCED
    if claim["rule"] in ARITHMETIC:
        return ERROR
    return UNSUPPORTED if claim["rule"] == "best_case" else REFUTED


def correct(findings: list[Finding]) -> None:
    """Holm over all differences of losses: those whose p doesn't survive it are undecided."""
    tested = [finding for finding in findings if finding.p is not None]
    for finding, adjusted in zip(tested, holm([finding.p for finding in tested])):
        finding.p_holm = adjusted
        finding.where += f"; p {finding.p:.2g}, by Holm over {len(tested)} tests {adjusted:.2g}"
        if adjusted >= ALPHA:
            finding.agrees = UNDECIDED


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
    hold: the whole interval is on the other side."""
    if row["pairs"] == 0:
        return NOT_RUN
    if row["pairs"] == 1:
        return ONE
    low, high = row["mean"] - row["half"], row["mean"] + row["half"]
    threshold = 0.0 if row["kind"] == "better" else row["margin"]
    if row["p_holm"] < alpha and (row["kind"] != "equivalent" or -threshold < low and high < threshold):
        return HOLDS
    if low > threshold or row["kind"] == "equivalent" and high < -threshold:
        return FAILS
    return UNDECIDED


def contrasts(manifest: dict, results: dict) -> list[dict]:
    """Every contrast of the manifest: a - b of best losses in nats, paired by seed, mean and half-width of its 95 %
    t-interval, one-sided p, the same by Holm over the group's whole list, and the verdict. A contrast that was not run
    counts in the correction, with p = 1."""
    rows = []
    for group, content in manifest.items():
        family = []
        for contrast in content.get("contrasts", []):
            a, b = (f"{group}/{contrast['set']}/{contrast[side]}" for side in ("a", "b"))
            pairs = pair_runs(results, a, b, "best_val_loss")
            differences = [left["best_val_loss"] - right["best_val_loss"] for left, right in pairs]
            mean, half = mean_interval(differences) if differences else (None, None)
            family.append(dict(contrast, group=group, a=a, b=b, pairs=len(pairs), mean=mean, half=half,
                               p=contrast_p(differences, contrast["kind"], contrast["margin"])))
        adjusted = holm([1.0 if row["p"] is None else row["p"] for row in family])
        for row, p in zip(family, adjusted):
            row["p_holm"] = None if row["p"] is None else p
            row["verdict"] = contrast_verdict(row, content.get("alpha", ALPHA))
        rows += family
    return rows
