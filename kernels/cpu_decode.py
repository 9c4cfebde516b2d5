"""Decode attention on a CPU: multiply and sum over the codes of the cache, which torch.compile fuses into loops that
read each code once and keep no dequantised copy. A matrix product could not be fused; it would need that copy."""

import torch

from train_dba import NF4


CHUNK = 2**17                                              # slots at once: scores take 4 bytes a slot and query


def planes(G, slots, codes, scales, fmt, w):
    """Yield (channels, codes, scale or None), float32 [B, G, n, S] each, of G heads of w channels: two planes, even and
    odd channels, where they are the two halves of bytes, else one."""
    codes = codes[..., slots]
    if scales is None:
        yield slice(None), codes.float().unflatten(1, (G, w)), None
        return
    step = 2 if fmt != "q8_0" and w % 2 == 0 else 1
    scale = scales[:, :, None, slots].expand(-1, -1, 32 // step, -1).flatten(1, 2)[:, :G * w // step]
    scale = scale.float().unflatten(1, (G, w // step))
    if fmt == "q8_0":
        yield slice(None), codes.float().unflatten(1, (G, w)), scale
        return
    if step == 2:
        codes = codes.unflatten(1, (G, w // 2))
        halves = (codes & 15, codes >> 4)
    else:
        shift = torch.tensor([0, 4], dtype=torch.uint8)[:, None]
        halves = ((codes[:, :, None] >> shift & 15).flatten(1, 2)[:, :G * w].unflatten(1, (G, w)),)
    for i, half in enumerate(halves):
        yield slice(i, None, step), torch.tensor(NF4)[half.int()] if fmt == "nf4" else half.float() - 8, scale


@torch.compile(dynamic=True, recompile_limit=64)           # one graph for each mix of formats and widths
def partial_attention(q, keys, values, start, stop, pos, now):
    """Largest score [B, G, M, 1], sum of exponentials [B, G, M, 1] and their weighted sum of values [B, G, M, v].

    q: per path [B, G, M, w]; keys, values: (codes, scales, format, width per head), of which the S slots start..stop
    are looked at, at the positions pos [B, S]; now [B, M]: the queries' positions.
    """
    G, scores, slots = q[0].size(1), 0.0, slice(start, stop)
    for part, key in zip(q, keys):
        for channels, codes, scale in planes(G, slots, *key):
            x = codes if scale is None else codes * scale
            scores = scores + (part[:, :, :, channels, None] * x[:, :, None]).sum(3)              # [B, G, M, S]
    visible = (pos[:, None] <= now[:, :, None])[:, None]                                          # [B, 1, M, S]
    scores = torch.where(visible, scores, -torch.inf)
    top = scores.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).min)
    p, there, out = torch.exp(scores - top), visible[:, :, -1:], []
    for channels, codes, scale in planes(G, slots, *values):
        weights = p[:, :, :, None]                                                                # [B, G, M, 1, S]
        if scale is None:
            codes = torch.where(there, codes, 0.0)                                                # [B, G, v, S]
        else:
            weights = weights * torch.where(there, scale, 0.0)[:, :, None]                        # [B, G, M, n, S]
        out.append((weights * codes[:, :, None]).sum(-1))                                         # [B, G, M, n]
    return top, p.sum(-1, keepdim=True), torch.stack(out, -1).flatten(3)


def attention(q, streams, shape, span, null=None):
    """decode_attention() of train_dba.py for few queries."""
    B, H, T, _ = q.shape
    G = 1 if shape.latent else shape.v_groups
    names = [path.stream for path in shape.paths]
    q = q.float().reshape(B, G, H // G * T, -1).split([streams[name].channels // G for name in names], 3)
    now = span.pos.repeat(1, H // G)                                                              # [B, M]
    parts = []
    if null is not None:
        score, value = null
        top = score.float().reshape(B, G, H // G * T, 1)
        parts.append((top, torch.ones_like(top), value.float()[None, :, None].expand(B, -1, top.size(2), -1)))
    for part, start, stop, pos in span.chunks(CHUNK):
        held = {name: (stream.codes, stream.scales, stream.fmt) if part == "settled" else (stream.ring, None, None)
                for name, stream in streams.items()}
        held = {name: (*tensors, streams[name].channels // G) for name, tensors in held.items()}
        parts.append(partial_attention(q, [held[name] for name in names], held[shape.v_stream], start, stop, pos, now))
    tops, totals, outs = (torch.stack(x) for x in zip(*parts))                                    # [parts, B, G, M, .]
    weights = torch.exp(tops - tops.amax(0))
    return ((outs * weights).sum(0) / (totals * weights).sum(0)).reshape(B, H, T, -1)


KERNEL = dict(name="compiled multiply-and-sum", attention=attention, most_queries=8)
