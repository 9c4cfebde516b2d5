"""
Peak memory of a training step with the chunked cross-entropy and with one that holds all logits, a process each.

    python3 benchmarks/loss_memory.py --out runs/bench/loss_memory.json

The model is decoupled 32/64 (d_model 512, 6 layers, vocabulary 33,278), batch 8 x 256, bfloat16 autocast. On a CPU the
figure is the process's peak resident memory less its peak before the first step (parameters, libraries).
"""

import subprocess
import sys

import torch
import torch.nn.functional as F

from common import parser_of, train_dba, write
from train_dba import GPT, autocast, make_config, make_optimizer, peak_memory

VOCAB = 33_278


def full_loss(model, idx, targets):
    logits = model.logits(model.hidden(idx))
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")


def measure(loss, device):
    """Bytes that two optimiser steps add to the peak."""
    cfg = make_config(data="-", attn_mode="decoupled", null_attn=True, tie_qk=True)
    model = GPT(cfg, VOCAB).init_weights().to(device)
    optimizer = make_optimizer(model, cfg)
    before = peak_memory(device)
    x, y = torch.randint(VOCAB, (2, cfg.batch_size, cfg.block), device=device)
    for _ in range(2):
        with autocast(device, torch.bfloat16):
            nll = loss(model, x, y)
        (nll / y.numel()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return peak_memory(device) - before


LOSSES = {"chunked": lambda model, x, y: model(x, y), "full logits": full_loss}


def main():
    parser = parser_of(__doc__)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--one", choices=LOSSES, help="measure this one and print its bytes")
    args = parser.parse_args()
    train_dba.keep_freed_memory()
    device = train_dba.pick_device(args.device)
    if args.one:
        print(measure(LOSSES[args.one], device))
        return
    result = {}
    for name in LOSSES:
        command = [sys.executable, __file__, "--one", name, "--device", str(device)]
        result[name] = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print(f"{name:12} {result[name] / 2**20:8.0f} MiB more than before the first step")
    write(args.out, device, **result)


if __name__ == "__main__":
    main()
