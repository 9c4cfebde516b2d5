"""Back-ends of the KV cache: which one is chosen, and the CPU's against torch and a float64 reference."""

import itertools
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

import kernels
import train_dba as dba
from helpers import TRAIN, TRAINER, assert_done, assert_error, call, cli, make_text
from kernels import cpu_decode
from reference import (
    MODES,
    QUANTISED,
    cached_and_expected,
    close,
    config,
    hard_tokens,
    model_of,
    poison_free_slots,
    poisoned,
    quantised,
    settings,
    tokens,
)
from test_cache import EXACT, ODD, entries_of, hard_blocks, mixes, put

CPU = torch.device("cpu")
CODES = [fmt for fmt in QUANTISED if fmt in cpu_decode.FORMATS]


# --- Which kernel

def resolve(name, device=CPU):
    return dba.resolve_kernel(name, device)


def test_auto_on_a_cpu():
    kernel, why = resolve("auto")
    assert kernel == dba.Kernel(**cpu_decode.KERNEL) and "agrees" in why


def test_formats_that_a_kernel_does_not_read(trained):
    """auto goes to torch and says why; a kernel asked for by name is refused."""
    kernel, why = dba.resolve_kernel("auto", CPU, ["q8_0", "q3_0", "q3_0"])
    assert kernel is dba.TORCH and why == "C++ doesn't read q3_0"
    assert dba.resolve_kernel("torch", CPU, ["q2_0"])[0] is dba.TORCH
    assert dba.resolve_kernel("auto", CPU, ["q8_0", "nf4"])[0].name == "C++"
    sample = "--mode sample --ckpt run/last.pt --device cpu --kv-cache q4_0 --kv-cache-v q2_0 --max-new-tokens 2"
    result = call(sample, trained)
    assert_done(result)
    assert "kernel torch (C++ doesn't read q2_0)" in result.stderr and "warning" not in result.stderr
    with mock.patch("kernels.choose", lambda name, device: (cpu_decode, "")), pytest.raises(
            dba.UserError, match="^--kernel triton doesn't read q2_0; use --kernel torch$"):
        dba.resolve_kernel("triton", CPU, ["q4_0", "q2_0"])


def test_torch_asked_for_is_torch():
    assert resolve("torch") == (dba.TORCH, "asked for")


def test_without_a_compiler_auto_is_torch(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    kernel, why = resolve("auto")
    assert kernel is dba.TORCH and "compiler" in why


@pytest.mark.parametrize("name, word", {"triton": "CUDA", "metal": "Apple"}.items())
def test_a_named_kernel_that_this_device_has_not(name, word, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for device in ("cpu", "cuda" if name == "metal" else "mps"):
        with pytest.raises(dba.UserError, match=f"^--kernel {name}: .*{device}") as e:
            resolve(name, device=torch.device(device))
        assert "\n" not in str(e.value)
    with pytest.raises(dba.UserError, match=word):
        resolve(name)


def test_devices_without_a_kernel_use_torch():
    kernel, why = resolve("auto", torch.device("xpu"))
    assert kernel is dba.TORCH and "xpu" in why


def test_triton_missing(monkeypatch):
    find = kernels.importlib.util.find_spec
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: None if name == "triton" else find(name))
    kernel, why = resolve("auto", device=torch.device("cuda"))
    assert kernel is dba.TORCH and "triton" in why
    with pytest.raises(dba.UserError, match="--kernel triton: triton is missing"):
        resolve("triton", device=torch.device("cuda"))


@pytest.mark.parametrize("gone", ("kernels", "kernels.triton_decode", "kernels.metal_decode"))
def test_kernels_that_are_missing(gone, monkeypatch):
    """The trainer may be copied without them: auto does without, a named one is an error in one line."""
    monkeypatch.setitem(sys.modules, gone, None)           # importing it raises ModuleNotFoundError
    if gone != "kernels":
        monkeypatch.delattr(kernels, gone.split(".")[1], raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    device, name = {"kernels": ("cpu", "triton"), "kernels.triton_decode": ("cuda", "triton"),
                    "kernels.metal_decode": ("mps", "metal")}[gone]
    with pytest.raises(dba.UserError, match=f"^--kernel {name}: .*{gone}") as e:
        resolve(name, device=torch.device(device))
    assert "\n" not in str(e.value)
    kernel, why = resolve("auto", torch.device(device))
    assert kernel is dba.TORCH and "kernels" in why


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    make_text(folder)
    assert_done(call(f"{TRAIN} --steps 1 --out-dir run", folder))
    return folder


def test_the_trainer_alone_samples(trained, tmp_path):
    shutil.copy(TRAINER, tmp_path)
    shutil.copy(trained / "run/last.pt", tmp_path)
    sample, script = "--mode sample --ckpt last.pt --max-new-tokens 3 --device cpu", ["train_dba.py"]
    result = cli(sample, tmp_path, program=script)
    assert_done(result)
    assert "kernel torch" in result.stderr and "no module kernels beside train_dba.py" in result.stderr
    assert_error(cli(f"{sample} --kernel triton", tmp_path, program=script), "--kernel triton", "kernels")


@pytest.mark.parametrize("name", ("triton", "metal"))
def test_named_kernels_on_a_cpu(trained, name, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    sample = "--mode sample --ckpt run/last.pt --device cpu"
    assert_error(call(f"{sample} --kernel {name}", trained), f"--kernel {name}", "cpu")


# --- What every kernel must show before it is trusted

def wrong_attention(*args):
    return cpu_decode.attention(*args) + 0.01


def nan_attention(*args):
    return cpu_decode.attention(*args) * torch.nan


def wrong_append(stream, rows, pos, x):
    """Neighbouring channels change places."""
    cpu_decode.append(stream, rows, pos, x.roll(1, 1))


def fails(*args):
    raise RuntimeError("no such instruction\nand more")


WRONG = {"differs from torch by 1": dict(attention=wrong_attention),
         "differs from torch by inf": dict(attention=nan_attention),
         "differs from torch": dict(append=wrong_append), "fails here (no such instruction)": dict(attention=fails)}


@pytest.mark.parametrize("said", WRONG)
def test_a_kernel_that_differs_or_fails_is_not_trusted(said, monkeypatch, capsys):
    """auto goes on with torch and says why; a named one, whatever device it is for, is an error."""
    module = SimpleNamespace(KERNEL={**cpu_decode.KERNEL, **WRONG[said]}, FAILURES=cpu_decode.FAILURES)
    monkeypatch.setattr(kernels, "choose", lambda name, device: (module, "made up"))
    kernel, why = resolve("auto")
    assert kernel is dba.TORCH and said in why
    printed = capsys.readouterr().err
    assert printed.startswith("warning: no kernel C++: it ") and said in printed and printed.count("\n") == 1
    with pytest.raises(dba.UserError, match="^--kernel triton: it .*; use --kernel torch$"):
        resolve("triton")


def test_the_small_cache_has_every_part():
    """Else the comparison would pass over it: a ring that wraps, heads that straddle blocks, two lengths."""
    seen = []

    def spy(q, streams, shape, span, null):
        seen.append((q, streams, span, null))
        return dba.decode_attention(q, streams, shape, span, null)

    caches = [dba.KVCache(dba.KERNEL_TEST, 2, 640, "hetero", 32, "cpu", dba.Kernel("spy", spy)) for _ in range(2)]
    assert kernels.difference(*caches, dba.KERNEL_TEST.n_head) == 0
    assert [q.size(2) for q, *_ in seen] == [2, 2, 1, 1]
    q, streams, span, null = seen[0]
    assert {stream.fmt for stream in streams.values()} == {"q4_0", "q8_0"} and null is not None
    assert span.window == 32 and span.pos.tolist() == [[600, 601], [301, 302]] and span.settled.tolist() == [570, 301]
    assert q.size(2) * q.size(1) // dba.KERNEL_TEST.kv_head <= 8, "too many queries for a kernel"
    assert seen[-1][2].pos.tolist() == [[602], [303]]


def test_kernels_import_nothing_of_the_trainer():
    """It would be loaded a second time beside __main__, with classes of its own."""
    for path in Path(kernels.__file__).parent.glob("*.py"):
        assert not re.search(r"^\s*(from|import) train_dba", path.read_text(), re.M), path


# --- The C++ kernel

@pytest.mark.skipif(cpu_decode.missing() is not None, reason="no C++ compiler")
class TestLibrary:
    """decode.cpp as a file that later processes load."""

    def test_is_built_once(self, tmp_path):
        cpu_decode.library.__wrapped__(tmp_path)
        built, = tmp_path.iterdir()
        before = built.stat().st_mtime_ns
        cpu_decode.library.__wrapped__(tmp_path)
        assert [path.stat().st_mtime_ns for path in tmp_path.iterdir()] == [before]

    def test_another_source_or_command_is_another_file(self, tmp_path, monkeypatch):
        cpu_decode.library.__wrapped__(tmp_path)
        source = tmp_path / "decode.cpp"
        source.write_text(cpu_decode.SOURCE.read_text() + "// changed\n")
        monkeypatch.setattr(cpu_decode, "SOURCE", source)
        cpu_decode.library.__wrapped__(tmp_path)
        monkeypatch.setattr(cpu_decode, "FLAGS", [*cpu_decode.FLAGS, "-O1"])
        cpu_decode.library.__wrapped__(tmp_path)
        assert len(list(tmp_path.glob("*.so"))) == 3

    def test_a_compiler_that_fails_is_one_line(self, tmp_path, monkeypatch):
        monkeypatch.setattr(cpu_decode, "FLAGS", ["--no-such-flag"])
        with pytest.raises(RuntimeError, match="no-such-flag"):
            cpu_decode.library.__wrapped__(tmp_path)
        assert not list(tmp_path.iterdir())
        cpu_decode.library.cache_clear()
        kernel, why = resolve("auto")
        cpu_decode.library.cache_clear()
        assert kernel is dba.TORCH and why.startswith("C++: it fails here") and "\n" not in why


def counting():
    """The kernel, and a list that grows with every call of it."""
    calls = []

    def attention(*args):
        calls.append(args)
        return cpu_decode.attention(*args)

    return dba.Kernel(**{**cpu_decode.KERNEL, "attention": attention}), calls


@pytest.mark.parametrize("residual", (0, 6))
@pytest.mark.parametrize("fmt", (*CODES, "fp16", "mixed"))
@pytest.mark.parametrize("widths", (MODES, ODD), ids=("even", "odd"))
@pytest.mark.parametrize("mode", MODES)
def test_logits_are_the_reference_s(mode, widths, fmt, residual):
    given = settings(mode, **widths[mode], null_attn=True, learned_temp=True)
    model, names = model_of(given), list(config(given).attention.streams)
    formats = dict(zip(names, ("q4_sym", "q8_0", "nf4"))) if fmt == "mixed" else dict.fromkeys(names, fmt)
    schedule = [11, 1, 1, 1, 1, 2] if residual else [11, 1, 2, 1, 2]           # a window: kernels take single tokens
    kernel, calls = counting()
    actual, expected = cached_and_expected(model, given, tokens(2, 17), schedule, formats, residual, kernel)
    close(actual, expected, EXACT)
    assert len(calls) >= 2 * 2, "the kernel had no part in it"                  # one token at a time, twice, 2 layers


def ragged(cfg, formats, residual, T, lengths):
    """A cache of three sequences of these lengths, T of their tokens new, whose buffers hold NaN elsewhere, its span,
    and what every sequence's tokens read as, {stream: [tokens, C]}."""
    most = max(lengths) + 50
    cache, entries = poisoned(cfg, 3, most + 50, formats, residual), entries_of(cfg, 3, most)
    put(cache, entries, 0, most)
    cache.truncate(torch.tensor([n - T for n in lengths]))
    poison_free_slots(cache)
    before = cache.settled.tolist()
    new = entries_of(cfg, 3, T, seed=1)[0]
    span = cache.begin(T)
    cache.append(0, span, new)
    held = []
    for row, n in enumerate(lengths):
        settled = torch.arange(n) < max(before[row], n - residual)
        held.append({})
        for name, fmt in formats.items():
            x = torch.cat([entries[0][name][row, :n - T], new[name][row]])
            x = quantised(x, "fp16" if fmt in QUANTISED else fmt) if residual else x
            ring = x if residual else quantised(x, "fp32")
            held[row][name] = torch.where(settled[:, None], quantised(x, fmt), ring).double()
    return cache, span, held


def attention_of(shape, H, q, held, null, row):
    """Float64 attention of the T newest tokens of one sequence, a head at a time: [H, T, v]."""
    G, n, T = 1 if shape.latent else shape.v_groups, len(held[shape.v_stream]), q.size(2)
    out = []
    for h in range(H):
        g, at, score = h // (H // G), 0, 0.0
        for path in shape.paths:
            w = held[path.stream].size(1) // G
            score = score + q[row, h, :, at:at + w].double() @ held[path.stream][:, g * w:(g + 1) * w].T
            at += w
        v = held[shape.v_stream].view(n, G, -1)[:, g]
        score = score.masked_fill(torch.arange(n) > torch.arange(n - T, n)[:, None], -torch.inf)
        if null is not None:
            score = torch.cat([null[0][row, h].double()[:, None], score], 1)
            v = torch.cat([null[1][g].double()[None], v])
        out.append(score.softmax(1) @ v)
    return torch.stack(out)


def compare(mode, widths, formats, residual, T, null, lengths=(3, 700, 641), seed=0):
    """The kernel and decode_attention against float64, over a ragged cache."""
    given = settings(mode, **widths[mode], layers=1)
    cfg = config(given)
    shape, H = cfg.attention, given["n_head"]
    cache, span, held = ragged(cfg, formats, residual, T, lengths)
    G, generator = 1 if shape.latent else shape.v_groups, torch.Generator().manual_seed(seed)
    per_head = {name: C // G for name, C in shape.streams.items()}
    width = sum(per_head[path.stream] for path in shape.paths)
    q = torch.randn(3, H, T, width, generator=generator) * 2 / width ** 0.5
    null = (2 + torch.randn(3, H, T, generator=generator), torch.randn(G, per_head[shape.v_stream],
                                                                       generator=generator)) if null else None
    actual = cpu_decode.attention(q, cache.layers[0], shape, span, null)
    assert actual.dtype == torch.float32
    expected = torch.stack([attention_of(shape, H, q, held[row], null, row) for row in range(3)])
    close(actual, expected, EXACT, "beside float64")
    for name, fused_from in (("matrix products", 10**9), ("the fused kernel", 1)):
        with mock.patch.object(dba, "FUSED_FROM", fused_from):
            close(dba.decode_attention(q, cache.layers[0], shape, span, null), expected, EXACT, name)


@pytest.mark.parametrize("T", (1, 2))
@pytest.mark.parametrize("residual", (0, 37))
@pytest.mark.parametrize("widths", (MODES, ODD), ids=("even", "odd"))
@pytest.mark.parametrize("mode", MODES)
def test_ragged_caches_in_every_mix_of_formats(mode, widths, residual, T):
    streams = config(settings(mode, **widths[mode])).attention.streams
    for i, formats in enumerate(mixes(streams, cpu_decode.FORMATS)):
        compare(mode, widths, formats, residual, T, null=(i + T) % 2 == 0)


def test_every_pair_of_formats():
    for k, v in itertools.product(cpu_decode.FORMATS, repeat=2):
        compare("gqa", ODD, dict(k=k, v=v), 5, 2, null=True)


def test_a_block_without_a_scale_poisons_what_it_holds():
    """32 of the 48 value channels of one sequence, as in decode_attention; not the others, nor the other sequence."""
    cfg = config(settings("decoupled", layers=1))
    def fused(*args):
        with mock.patch.object(dba, "FUSED_FROM", 1):
            return dba.decode_attention(*args)

    for fmt, kernel in itertools.product(CODES, (cpu_decode.attention, dba.decode_attention, fused)):
        cache, entries = poisoned(cfg, 2, 40, fmt), entries_of(cfg, 2, 10)
        entries[0]["v"][1, 4, 7] = torch.inf
        put(cache, entries, 0, 10)
        cache.length -= 1
        y = kernel(torch.randn(2, 4, 1, 12), cache.layers[0], cfg.attention, cache.begin(1)).flatten(1)
        assert torch.equal(y.isnan(), torch.tensor([[False] * 48, [True] * 32 + [False] * 16])), fmt


def test_many_queries_go_to_torch():
    model = model_of(settings("gqa"))                      # three queries of a token share a key
    for T, compiled in ((21, True), (22, False)):
        kernel, calls = counting()
        cache = poisoned(model.cfg, 1, 40, "q8_0", 0, "cpu", kernel)
        with torch.no_grad():
            model(tokens(1, T), cache=cache)
        assert bool(calls) == compiled


def test_splits_of_a_long_cache():
    """More than decode.cpp's SPLIT of 1,024 slots, settled and in the ring, by one thread and by two."""
    threads = torch.get_num_threads()
    for n in (1, 2):
        torch.set_num_threads(n)
        compare("decoupled_gqa", ODD, dict(k_sem="q4_0", k_geo="q8_0", v="nf4"), 1500, 2, null=True,
                lengths=(3, 4200, 2641))
    torch.set_num_threads(threads)


@pytest.mark.parametrize("fmt", cpu_decode.FORMATS)
@pytest.mark.parametrize("C, dtype", [(64, torch.float32), (40, torch.bfloat16), (33, torch.float32),
                                      (7, torch.float16), (1, torch.float32)])
def test_append_is_bit_identical(fmt, C, dtype):
    x = hard_tokens(C).to(dtype)
    x = torch.cat([x, x.flip(0), x, x.roll(3, 0)])         # enough for two threads
    rows, pos = torch.arange(len(x)) % 3, torch.randperm(512, generator=torch.Generator().manual_seed(0))[:len(x)]
    expected, actual = (dba.CacheStream(3, C, 512, 0, fmt, "cpu") for _ in range(2))
    for stream in (expected, actual):
        stream.codes.fill_(1)
        if stream.scales is not None:
            stream.scales.fill_(-7)
    dba.append(expected, rows, pos, x)
    cpu_decode.append(actual, rows, pos, x.T.contiguous().T)                    # as the ring gives it
    cpu_decode.append(actual, rows[:0], pos[:0], x[:0])
    torch.testing.assert_close(actual.codes, expected.codes, rtol=0, atol=0, equal_nan=True)
    if actual.scales is not None:
        a, b = actual.scales, expected.scales
        assert torch.equal(a.isnan(), b.isnan()) and b.isnan().any() and not b.isnan().all()
        assert torch.equal(a[~a.isnan()].view(torch.int16), b[~b.isnan()].view(torch.int16))


@pytest.mark.parametrize("fmt", CODES)
def test_append_of_blocks_beside_every_boundary(fmt):
    x = hard_blocks()
    expected, actual = (dba.CacheStream(1, x.size(1), len(x), 0, fmt, "cpu") for _ in range(2))
    for append, stream in ((dba.append, expected), (cpu_decode.append, actual)):
        append(stream, torch.zeros(len(x)).long(), torch.arange(len(x)), x)
    assert torch.equal(actual.codes, expected.codes) and torch.equal(actual.scales.isnan(), expected.scales.isnan())
    assert torch.equal(actual.scales.nan_to_num(), expected.scales.nan_to_num())


def test_samples_like_torch(trained):
    """The command line takes it, and it says the same as torch."""
    sample = "--mode sample --ckpt run/last.pt --device cpu --dtype float32 --kv-cache q8_0 --kv-cache-v q4_0 " \
             f"--temperature 0 --max-new-tokens 6 --prompt {'ab' * 150}"
    results = []
    for flags, name in (("", "C++"), ("--kernel torch", "torch")):
        results.append(call(f"{sample} {flags}", trained))
        assert_done(results[-1])
        assert f"kernel {name}" in results[-1].stderr
    assert results[0].stdout == results[1].stdout
