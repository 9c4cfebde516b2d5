"""docs/scale.md and its figure: made from the bench's results, and in step with them and with the formulas."""

import json
from pathlib import Path

import pytest

import plot_scale
from helpers import assert_error, call

ROOT = Path(plot_scale.__file__).parent
ENV = dict(device="NVIDIA H9", torch="2.11", commit="0123456789", dirty=False)


def document(block, rows, toy=False):
    return json.dumps(dict(block=block, toy=toy, env=ENV, rows=rows))


def test_the_page_is_what_the_results_say(tmp_path):
    """A result that changes, or a formula, changes the page: `make figures` writes it anew."""
    page = (ROOT / "docs/scale.md").read_text()
    (tmp_path / "page.md").write_text(page)
    result = call(f"--bench {ROOT}/runs/bench --page page.md --out .", tmp_path, plot_scale.main)
    assert result.code == 0, result.stderr
    assert (tmp_path / "page.md").read_text() == page
    for name in ("fig_scale.png", "fig_growth.png"):
        assert (tmp_path / name).stat().st_size > 10_000


def test_growth_is_fitted_and_extrapolated_by_hand():
    """Twice the time at four times the context: exponent 1/2, the overhead of short ones apart. A 7B model of standard
    attention in fp16 caches 2 x 32 x 4096 x 2 bytes a token."""
    rows = [dict(case="standard", format="fp16", kernel="sdpa", batch=batch, tokens=tokens, us=us, gb_per_s=1024.0)
            for batch, tokens, us in ((1, 16384, 20.0), (1, 4096, 10.0), (1, 1024, 9.0), (8, 8192, 1.0))]
    (name, line), = plot_scale.curves(rows).items()
    assert plot_scale.context_exponent(line) == pytest.approx(0.5)
    gib, ms = plot_scale.extrapolated(name, line)
    assert gib == 131_072 * 524_288 / 2**30
    assert ms == pytest.approx(131_072 * 524_288 / 1024e9 * 1000)


def test_a_cpu_and_what_it_measured(tmp_path):
    """Each block of a CPU becomes a table, the growth of a step a figure too; whose clock was the CPU's is said."""
    growth = [dict(case=case, axis=axis, value=value, seconds=0.5 * (value / start) ** power)
              for case, power in (("standard", 1), ("decoupled", 2)) for axis, start in (
                  ("batch_size", 1), ("d_model", 128), ("layers", 2)) for value in (start, 2 * start, 8 * start)]
    speed = dict(name="fp32", tokens_per_second=100.0, cpu_seconds=20.48, share_of_matmul_rate_cpu=0.75)
    step = dict(format="q4_0", slope_cpu_ms=4.5)
    blocks = {
        "growth": growth,
        "speed": [speed],
        "compact": [dict(tokens=8, width=4, types=1000, ms={"ours float32": 10.0, "compact float32": 8.0,
                                                            "ours bfloat16": 20.0})],
        "llama_cpp": [dict(step, engine="ours", cpu_ms={"1024": 9.0, "4096": 22.5})],
        "generate": [dict(case="mla", format="q8_0", kernel="torch", dtype="float32", params=2_000_000, tokens=2048,
                          cache_mib=1.25, ttft_ms=1500.0, times_ttft=0.5, ms=12.34, times_ms=2.0)],
        "host": [dict(what="save last.pt", seconds=0.25, mb_per_s=800.0),
                 dict(what="gpt2", seconds=None, why="offline")],
    }
    (tmp_path / "here").mkdir()
    env = dict(ENV, device="cpu", cpu="A CPU", threads=1)
    for block, rows in blocks.items():
        content = dict(block=block, toy=False, env=env, rows=rows, clock="process_time", load=3.2)
        (tmp_path / f"here/{block}.json").write_text(json.dumps(content))
    result = call("--bench . --page '' --out .", tmp_path, plot_scale.main)
    assert result.code == 0, result.stderr
    said = result.stdout
    assert "### A CPU" in said and "One thread" in said and "load up to 3" in said
    assert "| standard | d_model | 128: 500, 256: 1,000, 1024: 4,000 | 1.00 |" in said
    assert "| decoupled | layers | 2: 500, 4: 2,000, 16: 32,000 | 2.00 |" in said
    assert "| fp32 | 20.48 | 0.75 | - | - |" in said
    assert "| 8 x 4 x 1,000 | 10 | 20 | 0.80 | - |" in said
    assert "| q4_0 | ours | 4.50 | 1,024: 9.0, 4,096: 22.5 |" in said
    assert "| mla | q8_0 | torch | float32 | 1.2 | 1,500 | 0.50 | 12.3 | 2.00 |" in said
    assert "Around the model: save last.pt 0.25 s (800 MB/s); gpt2 offline." in said
    assert (tmp_path / "fig_growth.png").stat().st_size > 10_000 and not (tmp_path / "fig_scale.png").exists()


def test_devices_of_one_name_are_told_apart(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plot_scale, "draw_growth", lambda devices, path: drawn.append(devices))
    for folder, seconds in (("a", 1.0), ("b", 2.0), ("c", 3.0)):
        rows = [dict(case="standard", axis="layers", value=value, seconds=seconds * value) for value in (1, 2)]
        env = dict(ENV, device="cpu", cpu="C" if folder == "c" else "A CPU")
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "growth.json").write_text(json.dumps(dict(block="growth", toy=False, env=env, rows=rows)))
    assert call("--bench . --page '' --out .", tmp_path, plot_scale.main).code == 0
    assert {name: rows[0]["seconds"] for name, rows in drawn[0].items()} == {"A CPU (a)": 1, "A CPU (b)": 2, "C": 3}


def test_a_cpu_is_named_with_its_threads(tmp_path):
    for threads in (1, 2):
        env = dict(ENV, device="cpu", cpu="A CPU", threads=threads)
        (tmp_path / f"{threads}").mkdir()
        (tmp_path / f"{threads}/host.json").write_text(json.dumps(dict(block="host", toy=False, env=env, rows=[])))
        assert plot_scale.read_device(tmp_path / f"{threads}")[1]["name"] == f"A CPU, {threads} thread" + "s" * (
            threads - 1)


def test_every_commit_of_a_devices_files_is_said(tmp_path):
    (tmp_path / "h9").mkdir()
    for name, env in (("a", ENV), ("b", dict(ENV, commit="9876543210", dirty=True)), ("c", ENV)):
        content = dict(block="ceilings", toy=False, env=env, rows=[dict(what="copy", gb_per_s=7.0)])
        (tmp_path / f"h9/{name}.json").write_text(json.dumps(content))
    said = call("--bench . --page '' --out .", tmp_path, plot_scale.main).stdout
    assert "commits 0123456, 9876543+ (+: with uncommitted changes)." in said
    for name in "bc":
        (tmp_path / f"h9/{name}.json").unlink()
    assert "commit 0123456." in call("--bench . --page '' --out .", tmp_path, plot_scale.main).stdout


def test_what_is_left_out_and_what_is_refused(tmp_path):
    assert_error(call("--bench . --page '' --out .", tmp_path, plot_scale.main), "no result of bench_dba.py")
    (tmp_path / "h9").mkdir()
    path = tmp_path / "h9/ceilings.json"
    path.write_text(document("ceilings", [dict(what="copy", gb_per_s=7.0)], toy=True))
    assert_error(call("--bench . --page '' --out .", tmp_path, plot_scale.main), "no result of bench_dba.py")
    path.write_text(document("ceilings", [dict(what="copy", gb_per_s=7.0)]))
    result = call("--bench . --page '' --out .", tmp_path, plot_scale.main)
    assert result.code == 0 and "copy 7 GB/s" in result.stdout and "NVIDIA H9" in result.stdout
    (tmp_path / "page.md").write_text("no marks")
    assert_error(call("--bench . --page page.md --out .", tmp_path, plot_scale.main), "lacks the marks")
    lacking = [dict(case="paper_gqa", micro=8, tok_s=None, why="out of memory"),
               dict(case="llama", micro=8, block=2048, compiled=True, tok_s=9.0, slowest=8.0, fastest=10.0, ms=3.0,
                    mfu=None, mfu_full=None, gib=2.0)]
    (tmp_path / "h9/train.json").write_text(document("train", lacking))
    said = call("--bench . --page '' --out .", tmp_path, plot_scale.main).stdout
    assert "out of memory" in said and "| llama | 8 | compiled | 9 [8..10] | 3 | - | - | 2.0 | - | - |" in said
    for block in plot_scale.LINES:
        path.write_text(document(block, [dict(what="copy")]))
        assert_error(call("--bench . --page '' --out .", tmp_path, plot_scale.main), f"h9: a row of {block}")
    path.write_text("[]")
    assert_error(call("--bench . --page '' --out .", tmp_path, plot_scale.main), "ceilings.json is no result")
