"""
The ledger of claims: claims.json says what the papers report, and which controls a reader would ask for; a rule here
computes our value from results.json and decides the verdict. No verdict is typed by hand.

A rule returns (value or None, interval half-width or None, agrees, where it was measured). agrees is None where nothing
has been run, and UNDECIDED where what has been run can't tell. Arithmetic rules need no run: they check the report's
own numbers.
"""

import json
import math
from pathlib import Path

from train_dba import bytes_per_token, count_params, make_config

# Two-sided 95 % quantiles of Student's t for 1 to 30 degrees of freedom, then the normal's.
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
       2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)
SEVEN_B = dict(data="-", d_model=4096, layers=32, n_head=32, d_ff=11008)        # the Llama-7B scale of the reports
LONG = 131_072                                                                  # tokens of "128k"
ARITHMETIC = ("perplexity", "perplexity_gap", "share", "mean_difference", "cache_ratio", "cache_gib",
              "cache_layer_bytes", "parameters")
UNDECIDED = "undecided"
VERDICTS = ("reproduced", "not reproduced", "arithmetic error", UNDECIDED, "not yet run")


def mean_interval(values):
    """(mean, half-width of the 95 % t-interval or None for one value)."""
    n, mean = len(values), math.fsum(values) / len(values)
    if n == 1:
        return mean, None
    spread = math.sqrt(math.fsum((x - mean) ** 2 for x in values) / (n - 1) / n)
    return mean, (T95[n - 2] if n - 2 < len(T95) else 1.96) * spread


def seeds_of(results, series, field):
    """{seed: value} of a field over the runs of a series, or of a sweep's runs at the learning rate that did best."""
    return {run["seed"]: run[field] for run in results["runs"] if series in (run["series"], run["best_of_sweep"])}


def within(value, reported, relative):
    return abs(value - reported) <= relative * abs(reported)


def place(results, *series, seeds):
    """Names of series, how many seeds, and the hardware of their runs."""
    hardware = sorted({run["hardware"] for run in results["runs"] if {run["series"], run["best_of_sweep"]} & {*series}})
    return f"{' against '.join(f'`{name}`' for name in series)}, {seeds} seed{'s' * (seeds > 1)}; {'; '.join(hardware)}"


def best_pair(claim, results, field):
    """(values of a pair of series as two lists, in the order of the seeds that both have; its place), or None. The
    first pair with several seeds, else the first that has been run."""
    found = []
    for a, b in claim["pairs"]:
        left, right = seeds_of(results, a, field), seeds_of(results, b, field)
        if shared := sorted(seed for seed in left.keys() & right.keys() if None not in (left[seed], right[seed])):
            found.append(([left[s] for s in shared], [right[s] for s in shared],
                          place(results, a, b, seeds=len(shared))))
    return next((pair for pair in found if len(pair[0]) > 1), found[0] if found else None)


def loss(claim, results):
    values = list(seeds_of(results, claim["series"], claim.get("field", "best_val_loss")).values())
    if not values:
        return None, None, None, ""
    mean, half = mean_interval(values)
    agrees = abs(mean - claim["reported"]) <= claim["tolerance"]
    return mean, half, agrees, place(results, claim["series"], seeds=len(values))


def paired(claim, results, most):
    """Whether the difference of best losses is at most so much with its whole 95 % interval, or above it with its whole
    interval; undecided in between, and for one seed."""
    found = best_pair(claim, results, "best_val_loss")
    if found is None:
        return None, None, None, ""
    mean, half = mean_interval([a - b for a, b in zip(*found[:2])])
    last, _ = mean_interval([a - b for a, b in zip(*best_pair(claim, results, "last_val_loss")[:2])])
    where = found[2] + (f"; of the last losses {last:+.4f}" if abs(last - mean) > 1e-9 else "")
    decided = half is not None and not mean - half <= most <= mean + half
    return mean, half, mean < most if decided else UNDECIDED, where


def below(claim, results):
    """The difference is below zero."""
    return paired(claim, results, 0.0)


def not_worse(claim, results):
    """The difference is below a margin."""
    return paired(claim, results, claim["margin"])


def ratio(claim, results, field):
    found = best_pair(claim, results, field)
    if found is None:
        return None, None, None, ""
    left, right, where = found
    mean, half = mean_interval([a / b for a, b in zip(left, right)])
    return mean, half, within(mean, claim["reported"], claim["tolerance"]), where


def speed_ratio(claim, results):
    return ratio(claim, results, "tokens_per_second")


def memory_ratio(claim, results):
    return ratio(claim, results, "peak_bytes")


def overfits(claim, results):
    last, best = (seeds_of(results, claim["series"], field) for field in ("last_val_loss", "best_val_loss"))
    if not last:
        return None, None, None, ""
    mean, half = mean_interval([last[seed] - best[seed] for seed in last])
    return mean, half, mean > 0.05, place(results, claim["series"], seeds=len(last))


def cache_quality(claim, results):
    rows = [row for row in results["benchmarks"].get("cache_quality", {}).get("rows", ())
            if (row["run"], row["policy"], row["rotate"]) == (claim["run"], claim["policy"], False)]
    if not rows:
        return None, None, None, ""
    row, = rows
    cpu = results["benchmarks"]["cache_quality"]["env"]["cpu"]
    return (row["delta_nll"], 1.96 * row["standard_error"], row["delta_nll"] <= claim["tolerance"],
            f"`{claim['run']}`, {row['tokens']:,} tokens, 1 seed; {cpu}")


def effective_rank(claim, results):
    """Entropy ranks of all queries and of all keys of a layer before RoPE, as vectors, medians over layers; the larger.
    Only models of the width that the claim is about count, and as the report names no definition, another rank than its
    own refutes nothing."""
    names = [name for start in claim["runs"] for name in results["evals"] if name.startswith(start)]
    for rank, run in ((results["evals"][name].get("rank"), name) for name in names):
        rows = {row["of"][0]: row for row in rank["found"]["rows"] if row["of"].endswith("merged")
                and row["rope"] == "before" and row["channels"] == claim["width"]} if rank else {}
        if rows.keys() == {"Q", "K"}:
            ranks = {of: row["trained"]["entropy_rank_lambda"] for of, row in rows.items()}
            low, high = claim["range"]
            agrees = all(low <= value <= high for value in ranks.values()) or UNDECIDED
            return (max(ranks.values()), None, agrees,
                    f"`{run}`, medians over layers: queries {ranks['Q']:.1f}, keys {ranks['K']:.1f}; "
                    f"{rank['from']['hardware']}")
    return None, None, None, ""


def probe_difference(claim, results):
    """Cases of the probes' templates that show something in one model only, less those that do in the other only."""
    found = results["evals"].get(claim["run"], {}).get("probes", {"found": {"compare": ()}})["found"]["compare"]
    for row in (row for row in found if row["set"] == "template"):
        here, there, p = row[claim["check"]]
        agrees = UNDECIDED if p >= 0.05 else (here > there) == claim["more"]
        return (here - there, None, agrees, f"`{claim['run']}` against {claim['against']}, {row['n']} cases, 1 seed: "
                f"+{here} -{there}, McNemar's p {p:.2g}")
    return None, None, None, ""


def not_run(claim, results):
    return None, None, None, ""


def resolve(settings):
    """(Config, cache policy) of a claim's settings, at the 7B scale unless they name a preset."""
    settings = dict(settings)
    policy = settings.pop("cache")
    return make_config(**(dict(data="-") if "exp" in settings else SEVEN_B), **settings), policy


def layer_bytes(settings):
    """Bytes of KV cache per token and layer."""
    cfg, policy = resolve(settings)
    return bytes_per_token(cfg, policy) / cfg.layers


def cache_gib(claim, results):
    cfg, policy = resolve(claim["config"])
    value = bytes_per_token(cfg, policy) * LONG / 2**30
    return value, None, abs(value - claim["reported"]) < 0.05, "formula, tested against allocated caches"


def cache_ratio(claim, results):
    value = layer_bytes(claim["against"]) / layer_bytes(claim["config"])
    return value, None, within(value, claim["reported"], 0.02), "formula, tested against allocated caches"


def cache_ratio_below_one(claim, results):
    value = layer_bytes(claim["config"]) / layer_bytes(claim["against"])
    return value, None, value < 1, "formula, tested against allocated caches"


def cache_layer_bytes(claim, results):
    value = layer_bytes(claim["config"])
    return value, None, value == claim["reported"], "formula, tested against allocated caches"


def parameters(claim, results):
    value = count_params(make_config(data="-", **claim["config"]), claim["vocab_size"])["total"]
    return value, None, within(value, claim["reported"], claim["tolerance"]), "formula, tested against models"


def perplexity(claim, results):
    value = math.exp(claim["loss"])
    return value, None, within(value, claim["reported"], 0.002), "the report's own loss"


def perplexity_gap(claim, results):
    value = 100 * (math.exp(claim["losses"][0] - claim["losses"][1]) - 1)
    return value, None, within(value, claim["reported"], 0.02), "the report's own losses"


def share(claim, results):
    value = 100 * claim["numbers"][0] / claim["numbers"][1]
    return value, None, within(value, claim["reported"], 0.01), "the report's own numbers"


def mean_difference(claim, results):
    value = math.fsum(a - b for a, b in claim["scores"]) / len(claim["scores"])
    return value, None, abs(value - claim["reported"]) < 0.051, "the report's own scores"


def best_case(claim, results):
    """McNemar's p if every case in which the two differ favoured the better: the least that these counts allow. Where
    even that isn't significant, nothing was shown; where it is, only the cases themselves could tell."""
    a, b = claim.get("counts") or (round(percent / 100 * claim["items"]) for percent in claim["percent"])
    p = min(1.0, 2 * 0.5 ** abs(a - b))
    of = f" of {claim['items']}" if "items" in claim else ""
    return p, None, UNDECIDED if p < 0.05 else False, f"the report's own counts: {a} and {b}{of}"


RULES = {rule.__name__: rule for rule in (
    loss, below, not_worse, speed_ratio, memory_ratio, overfits, cache_quality, effective_rank, probe_difference,
    not_run, cache_gib, cache_ratio, cache_ratio_below_one, cache_layer_bytes, parameters, perplexity, perplexity_gap,
    share, mean_difference, best_case)}


def verdict(claim, agrees):
    if agrees is None:
        return "not yet run"
    if agrees == UNDECIDED:
        return UNDECIDED
    return "reproduced" if agrees else "arithmetic error" if claim["rule"] in ARITHMETIC else "not reproduced"


def ledger(results, path=Path(__file__).parent / "claims.json"):
    """Every claim with our value, its 95 % interval's half-width, where it is from, and the verdict."""
    rows = []
    for claim in json.loads(path.read_text()):
        value, half, agrees, where = RULES[claim["rule"]](claim, results)
        rows.append(dict(id=claim["id"], source=claim["source"], statement=claim["statement"], unit=claim["unit"],
                         reported=claim["reported"], ours=value, interval=half, where=where,
                         verdict=verdict(claim, agrees), note=claim.get("note", claim.get("needs", ""))))
    return rows
