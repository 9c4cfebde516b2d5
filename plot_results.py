"""
Figures and tables from run folders: reads only runs/, writes assets/.

    python3 plot_results.py                                # runs/ to assets/ and the README's table
    python3 plot_results.py --runs runs/demo --out runs/demo --readme ""

assets/results.json holds every number that is drawn or tabled, with the run that it comes from; the same runs give the
same bytes. fig_convergence.png shows validation loss over training tokens, one panel per data set. Runs that aren't
finished are named and left out. The README's tables of results and of speed are written between marks.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# Okabe and Ito's colours, which colour-blind readers tell apart; line styles tell them apart in print.
COLORS = {"standard": "#000000", "bottleneck": "#0072B2", "decoupled": "#D55E00", "gqa": "#009E73", "mla": "#CC79A7"}
STYLES = ("-", "--", "-.", ":")
# runs/bench/<name>.json, by `make bench` and `make cache_quality`
BENCHMARKS = ("train_speed", "loss_memory", "tokenize_speed", "decode_speed", "long_context", "cache_quality")


def read_jsonl(path):
    """Lines of a train.jsonl as dicts; a torn last line, left by a kill, is dropped."""
    parsed = []
    for line in path.read_text().splitlines():
        try:
            parsed.append(json.loads(line))
        except ValueError:
            break
    return parsed


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
    lines = read_jsonl(folder / "train.jsonl")
    if not lines or lines[-1]["type"] != "done":
        return None
    meta, env = lines[0], json.loads((folder / "env.json").read_text())
    config = next(line for line in reversed(lines) if line["type"] in ("meta", "resume_meta"))["config"]
    train, evals = ([line for line in lines if line["type"] == kind] for kind in ("train", "eval"))
    return dict(
        run=folder.name, mode=config["attn_mode"], label=label(config), data=Path(config["data"]).name,
        sha256=meta["data"]["sha256"],
        context=config["block"], batch=config["batch_size"] * config["grad_accum"], seed=config["seed"],
        steps=config["steps"], tokens=lines[-1]["tokens"], params=meta["params"]["total"],
        kv_bytes_fp16=meta["kv_bytes_per_token"]["fp16"],
        val_tokens=evals[-1]["val_tokens"], last_val_loss=evals[-1]["val_loss"],
        best_val_loss=evals[-1]["best_val_loss"],
        last_train_loss=train[-1]["loss"], tokens_per_second=statistics.median(line["tok_s"] for line in train),
        hardware=env["device"] if env["device"] != "cpu" else f"{env['cpu']}, {env['threads']} threads",
        dtype=config["dtype"], compiled=config["compile"], commit=env["commit"], dirty=env["dirty"],
        curve=[[line["tokens"], line["val_loss"]] for line in evals])


def read_runs(root):
    """Finished runs under root in the order of their names; the others are named on standard error."""
    runs = []
    for log in sorted(root.glob("*/train.jsonl")):
        run = read_run(log.parent)
        if run is None:
            print(f"{log.parent}: not finished, left out", file=sys.stderr)
        else:
            runs.append(run)
    return runs


def draw_convergence(runs, path):
    """Validation loss over training tokens: a panel per data set and context, a line per run."""
    panels = sorted({(run["data"], run["context"]) for run in runs})
    size = (4.6 * len(panels) + 0.4, 3.6)
    fig, axes = plt.subplots(1, len(panels), figsize=size, squeeze=False, layout="constrained")
    for ax, panel in zip(axes[0], panels):
        for i, run in enumerate(r for r in runs if (r["data"], r["context"]) == panel):
            tokens, losses = zip(*run["curve"])
            ax.plot([t / 1e6 for t in tokens], losses, STYLES[i % 4], color=COLORS[run["mode"]], linewidth=1.6,
                    marker="o", markersize=3, label=run["label"])
        ax.set(title=f"{panel[0]}, context {panel[1]}", xlabel="training tokens (millions)",
               ylabel="validation loss (nats/token)")
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8)
    fig.savefig(path, dpi=200, metadata={"Software": None})
    plt.close(fig)


def markdown(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(map(str, line)) + " |" for line in lines]


def results_section(runs):
    """The README's table of results, in Markdown."""
    head = ("model", "data", "parameters", "KV B/token fp16", "tokens", "seed", "val loss, last", "best", "tokens/s",
            "run", "commit")
    rows = []
    for r in runs:
        commit = "unknown" if r["commit"] is None else r["commit"][:7] + ("+" if r["dirty"] else "")
        rows.append((r["label"], f"{r['data']}, {r['batch']} x {r['context']}", f"{r['params'] / 1e6:.1f}M",
                     f"{r['kv_bytes_fp16']:,}", f"{r['tokens'] / 1e6:.2f}M", r["seed"], f"{r['last_val_loss']:.3f}",
                     f"{r['best_val_loss']:.3f}", f"{r['tokens_per_second']:,.0f}", f"`{r['run']}`",
                     f"`{commit}`"))
    hardware = sorted({f"{r['hardware']}, {r['dtype']}{', compiled' * r['compiled']}" for r in runs})
    return "\n".join([*markdown(head, rows), "", f"Hardware: {'; '.join(hardware)}. One seed a row: differences "
                      "between rows carry no interval. A commit with + had uncommitted changes."])


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


def write_sections(text, results):
    """The README's text with the sections that results.json decides."""
    text = replace_section(text, "results", results_section(results["runs"]))
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
    results = {"runs": runs, "benchmarks": benchmarks}
    (args.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    draw_convergence(runs, args.out / "fig_convergence.png")
    if args.readme:
        readme = Path(args.readme)
        readme.write_text(write_sections(readme.read_text(), results))
    print(f"{len(runs)} runs: {args.out / 'results.json'}, {args.out / 'fig_convergence.png'}"
          + (f", the tables in {args.readme}" if args.readme else ""))


if __name__ == "__main__":
    main()
