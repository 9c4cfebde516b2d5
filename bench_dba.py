"""
One benchmark of this device, in blocks: its ceilings, then what the code makes of them.

    python3 bench_dba.py train --cases paper_baseline paper_decoupled_sem8 --micro 8 --compile
    python3 bench_dba.py decode --device cuda
    python3 bench_dba.py gpu --out runs/bench/h100                # every block, each in a process of its own
    python3 bench_dba.py gpu --toy --device cpu --out /tmp/bench  # the same at toy size: a rehearsal

A block prints a line a row as it is measured, and writes <out>/<block>.json: rows, and the environment that they come
from; until it is finished that is <block>.json.part, beside an earlier result. The last line of `gpu` on standard
output is one JSON document with all of it; a block that fails or takes too long is named there and makes the exit code
1, and the others still run.

Times are medians of synchronised repetitions after warm-up. MFU counts 6 FLOPs per parameter of a matrix product and
token, and 6 L H (w + v) T / 2 for attention: the causal half, of query-key width w and value width v. `mfu_full` counts
attention as PaLM and nanochat do, without the half. The peak is that of the device's data sheet, dense bfloat16.
"""

import argparse
import contextlib
import gc
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import prepare_fineweb
import train_dba
from estimate import model_flops, peak_of, training_memory
from eval_dba import number, positive
from evals.subject import check_out
from train_dba import (
    GPT,
    KVCache,
    Parser,
    Ranks,
    UserError,
    autocast,
    bytes_per_token,
    compile_model,
    count_params,
    decode_attention,
    exit_code,
    keep_freed_memory,
    make_config,
    make_optimizer,
    peak_memory,
    pick_device,
    pick_dtype,
    product_rates,
    provenance,
    resolve_kernel,
    step_gradients,
    synchronize,
    write_text,
)

VOCAB = 50_257                                             # GPT-2's
CLOCK = time.perf_counter                                  # or, by --cpu-time, time.process_time
CASES = ("paper_baseline", "paper_gqa", "paper_decoupled", "paper_decoupled_sem8", "paper_mla", "llama")


# -----------------------------------------------------------------------------
# Clocks

def times_of(call, device, rounds=7, least=0.005, warm_up=2):
    """Seconds by CLOCK of each of `rounds` repetitions of call(), which one is repeated for at least `least` seconds
    between two synchronisations, after `warm_up` calls that don't count."""
    for _ in range(warm_up):
        call()
    repeat, seconds = 1, []
    while len(seconds) < rounds:
        synchronize(device)
        started = CLOCK()
        for _ in range(repeat):
            call()
        synchronize(device)
        taken = CLOCK() - started
        if taken < least and not seconds:
            repeat *= 2
            continue
        seconds.append(taken / repeat)
    return seconds


def median_of(call, device, rounds=7, least=0.005):
    return statistics.median(times_of(call, device, rounds, least))


def captured(call, device):
    """call() as a CUDA graph, whose replay takes what the kernels take, without Python's launches; elsewhere itself."""
    if device.type != "cuda":
        return call
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def peak_flops(device):
    """FLOP/s of the device's data sheet, or None for one that estimate.py doesn't list."""
    return peak_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def forget(device):
    """Free what the last row held."""
    gc.collect()
    torch.compiler.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


# -----------------------------------------------------------------------------
# Blocks: generators of rows

def ceilings(device, toy):
    """A copy of a large buffer (bytes read and written), and square matrix products of random values."""
    size, n = (2**24, 512) if toy else (2**32, 8192) if device.type == "cuda" else (2**28, 2048)
    x = torch.empty(size, dtype=torch.uint8, device=device).random_()
    y = torch.empty_like(x)
    yield dict(what="copy", bytes=size, gb_per_s=2e-9 * size / median_of(lambda: y.copy_(x), device))
    for dtype in (torch.bfloat16, torch.float32):
        a, b = torch.randn(2, n, n, device=device).to(dtype)
        rate = 2e-12 * n**3 / median_of(lambda a=a, b=b: a @ b, device, least=0.1)
        yield dict(what=f"product {str(dtype).removeprefix('torch.')}", n=n, tflops=rate)


CHECKED = {
    "standard":       dict(attn_mode="standard", d_model=512),
    "gqa":            dict(attn_mode="gqa", d_model=512, kv_head=2),
    "decoupled 8/32": dict(attn_mode="decoupled", sem_dim=64, geo_dim=256, d_model=512),
    "decoupled 4/8":  dict(attn_mode="decoupled", sem_dim=32, geo_dim=64, d_model=512),
    "groups, odd":    dict(attn_mode="decoupled", sem_dim=24, geo_dim=80, attn_dim=88, kv_head=4, d_model=512),
    "mla":            dict(attn_mode="mla", d_model=512, kv_lora_rank=128, rope_dim=32),
}


def check(device, toy):
    """The largest difference of the device's kernel from the torch path, over a small cache of two sequences."""
    import kernels
    kernel, _ = resolve_kernel("auto", device)
    formats = ("fp16", "q4_0") if toy else ("fp32", "bf16", "fp16", "q8_0", "q4_0", "q4_sym", "nf4")
    for (name, settings), fmt, residual in itertools.product(CHECKED.items(), formats, (0, 32)):
        cfg = make_config(data="-", layers=1, n_head=8, **settings)
        caches = [KVCache(cfg, 2, 640, fmt, residual, device, each) for each in (kernel, train_dba.TORCH)]
        error = kernels.difference(*caches, cfg.n_head)
        yield dict(kernel=kernel.name, case=name, format=fmt, residual=residual, difference=error,
                   ok=error <= kernels.TOLERANCE)


WIDTHS = (                                                 # query and key heads, width of a head, with a null token
    ("standard 64", 32, 32, 64, False), ("standard 64, null", 32, 32, 64, True), ("gqa 32/4", 32, 4, 64, False),
    ("16+32", 32, 32, 48, False), ("16+32, null", 32, 32, 48, True),
    ("8+32", 32, 32, 40, False), ("8+32, null", 32, 32, 40, True))
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION,
            "efficient": SDPBackend.EFFICIENT_ATTENTION}


def sdpa(device, toy):
    """Forward and backward of causal attention as attend() calls it, by PyTorch's own choice and by each back-end."""
    B, T, half = (1, 32, torch.bfloat16) if toy else (8, 2048, torch.bfloat16)
    for name, H, G, w, null in WIDTHS:
        q, k, v = (torch.randn(B, heads, T, width, device=device, dtype=half, requires_grad=True)
                   for heads, width in ((H, w + null), (G, w), (G, w)))
        null_v = torch.randn(G, w, device=device, dtype=half) if null else None
        grad = torch.randn(B, H, T, w, device=device, dtype=half)

        def forth_and_back(q=q, k=k, v=v, null_v=null_v, grad=grad):
            torch.autograd.grad(train_dba.attend(q, k, v, null_v), (q, k, v), grad)

        for backend in ("auto", *BACKENDS):
            chosen = contextlib.nullcontext() if backend == "auto" else sdpa_kernel(BACKENDS[backend])
            try:
                with chosen:
                    seconds = median_of(forth_and_back, device, rounds=5)
            except RuntimeError as e:
                yield dict(case=name, width=w, backend=backend, ms=None, why=str(e).splitlines()[0][:80])
                continue
            flop = 3.5 * 4 * B * H * T * T / 2 * w         # forward, and five products backward; useful width only
            yield dict(case=name, width=w, backend=backend, ms=1000 * seconds, tflops=1e-12 * flop / seconds)


def loss(device, toy):
    """The loss and its gradients alone, chunked in several ways, compiled and not, and PyTorch's own in one piece."""
    N, D = (64, 64) if toy else (16_384, 2048)
    h = torch.randn(N, D, device=device, requires_grad=True)
    weight = torch.randn(-(-VOCAB // 64) * 64, D, device=device).mul_(0.02).requires_grad_()
    targets = torch.randint(VOCAB, (N,), device=device)

    def ours(chunk_loss):
        nll = train_dba.LinearCrossEntropy.apply(h.bfloat16(), weight, targets, VOCAB, chunk_loss, True)
        torch.autograd.grad(nll, (h, weight))

    def plain():
        with autocast(device, torch.bfloat16):
            logits = F.linear(h, weight)
        torch.autograd.grad(F.cross_entropy(logits.float(), targets, reduction="sum"), (h, weight))

    compiled = torch.compile(train_dba.nll_and_grad, dynamic=False)
    calls = {}
    for chunk in (20_000_000,) if toy else (20_000_000, 100_000_000, 400_000_000, 10**9):
        calls[f"ours, {chunk // 10**6}M logits"] = chunk, partial(ours, train_dba.nll_and_grad)
        calls[f"ours, {chunk // 10**6}M logits, compiled"] = chunk, partial(ours, compiled)
    calls["full logits"] = 0, plain
    calls["full logits, compiled"] = 0, torch.compile(plain)
    kept = train_dba.LOGIT_CHUNK[device.type]
    for name, (chunk, call) in calls.items():
        train_dba.LOGIT_CHUNK[device.type] = chunk or kept
        call()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        seconds = median_of(call, device, rounds=5)
        yield dict(case=name, ms=1000 * seconds, gib=peak_memory(device) / 2**30,
                   tflops=6e-12 * N * D * len(weight) / seconds)
    train_dba.LOGIT_CHUNK[device.type] = kept


LOSSES = ((2048, 512, 33_278), (1024, 768, VOCAB), (512, 1024, VOCAB), (2048, 256, 4096), (4096, 192, 257))


def compact(device, toy):
    """The loss and its gradients, ours and PyTorch's compact one in turn, each in float32 and bfloat16, by tokens,
    width and types."""
    for N, D, types in ((32, 64, 257),) if toy else LOSSES:
        targets, calls = torch.randint(types, (N,), device=device), {}
        for dtype in (torch.float32, torch.bfloat16):
            h = torch.randn(N, D, device=device).to(dtype).requires_grad_()
            weight = torch.randn(-(-types // 64) * 64, D, device=device).mul_(0.02).requires_grad_()

            def ours(h=h, weight=weight, targets=targets, types=types):
                nll = train_dba.LinearCrossEntropy.apply(h, weight, targets, types, train_dba.nll_and_grad, True)
                torch.autograd.grad(nll, (h, weight))

            def theirs(h=h, weight=weight, targets=targets, types=types):
                nll = F.linear_cross_entropy(h, weight[:types].to(h.dtype), targets, reduction="sum",
                                             options=train_dba.COMPACT)
                torch.autograd.grad(nll, (h, weight))

            calls[f"ours {str(dtype)[6:]}"] = ours
            if train_dba.COMPACT:
                calls[f"compact {str(dtype)[6:]}"] = theirs
        seconds = {name: [] for name in calls}
        for _ in range(2 if toy else 3):
            for name, call in calls.items():
                seconds[name] += times_of(call, device, rounds=1, least=0, warm_up=not seconds[name])
        ms = {name: 1000 * statistics.median(each) for name, each in seconds.items()}
        yield dict(tokens=N, width=D, types=types, ms=ms)


def llama(cfg):
    """Transformers' Llama of the same shape, with forward(idx, targets) as GPT's. Raises ImportError without it."""
    from transformers import LlamaConfig, LlamaForCausalLM
    model = LlamaForCausalLM(LlamaConfig(vocab_size=-(-VOCAB // 64) * 64, hidden_size=cfg.d_model,
                                         intermediate_size=cfg.d_ff, num_hidden_layers=cfg.layers,
                                         num_attention_heads=cfg.n_head, max_position_embeddings=cfg.block,
                                         tie_word_embeddings=True, attn_implementation="sdpa"))
    inner = model.forward

    def forward(idx, targets):
        logits = inner(input_ids=idx, use_cache=False).logits.float()
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    model.forward = forward
    return model


def stepper(case, cfg, device, dtype, vocab_size=VOCAB):
    """A function that takes one optimiser step of the case, as train() does, on random tokens."""
    torch.manual_seed(0)
    with device:
        model = llama(cfg) if case == "llama" else GPT(cfg, vocab_size).init_weights()
    optimizer = make_optimizer(model, cfg)
    runner = model
    if cfg.compile:
        runner = torch.compile(model) if case == "llama" else compile_model(model)
    batch = torch.randint(vocab_size, (2, cfg.batch_size, cfg.block), device=device)
    ranks, micro = Ranks(0, 1, device), cfg.micro_batch or cfg.batch_size

    def step():
        step_gradients(runner, batch, cfg, 1, micro, range(cfg.batch_size // micro), ranks, dtype)
        torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip).item()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return step


def measured_steps(case, cfg, device, steps):
    """A row: tokens/s and their share of the peak, memory beside its formula, over `steps` steps after two that compile
    and allocate."""
    forget(device)
    dtype, _ = pick_dtype("auto", device)
    row = dict(case=case, micro=cfg.batch_size, block=cfg.block, compiled=cfg.compile, dtype=str(dtype)[6:],
               params=count_params(cfg, VOCAB)["total"], layers=cfg.layers, steps=steps)
    started = time.perf_counter()
    try:
        step = stepper(case, cfg, device, dtype)
        step()
        first = time.perf_counter() - started
        times = times_of(step, device, rounds=steps, least=0)
    except torch.OutOfMemoryError:
        return {**row, "tok_s": None, "why": "out of memory"}
    except ImportError as e:
        return {**row, "tok_s": None, "why": f"no {e.name}"}
    rates = [cfg.tokens_per_step / seconds for seconds in times]
    peak, rate, flops = peak_flops(device), statistics.median(rates), model_flops(cfg, VOCAB)
    by_formula = None
    if case != "llama" and dtype != torch.float32:
        by_formula = training_memory(cfg, VOCAB, device.type == "cuda")["peak"] / 2**30
    row |= dict(tok_s=rate, slowest=min(rates), fastest=max(rates), ms=1000 * statistics.median(times), first_s=first,
                model_tflops=1e-12 * rate * flops, mfu=rate * flops / peak if peak else None,
                mfu_full=rate * model_flops(cfg, VOCAB, causal=False) / peak if peak else None,
                gib=peak_memory(device) / 2**30, formula_gib=by_formula)
    return row


def train(device, toy, cases=(), micro=(), compile=True, layers=None, steps=None):
    """Optimiser steps at the papers' 1B configuration; ratios are to the first row."""
    sizes = dict(d_model=128, layers=layers or 2, d_ff=256, n_head=32, block=64) if toy else {}
    if layers and not toy:
        sizes = dict(layers=layers)
    plan = [(case, m, compile) for case in cases for m in micro or (8,)]
    if not cases:
        plan = [("paper_baseline", 8, True), ("paper_decoupled_sem8", 8, True), ("paper_decoupled", 8, True),
                ("paper_gqa", 8, True), ("paper_baseline", 8, False), ("paper_decoupled_sem8", 8, False),
                ("llama", 8, True), ("paper_mla", 8, True), ("paper_baseline", 16, True),
                ("paper_decoupled_sem8", 16, True), ("paper_baseline", 2, True), ("paper_baseline", 8, True)]
    if toy:
        plan = dict.fromkeys((case, 2, False) for case, _, _ in plan)           # each case once
    base = None
    for case, m, compiled in plan:
        cfg = make_config(data="-", exp="paper_baseline" if case == "llama" else case, batch_size=m, compile=compiled,
                          **sizes)
        row = measured_steps(case, cfg, device, steps or (2 if toy else 6))
        base = base or row["tok_s"]
        yield {**row, "times_first": row["tok_s"] / base if row["tok_s"] else None}


GROWN = {"batch_size": (1, 2, 4, 8, 16), "d_model": (128, 256, 512, 1024), "layers": (2, 4, 8, 16)}


def growth(device, toy):
    """Seconds of a training step as the batch, the width or the depth grows, the other two as they are in the middle;
    heads of 64 channels (8+32 decoupled), a vocabulary of bytes, which costs little beside the blocks."""
    middle = dict(batch_size=4, d_model=256, layers=4)
    dtype, _ = pick_dtype("auto", device)
    for case, (axis, values) in itertools.product(("standard", "decoupled"), GROWN.items()):
        for value in values[:2] if toy else values:
            sizes = {**middle, axis: value}
            d = sizes["d_model"]
            widths = dict(sem_dim=d // 8, geo_dim=d // 2) if case == "decoupled" else {}
            cfg = make_config(data="-", attn_mode=case, n_head=d // 64, d_ff=3 * d, block=32 if toy else 256, **sizes,
                              **widths)
            forget(device)
            seconds = times_of(stepper(case, cfg, device, dtype, 257), device, rounds=2 if toy else 3, least=0)
            yield dict(case=case, axis=axis, value=value, params=count_params(cfg, 257)["total"],
                       dtype=str(dtype)[6:], seconds=statistics.median(seconds), fastest_s=min(seconds))


def small(device, toy):
    """The papers' WikiText-2 configuration, whose steps are short: the batch at which the device is busy."""
    for case, batch, compiled in itertools.product(("standard", "decoupled"), (8,) if toy else (8, 64, 256),
                                                   (False,) if toy else (False, True)):
        sizes = dict(layers=1, block=32) if toy else {}
        cfg = make_config(data="-", size="small", attn_mode=case, batch_size=batch, compile=compiled, **sizes)
        yield measured_steps(case, cfg, device, 2 if toy else 10)


CLASSES = (                                                # the first whose part occurs in a kernel's name
    ("attention", ("flash", "fmha", "sdpa", "attention")), ("optimiser", ("adam", "multi_tensor", "lpnorm")),
    ("matrix products", ("gemm", "nvjet", "cutlass", "mm_", "xmma", "splitk")), ("compiled elementwise", ("triton",)),
    ("copies", ("memcpy", "memset")), ("other elementwise", ("elementwise", "reduce", "cat", "vectorized")))


def profile(device, toy):
    """Where the time of a compiled step goes, by class of kernel and by kernel."""
    from torch.profiler import ProfilerActivity
    for case in ("paper_baseline", "paper_decoupled_sem8"):
        forget(device)
        sizes = dict(d_model=128, layers=1, d_ff=256, block=64) if toy else {}
        cfg = make_config(data="-", exp=case, batch_size=2 if toy else 8, compile=not toy, **sizes)
        step = stepper(case, cfg, device, pick_dtype("auto", device)[0])
        for _ in range(3):
            step()
        on_gpu = device.type == "cuda"
        synchronize(device)
        started = time.perf_counter()
        with torch.profiler.profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as prof:
            step()
            synchronize(device)
        wall, kernels = 1e6 * (time.perf_counter() - started), {}
        for event in prof.key_averages():
            spent = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            kernels[event.key] = kernels.get(event.key, 0) + spent
        shares = {}
        for name, spent in kernels.items():
            kind = next((kind for kind, parts in CLASSES if any(part in name.lower() for part in parts)), "other")
            shares[kind] = shares.get(kind, 0) + spent
        top = sorted(kernels.items(), key=lambda item: -item[1])[:15]
        yield dict(case=case, wall_ms=wall / 1000, busy_ms=sum(kernels.values()) / 1000,
                   ms={kind: spent / 1000 for kind, spent in sorted(shares.items(), key=lambda item: -item[1])},
                   top={name[:100]: spent / 1000 for name, spent in top})


def filled(cfg, batch, tokens, policy, kernel, device):
    """A KVCache of one layer that holds random tokens, and the span of its last one."""
    cache = KVCache(cfg, batch, tokens, policy, device=device, kernel=kernel)
    for n in torch.arange(tokens).split(2048):
        span = cache.begin(len(n))
        cache.append(0, span, {name: torch.randn(batch, len(n), C, device=device)
                               for name, C in cfg.attention.streams.items()})
        cache.advance(span)
    cache.truncate(tokens - 1)
    return cache, cache.begin(1)


DECODED = (("standard", dict(attn_mode="standard"), ("fp16", "q4_0")),
           ("gqa", dict(attn_mode="gqa", kv_head=4), ("fp16", "q4_0")),
           ("8+32", dict(attn_mode="decoupled", sem_dim=256, geo_dim=1024), ("fp16", "q8_0", "q4_0", "hetero")),
           ("mla", dict(attn_mode="mla", kv_lora_rank=512, rope_dim=64), ("fp16", "q8_0")))


@torch.inference_mode()
def decode(device, toy, tokens=()):
    """One query's attention over one layer's cache: microseconds of the kernels alone (`us`, a CUDA graph) and with
    Python's launches, bytes read per second as a share of a copy's, and PyTorch's attention over a cache of standard
    attention in float16 as the baseline, on a CPU in bfloat16, which is faster there."""
    kernel, _ = resolve_kernel("auto", device)
    copy = next(ceilings(device, toy))["gb_per_s"]
    cases = [(1, each) for each in tokens] or ((1, 256),)
    if not (toy or tokens):
        cases = (1, 8192), (1, 131_072), (32, 8192), (1, 1024), (1, 32_768), (8, 8192), (8, 32_768)
    H, d, half = 32, 2048, torch.bfloat16 if device.type == "cpu" else torch.float16
    for batch, tokens in cases:
        k, v = torch.randn(2, batch, H, tokens, d // H, device=device, dtype=half)
        q = torch.randn(batch, H, 1, d // H, device=device, dtype=half)
        base = median_of(captured(lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v), device), device)
        n = batch * tokens * 4 * d
        fmt = "bf16" if device.type == "cpu" else "fp16"
        yield dict(case="standard", format=fmt, kernel="sdpa", batch=batch, tokens=tokens, us=1e6 * base,
                   cache_mib=n / 2**20, gb_per_s=1e-9 * n / base, share_of_copy=1e-9 * n / base / copy)
        del q, k, v
        for name, settings, formats in DECODED:
            cfg = make_config(data="-", n_head=H, d_model=d, layers=1, **settings)
            width = cfg.kv_lora_rank + cfg.rope_dim if name == "mla" else sum(p.width for p in cfg.attention.paths)
            q = torch.randn(batch, H, 1, width, device=device) / width**0.5
            for fmt in formats:
                cache, span = filled(cfg, batch, tokens, fmt, kernel, device)
                call = partial(kernel.attention, q, cache.layers[0], cache.shape, span)
                error = None
                if batch * tokens <= 2**16:
                    error = (call() - decode_attention(q, cache.layers[0], cache.shape, span)).abs().max().item()
                launched = median_of(call, device)
                seconds, n = median_of(captured(call, device), device), batch * tokens * bytes_per_token(cfg, fmt)
                yield dict(case=name, format=fmt, kernel=kernel.name, batch=batch, tokens=tokens, us=1e6 * seconds,
                           us_launched=1e6 * launched, cache_mib=n / 2**20, gb_per_s=1e-9 * n / seconds,
                           share_of_copy=1e-9 * n / seconds / copy, times_faster_than_sdpa=base / seconds,
                           difference=error)
                del cache, span, call
                forget(device)


MODES = {"standard": ("fp16", "q4_0"), "gqa": ("fp16", "q4_0"), "decoupled": ("fp16", "q8_0", "q4_0", "hetero"),
         "mla": ("fp16", "q8_0")}


def generate(device, toy):
    """A whole model's first token after a prompt (TTFT), and each token after that, as `--mode sample` makes them: its
    type, its kernel. Ratios are to standard attention over a cache in float16."""
    kernel, _ = resolve_kernel("auto", device)
    sizes, prompt, count = dict(size="1b" if device.type == "cuda" else "small"), 2048, 33
    if toy:
        sizes, prompt, count = dict(d_model=128, layers=2, d_ff=256), 16, 4
    base = None
    for mode, formats in MODES.items():
        cfg = make_config(data="-", attn_mode=mode, kv_head=2 if mode == "gqa" else None, **sizes)
        rates = partial(product_rates, 1, cfg.d_model, cfg.d_ff, training=False, layers=cfg.layers)
        dtype, _ = pick_dtype("auto", device, rates)       # as sample() picks it
        forget(device)
        with device:
            model = GPT(cfg, VOCAB).init_weights()
            ids = torch.randint(VOCAB, (1, prompt))

        def seconds_of_tokens(cache, model=model, ids=ids):
            cache.truncate(0)
            seconds, started = [], CLOCK()
            for token in train_dba.generate(model, ids, count, cache, temperature=0):
                token.item()
                now = CLOCK()
                seconds.append(now - started)
                started = now
            return seconds

        for fmt in formats:
            cache = KVCache(cfg, 1, prompt + count - 1, fmt, device=device, kernel=kernel)
            with autocast(device, dtype):                  # around all, so that weights are cast once, in the warm-up
                seconds_of_tokens(cache)
                rounds = [seconds_of_tokens(cache) for _ in range(1 if toy else 3)]
            first = statistics.median(seconds[0] for seconds in rounds)
            later = statistics.median(second for seconds in rounds for second in seconds[1:])
            base = base or (first, later)
            yield dict(case=mode, format=fmt, kernel=kernel.name, dtype=str(dtype)[6:], tokens=prompt,
                       params=count_params(cfg, VOCAB)["total"], cache_mib=prompt * bytes_per_token(cfg, fmt) / 2**20,
                       ttft_ms=1000 * first, ms=1000 * later, times_ttft=base[0] / first, times_ms=base[1] / later)


def host(device, toy):
    """Seconds of what processor and disk do: start the trainer (beside importing torch alone), make ids of Python's
    documentation, hash a token file, save and load a checkpoint with the optimiser's state, as last.pt has it. Files
    are made in the working directory, and deleted."""
    def row(what, call, size=None):
        """size: bytes, where there is a rate."""
        started = time.perf_counter()                      # CLOCK may not count other processes and the disk
        call()
        seconds = time.perf_counter() - started
        return dict(what=what, seconds=seconds, mb_per_s=size() / seconds / 1e6 if size else None)

    starts = {"import torch": ("-c", "import torch"), "train_dba.py --help": (train_dba.__file__, "--help")}
    for what, arguments in starts.items():
        yield row(what, partial(subprocess.run, [sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL))
    documents = prepare_fineweb.read_sample(None)
    text = "".join(text for text, _ in itertools.islice(documents, 2 if toy else None))
    size = len(text.encode())
    words = train_dba.WordTokenizer.build(train_dba.split_words(text))
    for name, make in (("byte", train_dba.ByteTokenizer), ("word", lambda: words), ("gpt2", train_dba.GPT2Tokenizer)):
        try:
            tokenizer = make()
        except UserError as e:
            yield dict(what=f"tokenise, {name}", seconds=None, why=str(e))
            continue
        yield row(f"tokenise, {name}", partial(tokenizer.encode, text), lambda: size)

    cfg = make_config(data="-", exp="paper_baseline", **(dict(d_model=128, layers=1, d_ff=256) if toy else {}))
    with device:
        model = GPT(cfg, VOCAB).init_weights()
    optimizer = make_optimizer(model, cfg)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    with tempfile.TemporaryDirectory(dir=".") as folder:
        path = Path(folder) / "last.pt"
        state = dict(model=model.state_dict(), optimizer=optimizer.state_dict())
        ids = Path(folder) / "ids"
        ids.write_bytes(bytes(2**20 if toy else 2**28))
        yield row("hash token ids", partial(train_dba.digest_ids, ids, 0, "uint16"), lambda: ids.stat().st_size)
        yield row("save last.pt", partial(torch.save, state, path), lambda: path.stat().st_size)
        yield row("load last.pt", partial(torch.load, path, map_location=device), lambda: path.stat().st_size)


BLOCKS = {block.__name__: block for block in (ceilings, check, sdpa, loss, compact, train, profile, small, growth,
                                                  decode, generate, host)}


# -----------------------------------------------------------------------------
# Command line

def line(row):
    """A row as one line of text."""
    def text(value):
        return f"{value:.4g}" if isinstance(value, float) else f"{value}"
    return "  ".join(f"{name} {text(value)}" for name, value in row.items() if not isinstance(value, dict))


def run_block(name, device, out, toy, **settings):
    """Measure a block; its rows are printed and written as they come, so that one that is stopped loses none: to
    <name>.json.part, which takes the place of an earlier result once it is whole."""
    rows, started, part = [], time.perf_counter(), out and out / f"{name}.json.part"
    for row in BLOCKS[name](device, toy, **settings):
        rows.append(row)
        print(f"{name:10} {line(row)}", flush=True)
        if out:
            out.mkdir(parents=True, exist_ok=True)
            document = dict(block=name, toy=toy, seconds=time.perf_counter() - started, clock=CLOCK.__name__,
                            load=os.getloadavg()[0], env=provenance(device), rows=rows)
            write_text(part, json.dumps(document, indent=1) + "\n")
    if rows and out:
        part.replace(out / f"{name}.json")


def run_plan(args):
    """Every block in a process of its own. Returns the exit code."""
    failed = []
    for name in args.blocks:
        command = [sys.executable, __file__, name, "--device", args.device, "--out", str(args.out)]
        command += ["--toy"] * args.toy + ["--cpu-time"] * args.cpu_time
        (args.out / f"{name}.json.part").unlink(missing_ok=True)                # of another run
        try:
            code = subprocess.run(command, timeout=args.limit).returncode
        except subprocess.TimeoutExpired:
            code = f"stopped after {args.limit} s"
        if code:
            failed.append(name)
            print(f"{name}: {code}", file=sys.stderr, flush=True)
    paths = [args.out / (f"{name}.json.part" if name in failed else f"{name}.json") for name in args.blocks]
    documents = [json.loads(path.read_text()) for path in paths if path.is_file()]
    print(json.dumps(dict(failed=failed, blocks=documents)))
    return 1 if failed else 0


@exit_code("what was measured before is kept")
def main(argv=None):
    parser = Parser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, doc in [("gpu", "every block"), *((name, block.__doc__) for name, block in BLOCKS.items())]:
        p = commands.add_parser(name, help=doc.split(":")[0].split(".")[0], description=doc)
        p.add_argument("--device", default="auto")
        p.add_argument("--out", type=Path, help="folder of the result files")
        p.add_argument("--cpu-time", action="store_true", help="one thread, timed by the CPU time that it takes: for a "
                       "CPU that others use, too")
        p.add_argument("--toy", action="store_true", help="sizes that any CPU manages: a rehearsal, no measurement")
        if name == "gpu":
            p.add_argument("--blocks", nargs="+", choices=BLOCKS, default=list(BLOCKS))
            p.add_argument("--limit", type=number, default=300, help="seconds of a block (300)")
        if name == "decode":
            p.add_argument("--tokens", type=positive(), nargs="+", default=(), help="contexts of one sequence, and no "
                           "others")
        if name == "train":
            p.add_argument("--cases", nargs="+", choices=CASES, default=())
            p.add_argument("--micro", type=positive(), nargs="+", default=(), help="sequences of a step (8)")
            p.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
            p.add_argument("--layers", type=positive(), help="so many in place of the preset's")
            p.add_argument("--steps", type=positive(), help="timed steps (6)")
    args = parser.parse_args(argv)
    if args.command == "gpu":
        args.out = args.out or Path("runs/bench/gpu")
    check_out(args.out and str(args.out))
    if args.command == "gpu":
        return run_plan(args)
    keep_freed_memory()
    settings = vars(args)
    device = pick_device(settings.pop("device"))
    if settings.pop("cpu_time"):
        if device.type != "cpu":
            raise UserError(f"--cpu-time says nothing of {device}")
        global CLOCK
        CLOCK = time.process_time
        torch.set_num_threads(1)
    run_block(settings.pop("command"), device, **settings)


if __name__ == "__main__":
    sys.exit(main())
