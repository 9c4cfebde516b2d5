"""The quantised KV cache: quantisers, bytes, the window of the newest tokens, rotation; cached against a reference."""

import itertools
import math
import random

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given as drawn
from hypothesis import settings as limits
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import reference
import train_dba as dba
from evals.timing import cache_bytes
from kernels import rotate
from reference import (
    LEVELS,
    MODES,
    QUANTISED,
    SIGNED,
    TOP,
    cached_and_expected,
    cached_logits,
    close,
    config,
    model_of,
    null_and_tie,
    poison_free_slots,
    poisoned,
    quantised,
    settings,
    tensors,
    tokens,
)

BITS = {"q8_0": 8, "q4_0": 4, "q4_sym": 4, "nf4": 4, "q3_0": 3, "q2_0": 2}
EXACT = 5e-5                                               # queries, rotated keys and cached values are float32
QUICK = limits(max_examples=120, deadline=None, derandomize=True)


def decode(codes, scales, fmt, C):
    """Values [N, C] of what quantize() returned."""
    return dba.dequantize(codes.T[None], scales.T[None], fmt, C)[0].T


def reads_as(x, fmt):
    x = torch.as_tensor(x)
    return decode(*dba.quantize(x, fmt), fmt, x.size(1))


def same(a, b):
    """Equal, NaN to NaN."""
    assert a.shape == b.shape
    wrong = ~((a == b) | (a.isnan() & b.isnan()))
    assert not wrong.any(), f"{wrong.sum()} of {wrong.numel()} differ, first {a[wrong][:3]} instead of {b[wrong][:3]}"


# --- Quantisers

def blocks():
    """float32 [N, C]: any numbers, or multiples of half a unit beside a value that makes the unit the scale: ties."""
    shape = st.tuples(st.integers(1, 3), st.integers(1, 70))
    anything = shape.flatmap(lambda s: hnp.arrays(np.float32, s, elements=st.floats(width=32, allow_nan=False,
                                                                                    allow_infinity=False)))
    similar = shape.flatmap(lambda s: hnp.arrays(np.float32, s, elements=st.floats(-50, 50, width=32)))

    def with_ties(halves, exponent, top, sign):
        x = np.clip(halves / 2, -top, top) * 2.0 ** exponent
        x[:, -1 if sign < 0 else 0] = sign * top * 2.0 ** exponent
        return x.astype(np.float32)

    ties = st.builds(with_ties, shape.flatmap(lambda s: hnp.arrays(np.int64, s, elements=st.integers(-254, 254))),
                     st.integers(-26, 15), st.sampled_from([127, 8, 7, 4, 2, 1]), st.sampled_from([1, -1]))
    return st.one_of(anything, similar, ties)


def hard_blocks():
    """Values at and beside the boundaries of every format's codes, at many scales, and ties between extremes."""
    rng = np.random.default_rng(0)
    rows = [rng.standard_normal((3000, 70)) * 10.0 ** rng.uniform(-9, 6, (3000, 1))]
    for top in (127, 8, 7, 4, 2):
        step = np.float32(2.0) ** rng.uniform(-26, 17, (3000, 1)).astype(np.float32)
        halves = ((rng.integers(-2 * top, 2 * top, (3000, 70)) | 1) / 2).astype(np.float32) * step
        near = np.nextafter(halves, halves + rng.integers(-1, 2, halves.shape).astype(np.float32))
        near[:, ::32] = rng.choice([-top, top], (3000, 3)) * step
        near[::3, 1::32] = -near[::3, ::32]                # the same size twice: the first gives the sign of q4_0
        rows.append(near)
    rows += [np.zeros((1, 70)), np.full((1, 70), -0.0), np.full((1, 70), 1e-45), np.full((1, 70), -1e-39),
             np.full((2, 70), [[65504.0], [-65504.0]])]
    return torch.from_numpy(np.concatenate(rows).astype(np.float32))


@pytest.mark.parametrize("fmt", QUANTISED)
@QUICK
@drawn(blocks())
def test_values_are_the_reference_s(fmt, x):
    actual, expected = reads_as(x, fmt), quantised(torch.from_numpy(x), fmt)
    if fmt == "nf4":
        expected = torch.where((actual - expected).abs() <= 1e-6 * expected.abs(), actual, expected)
    same(actual, expected)


@pytest.fixture(scope="module")
def compiled():
    """{fmt: values} of hard_blocks() by one compiled graph."""
    run = torch.compile(lambda x: [dba.quantize(x, fmt) for fmt in QUANTISED])
    return {fmt: decode(*made, fmt, 70) for fmt, made in zip(QUANTISED, run(hard_blocks()))}


@pytest.mark.parametrize("how", ("eager", "compiled"))
@pytest.mark.parametrize("fmt", ("q8_0", "q4_0"))
def test_values_are_gguf_s(fmt, how, request):
    """gguf itself, without what reference.py does for the blocks that it doesn't define."""
    x, kind = hard_blocks(), gguf.GGMLQuantizationType[fmt.upper()]
    finite = (x.abs().amax(1) / TOP[fmt]).half().isfinite()
    with np.errstate(all="ignore"):
        expected = gguf.dequantize(gguf.quantize(np.pad(x[finite].numpy(), ((0, 0), (0, 26))), kind), kind)[:, :70]
    actual = reads_as(x, fmt) if how == "eager" else request.getfixturevalue("compiled")[fmt]
    assert finite.sum() > 11_000 and np.abs(expected).max() > 60_000
    same(actual[finite], torch.from_numpy(expected))


@pytest.mark.parametrize("fmt", QUANTISED)
def test_compiled_quantisers_are_the_eager_ones(fmt, compiled):
    same(compiled[fmt], reads_as(hard_blocks(), fmt))


@pytest.mark.parametrize("fmt", QUANTISED)
@QUICK
@drawn(blocks())
def test_error_is_that_of_the_nearest_level(fmt, x):
    """Of the levels times the unrounded scale; rounding the scale adds its own part."""
    read, x = reads_as(x, fmt).double().numpy(), x.astype(np.float64)
    for start in range(0, x.shape[1], 32):
        block, got = x[:, start:start + 32], read[:, start:start + 32]
        extreme = np.take_along_axis(block, np.abs(block).argmax(1)[:, None], 1)
        d = extreme / -TOP[fmt] if fmt in SIGNED else np.abs(extreme) / TOP[fmt]
        size = np.abs(d)
        good, small = size[:, 0] < 65504, size[:, 0] < 2e-8
        assert np.isfinite(got[good]).all()
        units = np.divide(block, d, out=np.zeros_like(block), where=d != 0)
        nearest = np.abs(units[..., None] - LEVELS[fmt]).min(-1)
        bound = (nearest + 1e-5) * size + TOP[fmt] * (size * 2.0 ** -11 + 2.0 ** -25)
        assert (np.abs(got - block) <= bound)[good & ~small].all()
        assert (got[small] == 0).all()


@pytest.mark.parametrize("fmt", QUANTISED)
@QUICK
@drawn(blocks())
def test_quantising_what_was_quantised_changes_nothing(fmt, x):
    once = reads_as(x, fmt)
    same(reads_as(once, fmt), once)


@pytest.mark.parametrize("C", (1, 31, 32, 33, 63, 64, 95, 97))
@pytest.mark.parametrize("fmt", QUANTISED)
def test_blocks_are_32_channels_of_one_token(fmt, C):
    x = torch.randn(3, C, generator=torch.Generator().manual_seed(C))
    codes, scales = dba.quantize(x, fmt)
    assert codes.shape == (3, -(-C * BITS[fmt] // 8)) and codes.element_size() == 1
    assert scales.shape == (3, -(-C // 32)) and scales.dtype == torch.float16
    assert codes[0].nbytes + scales[0].nbytes == dba.stream_bytes(fmt, C)
    values = decode(codes, scales, fmt, C)
    other = x.clone()
    other[1, C // 2] *= 1000                               # moves its own block of its own token, and nothing else
    moved = (reads_as(other, fmt) != values).nonzero()
    first = C // 2 // 32 * 32
    assert set(moved[:, 0].tolist()) == {1} and set(moved[:, 1].tolist()) <= set(range(first, min(C, first + 32)))
    wanted = x.abs().unfold(1, 32, 32).amax(2) / TOP[fmt] if C % 32 == 0 else None
    assert wanted is None or torch.equal(scales.abs(), wanted.half())


@pytest.mark.parametrize("bits", (2, 3, 4))
@QUICK
@drawn(C=st.integers(1, 70), seed=st.integers(0, 99))
def test_packed_codes_are_one_row_of_bits(bits, C, seed):
    """Beside Python's whole numbers; what fills up the last byte is 0."""
    codes = torch.randint(0, 2**bits, (3, C), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    packed = dba.regroup(codes[..., None], bits, 8, math.ceil(C * bits / 8))[..., 0]
    for row, expected in zip(packed, codes.tolist()):
        number = sum(code << bits * i for i, code in enumerate(expected))
        assert bytes(row.tolist()) == number.to_bytes(math.ceil(C * bits / 8), "little")
    assert torch.equal(dba.regroup(packed.T[None], 8, bits, C)[0].T, codes)


def test_the_even_channel_is_the_low_half_of_a_byte():
    codes, scales = dba.quantize(torch.tensor([[-8.0, 7, 0, 1, -3]]), "q4_0")
    assert codes.tolist() == [[0 | 15 << 4, 8 | 9 << 4, 5]] and scales.tolist() == [[1.0]]
    codes, scales = dba.quantize(torch.tensor([[-127.0, 0.5, -0.5, 1.49]]), "q8_0")
    assert codes.tolist() == [[-127, 1, -1, 1]] and scales.tolist() == [[1.0]]
    codes, scales = dba.quantize(torch.tensor([[4.0, -3, 0, -1, 1.4]]), "q3_0")  # codes 0, 7, 4, 5, 3
    assert codes.tolist() == [[0b00_111_000, 0b0_011_101_1]] and scales.tolist() == [[-1.0]]
    codes, scales = dba.quantize(torch.tensor([[-2.0, 1, 0, 5, -0.4]]) / 5, "q2_0")
    assert codes.tolist() == [[0b00_10_10_11, 0b10]] and scales.tolist() == [[-0.5]]
    codes, scales = dba.quantize(torch.tensor([[1.0, -1, 0]]), "nf4")
    assert codes.tolist() == [[15, 7]]
    assert np.abs(np.array(dba.NF4) - LEVELS["nf4"]).max() < 1e-6


@pytest.mark.parametrize("bad", (math.nan, math.inf, -math.inf, "over", "under"))
@pytest.mark.parametrize("fmt", QUANTISED)
def test_blocks_that_have_no_scale(fmt, bad):
    """The whole block is NaN; its neighbours, and the same channels of other tokens, are as ever."""
    over = 65535.0 * TOP[fmt]
    bad = {"over": over, "under": -over}.get(bad, bad)
    for at in (32, 40, 63):
        x = torch.randn(3, 70, generator=torch.Generator().manual_seed(at))
        good, x[1, at] = reads_as(x, fmt), bad
        x[1, 35] = math.inf if math.isnan(bad) else x[1, 35]
        good[1, 32:64] = math.nan
        same(reads_as(x, fmt), good)


@pytest.mark.parametrize("fmt", QUANTISED)
def test_the_edges_of_float16_s_range(fmt):
    for scale, finite in ((65504.0, True), (65519.0, True), (65521.0, False)):
        read = reads_as(torch.tensor([[scale, -scale, 0.0]]) * TOP[fmt], fmt)
        assert read.isfinite().all() if finite else read.isnan().all()
    for scale, zero in ((2.9e-8, True), (3.1e-8, False), (1e-40, True), (0.0, True)):               # 2^-25 rounds to 0
        read = reads_as(torch.tensor([[scale, -scale, 0.0]]) * TOP[fmt], fmt)
        assert torch.equal(read == 0, torch.tensor([[zero, zero, True]]))


# --- Bytes

ODD = {                                                    # streams of 33 to 75 channels, odd ones among them
    "standard":      dict(n_head=3, d_model=39, rope=False),                          # 13 per head
    "bottleneck":    dict(n_head=7, d_model=24, attn_dim=35, rope=False),             # 5
    "gqa":           dict(n_head=6, d_model=24, attn_dim=66, kv_head=3, rope=False),  # 11, 33 in all
    "decoupled":     dict(n_head=5, d_model=24, sem_dim=35, geo_dim=50, attn_dim=75),          # 7, 10, 15
    "decoupled_gqa": dict(n_head=6, d_model=24, sem_dim=66, geo_dim=60, attn_dim=42, kv_head=3),  # 11, 10, 7
    "decoupled_latent": dict(n_head=6, d_model=24, sem_dim=66, geo_dim=60, attn_dim=42, kv_head=3, kv_lora_rank=45),
    "mla":           dict(n_head=4, d_model=24, attn_dim=36, kv_lora_rank=45, rope_dim=34),
}
HETERO = dict(k_sem="q4_0", k_geo="q8_0", v="q4_0", latent="q4_0")


def channels(mode, given):
    """{stream: channels} by the table of modes."""
    H = given["n_head"]
    G, a = given.get("kv_head", H), given.get("attn_dim", given["d_model"])
    if mode == "mla":
        return dict(latent=given["kv_lora_rank"], k_rope=given["rope_dim"])
    if "sem_dim" not in given:
        return dict(k=a // H * G, v=a // H * G)
    if "kv_lora_rank" in given:
        return dict(latent=given["kv_lora_rank"], k_geo=given["geo_dim"] // H * G)
    a = given.get("attn_dim", given["sem_dim"] + given["geo_dim"])
    return dict(k_sem=given["sem_dim"] // H * G, k_geo=given["geo_dim"] // H * G, v=a // H * G)


def cost(fmt, C):
    """Bytes of C channels of a token."""
    scales = 2 * math.ceil(C / 32)
    return {"fp32": 4 * C, "bf16": 2 * C, "fp16": 2 * C}.get(fmt) or math.ceil(C * BITS[fmt] / 8) + scales


def mixes(streams, names=tuple(dba.FORMATS)):
    """One format for all streams, and every stream in a format of its own."""
    return [*({s: f for s in streams} for f in names),
            *({s: names[(i + 3 * j) % len(names)] for j, s in enumerate(streams)} for i in range(len(names)))]


@pytest.mark.parametrize("widths", (MODES, ODD), ids=("even", "odd"))
@pytest.mark.parametrize("mode", MODES)
def test_owned_bytes_are_the_predicted_ones(mode, widths):
    given = settings(mode, **widths[mode])
    cfg, streams = config(given), channels(mode, given)
    for formats, residual in itertools.product(mixes(streams), (0, 1, 128, 200, 5000)):
        for batch, length in ((1, 1), (3, 512), (2, 700)):
            N = min(residual, length)
            settled, ring = 512 * math.ceil((length - N) / 512), 128 * math.ceil(N / 128)
            in_ring = {s: "fp16" if f in QUANTISED else f for s, f in formats.items()}
            wanted = 2 * batch * sum(settled * cost(formats[s], C) + ring * cost(in_ring[s], C)
                                     for s, C in streams.items())
            cache = dba.KVCache(cfg, batch, length, formats, residual)
            owned = sum(x.untyped_storage().nbytes() for x in tensors(cache))
            assert cache.nbytes() == owned == wanted == cache_bytes(cfg, batch, length, formats, residual)
            assert cache.capacity == settled + N >= length


@pytest.mark.parametrize("mode", MODES)
def test_policies(mode):
    given = settings(mode, **ODD[mode])
    cfg, streams = config(given), channels(mode, given)
    wanted = {fmt: 2 * sum(cost(fmt, C) for C in streams.values()) for fmt in dba.FORMATS}
    hetero = 2 * sum(cost(HETERO[s], C) for s, C in streams.items()) if mode.startswith("decoupled") else None
    assert dba.kv_bytes_per_token(cfg) == {**wanted, "hetero": hetero}
    assert dba.cache_formats(cfg, "hetero") == ({s: HETERO[s] for s in streams} if hetero else None)


# --- Appending, and the window of the newest tokens

def put(cache, entries, start, stop):
    span = cache.begin(stop - start)
    for layer, streams in enumerate(entries):
        cache.append(layer, span, {name: x[:, start:stop] for name, x in streams.items()})
    cache.advance(span)


def entries_of(cfg, B, T, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [{name: torch.randn(B, T, C, generator=generator) for name, C in cfg.attention.streams.items()}
            for _ in range(cfg.layers)]


def contents(cache, layer, name, row):
    """What the tokens of a sequence read as, [T, C]: each must lie in one place."""
    by_position, stream = {}, cache.layers[layer][name]
    for part, start, stop, pos in cache.begin(0).chunks(100):
        values = stream.read(part, start, stop)[row].T
        for p, value in zip(pos[row].tolist(), values):
            if p < cache.length[row]:
                assert p not in by_position, f"token {p} lies in two places"
                by_position[p] = value
    assert sorted(by_position) == list(range(cache.length[row]))
    tokens = [by_position[p] for p in sorted(by_position)]
    return torch.stack(tokens) if tokens else torch.empty(0, stream.channels)


@pytest.mark.parametrize("residual", (0, 1, 5, 16, 100))
@pytest.mark.parametrize("mode", MODES)
def test_one_by_one_or_at_once_gives_the_same_bytes(mode, residual):
    cfg = config(settings(mode, **ODD[mode], layers=1))
    streams, entries = list(cfg.attention.streams), entries_of(cfg, 2, 24)
    for formats in mixes(streams):
        filled = []
        for schedule in ([24], [1] * 24, [7, 1, 13, 3]):
            cache, at = poisoned(cfg, 2, 24, formats, residual), 0
            for n in schedule:
                put(cache, entries, at, at := at + n)
            filled.append(torch.cat([x.contiguous().view(torch.uint8).flatten() for x in tensors(cache)]))
        assert torch.equal(filled[0], filled[1]) and torch.equal(filled[0], filled[2])


@pytest.mark.parametrize("residual", (0, 1, 3, 8, 13, 60))
@pytest.mark.parametrize("fmt", (*QUANTISED, "fp32", "bf16"))
def test_a_cache_is_a_list(fmt, residual):
    """Random appends and truncations of three sequences, against lists of tokens and of how many have settled."""
    rng, cfg = random.Random(residual), config(settings("decoupled", **ODD["decoupled"], layers=1))
    formats = dict(k_sem=fmt, k_geo="q8_0", v=fmt)
    appended = []

    def spy(stream, rows, pos, x):
        appended.extend((id(stream), row, p) for row, p in zip(rows.tolist(), pos.tolist()))
        dba.append(stream, rows, pos, x)

    kernel = dba.Kernel("counting", dba.decode_attention, spy)
    cache = poisoned(cfg, 3, 60, formats, residual, "cpu", kernel)
    held, settled = [{s: torch.empty(0, C) for s, C in cfg.attention.streams.items()} for _ in range(3)], [0] * 3
    for turn in range(30):
        T = rng.choice([0, 1, 1, 2, 9, 25])
        if max(len(h["v"]) for h in held) + T > 60 or turn % 7 == 6:
            keep = [rng.randrange(61) for _ in range(3)] if turn % 2 else [max(0, len(held[0]["v"]) - 2)] * 3
            cache.truncate(torch.tensor(keep) if turn % 2 else keep[0])
            held = [{s: x[:n] for s, x in h.items()} for h, n in zip(held, keep)]
            settled = [min(n, len(h["v"])) for n, h in zip(settled, held)]
        else:
            new = entries_of(cfg, 3, T, seed=turn)
            put(cache, new, 0, T)
            held = [{s: torch.cat([x, new[0][s][row]]) for s, x in h.items()} for row, h in enumerate(held)]
            wanted = {(id(stream), row, p) for stream in cache.layers[0].values() for row, h in enumerate(held)
                      for p in range(settled[row], len(h["v"]) - residual)}
            assert len(appended) == len(wanted) and set(appended) == wanted, "each token settles once, and in time"
            settled = [max(n, len(h["v"]) - residual) for n, h in zip(settled, held)]
        appended.clear()
        for row, name in itertools.product(range(3), formats):
            x = held[row][name]
            new = reference.ring(x, formats[name]) if residual else x
            old = quantised(new, formats[name])
            expected = torch.where((torch.arange(len(x)) < settled[row])[:, None], old, new)
            close(torch.cat([contents(cache, 0, name, row), torch.ones(1, x.size(1))]),
                  torch.cat([expected, torch.ones(1, x.size(1))]), 1e-6, f"turn {turn}, row {row}, {name}")


@pytest.mark.parametrize("residual", (0, 5, 128))
def test_going_past_the_capacity_is_an_error(residual):
    cfg = config(settings("decoupled"))
    cache = dba.KVCache(cfg, 2, 512 + residual, "hetero", residual)
    entries, room = entries_of(cfg, 2, 520 + residual), 512 + residual
    put(cache, entries, 0, room - 1)
    before = [x.clone() for x in tensors(cache)]
    cache.truncate(torch.tensor([9999, 100]))              # one sequence is short, the other still has no room
    with pytest.raises(ValueError, match=f"{room} tokens"):
        put(cache, entries, room - 1, room + 1)
    assert cache.length.tolist() == [room - 1, 100]
    assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(before, tensors(cache)))
    put(cache, entries, room - 1, room)
    assert cache.length.tolist() == [room, 101]
    with pytest.raises(ValueError):
        put(cache, entries, room, room + 1)
    cache.truncate(0)
    put(cache, entries, 0, room)


# --- Cached against the reference

@pytest.mark.parametrize("fmt", (*QUANTISED, "mixed"))
@pytest.mark.parametrize("mode, null, tie", null_and_tie())
def test_cached_logits_are_the_reference_s_of_quantised_keys_and_values(mode, null, tie, fmt):
    given = settings(mode, null_attn=null, tie_qk=tie, learned_temp=True)
    model, names = model_of(given), list(config(given).attention.streams)
    formats = dict(zip(names, ("q4_0", "q8_0", "nf4"))) if fmt == "mixed" else dict.fromkeys(names, fmt)
    idx = tokens(2, 19)
    for schedule in ([19], [6, 1, 1, 8, 3]):
        actual, expected = cached_and_expected(model, given, idx, schedule, formats)
        close(actual, expected, EXACT)
    assert (actual - model(idx)).abs().max() > 1e-3, "nothing was rounded"


@pytest.mark.parametrize("residual", (0, 1, 6, 40))
@pytest.mark.parametrize("fmt", (*QUANTISED, "mixed"))
@pytest.mark.parametrize("mode", MODES)
def test_cached_logits_with_odd_widths_and_a_window(mode, fmt, residual):
    given = settings(mode, **ODD[mode], null_attn=True)
    model, names = model_of(given), list(config(given).attention.streams)
    formats = dict(zip(names, ("bf16", "q4_sym", "q4_0"))) if fmt == "mixed" else dict.fromkeys(names, fmt)
    schedule = [4, 1, 1, 9, 1, 5]
    close(*cached_and_expected(model, given, tokens(2, 21), schedule, formats, residual), EXACT)


@pytest.mark.parametrize("null, residual", ((False, 6), (True, 0)))
@pytest.mark.parametrize("mode", MODES)
def test_a_long_prompt_by_the_fused_kernel(mode, null, residual):
    """Passes with enough tokens for it, at the start and in the middle, beside the float64 reference."""
    given = settings(mode, **ODD[mode], null_attn=null, block=256)
    model, names = model_of(given), list(config(given).attention.streams)
    formats = dict(zip(names, ("q4_0", "q8_0", "nf4")))
    with reference.Recorder() as ran:
        actual, expected = cached_and_expected(model, given, tokens(1, 131), [66, 1, 64], formats, residual)
    close(actual, expected, EXACT)
    fused = [name for name in ran.names if "_scaled_dot_product_flash_attention_for_cpu" in name]
    assert len(fused) >= 2 * 2, "it had no part in it"     # passes x layers


@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_rows_of_different_length_with_a_window(mode):
    """Rows cut short and gone on with, each as alone: what lies beyond a row's end is read by no one."""
    given = settings(mode, **ODD[mode], null_attn=True)
    model, lengths = model_of(given), (2, 11, 19)
    formats = dict(zip(config(given).attention.streams, ("q4_0", "q8_0", "q4_0")))
    idx, more = tokens(3, 19), tokens(3, 9, seed=1)
    for residual in (0, 8):
        cache = poisoned(model.cfg, 3, 40, formats, residual)
        for chunk in idx.split([1] * 19, 1):
            model(chunk, cache=cache)
        cache.truncate(torch.tensor(lengths))
        poison_free_slots(cache)
        actual = torch.cat([model(chunk, cache=cache) for chunk in more.split([1, 4, 1, 3], 1)], 1)
        for row, n in enumerate(lengths):
            cache = poisoned(model.cfg, 1, 40, formats, residual)
            for chunk in idx[row:row + 1].split([1] * 19, 1):
                model(chunk, cache=cache)
            cache.truncate(n)
            alone = torch.cat([model(chunk, cache=cache) for chunk in more[row:row + 1].split([1, 4, 1, 3], 1)], 1)
            close(actual[row], alone[0], EXACT, f"row {row}")


@pytest.mark.parametrize("fmt, residual", [*((fmt, 5) for fmt in dba.FORMATS), *(("mixed", N) for N in (0, 1, 5, 32))])
@pytest.mark.parametrize("mode", MODES)
def test_passes_of_any_length_read_what_decoding_reads(mode, fmt, residual, monkeypatch):
    """A token is a float to the newest N queries and settled to all later ones, also where they come in one pass."""
    model = model_of(settings(mode, null_attn=mode.startswith("decoupled") or mode == "mla"))
    names = list(model.cfg.attention.streams)
    formats = dict(zip(names, ("q4_0", "q8_0", "nf4"))) if fmt == "mixed" else dict.fromkeys(names, fmt)
    idx = tokens(2, 40)
    put = {}                                               # (layer, stream): [B, 40, C]
    append = dba.KVCache.append

    def record(self, layer, span, entries):
        for name, x in entries.items():
            put[layer, name] = torch.cat([*([put[layer, name]] if (layer, name) in put else []), x], 1)
        return append(self, layer, span, entries)

    def replay(self, layer, span, entries):
        """Projections of other batch sizes differ by an ulp, which can move a value to the next code: the recorded
        entries in their place give the same codes."""
        recorded = {name: put[layer, name][:, span.pos[0]] for name in entries}
        for name, x in entries.items():
            close(x, recorded[name], 1e-5, f"{schedule}, layer {layer}, {name}")
        return append(self, layer, span, recorded)

    monkeypatch.setattr(dba.KVCache, "append", record)
    one_by_one = cached_logits(model, idx, [1] * 40, formats, residual)
    monkeypatch.setattr(dba.KVCache, "append", replay)
    for schedule in ([40], [3, 1, 9, 27]):
        close(cached_logits(model, idx, schedule, formats, residual), one_by_one, 1e-5, f"{schedule}")


@pytest.mark.parametrize("mode", ("decoupled_gqa", "mla"))
def test_a_long_window_reads_what_decoding_reads(mode, monkeypatch):
    """N = 200, over slots that are read in several chunks."""
    monkeypatch.setattr(dba, "CACHE_BLOCK", 64)
    monkeypatch.setattr(dba, "DECODE_CHUNK", 1)
    model, idx = model_of(settings(mode, null_attn=True)), tokens(1, 330)
    one_by_one = cached_logits(model, idx, [1] * 330, "q4_0", 200)
    close(cached_logits(model, idx, [150, 180], "q4_0", 200), one_by_one, EXACT)
    assert (cached_logits(model, idx, [330], "q4_0", 0) - one_by_one).abs().max() > 1e-2


@torch.no_grad()
def test_a_longer_window_is_nearer_to_float_s():
    model, idx = model_of(settings("decoupled", null_attn=True)), tokens(2, 48)
    exact = model(idx)
    errors = [(cached_logits(model, idx, [1] * 48, "q4_0", residual) - exact).square().mean() for residual in
              (0, 16, 32, 48)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < errors[0] / 100


# --- Rotation

def test_hadamard_matrices():
    made = {n: rotate.hadamard(n) for n in range(1, 200)} | {512: rotate.hadamard(512)}
    for n, matrix in made.items():
        if matrix is not None:
            assert torch.equal(matrix.abs(), torch.ones(n, n)) and torch.equal(matrix @ matrix.T, n * torch.eye(n)), n
    assert all(made[n] is not None for n in (1, 2, 4, 8, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 128, 160, 192, 512))
    assert all(made[n] is None for n in (3, 5, 6, 7, 9, 10, 11, 14, 15, 17, 18, 22, 33, 50, 66, 127))


def test_rotations_are_orthogonal_and_spread_every_channel():
    for n in range(1, 131):
        matrix = rotate.rotation(n).double()
        assert (matrix @ matrix.T - torch.eye(n)).abs().max() < 1e-5, n
        largest = 1 / math.sqrt(n) if rotate.hadamard(n) is not None else math.sqrt(2 / n)
        assert matrix.abs().max() < largest + 1e-6, n


def rotations():
    """mode x null x tie x RoPE, each with even and odd widths."""
    for (mode, null, tie), rope, odd in itertools.product(null_and_tie(), (True, False), (False, True)):
        if not odd or not rope or mode.startswith("decoupled") or mode == "mla":
            yield pytest.param(settings(mode, **{**(ODD if odd else MODES)[mode], "rope": rope}, null_attn=null,
                                        tie_qk=tie, learned_temp=True),
                               id=f"{mode}{'-null' * null}{'-tied' * tie}{'-norope' * (not rope)}{'-odd' * odd}")


def streams_of(model, idx):
    """[{stream: [B, T, C]}] of the layers, as they are put into a cache."""
    cache = poisoned(model.cfg, len(idx), idx.size(1), "fp32")
    model(idx, cache=cache)
    return [{name: stream.codes[..., :idx.size(1)].mT.clone() for name, stream in layer.items()}
            for layer in cache.layers]


@pytest.mark.parametrize("given", list(rotations()))
@torch.no_grad()
def test_rotation_changes_what_is_cached_and_no_logit(given):
    model, idx = model_of(given), tokens(2, 17)
    gains = [block.attn.latent[1].weight.clone() for block in model.blocks if given["attn_mode"] == "mla"]
    uncached, cached, before = model(idx), cached_logits(model, idx, [5] * 3 + [1, 1]), streams_of(model, idx)
    rotate.rotate_cache(model)
    after = streams_of(model, idx)
    close(model(idx), uncached, EXACT, "without a cache")
    close(cached_logits(model, idx, [5] * 3 + [1, 1]), cached, EXACT, "with a cache")
    groups = {path.stream: path.groups for path in model.cfg.attention.paths} | {"latent": 1}
    for layer, (old, new) in enumerate(zip(before, after)):
        for name in old:
            a, b = (x[name].unflatten(-1, (groups.get(name, given.get("kv_head", given["n_head"])), -1))
                    for x in (old, new))                   # [B, T, G, w]
            a = a / gains[layer] if name == "latent" and gains else a
            close(b, a @ rotate.rotation(a.size(-1)).T, EXACT, name)
            assert (b - a).abs().max() > 0.1, f"{name} is not rotated"


@pytest.mark.parametrize("fmt", ("q4_0", "q4_sym", "nf4", "q3_0"))
@pytest.mark.parametrize("mode, widths", {
    "standard": dict(d_model=96, n_head=3), "bottleneck": dict(attn_dim=128), "gqa": dict(attn_dim=192),
    "decoupled": dict(sem_dim=128, geo_dim=32), "mla": dict(kv_lora_rank=96)}.items())
@torch.no_grad()
def test_rotation_lowers_the_error_of_an_outlier_channel(mode, widths, fmt):
    """A channel of every key and value head, or of the latent, is 10 times as large, and what it meets a tenth."""
    given = settings(mode, **widths, layers=1)
    model, idx = model_of(given), tokens(4, 30)
    attn = model.blocks[0].attn
    if mode == "mla":
        attn.latent[1].weight[3] *= 10
        for linear in (attn.k["sem"], attn.v):
            linear.weight[:, 3] /= 10
    else:
        for path in (path for path in attn.shape.paths if not path.rotate):
            attn.k[path.name].weight.unflatten(0, (path.groups, -1))[:, 1] *= 10
            attn.q[path.name].weight.unflatten(0, (attn.n_head, -1))[:, 1] /= 10
        attn.v.weight.unflatten(0, (attn.shape.v_groups, -1))[:, 1] *= 10
        attn.o.weight.unflatten(1, (attn.n_head, -1))[:, :, 1] /= 10
    formats = {name: fmt if name in ("k_sem", "v", "latent") else "fp32" for name in attn.shape.streams}
    exact, error = model(idx), []
    for _ in range(2):
        error.append((cached_logits(model, idx, [30], formats) - exact).square().mean().sqrt())
        rotate.rotate_cache(model)
    assert error[0] > 1.25 * error[1], error


@torch.no_grad()
def test_a_rotated_cache_is_the_reference_s_of_the_rotated_model():
    for mode in MODES:
        given = settings(mode, **ODD[mode], null_attn=True)
        model = model_of(given)
        rotate.rotate_cache(model)
        given["turn"] = lambda n: rotate.rotation(n).double().T
        for formats in (dict.fromkeys(model.cfg.attention.streams, "q4_0"),
                        dict(zip(model.cfg.attention.streams, ("q4_0", "q2_0", "q3_0")))):
            close(*cached_and_expected(model, given, tokens(2, 15), [8] + [1] * 7, formats, 4), EXACT, mode)


@torch.no_grad()
def test_a_gain_of_zero_under_a_null_token_is_refused_before_anything_changes():
    model = model_of(settings("mla", null_attn=True))
    model.blocks[1].attn.latent[1].weight[3] = 0
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match="gain of 0"):
        rotate.rotate_cache(model)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    with pytest.raises(dba.UserError, match="^--kv-rotate: .*gain of 0"):
        dba.rotate_cache(model)
