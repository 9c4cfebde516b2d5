"""Decode attention on a CUDA device, by Triton: the cache is read as codes.

The settled tokens, and those of the ring, are split into tiles of BLOCK tokens; combine then merges the tiles of a
query, and the null token. Loads have no masks over tokens, which would break them up into single bytes; the cache is
allocated in multiples of BLOCK, and what holds no token is left out by tl.where.

attend_tile handles one tile for one query, a warp for each, so that sums over tokens are shuffles. A lane holds
BLOCK / 32 adjacent tokens and walks over the channels of its head: codes are channel-major, so it loads 16 bytes of
them at once, and a head may be of any width. attend_shared_tile handles one tile for all heads that share its keys, by
matrix products of 32 channels at a time, which end where the cache's scales do: codes are exact in float16, queries and
weights are split in two. quantize_tile settles new tokens in one launch.
"""

import functools

import torch
import triton
import triton.language as tl
from triton.errors import TritonError

LOG2E = tl.constexpr(1.4426950408889634)                   # scores are in units of log 2, for exp2
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)      # the top score where no token is visible
WIDE = tl.constexpr(48)                                    # loops over more channels aren't unrolled: compiling is slow
FORMATS = ("fp32", "bf16", "fp16", "q8_0", "q4_0", "q4_sym", "nf4")             # that unpack and quantize_tile know
BUSY = 2048                                                # programs that keep a GPU busy: 16 warps on each of 128 SMs
SHARED = 2                                                 # heads of a key that are worth it (estimated, not measured)
SHARED_WARPS = 8                                           # of a program, so that none spills registers


@triton.jit
def unpack(raw, half, levels, FMT: tl.constexpr):
    """Float32 values, in units of the scale, of codes as loaded; half: which half of a byte, where two share it."""
    if raw.dtype != tl.uint8:
        return raw.to(tl.float32)
    else:
        code = raw >> tl.cast(4 * half, tl.uint8) & 15
        if FMT == "nf4":                                   # of lanes that hold a level each: a shuffle, not a load
            return tl.gather(levels, code.to(tl.int32), 0)
        else:
            return code.to(tl.float32) - 8


@triton.jit
def dot_keys(q, codes, scales, levels, b, g, slot, capacity, G: tl.constexpr, W: tl.constexpr, FMT: tl.constexpr):
    """Scores [BLOCK] of the query at q [W] and the keys of sequence b, head g of G heads of W channels."""
    STEP: tl.constexpr = (W | 32) & -(W | 32)              # gcd(W, 32): so many channels always share a scale
    PER_ROW: tl.constexpr = 2 if codes.dtype.element_ty == tl.uint8 else 1
    PAIR: tl.constexpr = PER_ROW if W % 2 == 0 else 1      # else the first channel may be either half of a byte
    codes += b * ((G * W + PER_ROW - 1) // PER_ROW) * capacity + slot
    score = tl.zeros(slot.shape, tl.float32)
    for i in tl.range(0, W, STEP, loop_unroll_factor=W // STEP if W <= WIDE else 1):
        part = tl.zeros(slot.shape, tl.float32)
        for j in tl.static_range(0, STEP, PAIR):
            raw = tl.load(codes + (g * W + i + j) // PER_ROW * capacity)
            for k in tl.static_range(PAIR):
                part += tl.load(q + i + j + k) * unpack(raw, k if PAIR == 2 else (g * W + i) % 2, levels, FMT)
        if scales is not None:
            part *= tl.load(scales + (b * ((G * W + 31) // 32) + (g * W + i) // 32) * capacity + slot).to(tl.float32)
        score += part
    return score


@triton.jit
def sum_values(p, visible, codes, scales, levels, b, g, slot, capacity, out, G: tl.constexpr, W: tl.constexpr,
               FMT: tl.constexpr):
    """Store, at out [W], the values of sequence b and head g, weighted by p [BLOCK] and summed."""
    STEP: tl.constexpr = (W | 32) & -(W | 32)              # all as in dot_keys
    PER_ROW: tl.constexpr = 2 if codes.dtype.element_ty == tl.uint8 else 1
    PAIR: tl.constexpr = PER_ROW if W % 2 == 0 else 1
    codes += b * ((G * W + PER_ROW - 1) // PER_ROW) * capacity + slot
    for i in tl.range(0, W, STEP, loop_unroll_factor=W // STEP if W <= WIDE else 1):
        weight = p
        if scales is not None:
            scale = tl.load(scales + (b * ((G * W + 31) // 32) + (g * W + i) // 32) * capacity + slot)
            weight = p * tl.where(visible, scale.to(tl.float32), 0.0)
        for j in tl.static_range(0, STEP, PAIR):
            raw = tl.load(codes + (g * W + i + j) // PER_ROW * capacity)
            for k in tl.static_range(PAIR):
                x = unpack(raw, k if PAIR == 2 else (g * W + i) % 2, levels, FMT)
                if scales is None:
                    x = tl.where(visible, x, 0.0)
                tl.store(out + i + j + k, tl.sum(weight * x, 0))


@triton.jit
def look(pos, settled, tile, window, BLOCK: tl.constexpr):
    """Of a tile: its slots [BLOCK], which of them hold tokens that the query at the position at pos sees, and whether
    it is empty, with no need to read it. settled: where the number of settled tokens is."""
    now, settled, slot = tl.load(pos).to(tl.int32), tl.load(settled).to(tl.int32), tile * BLOCK + tl.arange(0, BLOCK)
    if window is None:
        seen = tl.minimum(settled, now + 1)
        return slot, slot < seen, tile * BLOCK >= seen     # of a short sequence beside a long one
    else:                                                  # % has the sign of its left side
        return slot, (slot < window) & (settled + (slot - settled % window + window) % window <= now), False


@triton.jit(do_not_specialize=["T", "first", "tiles", "window"])
def attend_tile(q, pos, settled, levels, v, v_scales, k0, k0_scales, k1, k1_scales, partial, T, first, tiles, capacity,
                window, H: tl.constexpr, G: tl.constexpr, V: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr,
                FV: tl.constexpr, F0: tl.constexpr, F1: tl.constexpr, BLOCK: tl.constexpr):
    """Attention of one query over one tile of BLOCK slots. Row [b, h, t], tile first + i of partial [B, H, T, tiles,
    V + 2] receives the weighted sum of values, the top score and the sum of the weights.

    q [B, H, T, W0 + W1]; pos [B, T]; settled [B]. The values v, and the keys k0 and k1 (or None) of one or two score
    paths are codes [B, rows, capacity] of formats FV, F0, F1, of G heads of V, W0, W1 channels, and scales [B, blocks,
    capacity] or None. window: None if their slots are those of settled tokens, else what the ring holds.
    """
    row, tile = tl.program_id(0), tl.program_id(1)         # rows come first: queries that share keys run side by side
    b, g = row // (H * T), row // T % H // (H // G)
    slot, visible, empty = look(pos + b * T + row % T, settled + b, tile, window, BLOCK)
    row, b, g = row.to(tl.int64), b.to(tl.int64), g.to(tl.int64)                # a cache may have over 2^31 elements
    partial += (row * tiles + first + tile) * (V + 2)
    if empty:
        tl.store(partial + V, LOWEST)
        tl.store(partial + V + 1, 0.0)
        return
    q, levels = q + row * (W0 + W1), tl.load(levels + tl.arange(0, 16))
    score = dot_keys(q, k0, k0_scales, levels, b, g, slot, capacity, G, W0, F0)
    if k1 is not None:
        score += dot_keys(q + W0, k1, k1_scales, levels, b, g, slot, capacity, G, W1, F1)
    score = tl.where(visible, score * LOG2E, -float("inf"))
    top = tl.maximum(tl.max(score, 0), LOWEST)             # finite, so that no difference below is inf - inf
    p = tl.exp2(score - top)
    tl.store(partial + V, top)
    tl.store(partial + V + 1, tl.sum(p, 0))
    sum_values(p, visible, v, v_scales, levels, b, g, slot, capacity, partial, G, V, FV)


@triton.jit
def dot(a, raw, half, levels, FMT: tl.constexpr, TRANSPOSE: tl.constexpr):
    """a @ unpack(raw) of float32 [M, K] and codes [K, N], [N, K] to TRANSPOSE, close to float32's precision. Float16
    has all codes but the levels of NF4, which are split in two terms like a, whose largest of a row comes to 1."""
    if FMT == "fp32" or FMT == "bf16":
        x = raw.to(tl.float32)
        return tl.dot(a, tl.trans(x) if TRANSPOSE else x, input_precision="tf32x3")
    else:
        most = tl.max(tl.abs(a), 1, keep_dims=True)
        most = tl.where(most > 0, most, 1.0)
        a /= most
        high = a.to(tl.float16)
        low = (a - high.to(tl.float32)).to(tl.float16)
        if FMT == "nf4":
            level = tl.load(levels + (raw >> tl.cast(4 * half, tl.uint8) & 15).to(tl.int32))
            x = level.to(tl.float16)
            rest = (level - x.to(tl.float32)).to(tl.float16)
            product = tl.dot(high, tl.trans(rest) if TRANSPOSE else rest)
        else:
            x = unpack(raw, half, levels, FMT).to(tl.float16)
            product = tl.zeros([a.shape[0], x.shape[0] if TRANSPOSE else x.shape[1]], tl.float32)
        x = tl.trans(x) if TRANSPOSE else x
        product = tl.dot(low, x, product)
        if FMT == "fp16":                                  # an infinity is whole: times low it may have the other sign
            whole = tl.dot(high, x)
            return tl.where(tl.abs(whole) < float("inf"), whole + product, whole) * most
        return tl.dot(high, x, product) * most


@triton.jit
def load_codes(codes, i, b, g, slot, capacity, G: tl.constexpr, W: tl.constexpr, PER_ROW: tl.constexpr):
    """Codes [32 / PER_ROW, BLOCK] of the i-th block of 32 channels that sequence b, head g of G heads of W channels has
    part in, and which of the head's channels is the first of each row. For what is outside 0..W - 1 others of the head
    stand in. A head begins at a multiple of gcd(W, 32), and so has part in at most (W + 63 - gcd(W, 32)) // 32."""
    row = (g * W // 32 + i) * (32 // PER_ROW) + tl.arange(0, 32 // PER_ROW)
    inside = tl.minimum(tl.maximum(row, g * W // PER_ROW), ((g + 1) * W - 1) // PER_ROW)
    raw = tl.load(codes + (b * ((G * W + PER_ROW - 1) // PER_ROW) + inside[:, None]) * capacity + slot)
    return raw, row * PER_ROW - g * W


@triton.jit
def load_scales(scales, i, b, g, slot, capacity, G: tl.constexpr, W: tl.constexpr):
    """Scales [BLOCK] of the block of load_codes, or of the head's last one."""
    block = tl.minimum(g * W // 32 + i, ((g + 1) * W - 1) // 32)
    return tl.load(scales + (b * ((G * W + 31) // 32) + block) * capacity + slot).to(tl.float32)


@triton.jit
def dot_shared_keys(q, row, R, codes, scales, levels, b, g, slot, capacity, G: tl.constexpr, W: tl.constexpr,
                    STRIDE: tl.constexpr, FMT: tl.constexpr):
    """Scores [M, BLOCK] of the queries `row` [M], those below R, at q [R, STRIDE], and the keys as in dot_keys."""
    PER_ROW: tl.constexpr = 2 if codes.dtype.element_ty == tl.uint8 else 1
    score = tl.zeros([row.shape[0], slot.shape[0]], tl.float32)
    for i in tl.range((W + 63 - ((W | 32) & -(W | 32))) // 32):                 # as load_codes counts
        raw, c = load_codes(codes, i, b, g, slot, capacity, G, W, PER_ROW)
        part = tl.zeros(score.shape, tl.float32)
        for half in tl.static_range(PER_ROW):
            own = (row < R)[:, None] & (c + half >= 0) & (c + half < W)
            query = tl.load(q + row[:, None] * STRIDE + c + half, own, 0.0)
            if scales is None:                             # another channel's infinity times 0 would be a NaN
                raw = tl.where(((c >= 0) & (c < W))[:, None], raw, 0.0)
            part += dot(query, raw, half, levels, FMT, False)
        if scales is not None:
            part *= load_scales(scales, i, b, g, slot, capacity, G, W)
        score += part
    return score


@triton.jit
def sum_shared_values(p, visible, codes, scales, levels, b, g, slot, capacity, out, row, R, ROW, G: tl.constexpr,
                      W: tl.constexpr, FMT: tl.constexpr):
    """Store, at out [R, ROW], the values as in sum_values, weighted by p [M, BLOCK] and summed."""
    PER_ROW: tl.constexpr = 2 if codes.dtype.element_ty == tl.uint8 else 1
    for i in tl.range((W + 63 - ((W | 32) & -(W | 32))) // 32):                 # as load_codes counts
        raw, c = load_codes(codes, i, b, g, slot, capacity, G, W, PER_ROW)
        weight = p
        if scales is not None:
            weight *= tl.where(visible, load_scales(scales, i, b, g, slot, capacity, G, W), 0.0)
        else:
            raw = tl.where(visible, raw, 0.0)
        for half in tl.static_range(PER_ROW):
            own = (row < R)[:, None] & (c + half >= 0) & (c + half < W)
            tl.store(out + row[:, None] * ROW + c + half, dot(weight, raw, half, levels, FMT, True), own)


@triton.jit(do_not_specialize=["first", "tiles", "window"])
def attend_shared_tile(q, pos, settled, levels, v, v_scales, k0, k0_scales, k1, k1_scales, partial, first, tiles,
                       capacity, window, R: tl.constexpr, G: tl.constexpr, V: tl.constexpr, W0: tl.constexpr,
                       W1: tl.constexpr, FV: tl.constexpr, F0: tl.constexpr, F1: tl.constexpr, BLOCK: tl.constexpr,
                       M: tl.constexpr):
    """As attend_tile, for one query each, T = 1, of M of the R heads that share the keys of one of G heads."""
    group, tile = tl.program_id(0), tl.program_id(1)
    b, g = group // G, group % G
    slot, visible, empty = look(pos + b, settled + b, tile, window, BLOCK)
    group, b, g = group.to(tl.int64), b.to(tl.int64), g.to(tl.int64)
    row, ROW = tl.program_id(2) * M + tl.arange(0, M), tiles.to(tl.int64) * (V + 2)
    partial += group * R * ROW + (first + tile) * (V + 2)
    at, here = partial + row * ROW + V, row < R
    if empty:
        tl.store(at, LOWEST, here)
        tl.store(at + 1, 0.0, here)
        return
    q += group * R * (W0 + W1)
    score = dot_shared_keys(q, row, R, k0, k0_scales, levels, b, g, slot, capacity, G, W0, W0 + W1, F0)
    if k1 is not None:
        score += dot_shared_keys(q + W0, row, R, k1, k1_scales, levels, b, g, slot, capacity, G, W1, W0 + W1, F1)
    score = tl.where(visible, score * LOG2E, -float("inf"))
    top = tl.maximum(tl.max(score, 1), LOWEST)
    p = tl.exp2(score - top[:, None])
    tl.store(at, top, here)
    tl.store(at + 1, tl.sum(p, 1), here)
    sum_shared_values(p, visible, v, v_scales, levels, b, g, slot, capacity, partial, row, R, ROW, G, V, FV)


@triton.jit(do_not_specialize=["T", "tiles"])
def combine(partial, null_score, null_value, out, T, tiles, H: tl.constexpr, G: tl.constexpr, V: tl.constexpr,
            TILES: tl.constexpr, CHANNELS: tl.constexpr):
    """Merge the tiles of one query, partial [B, H, T, tiles, V + 2], for CHANNELS of the channels of out [B, H, T, V].
    The null token, score [B, H, T] and value [G, V] or both None, is the first key seen."""
    row, d = tl.program_id(0), tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    top, total = tl.full((), LOWEST, tl.float32), tl.zeros((), tl.float32)
    value = tl.zeros([CHANNELS], tl.float32)
    if null_score is not None:
        top, total = tl.load(null_score + row) * LOG2E, 1.0
        value = tl.load(null_value + row // T % H // (H // G) * V + d, d < V)
    partial += row.to(tl.int64) * tiles * (V + 2)
    start = 0
    while start < tiles:                                   # for all numbers of tiles; the interpreter fails at range()
        tile = start + tl.arange(0, TILES)
        here, at = tile < tiles, partial + tile * (V + 2)
        tops, totals = tl.load(at + V, here, LOWEST), tl.load(at + V + 1, here, 0.0)
        values = tl.load(at[:, None] + d, (totals != 0)[:, None] & (d < V), 0.0)                  # [TILES, CHANNELS]
        new_top = tl.maximum(top, tl.max(tops, 0))
        decay, weight = tl.exp2(top - new_top), tl.exp2(tops - new_top)
        total = total * decay + tl.sum(totals * weight, 0)
        value = value * decay + tl.sum(values * weight[:, None], 0)
        top = new_top
        start += TILES
    tl.store(out + row.to(tl.int64) * V + d, value / total, d < V)


@functools.cache
def level_table(levels, device):
    return torch.tensor(levels, device=device)


def tile_size(bits, slots, queries):
    """Slots in a tile: so many that a lane loads 16 bytes of the narrowest codes at once, or half as many where there
    are too few tiles to keep a GPU busy."""
    most = 32 * 16 * 8 // max(8, min(bits))                # 512 for 4 and for 8 bits
    return most if queries * slots >= BUSY * most else most // 2


def shared_tile_size(slots, programs):
    """Slots in a tile of attend_shared_tile, whose programs have SHARED_WARPS."""
    return 128 if programs * slots >= BUSY // SHARED_WARPS * 128 else 64


def attention(q, streams, shape, span, null=None):
    """decode_attention() of train_dba.py for few queries."""
    B, H, T, _ = q.shape
    G = 1 if shape.latent else shape.v_groups
    held = [streams[name] for name in (shape.v_stream, *(path.stream for path in shape.paths))]
    V, *widths = [stream.channels // G for stream in held]
    q, levels, absent = q.float().contiguous(), level_table(held[0].levels, q.device), 3 - len(held)
    R = H // G
    M = min(64, max(16, triton.next_power_of_2(R)))        # the fewest rows of a matrix product are 16
    if shared := T == 1 and R >= SHARED:
        block = shared_tile_size(span.end, B * G * triton.cdiv(R, M))
    else:
        block = tile_size([stream.bits for stream in held], span.end, B * H * T)
    parts = ((span.end, None, block, [stream.fmt for stream in held],
              [x for stream in held for x in (stream.codes, stream.scales)]),
             (span.window, span.window, held[0].ring_block, [stream.ring_fmt for stream in held],
              [x for stream in held for x in (stream.ring, None)]))
    first, tiles = 0, sum(triton.cdiv(slots, block) for slots, _, block, _, _ in parts)
    partial = q.new_empty(B, H, T, tiles, V + 2)
    for slots, window, block, formats, tensors in parts:
        count = triton.cdiv(slots, block)
        operands = q, span.pos, span.settled, levels, *tensors, *[None, None] * absent, partial
        widths_and_formats = V, *widths, *[0] * absent, *formats, *[None] * absent
        if count and shared:
            attend_shared_tile[B * G, count, triton.cdiv(R, M)](
                *operands, first, tiles, tensors[0].size(2), window, R, G, *widths_and_formats, block, M,
                num_warps=SHARED_WARPS, num_stages=3)
        elif count:
            attend_tile[B * H * T, count](
                *operands, T, first, tiles, tensors[0].size(2), window, H, G, *widths_and_formats, block,
                num_warps=1, num_stages=1)
        first += count
    out, channels = q.new_empty(B, H, T, V), min(64, triton.next_power_of_2(V))
    score, value = (None, None) if null is None else (x.float().contiguous() for x in null)
    combine[B * H * T, triton.cdiv(V, channels)](partial, score, value, out, T, tiles, H, G, V, 2048 // channels,
                                                 channels)
    return out


@triton.jit(do_not_specialize=["N"])
def quantize_tile(x, rows, pos, codes, scales, levels, N, x_row, x_channel, capacity, C: tl.constexpr,
                  FMT: tl.constexpr, TOKENS: tl.constexpr):
    """Settle TOKENS of the tokens x [N, C], of strides x_row and x_channel, of one block of 32 channels: quantize() of
    train_dba.py, bit by bit. rows, pos [N]; codes [B, rows, capacity]; scales [B, blocks, capacity]."""
    n, block, i = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), tl.program_id(1), tl.arange(0, 32)[None]
    inside, channel = n < N, block * 32 + i
    x = tl.load(x + n.to(tl.int64)[:, None] * x_row + channel * x_channel, inside[:, None] & (channel < C), 0.0)
    x = x.to(tl.float32)                                   # [TOKENS, 32]
    finite = tl.min((tl.abs(x) < float("inf")).to(tl.int32), 1, keep_dims=True) == 1
    x = tl.where(finite, x, 0.0)
    most = tl.max(tl.abs(x), 1, keep_dims=True)            # [TOKENS, 1]
    if FMT == "q8_0":
        d = tl.div_rn(most, tl.full(most.shape, 127.0, tl.float32))
    elif FMT == "q4_0":                                    # the first of those with the largest size keeps its sign
        first = tl.min(tl.where(tl.abs(x) == most, i, 32), 1, keep_dims=True)
        d = tl.min(tl.where(i == first, x, float("inf")), 1, keep_dims=True) * -0.125
    elif FMT == "q4_sym":
        d = tl.div_rn(most, tl.full(most.shape, 7.0, tl.float32))
    else:
        d = most
    scale = d.to(tl.float16)
    finite = finite & (tl.abs(scale.to(tl.float32)) < float("inf"))
    inverse = tl.div_rn(tl.full(d.shape, 1.0, tl.float32), d)
    x = tl.where(finite, x, 0.0) * tl.where(finite & (scale.to(tl.float32) != 0), inverse, 0.0)
    if FMT == "q8_0":
        size = tl.floor(tl.abs(x))
        size += tl.where(tl.abs(x) - size >= 0.5, 1.0, 0.0)                     # halves away from zero
        code = tl.where(x < 0, -size, size).to(tl.int8)
    elif FMT == "nf4":
        code = tl.zeros(x.shape, tl.uint8)
        for level in tl.static_range(15):
            code += (x > (tl.load(levels + level) + tl.load(levels + level + 1)) * 0.5).to(tl.uint8)
    else:
        code = tl.minimum(tl.maximum(tl.floor(x + 8.5), 0.0), 15.0).to(tl.uint8)
    b, slot = tl.load(rows + n, inside, 0)[:, None], tl.load(pos + n, inside, 0)[:, None]         # int64 [TOKENS, 1]
    scale = tl.where(finite, scale, float("nan")).to(tl.float16)
    tl.store(scales + (b * ((C + 31) // 32) + block) * capacity + slot, scale, inside[:, None])
    row, held = channel, C
    if FMT != "q8_0":                                      # the even channel in the low half of a byte
        low, high = tl.split(tl.reshape(tl.where(channel < C, code, 0), (TOKENS, 16, 2)))
        code, row, held = low | high << 4, block * 16 + tl.arange(0, 16)[None], (C + 1) // 2
    tl.store(codes + (b * held + row) * capacity + slot, code, inside[:, None] & (row < held))


def append(stream, rows, pos, x):
    """append() of train_dba.py."""
    if stream.scales is None:
        stream.codes[rows, :, pos] = x.to(stream.codes.dtype)
    if stream.scales is None or not len(x):                # Triton launches no empty grid
        return
    (N, C), tokens = x.shape, 16
    quantize_tile[triton.cdiv(N, tokens), triton.cdiv(C, 32)](
        x, rows, pos, stream.codes, stream.scales, level_table(stream.levels, x.device), N, *x.stride(),
        stream.codes.size(2), C, stream.fmt, tokens, enable_fp_fusion=False)    # a fused multiply-add would round once


FAILURES = (RuntimeError, TritonError)                     # that the first launch may raise

# Of several tokens' queries a program reads the codes of its keys for one; of those that share a key all but the first
# find them in the L2 cache. For more than these (estimated, not measured), dequantising once moves fewer bytes.
KERNEL = dict(name="triton", formats=FORMATS, attention=attention, append=append, most_queries=32)
