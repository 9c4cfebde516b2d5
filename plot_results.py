"""
Figures, tables and the ledger of claims from run folders: reads only runs/ and claims.json, writes assets/.

    python3 plot_results.py                                # runs/ to assets/ and the README's sections
    python3 plot_results.py --runs runs/demo --out runs/demo --readme ""

Runs that differ in nothing but the seed (names that differ in _s<seed>) are one series; series of the same data,
context, batch and steps share a panel. results.json holds every number that is drawn or tabled, with the run that it
comes from; the same runs give the same bytes. Written beside it: fig_convergence (validation loss over tokens),
fig_final_loss, fig_learning_rate, fig_pareto_memory_vs_loss (loss against bytes of KV cache, architectures and cache
formats together), table_main.tex, table_scale.tex, and report.md with the verdict on every claim. A figure without runs
is not drawn; runs that aren't finished, and runs of the manifest that are missing, are named. Bands, bars and ± are
95 % t-intervals over seeds.
"""

import argparse
import json
import re
import statistics
import sys
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt

from claims import VERDICTS, ledger, mean_interval
from figures import COLORS, MARKERS, STYLES, latex_table, markdown, save, subplots
from plot_evals import caches, draw_evals, evals_section, hardware_name, read_evals
from run_paper_manifest import HERE, list_runs, read_manifest
from train_dba import BROKEN, UserError, read_log

SWEPT = re.compile(r"(.*)_lr[\d.e-]+")                    # name of a series of a sweep: row, learning rate
# runs/bench/<name>.json, by `make bench` and `make cache_quality`
BENCHMARKS = ("train_speed", "loss_memory", "tokenize_speed", "decode_speed", "long_context", "cache_quality",
              "task_parity")


def label(config):
    """Short name of a model: its mode, its widths, what was switched on."""
    mode, c = config["attn_mode"], config
    width = {"standard": c["d_model"], "bottleneck": c["attn_dim"], "decoupled": f"{c['sem_dim']}/{c['geo_dim']}",
             "gqa": f"{c['n_head']}Q/{c['kv_head']}KV", "mla": f"{c['kv_lora_rank']}+{c['rope_dim']}"}[mode]
    switches = {f"{c['kv_head']} groups": c["attn_mode"] == "decoupled" and c["kv_head"], "null": c["null_attn"],
                "tied": c["tie_qk"], "one temperature": c["one_temperature"], "learned temperature": c["learned_temp"],
                "no RoPE": not c["rope"], "GELU": c["mlp"] == "gelu"}
    extras = [name for name, on in switches.items() if on]
    return " ".join([mode, str(width), *extras])


def read_run(folder):
    """One finished run as a dict of what is reported of it, or None for a run that isn't finished."""
    lines = read_log(folder / "train.jsonl")
    if not lines or lines[-1]["type"] != "done":
        return None
    meta, env = lines[0], json.loads((folder / "env.json").read_text())
    config = next(line for line in reversed(lines) if line["type"] in ("meta", "resume_meta"))["config"]
    train, evals = ([line for line in lines if line["type"] == kind] for kind in ("train", "eval"))
    return dict(
        run=folder.name, series=re.sub(r"_s\d+$", "", folder.name), best_of_sweep=None,
        mode=config["attn_mode"], label=label(config),
        data=Path(config["data"]).name, sha256=meta["data"]["sha256"], lr=config["lr"], layers=config["layers"],
        context=config["block"], batch=config["batch_size"] * config["grad_accum"], seed=config["seed"],
        steps=config["steps"], tokens=lines[-1]["tokens"], params=meta["params"]["total"],
        kv_bytes_fp16=meta["kv_bytes_per_token"]["fp16"],
        val_tokens=evals[-1]["val_tokens"], last_val_loss=evals[-1]["val_loss"],
        best_val_loss=evals[-1]["best_val_loss"],
        last_train_loss=train[-1]["loss"], tokens_per_second=statistics.median(line["tok_s"] for line in train),
        hardware=hardware_name(env),
        peak_bytes=max((line["mem_bytes"] for line in train if line["mem_bytes"] is not None), default=None),
        dtype=config["dtype"], compiled=config["compile"], commit=env["commit"], dirty=env["dirty"],
        curve=[[line["tokens"], line["val_loss"]] for line in evals])


def read_runs(root):
    """Finished runs under root in the order of their names; the others are named on standard error."""
    runs = []
    for log in sorted(root.glob("*/train.jsonl")):
        try:
            run = read_run(log.parent)
            problem = "not finished" if run is None else None
        except (OSError, UserError, *BROKEN) as e:
            problem = f"damaged ({type(e).__name__}: {e})"
        if problem:
            print(f"{log.parent}: {problem}, left out", file=sys.stderr)
        else:
            runs.append(run)
    return runs


def choose_rates(runs, listed):
    """Note in best_of_sweep, for runs at the learning rate with the least mean of best losses among those that the
    manifest lists for their row, what the series of the row is called. A row lacking a rate has no best one."""
    rates, found = {}, {}
    for names, series in ((rates, listed), (found, [run["series"] for run in runs])):
        for name in series:
            if swept := SWEPT.fullmatch(name):
                names.setdefault(swept[1], set()).add(name)
    for row, series in found.items():
        if series >= rates.get(row, {None}):
            best = min(sorted(series), key=lambda name: statistics.mean(
                run["best_val_loss"] for run in runs if run["series"] == name))
            for run in runs:
                run["best_of_sweep"] = row if run["series"] == best else run["best_of_sweep"]


def make_series(runs, evals):
    """One dict per series: what its runs share, its seeds, and mean and half-width of the interval of its losses, also
    through the formats of the cache in which all of them were evaluated, and of the difference from fp16."""
    grouped = {}
    for run in runs:
        for name in filter(None, (run["series"], run["best_of_sweep"])):
            grouped.setdefault(name, []).append(run)
    shared = ("mode", "label", "data", "context", "batch", "steps", "lr", "params", "kv_bytes_fp16", "layers")
    made = []
    for name, members in grouped.items():
        first = members[0]
        for run in members:
            if any(run[key] != first[key] for key in ("data", "steps", "batch", "context")) or (
                    [tokens for tokens, _ in run["curve"]] != [tokens for tokens, _ in first["curve"]]):
                print(f"{run['run']}: other settings than {first['run']}, left out of the series", file=sys.stderr)
                members = [one for one in members if one is not run]
        found = [caches(evals, run["run"]) for run in members]
        through = {cache: dict(interval(of_run[cache]["loss"] for of_run in found),
                               delta=interval(of_run[cache]["loss"] - of_run["fp16"]["loss"] for of_run in found),
                               bytes_per_token=found[0][cache]["bytes_per_token"])
                   for cache in found[0] if all({cache, "fp16"} <= of_run.keys() for of_run in found)}
        made.append({"series": name, **{key: first[key] for key in shared}, "runs": [run["run"] for run in members],
                     "label": first["label"] + " matched" * ("_matched" in name),
                     "seeds": [run["seed"] for run in members], "caches": through,
                     **{loss: interval(run[loss] for run in members) for loss in ("last_val_loss", "best_val_loss")},
                     "tokens_per_second": statistics.median(run["tokens_per_second"] for run in members)})
    return made


def interval(values):
    return dict(zip(("mean", "half"), mean_interval(list(values))))


def panels(series):
    """[(title, series)]: those of one data set, context, batch and number of steps. Of sweeps over the learning rate,
    which have their own figure, the best rates; of sets named lr, which only choose a rate, none."""
    found = {}
    for one in series:
        if "_lr_" not in one["series"] and not SWEPT.fullmatch(one["series"]):
            title = f"{one['data']}, {one['batch']} x {one['context']}, {one['steps']:,} steps"
            found.setdefault(title, []).append(one)
    return sorted(found.items())


def draw_convergence(runs, series, path):
    """Validation loss over training tokens: mean over seeds, and band where there are two or more. Series whose
    parameters match those of standard have panels of their own, with standard."""
    drawn = []
    for title, members in panels(series):
        matched = [one for one in members if one["label"].endswith("matched")]
        drawn.append((title, [one for one in members if one not in matched]))
        if matched:
            standard = [one for one in members if one["mode"] == "standard"]
            drawn.append((f"{title}, parameters of standard", standard + matched))
    fig, axes = subplots(len(drawn), width=6.6, most=2)
    curves = {run["run"]: run["curve"] for run in runs}
    for ax, (title, members) in zip(axes, drawn):
        styles = {}
        for one in sorted(members, key=lambda one: -one["last_val_loss"]["mean"]):                # as the curves end
            tokens = [point[0] for point in curves[one["runs"][0]]]
            points = [mean_interval([curves[run][i][1] for run in one["runs"]]) for i in range(len(tokens))]
            x, y = [t / 1e6 for t in tokens], [mean for mean, _ in points]
            style = STYLES[styles.setdefault(one["mode"], 0) % len(STYLES)]
            styles[one["mode"]] += 1
            color = COLORS[one["mode"]]
            ax.plot(x, y, linestyle=style, color=color, linewidth=1.4, marker="o", markersize=2.5, label=one["label"])
            if len(one["runs"]) > 1:
                ax.fill_between(x, [m - h for m, h in points], [m + h for m, h in points], color=color, alpha=0.06)
        ax.set(xlabel="training tokens (millions)", ylabel="validation loss (nats/token)")
        ax.set_title(title, fontsize=9)
        ax.grid(alpha=0.3)
        ax.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    save(fig, path)


def draw_final_loss(series, path):
    """Last validation loss of every series, with its interval, best on top."""
    drawn = panels(series)
    tallest = max(len(members) for _, members in drawn)
    fig, axes = subplots(len(drawn), height=1.2 + 0.26 * tallest, width=5.6)
    for ax, (title, members) in zip(axes, drawn):
        members = sorted(members, key=lambda one: -one["last_val_loss"]["mean"])
        for i, one in enumerate(members):
            loss = one["last_val_loss"]
            ax.errorbar(loss["mean"], i, xerr=loss["half"] or 0, fmt="o", color=COLORS[one["mode"]], capsize=3)
        names = [f"{one['label']} ({one['params'] / 1e6:.1f}M, n={len(one['seeds'])})" for one in members]
        ax.set_yticks(range(len(members)), names, fontsize=7.5)
        ax.set(xlabel="last validation loss (nats/token)")
        ax.set_title(title, fontsize=9)
        ax.grid(axis="x", alpha=0.3)
    save(fig, path)


def draw_learning_rate(series, path):
    """Last validation loss over the learning rate, for the series of sweeps, a panel per data, batch and steps."""
    drawn = {}
    for one in series:
        if found := SWEPT.fullmatch(one["series"]):
            title = f"{one['data']}, {one['batch']} x {one['context']}, {one['steps']:,} steps"
            drawn.setdefault(title, {}).setdefault(found[1], []).append(one)
    fig, axes = subplots(len(drawn), height=4.2, width=6.2)
    for ax, (title, sweeps) in zip(axes, sorted(drawn.items())):
        styles = {}
        for name, members in sorted(sweeps.items()):
            members = sorted(members, key=lambda one: one["lr"])
            mode = members[0]["mode"]
            style = STYLES[styles.setdefault(mode, 0) % len(STYLES)]
            styles[mode] += 1
            ax.plot([one["lr"] for one in members], [one["last_val_loss"]["mean"] for one in members], linestyle=style,
                    color=COLORS[mode], marker="o", markersize=4, label=members[0]["label"])
        ax.set(xscale="log", xlabel="learning rate", ylabel="last validation loss (nats/token)")
        ax.set_title(title, fontsize=9)
        ax.grid(alpha=0.3, which="both")
        ax.legend(fontsize=7)
    save(fig, path)


def frontier(points):
    """The points (bytes, loss) that no other beats in both, by bytes."""
    best, kept = float("inf"), []
    for point in sorted(points):
        if point[1] < best:
            best = point[1]
            kept.append(point)
    return kept


def draw_pareto(series, path):
    """Loss against bytes of KV cache per token: a panel where several cache formats were measured, else fp16 only. The
    points of the frontier are named."""
    drawn = panels(series)
    fig, axes = subplots(len(drawn), height=4.0)
    shown = set()                                          # cache formats
    for ax, (title, members) in zip(axes, drawn):
        points = {}                                        # (bytes, loss): name
        measured = any(one["caches"] for one in members)
        for one in members:
            plain = {"fp16": dict(one["last_val_loss"], bytes_per_token=one["kv_bytes_fp16"])}
            for name, cache in (one["caches"] if measured else plain).items():
                if name in MARKERS:
                    shown.add(name)
                    point = cache["bytes_per_token"], cache["mean"]
                    points[point] = f"{one['label']}, {name}"
                    ax.plot(*point, MARKERS[name], color=COLORS[one["mode"]], markersize=5, alpha=0.85,
                            fillstyle="none" if one["label"].endswith("matched") else "full")
        edge = frontier(points)
        ax.step(*zip(*edge), where="post", color="#555555", linewidth=1, linestyle=":")
        for i, point in enumerate(edge, 1):
            ax.annotate(i, point, (2, -2), textcoords="offset points", fontsize=7, va="top")
        names = "\n".join(f"{i} {points[point]}" for i, point in enumerate(edge, 1))
        ax.text(0.98, 0.98, names, transform=ax.transAxes, fontsize=6, ha="right", va="top")
        ax.margins(y=0.18)
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        ax.set(xlabel="KV cache (bytes/token, all layers)",
               ylabel="loss through the cache (nats/token)" if measured else "last validation loss (nats/token)")
        ax.set_title(title, fontsize=9)
        ax.grid(alpha=0.3, which="both")
    modes = [mode for mode in COLORS if any(one["mode"] == mode for _, members in drawn for one in members)]
    handles = [plt.Line2D([], [], marker="o", linestyle="", color=COLORS[mode], label=mode) for mode in modes]
    handles += [plt.Line2D([], [], marker=m, linestyle="", color="#777777", label=f) for f, m in MARKERS.items()
                if f in shown]
    if any(one["label"].endswith("matched") for one in series):
        handles.append(plt.Line2D([], [], marker="o", linestyle="", color="#777777", fillstyle="none",
                                  label="parameters of standard"))
    handles.append(plt.Line2D([], [], color="#555555", linestyle=":", label="frontier"))
    fig.legend(handles=handles, fontsize=8, loc="outside lower center", ncols=len(handles), frameon=False)
    save(fig, path)


def pm(value, digits=3):
    """mean ± half-width of a dict of both."""
    return f"{value['mean']:.{digits}f}" + (f" ± {value['half']:.{digits}f}" if value["half"] is not None else "")


def write_tables(series, out):
    """table_main.tex: the small models; table_scale.tex: those of 100M parameters and more."""
    head = ("model", "data", "parameters", "KV B/token", "tokens", "seeds", "last loss", "best loss")
    for name, chosen in (("main", lambda n: n < 1e8), ("scale", lambda n: n >= 1e8)):
        rows = [(one["label"], one["data"], f"{one['params'] / 1e6:.1f}M", one["kv_bytes_fp16"],
                 f"{one['steps'] * one['batch'] * one['context'] / 1e6:.1f}M", len(one["seeds"]),
                 pm(one["last_val_loss"]), pm(one["best_val_loss"])) for one in series if chosen(one["params"])]
        text = latex_table(head, rows, "Validation loss in nats per token, mean and 95 % t-interval over seeds.")
        (out / f"table_{name}.tex").write_text(text if rows else "% no such run is finished\n")


def missing_runs(runs, manifest):
    """{group: (finished, listed)} of {group: runs that the manifest lists}, and the names of those not finished."""
    names, counts, missing = {run["run"] for run in runs}, {}, []
    for group, listed in manifest.items():
        counts[group] = (len(names & set(listed)), len(listed))
        missing += [name for name in listed if name not in names]
    return counts, missing


def results_section(series, runs):
    """The README's table of results, in Markdown: a line per series, sweeps of the learning rate left out."""
    head = ("model", "data, batch", "parameters", "KV B/token fp16", "tokens", "seeds", "last val loss", "best",
            "tokens/s", "runs", "commit")
    rows, by_name = [], {run["run"]: run for run in runs}
    for one in (one for _, members in panels(series) for one in members):
        members = [by_name[name] for name in one["runs"]]
        commits = {"unknown" if r["commit"] is None else r["commit"][:7] + "+" * bool(r["dirty"]) for r in members}
        rows.append((one["label"], f"{one['data']}, {one['batch']} x {one['context']}", f"{one['params'] / 1e6:.2f}M",
                     f"{one['kv_bytes_fp16']:,}", f"{members[0]['tokens'] / 1e6:.2f}M", len(one["seeds"]),
                     pm(one["last_val_loss"]), pm(one["best_val_loss"]), f"{one['tokens_per_second']:,.0f}",
                     f"`{one['series']}`", ", ".join(f"`{commit}`" for commit in sorted(commits))))
    hardware = sorted({f"{r['hardware']}, {r['dtype']}{', compiled' * r['compiled']}" for r in runs})
    return "\n".join([*markdown(head, rows), "", f"Hardware: {'; '.join(hardware)}. ±: 95 % t-interval over seeds; a "
                      "line of one seed carries none. A commit with + had uncommitted changes."])


def number(value):
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def claims_section(rows):
    """The ledger, in Markdown: what the papers claim, then the controls."""
    lines = []
    for title, control in (("The papers' claims", False), ("Controls that a reader would ask for", True)):
        chosen, table = [row for row in rows if (row["source"] == "control") == control], []
        for row in chosen:
            ours = number(row["ours"]) + (f" ± {number(row['interval'])}" if row["interval"] is not None else "")
            note = f": {row['note']}" if row["note"] and row["verdict"] != "reproduced" else ""
            table.append((row["statement"], row["source"], number(row["reported"]), ours, row["unit"],
                          f"**{row['verdict']}**{note}", row["where"] or "-"))
        counts = ", ".join(f"{sum(row['verdict'] == name for row in chosen)} {name}" for name in VERDICTS)
        head = ("claim", "source", "reported", "ours", "unit", "verdict", "from")
        lines += [f"{title}: {counts}.", "", *markdown(head, table), ""]
    return "\n".join(lines).rstrip()


def speed_section(benchmarks):
    """The README's figures of speed and memory, in Markdown; what was not measured is left out."""
    lines = []
    if speed := benchmarks.get("train_speed"):
        rows = [(r["name"], f"{r['params'] / 1e6:.1f}M", f"{r['tokens_per_second']:,.0f}", f"{r['times_naive']:.2f}",
                 f"{r['times_llama']:.2f}" if "times_llama" in r else "", f"{r['share_of_matmul_rate']:.2f}")
                for r in speed["rows"]]
        lines += ["Training steps of decoupled 32/64 (d_model 512, 6 layers, vocabulary 33,278, batch 8 x 256) against "
                  f"baselines in the same process, medians of {speed['rounds']}; {speed['env']['cpu']}, "
                  f"{speed['env']['threads']} threads. Matrix products of the model's shapes alone: "
                  f"{speed['matmul_tflops']:.2f} TFLOP/s in bfloat16.", "",
                  *markdown(("", "parameters", "tokens/s", "x naive", "x Llama", "share of matrix-product rate"), rows),
                  ""]
    if memory := benchmarks.get("loss_memory"):
        chunked, full = (memory[name] / 2**20 for name in ("chunked", "full logits"))
        lines += [f"A training step of that model takes {chunked:,.0f} MiB more than before the first step with the "
                  f"chunked cross-entropy, {full:,.0f} MiB with all logits in memory.", ""]
    if tokens := benchmarks.get("tokenize_speed"):
        rates = [statistics.median(tokens["tokens_per_second"][name]) / 1e6 for name in ("pipeline", "tiktoken")]
        lines += [f"`prepare_fineweb.py` tokenises {rates[0]:.2f}M GPT-2 tokens/s from .jsonl to a finished file, "
                  f"tiktoken itself {rates[1]:.2f}M in memory, on {tokens['cores']} cores: a ratio of "
                  f"{tokens['ratio']:.2f}.", ""]
    return "\n".join(lines).rstrip() or "Not measured yet."


def cache_section(benchmarks):
    """The README's figures of the KV cache's formats: quality, decode time, memory of long contexts, in Markdown."""
    lines = []
    if quality := benchmarks.get("cache_quality"):
        rows = [(f"`{r['run']}`", r["policy"] + ", rotated" * r["rotate"], f"{r['bytes_per_token']:,}",
                 f"{r['delta_nll']:+.4f} ± {r['standard_error']:.4f}", f"{r['kl']:.5f}", f"{100 * r['top1']:.2f} %")
                for r in quality["rows"] if r["policy"] != "fp32"]
        tokens = ", ".join(sorted({f"{r['tokens']:,}" for r in quality["rows"]}))
        lines += [f"Against a float32 cache, {tokens} validation tokens, all read through quantised keys and values "
                  "(no residual window); ΔNLL in nats per token ± standard error over windows, KL divergence of the "
                  "next token's distribution, share of tokens with the same likeliest next token:", "",
                  *markdown(("run", "cache", "B/token", "ΔNLL", "KL", "same top-1"), rows), ""]
    if speed := benchmarks.get("decode_speed"):
        names = list(speed["rows"][0]["ms"])
        rows = [(r["shape"], f"{r['tokens']:,}", *(f"{r['ms'][name]:.2f}" for name in names),
                 f"{r['ms']['dequantised'] / r['ms']['kernel']:.1f}", f"{r['ms']['kernel'] / r['ms'][names[3]]:.2f}")
                for r in speed["rows"]]
        lines += ["Milliseconds of one decode step's attention in one layer (heads x semantic/geometric/value width), "
                  f"hetero cache, batch 1, medians of {speed['rounds']}, interleaved; {speed['env']['cpu']}, "
                  f"{speed['env']['threads']} threads. `kernel`: {speed['rows'][0]['kernel']}; `torch`: chunks; "
                  f"`dequantised`: the whole cache in float32 first; `{names[3]}`: PyTorch's fused attention over an "
                  "unquantised cache of the same widths; `standard`: the same at 64 channels a head.", "",
                  *markdown(("heads x widths", "tokens", *names, "dequantised / kernel", f"kernel / {names[3]}"), rows),
                  ""]
    if long := benchmarks.get("long_context"):
        lines += [f"A prompt of {long['tokens']:,} tokens (decoupled 32/64, d_model 512, 6 layers, hetero cache of "
                  f"{long['cache_bytes'] / 2**20:.1f} MiB): prefill in chunks peaks at "
                  f"{long['prefill_extra_bytes'] / 2**20:.0f} MiB beyond the cache and takes "
                  f"{long['prefill_seconds']:.0f} s; a decode step after it at "
                  f"{long['decode_extra_bytes'] / 2**20:.0f} MiB and {long['decode_ms']:.0f} ms.", ""]
    return "\n".join(lines).rstrip() or "Not measured yet."


def replace_section(text, name, content):
    """text with what stands between the marks of that name replaced. Raises SystemExit when it lacks them."""
    begin, end = f"<!-- {name}: written by plot_results.py -->", f"<!-- end of {name} -->"
    if begin not in text or end not in text:
        sys.exit(f"error: the README lacks the marks {begin} and {end}; add them where the section belongs")
    return f"{text[:text.index(begin) + len(begin)]}\n{content}\n{text[text.index(end):]}"


def report(results, missing):
    """report.md: the ledger, what was run, what is missing."""
    hardware = sorted({run["hardware"] for run in results["runs"]})
    counts = [(group, done, listed) for group, (done, listed) in results["manifest"].items()]
    return "\n".join(["# Report", "", "Written by plot_results.py from runs/ and claims.json.", "", "## Claims", "",
                      claims_section(results["claims"]), "", "## Runs", "",
                      results_section(results["series"], results["runs"]), "", "## KV cache", "",
                      cache_section(results["benchmarks"]), "", "## Evaluations", "", evals_section(results), "",
                      "## The manifest", "",
                      *markdown(("group", "finished", "listed"), counts), "", f"Run on: {'; '.join(hardware)}.", "",
                      "Not run: " + (", ".join(missing) or "nothing") + ".", ""])


def write_sections(text, results):
    """The README's text with the sections that results.json decides."""
    text = replace_section(text, "results", results_section(results["series"], results["runs"]))
    text = replace_section(text, "claims", claims_section(results["claims"]))
    text = replace_section(text, "evaluations", evals_section(results))
    text = replace_section(text, "speed", speed_section(results["benchmarks"]))
    return replace_section(text, "cache", cache_section(results["benchmarks"]))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of run folders (runs)")
    parser.add_argument("--out", type=Path, default=Path("assets"), help="where figures and results.json go (assets)")
    parser.add_argument("--readme", default="README.md", help="file whose table is rewritten; empty: none (README.md)")
    args = parser.parse_args(argv)
    runs = read_runs(args.runs)
    if not runs:
        sys.exit(f"error: no finished run under {args.runs}; train one first, for example with `make demo`")
    args.out.mkdir(parents=True, exist_ok=True)
    found = {name: args.runs / "bench" / f"{name}.json" for name in BENCHMARKS}
    benchmarks = {name: json.loads(path.read_text()) for name, path in found.items() if path.exists()}
    manifest = read_manifest(HERE / "paper_manifest.json")
    manifest = {group: [run.name for run in list_runs(manifest, [group], "data", "runs")] for group in manifest}
    counts, missing = missing_runs(runs, manifest)
    choose_rates(runs, {re.sub(r"_s\d+$", "", name) for names in manifest.values() for name in names})
    evals = read_evals(args.runs)
    results = {"runs": runs, "series": make_series(runs, evals), "evals": evals, "benchmarks": benchmarks,
               "manifest": counts}
    results["claims"] = ledger(results)
    (args.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (args.out / "report.md").write_text(report(results, missing))
    write_tables(results["series"], args.out)
    series, swept = results["series"], any(SWEPT.fullmatch(one["series"]) for one in results["series"])
    for name, draw, there in (("convergence", partial(draw_convergence, runs), panels(series)),
                              ("final_loss", draw_final_loss, panels(series)),
                              ("pareto_memory_vs_loss", draw_pareto, panels(series)),
                              ("learning_rate", draw_learning_rate, swept)):
        if there:
            draw(series, args.out / f"fig_{name}.png")
        else:
            print(f"no runs for fig_{name}: not drawn", file=sys.stderr)
    if missing := draw_evals(evals, args.out):
        print(f"no results of eval_dba.py for {', '.join(missing)}: not drawn", file=sys.stderr)
    for group, (done, listed) in counts.items():
        if args.readme and done < listed:
            print(f"{group}: {listed - done} of {listed} runs of the manifest are missing", file=sys.stderr)
    if args.readme:
        readme = Path(args.readme)
        readme.write_text(write_sections(readme.read_text(), results))
    print(f"{len(runs)} runs: results.json, report.md, tables and figures in {args.out}"
          + (f", the sections of {args.readme}" if args.readme else ""))


if __name__ == "__main__":
    main()
