"""kernels/decode.metal against a float64 reference: on an Apple GPU where there is one, else compiled as C++ by
tests/metal_shim and run on the CPU. Everything but launch() is the code that runs on a Mac."""

import ctypes
import math
import os
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import kernels
import train_dba as dba
from kernels import metal_decode
from reference import close, config, randomize, settings

SHIM = Path(__file__).with_name("metal_shim")
EXACT = 1e-5
MIXED = {"k_sem": "nf4", "k_geo": "fp16", "v": "q4_sym"}


@pytest.fixture(scope="session")
def shim(tmp_path_factory):
    """decode.metal as a library of C++."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        pytest.skip(f"no C++ compiler ({compiler}) to run decode.metal on a CPU with")
    path = tmp_path_factory.mktemp("metal") / "decode.so"
    subprocess.run([compiler, "-std=c++17", "-O2", "-fsigned-char", "-Wno-attributes", "-shared", "-fPIC", f"-I{SHIM}",
                    SHIM / "launch.cpp", "-o", path], check=True)
    return ctypes.CDLL(path)


@pytest.fixture
def device(request, monkeypatch):
    """Where the kernels run; off a Mac, by a launch() that hands the same arguments to the C++ functions."""
    if torch.backends.mps.is_available():
        return "mps"
    library = request.getfixturevalue("shim")

    def launch(kernel, tensors, sizes, threads):
        assert all(tensor.is_contiguous() and tensor.numel() for tensor in tensors)               # as Metal takes them
        sizes = (ctypes.c_int32 * len(sizes))(*sizes)
        buffers = [tensor.data_ptr() for tensor in tensors] + [ctypes.addressof(sizes)]
        function = getattr(library, f"launch_{kernel}")
        function.restype = ctypes.c_char_p
        wrong = function((ctypes.c_void_p * len(buffers))(*buffers), len(buffers), threads)
        assert wrong is None, wrong

    monkeypatch.setattr(metal_decode, "launch", launch)
    return "cpu"


def decoupled(sem, geo, v, H=4, G=None):
    """AttentionShape of these widths per head, and H."""
    G = G or H
    paths = (dba.ScorePath("sem", sem, G, 1.0, False, False, "k_sem"),
             dba.ScorePath("geo", geo, G, 1.0, False, False, "k_geo"))
    return dba.AttentionShape(paths, v, G, "v", 0), H


def single(k, v, H, G):
    return dba.AttentionShape((dba.ScorePath("geo", k, G, 1.0, False, False, "k"),), v, G, "v", 0), H


def mla(latent, rope, H):
    paths = (dba.ScorePath("sem", 4, H, 1.0, False, False, "latent"),
             dba.ScorePath("geo", rope, 1, 1.0, False, False, "k_rope"))
    return dba.AttentionShape(paths, 4, H, "latent", latent), H


def fill(shape, policy, lengths, T, residual, device, longest=None):
    """(KVCache, Span of its last T tokens); lengths [B] count these. All sequences grow to `longest` first and are then
    truncated. Slots without a token hold NaN, or codes with a NaN scale."""
    generator, B, longest = torch.Generator().manual_seed(sum(lengths)), len(lengths), longest or max(lengths) - T
    cfg = SimpleNamespace(attention=shape, layers=1)
    cache = dba.KVCache(cfg, B, max(longest + T, *lengths), policy, residual, device)
    for n in (longest, T):
        span = cache.begin(n)
        cache.append(0, span, {name: torch.randn(B, n, C, generator=generator).to(device)
                               for name, C in shape.streams.items()})
        cache.advance(span)
        if n is longest:
            cache.truncate(torch.tensor(lengths) - T)
    for stream in cache.layers[0].values():
        for b, (held, length) in enumerate(zip(span.settled.tolist(), lengths)):
            stored = stream.codes if stream.scales is None else stream.scales
            stored[b, :, held:] = math.nan
            vacant = set(range(stream.ring.size(2))) - {p % span.window for p in range(held, length)}
            stream.ring[b, :, sorted(vacant)] = math.nan
    return cache, span


def dequantised(stream):
    """Settled values [B, C, slots] in float64, by the definition of the formats."""
    codes, channels = stream.codes.cpu(), []
    for c in range(stream.channels):
        if stream.fmt in dba.FLOAT_FORMATS:
            channels.append(codes[:, c].double())
            continue
        if stream.fmt == "q8_0":
            x = codes[:, c].double()
        else:
            nibble = (codes[:, c // 2].long() // (16 if c % 2 else 1)) % 16
            x = torch.tensor(dba.NF4, dtype=torch.float64)[nibble] if stream.fmt == "nf4" else nibble.double() - 8
        channels.append(x * stream.scales[:, c // 32].cpu().double())
    return torch.stack(channels, 1)


def expected(q, streams, shape, span, null):
    """Dense attention in float64, one query at a time. Returns it with the deviation of the scores."""
    q, settled = q.cpu().double(), {name: dequantised(stream) for name, stream in streams.items()}
    B, H, T, _ = q.shape
    G, out, seen = 1 if shape.latent else shape.v_groups, [], []
    for b in range(B):
        held = int(span.settled[b])
        for h in range(H):
            g = h // (H // G)
            for t in range(T):
                ring = [p % span.window for p in range(held, int(span.pos[b, t]) + 1)]
                tokens = {}
                for name, stream in streams.items():
                    x = torch.cat([settled[name][b, :, :int(span.pos[b, t]) + 1][:, :held],
                                   stream.ring[b].cpu().double()[:, ring]], 1)
                    w = stream.channels // G
                    tokens[name] = x[g * w:(g + 1) * w]                         # [w, tokens]
                keys = torch.cat([tokens[path.stream] for path in shape.paths])
                scores, values = q[b, h, t] @ keys, tokens[shape.v_stream]
                seen.append(scores)
                if null is not None:
                    scores = torch.cat([null[0][b, h, t].cpu().double()[None], scores])
                    values = torch.cat([null[1][g].cpu().double()[:, None], values], 1)
                out.append(values @ scores.softmax(0))
    return torch.stack(out).view(B, H, T, -1), torch.cat(seen).std()


def check(shape_and_heads, policy, lengths, T, residual, null, device, longest=None):
    shape, H = shape_and_heads
    cache, span = fill(shape, policy, lengths, T, residual, device, longest)
    streams, B = cache.layers[0], len(lengths)
    G = 1 if shape.latent else shape.v_groups
    generator = torch.Generator().manual_seed(1)
    w = sum(streams[path.stream].channels // G for path in shape.paths)
    q = torch.randn(B, H, T, w, generator=generator).to(device) * 1.5 / w ** 0.5
    if null:
        null = (torch.randn(B, H, T, generator=generator).to(device),
                torch.randn(G, streams[shape.v_stream].channels // G, generator=generator).to(device))
    reference, deviation = expected(q, streams, shape, span, null or None)
    assert max(lengths) < 30 or 0.8 < deviation < 3, f"scores of order {deviation:.2f} make this a weak test"
    out = metal_decode.attention(q, streams, shape, span, null or None)
    assert out.dtype == torch.float32
    close(out.cpu(), reference, EXACT)


@pytest.mark.parametrize("residual", [0, 32])
@pytest.mark.parametrize("policy", [*metal_decode.FORMATS, "hetero", MIXED], ids=str)
def test_every_format(policy, residual, device):
    check(decoupled(4, 8, 12), policy, [300, 65], 1, residual, True, device)
    check(decoupled(3, 7, 5, H=3), policy, [70], 2, residual, False, device)    # heads share bytes; 9, 21, 15 channels


@pytest.mark.parametrize("T", [1, 2])
@pytest.mark.parametrize("residual", [0, 32])
@pytest.mark.parametrize("length", [1, 31, 33, 255, 700])
def test_lengths(length, residual, T, device):
    for null in (False, True):
        check(decoupled(4, 8, 12, H=2), "hetero", [max(length, T)], T, residual, null, device)


@pytest.mark.parametrize("null", [False, True])
@pytest.mark.parametrize("policy", ["fp16", "q8_0", "q4_0", "nf4"])
@pytest.mark.parametrize("shape", [decoupled(8, 32, 40), decoupled(5, 33, 31, H=5), decoupled(4, 8, 12, H=6, G=2),
                                   single(12, 12, 8, 8), single(7, 3, 6, 2), mla(40, 6, 4), mla(33, 5, 3)],
                         ids=["8/32/40", "5/33/31", "grouped", "one path", "gqa", "mla", "odd mla"])
def test_widths_and_groups(shape, policy, null, device):
    check(shape, policy, [290, 61], 2, 32, null, device)


@pytest.mark.parametrize("residual", [0, 32, 100])
def test_ragged_and_truncated(residual, device):
    """Shrunk sequences: one to a single token, one within the ring, one below the settled tokens of the others."""
    check(decoupled(4, 8, 12), "hetero", [3, 590, 255, 571], 2, residual, True, device, longest=600)
    check(decoupled(4, 8, 12), "q4_0", [1, 700], 1, residual, False, device, longest=699)


@pytest.mark.parametrize("null", [None, -300.0, 300.0])
def test_extreme_scores(null, device):
    """Scores of hundreds, of either sign: whatever is subtracted before exp() must be the largest of all, and splits in
    which the first sequence has no token weigh nothing."""
    shape, H = decoupled(4, 8, 12)
    cache, span = fill(shape, "hetero", [1, 700], 1, 0, device)
    null = null and (torch.full((2, H, 1), null, device=device), torch.ones(H, 12, device=device))
    for each in (100.0, -100.0):
        q = torch.full((2, H, 1, 12), each, device=device)
        reference, _ = expected(q, cache.layers[0], shape, span, null)
        close(metal_decode.attention(q, cache.layers[0], shape, span, null).cpu(), reference, 1e-3)


@pytest.mark.parametrize("name", ["k_sem", "v"])
def test_a_visible_nan_shows(name, device):
    """As in torch: a token that reads as NaN makes its heads NaN, and no others."""
    shape, H = decoupled(16, 8, 16)                        # two heads a block
    cache, span = fill(shape, "q4_0", [40], 1, 0, device)
    cache.layers[0][name].scales[0, 1, 7] = math.nan
    out = metal_decode.attention(torch.ones(1, H, 1, 24, device=device), cache.layers[0], shape, span)
    assert out[0, :2].isfinite().all() and out[0, 2:].isnan().all()


@pytest.mark.parametrize("mode", ["decoupled_gqa", "decoupled_latent", "mla"])
def test_in_a_model(mode, device, monkeypatch):
    """Logits of a prompt and of tokens decoded one by one are those of torch's path over the same cache."""
    monkeypatch.setitem(metal_decode.KERNEL, "attention", attention := Counted(metal_decode.attention))
    cfg = config(settings(mode, null_attn=True))
    model = randomize(dba.GPT(cfg, 50)).to(device).eval()
    idx = torch.randint(50, (2, 60), generator=torch.Generator().manual_seed(0)).to(device)
    logits = []
    for kernel in (dba.Kernel(**metal_decode.KERNEL), dba.TORCH):
        cache = dba.KVCache(cfg, 2, 60, "q8_0", 16, device, kernel)
        with torch.no_grad():
            logits.append(torch.cat([model(part, cache=cache) for part in idx.split([50, *[1] * 10], 1)], 1))
    assert attention.calls == 10 * cfg.layers              # the prompt is left to torch
    close(logits[0], logits[1], 1e-4)


class Counted:
    def __init__(self, function):
        self.function, self.calls = function, 0

    def __call__(self, *args):
        self.calls += 1
        return self.function(*args)


@pytest.mark.parametrize("wrong", (0.0, 0.01))
def test_the_comparison_before_use(wrong, device):
    """What resolve_kernel() does on a Mac."""
    def attention(*args):
        return metal_decode.attention(*args) + wrong

    few = dba.Kernel(**{**metal_decode.KERNEL, "attention": attention})
    caches = [dba.KVCache(dba.KERNEL_TEST, 2, 640, "hetero", 32, device, kernel) for kernel in (few, dba.TORCH)]
    error = kernels.difference(*caches, dba.KERNEL_TEST.n_head)
    assert error < 1e-5 if wrong == 0 else error > kernels.TOLERANCE


def test_source_is_what_torch_takes():
    """Formats in the order of metal_decode.py, the constants that it looks for, no header but the shim's."""
    order = re.search(r"enum : uint \{(.*?)\}", metal_decode.SOURCE)[1]
    assert order.lower().replace(" ", "").split(",") == list(metal_decode.FORMATS)
    assert (metal_decode.SIMD, metal_decode.SPLIT % metal_decode.SIMD) == (32, 0)
    assert re.findall("#include.*", metal_decode.SOURCE) == ["#include <metal_stdlib>"]


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="there is an Apple GPU")
def test_without_an_apple_gpu():
    with pytest.raises(ValueError, match="needs an Apple GPU, not cpu"):
        kernels.choose("metal", torch.device("cpu"))
    with pytest.raises(metal_decode.FAILURES, match="MPS is not available"):
        metal_decode.library()
