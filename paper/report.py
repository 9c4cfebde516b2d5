"""From results to text: report.md, the LaTeX tables, and the README's one block. Values in, text out."""

import collections
from collections.abc import Iterable

from paper.claims import (
    CONTRADICTS,
    ERROR,
    FAILS,
    HOLDS,
    INTERIM,
    NOT_RUN,
    ONE,
    REFUTED,
    REPRODUCED,
    RIGHT,
    UNDECIDED,
    UNSUPPORTED,
    VERDICTS,
)
from paper.collect import CHANCE, caches, column, hardware_name, of_command, panels
from paper.rules import of_block, pair_runs
from paper.shapes import CHECKS, RANKS
from paper.stats import mean_interval, p_text
from paper.style import MARKERS, latex_table, markdown, number, pm
from train_dba import UserError

PATHS = {"sem": "semantic", "geo": "geometric", "total": "all"}
BEGIN, END = "<!-- results: written by make report -->", "<!-- end of results -->"
SECTIONS = {                                               # of the ledger: {title: rules}
    "Losses": ("loss", "below", "not_worse", "early_below", "ahead_throughout", "data_efficiency", "steadier",
               "overfits"),
    "Speed and memory of training": ("speed_ratio", "step_ratio", "step_bound", "attention_ratio", "percent_more"),
    "Speed of decoding": ("latency_ratio", "decode_ratio"),
    "Size of the KV cache": ("cache_gib", "cache_ratio", "cache_ratio_below_one", "cache_layer_bytes",
                             "cache_percent_less", "bytes_per_value", "quotients", "other_mixed_caches",
                             "absorbed_work"),
    "Parameters, perplexities, percentages": ("parameters", "perplexity", "perplexity_gap", "share",
                                              "mean_difference", "disjoint_mse"),
    "What the papers compare and contradict": ("confounded", "tokens_seen", "work_ratio", "contradiction"),
    "Probes and benchmarks": ("best_case", "probe_difference"),
    "Quantised caches and ranks": ("cache_quality", "cache_contrast", "effective_rank"),
    "Conversions of pretrained models": ("conversion", "conversion_contrast"),
    "Learned masks": ("mask_bound", "mask_gradient", "mask_memory"),
    "Announced without results": ("not_run",),
}
FAMILIES = {("standard", False): "standard", ("bottleneck", False): "bottleneck", ("gqa", False): "GQA",
            ("mla", False): "MLA", ("decoupled", False): "DBA", ("decoupled", True): "DBA with grouped keys"}
REPLACED = "compiled multiply-and-sum"                     # the CPU's kernel until November 25, 2026
LEVEL = 0.01                                               # nats, the margin of the pre-registered positive control
OF_SEVERAL = {"holds": "hold", "does not hold": "do not hold", "arithmetic error": "arithmetic errors",
              "contradicts itself": "contradict themselves"}
KINDS = {"better": "below 0", "no_worse": "below {margin}", "equivalent": "within ± {margin}"}


def plural(count: int, name: str) -> str:
    return f"{count} {name}" if count == 1 else f"{count} {name}s"


def signed(delta: dict) -> str:
    """A mean difference with its half-width, where it has one."""
    return pm(delta, 4, "+")


# -----------------------------------------------------------------------------
# The headline: the best series per mode at equal parameters

def family(series: dict) -> tuple | None:
    """What a series is a member of: (mode, whether its keys are grouped). Controls, which lack what DBA is about, are
    of none."""
    if "one temperature" in series["label"] or "no RoPE" in series["label"]:
        return None
    return series["mode"], "groups" in series["label"]


def headline(series: list) -> list:
    """The best series per mode of the panel that compares most of them at the parameters of standard attention, over
    most seeds; standard first. Empty where nothing is comparable."""
    best = []
    for _, members in panels(series):
        chosen = {}
        for member in members:
            if family(member) and (member["mode"] == "standard" or member["matched"]):
                rival = chosen.get(family(member))
                if rival is None or member["best_val_loss"]["mean"] < rival["best_val_loss"]["mean"]:
                    chosen[family(member)] = member
        rows = sorted(chosen.values(), key=lambda member: list(FAMILIES).index(family(member)))
        if len(rows) > 1 and weight(rows) > weight(best):
            best = rows
    return best


def weight(rows: list) -> tuple:
    """How much a comparison tells: seeds that all have, then the number of models."""
    return min((len(row["seeds"]) for row in rows), default=0), len(rows)


def difference(results: dict, a: dict, b: dict) -> tuple:
    """(mean, half-width, seeds) of a - b of best losses, paired by seed."""
    pairs = pair_runs(results, a["series"], b["series"], "best_val_loss")
    if not pairs:
        return None, None, 0
    differences = []
    for left, right in pairs:
        differences.append(left["best_val_loss"] - right["best_val_loss"])
    return *mean_interval(differences), len(pairs)


def headline_table(results: dict) -> list[str]:
    """At most 8 rows: model, parameters, bytes of cache, loss with its interval, difference from standard, and what
    a 4-bit cache adds."""
    rows, chosen = [], headline(results["series"])
    for member in chosen:
        mean, half, _ = difference(results, member, chosen[0])
        q4 = member["caches"].get("q4_0")
        rows.append((member["label"].removesuffix(" matched"), f"{member['params'] / 1e6:.2f}M",
                     f"{member['kv_bytes_fp16']:,}", pm(member["best_val_loss"]), len(member["seeds"]),
                     "-" if member is chosen[0] or mean is None else signed(dict(mean=mean, half=half)),
                     f"{q4['bytes_per_token']:,}" if q4 else "-", signed(q4["delta"]) if q4 else "-"))
    if not rows:
        return []
    head = ("model", "parameters", "cache, B/token", "validation loss", "seeds", "minus standard", "in q4_0, B/token",
            "loss that q4_0 adds")
    first = chosen[0]
    note = (f"Best of each mode at equal parameters: {first['data']}, {first['steps']:,} steps of {first['batch']} x "
            f"{first['context']} tokens; nats per token, ± 95 % t-intervals over seeds, differences paired by seed, "
            "not corrected for choosing the best. Names say widths over all heads: decoupled semantic/geometric, mla "
            "latent + rotated key and v of values; gqa its heads.")
    return [*markdown(head, rows[:8]), "", note]


def positive_control(results: dict) -> str | None:
    """What has to stand beside every ranking: how far MLA, which the literature has level with standard attention, is
    from it, wherever both have equal parameters here. None where they were not compared."""
    parts = []
    for title, members in panels(results["series"]):
        for member in members:
            if member["mode"] == "mla" and member["matched"]:
                standard = next(other for other in members if other["mode"] == "standard")
                mean, half, seeds = difference(results, member, standard)
                if mean is not None:
                    passes = "passes" if half is not None and mean + half < LEVEL else "does not pass"
                    name = member["label"].removesuffix(" matched")
                    parts.append(f"{signed(dict(mean=mean, half=half))} nats with {name} in {title} "
                                 f"({member['params'] / 1e6:.2f}M parameters, {plural(seeds, 'seed')}), which {passes}")
    if not parts:
        return None
    return ("Positive control: MLA should end level with standard attention, as it does in the literature (an interval "
            f"below {LEVEL}). It ends at {'; '.join(parts)}. Where it fails, a ranking tells of this scale only.")


def divisions(results: dict) -> list[tuple[dict, list[float]]]:
    """[(series, its best losses less those of the headline's grouped DBA, by seed)] of what differs from that in
    nothing but how the channels of a head's score are divided, those without rotation first to last."""
    base = headline_models(results).get(("decoupled", True))
    rows = []
    for series in results["series"] if base else ():
        channels, control = series["score_channels"], "one temperature" in series["label"]
        halved = series["mode"] == "decoupled" and 0 in channels                # two paths, neither rotated
        alike = sum(channels) == sum(base["score_channels"]) and series["kv_bytes_fp16"] == base["kv_bytes_fp16"]
        pairs = pair_runs(results, series["series"], base["series"], "best_val_loss")
        if alike and len(pairs) > 1 and not (control or halved):
            rows.append((series, [a["best_val_loss"] - b["best_val_loss"] for a, b in pairs]))
    return sorted(rows, key=lambda row: row[0]["score_channels"])


# -----------------------------------------------------------------------------
# What we found, a sentence each

def headline_models(results: dict) -> dict:
    """{family: series} of the headline."""
    return {family(member): member for member in headline(results["series"])}


def beside_ranking(results: dict) -> list[str]:
    sentence = positive_control(results)
    return [sentence, ""] if sentence else []


def find_losses(results: dict) -> str | None:
    chosen = headline_models(results)
    dba, gqa = chosen.get(("decoupled", True)), chosen.get(("gqa", False))
    standard = chosen.get(("standard", False))
    if not (dba and gqa and standard):
        return None
    mean, half, seeds = difference(results, dba, gqa)
    decided = "no interval" if half is None else f"a difference of {signed(dict(mean=mean, half=half))}"
    if half is not None and mean - half < 0 < mean + half:
        decided += ", which the seeds do not decide"
    return (f"At {dba['params'] / 1e6:.2f}M parameters and {dba['kv_bytes_fp16']:,} bytes of cache per token, DBA with "
            f"grouped keys ends at {pm(dba['best_val_loss'])} nats and {gqa['label'].removesuffix(' matched')} at "
            f"{pm(gqa['best_val_loss'])} ({decided}; {plural(seeds, 'seed')}, best of their modes, not "
            f"corrected for that nor for other comparisons); standard attention, whose cache is "
            f"{standard['kv_bytes_fp16'] / dba['kv_bytes_fp16']:.1f} times as large, at "
            f"{pm(standard['best_val_loss'])}.")


def division_lines(results: dict) -> list[str]:
    rows = divisions(results)[2:]
    return ["![Loss over the division of a head's channels](fig_split.png)", ""] if rows else []


def beside(results: dict, a: dict, b: dict, cache: str) -> dict | None:
    """Mean and half-width of a - b of losses through caches of a format, paired by seed; None for less than 2 pairs."""
    differences = []
    for left, right in pair_runs(results, a["series"], b["series"], "caches"):
        if cache in left["caches"] and cache in right["caches"]:
            differences.append(left["caches"][cache]["loss"] - right["caches"][cache]["loss"])
    if len(differences) < 2:
        return None
    mean, half = mean_interval(differences)
    return dict(mean=mean, half=half)


def find_moonshot(results: dict) -> str | None:
    """Whether a DBA is no worse than the best GQA and the best MLA of the headline at their bytes and parameters: of
    all that were tried the nearest, and that with one latent."""
    chosen = headline_models(results)
    rivals = [chosen.get(("gqa", False)), chosen.get(("mla", False))]
    if None in rivals:
        return None
    tried = []
    for series in results["series"]:
        gaps = [beside(results, series, rival, "fp16") for rival in rivals]
        alike = series["mode"] == "decoupled" and series["kv_bytes_fp16"] == rivals[0]["kv_bytes_fp16"]
        if alike and None not in gaps and "no RoPE" not in series["label"]:
            tried.append((max(gap["mean"] + gap["half"] for gap in gaps), series))
    if not tried:
        return None
    tried.sort(key=lambda item: item[0])
    shown = sum(upper < LEVEL for upper, _ in tried)
    parts = []
    for place, (_, series) in enumerate(tried):
        if place == 0 or "latent" in series["label"]:
            said = []
            for cache, name in (("fp16", "fp16"), ("q4_0_rotated", "rotated q4_0")):
                gaps = [beside(results, series, rival, cache) for rival in rivals]
                if None not in gaps:
                    said.append(f"{' and '.join(map(signed, gaps))} in {name}")
            parts.append(f"{series['label'].removesuffix(' matched')} {', '.join(said)}")
    names = " and ".join(rival["label"].removesuffix(" matched") for rival in rivals)
    return (f"Is a DBA no worse than both {names}, by at most {LEVEL} nats, at their bytes and parameters? Of "
            f"{plural(len(tried), 'configuration')} {shown or 'none'} is shown to be, by 95 % intervals over seeds. "
            f"Less the one and the other: {'; '.join(parts)}.")


def find_contrasts(results: dict) -> str | None:
    rows = results["contrasts"]
    if not rows:
        return None
    counts = verdict_counts(rows, (HOLDS, FAILS, UNDECIDED, INTERIM, ONE, NOT_RUN))
    lines = [f"Of {plural(len(rows), 'pre-registered contrast')}, corrected by Holm: {counts}."]
    for row in rows:
        if row["mean"] is not None:
            seeds = f"{row['pairs']} of {row['registered']} seeds"
            lines.append(f"  - {row['name']}: **{row['verdict']}**, {signed(row)} nats, {seeds}")
    return "\n".join(lines)


def find_arithmetic(results: dict) -> str | None:
    claims = {row["id"]: row for row in results["claims"]}
    if not claims:
        return None
    errors = column(claims.values(), "verdict").count(ERROR)
    return (f"The December paper's cache that is {claims['compression-168']['reported']} times smaller is "
            f"{number(claims['compression-168']['ours'])} times smaller at the width that its text names and "
            f"{number(claims['compression-96-q4']['ours'])} times at the width that its number is from, and its "
            f"perplexity gap of {claims['fineweb-gap']['reported']} % is {number(claims['fineweb-gap']['ours'])} %: "
            f"{errors} of the papers' numbers don't follow from their own premises.")


def find_caches(results: dict) -> str | None:
    chosen = headline_models(results)
    dba, standard = chosen.get(("decoupled", True)), chosen.get(("standard", False))
    if not (dba and standard and "q4_0" in dba["caches"] and "q4_0" in standard["caches"]):
        return None
    ours, theirs = dba["caches"]["q4_0"], standard["caches"]["q4_0"]
    return (f"A cache in 4 bits (q4_0) costs DBA with grouped keys {signed(ours['delta'])} nats and standard attention "
            f"{signed(theirs['delta'])}, at {ours['bytes_per_token']:,} and {theirs['bytes_per_token']:,} bytes per "
            "token.")


def find_steps(results: dict) -> str | None:
    claims = {row["id"]: row for row in results["claims"]}
    machines = device_names(results["benchmarks"])
    if not machines or not claims or claims["throughput-32-here"]["ours"] is None:
        return None
    speed, memory = claims["throughput-32-here"]["ours"], claims["memory-27-here"]["ours"]
    return (f"At the shapes of the papers' 1B models DBA 8+32 trains {speed:.2f} times as fast as standard attention, "
            f"in {memory:.2f} of its memory, on {machines}; the January paper reports "
            f"{claims['a100-throughput']['reported']} and {claims['a100-memory']['reported']} for an A100, which was "
            "not measured here.")


def find_surgery(results: dict) -> str | None:
    lines = ["Pretrained models, converted to DBA or with quantised caches: which is nearer to the model as it was, in "
             "nats of KL divergence, on the worse of the texts?"]
    for row in results["claims"]:
        if row["rule"] == "conversion_contrast" and row["ours"] is not None:
            distance = signed(dict(mean=row["ours"], half=row["interval"]))
            lines.append(f"  - {row['statement']}: **{row['verdict']}**, {distance}")
    return "\n".join(lines) if len(lines) > 1 else None


def findings(results: dict) -> list[str]:
    sentences = [find_losses(results), positive_control(results), find_moonshot(results), find_contrasts(results),
                 find_arithmetic(results), find_caches(results), find_steps(results),
                 find_surgery(results)]
    return list(filter(None, sentences))


def verdict_counts(rows: list, verdicts: tuple) -> str:
    """How many rows have each verdict, those that none has left out."""
    counts = collections.Counter(row["verdict"] for row in rows)
    said = []
    for verdict in verdicts:
        if counts[verdict]:
            said.append(f"{counts[verdict]} {verdict if counts[verdict] == 1 else OF_SEVERAL.get(verdict, verdict)}")
    return ", ".join(said)


def of_source(rows: list, control: bool) -> list:
    """The ledger's controls, which nobody claimed, or the papers' claims."""
    return [row for row in rows if (row["source"] == "control") == control]


def ledger_counts(claims: list) -> str:
    """The ledger's counts, as a line."""
    papers, controls = of_source(claims, False), of_source(claims, True)
    return (f"{len(papers)} claims of the papers: {verdict_counts(papers, VERDICTS)}; "
            f"{len(controls)} controls: {verdict_counts(controls, VERDICTS)}.")


def readme_block(results: dict) -> str:
    """What the README shows of the results: a few sentences, one table, the ledger's counts."""
    lines = [*bullets(findings(results)), "", *headline_table(results), "",
             f"The ledger: {ledger_counts(results['claims'])} Every row, with the contrasts that were fixed before "
             "their runs: [assets/report.md](assets/report.md)."]
    return "\n".join(lines)


def bullets(sentences: list[str]) -> list[str]:
    return [f"- {sentence}" for sentence in sentences]


def replace_block(text: str, content: str) -> str:
    """text with what stands between the README's marks replaced. Raises UserError where it lacks them."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(END) < text.index(BEGIN):
        raise UserError(f"the page lacks the marks {BEGIN} and {END}; add them, once each, where the results belong")
    return f"{text[:text.index(BEGIN) + len(BEGIN)]}\n{content}\n{text[text.index(END):]}"


# -----------------------------------------------------------------------------
# Runs

def run_lines(results: dict) -> list[str]:
    """A line per series, sweeps of the learning rate left out."""
    rows, by_name = [], {run["run"]: run for run in results["runs"]}
    for title, members in panels(results["series"]):
        for member in members:
            runs = [by_name[name] for name in member["runs"]]
            commits = sorted(set(map(commit, runs)))
            rows.append((f"`{member['series']}`", member["label"], title, f"{member['params'] / 1e6:.2f}M",
                         f"{member['kv_bytes_fp16']:,}", f"{runs[0]['tokens'] / 1e6:.2f}M", len(member["seeds"]),
                         pm(member["last_val_loss"]), pm(member["best_val_loss"]), ", ".join(commits)))
    hardware = set()
    for run in results["runs"]:
        hardware.add(f"{run['hardware']}, {run['dtype']}" + (", compiled" if run["compiled"] else ""))
    head = ("runs", "model", "data, batch, steps", "parameters", "KV B/token fp16", "tokens", "seeds", "last val loss",
            "best", "commit")
    return [*markdown(head, rows), "", *beside_ranking(results),
            f"Hardware: {'; '.join(sorted(hardware))}. ±: 95 % t-interval over seeds; a "
            "line of one seed carries none. A commit with + had uncommitted changes.", ""]


def commit(run: dict) -> str:
    if run["commit"] is None:
        return "`unknown`"
    return f"`{run['commit'][:7]}" + ("+`" if run["dirty"] else "`")


def scale_table(series: list, small: bool) -> str:
    """LaTeX of the models below 100M parameters, or of the others; sweeps that only chose a rate left out."""
    rows = []
    for _, members in panels(series):
        for member in members:
            if (member["params"] < 1e8) == small:
                tokens = member["steps"] * member["batch"] * member["context"]
                rows.append((member["label"], member["data"], f"{member['params'] / 1e6:.1f}M",
                             member["kv_bytes_fp16"], f"{tokens / 1e6:.1f}M", len(member["seeds"]),
                             pm(member["last_val_loss"]), pm(member["best_val_loss"])))
    head = ("model", "data", "parameters", "KV B/token", "tokens", "seeds", "last loss", "best loss")
    caption = "Validation loss in nats per token, mean and 95 % t-interval over seeds."
    return latex_table(head, rows, caption) if rows else "% no such run is finished\n"


# -----------------------------------------------------------------------------
# The ledger

def ours_of(row: dict) -> str:
    """Our value; with an interval both in the same number of digits, where those show it."""
    if row["interval"] is None:
        return number(row["ours"])
    if row["ours"] and abs(row["ours"]) < 1e-4:
        return f"{row['ours']:.1e} ± {row['interval']:.1e}"
    return pm(dict(mean=row["ours"], half=row["interval"]), 4, "+" if row["rule"] in ("below", "not_worse") else "")


def ledger_lines(claims: list) -> list[str]:
    """The ledger in sections of short rows, details below each."""
    lines = []
    for title, rules in SECTIONS.items():
        of_section = [row for row in claims if row["rule"] in rules]
        lines += ledger_section(title, of_source(of_section, False))
        lines += ledger_section(f"{title}, controls that nobody claimed", of_source(of_section, True))
    return lines


def ledger_section(title: str, rows: list) -> list[str]:
    if not rows:
        return []
    table = []
    for row in rows:
        table.append((row["statement"], number(row["reported"]), ours_of(row), f"**{row['verdict']}**"))
    return [f"### {title}", "", *markdown(("claim", "reported", "ours", "verdict"), table), "",
            "<details><summary>Units, sources, where it was measured</summary>", "", *map(detail, rows), "",
            "</details>", ""]


def detail(row: dict) -> str:
    parts = [row["unit"], "" if row["source"] == "control" else row["source"], row["where"], row["note"]]
    return f"- `{row['id']}`: " + "; ".join(filter(None, parts))


def contrast_lines(results: dict) -> list[str]:
    rows = []
    for row in results["contrasts"]:
        measured = "-" if row["mean"] is None else signed(row)
        p = "-" if row["p"] is None else f"{p_text(row['p'])} / {p_text(row['p_holm'])}"
        rows.append((row["name"], KINDS[row["kind"]].format(margin=row["margin"]), measured, p,
                     f"{row['pairs']} of {row['registered']}", f"**{row['verdict']}**"))
    if not rows:
        return []
    return [*beside_ranking(results),
            "Fixed in paper_manifest.json before any of their runs: a - b of best validation losses in nats, paired by "
            "seed, ± 95 % t-interval; p one-sided in the stated direction, then by Holm over the list. What does not "
            "hold has a p of the other side, by Holm too, below half of alpha.", "",
            *markdown(("contrast", "to show", "a - b", "p / Holm's", "seeds", "verdict"), rows), "",
            *trend_lines(results)]


def trend_lines(results: dict) -> list[str]:
    """The contrasts' differences in other sets, of other lengths."""
    rows = []
    for row in results["contrasts"]:
        for other in row.get("elsewhere", []):
            rows.append((row["name"], signed(row), f"{other['set']}: {signed(other)}", other["pairs"]))
    if not rows:
        return []
    return ["The same differences in other sets, which are not tested: what becomes of them in longer runs.", "",
            *markdown(("contrast", "a - b", "elsewhere", "seeds"), rows), ""]


def scale_lines(results: dict) -> list[str]:
    """What was measured at which scale, a line per panel."""
    lines = []
    for title, members in panels(results["series"]):
        sizes, seeds = sorted(column(members, "params")), sorted(map(len, column(members, "seeds")))
        span = f"{sizes[0] / 1e6:.2f}M"
        if len(sizes) > 1:
            span += f" to {sizes[-1] / 1e6:.2f}M"
        most = "" if seeds[0] == seeds[-1] else f" to {seeds[-1]}"
        lines.append(f"- {title}: {plural(len(members), 'model')} of {span} parameters, {plural(seeds[0], 'seed')}"
                     f"{most}")
    return lines


def first_page(results: dict) -> list[str]:
    """What holds, what doesn't, and what nobody knows yet."""
    lines, machines = [*bullets(findings(results)), ""], device_names(results["benchmarks"])
    for title, verdicts in (("What holds", (REPRODUCED, RIGHT, HOLDS)), ("What is wrong by arithmetic", (ERROR,)),
                            ("Where the papers contradict themselves", (CONTRADICTS,)),
                            ("What the papers' own counts cannot show", (UNSUPPORTED,)),
                            ("What does not hold, as measured or by formula", (REFUTED, FAILS)),
                            ("What is undecided", (UNDECIDED, INTERIM, ONE)), ("What was not run", (NOT_RUN,))):
        chosen = [row for row in results["claims"] if row["verdict"] in verdicts]
        lines += [f"### {title} ({len(chosen)})", "", *(map(summary, chosen) if chosen else ["Nothing."]), ""]
        if UNDECIDED in verdicts:
            lines += ["### What we measured, and at which scale", "", *scale_lines(results), "",
                      "No loss here is of a model of a billion parameters"
                      + (f"; only their steps and decoding were timed, on {machines}." if machines else "."), ""]
    return lines


def summary(row: dict) -> str:
    """A claim in a line: what it says, and what we have instead."""
    text = row["statement"]
    if row["verdict"] in (ERROR, REFUTED, FAILS, UNDECIDED, INTERIM, ONE, UNSUPPORTED):
        name = "p at best" if row["rule"] == "best_case" else "ours"
        unit = "" if row["rule"] == "best_case" else " " + row["unit"].split(",")[0]
        text += f": {name} {ours_of(row)}{unit}" + (" (n = 1)" if row["verdict"] == ONE else "")
    return f"- {text}" + (" (control)" if row["source"] == "control" else "")


# -----------------------------------------------------------------------------
# Speed, memory and quality of the cache

def origin(env: dict) -> str:
    """The machine of a measurement and the code that was measured."""
    return f"{hardware_name(env)}, commit {commit(env)}"


def replaced(kernels: Iterable[str]) -> str:
    """What has to be said of times of a kernel that isn't there any more."""
    if REPLACED not in kernels:
        return ""
    return (f" The {REPLACED} has since been replaced by kernels/decode.cpp, of which "
            "[docs/scale.md](../docs/scale.md#measured) has times.")


def speed_lines(benchmarks: dict) -> list[str]:
    """Ratios to baselines of the same process; a rate of a shared machine is none of a model."""
    lines = []
    if speed := benchmarks.get("train_speed"):
        rows = []
        for row in speed["rows"]:
            times_llama = f"{row['times_llama']:.2f}" if "times_llama" in row else ""
            rows.append((row["name"], f"{row['params'] / 1e6:.1f}M", f"{row['times_naive']:.2f}", times_llama,
                         f"{row['share_of_matmul_rate']:.2f}"))
        lines += ["Training steps of decoupled 32/64 (d_model 512, 6 layers, vocabulary 33,278, batch 8 x 256) as "
                  f"times the speed of baselines in the same process, medians of {speed['rounds']}; "
                  f"{origin(speed['env'])}.", "",
                  *markdown(("", "parameters", "x naive", "x Llama", "share of matrix-product rate"), rows), ""]
    if memory := benchmarks.get("loss_memory"):
        chunked, full = memory["chunked"] / 2**20, memory["full logits"] / 2**20
        lines += [f"A training step of that model takes {chunked:,.0f} MiB more than before the first step with the "
                  f"chunked cross-entropy, {full:,.0f} MiB with all logits in memory.", ""]
    if tokens := benchmarks.get("tokenize_speed"):
        lines += [f"`prepare_fineweb.py` tokenises, from .jsonl to a finished file, at {tokens['ratio']:.2f} times the "
                  f"speed of tiktoken itself in memory, on {tokens['cores']} cores.", ""]
    return lines


def device_names(benchmarks: dict) -> str:
    """The machines on which bench_dba.py timed the shapes of the papers' 1B models; "" without any."""
    machines = sorted({document["env"]["device"] for document in benchmarks.get("devices", [])})
    return f"one {', one '.join(machines)}" if machines else ""


def device_lines(benchmarks: dict) -> list[str]:
    """Training steps at the 1B shapes, as bench_dba.py timed them, a machine of one process's own."""
    rows = []
    for document in of_block(benchmarks, "train"):
        for row in document["rows"]:
            if row["tok_s"] is not None:
                rows.append((f"{document['env']['device']}, {commit(document['env'])}", row["case"],
                             f"{row['micro']} x {row['block']:,}",
                             "compiled" if row["compiled"] else "eager", f"{row['params'] / 1e6:,.0f}M",
                             f"{row['tok_s'] / 1000:.1f}k", f"{row['slowest'] / 1000:.1f}k to "
                             f"{row['fastest'] / 1000:.1f}k", f"{row['gib']:.1f}"))
    if not rows:
        return []
    return ["Training steps at the shapes of the papers' 1B models, one process a file: "
            "median tokens/s, the slowest and the fastest step, peak GiB.", "",
            *markdown(("machine, commit", "preset", "batch", "", "parameters", "tokens/s", "steps", "GiB"), rows), ""]


def quality_lines(quality: dict) -> list[str]:
    rows = []
    for row in quality["rows"]:
        if row["policy"] != "fp32":
            rows.append((f"`{row['run']}`", row["policy"] + (", rotated" if row["rotate"] else ""),
                         f"{row['bytes_per_token']:,}", f"{row['delta_nll']:+.4f} ± {row['standard_error']:.4f}",
                         f"{row['kl']:.5f}", f"{100 * row['top1']:.2f} %"))
    tokens = ", ".join(sorted(set(map("{:,}".format, column(quality["rows"], "tokens")))))
    before = ""
    if "sources" not in quality:                           # as files have them since keys with RoPE are rotated
        before = " Rotated are values and semantic keys; that --kv-rotate turns keys with RoPE, too, is younger."
    return [f"Against a float32 cache, {tokens} validation tokens, all read through quantised keys and values (no "
            "residual window); ΔNLL in nats per token ± standard error over windows, KL divergence of the next token's "
            f"distribution, share of tokens with the same likeliest next token; {origin(quality['env'])}.{before}", "",
            *markdown(("run", "cache", "B/token", "ΔNLL", "KL", "same top-1"), rows), ""]


def kernel_lines(speed: dict) -> list[str]:
    names, plain = list(speed["rows"][0]["ms"]), "standard"
    for name in reversed(names):
        if name not in ("kernel", "torch", "dequantised", "standard"):
            plain = name
    rows = []
    for row in speed["rows"]:
        ms = row["ms"]
        cells = [f"{ms[name]:.2f}" for name in names]
        rows.append((row["shape"], f"{row['tokens']:,}", *cells, f"{ms['dequantised'] / ms['kernel']:.1f}",
                     f"{ms['kernel'] / ms[plain]:.2f}"))
    return ["Milliseconds of one decode step's attention in one layer (heads x semantic/geometric/value width), hetero "
            f"cache, batch 1, medians of {speed['rounds']}, interleaved; {origin(speed['env'])}. "
            f"`kernel`: {speed['rows'][0]['kernel']}; `torch`: chunks; "
            f"`dequantised`: the whole cache in float32 first; `{plain}`: PyTorch's fused attention over an "
            "unquantised cache of the same widths; `standard`: the same at 64 channels a head."
            + replaced(column(speed["rows"], "kernel")), "",
            *markdown(("heads x widths", "tokens", *names, "dequantised / kernel", f"kernel / {plain}"), rows), ""]


def cache_lines(benchmarks: dict) -> list[str]:
    """Formats of the KV cache: quality, decode time, memory of long contexts."""
    lines = []
    if "cache_quality" in benchmarks:
        lines += quality_lines(benchmarks["cache_quality"])
    if benchmarks.get("decode_speed", {}).get("rows"):
        lines += kernel_lines(benchmarks["decode_speed"])
    if long := benchmarks.get("long_context"):
        prefill, decode = mib(long["prefill_extra_bytes"], 0), mib(long["decode_extra_bytes"], 0)
        lines += [f"A prompt of {long['tokens']:,} tokens (decoupled 32/64, d_model 512, 6 layers, hetero cache of "
                  f"{mib(long['cache_bytes'], 1)} MiB): prefill in chunks peaks at {prefill} MiB beyond the cache and "
                  f"takes {long['prefill_seconds']:.0f} s; a decode step after it at {decode} MiB and "
                  f"{long['decode_ms']:.0f} ms.", ""]
    return lines


def mib(size: float | None, digits: int) -> str:
    return "-" if size is None else f"{size / 2**20:.{digits}f}"


# -----------------------------------------------------------------------------
# Evaluations

def loss_lines(results: dict) -> list[str]:
    """Loss through each format of the cache: one table of single checkpoints, one of series, as means over seeds."""
    single, measured = {}, []
    for run, _, _ in of_command(results["evals"], "ppl"):
        single[run] = caches(results["evals"], run)
    by_name = {run["run"]: run for run in results["runs"]}
    for series in results["series"]:
        if series["caches"] and len(series["runs"]) == 1:
            single[series["runs"][0]] = by_name[series["runs"][0]]["caches"]
        elif series["caches"]:
            measured.append(series)
    return single_lines(single) + series_lines(measured)


def single_lines(single: dict) -> list[str]:
    rows, windows = [], set()
    for run, of_run in sorted(single.items()):
        fp16 = of_run.get("fp16")
        for name, cache in sorted(of_run.items(), key=lambda item: -item[1]["bytes_per_token"]):
            windows.add(f"{run}: {cache['tokens']:,} tokens, window {cache['block']:,}, stride {cache['stride']:,}")
            compared = ("-", "-", "-")
            if fp16:
                both = fp16["ppl"] and cache["ppl"]
                compared = (f"{cache['loss'] - fp16['loss']:+.4f}",
                            f"{cache['ppl'] / fp16['ppl']:.4f}" if both else "-",
                            f"{fp16['bytes_per_token'] / cache['bytes_per_token']:.2f}")
            rows.append((f"`{run}`", name, f"{cache['bits_per_value']:.2f}", f"{cache['bytes_per_token']:,}",
                         f"{cache['loss']:.4f}", "-" if cache["ppl"] is None else f"{cache['ppl']:.4f}", *compared))
    if not rows:
        return []
    return ["Loss through the cache (`eval_dba.py ppl`), every token read through keys and values in its format; ΔNLL "
            f"in nats per token and ratio of perplexities against fp16. {'; '.join(sorted(windows))}.", "",
            *markdown(("run", "cache", "bits/value", "B/token", "loss", "perplexity", "ΔNLL", "ratio",
                       "times smaller"), rows), ""]


def series_lines(measured: list) -> list[str]:
    shown = set().union(*column(measured, "caches"))
    names, rows = [name for name in MARKERS if name in shown], []
    for series in sorted(measured, key=lambda series: series["caches"]["fp16"]["mean"]):
        cells = []
        for name in names:
            if cache := series["caches"].get(name):
                value = f"{cache['mean']:.3f}" if name == "fp16" else signed(cache["delta"])
                cells.append(f"{value}, {cache['bytes_per_token']:,} B")
            else:
                cells.append("-")
        rows.append((series["label"], len(series["seeds"]), *cells))
    if not rows:
        return []
    return ["The same for the manifest's runs: loss with fp16, then ΔNLL per format, mean and 95 % t-interval over "
            "seeds of the differences, and bytes per token:", "", *markdown(("model", "seeds", *names), rows), ""]


def task_lines(evals: dict, benchmarks: dict) -> list[str]:
    rows = []
    for run, file, tasks in of_command(evals, "tasks"):
        cache = file.removeprefix("tasks").removeprefix("_") or "fp32"
        for name, task in tasks.items():
            for metric in ("acc", "acc_norm"):
                if metric in task:
                    rows.append((f"`{run}`", name, cache, metric, task["n"],
                                 f"{100 * task[metric]:.1f} ± {196 * task[f'{metric}_stderr']:.1f} %"))
    lines = []
    if rows:
        guess = []
        for name in dict.fromkeys(column(rows, 1)):
            if name in CHANCE:
                guess.append(f"{100 * CHANCE[name]:.0f} % on {name}")
        lines += [f"Benchmarks by lm-eval, zero-shot, ± 1.96 standard errors; guessing gives {', '.join(guess)}:", "",
                  *markdown(("run", "task", "cache", "metric", "items", "accuracy"), rows), ""]
    if parity := benchmarks.get("task_parity"):
        rows = []
        for row in parity["rows"]:
            rows.append((row["task"], row["metric"], row["items"], f"{100 * row['ours']:.2f} %",
                         f"{100 * row['theirs']:.2f} %", row["items_that_differ"],
                         f"{row['largest_difference']:.1e}"))
        lines += [f"The same weights ({parity['ckpt']}) in our model and adapter, and in transformers by lm-eval's own "
                  f"adapter (lm-eval {parity['lm_eval']}), both float32:", "",
                  *markdown(("task", "metric", "items", "ours", "theirs", "items that differ",
                             "largest difference of a log-probability"), rows), ""]
    return lines


def last_stage(rows: list, of: str) -> dict:
    """{path: row} of a rank result, after RoPE where the path is rotated."""
    return {row["path"]: row for row in rows if row["of"] == of and row["rope"] in ("after", "none")}


def rank_lines(evals: dict) -> list[str]:
    rows = []
    for run, _, result in of_command(evals, "rank"):
        for of in ("Q merged", "K merged", "QK head"):
            for path, row in last_stage(result["rows"], of).items():
                cells = [f"{row['trained'][name]:.1f} / {row['initial'][name]:.1f}" for name in RANKS]
                share = row["trained"].get("share")
                rows.append((f"`{run}`", PATHS[path], of, row["channels"], *cells,
                             f"{share['8']:.3f}" if share and "8" in share else ""))
    if not rows:
        return []
    return ["Effective ranks of queries and keys after RoPE (medians over layers; trained / at initialisation), by "
            "definitions that disagree: each is named. `QK head`: of Σq^½ Σk^½ of one head, which no change of basis "
            "alters, with the energy that its first 8 channels hold. Second moments, not centred.", "",
            *markdown(("run", "path", "of", "channels", *RANKS.values(), "share 8"), rows), ""]


def latency_lines(evals: dict) -> list[str]:
    lines = []
    for run, name, result in of_command(evals, "latency"):
        names, of_length, rows = list(dict.fromkeys(column(result, "cache"))), {}, []
        for row in result:
            of_length.setdefault(row["prompt"], {})[row["cache"]] = row
        for prompt, of_prompt in of_length.items():
            fp16 = of_prompt["fp16"]
            times = []
            for cache in names:
                row = of_prompt[cache]
                times.append(f"{row['ms_per_token']:.2f} ({row['ratio_to_fp16']:.2f})")
            copied = "-" if fp16["share_of_copy"] is None else f"{100 * fp16['share_of_copy']:.0f} %"
            rows.append((f"{prompt:,}", fp16["kernel"], f"{fp16['prefill_seconds']:.2f}", *times, copied))
        source = evals[run][name]["from"]
        lines += [f"Cached decoding of `{run}`, batch 1, {source['dtype']}, {source['hardware']}, commit "
                  f"{commit(source)}: ms per token (times fp16), and the bytes that a step with fp16 must read, per "
                  "second, as a share of the rate of a plain copy."
                  + replaced(column(result, "kernel")), "",
                  *markdown(("prompt", "kernel", "prefill s", *names, "of copy rate"), rows), ""]
    return lines


def sweep_lines(evals: dict) -> list[str]:
    rows = []
    for run, name, result in of_command(evals, "sweep"):
        for row in result["rows"]:
            figures = []
            for key, form in (("prefill_seconds", ".1f"), ("ms_per_token", ".2f"), ("loss", ".3f")):
                figures.append(format(row[key], form) if key in row else "-")
            rows.append((f"`{run}`", f"{evals[run][name]['from']['context']:,}",
                         ", ".join(sorted(set(result["formats"].values()))), f"{row['context']:,}",
                         mib(row.get("cache_bytes"), 1), *figures, row["status"]))
    if not rows:
        return []
    return ["Long prompts (`sweep`). Past the context that a model was trained at, its loss says how a model without "
            "long training fails, not how good long context can be:", "",
            *markdown(("run", "trained at", "cache", "prompt", "cache MiB", "prefill s", "ms/token",
                       "loss of the last chunk", "status"), rows), ""]


def memory_lines(evals: dict) -> list[str]:
    rows = []
    for run, _, result in of_command(evals, "memory"):
        longest = max(column(result, "tokens"), default=0)
        for row in result:
            if row["tokens"] == longest:
                rows.append((f"`{run}`", f"{longest:,}", row["cache"], f"{row['bytes_per_token']:,}",
                             mib(row["formula_bytes"], 2), mib(row["cache_bytes"], 2), mib(row["fill_extra_bytes"], 2),
                             mib(row["decode_extra_bytes"], 2)))
    if not rows:
        return []
    return ["Memory in MiB (`memory`); beside the cache: what the process (CUDA: PyTorch) took more than before:", "",
            *markdown(("run", "tokens", "cache", "B/token", "by formula", "owned", "beside it, prompt",
                       "beside it, decode step"), rows), ""]


def probe_lines(evals: dict) -> list[str]:
    rows, differences = [], []
    for run, _, result in of_command(evals, "probes"):
        for count in result["counts"]:
            cells = []
            for name in CHECKS:
                hits, low, high = count[name]
                cells.append(f"{hits} ({100 * low:.0f}-{100 * high:.0f} %)")
            rows.append((f"`{run}`", count["set"], count["n"], *cells, f"{count['margin']:+.2f}"))
        for compared in result["compare"]:
            splits = ["{} +{} -{} (p {:.2g})".format(name, *compared[name]) for name in CHECKS]
            differences.append(f"`{run}` against the compared, {compared['set']}: {', '.join(splits)}")
    lines = []
    if rows:
        lines += ["Probes (hits with 95 % Wilson intervals; `preferred`: the target is likelier than the distractor; "
                  "margin in nats):", "", *markdown(("run", "cases", "n", *CHECKS, "mean margin"), rows), ""]
    if differences:
        lines += ["Exact McNemar tests over cases, one pair of checkpoints, as if cases of one template were "
                  f"independent: {'; '.join(differences)}.", ""]
    return lines


def policy_lines(evals: dict) -> list[str]:
    rows = []
    for run, _, result in of_command(evals, "policy"):
        budget = []
        for name, value in result["settings"].items():
            if name.startswith("max") and value is not None:
                budget.append(f"{name.removeprefix('max_').replace('_', ' ')} {value:g}")
        chosen = list(map(" ".join, result["formats"].items()))
        if result["rotate"]:
            chosen.append("rotated")
        if result["residual"]:
            chosen.append(f"{result['residual']} newest fp16")
        times = [f"{kernel} {ms:.1f} ms" for kernel, ms in result["kernel_ms"].items()]
        long_block = result["block"] * result["settings"]["long_factor"]
        for block, measured in ((result["block"], result["short"]), (long_block, result["long"])):
            if measured:
                rows.append((f"`{run}`", " or ".join(budget), ", ".join(chosen), result["tried"],
                             f"{result['bytes_per_token']:,}", f"{block:,}", f"{measured['tokens']:,}",
                             f"{measured['delta_nll']:+.5f}", f"{measured['kl']:.5f}",
                             f"{measured['max_delta_logit']:.2f}", ", ".join([result["kernel"], *times])))
    if not rows:
        return []
    return ["Cache policies that `policy` chose; it searched on the shorter windows, and checked its choice alone on "
            "the longer. `kernel`: the faster, and times of a decode step late in a long cache:", "",
            *markdown(("run", "budget", "chosen", "tried", "B/token", "tokens of a window", "tokens", "ΔNLL", "KL",
                       "max Δlogit", "kernel"), rows), ""]


def mask_lines(evals: dict) -> list[str]:
    rows, costs, bits = [], [], {}
    for run, _, result in of_command(evals, "mask"):
        for row in result["summary"]:
            if "index_bits" in row:
                bits[f"{row['index_bits']:.3g}"] = None
            half = "" if row["kl_half"] is None else f" ± {row['kl_half']:.2g}"
            mass = f"{row['mass']:.3f}" if "mass" in row else "-"
            mse = f"{row['mse']:.1e}" if "mse" in row else "-"
            accuracy = "-" if row["accuracy_kept"] is None else f"{row['accuracy_kept']:.1f} %"
            kv = f"{100 * row['kv_kept']:.0f} %" if "kv_kept" in row else "-"
            rows.append((f"`{run}`", row["text"], f"{row['windows']} x {row['length']:,}", row["choice"],
                         f"{100 * row['kept']:.1f} %", mass, mse, f"{row['kl']:.5f}{half}", f"{row['delta_nll']:+.4f}",
                         accuracy, kv))
        for row in result["costs"]:
            costs.append((f"`{run}`", f"{row['length']:,}", row["attention"], f"{row['layer_ms']:.0f}",
                          mib(row["layer_bytes"], 1), f"{row['ms_per_token']:.2f}", mib(row["forward_bytes"], 0)))
    lines = []
    besides = f" To choose, gates read {' or '.join(bits)} bits of each channel of every key." if bits else ""
    if rows:
        lines += ["Sparse attention (`convert_dba.py mask`), over the second half of each window: keys read of those "
                  "in reach, attention's mass on them, mean square of its difference, KL divergence of the next token "
                  "in nats ± 95 % interval over windows, accuracy of the next token against the model's own, cache "
                  f"held. bfloat16 is the model itself, rounded.{besides}", "",
                  *markdown(("run", "text", "windows", "choice", "read", "mass", "MSE", "KL", "ΔNLL", "accuracy kept",
                             "KV held"), rows), ""]
    if costs:
        lines += ["What a prompt costs, queries of a block choosing together; one layer's attention, and the whole "
                  "pass without logits, memory in MiB beside what was held before:", "",
                  *markdown(("run", "tokens", "attention", "layer ms", "layer MiB", "ms/token", "pass MiB"), costs), ""]
    return lines


def eval_lines(results: dict) -> list[str]:
    """Everything that eval_dba.py measured; what was not measured is left out."""
    evals = results["evals"]
    lines = [*loss_lines(results), *task_lines(evals, results["benchmarks"]), *rank_lines(evals), *probe_lines(evals),
             *policy_lines(evals), *latency_lines(evals), *sweep_lines(evals), *memory_lines(evals), *mask_lines(evals)]
    sources = set()
    for files in evals.values():
        for file in files.values():
            sources.add(f"{file['from']['hardware']}, {file['from']['dtype']}, commit {commit(file['from'])}")
    if sources:
        lines += [f"Measured on: {'; '.join(sorted(sources))}.", ""]
    return lines


# -----------------------------------------------------------------------------
# Whole reports

def of_manifest(results: dict) -> bool:
    """Whether runs that the manifest lists are there: without them there is nothing to say of the papers."""
    return any(column(results["manifest"].values(), 0))


def section(title: str, lines: list[str]) -> list[str]:
    return [f"## {title}", "", *lines] if lines else []


def paper_report(results: dict) -> str:
    counts = []
    for name, (done, listed) in results["manifest"].items():
        counts.append((f"`{name}`", done, listed))
    lines = ["# Report", "", "Written by plot_results.py from runs/, paper_manifest.json and paper/claims.json; no "
             f"verdict is typed by hand. {ledger_counts(results['claims'])}", "", *first_page(results),
             "## Contrasts", "", "![Differences of losses with their margins](fig_contrasts.png)", "",
             *contrast_lines(results), *division_lines(results), *section("Ledger", ledger_lines(results["claims"])),
             *section("Runs", run_lines(results)), *section("Speed", [*device_lines(results["benchmarks"]),
                                                            *speed_lines(results["benchmarks"])]),
             *section("KV cache", cache_lines(results["benchmarks"])), *section("Evaluations", eval_lines(results)),
             *section("The manifest", markdown(("set", "finished", "listed"), counts))]
    return "\n".join(lines).rstrip() + "\n"


def user_report(results: dict) -> str:
    """Runs, curves, sizes and measurements of runs that the manifest doesn't list."""
    sizes = []
    for _, members in panels(results["series"]):
        for member in members:
            per_token = member["kv_bytes_fp16"]
            sizes.append((f"`{member['series']}`", member["label"], f"{member['params']:,}", f"{per_token:,}",
                          mib(per_token * member["context"], 2), mib(per_token * 131_072, 0)))
    head = ("runs", "model", "parameters", "KV B/token fp16", "MiB at its context", "MiB at 131,072 tokens")
    lines = ["# Report", "", *section("Runs", run_lines(results)),
             "![Validation and training loss over tokens](fig_convergence.png)", "",
             *section("Sizes", [*markdown(head, sizes), ""]), *section("Evaluations", eval_lines(results))]
    return "\n".join(lines).rstrip() + "\n"


def report(results: dict) -> str:
    return paper_report(results) if of_manifest(results) else user_report(results)
