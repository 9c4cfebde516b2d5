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
    assert (tmp_path / "fig_scale.png").stat().st_size > 10_000


def test_growth_is_fitted_and_extrapolated_by_hand():
    """Twice the time at four times the context: exponent 1/2. A 7B model of standard attention in fp16 caches
    2 x 32 x 4096 x 2 bytes a token."""
    rows = [dict(case="standard", format="fp16", kernel="sdpa", batch=batch, tokens=tokens, us=us, gb_per_s=1024.0)
            for batch, tokens, us in ((1, 4096, 20.0), (1, 1024, 10.0), (8, 8192, 1.0))]
    (name, line), = plot_scale.curves(rows).items()
    assert plot_scale.exponent(line) == pytest.approx(0.5)
    gib, ms = plot_scale.extrapolated(name, line)
    assert gib == 4096 * 524_288 / 2**30
    assert ms == pytest.approx(4096 * 524_288 / 1024e9 * 1000)


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
    path.write_text("[]")
    assert_error(call("--bench . --page '' --out .", tmp_path, plot_scale.main), "ceilings.json is no result")
