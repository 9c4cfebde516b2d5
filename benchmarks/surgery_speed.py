"""
How fast a conversion to one latent decodes, beside the model that it was made of.

    python3 benchmarks/surgery_speed.py --tokens 512 4096 --out runs/llama/smollm2_135m/surgery_speed.json

Milliseconds of a decode step in the attention of one layer of SmolLM2-135M's widths (projections, cache, attention,
output; random weights), by the kernel that --kernel auto chooses, of the teacher (9 query heads, 3 key heads of 64) and
of its conversions at 75, 62.5 and 50 % of the elements, through caches of the same format, taking turns. It is CPU time
of one thread, so that a busy machine changes little.
"""

import dataclasses
import statistics
import sys
import time

import torch

from common import parser_of, write
from surgery.convert import student_config
from train_dba import Attention, KVCache, make_config, pick_device, resolve_kernel

SHAPES = {"latent 75 %": (16, 192), "latent 62.5 %": (16, 144), "latent 50 %": (12, 120)}  # pairs, latent: as chosen
FORMATS = ("fp16", "q8_0", "q4_0")


def step_of(cfg, fmt, tokens, device, kernel):
    """A function that decodes one token after `tokens` cached ones, again and again."""
    attn = Attention(cfg).to(device).eval().requires_grad_(False)
    cache = KVCache(cfg, 1, tokens + 1, fmt, device=device, kernel=kernel)
    span = cache.begin(tokens)
    entries = {name: torch.randn(1, tokens, C, device=device) for name, C in cfg.attention.streams.items()}
    cache.append(0, span, entries)
    cache.advance(span)
    x = torch.randn(1, 1, cfg.d_model, device=device)

    @torch.inference_mode()
    def step():
        attn(x, cache, 0, cache.begin(1))
    return step


def cpu_seconds(call, least=0.1):
    """Of one call, over as many as take `least` seconds."""
    calls, started = 0, time.process_time()
    while time.process_time() - started < least:
        call()
        calls += 1
    return (time.process_time() - started) / calls


def main():
    parser = parser_of(__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 4096])
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    device = pick_device("cpu")
    teacher = make_config(data="-", attn_mode="gqa", layers=1, d_model=576, n_head=9, kv_head=3, block=8192)
    configs = {"teacher": teacher}
    for name, (pairs, latent) in SHAPES.items():
        configs[name] = dataclasses.replace(student_config(teacher, pairs, latent), layers=1)
    rows = []
    for fmt in FORMATS:
        kernel, why = resolve_kernel("auto", device, [fmt])
        for tokens in args.tokens:
            calls = {name: step_of(cfg, fmt, tokens, device, kernel) for name, cfg in configs.items()}
            times = {name: [] for name in calls}
            for _ in range(args.rounds + 1):                     # the first warms up
                for name, call in calls.items():
                    times[name].append(cpu_seconds(call))
            for name, seconds in times.items():
                median, base = statistics.median(seconds[1:]), statistics.median(times["teacher"][1:])
                rows.append(dict(name=name, format=fmt, tokens=tokens, kernel=kernel.name, ms=1000 * median,
                                 of_teacher=median / base))
                print(f"{fmt} {tokens} {name}: {1000 * median:.3f} ms, {median / base:.2f} x the teacher")
    write(args.out, device, rows=rows)


if __name__ == "__main__":
    sys.exit(main())
