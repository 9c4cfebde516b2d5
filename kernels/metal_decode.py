"""Decode attention on an Apple GPU, by the kernels of decode.metal.

They have never run on a Mac. The tests compile decode.metal as C++ and run it on a CPU, launched by the code below, so
all but Metal's compiler and launch() is tested; kernels.choose() compares the rest with torch by self_test().
"""

import functools
import math
import re
from pathlib import Path
from types import SimpleNamespace

import torch

from train_dba import FORMATS, AttentionShape, KVCache, ScorePath, decode_attention, ring_format

SOURCE = Path(__file__).with_name("decode.metal").read_text(encoding="ascii")
SIMD, SPLIT = (int(re.search(rf"uint {name} = (\d+);", SOURCE)[1]) for name in ("SIMD", "SPLIT"))
TOLERANCE = 1e-3                                           # of self_test(); a wrong nibble or scale is off by far more


@functools.cache
def library():
    return torch.mps.compile_shader(SOURCE)


def launch(kernel, tensors, sizes, threads):
    """Run a kernel of decode.metal: its arguments are the tensors' memory, strides unseen, and a struct of the sizes.
    Simdgroups are independent; groups of four are only for the scheduler."""
    getattr(library(), kernel)(*tensors, sizes, threads=[threads], group_size=[4 * SIMD], arg_casts="int32")


def attention(q, streams, shape, span, null=None):
    """decode_attention() of train_dba.py for few queries."""
    B, H, T, _ = q.shape
    G = 1 if shape.latent else shape.v_groups
    width = {name: stream.channels // G for name, stream in streams.items()}                      # per group
    names = [path.stream for path in shape.paths]
    reads = [(name, width[name]) for name in names] + [(names[0], 0)] * (2 - len(names))          # always two keys
    reads.append((shape.v_stream, width[shape.v_stream]))
    v, rows = width[shape.v_stream], B * H * T
    q, pos, settled = q.float().contiguous(), span.pos.contiguous(), span.settled.contiguous()
    splits = [-(-used // SPLIT) for used in (span.end, span.window)]
    partials = q.new_empty(B, H, T, sum(splits), 2 + v)

    for ring, count in enumerate(splits):
        if not count:
            continue
        tensors, layouts = [], []
        for name, w in reads:
            stream = streams[name]
            codes, scales, fmt = stream.codes, stream.scales, stream.fmt
            if ring:
                codes, scales, fmt = stream.ring, None, ring_format(stream.fmt)
            tensors += [codes, q if scales is None else scales]                # q: any memory, it isn't read
            layouts += [list(FORMATS).index(fmt), w]
        first = splits[0] if ring else 0
        sizes = [H, G, T, codes.size(2), span.window if ring else 0, count, first, sum(splits), *layouts]
        launch("attend", [q, pos, settled, *tensors, partials], sizes, rows * count * SIMD)

    score, value = (q, q) if null is None else (x.float().contiguous() for x in null)
    out = q.new_empty(B, H, T, v)
    launch("combine", [partials, score, value, out], [H, G, T, v, sum(splits), int(null is not None)], rows * v)
    return out


def self_test(device="mps"):
    """Largest absolute difference from decode_attention() on a small heterogeneous cache with sequences of two lengths,
    a ring and a null token; infinite if there is a NaN."""
    H, T, generator = 4, 2, torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator).to(device)

    paths = (ScorePath("sem", 4, H, 1.0, False, False, "k_sem"), ScorePath("geo", 9, H, 1.0, False, False, "k_geo"))
    cfg = SimpleNamespace(attention=AttentionShape(paths, 13, H, "v", 0), layers=1)
    cache = KVCache(cfg, 2, 640, "hetero", 32, device)
    for new, kept in ((600, torch.tensor([600, 301])), (T, None)):
        span = cache.begin(new)
        cache.append(0, span, {name: random(2, new, C) for name, C in cfg.attention.streams.items()})
        cache.advance(span)
        if kept is not None:
            cache.truncate(kept)
    args = random(2, H, T, 13) / 13 ** 0.5, cache.layers[0], cfg.attention, span, (random(2, H, T), random(H, 13))
    return (attention(*args) - decode_attention(*args)).abs().nan_to_num(nan=math.inf).max().item()


# A key is decoded again for every query that shares it, and every split of each query has a simdgroup of its own: from
# some number of queries on, decoding once for a matrix product is faster. 32 is a guess; MLA's heads all share a key.
KERNEL = dict(name="metal", attention=attention, most_queries=32)
