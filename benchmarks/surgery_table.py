"""
The tables of docs/convert.md from what benchmarks/surgery_quality.py and surgery_tasks.py measured.

    python3 benchmarks/surgery_table.py docs/convert.md

Each stands between a line <!-- surgery: RESULT -->, RESULT being a path from the project's root, and the line
<!-- /surgery -->; after <!-- surgery: RESULT below 30 % --> it has the rows of fewer bytes than that, without the
ratios that were targets. Where rows have seen different numbers of windows, ratios are of what both have seen. After
<!-- surgery tasks: RESULT --> stands the accuracy of tasks.
"""

import json
import re
import sys
from pathlib import Path

from common import train_dba
from paper.stats import mean_interval

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"(<!-- surgery( tasks)?: (\S+)(?: below (\d+) %)? -->\n)(?s:.*?)(<!-- /surgery -->\n)")
# (claim, row, row it is divided by, the most that the ratio may be)
TARGETS = (("75 %: beside the MHA2MLA-like cut", "latent 75 %", "MHA2MLA-like 75 %", 0.19),
           ("75 %: beside the cut per head", "latent 75 %", "per head 75 %", 0.29),
           ("62.5 %: beside the cut per head", "latent 62.5 %", "per head 62.5 %", 0.44),
           ("50 %: healed beside not healed", "latent 50 %, healed", "latent 50 %", 0.57),
           ("the same, outputs fitted before", "latent 50 %, fitted, healed", "latent 50 %", 0.57),
           ("20 % of the bytes: healed in q4_0 beside 22 %", "latent 70 %, healed, q4_0", "k q4_0, v q2_0", 1),
           ("the same, calibrated and healed on three texts", "latent 70 %, healed on three texts, q4_0",
            "k q4_0, v q2_0", 1))


def texts_of(rows):
    """Names of the texts that any row was measured on, in their order."""
    texts = set()
    for row in rows.values():
        texts.update(name for name, each in row.items() if isinstance(each, dict) and "kls" in each)
    return sorted(texts, reverse=True)


def short(nats):
    return f"{nats:.4f}" if nats >= 5e-4 or nats == 0 else f"{nats:.0e}"


def cell(row, text):
    if text not in row:
        return "-"
    each = row[text]
    spread = "" if each["kl_se"] is None else f" ± {short(each['kl_se'])}"
    return f"{short(each['kl'])}{spread} ({each['dnll']:+.3f})"


def table(document, below=None):
    """Markdown of all rows, the most bytes first, and of the targets; or of the rows of fewer bytes than `below` %."""
    rows = {name: row for name, row in document["rows"].items() if below is None or 100 * row["bytes"] < below}
    texts = texts_of(rows)
    counts = {text: {row[text]["tokens"] for row in rows.values() if text in row} for text in texts}
    tokens = {text: " to ".join(f"{n:,}" for n in sorted({min(each), max(each)})) for text, each in counts.items()}
    heads = [f"{text}: KL (ΔNLL)" for text in texts]
    lines = ["| cache | of fp16's bytes | of the elements | " + " | ".join(heads) + " |",
             "| --- " * (3 + len(texts)) + "|"]
    for name, row in sorted(rows.items(), key=lambda item: -item[1]["bytes"]):
        cells = " | ".join(cell(row, text) for text in texts)
        lines.append(f"| {name} | {100 * row['bytes']:.1f} % | {100 * row['elements']:.1f} % | {cells} |")
    lines += ["", f"{document['teacher']} calibrated on {document['calibration']}; scored tokens: "
              + ", ".join(f"{text} {tokens[text]}" for text in texts) + ", in windows of "
              f"{document['window']} of which the first {document['skipped']} don't count; ± one standard error over "
              "windows."]
    if below is None:
        lines += ["", *ratios(rows, texts)]
    return "\n".join(lines) + "\n"


def ratios(rows, texts):
    """Markdown lines of the ratios that were targets."""
    lines = ["| ratio of KLs, same windows | at most | " + " | ".join(texts) + " |",
             "| --- " * (2 + len(texts)) + "|"]
    for claim, row, base, most in TARGETS:
        cells = []
        for text in texts:
            kls = [rows.get(name, {}).get(text, {}).get("kls", []) for name in (row, base)]
            seen = min(map(len, kls))
            ratio = sum(kls[0][:seen]) / sum(kls[1][:seen]) if seen else None
            cells.append("not measured" if ratio is None else f"{ratio:.3f}: {'met' if ratio <= most else 'missed'}")
        lines.append(f"| {claim} | {most} | {' | '.join(cells)} |")
    return lines


def right(row):
    """1 for every item of all tasks that a row has right, 0 for every other."""
    return [each for task in row["tasks"].values() for each in task["correct"]["acc"]]


def tasks_table(document):
    """Markdown of the accuracy of all rows, the most bytes first, and of how it differs from the teacher's, item by
    item."""
    rows = document["rows"]
    teacher, names = rows["teacher"], list(rows["teacher"]["tasks"])
    lines = ["| cache | of fp16's bytes | " + " | ".join(names) + " | all | beside the teacher |",
             "| --- " * (4 + len(names)) + "|"]
    for name, row in sorted(rows.items(), key=lambda item: -item[1]["bytes"]):
        if any(row["tasks"][task]["items"] != teacher["tasks"][task]["items"] for task in names):
            raise train_dba.UserError(f"{name} answered other items than the teacher")
        differences = [100 * (mine - its) for mine, its in zip(right(row), right(teacher), strict=True)]
        mean, half = mean_interval(differences)
        beside = "-" if name == "teacher" else f"{mean:+.1f} ± {half:.1f}"
        shares = [*(row["tasks"][task]["acc"] for task in names), sum(right(row)) / len(differences)]
        cells = " | ".join(f"{100 * share:.1f} %" for share in shares)
        lines.append(f"| {name} | {100 * row['bytes']:.1f} % | {cells} | {beside} |")
    counts = ", ".join(f"{task} {each['n']:,}" for task, each in teacher["tasks"].items())
    lines += ["", f"{document['teacher']} calibrated on {document['calibration']}; items: {counts}, the first of each; "
              "zero-shot `acc` of lm-eval; ± 95 % over items, paired; bytes as above, in a window of 512."]
    return "\n".join(lines) + "\n"


def filled(text):
    """The document with its tables as they are measured."""
    def block(found):
        begin, tasks, result, below, end = found.groups()
        document = json.loads((ROOT / result).read_text(encoding="utf-8"))
        return begin + (tasks_table(document) if tasks else table(document, below and int(below))) + end
    return BLOCK.sub(block, text)


def main():
    if len(sys.argv) != 2:
        sys.exit(f"error: {Path(sys.argv[0]).name} takes a document")
    path = Path(sys.argv[1])
    text = path.read_text(encoding="utf-8")
    if not BLOCK.search(text):
        sys.exit(f"error: {path} has no lines <!-- surgery: RESULT --> and <!-- /surgery -->")
    train_dba.write_text(path, filled(text))


if __name__ == "__main__":
    main()
