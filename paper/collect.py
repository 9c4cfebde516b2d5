"""
What eval_dba.py measured: figures and the README's section, from runs/<id>/eval_*.json and kv_policy.json.

plot_results.py calls this. read_evals() keeps of each file what is drawn or tabled; results.json holds nothing else.
"""

import json
import statistics
import sys

import matplotlib.pyplot as plt

from figures import MARKERS, PALETTE, markdown, save, subplots
from train_dba import BROKEN, Config

RANKS = {"entropy_rank_sigma": "entropy σ", "entropy_rank_lambda": "entropy λ",
         "participation_ratio": "participation", "stable_rank": "stable", "k90": "k90", "k95": "k95", "k99": "k99"}
PATHS = {"sem": "semantic", "geo": "geometric", "total": "all"}
FORMAT_COLORS = dict(zip(MARKERS, PALETTE))
CHANCE = {"arc_easy": 0.25, "hellaswag": 0.25, "piqa": 0.5, "winogrande": 0.5, "boolq": 0.5}


# -----------------------------------------------------------------------------
# Files

def keep(result, *names):
    return {name: result[name] for name in names}


def keep_ppl(result):
    model = Config(**result["model"]["config"])
    bits = 8 * result["bytes_per_token"] / sum(model.attention.streams.values()) / model.layers
    return dict(keep(result, "loss", "ppl", "bpb", "tokens", "block", "stride", "bytes_per_token"), bits_per_value=bits)


def keep_tasks(result):
    return {name: {key: value for key, value in task.items() if key not in ("items", "correct")}
            for name, task in result["tasks"].items()}


def keep_probes(result):
    return dict(compare=result["compare"], counts=[count for count in result["counts"] if count["kind"] == "all"])


def left_out(spectra):
    """Energy of a head's score beyond its first 1, 2, ... singular values: the median over heads of spectra [H][w]."""
    beyond = [[sum(energy[r:]) for r in range(1, len(energy))] for energy in spectra]
    return [float(f"{statistics.median(column):.4g}") for column in zip(*beyond)]


def keep_rank(result):
    """Per path, stage of RoPE and matrix: medians over layers of the ranks, trained and at initialisation; of QK what
    narrower scores leave out, layer by layer."""
    places = {}
    for stage in ("trained", "initial"):
        for record in result[stage]:
            place = places.setdefault((record["path"], record["rope"], record["of"]), dict(
                keep(record, "path", "rope", "of", "channels"), trained=[], initial=[]))
            place[stage].append(record)
    rows = []
    for place in places.values():
        row = {key: value for key, value in place.items() if key not in ("trained", "initial")}
        for stage in ("trained", "initial"):
            records = place[stage]
            row[stage] = {name: statistics.median(r["ranks"][name] for r in records) for name in RANKS}
            if "share" in records[0]:
                row[stage]["share"] = {width: statistics.median(r["share"][width] for r in records)
                                       for width in records[0]["share"]}
                row[stage]["left_out"] = [left_out(r["spectra"]) for r in records]
        rows.append(row)
    return dict(keep(result, "moment", "tokens", "block"), rows=rows)


def keep_policy(result):
    return dict(keep(result, "formats", "rotate", "residual", "bytes_per_token", "bytes_per_token_with_residual",
                     "thresholds", "short", "long", "kernel", "kernel_ms"), tried=len(result["tried"]), settings=keep(
                         result["settings"], "max_delta_nll", "max_kv_bytes_per_token", "tokens", "long_factor"))


KEPT = {"ppl": keep_ppl, "tasks": keep_tasks, "probes": keep_probes, "rank": keep_rank, "policy": keep_policy,
        "latency": lambda result: result["rows"], "memory": lambda result: result["rows"],
        "sweep": lambda result: dict(formats=result["formats"], rows=result["rows"])}


def hardware_name(env):
    """The device of an env.json; of a CPU its name, with how many threads."""
    cpu = f"{env['cpu']}, {env['threads']} thread{'s' * (env['threads'] > 1)}"
    return cpu if env["device"] == "cpu" else env["device"]


def read_evals(root):
    """{run folder: {file without eval_: what is kept of it, and its `from`: hardware, commit}}."""
    found = {}
    for path in sorted([*root.glob("*/eval_*.json"), *root.glob("*/kv_policy.json")]):
        try:
            result = json.loads(path.read_text())
            env, command = result["env"], result["settings"]["command"]
            kept = {"command": command, "found": KEPT[command](result), "from": dict(
                keep(env, "commit", "dirty"), hardware=hardware_name(env), dtype=result["settings"]["dtype"],
                context=result["model"]["config"]["block"])}
        except (OSError, *BROKEN) as e:
            print(f"{path}: damaged ({type(e).__name__}: {e}), left out", file=sys.stderr)
        else:
            found.setdefault(path.parent.name, {})[path.stem.removeprefix("eval_")] = kept
    return found


def of_command(evals, command):
    """Yield (run folder, name, what was found) of every result of a command."""
    for run, files in evals.items():
        for name, file in files.items():
            if file["command"] == command:
                yield run, name, file["found"]


def caches(evals, run):
    """{cache: what ppl found} of a run folder."""
    return {name.removeprefix("ppl_"): found for other, name, found in of_command(evals, "ppl") if other == run}


# -----------------------------------------------------------------------------
# Figures

def draw_decode(evals, path):
    """Time of decoding over the length of the prompt, per cache format: ms per token and tokens per second."""
    runs = list(of_command(evals, "latency"))
    fig, axes = subplots(2 * len(runs), width=4.6, most=2)
    for i, (run, _, rows) in enumerate(runs):
        for ax, (field, name) in zip(axes[2 * i:2 * i + 2], (("ms_per_token", "ms per token"),
                                                            ("tokens_per_second", "tokens per second"))):
            for cache in dict.fromkeys(row["cache"] for row in rows):
                of_cache = [row for row in rows if row["cache"] == cache]
                ax.plot([row["prompt"] for row in of_cache], [row[field] for row in of_cache], label=cache,
                        marker=MARKERS.get(cache, "x"), markersize=4, color=FORMAT_COLORS.get(cache, "#777777"))
            ax.set(xlabel="tokens in the cache", ylabel=f"decode, {name}")
            ax.set_xscale("log", base=2)
            ax.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
            ax.set_ylim(bottom=0)
            ax.set_title(run, fontsize=9)
            ax.grid(alpha=0.3)
            ax.legend(fontsize=7)
    save(fig, path)


def draw_tasks(evals, path):
    """Accuracy per task and run, with 95 % intervals, and a line where guessing would be."""
    runs = list(of_command(evals, "tasks"))
    names = list(dict.fromkeys(name for _, _, tasks in runs for name in tasks))
    fig, ax = plt.subplots(figsize=(1.6 + 1.4 * len(names), 3.6), layout="constrained")
    width = 0.8 / len(runs)
    for i, (run, _, tasks) in enumerate(runs):
        for x, name in enumerate(names):
            if name in tasks:
                ax.bar(x + (i - (len(runs) - 1) / 2) * width, tasks[name]["acc"], 0.9 * width,
                       color=PALETTE[(1 + i) % len(PALETTE)], yerr=1.96 * tasks[name]["acc_stderr"], capsize=3,
                       label=run if x == 0 else None)
    for x, name in enumerate(names):
        ax.plot([x - 0.45, x + 0.45], [CHANCE[name]] * 2, color="#000000", linestyle="--", linewidth=1,
                label=None if x else "guessing")
    ax.set_xticks(range(len(names)), [f"{name}\n{max(t[name]['n'] for _, _, t in runs if name in t)} items"
                                      for name in names])
    ax.set(ylabel="accuracy", ylim=(0, 1))
    ax.legend(fontsize=8, ncols=len(runs) + 1, loc="upper center", frameon=False)
    save(fig, path)


def last_stage(rows, of):
    """{path: row} of a rank result, after RoPE where the path is rotated."""
    return {row["path"]: row for row in rows if row["of"] == of and row["rope"] in ("after", "none")}


def draw_rank(evals, path):
    """What a score of width r per head would lose, over r: energy of Sq^(1/2) Sk^(1/2) beyond its first r singular
    values, a line per layer, the median over heads; dashed: the model at initialisation, median over layers."""
    panels = [(run, row) for run, _, found in of_command(evals, "rank")
              for row in last_stage(found["rows"], "QK head").values()]
    fig, axes = subplots(len(panels), width=4.4)
    for ax, (run, row) in zip(axes, panels):
        layers = row["trained"]["left_out"]
        for i, beyond in enumerate(layers):
            ax.plot(range(1, len(beyond) + 1), beyond, color=plt.cm.viridis(i / max(1, len(layers) - 1)), linewidth=1)
        beyond = [statistics.median(column) for column in zip(*row["initial"]["left_out"])]
        ax.plot(range(1, len(beyond) + 1), beyond, color="black", linestyle="--", linewidth=1.2,
                label="as train_dba.py initialises it")
        ax.set(yscale="log", ylim=(1e-5, 1.2), xlabel="width r of a head's score",
               ylabel="energy of the score left out")
        ax.set_title(f"{run}, {PATHS[row['path']]} channels, {len(layers)} layers", fontsize=9)
        ax.grid(alpha=0.3)
        ax.legend(fontsize=7)
    bar = fig.colorbar(plt.cm.ScalarMappable(plt.Normalize(0, 1), "viridis"), ax=axes, shrink=0.8)
    bar.set_label("depth of the layer")
    save(fig, path)


FIGURES = {"latency": (draw_decode, "fig_decode"), "tasks": (draw_tasks, "fig_tasks"), "rank": (draw_rank, "fig_rank")}


def draw_evals(evals, out):
    """Draw the figures of the commands that have results. Returns the names of the others."""
    missing = []
    for command, (draw, name) in FIGURES.items():
        if any(of_command(evals, command)):
            draw(evals, out / f"{name}.png")
        else:
            missing.append(name)
    return missing


# -----------------------------------------------------------------------------
# The README's section

def signed(delta):
    """A mean difference with its half-width, where it has one."""
    return f"{delta['mean']:+.4f}" + (f" ± {delta['half']:.4f}" if delta["half"] is not None else "")


def cache_lines(evals, series):
    """Loss through each format of the cache: one table of single checkpoints, one of series, as means over seeds."""
    seeds = {run for one in series if len(one["runs"]) > 1 for run in one["runs"]}
    rows, windows = [], set()
    for run in (run for run in evals if run not in seeds):
        of_run = caches(evals, run)
        for name, found in sorted(of_run.items(), key=lambda item: -item[1]["bytes_per_token"]):
            fp16 = of_run.get("fp16")
            windows.add(f"{run}: {found['tokens']:,} tokens, window {found['block']:,}, stride {found['stride']:,}")
            rows.append((f"`{run}`", name, f"{found['bits_per_value']:.2f}", f"{found['bytes_per_token']:,}",
                         f"{found['loss']:.4f}", f"{found['ppl']:.4f}",
                         *((f"{found['loss'] - fp16['loss']:+.4f}", f"{found['ppl'] / fp16['ppl']:.4f}",
                            f"{fp16['bytes_per_token'] / found['bytes_per_token']:.2f}") if fp16 else ("-",) * 3)))
    lines = []
    if rows:
        lines += ["Loss through the cache (`eval_dba.py ppl`), every token read through keys and values in its format; "
                  "ΔNLL in nats per token and ratio of perplexities against fp16. "
                  f"{'; '.join(sorted(windows))}.", "",
                  *markdown(("run", "cache", "bits/value", "B/token", "loss", "perplexity", "ΔNLL", "ratio",
                             "times smaller"), rows), ""]
    measured = [one for one in series if len(one["runs"]) > 1 and one["caches"]]
    if measured:
        names = [name for name in MARKERS if any(name in one["caches"] for one in measured)]
        rows = [(one["label"], len(one["seeds"]), *(
            (f"{one['caches'][name]['mean']:.3f}" if name == "fp16" else signed(one["caches"][name]["delta"]))
            + f", {one['caches'][name]['bytes_per_token']:,} B" if name in one["caches"] else "-" for name in names))
            for one in sorted(measured, key=lambda one: one["caches"]["fp16"]["mean"])]
        lines += ["The same for the manifest's runs: loss with fp16, then ΔNLL per format, mean and 95 % t-interval "
                  "over seeds of the differences, and bytes per token:", "",
                  *markdown(("model", "seeds", *names), rows), ""]
    return lines


def task_lines(evals, benchmarks):
    rows = [(f"`{run}`", name, metric, task["n"], f"{100 * task[metric]:.1f} ± {196 * task[f'{metric}_stderr']:.1f} %")
            for run, _, tasks in of_command(evals, "tasks") for name, task in tasks.items()
            for metric in ("acc", "acc_norm") if metric in task]
    lines = []
    if rows:
        guess = ", ".join(f"{100 * CHANCE[name]:.0f} % on {name}" for name in dict.fromkeys(row[1] for row in rows))
        lines += [f"Benchmarks by lm-eval, zero-shot, ± 1.96 standard errors; guessing gives {guess}:", "",
                  *markdown(("run", "task", "metric", "items", "accuracy"), rows), ""]
    if parity := benchmarks.get("task_parity"):
        rows = [(r["task"], r["metric"], r["items"], f"{100 * r['ours']:.2f} %", f"{100 * r['theirs']:.2f} %",
                 r["items_that_differ"], f"{r['largest_difference']:.1e}") for r in parity["rows"]]
        lines += [f"The same weights ({parity['ckpt']}) in our model and adapter, and in transformers by lm-eval's own "
                  f"adapter (lm-eval {parity['lm_eval']}), both float32:", "",
                  *markdown(("task", "metric", "items", "ours", "theirs", "items that differ",
                             "largest difference of a log-probability"), rows), ""]
    return lines


def rank_lines(evals):
    rows = []
    for run, _, found in of_command(evals, "rank"):
        for of in ("Q merged", "K merged", "QK head"):
            for path, row in last_stage(found["rows"], of).items():
                cells = [f"{row['trained'][name]:.1f} / {row['initial'][name]:.1f}" for name in RANKS]
                share = row["trained"].get("share")
                rows.append((f"`{run}`", PATHS[path], of, row["channels"], *cells,
                             f"{share['8']:.3f}" if share else ""))
    if not rows:
        return []
    return ["Effective ranks of queries and keys after RoPE (medians over layers; trained / at initialisation), by "
            "definitions that disagree: each is named. `QK head`: of Σq^½ Σk^½ of one head, which no change of basis "
            "alters, with the energy that its first 8 channels hold. Second moments, not centred.", "",
            *markdown(("run", "path", "of", "channels", *RANKS.values(), "share 8"), rows), ""]


def latency_lines(evals):
    lines = []
    for run, name, found in of_command(evals, "latency"):
        names = list(dict.fromkeys(row["cache"] for row in found))
        rows = []
        for prompt in dict.fromkeys(row["prompt"] for row in found):
            of_prompt = {row["cache"]: row for row in found if row["prompt"] == prompt}
            fp16 = of_prompt["fp16"]
            rows.append((f"{prompt:,}", fp16["kernel"], f"{fp16['prefill_seconds']:.2f}", *(
                f"{of_prompt[cache]['ms_per_token']:.2f} ({of_prompt[cache]['ratio_to_fp16']:.2f})" for cache in names),
                f"{100 * fp16['share_of_copy']:.0f} %"))
        source = evals[run][name]["from"]
        lines += [f"Cached decoding of `{run}`, batch 1, {source['dtype']}, {source['hardware']}: ms per token "
                  "(times fp16), and the bytes that a step with fp16 must read, per second, as a share of the rate of "
                  "a plain copy:", "",
                  *markdown(("prompt", "kernel", "prefill s", *names, "of copy rate"), rows), ""]
    return lines


def sweep_lines(evals):
    rows = [(f"`{run}`", f"{evals[run][name]['from']['context']:,}", ", ".join(sorted(set(found["formats"].values()))),
             f"{row['context']:,}", f"{row['cache_bytes'] / 2**20:.1f}" if "cache_bytes" in row else "-", *(
                 format(row[figure], how) if figure in row else "-"
                 for figure, how in (("prefill_seconds", ".1f"), ("ms_per_token", ".2f"), ("loss", ".3f"))),
             row["status"]) for run, name, found in of_command(evals, "sweep") for row in found["rows"]]
    return ["Long prompts (`sweep`). Past the context that a model was trained at, its loss says how a model without "
            "long training fails, not how good long context can be:", "",
            *markdown(("run", "trained at", "cache", "prompt", "cache MiB", "prefill s", "ms/token",
                       "loss of the last chunk", "status"), rows), ""] if rows else []


def memory_lines(evals):
    rows = []
    for run, _, found in of_command(evals, "memory"):
        longest = max(row["tokens"] for row in found)
        for row in (row for row in found if row["tokens"] == longest):
            mib = [f"{row[name] / 2**20:.2f}" if row[name] is not None else "-" for name in (
                "formula_bytes", "cache_bytes", "fill_extra_bytes", "decode_extra_bytes")]
            rows.append((f"`{run}`", f"{longest:,}", row["cache"], f"{row['bytes_per_token']:,}", *mib))
    return ["Memory in MiB (`memory`); beside the cache: what the process (CUDA: PyTorch) took more than before:", "",
            *markdown(("run", "tokens", "cache", "B/token", "by formula", "owned", "beside it, prompt",
                       "beside it, decode step"), rows), ""] if rows else []


def probe_lines(evals):
    checks = ("exact", "content", "preferred", "loop")
    rows = [(f"`{run}`", count["set"], count["n"], *("{} ({:.0f}-{:.0f} %)".format(
        count[check][0], *(100 * x for x in count[check][1:])) for check in checks), f"{count['margin']:+.2f}")
        for run, _, found in of_command(evals, "probes") for count in found["counts"]]
    differences = [f"`{run}` against the compared, {d['set']}: " + ", ".join(
        "{} +{} -{} (p {:.2g})".format(check, *d[check]) for check in checks)
        for run, _, found in of_command(evals, "probes") for d in found["compare"]]
    lines = ["Probes (hits with 95 % Wilson intervals; `preferred`: the target is likelier than the distractor; margin "
             "in nats):", "", *markdown(("run", "cases", "n", *checks, "mean margin"), rows), ""] if rows else []
    return lines + ([f"Exact McNemar tests: {'; '.join(differences)}.", ""] if differences else [])


def policy_lines(evals):
    rows = []
    for run, _, found in of_command(evals, "policy"):
        budget = " or ".join(f"{name.removeprefix('max_').replace('_', ' ')} {value:g}" for name, value in
                             found["settings"].items() if name.startswith("max") and value is not None)
        for name, measured in (("context", found["short"]), ("long", found["long"])):
            if measured:
                rows.append((f"`{run}`", budget, ", ".join(f"{s} {f}" for s, f in found["formats"].items())
                             + ", rotated" * found["rotate"] + f", {found['residual']} newest fp16"
                             * (found["residual"] > 0), found["tried"], f"{found['bytes_per_token']:,}", name,
                             f"{measured['tokens']:,}", f"{measured['delta_nll']:+.5f}", f"{measured['kl']:.5f}",
                             f"{measured['max_delta_logit']:.2f}", found["kernel"] + "".join(
                                 f", {kernel} {ms:.1f} ms" for kernel, ms in found["kernel_ms"].items())))
    return ["Cache policies that `policy` chose; the windows of context length are those it searched on, the long ones "
            "those that only the choice was checked on. `kernel`: the faster, and times of a decode step late in a "
            "long cache:", "", *markdown(
        ("run", "budget", "chosen", "tried", "B/token", "windows", "tokens", "ΔNLL", "KL", "max Δlogit",
         "kernel"), rows), ""] if rows else []


def evals_section(results):
    """The README's section, in Markdown; what was not measured is left out."""
    evals = results["evals"]
    lines = [*cache_lines(evals, results["series"]), *task_lines(evals, results["benchmarks"]), *rank_lines(evals),
             *probe_lines(evals), *policy_lines(evals), *latency_lines(evals), *sweep_lines(evals),
             *memory_lines(evals)]
    sources = sorted({f"{file['from']['hardware']}, {file['from']['dtype']}, commit "
                      f"`{(file['from']['commit'] or 'unknown')[:7]}`{'+' * bool(file['from']['dirty'])}"
                      for files in evals.values() for file in files.values()})
    return "\n".join([*lines, f"Measured on: {'; '.join(sources)}."]) if lines else "Not measured yet."
