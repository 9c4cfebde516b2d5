"""Zero-shot accuracy on benchmarks by lm-eval, and McNemar's test against another result."""

import hashlib
import json
import sys
import tempfile
from pathlib import Path

import torch

import train_dba
from evals.subject import (
    Progress,
    Report,
    Subject,
    cache_name,
    check_out,
    formats_of,
    load_subject,
    quiet,
    read_through,
    result_path,
    text_table,
    write_result,
)
from paper.shapes import both, count, list_of, map_of, read_json
from paper.stats import mcnemar
from train_dba import BROKEN, KVCache, UserError, autocast, brief, check, rotate_cache


def one_of(*values):
    def this(value):
        return repr(value) in map(repr, values)            # 1 is neither "1" nor true
    this.__name__ = " or ".join(map(repr, values))
    return this


def four_texts(value):
    return list_of(str)(value) and len(value) == 4


def sentence_with_a_gap(value):
    return type(value) is str and "_" in value


def question_with_its_answer(item):
    labels = item["choices"]["label"]
    return len(labels) == len(item["choices"]["text"]) and item["answerKey"] in labels


# The task's YAML below lm_eval/tasks, the split that is scored, and the shape of an item of the hub's data set.
TASKS = {
    "hellaswag": ("hellaswag/hellaswag.yaml", "validation", dict(
        activity_label=str, ctx_a=str, ctx_b=str, endings=four_texts, label=one_of(*"0123"))),
    "winogrande": ("winogrande/default.yaml", "validation", dict(
        sentence=sentence_with_a_gap, option1=str, option2=str, answer=one_of("1", "2"))),
    "arc_easy": ("arc/arc_easy.yaml", "test", both(
        dict(question=str, choices=dict(text=list_of(str), label=list_of(str)), answerKey=str),
        question_with_its_answer)),
    "piqa": ("piqa/piqa.yaml", "validation", dict(goal=str, sol1=str, sol2=str, label=one_of(0, 1))),
    "boolq": ("super_glue/boolq/default.yaml", "validation", dict(passage=str, question=str, label=one_of(0, 1))),
}
LOCAL_NAMES = {"validation": "valid", "test": "test"}
COMPARABLE = dict(tasks=map_of(dict(items=list_of(str), correct=map_of(list_of(count)))))  # of a result

Request = tuple[list[int], list[int]]                      # ids of a context, ids of its continuation
Score = tuple[float, bool]                                 # log-probability in nats, whether greedy decoding writes it
Formats = str | dict[str, str]                             # of a cache: one for all streams, or {stream: format}


# -----------------------------------------------------------------------------
# Scores

def pieces(context: list[int], continuation: list[int], block: int) -> list[Request]:
    """A request as requests that fit the window: itself, or if its continuation alone is longer, parts of half a
    window, each with what comes before it as context."""
    step = block if len(continuation) <= block else max(1, block // 2)
    return [(context + continuation[:i], continuation[i:i + step]) for i in range(0, len(continuation), step)]


def score(subject: Subject, requests: list[Request], batch_size: int, report: Report = quiet, *,
          formats: Formats = "fp32", residual: int = 0) -> list[Score]:
    """Scores of the requests' continuations, read through a cache. What is too long for the model's window is cut from
    the left."""
    parts, owners = [], []
    for i, (context, continuation) in enumerate(requests):
        if not continuation:
            raise UserError("a continuation has no tokens")
        for part in pieces(context, continuation, subject.cfg.block):
            parts.append(part)
            owners.append(i)
    scores = [(0.0, True)] * len(requests)
    scored = score_windows(subject, parts, batch_size, report, formats, residual)
    for owner, (log_p, greedy) in zip(owners, scored):
        total, all_greedy = scores[owner]
        scores[owner] = total + log_p, all_greedy and greedy
    return scores


@torch.inference_mode()
def score_windows(subject: Subject, requests: list[Request], batch_size: int, report: Report, formats: Formats,
                  residual: int) -> list[Score]:
    """score() of requests whose continuations fit the window. Requests of one input are scored by one pass."""
    block, same_input = subject.cfg.block, {}
    for i, (context, continuation) in enumerate(requests):
        same_input.setdefault(tuple((context + continuation)[-block - 1:-1]), []).append(i)
    inputs, results = sorted(same_input, key=len, reverse=True), [(0.0, False)] * len(requests)
    done = 0
    for start in range(0, len(inputs), batch_size):
        batch = inputs[start:start + batch_size]
        padded = torch.tensor([ids + (0,) * (len(batch[0]) - len(ids)) for ids in batch], device=subject.device)
        cache = KVCache(subject.cfg, *padded.shape, formats, residual, subject.device)
        with autocast(subject.device, subject.dtype):      # [B, T, E]; attention is causal: padding is never seen
            hidden = torch.cat([*read_through(subject.model, padded, cache)], 1)
        for h, ids in zip(hidden, batch):
            longest = max(len(requests[i][1]) for i in same_input[ids])
            with autocast(subject.device, subject.dtype):  # logits of the continuation alone
                log_p = subject.model.logits(h[len(ids) - longest:len(ids)]).log_softmax(-1)      # [longest, V]
            for i in same_input[ids]:
                tail = torch.tensor(requests[i][1], device=subject.device)
                rows = log_p[-len(tail):]
                results[i] = rows.gather(1, tail[:, None]).sum().item(), bool((rows.argmax(-1) == tail).all())
            report(done := done + len(same_input[ids]), len(requests))
    return results


def cut_at(text: str, until: tuple[str, ...]) -> tuple[str, bool]:
    """A text up to the first of some strings, and whether there was one."""
    ends = [text.find(stop) for stop in until if stop and stop in text]
    return (text[:min(ends)], True) if ends else (text, False)


def continue_text(subject: Subject, prompts: list[list[int]], most: int, until: tuple[str, ...],
                  formats: Formats = "fp32", residual: int = 0) -> list[str]:
    """Greedy continuations, as texts, of prompts [B, T] of token ids: up to a string of `until`, the token that ends a
    text, or `most` tokens."""
    eot, texts = subject.tokenizer.eot, {}
    cache = KVCache(subject.cfg, len(prompts), len(prompts[0]) + most - 1, formats, residual, subject.device)
    written = [[] for _ in prompts]
    with autocast(subject.device, subject.dtype):
        for tokens in train_dba.generate(subject.model, torch.tensor(prompts, device=subject.device), most, cache, 0):
            for row, token in enumerate(tokens[:, 0].tolist()):
                if row in texts:
                    continue
                if token != eot:
                    written[row].append(token)
                text, stopped = cut_at(subject.tokenizer.decode(written[row]).decode(errors="replace"), until)
                if stopped or token == eot or len(written[row]) == most:
                    texts[row] = text
            if len(texts) == len(prompts):
                break
    return [texts[row] for row in range(len(prompts))]


# -----------------------------------------------------------------------------
# lm-eval

def rolling_windows(ids: list[int], first: int, block: int) -> list[Request]:
    """A text's ids as requests that score each once, the first after the token `first`."""
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
    return [make_disjoint_window(window) for window in get_rolling_token_windows(ids, first, block, 1)]


def greedy_settings(given: dict, block: int) -> tuple[int, tuple[str, ...]]:
    """(most tokens, strings to stop at) of lm-eval's settings of a generation. Raises UserError for one that samples or
    doesn't fit the window."""
    from lm_eval.models.utils import normalize_gen_kwargs
    settings = normalize_gen_kwargs(given, 256)
    most, until = settings["max_gen_toks"], settings.get("until") or []
    if settings["do_sample"] or not 0 < most < block:
        raise UserError(f"{given}: only greedy texts of 1 to {block - 1} tokens are written")
    return most, (until,) if isinstance(until, str) else tuple(until)


def lm_eval_model(subject: Subject, batch_size: int, report: Report = quiet, *, formats: Formats = "fp32",
                  residual: int = 0):
    """A Subject that reads through a cache as a model of lm-eval."""
    from lm_eval.api.model import TemplateLM
    tokenizer, block, cache = subject.tokenizer, subject.cfg.block, dict(formats=formats, residual=residual)
    starts = getattr(tokenizer, "prefix", [])              # what a pretrained tokenizer puts before a text

    class Model(TemplateLM):
        eot_token_id = tokenizer.eot
        prefix_token_id = getattr(tokenizer, "bos", tokenizer.eot)
        max_length = block

        def tok_encode(self, string, add_special_tokens=None, **_):
            ids = tokenizer.encode(string).tolist()
            return ids if add_special_tokens is False or ids[:1] == starts else starts + ids

        def _loglikelihood_tokens(self, requests, **_):
            return score(subject, [(context, tail) for _, context, tail in requests], batch_size, report, **cache)

        def loglikelihood_rolling(self, requests, disable_tqdm=False):
            parts, owners = [], []
            for i, request in enumerate(requests):
                for window in rolling_windows(self.tok_encode(request.args[0]), self.prefix_token_id, block):
                    parts.append(window)
                    owners.append(i)
            totals = [0.0] * len(requests)
            for owner, (log_p, _) in zip(owners, score(subject, parts, batch_size, report, **cache)):
                totals[owner] += log_p
            return totals

        def generate_until(self, requests, disable_tqdm=False):
            groups, texts = {}, {}                         # prompts of one length and the same settings go together
            for i, request in enumerate(requests):
                most, until = greedy_settings(request.args[1], block)
                ids = self.tok_encode(request.args[0])[most - block:]
                groups.setdefault((len(ids), most, until), []).append((i, ids))
            for (_, most, until), group in groups.items():
                for start in range(0, len(group), batch_size):
                    rows, prompts = zip(*group[start:start + batch_size])
                    texts.update(zip(rows, continue_text(subject, prompts, most, until, **cache)))
                    report(len(texts), len(requests))
            return [texts[i] for i in range(len(requests))]

    return Model()


def check_items(path: Path, shape) -> None:
    """Raises UserError unless a file has items, one per line, of a shape."""
    number = 0
    with open(path, "rb") as f:
        for number, line in enumerate(f, 1):
            try:
                check(json.loads(line), shape, "the item")
            except BROKEN as e:
                raise UserError(f"{path}:{number} isn't as the task has its items ({brief(e)})") from None
    if number == 0:
        raise UserError(f"{path} is empty")


def write_task(name: str, data: str | None, folder: Path) -> None:
    """Write a task's YAML into a folder: lm-eval's own, or with data, a folder, its own on a local file."""
    from lm_eval import tasks as installed
    yaml, split, shape = TASKS[name]
    task = dict(include=str(Path(installed.__file__).parent / yaml), task=name)
    if data is not None:
        path = Path(data) / f"{name}_{LOCAL_NAMES[split]}.jsonl"
        if not path.is_file():
            raise FileNotFoundError(f"no {path.name} in {data}")
        check_items(path, shape)
        task.update(dict.fromkeys(("training_split", "validation_split", "test_split")), dataset_path="json",
                    dataset_name=None, dataset_kwargs=dict(data_files={split: str(path.resolve())},
                                                           cache_dir=str(folder / "cache")))
        task[f"{split}_split"] = split
    (folder / f"{name}.yaml").write_text(json.dumps(task))                      # JSON is YAML


def load_tasks(names: list[str], data: str | None, folder: Path) -> tuple[dict, dict[str, str]]:
    """({name: task of lm-eval}, {name: why it can't be run}) on the files of a folder `data` or, if that is None, on
    the hub's. folder: a temporary one that must outlive the tasks. Raises UserError if none can be run."""
    from datasets.exceptions import DatasetGenerationError
    from lm_eval.tasks import TaskManager
    tasks, missing = {}, {}
    for name in dict.fromkeys(names):
        try:
            write_task(name, data, folder)
            tasks.update(TaskManager(include_path=folder, include_defaults=False).load([name])["tasks"])
        except OSError as e:                               # of which are the hub's errors
            missing[name] = str(e).splitlines()[0][:200]
        except DatasetGenerationError as e:                # such as of a key that an item has twice
            raise UserError(f"{name}: its items can't be read ({brief(e.__cause__ or e)})") from None
        except BROKEN as e:                                # lm-eval tries the first item
            raise UserError(f"{name}: its first item isn't as the task has them ({brief(e)})") from None
    if not tasks:
        raise UserError(f"no data for any task: {'; '.join(missing.values())}")
    return tasks, missing


def task_result(results: dict, name: str) -> dict:
    """What is kept of one task in lm-eval's results: scores, and which items were right, in the data's order."""
    scores, samples = results["results"][name], sorted(results["samples"][name], key=lambda sample: sample["doc_id"])
    digest = hashlib.sha256("".join(sample["doc_hash"] for sample in samples).encode()).hexdigest()
    result = dict(n=len(samples), version=results["versions"][name], data_sha256=digest)
    correct = {}
    for metric in ("acc", "acc_norm"):
        if f"{metric},none" in scores:
            result.update({metric: scores[f"{metric},none"], f"{metric}_stderr": scores[f"{metric}_stderr,none"]})
            correct[metric] = [int(sample[metric]) for sample in samples]
    items = [f"{sample['doc_id']}-{sample['doc_hash'][:16]}" for sample in samples]
    return dict(result, items=items, correct=correct)


# -----------------------------------------------------------------------------
# Comparing

def discordant(this: list[int], other: list[int]) -> tuple[int, int, float]:
    """(right only in this, right only in the other, McNemar's p) of two 0/1 lists over the same items."""
    this_only = other_only = 0
    for mine, its in zip(this, other):
        this_only += mine > its
        other_only += mine < its
    return this_only, other_only, mcnemar(this_only, other_only)


def compare_metric(this: dict, other: dict, metric: str) -> dict | None:
    """Pairs, accuracy of the other and McNemar's test over the items that two results of a task share, or None."""
    mine = dict(zip(this["items"], this["correct"][metric]))
    its = dict(zip(other["items"], other["correct"][metric]))
    shared = [item for item in mine if item in its]
    if not shared:
        return None
    theirs = [its[item] for item in shared]
    this_only, other_only, p = discordant([mine[item] for item in shared], theirs)
    return dict(pairs=len(shared), other=sum(theirs) / len(shared), only_this=this_only, only_other=other_only, p=p)


def compare_tasks(this: dict, other: dict) -> dict[tuple, dict]:
    """{(task, metric): compare_metric()} of two results. Raises UserError where they have no items in common."""
    rows = {}
    for name, task in this.items():
        for metric in task["correct"]:
            if name in other and metric in other[name]["correct"]:
                if row := compare_metric(task, other[name], metric):
                    rows[name, metric] = row
    if not rows:
        raise UserError("--compare: the two results have no items in common")
    return rows


def table(done: dict[str, dict], pairs: dict[tuple, dict]) -> list[tuple]:
    """(head, *rows) of the tasks' results and, where there are any, of their comparisons."""
    rows = [("task", "metric", "items", "accuracy", "stderr")]
    if pairs:
        rows[0] += ("pairs", "other", "only this", "only other", "p")
    for name, task in done.items():
        for metric in task["correct"]:
            row = (name, metric, task["n"], f"{task[metric]:.4f}", f"{task[f'{metric}_stderr']:.4f}")
            if pair := pairs.get((name, metric)):
                row += (pair["pairs"], f"{pair['other']:.4f}", pair["only_this"], pair["only_other"],
                        f"{pair['p']:.4g}")
            rows.append(row + ("-",) * (len(rows[0]) - len(row)))
    return rows


def main(args) -> None:
    """Zero-shot accuracy on benchmarks by lm-eval, and McNemar's test against another result."""
    try:
        import lm_eval
    except ModuleNotFoundError as e:
        raise UserError(f"tasks needs lm-eval ({e.name} is missing): pip install -r requirements-eval.txt") from None
    other = read_json(Path(args.compare), COMPARABLE)["tasks"] if args.compare else None
    check_out(args.out)
    with tempfile.TemporaryDirectory() as folder:
        loaded, missing = load_tasks(args.tasks, args.tasks_dir, Path(folder))
        for name, why in missing.items():
            print(f"{name} is not run: {why}", file=sys.stderr)
        for name, task in loaded.items():
            if min(len(task.eval_docs), args.limit or 2) < 2:
                raise UserError(f"{name}: one item has no standard error; give two at least")
            task.set_config("num_fewshot", 0)
        subject = load_subject(args.ckpt, args.device, args.dtype)
        formats = formats_of(subject, args.kv_cache)
        if args.kv_rotate:
            rotate_cache(subject.model)
        with Progress("request", "tasks") as report:
            model = lm_eval_model(subject, args.batch_size, report, formats=formats, residual=args.kv_residual)
            results = lm_eval.evaluate(model, {"tasks": loaded}, limit=args.limit)
    done = {name: task_result(results, name) for name in loaded}
    pairs = compare_tasks(done, other) if other else {}
    compared = []
    for (name, metric), pair in sorted(pairs.items()):
        compared.append(dict(task=name, metric=metric, **pair))
    cache = cache_name(args.kv_cache, args.kv_rotate, args.kv_residual)
    path = result_path(args.out, subject, "eval_tasks" if cache == "fp32" else f"eval_tasks_{cache}")
    print(text_table(table(done, pairs)))
    write_result(path, subject, vars(args), dict(tasks=done, not_run=missing, compared=compared, num_fewshot=0,
                                                 lm_eval=lm_eval.__version__))
    print(f"written to {path}")
