"""
Measure a checkpoint.

    python3 eval_dba.py ppl --ckpt runs/ckpt_decoupled --kv-cache hetero
    python3 eval_dba.py latency --ckpt runs/ckpt_decoupled --prompts 128 1024 8192
    python3 eval_dba.py tasks --ckpt runs/ckpt_decoupled --tasks piqa boolq --tasks-dir data/eval --limit 200
    python3 eval_dba.py ppl --ckpt SmolLM2.q8_0.gguf --data wiki.test.tokens --kv-cache q4_0

--ckpt is a run folder (its best.pt), a checkpoint, or a pretrained Llama as a .gguf file or a Hugging Face folder. A
command writes eval_<command>.json beside the checkpoint, or --out, with its settings, the hash of its data and the
hardware, and prints a short table.
"""

import argparse
import dataclasses
import hashlib
import json
import math
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import train_dba
from train_dba import (FORMATS, GPT, Config, KVCache, UserError, autocast, bytes_per_token, cache_formats,
                       load_checkpoint, load_model, pick_device, pick_dtype, provenance, rotate_cache)


@dataclass
class Subject:
    """What is measured: a model in eval mode, its tokenizer, where its results go, and the device and type of it."""
    model: GPT
    tokenizer: object
    folder: Path
    step: int | None
    sha256: str
    device: torch.device
    dtype: torch.dtype

    @property
    def cfg(self) -> Config:
        return self.model.cfg


def file_hash(path):
    """sha256 of a file, in hexadecimal."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def load_subject(args):
    """The Subject of --ckpt, --device and --dtype. Raises UserError."""
    device = pick_device(args.device)
    dtype, _ = pick_dtype(args.dtype, device)
    path = Path(args.ckpt)
    if path.suffix == ".gguf" or (path / "config.json").is_file():
        from convert_dba import load_llama
        model, tokenizer = load_llama(path, device)
        weights = path if path.is_file() else path / "config.json"
        return Subject(model, tokenizer, path.parent, None, file_hash(weights), device, dtype)
    path = path / "best.pt" if path.is_dir() else path
    ckpt = load_checkpoint(path, device)
    return Subject(load_model(ckpt), ckpt["tokenizer"], path.parent, ckpt["step"], file_hash(path), device, dtype)


def held_out_tokens(args, subject):
    """(ids [N] int64, bytes of their text or None, hash) of --data: a .npy by prepare_fineweb.py or a text, else the
    validation part that the checkpoint was trained with."""
    if args.data is None:
        if subject.cfg.data is None:
            raise UserError("--data is missing: this model doesn't say what it was trained on")
        data = train_dba.load_data(subject.cfg)
        return torch.from_numpy(data.val.astype("int64")), data.val_bytes, data.sha256
    path = Path(args.data)
    if not path.is_file():
        raise UserError(f"--data {path} is not a file")
    if path.suffix == ".npy":
        ids, tokenizer, info = train_dba.open_token_file(path)
        if (tokenizer.name, tokenizer.vocab_size) != (subject.tokenizer.name, subject.tokenizer.vocab_size):
            raise UserError(f"{path} was made with {tokenizer.name}, {tokenizer.vocab_size} types; the model reads "
                            f"{subject.tokenizer.name}, {subject.tokenizer.vocab_size}")
        return torch.from_numpy(ids.astype("int64")), info["text_bytes"], info["sha256"]
    text = train_dba.read_text(path)
    ids = subject.tokenizer.encode(text)
    return torch.from_numpy(ids.astype("int64")), len(text.encode()), file_hash(path)


def cache_settings(args, subject):
    """{stream: format} of --kv-cache. Raises UserError where it doesn't fit the model."""
    formats = cache_formats(subject.cfg, args.kv_cache)
    if formats is None:
        raise UserError(f"--kv-cache {args.kv_cache} doesn't fit {subject.cfg.attn_mode} attention")
    return formats


def write_result(args, subject, name, table, **result):
    """Print a table, (head, rows), and write eval_<name>.json."""
    out = Path(args.out or subject.folder / f"eval_{name}.json")
    settings = {key: value for key, value in vars(args).items() if key not in ("run", "out")}
    model = dict(step=subject.step, sha256=subject.sha256, config=dataclasses.asdict(subject.cfg))
    whole = dict(settings=settings, model=model, env=provenance(subject.device), **result)
    train_dba.write_whole(out, lambda temporary: temporary.write_text(json.dumps(whole, indent=1) + "\n"))
    columns = [list(map(str, column)) for column in zip(*table)] if len(table) > 1 else []
    widths = [max(map(len, column)) for column in columns]
    for row in table:
        print("  ".join(str(cell).rjust(width) for cell, width in zip(row, widths)))
    print(f"written to {out}")


# -----------------------------------------------------------------------------
# ppl

def windows(ids, block, stride):
    """Yield (start, ids [block + 1], first) over ids [N]: each token but the first is scored once, tokens from `first`
    on in its window, with at least block - stride tokens before it wherever the text has them."""
    scored = 1                                             # tokens before this one have been scored, or can't be
    for start in range(0, len(ids) - 1, stride):
        window = ids[start:start + block + 1]
        yield start, window, scored - start
        scored = start + len(window)
        if scored == len(ids):
            return


@torch.inference_mode()
def window_nll(subject, batch, formats, residual, kernel=None):
    """nll [B, T - 1] of token ids [B, T] in nats, each row through a cache of its own."""
    cache = KVCache(subject.cfg, len(batch), batch.size(1) - 1, formats, residual, subject.device, kernel)
    nll = []
    with autocast(subject.device, subject.dtype):
        for x, y in zip(*(ids.split(train_dba.PREFILL_CHUNK, 1) for ids in (batch[:, :-1], batch[:, 1:]))):
            logits = subject.model.logits(subject.model.hidden(x, cache))
            nll.append(torch.nn.functional.cross_entropy(logits.mT, y, reduction="none"))
    return torch.cat(nll, 1)


def ppl(args):
    """Held-out loss, perplexity and bits per byte over a whole file, through a cache of any format."""
    subject = load_subject(args)
    formats = cache_settings(args, subject)
    if args.kv_rotate:
        rotate_cache(subject.model)
    block = args.block or subject.cfg.block
    stride = args.stride or max(1, block // 2)
    if stride > block:
        raise UserError(f"--stride {stride} is longer than the window of {block} tokens")
    ids, text_bytes, data_hash = held_out_tokens(args, subject)
    if len(ids) < 2:
        raise UserError(f"{len(ids)} tokens to measure: nothing to predict")
    whole = args.max_tokens is None or args.max_tokens >= len(ids)
    ids = ids if whole else ids[:args.max_tokens]
    parts = list(windows(ids, block, stride))
    total, count = 0.0, 0
    bar = tqdm(total=len(ids) - 1, unit="tok", unit_scale=True, dynamic_ncols=True)
    full = [part for part in parts if len(part[1]) == block + 1]
    groups = [full[i:i + args.batch_size] for i in range(0, len(full), args.batch_size)]
    for group in groups + [[part] for part in parts if len(part[1]) <= block]:
        batch = torch.stack([ids for _, ids, _ in group]).to(subject.device)
        nll = window_nll(subject, batch, formats, args.kv_residual)
        for row, (_, _, first) in zip(nll.double(), group):
            total += row[first - 1:].sum().item()
            count += len(row) - first + 1
        bar.update(count - bar.n)
    bar.close()
    loss = total / count
    if not math.isfinite(loss):
        raise UserError(f"the loss is {loss}: a broken checkpoint, or a cache format that can't hold its values")
    bpb = loss / math.log(2) * count / text_bytes if text_bytes and whole else None
    name = args.kv_cache + "_rotated" * args.kv_rotate + (f"_residual{args.kv_residual}" if args.kv_residual else "")
    n = bytes_per_token(subject.cfg, formats)
    write_result(args, subject, f"ppl_{name}", [
        ("cache", "B/token", "tokens", "loss", "perplexity", "bits/byte"),
        (name, n, count, f"{loss:.5f}", f"{math.exp(loss):.4f}", "-" if bpb is None else f"{bpb:.4f}")],
        loss=loss, ppl=math.exp(loss), bpb=bpb, tokens=count, block=block, stride=stride, formats=formats,
        bytes_per_token=n, data_sha256=data_hash)


# -----------------------------------------------------------------------------
# tasks

# The task's YAML below lm_eval/tasks, the split that is scored, and the fields of an item of the hub's data set.
TASKS = {
    "hellaswag": ("hellaswag/hellaswag.yaml", "validation", ("activity_label", "ctx_a", "ctx_b", "endings", "label")),
    "winogrande": ("winogrande/default.yaml", "validation", ("sentence", "option1", "option2", "answer")),
    "arc_easy": ("arc/arc_easy.yaml", "test", ("question", "choices", "answerKey")),
    "piqa": ("piqa/piqa.yaml", "validation", ("goal", "sol1", "sol2", "label")),
    "boolq": ("super_glue/boolq/default.yaml", "validation", ("passage", "question", "label")),
}
LOCAL_NAMES = {"validation": "valid", "test": "test"}


@torch.inference_mode()
def score(subject, requests, batch_size):
    """[(log-probability of a continuation in nats, whether greedy decoding would write it)] of requests (ids of a
    context, ids of its continuation). What is too long for the model's window is cut from the left."""
    block, same_input = subject.cfg.block, {}
    for i, (context, continuation) in enumerate(requests):
        if not 0 < len(continuation) <= block:
            raise UserError(f"a continuation has {len(continuation)} tokens; the model's window holds 1 to {block}")
        same_input.setdefault(tuple((context + continuation)[-block - 1:-1]), []).append(i)
    inputs, results = sorted(same_input, key=len, reverse=True), {}
    bar = tqdm(total=len(requests), unit="request", dynamic_ncols=True)
    for batch in (inputs[i:i + batch_size] for i in range(0, len(inputs), batch_size)):
        padded = torch.tensor([ids + (0,) * (len(batch[0]) - len(ids)) for ids in batch], device=subject.device)
        with autocast(subject.device, subject.dtype):
            hidden = subject.model.hidden(padded)          # [B, T, E]; attention is causal: padding is never seen
        for h, ids in zip(hidden, batch):
            tails = {i: torch.tensor(requests[i][1], device=subject.device) for i in same_input[ids]}
            longest = max(map(len, tails.values()))
            with autocast(subject.device, subject.dtype):  # logits of the continuation alone
                log_p = subject.model.logits(h[len(ids) - longest:len(ids)]).log_softmax(-1)      # [longest, V]
            for i, tail in tails.items():
                rows = log_p[-len(tail):]
                results[i] = rows.gather(1, tail[:, None]).sum().item(), bool((rows.argmax(-1) == tail).all())
            bar.update(len(tails))
    bar.close()
    return [results[i] for i in range(len(requests))]


def cut_at(text, until):
    """A text up to the first of some strings, and whether there was one."""
    places = [place for stop in until if stop and (place := text.find(stop)) >= 0]
    return (text[:min(places)], True) if places else (text, False)


def continue_text(subject, prompts, most, until):
    """Greedy continuations, as texts, of prompts [B, T] of token ids: up to a string of `until`, the token that ends a
    text, or `most` tokens."""
    eot, texts = subject.tokenizer.eot, {}
    cache = KVCache(subject.cfg, len(prompts), len(prompts[0]) + most - 1, "fp32", device=subject.device)
    written = [[] for _ in prompts]
    with autocast(subject.device, subject.dtype):
        for tokens in train_dba.generate(subject.model, torch.tensor(prompts, device=subject.device), most, cache, 0):
            for row, token in enumerate(tokens[:, 0].tolist()):
                if row in texts:
                    continue
                written[row] += [token] if token != eot else []
                text, stopped = cut_at(subject.tokenizer.decode(written[row]).decode(errors="replace"), until)
                if stopped or token == eot or len(written[row]) == most:
                    texts[row] = text
            if len(texts) == len(prompts):
                break
    return [texts[row] for row in range(len(prompts))]


def lm_eval_model(subject, batch_size):
    """A Subject as a model of lm-eval."""
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
    tokenizer, block = subject.tokenizer, subject.cfg.block
    starts = getattr(tokenizer, "prefix", [])              # what a pretrained tokenizer puts before a text

    class Model(TemplateLM):
        eot_token_id = tokenizer.eot
        prefix_token_id = getattr(tokenizer, "bos", tokenizer.eot)
        max_length = block

        def tok_encode(self, string, add_special_tokens=None, **how):
            ids = tokenizer.encode(string).tolist()
            return ids if add_special_tokens is False or ids[:1] == starts else starts + ids

        def _loglikelihood_tokens(self, requests, **how):
            return score(subject, [(context, continuation) for _, context, continuation in requests], batch_size)

        def loglikelihood_rolling(self, requests, disable_tqdm=False):
            windows = [[make_disjoint_window(window) for window in get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, block, 1)] for request in requests]
            scores = iter(score(subject, [window for text in windows for window in text], batch_size))
            return [sum(next(scores)[0] for _ in text) for text in windows]

        def generate_until(self, requests, disable_tqdm=False):
            groups, texts = {}, {}                         # prompts of one length and the same settings go together
            for i, request in enumerate(requests):
                how = normalize_gen_kwargs(request.args[1], 256)
                most, until = how["max_gen_toks"], how.get("until") or []
                if how["do_sample"] or not 0 < most < block:
                    raise UserError(f"{request.args[1]}: only greedy texts of 1 to {block - 1} tokens are written")
                ids = self.tok_encode(request.args[0])[most - block:]
                until = (until,) if isinstance(until, str) else tuple(until)
                groups.setdefault((len(ids), most, until), []).append((i, ids))
            for (_, most, until), group in groups.items():
                for start in range(0, len(group), batch_size):
                    rows, prompts = zip(*group[start:start + batch_size])
                    texts.update(zip(rows, continue_text(subject, prompts, most, until)))
            return [texts[i] for i in range(len(requests))]

    return Model()


def check_items(path, fields):
    """Raises UserError unless a file has items, one per line, with these fields."""
    number = 0
    with open(path, "rb") as f:
        for number, line in enumerate(f, 1):
            try:
                lacking = [field for field in fields if field not in json.loads(line)]
            except (ValueError, TypeError) as e:
                raise UserError(f"{path}:{number} is no JSON object ({e})") from None
            if lacking:
                raise UserError(f"{path}:{number} lacks {', '.join(lacking)}")
    if number == 0:
        raise UserError(f"{path} is empty")


def write_task(name, data, folder):
    """Write a task's YAML into a folder: lm-eval's own, or with data, a folder, its own on a local file."""
    from lm_eval import tasks as installed
    yaml, split, fields = TASKS[name]
    task = dict(include=str(Path(installed.__file__).parent / yaml), task=name)
    if data is not None:
        path = Path(data) / f"{name}_{LOCAL_NAMES[split]}.jsonl"
        if not path.is_file():
            raise FileNotFoundError(f"no {path.name} in {data}")
        check_items(path, fields)
        task.update(dict.fromkeys(("training_split", "validation_split", "test_split")), dataset_path="json",
                    dataset_name=None, dataset_kwargs=dict(data_files={split: str(path.resolve())},
                                                           cache_dir=str(folder / "cache")))
        task[f"{split}_split"] = split
    (folder / f"{name}.yaml").write_text(json.dumps(task))                      # JSON is YAML


def load_tasks(names, data, folder):
    """({name: task of lm-eval}, {name: why it can't be run}) on the files of a folder `data` or, if that is None, on
    the hub's. folder: a temporary one that must outlive the tasks."""
    from lm_eval.tasks import TaskManager
    tasks, missing = {}, {}
    for name in dict.fromkeys(names):
        try:
            write_task(name, data, folder)
            tasks.update(TaskManager(include_path=folder, include_defaults=False).load([name])["tasks"])
        except OSError as e:                               # of which are the hub's errors
            missing[name] = str(e).splitlines()[0][:200]
            print(f"{name} is not run: {missing[name]}", file=sys.stderr)
    if not tasks:
        raise UserError(f"no data for any task: {'; '.join(missing.values())}")
    return tasks, missing


def task_result(results, name):
    """What is kept of one task in lm-eval's results: scores, and which items were right, in the data's order."""
    scores, samples = results["results"][name], sorted(results["samples"][name], key=lambda sample: sample["doc_id"])
    items = [f"{sample['doc_id']}-{sample['doc_hash'][:16]}" for sample in samples]
    metrics = [metric for metric in ("acc", "acc_norm") if f"{metric},none" in scores]
    result = dict(n=len(items), version=results["versions"][name],
                  data_sha256=hashlib.sha256("".join(sample["doc_hash"] for sample in samples).encode()).hexdigest())
    for metric in metrics:
        result.update({metric: scores[f"{metric},none"], f"{metric}_stderr": scores[f"{metric}_stderr,none"]})
    return dict(result, items=items, correct={m: [int(sample[m]) for sample in samples] for m in metrics})


def mcnemar(this, other):
    """(right only in this, right only in the other, exact two-sided p) of two 0/1 lists over the same items."""
    b, c = sum(x > y for x, y in zip(this, other)), sum(x < y for x, y in zip(this, other))
    term = tail = 1                                        # binomial coefficients of b + c, and their sum
    for k in range(min(b, c)):
        term = term * (b + c - k) // (k + 1)
        tail += term
    return b, c, min(1.0, 2 * tail / 2 ** (b + c))


def compare_tasks(this, other):
    """{(task, metric): pairs, accuracy of the other, McNemar's test} over the items that two results share."""
    rows = {}
    for name in this.keys() & other.keys():
        for metric in this[name]["correct"].keys() & other[name]["correct"].keys():
            mine, its = (dict(zip(result[name]["items"], result[name]["correct"][metric])) for result in (this, other))
            if common := mine.keys() & its.keys():
                b, c, p = mcnemar(*([right[item] for item in common] for right in (mine, its)))
                rows[name, metric] = dict(pairs=len(common), other=sum(its[item] for item in common) / len(common),
                                          only_this=b, only_other=c, p=p)
    if not rows:
        raise UserError("--compare: the two results have no items in common")
    return rows


def read_tasks(path):
    """The tasks of a result file that `tasks` wrote."""
    try:
        tasks = json.loads(Path(path).read_text())["tasks"]
        [(task["items"], task["correct"].items()) for task in tasks.values()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f"--compare {path} is no result of tasks ({type(e).__name__}: {e})") from None
    return tasks


def tasks(args):
    """Zero-shot accuracy on benchmarks by lm-eval, and McNemar's test against another result."""
    try:
        import lm_eval
    except ModuleNotFoundError as e:
        raise UserError(f"tasks needs lm-eval ({e.name} is missing): pip install -r requirements-eval.txt") from None
    other = args.compare and read_tasks(args.compare)
    with tempfile.TemporaryDirectory() as folder:
        loaded, missing = load_tasks(args.tasks, args.tasks_dir, Path(folder))
        for task in loaded.values():
            task.set_config("num_fewshot", 0)
        subject = load_subject(args)
        results = lm_eval.evaluate(lm_eval_model(subject, args.batch_size), {"tasks": loaded}, limit=args.limit)
    done = {name: task_result(results, name) for name in loaded}
    pairs = compare_tasks(done, other) if other else {}
    table = [("task", "metric", "items", "accuracy", "stderr")
             + (("pairs", "other", "only this", "only other", "p") if other else ())]
    for name, metric in ((name, metric) for name, task in done.items() for metric in task["correct"]):
        task, pair = done[name], pairs.get((name, metric))
        row = (name, metric, task["n"], f"{task[metric]:.4f}", f"{task[f'{metric}_stderr']:.4f}")
        row += (pair["pairs"], f"{pair['other']:.4f}", pair["only_this"], pair["only_other"], f"{pair['p']:.4g}") \
            if pair else ("-",) * (len(table[0]) - len(row))
        table.append(row)
    compared = [dict(task=name, metric=metric, **pair) for (name, metric), pair in sorted(pairs.items())]
    write_result(args, subject, "tasks", table, tasks=done, not_run=missing, compared=compared, num_fewshot=0,
                 lm_eval=lm_eval.__version__)


# -----------------------------------------------------------------------------
# Main

def flags(parser, data=False, cache=False):
    """Flags that commands share."""
    parser.add_argument("--ckpt", required=True, help="run folder, checkpoint, .gguf or Hugging Face folder")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="float32", choices=("auto", "float32", "bfloat16", "float16"))
    parser.add_argument("--out", help="result file (eval_<command>.json beside the checkpoint)")
    if data:
        parser.add_argument("--data", help=".npy or text (the checkpoint's validation part)")
    if cache:
        parser.add_argument("--kv-cache", default="fp16", choices=(*FORMATS, "hetero"))
        parser.add_argument("--kv-residual", type=positive(0), default=0, help="newest tokens that stay fp16 (0)")
        parser.add_argument("--kv-rotate", action="store_true", help="rotate what is cached without RoPE")


def positive(least=1):
    """Type of a flag: a whole number of at least `least`."""
    def parse(text):
        if (value := int(text)) < least:
            raise argparse.ArgumentTypeError(f"{value} must be at least {least}")
        return value
    return parse


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    p = commands.add_parser("ppl", help=ppl.__doc__, allow_abbrev=False)
    flags(p, data=True, cache=True)
    p.add_argument("--block", type=positive(2), help="tokens of a window (the model's context)")
    p.add_argument("--stride", type=positive(), help="tokens between windows (half a window)")
    p.add_argument("--batch-size", type=positive(), default=8, help="windows at once (8)")
    p.add_argument("--max-tokens", type=positive(2), help="measure only the first so many tokens")
    p.set_defaults(run=ppl)

    p = commands.add_parser("tasks", help=tasks.__doc__, allow_abbrev=False)
    flags(p)
    p.add_argument("--tasks", nargs="+", choices=TASKS, default=[*TASKS], metavar="TASK", help=f"{', '.join(TASKS)}")
    p.add_argument("--tasks-dir", metavar="DIR", help="local data in the hub's fields: DIR/<task>_valid.jsonl, and "
                   "arc_easy_test.jsonl (the Hugging Face hub)")
    p.add_argument("--limit", type=positive(), help="only the first so many items of each task")
    p.add_argument("--batch-size", type=positive(), default=8, help="texts at once (8)")
    p.add_argument("--compare", metavar="RESULT", help="another result of this command, to test against item by item")
    p.set_defaults(run=tasks)
    return parser


def main(argv=None):
    args = make_parser().parse_args(argv)
    try:
        args.run(args)
        return 0
    except UserError as e:
        tqdm.write(f"error: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
