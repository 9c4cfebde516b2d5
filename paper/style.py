"""What figures and tables have in common: colours, axes, files; one writer of Markdown tables and one of LaTeX ones."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import matplotlib

from train_dba import write_text, write_whole

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (after the choice of a backend)

# Okabe and Ito's colours, which colour-blind readers tell apart. A mode has its own in every figure; what is no mode
# (formats of a cache, regions of a prompt, layers) is told apart by markers, greys, or a colour that no mode has.
COLORS = dict(standard="#000000", bottleneck="#0072B2", decoupled="#D55E00", gqa="#009E73", mla="#CC79A7")
OTHERS = ("#E69F00", "#56B4E9", "#777777")
STYLES = ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)))
MARKERS = {"fp16": "o", "q8_0": "s", "q4_0": "^", "q4_0_rotated": "P", "hetero": "D", "nf4": "v"}  # of cache formats
REPORTED = dict(marker="*", color="#F0E442", markeredgecolor="#000000", markersize=9, markeredgewidth=0.7, linestyle="")
SMALL, NORMAL = 8, 9                                       # points of text, at 8 inches for a README's width

plt.rcParams.update({"font.size": SMALL, "axes.titlesize": NORMAL, "axes.labelsize": SMALL, "legend.fontsize": SMALL,
                     "xtick.labelsize": SMALL, "ytick.labelsize": SMALL, "axes.spines.top": False,
                     "axes.spines.right": False, "axes.axisbelow": True, "grid.alpha": 0.3, "legend.frameon": False})


def write_json(path: Path, content) -> None:
    """Replace a JSON file: an item of the outermost lists and objects per line, the same content in the same bytes."""
    write_text(path, json_lines(content) + "\n")


def json_lines(content) -> str:
    """JSON in which every item of a list or object at the first two levels has a line of its own."""
    if not isinstance(content, dict):
        return json.dumps(content, ensure_ascii=False)
    parts = []
    for key, value in content.items():
        text = json.dumps(value, ensure_ascii=False)
        if isinstance(value, list) and value and isinstance(value[0], dict | list):
            text = "[\n  " + ",\n  ".join(json.dumps(item, ensure_ascii=False) for item in value) + "\n ]"
        elif isinstance(value, dict) and len(text) > 100:
            items = [f"{json.dumps(name)}: {json.dumps(item, ensure_ascii=False)}" for name, item in value.items()]
            text = "{\n  " + ",\n  ".join(items) + "\n }"
        parts.append(f" {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}"


def save(fig, path: Path, dpi: int = 200) -> None:
    """Write a figure and close it; the same figure gives the same bytes."""
    write_whole(path, lambda temporary: fig.savefig(temporary, format="png", dpi=dpi, metadata={"Software": None}))
    plt.close(fig)


def subplots(count: int, height: float = 3.4, width: float = 4.0, most: int = 2, **settings):
    """(figure, its `count` axes) in one row, or in rows of `most` where they are many."""
    columns = min(count, most)
    rows = -(-count // columns)
    fig, axes = plt.subplots(rows, columns, figsize=(width * columns, height * rows), squeeze=False,
                             layout="constrained", **settings)
    for ax in axes.flat[count:]:
        ax.set_axis_off()
    return fig, list(axes.flat[:count])


def log2_x(ax) -> None:
    """A logarithmic x axis whose ticks are plain numbers, one per factor of 2."""
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter(lambda x, _: f"{x:,g}")


def spread(values: Sequence[float], gap: float) -> list[float]:
    """Places of labels: as near to the values as at least `gap` between neighbours allows, in the same order. Less
    `gap` times its rank, a place may not fall: neighbours that would are pooled at their mean."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    pools = []                                             # [sum, count] of values less their steps
    for rank, i in enumerate(order):
        pools.append([values[i] - gap * rank, 1])
        while len(pools) > 1 and pools[-2][0] / pools[-2][1] > pools[-1][0] / pools[-1][1]:
            total, count = pools.pop()
            pools[-1][0] += total
            pools[-1][1] += count
    levels = [total / count for total, count in pools for _ in range(count)]
    places = [0.0] * len(values)
    for rank, i in enumerate(order):
        places[i] = levels[rank] + gap * rank
    return places


def pm(value: dict, digits: int = 3, sign: str = "") -> str:
    """mean ± half-width of a dict of both."""
    text = f"{value['mean']:{sign}.{digits}f}"
    return text if value["half"] is None else f"{text} ± {value['half']:.{digits}f}"


def number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def markdown(head: Sequence, rows: Iterable[Sequence]) -> list[str]:
    """Lines of a table."""
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(map(str, line)) + " |" for line in lines]


def clean(cell) -> str:
    """Text as LaTeX."""
    text = str(cell)
    for plain, escaped in (("_", r"\_"), ("%", r"\%"), ("±", r"$\pm$"), ("Δ", r"$\Delta$")):
        text = text.replace(plain, escaped)
    return text


def latex_table(head: Sequence, rows: Iterable, caption: str, label: str | None = None, wide: bool = False,
                columns: str | None = None, over: Sequence[str] = ()) -> str:
    """A booktabs table. rows: cells; a text is a line of LaTeX as it is, and so are those `over` the head."""
    kind = "table*" if wide else "table"
    lines = [rf"\begin{{{kind}}}", rf"\caption{{{clean(caption)}}}"]
    if label:
        lines.append(rf"\label{{{label}}}")
    if wide:
        lines += [r"\centering\footnotesize", r"\setlength{\tabcolsep}{3.5pt}"]
    lines += [rf"\begin{{tabular}}{{{columns or 'l' + 'r' * (len(head) - 1)}}}", r"\toprule", *over, cells(head),
              r"\midrule"]
    lines += [row if isinstance(row, str) else cells(row) for row in rows]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", rf"\end{{{kind}}}", ""])


def cells(row: Sequence) -> str:
    return " & ".join(map(clean, row)) + r" \\"
