"""What the tests of evals/ share: how their checkpoints are trained, the command line, plain losses."""

import json
from pathlib import Path

import torch
import torch.nn.functional as F

from helpers import assert_done
from subjects import evaluate

BLOCK = 128
TRAIN = (f"--data text.txt --tokenizer byte --d-model 32 --layers 1 --n-head 2 --d-ff 64 --block {BLOCK} "
         "--batch-size 2 --dtype float32 --device cpu --steps 12 --lr 2e-2 --eval-every 12 --eval-iters 2")
MODES = {"standard": "", "decoupled": "--attn-mode decoupled --sem-dim 16 --geo-dim 32 --null-attn --tie-qk",
         "mla": "--attn-mode mla --kv-lora-rank 24 --rope-dim 8"}
EVALUATE = "--device cpu --ckpt"


def result_of(args, folder, path):
    assert_done(evaluate(args, folder))
    return json.loads((Path(folder) / path).read_text())


def validation(runs):
    """Token ids [N] of the text's last tenth, which the runs didn't train on."""
    ids = torch.tensor(list((runs / "text.txt").read_bytes()) + [256])
    return ids[len(ids) - round(len(ids) * 0.1):]


def plain_nll(model, ids):
    """nll [T] of ids [T + 1] without a cache, in float64."""
    with torch.inference_mode():
        return F.cross_entropy(model(ids[None, :-1])[0].double(), ids[1:], reduction="none")
