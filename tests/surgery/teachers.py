"""Random teachers in memory and in folders, what calibration says of them, and the command that converts one."""

import torch

import convert_dba
import reference
import train_dba as dba
from helpers import call
from reference import config, randomize
from surgery.calibrate import calibrate
from surgery.convert import Layer

TEACHERS = {
    "gqa": dict(attn_mode="gqa", n_head=6, d_model=60, attn_dim=48, kv_head=2),     # heads of 8, three a group
    "standard": dict(attn_mode="standard", n_head=4, d_model=48),                   # 12
    "bottleneck": dict(attn_mode="bottleneck", n_head=3, d_model=56, attn_dim=30),  # 10
}
VOCAB, T = 70, 96
RUN = dict(attn_mode="gqa", kv_head=2, n_head=4, d_model=32, layers=1, d_ff=48, block=64)


def teacher_of(name, seed=0):
    model = dba.GPT(config({**TEACHERS[name], **dict(layers=2, d_ff=64, block=128, rope_base=500.0)}), VOCAB)
    model = randomize(model, seed)
    with torch.no_grad():
        model.embed.weight *= 0.5
    return model.eval().requires_grad_(False)


def ids_of(n, length=T, seed=0):
    return torch.randint(VOCAB, (n, length), generator=torch.Generator().manual_seed(seed))


def layers_of(model, windows=6):
    moments = calibrate(model, ids_of(windows), windows)
    return [Layer.of(block.attn, each) for block, each in zip(model.blocks, moments)]


def kl(teacher, student, ids):
    t, s = (model(ids).log_softmax(-1) for model in (teacher, student))
    return (t.exp() * (t - s)).sum(-1).mean().item()


def folded(layer, kept, x):
    """Float64 attention output [T, D] of a layer whose pairs `kept` [G, pairs] turn and whose others are multiplied by
    what stands in for their rotation, one head at a time."""
    H, G, w, n = len(layer.wq), len(layer.wk), layer.wq.size(1), len(x)
    half = layer.wq.size(1) // 2
    distance = torch.arange(n)[:, None] - torch.arange(n)
    out = 0.0
    for h in range(H):
        g = h // (H // G)
        q, k = (torch.complex(y[:, :half], y[:, half:]) for y in (x @ layer.wq[h].T, x @ layer.wk[g].T))
        scores = 0.0
        for f in range(half):
            turns = torch.exp(1j * layer.inv_freq[f] * torch.arange(len(layer.moments.mass[0])))
            turn = (layer.moments.mass[h] * turns).sum() / layer.moments.mass[h].sum()
            if f in kept[g].tolist():
                turn = torch.exp(1j * layer.inv_freq[f] * distance)
            scores = scores + (q[:, f, None] * k[:, f].conj() * turn).real
        scores = (scores / w ** 0.5).masked_fill(distance < 0, -torch.inf)
        out = out + reference.softmax_rows(scores) @ (x @ layer.wv[g].T) @ layer.wo[h].T
    return out


def save_teacher(folder, **given):
    cfg, tokenizer = dba.make_config(data="none", **given), dba.make_tokenizer("byte", None)
    model = randomize(dba.GPT(cfg, tokenizer.vocab_size))
    with torch.no_grad():
        model.embed.weight *= 0.1
    folder.mkdir(exist_ok=True)
    dba.save_checkpoint(folder / "best.pt", cfg, tokenizer, model, step=1)


FLAGS = "--model run --data text.txt --window 32 --calibration 3 --val-windows 2"
DBA = f"dba {FLAGS} --out-dir y --cache-share 0.6 --device cpu --dtype float32 --eval-every 2 --save-every 1"


def dba_command(folder, more=""):
    return call(f"{DBA} {more}", folder, convert_dba.main)
