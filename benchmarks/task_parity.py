"""
Benchmarks of a pretrained Llama by lm-eval, through our model and adapter and through lm-eval's own for transformers.

    python3 benchmarks/task_parity.py SmolLM2.gguf --tasks-dir data/eval --limit 200 --out runs/bench/task_parity.json
    python3 benchmarks/task_parity.py pretrained/decoupled --exported --tasks-dir data/eval --limit 100

With --exported, lm-eval loads the folder that `convert_dba.py export` makes of the model, which may be a run. Both read
the same weights in float32 and the same items. Per task: both scores, the items on which they differ, and the largest
difference of a continuation's log-probability in nats.
"""

import sys
import tempfile
import time
from pathlib import Path

import common
from convert_dba import read_llama
from evals.subject import load_subject
from evals.tasks import TASKS, lm_eval_model, load_tasks, task_result
from surgery.export import export


def log_probabilities(samples):
    """{item: log-probability of each continuation} of lm-eval's samples of a task."""
    of_item = {}
    for sample in samples:
        of_item[sample["doc_id"]] = [answer[0] for answer in sample["filtered_resps"]]
    return of_item


def compare(name, ours, theirs):
    """One row per metric of a task, from both results of lm-eval."""
    mine, its = task_result(ours, name), task_result(theirs, name)
    a, b = log_probabilities(ours["samples"][name]), log_probabilities(theirs["samples"][name])
    largest = 0.0
    for item in a:
        for x, y in zip(a[item], b[item], strict=True):
            largest = max(largest, abs(x - y))
    for metric in mine["correct"]:
        differ = sum(x != y for x, y in zip(mine["correct"][metric], its["correct"][metric], strict=True))
        yield dict(task=name, metric=metric, items=mine["n"], ours=mine[metric], theirs=its[metric],
                   stderr=mine[f"{metric}_stderr"], items_that_differ=differ, largest_difference=largest,
                   data_sha256=mine["data_sha256"])


def main():
    parser = common.parser_of(__doc__)
    parser.add_argument("ckpt", type=Path, help=".gguf file or Hugging Face folder; with --exported a run, too")
    parser.add_argument("--exported", action="store_true", help="lm-eval reads what convert_dba.py export makes of it")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=["arc_easy", "piqa", "winogrande", "boolq"])
    parser.add_argument("--tasks-dir", help="local data (the Hugging Face hub)")
    parser.add_argument("--limit", type=int, help="only the first so many items of each task")
    parser.add_argument("--batch-size", type=int, default=8)
    args = parser.parse_args()
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
    except ModuleNotFoundError as e:
        return f"error: this needs {e.name}: pip install -r requirements-eval.txt"
    subject = load_subject(args.ckpt, "cpu")
    results, seconds = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        if args.exported:
            export(args.ckpt, Path(folder, "exported"))
            theirs = dict(pretrained=str(Path(folder, "exported")), trust_remote_code=True, dtype="float32")
        else:
            theirs = dict(zip(("pretrained", "tokenizer"), read_llama(args.ckpt)))
        models = {"ours": lm_eval_model(subject, args.batch_size),
                  "theirs": HFLM(**theirs, batch_size=args.batch_size, device="cpu")}
        loaded, missing = load_tasks(args.tasks, args.tasks_dir, Path(folder))
        for task in loaded.values():
            task.set_config("num_fewshot", 0)
        for name, model in models.items():
            started = time.perf_counter()
            results[name] = lm_eval.evaluate(model, {"tasks": loaded}, limit=args.limit, bootstrap_iters=0)
            seconds[name] = time.perf_counter() - started
    rows = []
    for name in loaded:
        rows += compare(name, results["ours"], results["theirs"])
    for row in rows:
        print("{task} {metric}: {ours:.4f} ours, {theirs:.4f} theirs of {items}; {items_that_differ} items differ, "
              "log-probabilities by at most {largest_difference:.1e}".format(**row))
    common.write(args.out, subject.device, ckpt=args.ckpt.name, exported=args.exported, sha256=subject.sha256,
                 limit=args.limit, lm_eval=lm_eval.__version__, seconds=seconds, not_run=missing, rows=rows)


if __name__ == "__main__":
    sys.exit(main())
