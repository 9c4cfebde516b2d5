"""
The rules of the ledger: each computes our value of a claim from the results, and says whether the claim agrees.

A rule takes a claim, an item of claims.json with what the rule reads of it, and the results of paper.collect. It
returns a Finding, an empty one where nothing was run. It sees no other claim and gives no verdict: paper.claims does.
"""

import math
from dataclasses import dataclass

from paper.collect import column, same_data
from paper.stats import mean_interval, p_below
from train_dba import bytes_per_token, count_params, make_config, stream_bytes

SEVEN_B = dict(data="-", d_model=4096, layers=32, n_head=32, d_ff=11008)        # the Llama-7B scale of the reports
LONG = 131_072                                                                  # tokens of "128k"
ALPHA = 0.05
UNDECIDED = "undecided"
INTERIM = "undecided (seeds missing)"                      # to stop at a good look would be to choose
BY_FORMULA = "formula, tested against allocated caches"


@dataclass
class Finding:
    """What a rule found: our value, its 95 % interval's half-width, whether the claim agrees (None: nothing has been
    run; UNDECIDED: what has been run can't tell; INTERIM: not all of it is), where it was measured, on how many seeds
    or pairs of checkpoints (None for arithmetic and for hardware), and the two-sided p of what is paired by seed
    against its threshold, alone and by Holm."""
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
    agrees = unless_interim(abs(mean - claim["reported"]) <= claim["tolerance"], results, len(runs), claim["series"])
    return Finding(mean, half, agrees, place(runs, claim["series"], seeds=len(runs)), len(runs))


def unless_interim(agrees: bool, results: dict, seeds: int, *series: str) -> bool | str:
    """INTERIM where fewer seeds have been run than paper_manifest.json fixed for the set that a series is of; of
    several, for the smallest of their sets, as pairs can't be more."""
    registered = results.get("registered", {})
    sets = {name.rpartition("/")[0] for name in series} & registered.keys()
    return agrees if seeds >= min((registered[each] for each in sets), default=0) else INTERIM


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
    agrees = unless_interim(mean < threshold, results, len(pairs), *column(pairs[0], "series"))
    return Finding(mean, half, agrees, where, len(pairs), two_sided(p_below(differences, threshold)))


def two_sided(p: float | None) -> float | None:
    return None if p is None else 2 * min(p, 1 - p)


def below(claim: dict, results: dict) -> Finding:
    """The difference is below zero."""
    return paired(claim, results, 0.0)


def not_worse(claim: dict, results: dict) -> Finding:
    """The difference is below a margin."""
    return paired(claim, results, claim["margin"])


def early_below(claim: dict, results: dict) -> Finding:
    """The difference is below zero at the first evaluation that both runs of a pair have."""
    pairs, where = best_pair(claim, results, "curve")
    differences, tokens = [], []
    for a, b in pairs:
        losses = dict(b["curve"])
        shared = [(at, loss - losses[at]) for at, loss in a["curve"] if at in losses]
        if shared:
            tokens.append(shared[0][0])
            differences.append(shared[0][1])
    if not differences:
        return Finding()
    mean, half = mean_interval(differences)
    agrees = unless_interim(mean < 0, results, len(differences), *column(pairs[0], "series"))
    return Finding(mean, half, agrees, f"{where}; after {max(tokens) / 1e6:.2f}M tokens", len(differences),
                   two_sided(p_below(differences, 0.0)))


def ahead_throughout(claim: dict, results: dict) -> Finding:
    """The share of evaluations, of all seeds, at which the first of the pair has the lower loss."""
    pairs, where = best_pair(claim, results, "curve")
    ahead, total = 0, 0
    for a, b in pairs:
        losses = dict(b["curve"])
        for tokens, loss in a["curve"]:
            if tokens in losses:
                total += 1
                ahead += loss < losses[tokens]
    if not total:
        return Finding()
    agrees = unless_interim(ahead == total, results, len(pairs), *column(pairs[0], "series"))
    return Finding(100 * ahead / total, None, agrees, f"{where}; {total} evaluations", len(pairs))


def tokens_to(curve: list, loss: float) -> float | None:
    """Tokens after which a curve of validation losses is down at a loss, between two evaluations by a line; None where
    it is there from the first on, or never."""
    for (before, high), (after, low) in zip(curve, curve[1:]):
        if high > loss >= low:
            return before + (after - before) * (high - loss) / (high - low)
    return None


def data_efficiency(claim: dict, results: dict) -> Finding:
    """Tokens to the loss that both runs of a pair reach, the first as times the second, below 1."""
    pairs, where = best_pair(claim, results, "curve")
    ratios = []
    for a, b in pairs:
        common = max(a["best_val_loss"], b["best_val_loss"])
        tokens = tokens_to(a["curve"], common), tokens_to(b["curve"], common)
        if None not in tokens:
            ratios.append(tokens[0] / tokens[1])
    return below_one(ratios, pairs, where, results)


def below_one(ratios: list, pairs: list, where: str, results: dict) -> Finding:
    """Whether ratios, a pair of runs each, are below 1."""
    if not ratios:
        return Finding()
    mean, half = mean_interval(ratios)
    p = p_below([math.log(value) for value in ratios], 0.0)
    agrees = unless_interim(mean < 1, results, len(ratios), *column(pairs[0], "series"))
    return Finding(mean, half, agrees, where, len(ratios), two_sided(p))


def steadier(claim: dict, results: dict) -> Finding:
    """Whether the largest gradient norm after the warm-up is a smaller multiple of the median."""
    pairs, where = best_pair(claim, results, "gradient_spike")
    return below_one([a["gradient_spike"] / b["gradient_spike"] for a, b in pairs], pairs, where, results)


def ratio(claim: dict, results: dict, field: str) -> Finding:
    pairs, where = best_pair(claim, results, field)
    if not pairs:
        return Finding()
    mean, half = mean_interval([a[field] / b[field] for a, b in pairs])
    agrees = within(mean, claim["reported"], claim["tolerance"])
    agrees = unless_interim(agrees, results, len(pairs), *column(pairs[0], "series"))
    return Finding(mean, half, agrees, where, len(pairs))


def speed_ratio(claim: dict, results: dict) -> Finding:
    """A ratio of speeds decides only on the device that the claim is about."""
    finding = ratio(claim, results, "tokens_per_second")
    if finding.agrees is not None and claim["device"].lower() not in finding.where.lower():
        finding.agrees, finding.seeds = UNDECIDED, None
        finding.where += f"; the claim is about {claim['device'].upper()}"
    return finding


def overfits(claim: dict, results: dict) -> Finding:
    runs = list(runs_of(results, claim["series"]).values())
    if not runs:
        return Finding()
    mean, half = mean_interval([run["last_val_loss"] - run["best_val_loss"] for run in runs])
    agrees = unless_interim(mean > 0.05, results, len(runs), claim["series"])
    return Finding(mean, half, agrees, place(runs, claim["series"], seeds=len(runs)), len(runs))


# -----------------------------------------------------------------------------
# Other machines: bench_dba.py's blocks

def of_block(benchmarks: dict, block: str) -> list:
    return [document for document in benchmarks.get("devices", []) if document["block"] == block]


def step_pairs(claim: dict, results: dict) -> list:
    """[(machine, row of the claim's case, row of what it is against)]: training steps of one process at the same
    micro-batch, the compiled ones first."""
    pairs = []
    for document in of_block(results["benchmarks"], "train"):
        for a in document["rows"]:
            for b in document["rows"]:
                alike = all(a[key] == b[key] for key in ("micro", "block", "compiled"))
                measured = None not in (a["tok_s"], b["tok_s"])
                if alike and measured and (a["case"], b["case"]) == (claim["case"], claim["against"]):
                    pairs.append((document["env"]["device"], a, b))
    return sorted(pairs, key=lambda pair: not pair[1]["compiled"])


def step_place(pairs: list, ratios: list) -> str:
    """On what card, how, over how many steps."""
    parts = []
    for (machine, a, _), value in zip(pairs, ratios):
        compiled = "compiled" if a["compiled"] else "eager"
        steps = f", {a['steps']} steps" if "steps" in a else ", steps not recorded"
        how = f"{a['micro']} x {a['block']} tokens, {a['dtype']}, {compiled}{steps}"
        parts.append(f"{value:.3f} on one {machine} ({how})")
    return "; ".join(parts)


def step_ratio(claim: dict, results: dict) -> Finding:
    """A ratio of training steps of the same shapes on one machine. It decides on the machine that the claim is about,
    if it names one, and what depends on something `unstated` refutes nothing."""
    pairs = step_pairs(claim, results)
    if not pairs:
        return Finding()
    if "device" in claim:                                  # the machine that the claim is about decides
        pairs = sorted(pairs, key=lambda pair: claim["device"].lower() not in pair[0].lower())
    ratios = [a[claim["field"]] / b[claim["field"]] for _, a, b in pairs]
    agrees, where = within(ratios[0], claim["reported"], claim["tolerance"]), step_place(pairs, ratios)
    if "device" in claim and not any(claim["device"].lower() in machine.lower() for machine, _, _ in pairs):
        agrees = UNDECIDED
        where += f"; the claim is about an {claim['device']}, on which nothing was measured"
    if not agrees and "unstated" in claim:
        agrees = UNDECIDED
        where += f"; the report doesn't state the {claim['unstated']}"
    return Finding(ratios[0], None, agrees, where)


def step_bound(claim: dict, results: dict) -> Finding:
    """Whether a ratio of training steps of the same shapes is beyond a bound, above or below, on every machine that was
    measured; of times by the extremes of the steps, so that none of them is chance."""
    pairs, spans = step_pairs(claim, results), []
    if not pairs:
        return Finding()
    for _, a, b in pairs:
        if claim["field"] == "tok_s":
            spans.append((a["slowest"] / b["fastest"], a["fastest"] / b["slowest"]))
        else:
            spans.append((a[claim["field"]] / b[claim["field"]],) * 2)
    beyond = [low >= claim["bound"] if claim["side"] == "above" else high <= claim["bound"] for low, high in spans]
    short = [high < claim["bound"] if claim["side"] == "above" else low > claim["bound"] for low, high in spans]
    agrees = True if all(beyond) else False if all(short) else UNDECIDED
    ratios = [a[claim["field"]] / b[claim["field"]] for _, a, b in pairs]
    where = step_place(pairs, ratios)
    if claim["field"] == "tok_s":
        where += f"; by the extremes of their steps {'; '.join(f'{low:.3f} to {high:.3f}' for low, high in spans)}"
    return Finding(ratios[0], None, agrees, where)


def attention_ratio(claim: dict, results: dict) -> Finding:
    """How many times faster narrow attention is, forward and backward, by the back-end with which it gains most."""
    gains = {}
    for document in of_block(results["benchmarks"], "sdpa"):
        ms = {(row["case"], row["backend"]): row["ms"] for row in document["rows"] if row["ms"] is not None}
        for case, backend in ms:
            if case == claim["case"] and (claim["against"], backend) in ms:
                gains[backend, document["env"]["device"]] = ms[claim["against"], backend] / ms[case, backend]
    if not gains:
        return Finding()
    best = max(gains.values())
    where = "; ".join(f"{value:.2f} by {backend} on one {machine}" for (backend, machine), value in gains.items())
    return Finding(best, None, within(best, claim["reported"], claim["tolerance"]), where)


def decode_ratio(claim: dict, results: dict) -> Finding:
    """How many times faster a step's attention over a cache is than PyTorch's over standard attention's in fp16. It
    agrees where that is the ratio of the bytes, and refutes nothing: a faster kernel might be possible."""
    for document in of_block(results["benchmarks"], "decode"):
        rows = [row for row in document["rows"] if (row["batch"], row["tokens"]) == (claim["batch"], claim["tokens"])]
        for row in rows:
            if (row["case"], row["format"]) == (claim["case"], claim["format"]) and "times_faster_than_sdpa" in row:
                fewer = max(row["cache_mib"] for row in rows if row["case"] == "standard") / row["cache_mib"]
                gain = row["times_faster_than_sdpa"]
                where = (f"one {document['env']['device']}, our kernel, batch {row['batch']}, {row['tokens']:,} "
                         f"tokens: {fewer:.2f} times fewer bytes")
                return Finding(gain, None, within(gain, fewer, 0.1) or UNDECIDED, where)
    return Finding()


# -----------------------------------------------------------------------------
# Measurements of checkpoints

def cache_deltas(claim: dict, results: dict, *policies: str) -> tuple[list, str, str]:
    """([what formats add to the loss, a tuple of them for each seed], the series, the place), of the first of the
    claim's series whose checkpoints were measured through them."""
    for name in claim["series"]:
        deltas, runs = [], []
        for run in runs_of(results, name).values():
            if {"fp16", *policies} <= run["caches"].keys():
                runs.append(run)
                plain = run["caches"]["fp16"]["loss"]
                deltas.append(tuple(run["caches"][policy]["loss"] - plain for policy in policies))
        if deltas:
            return deltas, name, place(runs, name, seeds=len(runs))
    return [], "", ""


def cache_contrast(claim: dict, results: dict) -> Finding:
    """A sum of what formats of the cache add to the loss, each with the claim's weight, is above 0, paired by seed."""
    weights = claim["weights"]
    deltas, series, where = cache_deltas(claim, results, *weights)
    if not deltas:
        return Finding()
    differences = []
    for of_seed in deltas:
        differences.append(sum(weight * delta for weight, delta in zip(weights.values(), of_seed, strict=True)))
    mean, half = mean_interval(differences)
    agrees = unless_interim(mean > 0, results, len(deltas), series)
    return Finding(mean, half, agrees, where, len(deltas), two_sided(p_below(differences, 0.0)))


def latency_row(results: dict, run: str, prompt: int, cache: str) -> dict | None:
    files = results["evals"].get(run, {})
    for row in files["latency"]["result"] if "latency" in files else []:
        if (row["prompt"], row["cache"]) == (prompt, cache):
            return row
    return None


def latency_ratio(claim: dict, results: dict) -> Finding:
    """How many times faster one checkpoint, or format, is than another; it agrees where that is the ratio of bytes of
    their caches. One pair of checkpoints on a shared machine."""
    rows, sizes = [], []
    by_name = {run["run"]: run for run in results["runs"]}
    for run, cache in (claim["fast"], claim["slow"]):
        row = latency_row(results, run, claim["prompt"], cache)
        if row is None or run not in by_name or cache not in by_name[run]["caches"]:
            return Finding()
        rows.append(row)
        sizes.append(by_name[run]["caches"][cache]["bytes_per_token"])
    gain, fewer = rows[1][claim["field"]] / rows[0][claim["field"]], sizes[1] / sizes[0]
    where = (f"`{claim['fast'][0]}` {claim['fast'][1]} against `{claim['slow'][0]}` {claim['slow'][1]}, "
             f"{claim['prompt']:,} tokens, {fewer:.2f} times fewer bytes; "
             f"{results['evals'][claim['fast'][0]]['latency']['from']['hardware']}, {rows[0]['kernel']}")
    return Finding(gain, None, within(gain, fewer, 0.1), where, seeds=1)


def cache_quality(claim: dict, results: dict) -> Finding:
    """What a format adds to the loss is at most the tolerance: of runs with several seeds, else of one checkpoint."""
    deltas, series, where = cache_deltas(claim, results, claim["policy"])
    if len(deltas) > 1:
        added = [delta for delta, in deltas]
        mean, half = mean_interval(added)
        agrees = unless_interim(mean <= claim["tolerance"], results, len(added), series)
        return Finding(mean, half, agrees, where, len(added), two_sided(p_below(added, claim["tolerance"])))
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


# -----------------------------------------------------------------------------
# Learned masks

def mask_result(claim: dict, results: dict) -> dict:
    files = results["evals"].get(claim["run"], {})
    return files["mask"]["result"] if "mask" in files else dict(summary=[], gradients=[], costs=[])


def all_sides(spans: list, side: str, bound: float) -> bool | str:
    """Whether every interval (low, high) is on a side of a bound, True, one is wholly on the other, False, or
    neither."""
    if side == "below":
        beyond, short = [high <= bound for _, high in spans], [low > bound for low, _ in spans]
    else:
        beyond, short = [low >= bound for low, _ in spans], [high < bound for _, high in spans]
    return True if all(beyond) else False if any(short) else UNDECIDED


def mask_bound(claim: dict, results: dict) -> Finding:
    """Whether what a choice of blocks does is on a side of a bound on every text and at every length that several
    windows were measured of; the value is the worst of their means. beside: choices shown for comparison."""
    rows, others, field = [], {}, claim["field"]
    for row in mask_result(claim, results)["summary"]:
        if row.get(f"{field}_half") is not None:
            if row["choice"] == claim["choice"]:
                rows.append(row)
            elif row["choice"] in claim["beside"]:
                others.setdefault(row["choice"], []).append(row[field])
    if not rows:
        return Finding()
    spans = [(row[field] - row[f"{field}_half"], row[field] + row[f"{field}_half"]) for row in rows]
    pick = max if claim["side"] == "below" else min
    worst, parts = pick(rows, key=lambda row: row[field]), []
    for row in rows:
        parts.append(f"{row['windows']} x {row['length']:,} of {row['text']} {row[field]:.3g} at "
                     f"{100 * row['kept']:.0f} % read")
    where = f"`{claim['run']}`, one model and one fit, {claim['choice']}, windows x tokens: {'; '.join(parts)}"
    for choice, values in others.items():
        span = f"{min(values):.3g}" if len(values) == 1 else f"{min(values):.3g} to {max(values):.3g}"
        where += f"; {choice} {span}"
    return Finding(worst[field], worst[f"{field}_half"], all_sides(spans, claim["side"], claim["bound"]), where,
                   min(row["windows"] for row in rows))


def mask_gradient(claim: dict, results: dict) -> Finding:
    """Whether the least cosine of a layer's gradients is above a bound, by its mean over windows; the mean."""
    rows = [row for row in mask_result(claim, results)["gradients"] if row["choice"] == claim["choice"]]
    if not rows:
        return Finding()
    mean, half = mean_interval([row["least"] for row in rows])
    medians = [row["median"] for row in rows]
    where = (f"`{claim['run']}`, one model and one fit, {claim['choice']}, {len(rows)} windows of "
             f"{rows[0]['length']:,} tokens; the median over layers from {min(medians):.3f} on")
    spans = [(mean - (half or 0), mean + (half or 0))]
    return Finding(mean, half, all_sides(spans, "above", claim["bound"]), where, len(rows))


def mask_memory(claim: dict, results: dict) -> Finding:
    """Whether a forward pass takes at most the bound of the memory beside the weights, at every length from 1,024 on,
    against each attention, as the report doesn't name one. More refutes nothing: a leaner program might be possible."""
    extra = {}
    for row in mask_result(claim, results)["costs"]:
        if row["length"] >= 1024 and row["forward_bytes"]:
            extra[row["length"], row["attention"]] = row["forward_bytes"]
    ratios = {}
    for (length, attention), held in extra.items():
        if attention in ("eager", "sdpa") and (length, claim["choice"]) in extra:
            ratios[length, attention] = extra[length, claim["choice"]] / held
    if not ratios:
        return Finding()
    parts = [f"{value:.2f} of {attention}'s at {length:,} tokens" for (length, attention), value in ratios.items()]
    agrees = True if max(ratios.values()) <= claim["bound"] else UNDECIDED
    return Finding(max(ratios.values()), None, agrees, f"`{claim['run']}`, peak beside the weights: {'; '.join(parts)}")


# -----------------------------------------------------------------------------
# Conversions

def conversion(claim: dict, results: dict) -> Finding:
    """What conversions of a pretrained model cost where nobody said what they may: KL divergence from the teacher, the
    worst of the texts; of the first of the choices, the others beside it."""
    rows, parts, found = results["surgery"].get(claim["run"], {}), [], []
    for choice in claim["choices"]:
        if choice in rows:
            means = {text: mean_interval(kls) for text, kls in rows[choice]["texts"].items()}
            found.append((max(means.values()), min(map(len, rows[choice]["texts"].values()))))
            parts.append(f"{choice} {', '.join(f'{mean:.3g} on {text}' for text, (mean, _) in means.items())}")
    if not found:
        return Finding()
    (worst, half), windows = found[0]
    where = f"`{claim['run']}`, one model and one fit, KL: {'; '.join(parts)}; the paper names no measure of success"
    return Finding(worst, half, UNDECIDED, where, windows)


def conversion_contrast(claim: dict, results: dict) -> Finding:
    """Whether a row is nearer to the teacher than another, by KL divergence paired by window, on every text;
    the value is that of the text where it is least so."""
    rows = results["surgery"].get(claim["run"], {})
    if not {claim["a"], claim["b"]} <= rows.keys():
        return Finding()
    a, b = rows[claim["a"]], rows[claim["b"]]
    differences, parts = [], []
    for text in a["texts"].keys() & b["texts"].keys():
        paired = [x - y for x, y in zip(a["texts"][text], b["texts"][text])]
        if len(paired) > 1:
            mean, half = mean_interval(paired)
            differences.append((mean, half, len(paired)))
            parts.append(f"{mean:+.3g} ± {half:.2g} on {text} ({len(paired)} windows)")
    if not differences:
        return Finding()
    where = (f"`{claim['run']}`, one model and one fit, {claim['a']} less {claim['b']}, {100 * a['bytes']:.1f} and "
             f"{100 * b['bytes']:.1f} % of fp16's bytes: {'; '.join(sorted(parts, reverse=True))}")
    worst, half, _ = max(differences)
    spans = [(mean - half, mean + half) for mean, half, _ in differences]
    return Finding(worst, half, all_sides(spans, "below", 0), where, min(n for _, _, n in differences))


def not_run(claim: dict, results: dict) -> Finding:
    return Finding()


# -----------------------------------------------------------------------------
# Arithmetic

def resolve(settings: dict) -> tuple:
    """(Config, cache policy) of a claim's settings, over the 7B scale unless they name a preset."""
    settings = {**(dict(data="-") if "exp" in settings else SEVEN_B), **settings}
    policy = settings.pop("cache")
    return make_config(**settings), policy


def layer_bytes(settings: dict) -> float:
    """Bytes of KV cache per token and layer, in the policy's own format, or at an ideal of `bits` a value."""
    settings = dict(settings)
    bits = settings.pop("bits", None)
    cfg, policy = resolve(settings)
    if bits:
        return sum(cfg.attention.streams.values()) * bits / 8
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
    bits = [f"{claim[side]['bits']} bits" for side in ("config", "against") if "bits" in claim[side]]
    where = f"formula, at an ideal of {' and '.join(bits)} a value" if bits else BY_FORMULA
    return Finding(value, None, within(value, claim["reported"], 0.02), where)


def cache_percent_less(claim: dict, results: dict) -> Finding:
    """What depends on something `unstated` refutes nothing."""
    value = 100 * (1 - layer_bytes(claim["config"]) / layer_bytes(claim["against"]))
    agrees, where = within(value, claim["reported"], 0.01), BY_FORMULA
    if not agrees and "unstated" in claim:
        agrees, where = UNDECIDED, f"{where}; the report doesn't state the {claim['unstated']}"
    return Finding(value, None, agrees, where)


def bytes_per_value(claim: dict, results: dict) -> Finding:
    value = stream_bytes(claim["format"], 32) / 32
    return Finding(value, None, value == claim["reported"], BY_FORMULA)


def other_mixed_caches(claim: dict, results: dict) -> Finding:
    """Modes, but for the claimed one, whose cache holds tensors in different formats side by side."""
    modes = {}
    for mode, widths in claim["modes"].items():
        cfg = make_config(data="-", attn_mode=mode, **widths)
        streams = list(cfg.attention.streams)
        formats = {**dict.fromkeys(streams, "q8_0"), streams[0]: "q4_0"}
        if len(streams) > 1 and bytes_per_token(cfg, formats):
            modes[mode] = streams
    where = "; ".join(f"{mode}: {', '.join(streams)}" for mode, streams in modes.items())
    return Finding(len(modes), None, not modes, f"by the caches that this code decodes from: {where}")


def absorbed_work(claim: dict, results: dict) -> Finding:
    """Products that a query of all heads needs per cached token in absorbed form, q·(W c) = (Wᵀq)·c, as times those of
    projecting the latent up to keys and values first. Below 1 nothing needs to be projected up."""
    cfg = make_config(data="-", **claim["config"])
    shape, H = cfg.attention, cfg.n_head
    keys = sum(path.width for path in shape.paths)
    unrotated = next(path.width for path in shape.paths if path.name == "sem")
    up = shape.latent * H * (unrotated + shape.v_width) + H * (keys + shape.v_width)
    absorbed = H * (2 * shape.latent + keys - unrotated)
    return Finding(absorbed / up, None, absorbed >= up, f"formula: {absorbed:,} products against {up:,}")


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
    return Finding(value, None, within(value, claim["reported"], claim.get("rounding", 0.002)), "the report's own loss")


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


def quotients(claim: dict, results: dict) -> Finding:
    """Whether rows [a, b, q] of a table have q = a / b, as it is rounded there; the value is the largest deviation."""
    worst = max(100 * abs(a / b / q - 1) for a, b, q in claim["rows"])
    return Finding(worst, None, worst <= 2, f"the report's own numbers, {len(claim['rows'])} rows")


def contradiction(claim: dict, results: dict) -> Finding:
    """What the report says here, and elsewhere."""
    here, there = claim["numbers"]
    return Finding(there, None, here == there, "the report's own numbers")


def confounded(claim: dict, results: dict) -> Finding:
    """How many settings beside the one it is put down to differ between what a report compares."""
    differing = [f"{name} {a} against {b}" for name, (a, b) in claim["settings"].items() if a != b]
    return Finding(len(differing), None, False if differing else UNDECIDED, f"by the report: {', '.join(differing)}")


def tokens_seen(claim: dict, results: dict) -> Finding:
    """Tokens that a run saw as a share of those of the run it is compared with, by batch, context and steps."""
    here, there = (math.prod(claim[side]) for side in ("run", "against"))
    agrees = UNDECIDED if within(here / there, 1, 0.02) else False
    return Finding(100 * here / there, None, agrees, f"by its own commands: {here:,} tokens against {there:,}")


def work_ratio(claim: dict, results: dict) -> Finding:
    """A step's work after a change of settings, as times the work before: parameters in products, by formula."""
    after, before = [count_params(make_config(data="-", **claim[side]), claim["vocab_size"])["total"]
                     for side in ("config", "against")]
    agrees = within(after / before, claim["reported"], 0.02)
    return Finding(after / before, None, agrees, "formula: parameters that a step multiplies by")


def disjoint_mse(claim: dict, results: dict) -> Finding:
    """Mean square of the difference of two attentions that share no token, each uniform over its half of n."""
    value = 4 / claim["tokens"]**2
    return Finding(value, None, value > claim["bound"], f"formula, {claim['tokens']:,} tokens")


RULES = {rule.__name__: rule for rule in (
    loss, below, not_worse, early_below, ahead_throughout, data_efficiency, steadier, overfits, speed_ratio, step_ratio,
    step_bound, attention_ratio, decode_ratio, latency_ratio, cache_quality, cache_contrast,
    effective_rank, probe_difference, mask_bound, mask_gradient, mask_memory, conversion, conversion_contrast,
    not_run, cache_percent_less,
    bytes_per_value, other_mixed_caches, absorbed_work, quotients, contradiction, confounded, tokens_seen, work_ratio,
    disjoint_mse, cache_gib, cache_ratio, cache_ratio_below_one, cache_layer_bytes, parameters, perplexity,
    perplexity_gap, share, percent_more, mean_difference, best_case)}
