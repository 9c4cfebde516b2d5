"""eval_dba.py probes: the cases, the rules that judge an output, the margin, the command."""

import json
import re

import pytest
import torch
import torch.nn.functional as F

import train_dba as dba
from evals import probes
from evals.subject import formats_of, load_subject
from helpers import assert_done, assert_error
from paper import stats
from reference import MODES
from subjects import evaluate, write_checkpoint

SMALL = "probes --ckpt run --device cpu --instances 1 --max-new-tokens 6 --kv-cache fp32 --out result.json"
PINNED = ("seen: fern lamb fish\ntold: fern lamb fish\nseen: bell rain rice\ntold: bell rain rice\n"
          "seen: H968 K190 J172\ntold:")


# --- cases

@pytest.fixture(scope="module")
def cases():
    return probes.make_cases(50, 0)


def test_literal_cases(cases):
    literal = [case for case in cases if case["set"] == "literal"]
    assert len(literal) == 23 and {case["kind"] for case in literal} == probes.TEMPLATES.keys()
    assert len({case["prompt"] for case in literal}) == 23


def test_cases_are_well_formed(cases):
    assert len(cases) == 23 + 50 * 10
    assert len({(case["set"], case["name"]) for case in cases}) == len({case["prompt"] for case in cases}) == len(cases)
    for case in cases:
        target, distractor = case["target"], case["distractor"]
        assert target != distractor and len(target) == len(distractor), case
        for text in (target, distractor):
            assert text == f" {text.strip()}" and "\n" not in text and text.isascii(), case
        assert case["prompt"].isascii() and case["prompt"] == case["prompt"].strip(), case
        assert len(case["prompt"]) < 400
        assert probes.exact_match(target, target) and probes.content_match(target, target)
        assert not probes.exact_match(distractor, target) and not probes.content_match(distractor, target), case
        assert not probes.in_loop(target), case


def test_templates_are_right(cases):
    """Answers that can be worked out again from the prompt."""
    templates = [case for case in cases if case["set"] == "template"]
    assert {case["kind"] for case in templates} == probes.TEMPLATES.keys()
    for case in templates:
        line, target, kind = case["prompt"].split("\n")[-1], case["target"].strip(), case["kind"]
        if kind == "arithmetic":
            assert eval(line.rstrip("=")) == int(target)
        elif kind == "counting":
            assert len(line.rstrip(":").split()) == int(target)
        elif kind == "spelling":
            assert line.rstrip(":") == target.replace("-", "")
        elif kind == "pattern":
            a, b, c, d = map(int, re.findall(r"\d+", line))
            assert b - a == c - b == d - c == int(target) - d
        elif kind == "identity":
            assert line == f"same({target}) ="
        elif kind == "passkey":
            assert f"Door code: {target}\n" in case["prompt"] and f"Safe code:{case['distractor']}\n" in case["prompt"]
        elif kind == "repeat":
            assert case["prompt"].split("\n")[0].endswith(" " + target)
        else:
            assert f"seen: {target}\ntold:" in case["prompt"] and f"told:{case['distractor']}\n" in case["prompt"]


def test_templates_depend_on_the_seed_alone(cases):
    assert probes.make_cases(50, 0) == cases
    fewer, other = probes.make_cases(3, 0), probes.make_cases(3, 1)
    assert all(case in cases for case in fewer)
    assert not {case["prompt"] for case in other if case["set"] == "template"} & {case["prompt"] for case in cases}
    assert fewer[23]["prompt"] == PINNED


# --- rules

@pytest.mark.parametrize("output, exact, content", [
    (" J3 V8", True, True),
    ("J3  V8 \nand more", True, True),
    (" j3, v8.", False, True),
    (" It says: J3 V8 and so on", False, True),
    (" It now says: J3 V8", False, False),
    (" J3 X V8", False, False),
    (" J3 V80", False, False),
    ("\n J3 V8", False, True),
    ("", False, False),
])
def test_matches(output, exact, content):
    assert (probes.exact_match(output, " J3 V8"), probes.content_match(output, " J3 V8")) == (exact, content)


@pytest.mark.parametrize("text, expected", [
    ("", False),
    ("aaaaaaaaaaaaaaa", False),                            # 15
    ("aaaaaaaaaaaaaaaa", True),
    ("ha ha ha", False),
    ("blue, blue, blue, blue", True),
    ("blue, blue, blue, bl", True),                        # the last copy is cut off
    ("it goes on: no, no, no, no", False),                 # 15 characters, the space counts
    ("north of the river. north of the river. nor", False),  # twice and a bit
    ("north of the river. north of the river. north of the river. ", False),  # its last copy lacks the space
    ("it lies north of the river. north of the river. north of the river. no", True),
    ("to be to be to be to be to be or not", False),       # it ended
    ("1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12", False),
    ("id(a) = a\nid(b) = b\nid(c) = c", False),
    ("one\n\n one\n one \none\none", True),
])
def test_loops(text, expected):
    assert probes.in_loop(text) == expected


def test_intervals_and_exact_test():
    assert stats.wilson(4, 23) == pytest.approx((0.0698, 0.3714), abs=2e-4)         # by hand from Wilson's formula
    assert stats.wilson(0, 10) == pytest.approx((0, 0.2775), abs=1e-4)
    assert stats.wilson(10, 10) == pytest.approx((0.7225, 1), abs=1e-4)
    assert stats.mcnemar(5, 0) == 0.0625                # 9 against 4 of 23, at best
    assert stats.mcnemar(0, 0) == stats.mcnemar(3, 3) == 1
    assert stats.mcnemar(1, 7) == stats.mcnemar(7, 1) == 2 * 9 / 256


def test_tables_are_escaped():
    row = r"\ { } $ & # _ % ~ ^ < > | [x] ` * -- \n"
    text = probes.latex_table(("a",), (row,))
    cell = text.split("\n")[4]
    bare = re.sub(r"\\(textbackslash|textasciitilde|textasciicircum|textless|textgreater|textbar|char34)\{\}|"
                  r"\\[{}$&#_%]|\{\[\}|\{\]\}|[-'`?!]\{\}", "", cell)
    assert bare.endswith(r" \\") and not re.search(r"[{}$&#_%~^<>|\\\[\]]", bare[:-3]), cell
    cell = probes.markdown_table(("a",), (row,)).split("\n")[2][2:-2]
    assert not re.search(r"(?<!\\)[`*_{}\[\]<>#|~&$]", re.sub(r"\\\\", "", cell)), cell
    assert probes.visible("a\tb\né\x00€|\\") == r"a\tb\n\xe9\x00\u20ac|" + "\\"
    assert len(probes.visible("x" * 300)) == 48


# --- the model's part

def subject_of(folder, mode, tokenizer=None, **flags):
    write_checkpoint(folder, mode, tokenizer, **flags)
    subject = load_subject(folder, "cpu")
    return subject, formats_of(subject, "fp32")


@pytest.mark.parametrize("mode", MODES)
def test_outputs_and_margins_are_the_models(tmp_path, mode):
    """Against greedy steps and log probabilities without a cache; rows of several lengths."""
    subject, formats = subject_of(tmp_path, mode, null_attn=True)
    cases = [dict(kind="k", name=str(i), prompt=p, target=t, distractor=d) for i, (p, t, d) in enumerate(
        [("ab: ab\ncd:", " cd", " ab"), ("xyz =", " 1", " 2"), ("mn: mn\nop:", " op", " mn"), ("q", "rs", " t")])]
    results = probes.run_cases(subject, formats, cases, max_new_tokens=7)

    @torch.inference_mode()
    def logits(text):
        return subject.model(torch.tensor([list(text)]))[0].double()

    for case, result in zip(cases, results):
        prompt, score = case["prompt"].encode(), {}
        for name in ("target", "distractor"):
            answer = case[name].encode()
            rows = F.log_softmax(logits(prompt + answer), -1)[len(prompt) - 1:-1]
            score[name] = sum(row[token].item() for row, token in zip(rows, answer))
        assert result["margin"] == pytest.approx(score["target"] - score["distractor"], abs=1e-3)
        assert result["preferred"] == (result["margin"] > 0)
        ids = list(prompt)
        while len(ids) < len(prompt) + 7 and 256 not in ids:
            ids.append(logits(ids)[-1].argmax().item())
        assert result["output"] == bytes(i for i in ids[len(prompt):] if i < 256).decode("utf-8", "replace")


class Merging(dba.ByteTokenizer):
    """Bytes, a document's start in front, and a token for ": " that only a prompt with a target has."""
    def encode(self, text):
        ids = super().encode("\x02" + text)
        merged = bytes(ids.astype("uint8")).replace(b": ", b"\x01")
        return torch.tensor(list(merged)).numpy()


def test_margin_counts_from_where_the_rows_part(tmp_path):
    """Also where the tokenizer joins the prompt's last character with the target's first."""
    subject, formats = subject_of(tmp_path, "standard")
    subject.tokenizer = Merging()
    case = dict(kind="k", name="1", prompt="ab: ab\ncd:", target=" cd", distractor=" ab")
    result = probes.run_cases(subject, formats, [case], max_new_tokens=7)[0]
    with torch.inference_mode():
        score = []
        for answer in (b"cd", b"ab"):
            ids = torch.tensor([list(b"\x02ab\x01ab\ncd\x01" + answer)])
            rows = F.log_softmax(subject.model(ids)[0].double(), -1)
            score.append(sum(rows[i - 1, ids[0, i]].item() for i in range(9, 12)))
    assert result["margin"] == pytest.approx(score[0] - score[1], abs=1e-3)


def test_word_tokenizer(tmp_path):
    words = dba.WordTokenizer.build("seen: told: moss kelp".split())
    subject, formats = subject_of(tmp_path, "standard", words)
    case = dict(kind="k", name="1", prompt="seen: moss\ntold:", target=" moss", distractor=" zinc")
    result = probes.run_cases(subject, formats, [case], max_new_tokens=7)[0]
    assert result["unknown_words"] == 0 and result["prompt_tokens"] == 4
    same = dict(case, target=" zinc", distractor=" ore")
    assert probes.run_cases(subject, formats, [same], max_new_tokens=7)[0]["margin"] == 0


# --- the command

@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("probes")
    write_checkpoint(folder / "run", null_attn=True)
    result = evaluate(SMALL, folder)
    assert_done(result)
    return folder, result


def test_command_writes_result_and_tables(finished):
    folder, result = finished
    record = json.loads((folder / "result.json").read_text())
    assert len(record["cases"]) == 33 and set(probes.CHECKS) <= record["rules"].keys()
    assert {(c["set"], c["kind"]): c["n"] for c in record["counts"]}["literal", "all"] == 23
    for count in record["counts"]:
        of_kind = [r for r in record["cases"] if r["set"] == count["set"] and count["kind"] in (r["kind"], "all")]
        assert count["n"] == len(of_kind) and count["preferred"][0] == sum(r["margin"] > 0 for r in of_kind)
        assert 0 <= count["loop"][1] <= count["loop"][0] / count["n"] <= count["loop"][2] <= 1
    assert sum(r["past_context"] for r in record["cases"]) > 0 and "training context" in result.stdout      # 64 tokens
    for suffix, mark in (("md", "| copy 1 | P8 W3 J6 Z1 |"), ("tex", r"copy 1 & P8 W3 J6 Z1 &")):
        text = (folder / f"result.{suffix}").read_text()
        assert mark in text.replace("\\_", "_") and text.isascii()


def test_compare(finished):
    folder, _ = finished
    other = json.loads((folder / "result.json").read_text())
    for case in other["cases"][:5]:
        case["exact"] = True
    (folder / "other.json").write_text(json.dumps(other))
    assert_done(evaluate(f"{SMALL.replace('result', 'new')} --compare other.json", folder))
    record = json.loads((folder / "new.json").read_text())
    literal, templates = record["compare"]
    assert (literal["exact"], literal["n"]) == ([0, 5, 0.0625], 23) and templates["exact"] == [0, 0, 1.0]
    assert record["cases"] == json.loads((folder / "result.json").read_text())["cases"], "the same outputs again"
    text = "--compare other.json --seed 1"
    assert_error(evaluate(f"{SMALL.replace('result', 'new2')} {text}", folder), "other.json", "--seed")


@pytest.mark.parametrize("args, words", [
    ("--compare gone.json", ("gone.json",)),
    ("--compare broken.json", ("broken.json",)),
    ("--compare list.json", ("list.json",)),
    ("--out broken.json/result.json", ("--out", "broken.json")),
    ("--kv-cache hetero --ckpt standard", ("hetero",)),
])
def test_mistakes_are_one_line(finished, args, words):
    folder, _ = finished
    (folder / "broken.json").write_text("{")
    (folder / "list.json").write_text('{"cases": [{"set": "literal"}]}')
    if "standard" in args:
        write_checkpoint(folder / "standard", "standard")
    assert_error(evaluate(f"{SMALL} {args}", folder), *words)


def test_margins_through_a_residual_window_are_those_of_decoding(tmp_path):
    subject, _ = subject_of(tmp_path, "decoupled", null_attn=True)
    formats, nll = formats_of(subject, "q4_0"), []
    triple = [list(b"one two three four five six"), list(b"one two three four five six seven"),
              list(b"one two three four five six eight")]
    for ids in triple[1:]:
        cache = dba.KVCache(subject.cfg, 1, len(ids), formats, 5)
        with torch.inference_mode():
            rows = torch.cat([subject.model(torch.tensor([[token]]), cache=cache)[0] for token in ids[:-1]])
        nll.append(F.cross_entropy(rows[27:].double(), torch.tensor(ids[28:]), reduction="sum").item())
    assert triple[1][:28] == triple[2][:28], "they part after the space"
    margin, = probes.margins(subject, formats, [triple], residual=5)
    assert margin == pytest.approx(nll[1] - nll[0], abs=1e-4)
    assert abs(margin - probes.margins(subject, formats, [triple], residual=0)[0]) > 1e-3
