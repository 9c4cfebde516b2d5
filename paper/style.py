"""What figures and tables have in common: colours, axes, files, Markdown and LaTeX."""

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# Okabe and Ito's colours, which colour-blind readers tell apart; line styles and markers tell them apart in print.
PALETTE = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
COLORS = dict(zip(("standard", "bottleneck", "decoupled", "gqa", "mla"), PALETTE))
STYLES = ("-", "--", "-.", ":")
MARKERS = {"fp16": "o", "q8_0": "s", "q4_0": "^", "hetero": "D", "nf4": "v"}    # of the formats of a cache


def save(fig, path):
    """Write a figure; the same figure gives the same bytes."""
    fig.savefig(path, dpi=200, metadata={"Software": None})
    plt.close(fig)


def subplots(count, height=3.6, width=5.2, most=3):
    """(figure, its `count` axes) in one row, or in rows of `most` where they are many."""
    columns = min(count, most)
    rows = -(-count // columns)
    fig, axes = plt.subplots(rows, columns, figsize=(width * columns, height * rows), squeeze=False,
                             layout="constrained")
    for ax in axes.flat[count:]:
        ax.set_axis_off()
    return fig, list(axes.flat[:count])


def markdown(head, rows):
    """Lines of a table."""
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(map(str, line)) + " |" for line in lines]


def latex_table(head, rows, caption):
    """A booktabs table."""
    def clean(cell):
        return str(cell).replace("_", r"\_").replace("%", r"\%").replace("±", r"$\pm$")

    head, *lines = (" & ".join(map(clean, row)) + r" \\" for row in (head, *rows))
    return "\n".join([r"\begin{table}", rf"\caption{{{clean(caption)}}}",
                      rf"\begin{{tabular}}{{l{'r' * head.count('&')}}}", r"\toprule", head, r"\midrule", *lines,
                      r"\bottomrule", r"\end{tabular}", r"\end{table}", ""])
