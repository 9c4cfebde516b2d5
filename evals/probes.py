"""Behavioural cases: copying, spelling, arithmetic, recall; what judges an output, and exact tests between models."""

import collections
import math
import operator
import os
import random
import re
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

import train_dba
from evals.ppl import window_nll
from evals.subject import (
    Progress,
    Report,
    Subject,
    cache_name,
    check_out,
    formats_of,
    load_subject,
    quiet,
    result_path,
    text_table,
    write_result,
)
from paper.shapes import list_of, read_json
from paper.stats import mcnemar, wilson
from train_dba import KVCache, UserError, autocast, rotate_cache

PROBES = Path(__file__).with_name("probes.json")           # the literal cases
WORDS = ("barn bell bird boat bone cave clay coat crow dune dust fern fish flax frog gate goat gold hail hawk iron "
         "kelp kiln lamb lamp leaf lime lion loom mint moon moss moth nest nail pear pine plum pond rain reed rice "
         "rope rust salt sand seal ship silk snow soap star swan tide toad vine wind wolf wool yarn").split()
FILLER = ("The hedge was cut on Monday.", "Two men carried a table upstairs.", "It was too cold to swim.",
          "Her bicycle leaned on the fence.", "The train left without a sound.", "Dust lay on every shelf.",
          "Old maps hung in the hall.", "A dog slept under the bench.")
RULES = {
    "exact": "the first line of the output, white space squeezed, is the target",
    "content": "the target's words (runs of letters and digits, case ignored) follow each other in the output, with at "
               "most 2 words before them",
    "preferred": "margin > 0; margin: log p(target) - log p(distractor) after the prompt, teacher-forced, summed, nats",
    "loop": "the output, white space squeezed, ends in a unit that stands there at least 3 times in a row, in 16 "
            "characters or more; its last copy may be cut off",
    "interval": "Wilson, 95 %",
    "compare": "exact McNemar test, two-sided, over the cases in which the two results differ",
}
MOST_INSTANCES = 10_000                                    # counting_template has 21,504 cases
CHECKS = ("exact", "content", "preferred", "loop")
LITERAL = dict(kind=str, prompt=str, target=str, distractor=str)
CASE = dict(set=str, name=str, prompt=str, target=str, distractor=str)
COMPARABLE = dict(cases=list_of({**CASE, **dict.fromkeys(CHECKS, bool)}))              # of a result of this command


# -----------------------------------------------------------------------------
# Templates: a random generator -> prompt, target, distractor. Target and distractor have as many characters.

def copy_template(form: Callable[[list[str]], str]) -> Callable:
    """Lists to copy, in the form that form(items) gives them: two of words, then one of codes."""
    def make(rng):
        first, second, codes = rng.sample(WORDS, 3), rng.sample(WORDS, 3), []
        for _ in range(3):
            codes.append(rng.choice("BCDFGHJKLMNPQRSTVWXZ") + str(rng.randrange(100, 1000)))
        a, b, c = form(first), form(second), form(codes)
        return f"seen: {a}\ntold: {a}\nseen: {b}\ntold: {b}\nseen: {c}\ntold:", c, (a, b)[rng.randrange(2)]
    return make


def repeat_template(rng):
    words = rng.sample(WORDS, 5)
    cut = rng.randrange(3)                                 # so many words are given away
    again, rest = " ".join(["again:", *words[:cut]]), words[cut:]
    return f"once: {' '.join(words)}\n{again}", " ".join(rest), " ".join(rest[::-1])


def spelling_template(rng):
    a, b, c = rng.sample([word for word in WORDS if word[1] != word[2]], 3)
    wrong = "-".join((c[0], c[2], c[1], c[3]))
    return f"{a}: {'-'.join(a)}\n{b}: {'-'.join(b)}\n{c}:", "-".join(c), wrong


def near(rng, number):
    """A number beside `number` that has as many digits."""
    neighbours = []
    for n in (number - 1, number + 1):
        if n >= 0 and len(str(n)) == len(str(number)):
            neighbours.append(n)
    return rng.choice(neighbours)


def arithmetic_template(rng):
    shown = ""
    for _ in range(2):
        a, b = rng.randrange(2, 50), rng.randrange(2, 50)
        shown += f"{a} + {b} = {a + b}\n"
    a, b = rng.randrange(2, 50), rng.randrange(2, 50)
    return f"{shown}{a} + {b} =", a + b, near(rng, a + b)


def counting_template(rng):
    (a, b), word = rng.sample(range(2, 10), 2), rng.choice(WORDS)
    other = rng.choice(sorted({*range(2, 10)} - {a, b}))

    def times(n):
        return " ".join([word] * n)

    return f"{times(a)}: {a}\n{times(other)}: {other}\n{times(b)}:", b, a


def passkey_template(rng):
    key, other = map(str, rng.sample(range(10_000, 100_000), 2))
    text = " ".join(rng.sample(FILLER, rng.randrange(2, 6)))
    lines = rng.sample([f"Door code: {key}\n", f"Safe code: {other}\n"], 2)
    return f"{''.join(lines)}{text}\nDoor code:", key, other


def pattern_template(rng):
    lines = []
    for step in rng.sample(range(2, 10), 3):
        start = rng.randrange(1, 10)
        answer = start + 4 * step
        shown = ", ".join(map(str, range(start, answer, step)))
        lines.append(f"{shown}, next {answer}\n")
    return f"{lines[0]}{lines[1]}{shown}, next", answer, near(rng, answer)


def identity_template(rng):
    *words, last = rng.sample(WORDS, 4)
    lines = ""
    for word in words:
        lines += f"same({word}) = {word}\n"
    return f"{lines}same({last}) =", last, words[rng.randrange(3)]


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


def make_cases(instances: int, seed: int) -> list[dict]:
    """The literal cases, then `instances` different ones of each template: dicts of set, name, kind, prompt, target and
    distractor, the latter two with the space that the prompt leaves to them. Raises UserError for more than there are.
    """
    if instances > MOST_INSTANCES:
        raise UserError(f"--instances {instances}: at most {MOST_INSTANCES:,}: templates don't have many more cases")
    cases = []
    for case in read_json(PROBES, list_of(LITERAL)):
        if not (case["prompt"] + case["target"] + case["distractor"]).isascii():
            raise UserError(f"{PROBES.name}: a case isn't ASCII")
        cases.append(dict(case, set="literal"))
    for kind, template in TEMPLATES.items():
        rng, made = random.Random(f"{kind} {seed}"), {}
        while len(made) < instances:
            prompt, target, distractor = template(rng)
            made[prompt] = dict(kind=kind, prompt=prompt, target=f" {target}", distractor=f" {distractor}",
                                set="template")
        cases += made.values()
    count = collections.Counter()
    for case in cases:
        count[case["set"], case["kind"]] += 1
        case["name"] = f"{case['kind']} {count[case['set'], case['kind']]}"
    return cases


# -----------------------------------------------------------------------------
# Judging an output

def squeeze(text: str) -> str:
    return " ".join(text.split())


def exact_match(output: str, target: str) -> bool:
    return squeeze(output.partition("\n")[0]) == squeeze(target)


def content_match(output: str, target: str) -> bool:
    said, wanted = words_of(output), words_of(target)
    return any(said[i:i + len(wanted)] == wanted for i in range(3))


def words_of(text: str) -> list[str]:
    """Runs of letters and digits, in lower case."""
    return re.findall(r"[^\W_]+", text.lower())


def in_loop(output: str) -> bool:
    text = squeeze(output)
    for unit in range(1, len(text) // 3 + 1):
        same = 0                                           # characters at the end that are those one unit before
        while same < len(text) - unit and text[-1 - same] == text[-1 - same - unit]:
            same += 1
        if same + unit >= max(3 * unit, 16):
            return True
    return False


# -----------------------------------------------------------------------------
# Running the cases

def equal_lengths(rows: list[list[int]], most: int) -> Iterator[list[int]]:
    """Yield lists of up to `most` indices of rows that are equally long."""
    same = collections.defaultdict(list)
    for i, row in enumerate(rows):
        same[len(row)].append(i)
    for group in same.values():
        for start in range(0, len(group), most):
            yield group[start:start + most]


def greedy_outputs(subject: Subject, formats: dict, prompts: list[list[int]], *, most: int, residual: int = 0,
                   batch_size: int = 32, report: Report = quiet) -> list[str]:
    """The text that follows each prompt (token ids), likeliest token by token through the cache, `most` tokens or up to
    the end of the document. A word tokenizer's end of a document is the end of a line, and is read on."""
    outputs, end = [""] * len(prompts), None if subject.tokenizer.name == "word" else subject.tokenizer.eot
    done = 0
    for group in equal_lengths(prompts, batch_size):
        batch = torch.tensor([prompts[i] for i in group], device=subject.device)
        cache = KVCache(subject.cfg, len(group), batch.size(1) + most - 1, formats, residual, subject.device)
        with autocast(subject.device, subject.dtype):
            new = list(train_dba.generate(subject.model, batch, most, cache, temperature=0))
        for i, ids in zip(group, torch.cat(new, 1).tolist()):
            ids = ids[:ids.index(end)] if end in ids else ids
            outputs[i] = subject.tokenizer.decode(ids).decode("utf-8", "replace")
        report(done := done + len(group), len(prompts))
    return outputs


def margins(subject: Subject, formats: dict, triples: list[list], *, residual: int = 0, batch_size: int = 32,
            report: Report = quiet) -> list[float]:
    """log p(target) - log p(distractor) in nats, for triples of token ids: the prompt alone, with the target, with the
    distractor. Counted from the first token in which the three differ, wherever a tokenizer draws its borders."""
    rows, start = [], []
    for triple in triples:
        parted = max(1, len(os.path.commonprefix(triple)))
        rows += triple[1:]
        start += [parted, parted]
    scores, done = [0.0] * len(rows), 0
    for group in equal_lengths(rows, batch_size):
        batch = torch.tensor([rows[i] for i in group], device=subject.device)
        for i, nll in zip(group, window_nll(subject, batch, formats, residual)):
            scores[i] = -nll[start[i] - 1:].double().sum().item()
        report(done := done + len(group), len(rows))
    return [target - distractor for target, distractor in zip(scores[::2], scores[1::2])]


def run_cases(subject: Subject, formats: dict, cases: list[dict], *, max_new_tokens: int = 96, residual: int = 0,
              batch_size: int = 32, report: Report = quiet) -> list[dict]:
    """The cases, each with its output, margin, checks, and what may have made it unfair: tokens past the training
    context, words that the tokenizer doesn't know. Raises UserError for a margin that is no number."""
    unknown = subject.tokenizer.ids[train_dba.UNK] if subject.tokenizer.name == "word" else None
    triples = []
    for case in cases:
        texts = (case["prompt"], case["prompt"] + case["target"], case["prompt"] + case["distractor"])
        triples.append([subject.tokenizer.encode(text).tolist() for text in texts])
    prompts = [prompt for prompt, _, _ in triples]
    outputs = greedy_outputs(subject, formats, prompts, most=max_new_tokens, residual=residual, batch_size=batch_size,
                             report=lambda done, total: report(done, 2 * total))
    gaps = margins(subject, formats, triples, residual=residual, batch_size=batch_size,
                   report=lambda done, total: report((done + total) // 2, total))
    results = []
    for case, triple, output, margin in zip(cases, triples, outputs, gaps):
        if not math.isfinite(margin):
            raise UserError(f"{case['name']}: the margin is {margin}: a broken checkpoint, or a cache format that "
                            "can't hold its values")
        checks = dict(exact=exact_match(output, case["target"]), content=content_match(output, case["target"]),
                      preferred=margin > 0, loop=in_loop(output))
        results.append(dict(case, output=output, margin=margin, **checks, prompt_tokens=len(triple[0]),
                            unknown_words=triple[1].count(unknown),
                            past_context=max(map(len, triple)) > subject.cfg.block))
    return results


# -----------------------------------------------------------------------------
# Counting, comparing

def by_set(results: list[dict]) -> dict[str, list[dict]]:
    """{set: its results}, in the order of the results."""
    sets = {}
    for result in results:
        sets.setdefault(result["set"], []).append(result)
    return sets


def count_hits(results: list[dict]) -> list[dict]:
    """[{set, kind, n, and per check (hits, low, high); margin: the mean}] per kind, and over all of a set."""
    counts = []
    for name, cases in by_set(results).items():
        kinds = {}
        for case in cases:
            kinds.setdefault(case["kind"], []).append(case)
        for kind, of_kind in (*kinds.items(), ("all", cases)):
            count = dict(set=name, kind=kind, n=len(of_kind), margin=statistics.mean(c["margin"] for c in of_kind))
            for check in CHECKS:
                hits = sum(case[check] for case in of_kind)
                count[check] = (hits, *wilson(hits, len(of_kind)))
            counts.append(count)
    return counts


case_key = operator.itemgetter(*CASE)                      # case -> tuple


def read_checks(path: str, cases: list[dict]) -> list[dict]:
    """The checks of another result of this command for each of these cases. Raises UserError."""
    others, keys = {}, list(map(case_key, cases))
    for case in read_json(Path(path), COMPARABLE)["cases"]:
        others[case_key(case)] = case
    if others.keys() != set(keys):
        raise UserError(f"--compare {path} has other cases: give both commands the same --instances and --seed")
    return [others[key] for key in keys]


def compare_cases(results: list[dict], others: list[dict]) -> list[dict]:
    """[{set, n, and per check (true here only, true there only, p)}] for the literal cases and for the templates."""
    differences = []
    of_others = by_set(others)
    for name, cases in by_set(results).items():
        difference = dict(set=name, n=len(cases))
        for check in CHECKS:
            here_only = there_only = 0
            for case, other in zip(cases, of_others[name]):
                here_only += case[check] > other[check]
                there_only += case[check] < other[check]
            difference[check] = (here_only, there_only, mcnemar(here_only, there_only))
        differences.append(difference)
    return differences


# -----------------------------------------------------------------------------
# Tables

def visible(text: str, most: int = 48) -> str:
    """One line of printable ASCII: a line's end as \\n, other characters by their numbers, a long text cut."""
    text = text.encode("unicode_escape").decode().replace("\\\\", "\\")
    return text if len(text) <= most else text[:most - 3] + "..."


def markdown(text: str) -> str:
    return re.sub(r"([\\`*_{}\[\]<>#|~&$])", r"\\\1", text)


def latex(text: str) -> str:
    """Text in LaTeX, ASCII; no package is needed, no two characters join into another."""
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}",
               ">": r"\textgreater{}", "|": r"\textbar{}", '"': r"\char34{}", "-": "-{}", "'": "'{}", "`": "`{}",
               "[": "{[}", "]": "{]}", "?": "?{}", "!": "!{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&",
               "#": r"\#", "_": r"\_", "%": r"\%"}
    return text.translate(str.maketrans(special))


def markdown_table(head: tuple, *rows: tuple) -> str:
    lines = []
    for row in (head, *rows):
        lines.append(f"| {' | '.join(map(markdown, map(str, row)))} |")
    lines.insert(1, f"| {' | '.join(['---'] * len(head))} |")
    return "\n".join(lines) + "\n"


def latex_table(head: tuple, *rows: tuple) -> str:
    lines = []
    for row in (head, *rows):
        lines.append(rf"{' & '.join(map(latex, map(str, row)))} \\")
    return "\n".join([rf"\begin{{tabular}}{{{'l' * len(head)}}}", r"\hline", lines[0], r"\hline", *lines[1:], r"\hline",
                      r"\end{tabular}"]) + "\n"


def count_table(counts: list[dict], differences: list[dict]) -> list[tuple]:
    """(head, *rows) of hits with their intervals in per cent, and of what the comparison found."""
    rows = [("cases", "kind", "n", *CHECKS, "mean margin")]
    for count in counts:
        cells = []
        for check in CHECKS:
            hits, low, high = count[check]
            cells.append(f"{hits} ({100 * low:.0f}-{100 * high:.0f} %)")
        rows.append((count["set"], count["kind"], count["n"], *cells, f"{count['margin']:+.2f}"))
    for difference in differences:
        cells = ["+{} -{} p {:.3g}".format(*difference[check]) for check in CHECKS]
        rows.append((difference["set"], "here only, there only, p", difference["n"], *cells, ""))
    return rows


def case_table(results: list[dict]) -> list[tuple]:
    """(head, *rows): target, output and checks of the literal cases."""
    rows = [("case", "target", "output", *CHECKS, "margin")]
    for result in by_set(results)["literal"]:
        verdicts = ["yes" if result[check] else "no" for check in CHECKS]
        rows.append((result["name"], visible(result["target"].strip()), visible(result["output"]), *verdicts,
                     f"{result['margin']:+.2f}"))
    return rows


def main(args) -> None:
    """Behavioural cases: copying, spelling, arithmetic, recall, with exact tests between two checkpoints."""
    cases = make_cases(args.instances, args.seed)
    others = read_checks(args.compare, cases) if args.compare else None
    check_out(args.out)
    subject = load_subject(args.ckpt, args.device, args.dtype)
    formats, cache = formats_of(subject, args.kv_cache), cache_name(args.kv_cache, args.kv_rotate, args.kv_residual)
    path = result_path(args.out, subject, "eval_probes" if cache == "fp16" else f"eval_probes_{cache}")
    if args.kv_rotate:
        rotate_cache(subject.model)
    with Progress("case", "probes") as report:
        results = run_cases(subject, formats, cases, max_new_tokens=args.max_new_tokens, residual=args.kv_residual,
                            batch_size=args.batch_size, report=report)
    counts = count_hits(results)
    differences = compare_cases(results, others) if others else []
    hits, literal = count_table(counts, differences), case_table(results)
    for suffix, form in ((".md", markdown_table), (".tex", latex_table)):
        train_dba.write_text(path.with_suffix(suffix), f"{form(*hits)}\n{form(*literal)}")
    for key, warning in (("unknown_words", "hold words that the tokenizer doesn't know"),
                         ("past_context", "are longer than the training context")):
        if n := sum(bool(result[key]) for result in results):
            print(f"{n} of {len(results)} cases {warning}")
    print(text_table(hits))
    write_result(path, subject, vars(args), dict(rules=RULES, formats=formats, counts=counts, compare=differences,
                                                 cases=results))
    print(f"written to {path}")
