"""
Peak memory of a long prompt and of decode steps after it, beside the bytes of the KV cache (Linux, on the CPU).

    python3 benchmarks/long_context.py --tokens 32768 --out runs/bench/long_context.json

The model is decoupled 32/64 (d_model 512, 6 layers) with random weights, its cache hetero. Figures are the process's
peak resident memory less what it held before the cache was made, and less the cache. Memory that the prompt's pass
freed is given back to the system before the decode steps.
"""

import ctypes
import json
import time
from pathlib import Path

import torch

from common import parser_of, train_dba, write
from train_dba import GPT, PREFILL_CHUNK, KVCache, autocast, make_config, resolve_kernel


def resident(name):
    """VmRSS (now) or VmHWM (peak) of this process in bytes."""
    line = next(line for line in open("/proc/self/status") if line.startswith(name))
    return int(line.split()[1]) * 1024


def forget_peak():
    Path("/proc/self/clear_refs").write_text("5")


@torch.inference_mode()
def main():
    parser = parser_of(__doc__)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--steps", type=int, default=16, help="decode steps (16)")
    args = parser.parse_args()
    train_dba.keep_freed_memory()
    device, dtype = torch.device("cpu"), torch.bfloat16
    torch.manual_seed(0)
    cfg = make_config(data="-", attn_mode="decoupled", null_attn=True, tie_qk=True)
    model, prompt = GPT(cfg, 256).init_weights().eval(), torch.randint(256, (1, args.tokens))
    total = args.tokens + args.steps + 8
    kernel, _ = resolve_kernel("auto", device)
    with autocast(device, dtype):                          # once without a cache of size, so that weights are cast
        warm = KVCache(cfg, 1, PREFILL_CHUNK, "hetero", kernel=kernel)
        model.hidden(prompt[:, :PREFILL_CHUNK], warm)
        ctypes.CDLL(None).malloc_trim(0)
        before = resident("VmRSS")
        cache = KVCache(cfg, 1, total, "hetero", kernel=kernel)
        forget_peak()
        started = time.perf_counter()
        for chunk in prompt.split(PREFILL_CHUNK, 1):
            model.hidden(chunk, cache)
        prefill_s, prefill = time.perf_counter() - started, resident("VmHWM")
        for _ in range(8):                                 # warms up
            model.hidden(prompt[:, :1], cache)
        ctypes.CDLL(None).malloc_trim(0)
        forget_peak()
        started = time.perf_counter()
        for _ in range(args.steps):
            model.hidden(prompt[:, :1], cache)
        step_s, decode = (time.perf_counter() - started) / args.steps, resident("VmHWM")
    result = dict(tokens=args.tokens, kernel=kernel.name, cache_bytes=cache.nbytes(),
                  prefill_seconds=prefill_s, prefill_extra_bytes=prefill - before - cache.nbytes(),
                  decode_ms=1000 * step_s, decode_extra_bytes=decode - before - cache.nbytes())
    print(json.dumps(result, indent=1))
    write(args.out, device, **result)


if __name__ == "__main__":
    main()
