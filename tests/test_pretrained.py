"""The two small trained models that a clone has: small enough to be there, and what the first commands do with them."""

import json
import math
import shlex

import pytest

import vis_heatmap
from helpers import TRAINER, assert_done, call
from subjects import evaluate
from train_dba import load_checkpoint

BOX = TRAINER.parent / "pretrained"
MODES = ("standard", "decoupled")


@pytest.mark.parametrize("mode", MODES)
def test_small_and_trained(mode):
    """Under 2 MB; the checkpoint is that of its log, and knows more than the frequencies of bytes (some 3 nats)."""
    assert (BOX / mode / "best.pt").stat().st_size < 2_000_000
    ckpt = load_checkpoint(BOX / mode)
    log = [json.loads(line) for line in (BOX / mode / "train.jsonl").read_text().splitlines()]
    assert ckpt["config"].attn_mode == mode and log[0]["config"]["attn_mode"] == mode and log[-1]["type"] == "done"
    assert ckpt["best_val_loss"] == log[-1]["best_val_loss"] < 2.5


@pytest.mark.parametrize("mode", MODES)
def test_sampled_measured_and_drawn_at_once(mode, tmp_path):
    sample = f"--mode sample --ckpt {shlex.quote(str(BOX / mode))} --device cpu --max-new-tokens 40 --prompt 'The '"
    result = call(f"{sample} --kv-cache q8_0 --kernel torch", tmp_path)
    assert_done(result)
    assert result.stdout.startswith("The ") and len(result.stdout) > 40
    (tmp_path / "text.txt").write_text((TRAINER.parent / "CONTRIBUTING.md").read_text(encoding="ascii")[:1500])
    ppl = f"ppl --ckpt {BOX / mode} --device cpu --data text.txt --kv-cache fp16 q4_0 --out ."
    assert_done(evaluate(ppl, tmp_path))
    measured = json.loads((tmp_path / "eval_ppl_fp16.json").read_text())
    assert 1 < measured["loss"] < 3.5                      # of 1,500 bytes the first is not predicted
    assert measured["bpb"] == pytest.approx(measured["loss"] / math.log(2) * 1499 / 1500)
    drawn = f"--ckpt {BOX / mode} --device cpu --prompt 'The red fox met the red' --anchor red --out maps"
    assert_done(call(drawn, tmp_path, vis_heatmap.main))
    assert list((tmp_path / "maps").glob("*.png"))
