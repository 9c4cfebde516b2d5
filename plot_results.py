"""
Figures, tables and the ledger of claims from run folders: collect, report, draw.

    python3 plot_results.py                                # runs/ to assets/ and the README's block
    python3 plot_results.py --runs my_runs --out my_runs   # a report on your own runs

paper/collect.py reads run folders at any depth and paper/claims.py decides the ledger and the pre-registered contrasts;
what they found is results.json (and evals.json; every run: runs_<group>.json). paper/report.py makes report.md, the
LaTeX tables and the README's block of it, this file the figures: fig_contrasts (differences of losses with their
margins), fig_headline and fig_pareto_memory_vs_loss (loss against bytes of KV cache), fig_convergence, fig_split (loss
over the division of a head's channels), fig_learning_rate, fig_decode, fig_tasks, fig_rank. The same runs give the same
bytes. A figure without runs is not drawn; the papers' ledger is there only where runs of the manifest are. Bands, bars
and ± are 95 % t-intervals over seeds.
"""

import argparse
import collections
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import MaxNLocator

from paper.claims import contrasts, ledger, registered
from paper.collect import CHANCE, collect, of_command, panels, rate_panels, split_by_group
from paper.report import (
    PATHS,
    divisions,
    family,
    headline,
    last_stage,
    of_manifest,
    plural,
    readme_block,
    replace_block,
    report,
    scale_table,
)
from paper.shapes import UNREADABLE
from paper.stats import frontier, mean_interval, p_text
from paper.style import (
    COLORS,
    MARKERS,
    OTHERS,
    REPORTED,
    SMALL,
    STYLES,
    log2_x,
    save,
    spread,
    subplots,
    write_json,
    write_text,
)
from run_paper_manifest import HERE, list_runs, read_manifest
from train_dba import Parser, UserError, brief, exit_code, progress

MOST_LINES = 5                                             # of a panel of curves
FEW = 12                                                   # evaluations of a curve whose intervals are bars
MOST_LABELS = 8                                            # of a panel of points
LINEAR = 0.03                                              # nats: beyond it differences are drawn logarithmically
SHARED_AXIS = dict(color="#999999", linewidth=0.8)
LEADER = dict(arrowstyle="-", color="#999999", linewidth=0.5, alpha=0.7, relpos=(0, 0.5))  # from a point to its label


# -----------------------------------------------------------------------------
# Differences of losses

def forest_rows(results: dict) -> list:
    """[(title, [row])]: contrasts that were fixed before their runs, then the ledger's differences of losses; what was
    not measured is left out."""
    registered, others = [], []
    for row in results["contrasts"]:
        if row["mean"] is not None:
            threshold = 0.0 if row["kind"] == "better" else row["margin"]
            registered.append(dict(name=row["name"], mean=row["mean"], half=row["half"], threshold=threshold,
                                   reported=None, verdict=row["verdict"], p=row["p_holm"]))
    for row in results["claims"]:
        if row["rule"] in ("below", "not_worse") and row["ours"] is not None:
            others.append(dict(name=row["statement"].split(" (")[0], mean=row["ours"], half=row["interval"],
                               threshold=row["margin"], reported=row["reported"], verdict=row["verdict"],
                               p=row["p_holm"]))
    groups = []
    if registered:
        groups.append(("Contrasts fixed before their runs", registered))
    if others:
        groups.append(("The ledger's other differences", others))
    return groups


def draw_contrasts(results: dict, path: Path) -> None:
    """A row per difference: its 95 % interval, the region that would show it shaded up to its margin, what the papers
    report, and the verdict."""
    groups = forest_rows(results)
    counts = [len(rows) for _, rows in groups]
    fig, axes = plt.subplots(len(groups), 1, figsize=(8, 0.9 + 0.46 * sum(counts) + 0.35 * len(groups)), squeeze=False,
                             layout="constrained", gridspec_kw=dict(height_ratios=counts))
    handles = [plt.Line2D([], [], color="#777777", marker="o", markersize=5,
                          label="difference, 95 % interval; p by Holm"),
               plt.Rectangle((0, 0), 1, 1, color="#000000", alpha=0.12, label="the claim, up to its margin")]
    for (ax,), (title, rows) in zip(axes, groups):
        forest_panel(ax, rows)
        ax.set_title(title, loc="left")
        if len(handles) == 2 and any(row["reported"] is not None for row in rows):
            handles.append(plt.Line2D([], [], **REPORTED, label="as the papers report"))
    fig.legend(handles=handles, loc="outside lower center", ncols=3)
    save(fig, path)


def forest_panel(ax, rows: list) -> None:
    """Draw the rows of one group, the first at the top. The axis is linear about 0, where the margins are, and
    logarithmic beyond."""
    ends = []
    for row in rows:
        half = row["half"] or 0
        ends += [row["reported"] or 0.0, row["threshold"], row["mean"] - half, row["mean"] + half]
    left, right = min(*ends, -LINEAR) * 1.4, max(*ends, LINEAR) * 1.4
    for y, row in enumerate(rows):
        color = verdict_color(row["verdict"])
        ax.fill_between([left, row["threshold"]], y - 0.36, y + 0.36, color="#000000", alpha=0.07, linewidth=0)
        ax.plot([row["threshold"]] * 2, [y - 0.36, y + 0.36], color="#555555", linewidth=1)
        ax.errorbar(row["mean"], y, xerr=row["half"], fmt="o", color=color, markersize=5, capsize=3, linewidth=1.6)
        if row["reported"] is not None:
            ax.plot(row["reported"], y, **REPORTED)
        p = "" if row["p"] is None else f"\np {p_text(row['p'])}"
        ax.text(1.01, y, row["verdict"] + p, transform=ax.get_yaxis_transform(), va="center", color=color)
    ax.axvline(0, **SHARED_AXIS)
    ax.set_xscale("symlog", linthresh=LINEAR)
    ax.set_xticks(*nats_ticks(left, right))
    ax.minorticks_off()
    ax.set(xlim=(left, right), ylim=(len(rows) - 0.5, -0.5),
           xlabel=f"difference of validation loss (nats per token; logarithmic beyond {LINEAR:g})")
    ax.set_yticks(range(len(rows)), [wrap(row["name"]) for row in rows])
    ax.tick_params(axis="y", length=0)


def nats_ticks(low: float, high: float) -> tuple[list, list]:
    """(places, labels) of the ticks of an axis that is linear about 0 and logarithmic beyond."""
    ticks = [0]
    for size in (0.01, 0.03, 0.1, 0.3, 1, 3):
        ticks += [tick for tick in (-size, size) if low < tick < high]
    return ticks, [f"{tick:g}" for tick in ticks]


def verdict_color(verdict: str) -> str:
    if verdict.startswith("undecided"):
        return "#777777"
    return "#0072B2" if verdict in ("holds", "reproduced") else "#D55E00"


def wrap(text: str, width: int = 46) -> str:
    """A text in lines of about so many characters."""
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + len(word) > width:
            lines.append(word)
        else:
            lines[-1] = f"{lines[-1]} {word}".lstrip()
    return "\n".join(lines)


# -----------------------------------------------------------------------------
# Loss against bytes of cache

class CachePoint(NamedTuple):
    """A format of a cache: its bytes per token, and the mean loss through it with the half-width of its interval."""
    format: str
    bytes: float
    mean: float
    half: float | None


def cache_points(series: dict) -> list[CachePoint]:
    """Widest format first: what was measured through a cache, else the last validation loss in fp16."""
    points = []
    for name, cache in series["caches"].items():
        if name in MARKERS:
            points.append(CachePoint(name, cache["bytes_per_token"], cache["mean"], cache["half"]))
    if not points:
        loss = series["last_val_loss"]
        points.append(CachePoint("fp16", series["kv_bytes_fp16"], loss["mean"], loss["half"]))
    return sorted(points, key=lambda point: (-point.bytes, point.mean))


def most_telling(members: list) -> list:
    """At most MOST_LABELS series of a panel: those that can be compared at equal parameters where there are some, best
    first. Without RoPE a loss is so far off that it would press all others into a line."""
    measured = [member for member in members if member["caches"]] or members
    measured = [member for member in measured if "no RoPE" not in member["label"]] or measured
    matched = [member for member in measured if member["matched"] or member["mode"] == "standard"]
    chosen = matched if len(matched) > 1 else measured
    return sorted(chosen, key=lambda member: cache_points(member)[0].mean)[:MOST_LABELS]


def seeds_of(members: list) -> int:
    """Seeds that every series has."""
    return min(len(member["seeds"]) for member in members)


def pareto_panel(ax, title: str, members: list) -> set:
    """Draw one panel; returns the formats that it shows."""
    members, points, formats = most_telling(members), [], set()
    for i, member in enumerate(members):
        color, of_member = COLORS[member["mode"]], cache_points(member)
        dodge = 1 + 0.018 * (i - (len(members) - 1) / 2)   # intervals at equal bytes stand beside each other
        _, sizes, means, _ = zip(*of_member)
        ax.plot(np.array(sizes) * dodge, means, color=color, linewidth=0.8, alpha=0.6)
        for point in of_member:
            formats.add(point.format)
            points.append((point.bytes, point.mean))
            ax.errorbar(point.bytes * dodge, point.mean, yerr=point.half, fmt=MARKERS[point.format], color=color,
                        markersize=5, capsize=2, linewidth=1, markeredgecolor="white", markeredgewidth=0.5)
    ax.step(*zip(*frontier(points)), where="post", color="#555555", linewidth=1.2, linestyle=":", zorder=0)
    log2_x(ax)
    low, high = ax.get_ylim()
    widest = [cache_points(member)[0] for member in members]
    largest = max(points)[0]
    places = spread([point.mean for point in widest], (high - low) / 19)
    for member, point, y in zip(members, widest, places):
        color = COLORS[member["mode"]]
        ax.annotate(member["label"].removesuffix(" matched"), (point.bytes * 1.05, point.mean), (largest * 1.22, y),
                    va="center", color=color, fontsize=SMALL, annotation_clip=False,
                    arrowprops=dict(LEADER, color=color))
    measured = any(member["caches"] for member in members)
    ax.set(xlabel="KV cache (bytes per token, all layers; equal ones side by side)", xlim=(None, largest * 1.15),
           ylabel="loss through the cache (nats/token)" if measured else "last validation loss (nats/token)")
    seeds = seeds_of(members)
    alike = f"{members[0]['params'] / 1e6:.2f}M parameters each, " if members[-1]["matched"] else ""
    ax.set_title(f"{title}\n{alike}{seeds} seed" + ("s" if seeds > 1 else ", no intervals"), loc="left")
    ax.grid(alpha=0.3)
    return formats


def draw_pareto(drawn: list, path: Path) -> None:
    """Loss against bytes of KV cache per token: a line per model through the formats of its cache."""
    fig, axes = subplots(len(drawn), height=3.7, width=8, most=1)
    formats = set()
    for ax, (title, members) in zip(axes, drawn):
        formats |= pareto_panel(ax, title, members)
    handles = []
    for name, marker in MARKERS.items():
        if name in formats:
            handles.append(plt.Line2D([], [], marker=marker, linestyle="", color="#777777", label=name))
    handles.append(plt.Line2D([], [], color="#555555", linestyle=":", linewidth=1.2, label="best loss for its bytes"))
    fig.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    save(fig, path)


# -----------------------------------------------------------------------------
# Division of a head's channels

def draw_split(results: dict, path: Path) -> None:
    """A point per division: the difference of losses with its 95 % interval, over channels without rotation. The axis
    is linear about 0 and logarithmic beyond."""
    fig, ax = plt.subplots(figsize=(6, 3.6), layout="constrained")
    rows, first = divisions(results), ""
    for series, differences in rows:
        (mean, half), (x, rotated) = mean_interval(differences), series["score_channels"]
        ax.errorbar(x, mean, yerr=half or None, fmt="o", color=COLORS[series["mode"]], markersize=5, capsize=3)
        ax.annotate(f"{mean:+.3f}\n{len(differences)} seeds" if half else "0", (x, mean), xytext=(6, -4),
                    textcoords="offset points")
        first = first if half else f"{x} + {rotated}"
    ax.axhline(0, **SHARED_AXIS)
    ax.set_yscale("symlog", linthresh=LINEAR)
    ax.margins(0.1)
    ax.minorticks_off()
    ax.set_yticks(*nats_ticks(*ax.get_ylim()))
    ax.set_xticks([series["score_channels"][0] for series, _ in rows],
                  ["{} + {}".format(*series["score_channels"]) for series, _ in rows])
    ax.set(xlabel="channels of a head's score: without + with rotation",
           ylabel=f"validation loss less that of {first}\n(nats, paired by seed; logarithmic beyond {LINEAR:g})")
    modes = dict.fromkeys(series["mode"] for series, _ in rows)
    ax.legend(handles=[plt.Line2D([], [], color=COLORS[mode], marker="o", linestyle="", label=mode) for mode in modes])
    ax.grid(axis="y", alpha=0.3)
    save(fig, path)


# -----------------------------------------------------------------------------
# Curves

def best_per_family(members: list) -> list:
    """At most MOST_LINES series: the best of each mode, as they end."""
    chosen = {}
    for member in sorted(members, key=lambda member: member["last_val_loss"]["mean"]):
        chosen.setdefault(family(member) if len(members) > MOST_LINES else member["series"], member)
    if len(chosen) > MOST_LINES:                           # grouped and plain DBA together
        best = {}
        for member in chosen.values():
            best.setdefault(member["mode"], member)
        chosen = best
    return sorted(chosen.values(), key=lambda member: -member["last_val_loss"]["mean"])[-MOST_LINES:]


def curve_panels(series: list) -> list:
    """[(title, at most MOST_LINES series)]: series with the parameters of standard have panels of their own."""
    drawn = []
    for title, members in panels(series):
        standard, others, matched = [], [], []
        for member in members:
            group = matched if member["matched"] else standard if member["mode"] == "standard" else others
            group.append(member)
        if others or not matched:
            drawn.append((title, best_per_family(standard + others)))
        if matched:
            drawn.append((f"{title}\nat the parameters of standard", best_per_family(standard + matched)))
    return drawn


def draw_convergence(series: list, path: Path) -> None:
    """Validation loss over training tokens with its band, and training loss as a thin line below or above it."""
    drawn = curve_panels(series)
    fig, axes = subplots(len(drawn), height=3.0, width=8, most=1)
    for ax, (title, members) in zip(axes, drawn):
        of_mode = collections.Counter()                    # lines so far
        for place, member in enumerate(members):
            color, style = COLORS[member["mode"]], STYLES[of_mode[member["mode"]] % len(STYLES)]
            of_mode[member["mode"]] += 1
            tokens, means, halves = zip(*member["curve"])
            millions = in_millions(tokens)
            ax.plot(millions, means, linestyle=style, color=color, linewidth=1.6, marker="o", markersize=3)
            if len(member["seeds"]) > 1:
                draw_intervals(ax, millions, means, halves, color, place)
            if member["train_curve"]:
                tokens, losses = zip(*member["train_curve"])
                ax.plot(in_millions(tokens), losses, color=color, linewidth=0.6, alpha=0.55)
        zoom(ax, members)
        low, high = ax.get_ylim()
        ends = [member["last_val_loss"]["mean"] for member in members]
        for member, end, y in zip(members, ends, spread(ends, (high - low) / 14)):
            ax.annotate(f"{member['label'].removesuffix(' matched')}  {end:.3f}", (1, end), (1.03, y), va="center",
                        xycoords=ax.get_yaxis_transform(), textcoords=ax.get_yaxis_transform(), annotation_clip=False,
                        color=COLORS[member["mode"]], arrowprops=LEADER)
        ax.set(xlabel="training tokens (millions)", ylabel="loss (nats/token)")
        ax.set_title(f"{title}, {plural(seeds_of(members), 'seed')}", loc="left")
        ax.grid(alpha=0.3)
    handles = [plt.Line2D([], [], color="#555555", linewidth=1.6, marker="o", markersize=3,
                          label="validation, last value"),
               plt.Line2D([], [], color="#555555", marker="|", markersize=9, linestyle="",
                          label="95 % interval over seeds"),
               plt.Line2D([], [], color="#555555", linewidth=0.6, label="training")]
    fig.legend(handles=handles, loc="outside lower center", ncols=3)
    save(fig, path)


def in_millions(tokens: Sequence[int]) -> list[float]:
    return [count / 1e6 for count in tokens]


def draw_intervals(ax, x: list, means: Sequence, halves: Sequence, color: str, place: int) -> None:
    """Intervals of a curve: bars beside each other where there are few evaluations, a band where there are many."""
    x, means, halves = np.array(x), np.array(means), np.array(halves)
    if len(x) <= FEW:
        ax.errorbar(x + 0.003 * (place - 2) * x[-1], means, yerr=halves, fmt="none", color=color, capsize=2,
                    linewidth=1)
    else:
        ax.fill_between(x, means - halves, means + halves, color=color, alpha=0.15, linewidth=0)


def zoom(ax, members: list) -> None:
    """Limits that leave out the first fall of the loss, so that the ends can be told apart."""
    first = min(member["curve"][0][0] for member in members)
    last = max(member["curve"][-1][0] for member in members)
    low, high = math.inf, -math.inf
    for member in members:
        _, start, half = member["curve"][0]
        high = max(high, start + (half or 0))
        for _, mean, half in member["curve"]:
            low = min(low, mean - (half or 0))
        for tokens, loss in member["train_curve"]:
            if tokens >= first:
                low = min(low, loss)
    pad = 0.05 * (high - low)
    margin = 0.02 * (last - first) / 1e6
    ax.set(ylim=(low - pad, high + pad), xlim=(first / 1e6 - margin, last / 1e6 + margin))


def draw_learning_rate(series: list, path: Path) -> None:
    """Last validation loss over the learning rate, a panel per mode, and per mode without RoPE, whose losses are far
    above; the best rate of each row is filled."""
    drawn = {}
    for title, members in rate_panels(series):
        for member in members:
            heading = member["mode"] + (", no RoPE" if "no RoPE" in member["label"] else "")
            rows = drawn.setdefault((title, heading), {})
            rows.setdefault(member["row"], []).append(member)
    fig, axes = subplots(len(drawn), height=3, width=2.9, most=3)
    for ax, ((title, heading), rows) in zip(axes, sorted(drawn.items(), key=lambda item: item[0])):
        ticks = set()
        for i, (_, members) in enumerate(sorted(rows.items())):
            points, color = [], COLORS[members[0]["mode"]]
            for member in members:
                loss = member["last_val_loss"]
                points.append((member["lr"], loss["mean"], loss["half"] or 0))
            rates, losses, halves = zip(*sorted(points))
            ticks.update(rates)
            ax.errorbar(rates, losses, yerr=halves, linestyle=STYLES[i % len(STYLES)], color=color, marker="o",
                        markersize=4, markerfacecolor="white", linewidth=1.2, label=members[0]["label"])
            best = losses.index(min(losses))
            ax.plot(rates[best], losses[best], "o", color=color, markersize=5, zorder=5)
        ax.set(xscale="log", xlabel="learning rate", ylabel="last validation loss")
        ax.set_xticks(sorted(ticks), [f"{rate:g}" for rate in sorted(ticks)])
        ax.minorticks_off()
        name, batch, steps = title.rsplit(", ", 2)
        ax.set_title(f"{heading}\n{name}\n{batch}, {steps}", loc="left", fontsize=SMALL)
        ax.grid(alpha=0.3)
        ax.legend(fontsize=7, loc="upper left", bbox_to_anchor=(-0.1, -0.26), frameon=False)
    save(fig, path)


# -----------------------------------------------------------------------------
# Evaluations

def color_of_run(results: dict, name: str, other: str) -> str:
    """The colour of a run's mode; another for what is no run of ours."""
    for run in results["runs"]:
        if run["run"] == name:
            return COLORS[run["mode"]]
    return other


def draw_decode(results: dict, path: Path) -> None:
    """Time of a decode step as times that with an fp16 cache, over the tokens in the cache, a panel per run."""
    runs = list(of_command(results["evals"], "latency"))
    fig, axes = subplots(len(runs), width=4.0, height=3.0, sharey=True)
    for ax, (run, file, rows) in zip(axes, runs):
        color, points = color_of_run(results, run, OTHERS[2]), {}
        for row in rows:
            points.setdefault(row["cache"], []).append((row["prompt"], row["ratio_to_fp16"]))
        for i, (cache, of_cache) in enumerate(points.items()):
            ax.plot(*zip(*of_cache), label=cache, marker=MARKERS.get(cache, "x"), markersize=5, color=color,
                    linestyle=STYLES[i % len(STYLES)], linewidth=1.2)
        log2_x(ax)
        ax.set(xlabel="tokens in the cache", ylabel="time of a decode step, times fp16" if ax is axes[0] else None)
        machine = results["evals"][run][file]["from"]["hardware"]
        ax.set_title(f"{run}\n{machine}, batch 1", loc="left")
        ax.grid(alpha=0.3)
        ax.legend()
    save(fig, path)


def draw_tasks(results: dict, path: Path) -> None:
    """Accuracy per task and run, with 95 % intervals, and a line where guessing would be."""
    runs = list(of_command(results["evals"], "tasks"))
    names = list(dict.fromkeys(run for run, _, _ in runs))
    places, items = {}, {}                                 # of the tasks: x, and the most items that a run answered
    fig, ax = plt.subplots(figsize=(8, 3.4), layout="constrained")
    for i, (run, file, tasks) in enumerate(runs):
        if not tasks:
            continue
        points = []
        label = run if file == "tasks" else f"{run}, {file.removeprefix('tasks_')}"
        for name, task in tasks.items():
            x = places.setdefault(name, len(places)) + 0.22 * (i - (len(runs) - 1) / 2)
            items[name] = max(items.get(name, 0), task["n"])
            points.append((x, task["acc"], 1.96 * task["acc_stderr"]))
        x, accuracies, halves = zip(*sorted(points))
        ax.errorbar(x, accuracies, yerr=halves, fmt="osD^v"[i % 5], markersize=6, capsize=3, linewidth=1.3, label=label,
                    color=color_of_run(results, run, OTHERS[names.index(run) % 3]))
    label = "guessing"
    for name, x in places.items():
        if name in CHANCE:
            ax.plot([x - 0.42, x + 0.42], [CHANCE[name]] * 2, color="#999999", linestyle="--", linewidth=1.2,
                    label=label)
            label = None                                   # one line of the legend for all
    ax.set_xticks(range(len(places)), [f"{name}\n{items[name]} items" for name in places])
    ax.set(ylabel="accuracy, 95 % interval")
    ax.grid(axis="y", alpha=0.3)
    fig.legend(loc="outside lower center", ncols=min(3, len(runs) + 1))
    save(fig, path)


def draw_rank(results: dict, path: Path) -> None:
    """What a score of width r per head would lose, over r: energy of Sq^(1/2) Sk^(1/2) beyond its first r singular
    values, a line per layer, the median over heads; dashed: the model at initialisation, median over layers."""
    drawn = []
    for run, _, result in of_command(results["evals"], "rank"):
        for row in last_stage(result["rows"], "QK head").values():
            drawn.append((run, row))
    fig, axes = subplots(len(drawn), width=2.75, height=2.7, most=3, sharey=True)
    for ax, (run, row) in zip(axes, drawn):
        layers = row["trained"]["left_out"]
        for i, beyond in enumerate(layers):
            ax.plot(range(1, len(beyond) + 1), beyond, color=plt.cm.viridis(i / max(1, len(layers) - 1)), linewidth=1)
        initial = list(map(statistics.median, zip(*row["initial"]["left_out"])))       # as far as all layers go
        ax.plot(range(1, len(initial) + 1), initial, color="#000000", linestyle="--", linewidth=1.2,
                label="at initialisation")
        ax.set(yscale="log", ylim=(1e-5, 1.2), xlabel="width r of a head's score")
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        ax.set_title(f"{run.removesuffix('_s1337')}\n{PATHS[row['path']]} channels, {len(layers)} layers", loc="left",
                     fontsize=SMALL)
        ax.grid(alpha=0.3)
        ax.legend(fontsize=7)
    for ax in axes[::3]:
        ax.set_ylabel("energy of the score left out")
    bar = fig.colorbar(plt.cm.ScalarMappable(plt.Normalize(0, 1), "viridis"), ax=axes, location="bottom", shrink=0.5,
                       aspect=40)
    bar.set_label("depth of the layer (first to last)")
    save(fig, path)


# -----------------------------------------------------------------------------
# Main

def draw(results: dict, out: Path) -> list[str]:
    """Every figure that there are results for. Returns the names of the others."""
    series, evals, best = results["series"], results["evals"], headline(results["series"])
    compared = [(title, members) for title, members in panels(series) if len(members) > 1]
    figures = [
        ("contrasts", forest_rows(results), lambda path: draw_contrasts(results, path)),
        ("headline", best, lambda path: draw_pareto([headline_panel(series, best)], path)),
        ("pareto_memory_vs_loss", compared, lambda path: draw_pareto(compared, path)),
        ("convergence", panels(series), lambda path: draw_convergence(series, path)),
        ("split", divisions(results)[2:], lambda path: draw_split(results, path)),
        ("learning_rate", rate_panels(series), lambda path: draw_learning_rate(series, path)),
        ("decode", list(of_command(evals, "latency")), lambda path: draw_decode(results, path)),
        ("tasks", list(of_command(evals, "tasks")), lambda path: draw_tasks(results, path)),
        ("rank", list(of_command(evals, "rank")), lambda path: draw_rank(results, path))]
    missing, bar = [], progress(len(figures), "figure", "drawing")
    for name, needed, draw_figure in figures:
        if needed:
            draw_figure(out / f"fig_{name}.png")
        else:
            missing.append(f"fig_{name}")
        bar.update()
    bar.close()
    return missing


def headline_panel(series: list, best: list) -> tuple:
    """The (title, series) of the panel that the headline's table is from, with the table's series only."""
    for title, members in panels(series):
        if best[0] in members:
            return title, best


def write_results(results: dict, out: Path) -> None:
    """results.json, every run, report.md and the LaTeX tables."""
    for name, content in split_by_group(results).items():
        write_json(out / name, content)
    write_text(out / "report.md", report(results))
    write_text(out / "table_main.tex", scale_table(results["series"], small=True))
    write_text(out / "table_scale.tex", scale_table(results["series"], small=False))


def read_readme(path: str) -> str:
    """The text whose block is to be rewritten. Raises UserError where there is none."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UNREADABLE as e:
        raise UserError(f"--readme {path} can't be read ({brief(e)}); name another, or none: --readme ''") from None
    replace_block(text, "")
    return text


def run(args: argparse.Namespace) -> None:
    manifest = read_manifest(HERE / "paper_manifest.json")
    listed = {}
    for group in manifest:
        listed[group] = list_runs(manifest, [group], "data", "runs")
    results = collect(args.runs, listed)
    for problem in results["problems"]:
        print(problem, file=sys.stderr)
    if not results["runs"]:
        raise UserError(f"no finished run under {args.runs}; train one first, for example with `make demo`")
    papers = of_manifest(results)
    readme = read_readme(args.readme) if papers and args.readme else None
    results["contrasts"] = contrasts(manifest, results) if papers else []
    results["registered"] = registered(manifest)
    results["claims"] = ledger(results) if papers else []
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"can't make the folder {args.out} ({e.strerror}); give another --out") from None
    write_results(results, args.out)
    if missing := draw(results, args.out):
        print(f"{len(missing)} figures not drawn: the runs that they need aren't there", file=sys.stderr)
    if papers:
        for name, (done, total) in results["manifest"].items():
            if done < total:
                print(f"{name}: {total - done} of {total} runs of the manifest are missing", file=sys.stderr)
        if args.readme:
            write_text(Path(args.readme), replace_block(readme, readme_block(results)))
    block = f", and the block of {args.readme}" if papers and args.readme else ""
    print(f"{len(results['runs'])} runs: results.json, report.md, tables and figures in {args.out}{block}")


@exit_code()
def main(argv=None) -> int:
    parser = Parser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of run folders (runs)")
    parser.add_argument("--out", type=Path, default=Path("assets"), help="where figures and results.json go (assets)")
    parser.add_argument("--readme", help="file whose block is rewritten; empty: none (README.md, for --runs runs)")
    args = parser.parse_args(argv)
    if args.readme is None:                                # other runs than the committed ones are not the README's
        args.readme = "README.md" if args.runs == Path("runs") else ""
    run(args)


if __name__ == "__main__":
    sys.exit(main())
