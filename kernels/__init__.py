"""Back-ends of the KV cache, optional: train_dba.py runs without this folder, and nothing here imports it.

A back-end is a module with KERNEL, the settings of train_dba.Kernel, and FAILURES, the exceptions that its first use on
a machine may raise. Its attention() and append() have the arguments and results of decode_attention() and append() of
train_dba.py; none of them dequantises the cache. What they need of a format, a stream of the cache carries; of one that
is not among KERNEL's formats nothing is asked.
"""

import importlib.util
import math
import os

import torch


def choose(name: str, device: torch.device):
    """(module or None for train_dba's own torch path, why) of --kernel auto, triton or metal. Raises ValueError if the
    named kernel can't run on this device."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if name == "triton" or name == "auto" and device.type == "cuda":
        if importlib.util.find_spec("triton") is None:
            if name == "auto":
                return None, "pip install triton for its kernels"
            raise ValueError("triton is missing; pip install triton")
        if device.type != "cuda" and not interpreted:
            raise ValueError(f"needs a CUDA device, not {device.type} (TRITON_INTERPRET=1 interprets it anywhere)")
        from . import triton_decode
        return triton_decode, "interpreted" if interpreted else "a CUDA device"
    if name == "metal" or name == "auto" and device.type == "mps":
        if device.type != "mps":
            raise ValueError(f"needs an Apple GPU, not {device.type}")
        from . import metal_decode
        return metal_decode, "an Apple GPU"
    if device.type != "cpu":
        return None, f"no kernel for {device.type}"
    from . import cpu_decode
    problem = cpu_decode.missing()
    return (None, problem) if problem else (cpu_decode, "a CPU and a C++ compiler")


TOLERANCE = 1e-3                                           # of difference(); a wrong nibble or scale is off by far more


@torch.inference_mode()
def difference(cache, plain, H: int) -> float:
    """Largest absolute difference between what two empty caches of two sequences, of different kernels and otherwise
    equal, make of the same tokens for two queries of each of H heads and then for one; infinite if there is a NaN. The
    sequences get different lengths, and of the tokens some settle at once, some leave the ring and some stay in it."""
    shape, generator = cache.shape, torch.Generator().manual_seed(0)
    G = 1 if shape.latent else shape.v_groups
    width = sum(shape.streams[path.stream] for path in shape.paths) // G

    def random(*size):
        return torch.randn(size, generator=generator).to(cache.device)

    def append(tokens):
        entries = {name: random(2, tokens, channels) for name, channels in shape.streams.items()}
        spans = [each.begin(tokens) for each in (cache, plain)]
        for each, span in zip((cache, plain), spans, strict=True):
            each.append(0, span, entries)
            each.advance(span)
        return spans

    append(600)
    for each in (cache, plain):
        each.truncate(torch.tensor([600, 301]))
    largest = 0.0
    for T in (2, 1):
        spans, q = append(T), random(2, H, T, width) / width**0.5
        null = random(2, H, T), random(G, shape.streams[shape.v_stream] // G)
        out, expected = (each.attend(0, span, q, null) for each, span in zip((cache, plain), spans, strict=True))
        largest = max(largest, (out - expected).abs().nan_to_num(nan=math.inf).max().item())
    return largest
