"""benchmarks/surgery_tasks.py and its table: every row answers the same items; what a row lost is paired by item."""

import json
import sys
from pathlib import Path

import pytest
from teachers import RUN, save_teacher

import train_dba as dba
from helpers import assert_done, assert_error, call, make_text

sys.path.append(str(Path(dba.__file__).parent / "benchmarks"))
import surgery_table  # noqa: E402  (benchmarks are no package)

ITEMS = {
    "arc_easy_test": dict(id="1", question="ab cde?", answerKey="B", choices=dict(text=["j", "op."], label=["A", "B"])),
    "piqa_valid": dict(goal="ab", sol1="fghi j", sol2="q", label=1),
    "winogrande_valid": dict(sentence="ab cde because _ fghi.", option1="j", option2="q", answer="1"),
    "boolq_valid": dict(passage="ab cde fghi", question="op", label=0),
}
FLAGS = "run --data text.txt --tasks-dir tasks --limit 3 --out out.json"


def measured(**right):
    """A document of {row: 0s and 1s of one task}."""
    rows = {}
    for name, correct in right.items():
        task = dict(n=len(correct), acc=sum(correct) / len(correct), correct=dict(acc=correct),
                    items=[str(i) for i in range(len(correct))])
        rows[name] = dict(bytes=0.5, tasks=dict(piqa=task))
    return dict(rows=rows, teacher="t", calibration="c")


def test_differences_are_paired_by_item():
    lines = surgery_table.tasks_table(measured(teacher=[1, 1, 0, 0] * 9, cut=[1, 0, 0, 0] * 9)).splitlines()
    assert lines[2].startswith("| teacher | 50.0 % | 50.0 % | 50.0 % | - |")
    assert lines[3].startswith("| cut | 50.0 % | 25.0 % | 25.0 % | -25.0 ± 14.9 |")        # 2.030 · 0.4392 / 6
    others = measured(teacher=[1, 0], cut=[1, 0])
    others["rows"]["cut"]["tasks"]["piqa"]["items"] = ["5", "6"]
    with pytest.raises(dba.UserError, match="cut answered other items"):
        surgery_table.tasks_table(others)


def test_rows_are_measured_and_stay(tmp_path):
    pytest.importorskip("lm_eval", reason="no lm_eval: pip install -r requirements-eval.txt")
    import surgery_tasks
    make_text(tmp_path, count=5000)
    save_teacher(tmp_path / "run", **{**RUN, "block": 512})
    (tmp_path / "tasks").mkdir()
    for name, item in ITEMS.items():
        lines = [json.dumps(dict(item, **({"id": str(i)} if "id" in item else {}))) + "\n" for i in range(4)]
        (tmp_path / f"tasks/{name}.jsonl").write_text("".join(lines))
    assert_done(call(f"{FLAGS} --rows 'teacher|q4_0'", tmp_path, surgery_tasks.main))
    assert_done(call(f"{FLAGS} --rows 'latent 50 %'", tmp_path, surgery_tasks.main))
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [*rows] == ["teacher", "q4_0", "latent 50 %"]
    for row in rows.values():
        assert {task: each["n"] for task, each in row["tasks"].items()} == dict.fromkeys(surgery_tasks.TASKS, 3)
    assert rows["teacher"]["formats"] is None and rows["q4_0"]["formats"] == dict(k="q4_0", v="q4_0")
    assert rows["q4_0"]["bytes"] == 5 / 16                 # 16 channels to a scale of 16 bits
    assert rows["latent 50 %"]["elements"] <= 0.5
    other = FLAGS.replace("--limit 3", "--limit 2")
    assert_error(call(f"{other} --rows q8_0", tmp_path, surgery_tasks.main), "other items", "--out")
