"""Decode attention on an Apple GPU, by the kernels of decode.metal.

They have never run on a Mac. The tests compile decode.metal as C++ and run it on a CPU, launched by the code below, so
all but Metal's compiler and launch() is tested; kernels.difference() compares the rest with torch on a user's machine.
"""

import functools
import re
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("decode.metal").read_text(encoding="ascii")
SIMD, SPLIT = (int(re.search(rf"uint {name} = (\d+);", SOURCE)[1]) for name in ("SIMD", "SPLIT"))
FORMATS = ("fp32", "bf16", "fp16", "q8_0", "q4_0", "q4_sym", "nf4")             # in the order of decode.metal


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
                codes, scales, fmt = stream.ring, None, stream.ring_fmt
            tensors += [codes, q if scales is None else scales]                # q: any memory, it isn't read
            layouts += [FORMATS.index(fmt), w]
        first = splits[0] if ring else 0
        sizes = [H, G, T, codes.size(2), span.window if ring else 0, count, first, sum(splits), *layouts]
        launch("attend", [q, pos, settled, *tensors, partials], sizes, rows * count * SIMD)

    score, value = (q, q) if null is None else (x.float().contiguous() for x in null)
    out = q.new_empty(B, H, T, v)
    launch("combine", [partials, score, value, out], [H, G, T, v, sum(splits), int(null is not None)], rows * v)
    return out


FAILURES = (RuntimeError, SyntaxError)                     # that torch.mps.compile_shader raises

# A key is decoded again for every query that shares it, and every split of each query has a simdgroup of its own: from
# some number of queries on, decoding once for a matrix product is faster. 32 is a guess; MLA's heads all share a key.
KERNEL = dict(name="metal", formats=FORMATS, attention=attention, most_queries=32)
