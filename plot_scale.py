"""
What devices measured, beside the formulas: the tables of docs/scale.md, and how the cost of a step and a token grows.

    python3 plot_scale.py                                  # runs/bench/ to docs/scale.md and two figures
    python3 plot_scale.py --bench my_bench --page "" --out .

Reads the results of bench_dba.py, benchmarks/train_speed.py and benchmarks/llama_cpp.py,
<bench>/<device>/<anything>.json; rehearsals at toy size are left out. The page's block is rewritten between its two
marks. What is extrapolated says so: attention of a model of 7B parameters over 131,072 tokens, from the bytes of its
cache by formula and the bytes per second that were measured at the longest context.
"""

import argparse
import math
import statistics
import sys
from pathlib import Path

from bench_dba import DECODED, VOCAB
from estimate import training_memory
from paper.report import replace_block
from paper.style import COLORS, MARKERS, OTHERS, log2_x, markdown, save, subplots, write_text
from train_dba import BROKEN, EXPS, SIZES, Parser, UserError, brief, bytes_per_token, exit_code, make_config, read_json

DOCUMENT = {"block": str, "toy": bool, "rows": list, "clock?": str, "load?": float,
            "env": {"device": str, "cpu?": str, "threads?": int, "torch": str, "commit": str, "dirty": bool}}
LAYERS = SIZES["1b"]["layers"]                             # of the suite whose layer `decode` measures
BIG = dict(layers=32, d_model=4096)                        # 7B, with 32 heads of twice the width
NEAR, FAR = 4096, 131_072                                  # tokens: time grows from here on; extrapolated to
WIDTHS = ("sem_dim", "geo_dim", "kv_lora_rank", "rope_dim")
MODES = {"standard": "standard", "gqa": "gqa", "8+32": "decoupled", "mla": "mla"}                 # of what is decoded


# -----------------------------------------------------------------------------
# Results

def read_device(folder: Path) -> tuple[dict, dict]:
    """({block: rows}, environment of the first file, with the device's `name`, the `clock`, the largest `load` and the
    `commits` of all files, + for uncommitted changes) of one device's results. Raises UserError for a damaged file."""
    blocks, env, loads, commits = {}, None, [], set()
    for path in sorted(folder.glob("*.json")):
        try:
            document = read_json(path, DOCUMENT, limit=2**24)
        except (*BROKEN, OSError) as e:
            raise UserError(f"{path} is no result of bench_dba.py ({brief(e)})") from None
        if not document["toy"]:
            blocks.setdefault(document["block"], []).extend(document["rows"])
            env = env or {**document["env"], "clock": document.get("clock")}
            loads.append(document.get("load", 0.0))
            commits.add(document["env"]["commit"][:7] + ("+" if document["env"]["dirty"] else ""))
    if env:
        name, threads = env["device"], env.get("threads")
        if name == "cpu":
            name = env.get("cpu", "cpu") + (f", {threads} thread{'s' * (threads > 1)}" if threads else "")
        env |= {"name": name, "load": max(loads), "commits": sorted(commits)}
    return blocks, env


def formula_gib(row: dict) -> float | None:
    """Peak memory of a row of `train` by formula, GiB; None for what is no preset of ours."""
    if row["case"] not in EXPS:
        return None
    cfg = make_config(data="-", exp=row["case"], batch_size=row["micro"], block=row["block"], compile=row["compiled"])
    return training_memory(cfg, VOCAB)["peak"] / 2**30


def decoded(case: str, layers: int = LAYERS, scale: int = 1, d_model: int = 2048):
    """Config of a case of `decode`, its heads `scale` times as wide."""
    settings = dict(next(settings for name, settings, _ in DECODED if name == case))
    settings |= {name: scale * settings[name] for name in WIDTHS if name in settings}
    return make_config(data="-", n_head=32, d_model=d_model, layers=layers, **settings)


def fitted_exponent(line: list) -> float:
    """Of x in the times of a curve [(x, time)]: by least squares over the logarithms of all its points."""
    values, seconds = zip(*line)
    return statistics.linear_regression([math.log(v) for v in values], [math.log(s) for s in seconds]).slope


def curves(rows: list) -> dict:
    """{(case, format, kernel): [(context, row)]} of one sequence, in order, where two contexts at least are long."""
    by_line = {}
    for row in rows:
        if row["batch"] == 1:
            by_line.setdefault((row["case"], row["format"], row["kernel"]), []).append((row["tokens"], row))
    return {name: sorted(line, key=lambda point: point[0]) for name, line in by_line.items()
            if sum(tokens >= NEAR for tokens, _ in line) > 1}


def context_exponent(line: list) -> float:
    """Of the context in the time of such a curve, from NEAR tokens on."""
    return fitted_exponent([(tokens, row["us"]) for tokens, row in line if tokens >= NEAR])


def extrapolated(name: tuple, line: list) -> tuple[float, float]:
    """(GiB, ms a token) of the cache of a model of 7B parameters at FAR tokens, read as fast as a curve's last."""
    size = FAR * bytes_per_token(decoded(name[0], scale=2, **BIG), name[1])
    return size / 2**30, size / line[-1][1]["gb_per_s"] / 1e6


def growth_curves(rows: list) -> dict:
    """{(case, axis): [(value, seconds)]} of training steps, in order."""
    by_line = {}
    for row in rows:
        by_line.setdefault((row["case"], row["axis"]), []).append((row["value"], row["seconds"]))
    return {name: sorted(line) for name, line in by_line.items()}


# -----------------------------------------------------------------------------
# Text

def cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def percent(share: float | None, digits: int) -> str:
    return "-" if share is None else f"{100 * share:.{digits}f} %"


def formula_lines() -> list[str]:
    """Memory of the suite's presets by formula: what fits a GPU."""
    steps = [dict(batch_size=2), dict(batch_size=8), dict(batch_size=16),
             dict(batch_size=8, activation_checkpointing=True)]
    cells = []
    for exp in EXPS:
        peaks = []
        for settings in steps:
            cfg = make_config(data="-", exp=exp, compile=True, **settings)
            peaks.append(f"{training_memory(cfg, VOCAB)['peak'] / 2**30:.1f}")
        cells.append((exp.removeprefix("paper_"), *peaks))
    return ["GiB of a compiled step of one micro-batch, **by formula**, context 2048:", "",
            *markdown(("preset", "2", "8", "16", "8, activation checkpointing"), cells), ""]


def train_lines(rows: list) -> list[str]:
    cells = []
    for row in rows:
        if row["tok_s"] is None:
            cells.append((row["case"], row["micro"], row["why"], *[""] * 7))
            continue
        formula = formula_gib(row)
        off = None if formula is None else 100 * (formula / row["gib"] - 1)
        cells.append((row["case"].removeprefix("paper_"), row["micro"], "compiled" if row["compiled"] else "eager",
                      f"{row['tok_s']:,.0f} [{row['slowest']:,.0f}..{row['fastest']:,.0f}]", f"{row['ms']:.0f}",
                      percent(row["mfu"], 1), percent(row["mfu_full"], 1), f"{row['gib']:.1f}",
                      cell(formula, ".1f"), cell(off, "+.1f")))
    return ["Training steps of the 1B suite (context 2048, bfloat16): median tokens/s [slowest..fastest]; MFU with the "
            "causal half of attention counted, and without that half as PaLM and nanochat count; peak memory beside "
            "the formula's, GiB, and by how many per cent the formula is off:", "",
            *markdown(("preset", "micro-batch", "", "tokens/s", "ms", "MFU", "MFU, full", "peak", "formula", "off, %"),
                      cells), ""]


def sdpa_lines(rows: list) -> list[str]:
    backends = list(dict.fromkeys(row["backend"] for row in rows))
    by_case = {}
    for row in rows:
        by_case.setdefault(row["case"], {})[row["backend"]] = row["ms"]
    cells = [(case, *(cell(ms.get(backend), ".2f") for backend in backends)) for case, ms in by_case.items()]
    return ["Attention alone, forward and backward, of 8 x 2048 tokens with 32 heads, ms by back-end of PyTorch (auto: "
            "its own choice):", "", *markdown(("heads", *backends), cells), ""]


def decode_lines(rows: list) -> list[str]:
    cells = [(row["case"], row["format"], row["kernel"], row["batch"], f"{row['tokens']:,}", f"{row['us']:.1f}",
              f"{row['cache_mib']:,.1f}", f"{row['gb_per_s']:,.0f}", percent(row["share_of_copy"], 0),
              cell(row.get("times_faster_than_sdpa"), ".2f"))
             for row in sorted(rows, key=lambda row: (row["batch"], row["tokens"]))]
    lines = ["One decode step's attention in one layer at 32 heads (on a GPU as a CUDA graph); the share is of the "
             "rate of a copy (above 100 % caches help), the last column how many times as fast as PyTorch's "
             "attention over an unquantised cache of standard attention:", "",
             *markdown(("heads", "format", "kernel", "batch", "context", "µs", "MiB read", "GB/s", "of a copy",
                        "x SDPA"), cells), ""]
    grown = []
    for name, line in curves(rows).items():
        gib, ms = extrapolated(name, line)
        tokens, last = line[-1]
        grown.append((*name, f"{context_exponent(line):.2f}", f"{LAYERS * last['us'] / 1000:.2f}", f"{gib:.2f}",
                      f"{ms:.2f}"))
    if grown:
        lines += [f"How that grows: the exponent of the context, fitted from {NEAR:,} tokens on; ms a "
                  f"token of {LAYERS} layers at {tokens:,} tokens; **extrapolated by formula, not measured**: GiB of "
                  f"the cache of a 7B model ({BIG['layers']} layers, d_model {BIG['d_model']}, 32 heads twice as wide) "
                  f"at {FAR:,} tokens, and ms a token to read it at the GB/s of the longest context measured:", "",
                  *markdown(("heads", "format", "kernel", "exponent", "1B, ms", "7B, GiB", "7B, ms"), grown), ""]
    return lines


def check_lines(rows: list) -> list[str]:
    worst = max(row["difference"] for row in rows)
    agreed = sum(row["ok"] for row in rows)
    return [f"The {rows[0]['kernel']} kernel against the torch path: {agreed} of {len(rows)} combinations of mode, "
            f"format and residual window agree, the largest difference is {worst:.1e}.", ""]


def ceiling_lines(rows: list) -> list[str]:
    said = [f"{row['what']} {row['gb_per_s']:,.0f} GB/s" if "gb_per_s" in row else
            f"{row['what']} {row['tflops']:,.3g} TFLOP/s" for row in rows]
    return [f"Ceilings: {', '.join(said)}.", ""]


def speed_lines(rows: list) -> list[str]:
    cells = [(row["name"], f"{row['cpu_seconds']:.2f}",
              *(cell(row.get(f"{ratio}_cpu"), ".2f") for ratio in ("share_of_matmul_rate", "times_naive",
                                                                    "times_llama"))) for row in rows]
    return ["Training steps of decoupled 32/64 (d_model 512, 6 layers, vocabulary 33,278, batch 8 x 256) beside "
            "baselines, each in a process of its own, in turn; ratios of CPU time to the faster type of the matrix "
            "products alone, of the naive model and of transformers' Llama:", "",
            *markdown(("", "CPU s a step", "of products", "x naive", "x Llama"), cells), ""]


def compact_lines(rows: list) -> list[str]:
    cells = []
    for row in rows:
        ms = row["ms"]
        ratios = [cell(ms[f"compact {dtype}"] / ms[f"ours {dtype}"] if f"compact {dtype}" in ms else None, ".2f")
                  for dtype in ("float32", "bfloat16")]
        cells.append((f"{row['tokens']:,} x {row['width']} x {row['types']:,}", f"{ms['ours float32']:,.0f}",
                      f"{ms['ours bfloat16']:,.0f}", *ratios))
    return ["The loss with its gradients: ms of ours, and how many times as long PyTorch's `F.linear_cross_entropy` in "
            "compact chunks takes:", "",
            *markdown(("tokens x width x types", "float32", "bfloat16", "theirs, float32", "theirs, bfloat16"), cells),
            ""]


def llama_cpp_lines(rows: list) -> list[str]:
    cells = []
    for row in rows:
        steps = ", ".join(f"{int(depth):,}: {ms:.1f}" for depth, ms in row["cpu_ms"].items())
        cells.append((row["format"], row["engine"], f"{row['slope_cpu_ms']:.2f}", steps))
    return ["A decode step of SmolLM2-135M here and in llama.cpp, CPU ms on one thread each: what 1,000 cached tokens "
            "add between two depths, and a whole step there (llama.cpp's weights have 4 bits):", "",
            *markdown(("cache", "", "ms per 1,000 tokens", "cached tokens: ms"), cells), ""]


def growth_lines(rows: list) -> list[str]:
    cells = []
    for (case, axis), line in growth_curves(rows).items():
        points = ", ".join(f"{value}: {1000 * seconds:,.0f}" for value, seconds in line)
        cells.append((case, axis, points, f"{fitted_exponent(line):.2f}"))
    return ["How a training step grows: ms by batch, width and depth, the others at 4 x 256 tokens, d_model 256, 4 "
            "layers; the exponent is fitted by least squares over the logarithms:", "",
            *markdown(("attention", "axis", "value: ms", "exponent"), cells), ""]


def generate_lines(rows: list) -> list[str]:
    cells = [(row["case"], row["format"], row["kernel"], row["dtype"], f"{row['cache_mib']:,.1f}",
              f"{row['ttft_ms']:,.0f}", f"{row['times_ttft']:.2f}", f"{row['ms']:,.1f}", f"{row['times_ms']:.2f}")
             for row in rows]
    return [f"A whole model of {rows[0]['params'] / 1e6:,.0f}M parameters as `--mode sample` runs it, after a prompt "
            f"of {rows[0]['tokens']:,} tokens: the first token, and each later one, both also as how many times as "
            "fast as the first row:", "",
            *markdown(("attention", "cache", "kernel", "weights", "cache, MiB", "first, ms", "x", "later, ms", "x"),
                      cells), ""]


def host_lines(rows: list) -> list[str]:
    said = []
    for row in rows:
        rate = f" ({row['mb_per_s']:,.0f} MB/s)" if row.get("mb_per_s") else ""
        said.append(f"{row['what']} {row['why']}" if "why" in row else f"{row['what']} {row['seconds']:.3g} s{rate}")
    return [f"Around the model: {'; '.join(said)}.", ""]


LINES = {"ceilings": ceiling_lines, "check": check_lines, "train": train_lines, "speed": speed_lines,
         "compact": compact_lines, "growth": growth_lines, "sdpa": sdpa_lines, "llama_cpp": llama_cpp_lines,
         "decode": decode_lines, "generate": generate_lines, "host": host_lines}


def block_of(devices: dict) -> str:
    """The page's block of {folder's name: (blocks, env)}. Raises UserError for a damaged row."""
    lines = formula_lines()
    for name, (blocks, env) in devices.items():
        commits = f"commit{'s' * (len(env['commits']) > 1)} {', '.join(env['commits'])}"
        changes = " (+: with uncommitted changes)" if "+" in commits else ""
        lines += [f"### {env['name']}", "", f"From `runs/bench/{name}/`: torch {env['torch']}, {commits}{changes}.", ""]
        if env["clock"] == "process_time":
            lines += [f"One thread, by the CPU time that it takes, since others used the machine (load up to "
                      f"{env['load']:.0f}): ratios and exponents are what they tell, not speed on an idle one.", ""]
        for block, make_lines in LINES.items():
            try:
                lines += make_lines(blocks[block]) if block in blocks else []
            except BROKEN as e:
                raise UserError(f"{name}: a row of {block} isn't as bench_dba.py writes it ({brief(e)})") from None
    return "\n".join(lines).rstrip()


# -----------------------------------------------------------------------------
# Figure

def told_apart(lines: dict) -> dict:
    """Of each case and kernel the curves of its largest and of its smallest format: what a figure has room for."""
    kept, by_case = {}, {}
    for (case, fmt, kernel), line in lines.items():
        by_case.setdefault((case, kernel), []).append((line[-1][1]["cache_mib"], fmt))
    for (case, kernel), sizes in by_case.items():
        for _, fmt in (max(sizes), min(sizes)):
            kept[case, fmt, kernel] = lines[case, fmt, kernel]
    return kept


def draw_decode(devices: dict, path: Path) -> None:
    """Measured ms a token over context, a panel a device; then bytes that a token of a 7B model reads, by formula."""
    fig, axes = subplots(len(devices) + 1)
    *measured, last = axes
    far, handles = {}, {}
    for ax, (name, rows) in zip(measured, devices.items()):
        for (case, fmt, kernel), line in told_apart(curves(rows)).items():
            color = OTHERS[2] if kernel == "sdpa" else COLORS[MODES[case]]
            style = dict(color=color, marker=MARKERS.get(fmt, "x"), markersize=4)
            label = f"{case} {fmt}" + (" (SDPA)" if kernel == "sdpa" else "")
            contexts = [n for n, _ in line]
            handles[label], = ax.plot(contexts, [LAYERS * row["us"] / 1000 for _, row in line], **style)
            if kernel != "sdpa":
                far[case, fmt] = style
        ax.set(ylabel="ms a token, attention of all layers", title=f"1B, measured: batch 1, {name}")
    contexts = [2**n for n in range(10, 18)]
    for (case, fmt), style in far.items():
        each = bytes_per_token(decoded(case, scale=2, **BIG), fmt)
        last.plot(contexts, [n * each / 2**30 for n in contexts], **style)
    last.set(ylabel="GiB of KV cache that a token reads", title="7B, extrapolated by formula")
    for ax in axes:
        log2_x(ax)
        ax.xaxis.set_major_formatter(lambda x, _: f"{x / 1024:g}k")
        ax.set(yscale="log", xlabel="context (tokens)")
        ax.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
        ax.grid(alpha=0.3)
    fig.legend(handles.values(), handles, loc="outside lower center", ncols=4)
    save(fig, path)


AXES = {"batch_size": "sequences of 256 tokens", "d_model": "width (d_model)", "layers": "depth (layers)"}


def draw_growth(devices: dict, path: Path) -> None:
    """Time of a training step over batch, width and depth, a row of panels a device."""
    fig, axes = subplots(len(devices) * len(AXES), width=2.7, height=2.8, most=len(AXES))
    for first, (name, rows) in zip(range(0, len(axes), len(AXES)), devices.items()):
        lines = growth_curves(rows)
        for ax, (axis, said) in zip(axes[first:], AXES.items()):
            for (case, other), line in lines.items():
                if other == axis:
                    ax.plot(*zip(*line), color=COLORS[case], marker="o", markersize=4,
                            label=f"{case}: {fitted_exponent(line):.2f}")
            log2_x(ax)
            ax.set(yscale="log", xlabel=said)
            ax.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
            ax.grid(alpha=0.3)
            ax.legend(title="fitted exponent", title_fontsize=8)
        axes[first].set(ylabel="seconds of a training step", title=f"measured: {name}")
    save(fig, path)


# -----------------------------------------------------------------------------
# Main

@exit_code()
def main(argv=None) -> int:
    parser = Parser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bench", type=Path, default=Path("runs/bench"), help="a folder a device (runs/bench)")
    parser.add_argument("--out", type=Path, default=Path("assets"), help="where the figure goes (assets)")
    parser.add_argument("--page", default="docs/scale.md", help="page whose block is rewritten; empty: it is printed")
    args = parser.parse_args(argv)
    devices = {}
    for folder in sorted(args.bench.glob("*/")):
        blocks, env = read_device(folder)
        if blocks:
            devices[folder.name] = blocks, env
    if not devices:
        raise UserError(f"no result of bench_dba.py under {args.bench}; bench_dba.py gpu --out "
                        f"{args.bench}/<device> makes them")
    block = block_of(devices)
    if args.page:
        page = Path(args.page)
        try:
            text = page.read_text(encoding="utf-8")
        except (OSError, ValueError) as e:
            raise UserError(f"--page {page} can't be read ({brief(e)})") from None
        write_text(page, replace_block(text, block))
    else:
        print(block)
    names = [env["name"] for _, env in devices.values()]
    for name, block, make in (("scale", "decode", draw_decode), ("growth", "growth", draw_growth)):
        shown = {}
        for folder, (blocks, env) in devices.items():  # of two devices of one name, each says its folder
            if block in blocks:
                title = f"{env['name']} ({folder})" if names.count(env["name"]) > 1 else env["name"]
                shown[f"{title}, CPU time" if env["clock"] == "process_time" else title] = blocks[block]
        if shown:
            make(shown, args.out / f"fig_{name}.png")


if __name__ == "__main__":
    sys.exit(main())
