"""
Zero-shot accuracy of the rows of surgery_quality.py: of conversions, and of the teacher through quantised caches.

    python3 benchmarks/surgery_tasks.py SmolLM2.gguf --data wiki.train.tokens --tasks-dir data/eval --limit 500 \
        --rows 'teacher|q4_0|latent 75 %' --out runs/llama/smollm2_135m/surgery_tasks.json

Every row answers the same first items of each task, by lm-eval (evals/tasks.py); which of them it had right is kept,
item by item. The file is written after every row, and rows of an earlier call stay in it, which must be of the same
items. Weights and activations are float32.
"""

import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import lm_eval
import torch

from common import parser_of, write
from evals.subject import Progress
from evals.tasks import lm_eval_model, load_tasks, task_result
from surgery_quality import add_rows, chosen_rows, described
from train_dba import UserError, exit_code

TASKS = ("arc_easy", "piqa", "winogrande", "boolq")


def answers(subject, tasks, name, formats, residual, limit, batch_size):
    """{task: task_result()} of a subject whose texts are read through a cache of these formats."""
    with Progress("request", name) as report:
        model = lm_eval_model(subject, batch_size, report, formats=formats or "fp32", residual=residual)
        results = lm_eval.evaluate(model, {"tasks": tasks}, limit=limit)
    return {task: task_result(results, task) for task in tasks}


@exit_code()
def main(argv=None):
    parser = parser_of(__doc__)
    add_rows(parser)
    parser.add_argument("--tasks-dir", required=True, metavar="DIR", help="local data, as eval_dba.py tasks takes it")
    parser.add_argument("--limit", type=int, help="only the first so many items of each task")
    parser.add_argument("--batch-size", type=int, default=8, help="texts at once (8)")
    args = parser.parse_args(argv)
    settings = dict(teacher=Path(args.model).name, calibration=Path(args.data).name, limit=args.limit)
    table = {}
    if args.out and args.out.exists():
        before = json.loads(args.out.read_text())
        if any(before[name] != value for name, value in settings.items()):
            raise UserError(f"{args.out} is of another teacher or of other items; name another --out")
        table = before["rows"]
    subject, rows = chosen_rows(args)
    with tempfile.TemporaryDirectory() as folder:
        tasks, missing = load_tasks(TASKS, args.tasks_dir, Path(folder))
        if missing:
            raise UserError("; ".join(missing.values()))
        for task in tasks.values():
            task.set_config("num_fewshot", 0)
        for name, row in rows.items():
            model = row.make()
            about = described(row, model, subject.model)
            about["tasks"] = answers(replace(subject, model=model), tasks, name, about["formats"], row.residual,
                                     args.limit, args.batch_size)
            table[name] = about
            write(args.out, torch.device("cpu"), **settings, rows=table)
            print(f"{name}: {about['bytes']:.3f} of the bytes", *(f"{task} {each['acc']:.4f}"
                                                                for task, each in about["tasks"].items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
