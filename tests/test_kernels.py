"""Back-ends of the KV cache: which one is chosen, and the compiled CPU kernel against torch and a float64 reference."""

import itertools
import shutil
import sys

import pytest
import torch
from helpers import TRAINER, TRAIN, assert_done, assert_error, call, cli, make_text

import kernels
import train_dba as dba
from kernels import cpu_decode
from reference import (MODES, QUANTISED, cached_and_expected, close, config, model_of, poison_free_slots, poisoned,
                       quantised, settings, tokens)
from test_cache import EXACT, ODD, entries_of, mixes, put

CPU = torch.device("cpu")


# --- Which kernel

def resolve(name, tokens=100, device=CPU):
    return dba.resolve_kernel(name, device, tokens)


def test_auto_on_a_cpu_compiles_for_long_caches_only():
    for n in (1, 8191):
        kernel, why = resolve("auto", n)
        assert kernel is dba.TORCH and "8192" in why
    for n in (8192, 10**6):
        kernel, why = resolve("auto", n)
        assert (kernel.attention, kernel.append) == (cpu_decode.attention, dba.append) and "8192" in why
        assert kernel.name != "torch" and kernel.most_queries == 8


def test_torch_asked_for_is_torch():
    assert resolve("torch", 10**6) == (dba.TORCH, "asked for")


def test_without_a_compiler_auto_is_torch(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    kernel, why = resolve("auto", 10**6)
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
    kernel, why = resolve("auto", 10**6, torch.device("xpu"))
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
    kernel, why = resolve("auto", 10**6, torch.device(device))
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


# --- The compiled CPU kernel; as plain Python, except where a test says that it compiles

@pytest.fixture
def plain(monkeypatch):
    monkeypatch.setattr(cpu_decode, "partial_attention", cpu_decode.partial_attention._torchdynamo_orig_callable)


def counted(monkeypatch, module, name):
    calls, function = [], getattr(module, name)
    monkeypatch.setattr(module, name, lambda *args: calls.append(args) or function(*args))
    return calls


@pytest.mark.parametrize("residual", (0, 6))
@pytest.mark.parametrize("fmt", (*QUANTISED, "fp16", "mixed"))
@pytest.mark.parametrize("widths", (MODES, ODD), ids=("even", "odd"))
@pytest.mark.parametrize("mode", MODES)
def test_logits_are_the_reference_s(mode, widths, fmt, residual, plain, monkeypatch):
    given = settings(mode, **widths[mode], null_attn=True, learned_temp=True)
    model, names = model_of(given), list(config(given).attention.streams)
    formats = dict(zip(names, ("q4_sym", "q8_0", "nf4"))) if fmt == "mixed" else dict.fromkeys(names, fmt)
    monkeypatch.setattr(cpu_decode, "CHUNK", 5)
    calls = counted(monkeypatch, cpu_decode, "partial_attention")
    kernel = dba.Kernel(**cpu_decode.KERNEL)
    actual, expected = cached_and_expected(model, given, tokens(2, 17), [11, 1, 1, 1, 2, 1], formats, residual, kernel)
    close(actual, expected, EXACT)
    assert len(calls) >= 4 * 2 * 3 or mode == "mla", "the kernel had no part in it"  # steps x layers x chunks


def ragged(cfg, formats, residual, T):
    """A cache of sequences of 3, 700 and 641 tokens, T of them new, whose buffers hold NaN elsewhere, its span, and
    what every sequence's tokens read as, {stream: [tokens, C]}."""
    cache, entries, lengths = poisoned(cfg, 3, 800, formats, residual), entries_of(cfg, 3, 750), [3, 700, 641]
    put(cache, entries, 0, 750)
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


def compare(mode, widths, formats, residual, T, null, seed=0):
    """The kernel and decode_attention against float64, over a ragged cache."""
    given = settings(mode, **widths[mode], layers=1)
    cfg = config(given)
    shape, H = cfg.attention, given["n_head"]
    cache, span, held = ragged(cfg, formats, residual, T)
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
    close(dba.decode_attention(q, cache.layers[0], shape, span, null), expected, EXACT, "torch beside float64")


@pytest.mark.parametrize("T", (1, 2))
@pytest.mark.parametrize("residual", (0, 37))
@pytest.mark.parametrize("widths", (MODES, ODD), ids=("even", "odd"))
@pytest.mark.parametrize("mode", MODES)
def test_ragged_caches_in_every_mix_of_formats(mode, widths, residual, T, plain, monkeypatch):
    monkeypatch.setattr(cpu_decode, "CHUNK", 256)
    streams = config(settings(mode, **widths[mode])).attention.streams
    for i, formats in enumerate(mixes(streams)):
        compare(mode, widths, formats, residual, T, null=(i + T) % 2 == 0)


def test_every_pair_of_formats(plain):
    for k, v in itertools.product(dba.FORMATS, repeat=2):
        compare("gqa", ODD, dict(k=k, v=v), 5, 2, null=True)


def test_a_block_without_a_scale_poisons_what_it_holds(plain):
    """32 of the 48 value channels of one sequence, as in decode_attention; not the others, nor the other sequence."""
    cfg = config(settings("decoupled", layers=1))
    for fmt, kernel in itertools.product(QUANTISED, (cpu_decode.attention, dba.decode_attention)):
        cache, entries = poisoned(cfg, 2, 40, fmt), entries_of(cfg, 2, 10)
        entries[0]["v"][1, 4, 7] = torch.inf
        put(cache, entries, 0, 10)
        cache.length -= 1
        y = kernel(torch.randn(2, 4, 1, 12), cache.layers[0], cfg.attention, cache.begin(1)).flatten(1)
        assert torch.equal(y.isnan(), torch.tensor([[False] * 48, [True] * 32 + [False] * 16])), fmt


def test_many_queries_go_to_torch(monkeypatch, plain):
    model = model_of(settings("gqa"))                      # three queries of a token share a key
    for T, compiled in ((2, True), (3, False)):
        calls = counted(monkeypatch, cpu_decode, "partial_attention")
        kernel = dba.Kernel(**cpu_decode.KERNEL)
        cache = poisoned(model.cfg, 1, 40, "q8_0", 0, "cpu", kernel)
        with torch.no_grad():
            model(tokens(1, T), cache=cache)
        assert bool(calls) == compiled


def test_compiled(monkeypatch):
    """Widths of 11, two formats, chunks of 256 slots; the next test has even ones."""
    monkeypatch.setattr(cpu_decode, "CHUNK", 256)
    assert hasattr(cpu_decode.partial_attention, "_torchdynamo_orig_callable")
    compare("gqa", ODD, dict(k="nf4", v="q4_sym"), 0, 2, null=True)


def test_a_long_prompt_samples_with_the_compiled_kernel(trained, monkeypatch):
    """The command line takes it where the cache is long enough, and it says the same as torch."""
    monkeypatch.setattr(kernels, "COMPILED_FROM", 300)
    sample = "--mode sample --ckpt run/last.pt --device cpu --dtype float32 --kv-cache q8_0 --kv-cache-v q4_0 " \
             f"--temperature 0 --max-new-tokens 6 --prompt {'ab' * 150}"
    ran, results = counted(monkeypatch, cpu_decode, "partial_attention"), []
    for flags, name, steps in (("", "compiled", 5), ("--kernel torch", "torch", 0)):
        results.append(call(f"{sample} {flags}", trained))
        assert_done(results[-1])
        assert f"kernel {name}" in results[-1].stderr and len(ran) == steps
        ran.clear()
    assert results[0].stdout == results[1].stdout
