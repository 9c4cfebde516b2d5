"""The Triton kernels, on a CUDA device or, with TRITON_INTERPRET=1, interpreted: test_triton.py runs this file in a
process of its own. The reference for attention is one dense softmax per query, in float64; for append it is
train_dba.append on the CPU, bit by bit."""

import dataclasses
import os
from types import SimpleNamespace

import pytest
import torch

import train_dba as dba
from kernels import triton_decode
from reference import hard_tokens

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
torch.use_deterministic_algorithms(True)                   # torch.empty is full of NaN
F = triton_decode.FORMATS


def decoupled(heads, sem, geo, v=None, groups=None, **flags):
    """Config of decoupled attention by widths per head."""
    return make(heads, attn_mode="decoupled", sem_dim=heads * sem, geo_dim=heads * geo,
                attn_dim=heads * (v or sem + geo), kv_head=groups, **flags)


def make(heads, **flags):
    return dba.make_config(data="none", layers=1, n_head=heads, d_ff=8, **{"d_model": 8 * heads, **flags})


D4_8_12 = decoupled(4, 4, 8)                               # 48 channels of v: the head at 24..35 straddles two blocks
MLA = make(2, attn_mode="mla", d_model=32, kv_lora_rank=96, rope_dim=20)


@dataclasses.dataclass
class Case:
    cfg: dba.Config
    formats: object                                        # a policy, or formats in the order of the cache's streams
    lengths: tuple                                         # of the sequences, the T new tokens included
    T: int = 1
    residual: int = 0
    null: bool = False
    ahead: int = 0                                         # so many more tokens were cached, then truncated
    busy: int = triton_decode.BUSY
    kernel: bool = False                                   # the kernel quantises, too


CASES = {
    **{f"length {n}": Case(D4_8_12, "hetero", (n,), null=n == 33) for n in (1, 31, 32, 33, 255, 700)},
    **{f"mix {i}": Case(D4_8_12, (F[i], F[(i + 2) % 7], F[(i + 5) % 7]), (65,), null=True) for i in range(7)},
    "full tiles": Case(D4_8_12, "hetero", (700,), busy=0),
    "ragged": Case(D4_8_12, "hetero", (600, 1, 40), ahead=7),
    "three queries": Case(D4_8_12, "hetero", (300, 34), T=3, null=True, ahead=2),
    "8/32/40": Case(decoupled(2, 8, 32), "hetero", (300,)),
    "16/32/48": Case(decoupled(2, 16, 32), ("nf4", "q4_sym", "q4_0"), (300,)),
    "64": Case(make(2, attn_mode="standard", d_model=128), ("q8_0", "q4_0"), (130,), null=True),
    "3/6/9": Case(decoupled(6, 3, 6), "q4_0", (257,), null=True),
    "5/4/7": Case(decoupled(5, 5, 4, 7), ("nf4", "q4_sym", "q4_0"), (40,)),
    "5/7/7, no RoPE": Case(decoupled(3, 5, 7, 7, rope=False), ("q4_0", "q4_0", "nf4"), (40,), residual=8),
    "gqa": Case(make(6, attn_mode="gqa", attn_dim=72, kv_head=2), ("q8_0", "nf4"), (130, 50), null=True),
    "gqa, ring": Case(make(4, attn_mode="gqa", attn_dim=48, kv_head=2), "q4_0", (40,), T=3, residual=32),
    "decoupled in groups": Case(decoupled(4, 4, 8, groups=2), "hetero", (280,), null=True),
    "mla": Case(MLA, ("q4_0", "q8_0"), (70,), null=True),
    **{f"shared, mix {i}": Case(decoupled(6, 5, 8, groups=2), (F[i], F[(i + 2) % 7], F[(i + 5) % 7]), (65, 140))
       for i in range(7)},
    "shared, odd widths": Case(decoupled(6, 5, 4, 7, groups=2), ("nf4", "q4_sym", "q4_0"), (200, 1, 90), null=True,
                               residual=40),
    "shared, full tiles": Case(make(4, attn_mode="gqa", attn_dim=256, kv_head=2), "q4_0", (300,), busy=0, residual=32),
    "shared, heads straddle blocks": Case(decoupled(9, 23, 34, 35, groups=3), ("nf4", "q8_0", "q4_0"), (70, 33)),
    "shared, 40 and 8": Case(decoupled(6, 8, 40, groups=3), "hetero", (70,)),
    "shared, ring truncated": Case(decoupled(4, 4, 8, groups=2), "hetero", (100, 33), residual=32, ahead=10, null=True),
    "shared, nothing settled": Case(decoupled(4, 4, 8, groups=2), "hetero", (20, 3), residual=40),
    "shared by 70": Case(make(70, attn_mode="gqa", attn_dim=70 * 12, kv_head=1), ("q8_0", "fp16"), (90,), ahead=4),
    "latent, groups": Case(decoupled(4, 4, 8, groups=2, kv_lora_rank=44), "hetero", (70, 40), T=3, residual=32),
    "mla, ring": Case(MLA, ("q8_0", "fp16"), (70,), T=3, residual=32, ahead=5),
    "ring 32": Case(D4_8_12, "hetero", (300, 33), residual=32, null=True),
    "ring 128": Case(D4_8_12, "hetero", (300, 100), residual=128),
    "ring 32, truncated": Case(D4_8_12, "hetero", (300, 33), T=3, residual=32, ahead=10),
    "ring 128, truncated": Case(D4_8_12, ("bf16", "q4_0", "q8_0"), (200,), residual=128, ahead=50, null=True),
    "nothing settled": Case(D4_8_12, "hetero", (20,), residual=40),
    "quantised by the kernel": Case(D4_8_12, ("q4_0", "q8_0", "nf4"), (70, 40), T=3, residual=32, kernel=True),
}


def values(stream, b, positions, settled, window):
    """Float64 [C, n] of a sequence's tokens at these positions, from the definition of the formats."""
    C, columns = stream.channels, []
    c = torch.arange(C)
    for p in positions:
        if p >= settled:
            columns.append(stream.ring[b, :, p % window].double())
            continue
        codes = stream.codes[b, :, p]
        if stream.scales is None:
            columns.append(codes.double())
            continue
        if stream.fmt != "q8_0":
            codes = torch.where(c % 2 == 0, codes[c // 2] % 16, codes[c // 2] // 16)
        x = torch.tensor(dba.NF4, dtype=torch.float64)[codes.int()] if stream.fmt == "nf4" else codes.double()
        x = x - 8 if stream.fmt.startswith("q4") else x
        columns.append(x * stream.scales[b, c // 32, p].double())
    return torch.stack(columns, 1)


def on_cpu(x):
    """What the reference reads of a stream or a span, on the CPU."""
    return SimpleNamespace(**{name: part.cpu() if isinstance(part, torch.Tensor) else part
                              for name, part in vars(x).items()})


def reference(q, streams, shape, span, null):
    """Float64 [B, H, T, v] by one softmax over all tokens that a query may see; and the scores' standard deviation."""
    span, streams = on_cpu(span), {name: on_cpu(stream) for name, stream in streams.items()}
    B, H, T, _ = q.shape
    G = 1 if shape.latent else shape.v_groups
    out, spread = [], []
    for b, h in ((b, h) for b in range(B) for h in range(H)):
        n, settled, g = int(span.pos[b, -1]) + 1, int(span.settled[b]), h // (H // G)
        held = {name: values(stream, b, range(n), settled, span.window).unflatten(0, (G, -1))[g]      # [w, n]
                for name, stream in streams.items()}
        scores = q[b, h].double() @ torch.cat([held[path.stream] for path in shape.paths])            # [T, n]
        v = held[shape.v_stream]
        for t in range(T):
            seen = int(span.pos[b, t]) + 1
            s, x = scores[t, :seen], v[:, :seen]
            spread.append(s)
            if null is not None:
                s, x = torch.cat([s, null[0][b, h, t, None]]), torch.cat([x, null[1][g, :, None]], 1)
            out.append(x @ s.softmax(0))
    return torch.stack(out).view(B, H, T, -1), torch.cat(spread).std()


def poison(cache):
    for tensor in (x for layer in cache.layers for s in layer.values() for x in (s.codes, s.scales, s.ring)):
        if tensor is not None:
            tensor.fill_(float("nan") if tensor.is_floating_point() else 0x55)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_attention(case, monkeypatch):
    monkeypatch.setattr(triton_decode, "BUSY", case.busy)
    generator = torch.Generator().manual_seed(0)
    shape, B, T = case.cfg.attention, len(case.lengths), case.T
    formats = case.formats if isinstance(case.formats, str) else dict(zip(shape.streams, case.formats, strict=True))
    kernel = dba.Kernel(**triton_decode.KERNEL) if case.kernel else None
    cache = dba.KVCache(case.cfg, B, max(case.lengths) + case.ahead, formats, case.residual, DEVICE, kernel)
    poison(cache)

    def step(T):
        span = cache.begin(T)
        cache.append(0, span, {name: torch.randn(B, T, C, generator=generator).to(DEVICE)
                               for name, C in shape.streams.items()})
        return span

    if before := max(case.lengths) - T + case.ahead:
        cache.advance(step(before))
    cache.truncate(torch.tensor(case.lengths) - T)
    span, streams = step(T), cache.layers[0]
    G = 1 if shape.latent else shape.v_groups
    w, v = sum(shape.streams[path.stream] for path in shape.paths) // G, shape.streams[shape.v_stream] // G
    q = torch.randn(B, case.cfg.n_head, T, w, generator=generator) * 2 / w**0.5
    null = (torch.randn(q.shape[:3], generator=generator) + 2, torch.randn(G, v, generator=generator))
    null = null if case.null else None
    expected, spread = reference(q, streams, shape, span, null)
    assert max(case.lengths) == 1 or spread > 1, f"scores of order {spread:.2f} make this a weak test"
    if null is not None:
        null = tuple(part.to(DEVICE) for part in null)
    actual = triton_decode.attention(q.to(DEVICE), streams, shape, span, null)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double().cpu(), expected, rtol=0, atol=3e-6)


@pytest.mark.parametrize("name, below", (("k_sem", False), ("k_sem", True), ("v", False)))
@pytest.mark.parametrize("policy", ("hetero", "fp16", "bf16"))
@pytest.mark.parametrize("tokens", ((3,), (2, 1)), ids=("three queries", "shared"))
def test_what_is_not_finite(tokens, policy, name, below):
    """An infinity in a last token, in its first or last channel, shows in the last query where it does in torch: in a
    block of codes, or in the head that it is of. It doesn't show in queries before that, as it does in torch. below:
    its score is an infinity below, of no weight, but in a block of codes."""
    cfg = decoupled(4, 4, 8, groups=2 if tokens[-1] == 1 else 4)
    cache = dba.KVCache(cfg, 3, 3, policy, device=DEVICE)
    for T in tokens:
        span = cache.begin(T)
        entries = {stream: torch.randn(3, T, C, device=DEVICE) for stream, C in cache.shape.streams.items()}
        if T == tokens[-1]:
            entries[name][0, -1, 0] = entries[name][1, -1, -1] = float("inf")
        cache.append(0, span, entries)
        cache.advance(span)
    q = (torch.rand(3, 4, T, 12, device=DEVICE) + 0.1) * (-1 if below else 1)
    actual, expected = (attention(q, cache.layers[0], cache.shape, span) for attention in (
        triton_decode.attention, dba.decode_attention))
    assert actual[:, :, :-1].isfinite().all()
    actual, expected = actual[:, :, -1], expected[:, :, -1]
    finite = expected.isfinite()
    assert torch.equal(actual.isfinite(), finite) and finite[2].all()
    if below and policy != "hetero":
        assert finite.all()
    else:
        assert not finite[0, 0].all() and not finite[1, -1].all()
    assert policy == "hetero" or finite[0, -1].all() and finite[1, 0].all()
    torch.testing.assert_close(actual[finite], expected[finite], rtol=0, atol=1e-5)


@pytest.mark.parametrize("groups", (2, 1))
def test_caches_of_over_2_to_the_31_elements(groups, monkeypatch):
    """The last rows of a cache of three tokens, of which nothing else is touched."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    cfg = make(2, attn_mode="gqa", attn_dim=2 * 34 // groups, kv_head=groups, rope=False)
    cache = dba.KVCache(cfg, 1, 3, "q8_0", device=DEVICE)
    for T in (2, 1):
        span = cache.begin(T)
        cache.append(0, span, {name: torch.randn(1, T, C, device=DEVICE) for name, C in cache.shape.streams.items()})
        cache.advance(span)
    q = torch.randn(1, 2, 1, 34 // groups, device=DEVICE)
    expected = dba.decode_attention(q, cache.layers[0], cache.shape, span)
    for stream in cache.layers[0].values():
        for part in ("codes", "scales"):
            held = getattr(stream, part)
            large = held.new_empty(*held.shape[:2], 2**26)
            large[..., :held.size(2)] = held
            setattr(stream, part, large)
    assert stream.codes[0, -1:].storage_offset() > 2**31
    actual = triton_decode.attention(q, cache.layers[0], cache.shape, span)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("fmt", F)
@pytest.mark.parametrize("C, dtype", [(64, torch.float32), (40, torch.bfloat16), (33, torch.float32),
                                      (7, torch.float16), (1, torch.float32)])
def test_append_is_bit_identical(fmt, C, dtype):
    x = hard_tokens(C).to(dtype)
    rows, pos = torch.arange(len(x)) % 3, torch.randperm(512, generator=torch.Generator().manual_seed(0))[:len(x)]
    expected, actual = (dba.CacheStream(3, C, 512, 0, fmt, device) for device in ("cpu", DEVICE))
    for stream in (expected, actual):
        stream.codes.fill_(1)
        if stream.scales is not None:
            stream.scales.fill_(-7)
    dba.append(expected, rows, pos, x)
    rows, pos, x = rows.to(DEVICE), pos.to(DEVICE), x.to(DEVICE)
    triton_decode.append(actual, rows, pos, x.T.contiguous().T)                 # as the ring gives it
    triton_decode.append(actual, rows[:0], pos[:0], x[:0])
    actual = on_cpu(actual)
    torch.testing.assert_close(actual.codes, expected.codes, rtol=0, atol=0, equal_nan=True)
    if actual.scales is not None:
        a, b = actual.scales, expected.scales
        assert torch.equal(a.isnan(), b.isnan()) and b.isnan().any() and not b.isnan().all()
        assert torch.equal(a[~a.isnan()].view(torch.int16), b[~b.isnan()].view(torch.int16))
