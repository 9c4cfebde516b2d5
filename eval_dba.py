"""
Measure a checkpoint.

    python3 eval_dba.py ppl --ckpt runs/ckpt_decoupled --kv-cache hetero
    python3 eval_dba.py latency --ckpt runs/ckpt_decoupled --prompts 128 1024 8192
    python3 eval_dba.py ppl --ckpt SmolLM2.q8_0.gguf --data wiki.test.tokens --kv-cache q4_0

--ckpt is a run folder (its best.pt), a checkpoint, or a pretrained Llama as a .gguf file or a Hugging Face folder. A
command writes eval_<command>.json beside the checkpoint, or --out, with its settings, the hash of its data and the
hardware, and prints a short table.
"""

import argparse
import collections
import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
import operator
import os
import random
import re
import statistics
import sys
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
# probes

PROBES = Path(__file__).with_name("probes.json")           # the literal cases
WORDS = ("barn bell bird boat bone cave clay coat crow dune dust fern fish flax frog gate goat gold hail hawk iron "
         "kelp kiln lamb lamp leaf lime lion loom mint moon moss moth nest nail pear pine plum pond rain reed rice "
         "rope rust salt sand seal ship silk snow soap star swan tide toad vine wind wolf wool yarn").split()
FILLER = ("The hedge was cut on Monday.", "Two men carried a table upstairs.", "It was too cold to swim.",
          "Her bicycle leaned on the fence.", "The train left without a sound.", "Dust lay on every shelf.",
          "Old maps hung in the hall.", "A dog slept under the bench.")
PROBE_RULES = {
    "exact": "the first line of the output, white space squeezed, is the target",
    "content": "the target's words (runs of letters and digits, case ignored) follow each other in the output, with at "
               "most 2 words before them",
    "preferred": "margin > 0; margin: log p(target) - log p(distractor) after the prompt, teacher-forced, summed, nats",
    "loop": "the output, white space squeezed, ends in a unit that stands there at least 3 times in a row, in 16 "
            "characters or more; its last copy may be cut off",
    "interval": "Wilson, 95 %",
    "compare": "exact McNemar test, two-sided, over the cases in which the two results differ",
}
PROBE_CHECKS = ("exact", "content", "preferred", "loop")


# --- templates: a random generator -> prompt, target, distractor. Target and distractor have as many characters.

def copy_template(form):
    """Lists to copy, in the form that form(items) gives them: two of words, then one of codes."""
    def make(rng):
        first, second = rng.sample(WORDS, 3), rng.sample(WORDS, 3)
        codes = [rng.choice("BCDFGHJKLMNPQRSTVWXZ") + str(rng.randrange(100, 1000)) for _ in range(3)]
        shown = [form(items) for items in (first, second, codes)]
        lines = [f"seen: {text}\ntold: {text}\n" for text in shown[:2]]
        return f"{''.join(lines)}seen: {shown[2]}\ntold:", shown[2], shown[rng.randrange(2)]
    return make


def repeat_template(rng):
    words = rng.sample(WORDS, 5)
    cut = rng.randrange(3)                                 # so many words are given away
    again, rest = " ".join(["again:", *words[:cut]]), words[cut:]
    return f"once: {' '.join(words)}\n{again}", " ".join(rest), " ".join(rest[::-1])


def spelling_template(rng):
    words = rng.sample([word for word in WORDS if word[1] != word[2]], 3)
    spelled = ["-".join(word) for word in words]
    wrong = "-".join(words[2][i] for i in (0, 2, 1, 3))
    return f"{words[0]}: {spelled[0]}\n{words[1]}: {spelled[1]}\n{words[2]}:", spelled[2], wrong


def near(rng, number):
    """A number beside `number` that has as many digits."""
    return rng.choice([n for n in (number - 1, number + 1) if n >= 0 and len(str(n)) == len(str(number))])


def arithmetic_template(rng):
    pairs = [(rng.randrange(2, 50), rng.randrange(2, 50)) for _ in range(3)]
    a, b = pairs[2]
    shown = "".join(f"{x} + {y} = {x + y}\n" for x, y in pairs[:2])
    return f"{shown}{a} + {b} =", a + b, near(rng, a + b)


def counting_template(rng):
    (a, b), word = rng.sample(range(2, 10), 2), rng.choice(WORDS)
    other = rng.choice([n for n in range(2, 10) if n not in (a, b)])
    lines = [f"{' '.join([word] * n)}: {n}\n" for n in (a, other)]
    return f"{''.join(lines)}{' '.join([word] * b)}:", b, a


def passkey_template(rng):
    key, other = (str(n) for n in rng.sample(range(10_000, 100_000), 2))
    text = " ".join(rng.sample(FILLER, rng.randrange(2, 6)))
    lines = rng.sample([f"Door code: {key}\n", f"Safe code: {other}\n"], 2)
    return f"{''.join(lines)}{text}\nDoor code:", key, other


def pattern_template(rng):
    rows = [(rng.randrange(1, 10), step) for step in rng.sample(range(2, 10), 3)]
    shown = [", ".join(str(start + i * step) for i in range(4)) for start, step in rows]
    answer = [start + 4 * step for start, step in rows]
    lines = [f"{text}, next {n}\n" for text, n in zip(shown[:2], answer)]
    return f"{''.join(lines)}{shown[2]}, next", answer[2], near(rng, answer[2])


def identity_template(rng):
    words = rng.sample(WORDS, 4)
    lines = [f"same({word}) = {word}\n" for word in words[:3]]
    return f"{''.join(lines)}same({words[3]}) =", words[3], words[rng.randrange(3)]


TEMPLATES = {
    "copy": copy_template(" ".join),
    "copy_commas": copy_template(", ".join),
    "copy_brackets": copy_template(lambda items: " ".join(f"[{item}]" for item in items)),
    "repeat": repeat_template,
    "spelling": spelling_template,
    "arithmetic": arithmetic_template,
    "counting": counting_template,
    "passkey": passkey_template,
    "pattern": pattern_template,
    "identity": identity_template,
}


def probe_cases(instances, seed):
    """The literal cases, then `instances` different ones of each template: dicts of set, name, kind, prompt, target and
    distractor, the latter two with the space that the prompt leaves to them."""
    try:
        literal = json.loads(PROBES.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise UserError(f"can't read the cases in {PROBES.name} beside eval_dba.py ({type(e).__name__})") from None
    cases = [dict(case, set="literal") for case in literal]
    for kind, template in TEMPLATES.items():
        rng, made = random.Random(f"{kind} {seed}"), {}
        while len(made) < instances:
            prompt, target, distractor = template(rng)
            made[prompt] = dict(kind=kind, prompt=prompt, target=f" {target}", distractor=f" {distractor}")
        cases += [dict(case, set="template") for case in made.values()]
    count = collections.Counter()
    for case in cases:
        count[case["set"], case["kind"]] += 1
        case["name"] = f"{case['kind']} {count[case['set'], case['kind']]}"
    return cases


# --- judging an output

def squeeze(text):
    return " ".join(text.split())


def exact_match(output, target):
    return squeeze(output.partition("\n")[0]) == squeeze(target)


def content_match(output, target):
    found, wanted = (re.findall(r"[^\W_]+", text.lower()) for text in (output, target))
    return any(found[i:i + len(wanted)] == wanted for i in range(3))


def in_loop(output):
    text = squeeze(output)
    for unit in range(1, len(text) // 3 + 1):
        same = 0                                           # characters at the end that are those one unit before
        while same < len(text) - unit and text[-1 - same] == text[-1 - same - unit]:
            same += 1
        if same + unit >= max(3 * unit, 16):
            return True
    return False


def wilson(hits, n, z=1.959964):
    """95 % interval of a share, by Wilson's score."""
    middle, half = hits + z * z / 2, z * math.sqrt(hits * (n - hits) / n + z * z / 4)
    return (middle - half) / (n + z * z), (middle + half) / (n + z * z)


def mcnemar(here, there):
    """Exact two-sided p that so uneven a split of the cases in which two results differ is chance."""
    tail = sum(math.comb(here + there, i) for i in range(min(here, there) + 1))
    return min(1.0, 2 * tail / 2**(here + there))


# --- running the cases

def equal_lengths(rows, most):
    """Yield lists of up to `most` indices of rows that are equally long."""
    same = collections.defaultdict(list)
    for i, row in enumerate(rows):
        same[len(row)].append(i)
    for group in same.values():
        yield from (group[i:i + most] for i in range(0, len(group), most))


def greedy_outputs(args, subject, formats, prompts):
    """The text that follows each prompt (token ids), likeliest token by token through the cache, up to the end of the
    document. A word tokenizer's end of a document is the end of a line, and is read on."""
    outputs, end = [None] * len(prompts), None if subject.tokenizer.name == "word" else subject.tokenizer.eot
    for group in tqdm(list(equal_lengths(prompts, args.batch_size)), desc="outputs", dynamic_ncols=True):
        batch = torch.tensor([prompts[i] for i in group], device=subject.device)
        cache = KVCache(subject.cfg, len(group), batch.size(1) + args.max_new_tokens - 1, formats, args.kv_residual,
                        subject.device)
        with autocast(subject.device, subject.dtype):
            new = list(train_dba.generate(subject.model, batch, args.max_new_tokens, cache, temperature=0))
        for i, ids in zip(group, torch.cat(new, 1).tolist()):
            ids = ids[:ids.index(end)] if end in ids else ids
            outputs[i] = subject.tokenizer.decode(ids).decode("utf-8", "replace")
    return outputs


def margins(args, subject, formats, triples):
    """log p(target) - log p(distractor) in nats, for triples of token ids: the prompt alone, with the target, with the
    distractor. Counted from the first token in which the three differ, wherever a tokenizer draws its borders."""
    rows, start = [row for _, *pair in triples for row in pair], []
    for triple in triples:
        start += [max(1, len(os.path.commonprefix(triple)))] * 2
    score = [0.0] * len(rows)
    for group in tqdm(list(equal_lengths(rows, args.batch_size)), desc="margins", dynamic_ncols=True):
        batch = torch.tensor([rows[i] for i in group], device=subject.device)
        for i, nll in zip(group, window_nll(subject, batch, formats, args.kv_residual)):
            score[i] = -nll[start[i] - 1:].double().sum().item()
    return [target - distractor for target, distractor in zip(score[::2], score[1::2])]


def run_cases(args, subject, formats, cases):
    """The cases, each with its output, margin, checks, and what may have made it unfair: tokens past the training
    context, words that the tokenizer doesn't know."""
    encode, unknown = (lambda text: subject.tokenizer.encode(text).tolist()), None
    if subject.tokenizer.name == "word":
        unknown = subject.tokenizer.ids[train_dba.UNK]
    triples = [[encode(case["prompt"] + more) for more in ("", case["target"], case["distractor"])] for case in cases]
    outputs = greedy_outputs(args, subject, formats, [triple[0] for triple in triples])
    results = []
    for case, triple, output, margin in zip(cases, triples, outputs, margins(args, subject, formats, triples)):
        if not math.isfinite(margin):
            raise UserError(f"{case['name']}: the margin is {margin}: a broken checkpoint, or a cache format that "
                            "can't hold its values")
        checks = dict(exact=exact_match(output, case["target"]), content=content_match(output, case["target"]),
                      preferred=margin > 0, loop=in_loop(output))
        results.append(dict(case, output=output, margin=margin, **checks, prompt_tokens=len(triple[0]),
                            unknown_words=sum(token == unknown for token in triple[1]),
                            past_context=max(map(len, triple)) > subject.cfg.block))
    return results


def probe_counts(results):
    """[{set, kind, n, and per check (hits, low, high); margin: the mean}] per kind, and over all of a set."""
    found = []
    for chosen in dict.fromkeys(r["set"] for r in results):
        cases = [r for r in results if r["set"] == chosen]
        for kind in (*dict.fromkeys(r["kind"] for r in cases), "all"):
            of_kind = [r for r in cases if kind in (r["kind"], "all")]
            hits = {check: sum(r[check] for r in of_kind) for check in PROBE_CHECKS}
            mean = statistics.mean(r["margin"] for r in of_kind)
            found.append(dict(set=chosen, kind=kind, n=len(of_kind), margin=mean,
                              **{check: (k, *wilson(k, len(of_kind))) for check, k in hits.items()}))
    return found


def read_checks(path, cases):
    """The checks of another eval_probes.json, {check: bool} for each of these cases."""
    key = operator.itemgetter("set", "name", "prompt", "target", "distractor")
    try:
        there = json.loads(Path(path).read_text(encoding="utf-8"))["cases"]
        checks = {key(r): {check: bool(r[check]) for check in PROBE_CHECKS} for r in there}
    except (OSError, *train_dba.BROKEN) as e:
        raise UserError(f"--compare {path} is not a result of probes ({type(e).__name__})") from None
    if checks.keys() != {key(case) for case in cases}:
        raise UserError(f"--compare {path} has other cases: give both commands the same --instances and --seed")
    return [checks[key(case)] for case in cases]


def probe_differences(results, others):
    """[{set, n, and per check (true here only, true there only, p)}] for the literal cases and for the templates."""
    found = []
    for chosen in dict.fromkeys(r["set"] for r in results):
        pairs = [(here, there) for here, there in zip(results, others) if here["set"] == chosen]
        splits = {check: (sum(here[check] > there[check] for here, there in pairs),
                          sum(here[check] < there[check] for here, there in pairs)) for check in PROBE_CHECKS}
        found.append(dict(set=chosen, n=len(pairs),
                          **{check: (*split, mcnemar(*split)) for check, split in splits.items()}))
    return found


# --- tables

def visible(text, most=48):
    """One line of printable ASCII: a line's end as \\n, other characters by their numbers, a long text cut."""
    text = text.encode("unicode_escape").decode().replace("\\\\", "\\")
    return text if len(text) <= most else text[:most - 3] + "..."


def markdown(text):
    return re.sub(r"([\\`*_{}\[\]<>#|~&$])", r"\\\1", text)


def latex(text):
    """Text in LaTeX, ASCII; no package is needed, no two characters join into another."""
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}",
               ">": r"\textgreater{}", "|": r"\textbar{}", '"': r"\char34{}", "-": "-{}", "'": "'{}", "`": "`{}",
               "[": "{[}", "]": "{]}", "?": "?{}", "!": "!{}", **{c: "\\" + c for c in "{}$&#_%"}}
    return "".join(special.get(c, c) for c in text)


def markdown_table(head, *rows):
    line = "| " + " | ".join("---" for _ in head) + " |"
    text = ["| " + " | ".join(markdown(str(cell)) for cell in row) + " |" for row in (head, *rows)]
    return "\n".join([text[0], line, *text[1:]]) + "\n"


def latex_table(head, *rows):
    text = [" & ".join(latex(str(cell)) for cell in row) + r" \\" for row in (head, *rows)]
    return "\n".join([rf"\begin{{tabular}}{{{'l' * len(head)}}}", r"\hline", text[0], r"\hline", *text[1:], r"\hline",
                      r"\end{tabular}"]) + "\n"


def count_table(counts, differences):
    """(head, *rows) of hits with their intervals in per cent, and of what the comparison found."""
    rows = [("cases", "kind", "n", *PROBE_CHECKS, "mean margin")]
    for c in counts:
        rows.append((c["set"], c["kind"], c["n"], *("{} ({:.0f}-{:.0f} %)".format(
            c[check][0], *(100 * x for x in c[check][1:])) for check in PROBE_CHECKS), f"{c['margin']:+.2f}"))
    for d in differences:
        rows.append((d["set"], "here only, there only, p", d["n"], *("+{} -{} p {:.3g}".format(*d[check])
                                                                   for check in PROBE_CHECKS), ""))
    return rows


def case_table(results):
    """(head, *rows): target, output and checks of the literal cases."""
    rows = [("case", "target", "output", *PROBE_CHECKS, "margin")]
    for r in (r for r in results if r["set"] == "literal"):
        rows.append((r["name"], visible(r["target"].strip()), visible(r["output"]),
                     *("yes" if r[check] else "no" for check in PROBE_CHECKS), f"{r['margin']:+.2f}"))
    return rows


def probes(args):
    """Behavioural cases: copying, spelling, arithmetic, recall, with exact tests between two checkpoints."""
    cases = probe_cases(args.instances, args.seed)
    others = read_checks(args.compare, cases) if args.compare else None
    subject = load_subject(args)
    formats = cache_settings(args, subject)
    name = "probes" + f"_{args.kv_cache}" * (args.kv_cache != "fp16") + "_rotated" * args.kv_rotate
    name += f"_residual{args.kv_residual}" * (args.kv_residual > 0)
    out = Path(args.out or subject.folder / f"eval_{name}.json")
    if out.suffix != ".json":
        raise UserError(f"--out {out} must end in .json: the tables are written beside it as .md and .tex")
    if args.kv_rotate:
        rotate_cache(subject.model)
    results = run_cases(args, subject, formats, cases)
    counts = probe_counts(results)
    differences = probe_differences(results, others) if others else []
    tables = count_table(counts, differences), case_table(results)
    for suffix, table in ((".md", markdown_table), (".tex", latex_table)):
        text = "\n".join(table(*rows) for rows in tables)
        train_dba.write_whole(out.with_suffix(suffix), lambda temporary: temporary.write_text(text, encoding="utf-8"))
    for key, what in (("unknown_words", "hold words that the tokenizer doesn't know"),
                      ("past_context", "are longer than the training context")):
        if n := sum(bool(r[key]) for r in results):
            print(f"{n} of {len(results)} cases {what}")
    write_result(args, subject, name, tables[0], rules=PROBE_RULES, formats=formats, counts=counts,
                 compare=differences, cases=results)


# -----------------------------------------------------------------------------
# rank

RANK_DEFINITIONS = {
    "entropy_rank_sigma": "exp(-sum p ln p), p = sigma / sum(sigma), sigma = sqrt(lambda)",
    "entropy_rank_lambda": "exp(-sum p ln p), p = lambda / sum(lambda)",
    "participation_ratio": "sum(lambda)^2 / sum(lambda^2)",
    "stable_rank": "sum(lambda) / max(lambda)",
    "k90": "fewest eigenvalues that hold 90 % of sum(lambda)",
    "k95": "fewest eigenvalues that hold 95 % of sum(lambda)",
    "k99": "fewest eigenvalues that hold 99 % of sum(lambda)",
    "Q, K": "lambda: eigenvalues of the second moment of a token's queries or keys; queries carry their path's scale "
            "and the temperature. These ranks depend on the basis: (Q A, K A^-T) gives the same scores",
    "QK": "sigma: singular values of Sq^(1/2) Sk^(1/2) of one head, Sq and Sk the second moments of its queries and "
          "keys; lambda = sigma^2. No change of basis alters them",
    "share": "sum of the first r lambda of QK over all of them: of E[(q.k)^2] over independent queries and keys, what "
             "the best score of width r per head keeps",
    "merged": "all heads as one vector, a key that several heads share once",
    "head": "median over the query heads",
    "path": "sem, geo; total: both paths of a head as one vector (all there is, where a mode has one path)",
    "rope": "before, after; none: this path isn't rotated",
}
SHARE_WIDTHS = (4, 8, 16, 32)
TOKENS_PER_CHANNEL = 10                                    # fewer would bend the small eigenvalues


def effective_ranks(eigenvalues):
    """{measure: [...]} of eigenvalues [..., n] >= 0 in descending order, as RANK_DEFINITIONS has them."""
    p, q = (x / x.sum(-1, keepdim=True) for x in (eigenvalues, eigenvalues.sqrt()))
    few = {f"k{share}": (p.cumsum(-1) < share / 100 - 1e-9).sum(-1) + 1 for share in (90, 95, 99)}
    return dict(entropy_rank_sigma=torch.special.entr(q).sum(-1).exp(),
                entropy_rank_lambda=torch.special.entr(p).sum(-1).exp(),
                participation_ratio=1 / p.square().sum(-1), stable_rank=1 / p[..., 0], **few)


def eigenvalues_of(moment):
    """Eigenvalues [..., n] of symmetric [..., n, n], descending, without the rounding below zero."""
    return torch.linalg.eigvalsh(moment).flip(-1).clamp(min=0)


def product_spectrum(of_q, of_k):
    """Singular values [..., n] of Sq^(1/2) Sk^(1/2), descending, for second moments Sq, Sk [..., n, n]."""
    (a, u), (b, v) = torch.linalg.eigh(of_q), torch.linalg.eigh(of_k)
    a, b = (x.clamp(min=0).sqrt() for x in (a, b))
    return torch.linalg.svdvals(a[..., None] * (u.mT @ v) * b[..., None, :])    # less two rotations, which change none


@contextlib.contextmanager
def watch_projections(model, see):
    """While open, every attention layer calls see(layer, path, (q, k) before RoPE, (q, k) after it) for each of its
    paths, q [B, H, T, w] scaled, k [B, G, T, w]. The layers themselves keep nothing."""
    def watched(layer, project):
        def call(path, *rest):
            found = project(path, *rest)
            see(layer, path, project(dataclasses.replace(path, rotate=False), *rest)[:2], found[:2])
            return found
        return call

    for layer, block in enumerate(model.blocks):
        block.attn.project = watched(layer, block.attn.project)
    try:
        yield
    finally:
        for block in model.blocks:
            del block.attn.project                         # what the instance hid: the method of the class


class Moments:
    """Second moments over tokens, in float64, of the queries and keys of every layer.

    A token's vector is that of all heads, path after path: [H·r | H·p] for queries, [G·r | G·p] for keys.
    sums[layer, side, rotated] = (sum of x xᵀ [C, C], sum of x [C]), side 0: queries, 1: keys.
    """

    def __init__(self, cfg, device):
        self.paths, self.sums, self.tokens, self.parts = cfg.attention.paths, {}, 0, []
        self.device = "cpu" if device.type == "mps" else device                 # where there is float64

    def see(self, layer, path, plain, rotated):
        self.parts.append((plain, rotated))
        if path.name != self.paths[-1].name:
            return
        for side, after in itertools.product((0, 1), (False, True)):
            x = torch.cat([part[after][side].transpose(1, 2).flatten(2) for part in self.parts], 2).flatten(0, 1)
            x = x.to(self.device).double()                                      # [B·T, C]
            old = self.sums.get((layer, side, after), (0.0, 0.0))
            self.sums[layer, side, after] = old[0] + x.T @ x, old[1] + x.sum(0)
        self.tokens += len(x) if layer == 0 else 0
        self.parts = []

    def matrix(self, layer, side, rotated, centred):
        """Second moment [C, C] of a layer's queries or keys, about their mean where centred."""
        product, total = (x / self.tokens for x in self.sums[layer, side, rotated])
        product = product - torch.outer(total, total) if centred else product
        if not product.isfinite().all() or product.trace() <= 0:
            name = ("queries", "keys")[side]
            raise UserError(f"layer {layer}: the {name} are zero, infinite or NaN: a broken checkpoint")
        return product


def channels(shape, n_head):
    """{path: (query channels [H, w], key channels [H, w])}: where the vectors of Moments hold what a query head reads.
    """
    found, start = {}, [0, 0]
    for path in shape.paths:
        found[path.name] = []
        for side, heads in enumerate((n_head, path.groups)):
            ids = start[side] + torch.arange(heads * path.width).view(heads, -1)
            start[side] += ids.numel()
            found[path.name].append(ids.repeat_interleave(n_head // heads, 0))
    total = [torch.cat(ids, 1) for ids in zip(*found.values())]
    return {**found, "total": total} if len(found) > 1 else {"total": total}


def six_digits(x):
    """A tensor as a number or nested lists, six significant digits each."""
    return [six_digits(row) for row in x] if x.dim() else float(f"{x.item():.6g}")


def rank_numbers(eigenvalues):
    """Effective ranks of eigenvalues [n], or their medians over heads [H, n], as numbers."""
    ranks = effective_ranks(eigenvalues).items()
    return {name: six_digits(x.double().quantile(0.5) if x.dim() else x) for name, x in ranks}


def layer_ranks(moments, cfg, layer, centred):
    """Yield a record per path, stage of RoPE and matrix of one layer."""
    turned = {path.name: path.rotate for path in cfg.attention.paths}
    turned["total"] = any(turned.values())
    for name, ids in channels(cfg.attention, cfg.n_head).items():
        for rope, after in (("before", False), ("after", True)) if turned[name] else (("none", False),):
            where, heads = dict(layer=layer, path=name, rope=rope), []
            for side, of in enumerate("QK"):
                moment, own = moments.matrix(layer, side, after, centred), ids[side].to(moments.device)
                merged = own.unique()
                values = eigenvalues_of(moment[merged[:, None], merged])
                heads.append(moment[own[:, :, None], own[:, None]])             # [H, w, w]
                yield dict(where, of=f"{of} merged", channels=len(merged), ranks=rank_numbers(values),
                           spectrum=six_digits(values / values.sum()))
                yield dict(where, of=f"{of} head", channels=own.size(1),
                           ranks=rank_numbers(eigenvalues_of(heads[side])))
            energy = product_spectrum(*heads).square()                          # [H, w]
            energy = energy / energy.sum(1, keepdim=True)
            share = {r: energy[:, :r].sum(1) for r in SHARE_WIDTHS}
            yield dict(where, of="QK head", channels=energy.size(1), ranks=rank_numbers(energy),
                       share={r: six_digits(x.quantile(0.5)) for r, x in share.items()},
                       least_share={r: six_digits(x.min()) for r, x in share.items()}, spectra=six_digits(energy))


@torch.inference_mode()
def measure_ranks(subject, model, batches, centred):
    """Records of all layers of a model, over batches of token ids [B, T]."""
    moments = Moments(model.cfg, subject.device)
    with watch_projections(model, moments.see), autocast(subject.device, subject.dtype):
        for batch in tqdm(batches, unit="batch", dynamic_ncols=True):
            model.hidden(batch.to(subject.device))
    return [record for layer in range(model.cfg.layers) for record in layer_ranks(moments, model.cfg, layer, centred)]


def initial_model(subject):
    """The model as it was before its first step: the same settings and seed."""
    torch.manual_seed(subject.cfg.seed)
    return GPT(subject.cfg, subject.model.vocab_size).init_weights().to(subject.device).eval()


def spread_windows(ids, tokens, block):
    """Windows [n, block] that don't overlap, spread evenly over ids [N]: at least `tokens` tokens, if there are."""
    block = min(block, len(ids))
    count = min(-(-tokens // block), len(ids) // block)
    starts = torch.linspace(0, len(ids) - block, count, dtype=torch.float64).long()
    return torch.stack([ids[start:start + block] for start in starts])


def rank_table(trained, initial):
    """(head, *rows): medians over layers, trained / at initialisation."""
    short = {"entropy_rank_sigma": "entropy sigma", "entropy_rank_lambda": "entropy lambda",
             "participation_ratio": "participation", "stable_rank": "stable"}
    rows = [("path", "RoPE", "of", "channels", *(short.get(name, name) for name in trained[0]["ranks"]),
             *(f"share {r}" for r in SHARE_WIDTHS))]
    for place in ({key: record[key] for key in ("path", "rope", "of", "channels")} for record in trained
                  if record["layer"] == 0):
        layers = [[r for r in records if place.items() <= r.items()] for records in (trained, initial)]
        cells = [" / ".join(f"{statistics.median(r[numbers][name] for r in same):{form}}" for same in layers)
                 for numbers, form in (("ranks", ".1f"), ("share", ".3f")) for name in layers[0][0].get(numbers, ())]
        rows.append((*place.values(), *cells, *[""] * (len(rows[0]) - 4 - len(cells))))
    return rows


def rank(args):
    """Effective rank of queries and keys per layer, by named definitions, beside that at initialisation."""
    subject = load_subject(args)
    block = args.block or subject.cfg.block
    width = subject.cfg.n_head * sum(path.width for path in subject.cfg.attention.paths)
    least = TOKENS_PER_CHANNEL * width
    if (args.tokens or least) < least:
        raise UserError(f"--tokens {args.tokens}: spectra of {width} channels need at least {least} tokens")
    ids, _, data_hash = held_out_tokens(args, subject)
    if len(ids) < least:
        raise UserError(f"{len(ids)} tokens to measure: spectra of {width} channels need at least {least}")
    parts = spread_windows(ids, args.tokens or 2 * least, block)                # [n, block]
    if parts.numel() < least:
        raise UserError(f"{parts.numel()} tokens in whole windows of {parts.size(1)}: spectra of {width} channels need "
                        f"at least {least}; shorten --block")
    batches = parts.split(args.batch_size)
    trained = measure_ranks(subject, subject.model, batches, args.centred)
    initial = measure_ranks(subject, initial_model(subject), batches, args.centred)
    moment = "about the mean" if args.centred else "not centred"
    print(f"medians over layers, trained / at initialisation; second moments {moment}")
    write_result(args, subject, "rank", rank_table(trained, initial), definitions=RANK_DEFINITIONS, moment=moment,
                 tokens=parts.numel(), block=parts.size(1), data_sha256=data_hash, trained=trained,
                 initial=initial)


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

    p = commands.add_parser("probes", help=probes.__doc__, allow_abbrev=False)
    flags(p, cache=True)
    p.add_argument("--instances", type=positive(), default=50, help="cases made of each template (50)")
    p.add_argument("--seed", type=positive(0), default=0, help="seed of the templates (0)")
    p.add_argument("--max-new-tokens", type=positive(), default=96, help="tokens of an output (96)")
    p.add_argument("--batch-size", type=positive(), default=32, help="cases at once (32)")
    p.add_argument("--compare", metavar="OTHER.json", help="result of another model, to test the difference")
    p.set_defaults(run=probes)

    p = commands.add_parser("rank", help=rank.__doc__, allow_abbrev=False)
    flags(p, data=True)
    p.add_argument("--tokens", type=positive(), help="tokens to measure over (20 per query channel, if there are)")
    p.add_argument("--block", type=positive(), help="tokens of a window (the model's context)")
    p.add_argument("--batch-size", type=positive(), default=8, help="windows at once (8)")
    p.add_argument("--centred", action="store_true", help="second moments about the mean, not about zero")
    p.set_defaults(run=rank)
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
