"""
Measure a checkpoint.

    python3 eval_dba.py ppl --ckpt runs/ckpt_decoupled --kv-cache hetero
    python3 eval_dba.py latency --ckpt runs/ckpt_decoupled --prompts 128 1024 8192
    python3 eval_dba.py tasks --ckpt runs/ckpt_decoupled --tasks piqa boolq --tasks-dir data/eval --limit 200
    python3 eval_dba.py ppl --ckpt SmolLM2.q8_0.gguf --data wiki.test.tokens --kv-cache q4_0

--ckpt is a run folder (its best.pt), a checkpoint, or a pretrained Llama as a .gguf file or a Hugging Face folder. A
command writes eval_<command>.json beside the checkpoint, or --out, with its settings, the hash of its data and the
hardware, and prints a short table.
"""

import argparse
import collections
import contextlib
import copy
import ctypes
import dataclasses
import hashlib
import itertools
import json
import math
import operator
import os
import platform
import random
import re
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

import train_dba
from train_dba import (FORMATS, GPT, HETERO, Config, KVCache, UserError, autocast, bytes_per_token, cache_bytes,
                       cache_formats, load_checkpoint, load_model, pick_device, pick_dtype, provenance, resolve_kernel,
                       rotate_cache, synchronize)


@dataclass
class Subject:
    """What is measured: a model in eval mode, its tokenizer, where its results go, and the device and type of it."""
    model: GPT
    tokenizer: object
    folder: Path
    step: int | None
    sha256: str
    device: torch.device
    dtype: torch.dtype

    @property
    def cfg(self) -> Config:
        return self.model.cfg


def file_hash(*paths):
    """sha256 of files, one after the other, in hexadecimal."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as f:
            hashlib.file_digest(f, lambda: digest)
    return digest.hexdigest()


def load_subject(args):
    """The Subject of --ckpt, --device and --dtype. Raises UserError."""
    device = pick_device(args.device)
    dtype, _ = pick_dtype(args.dtype, device)
    if args.out:                                           # before hours of work
        folder = Path(args.out).parent if args.out.endswith(".json") else Path(args.out)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise UserError(f"--out {args.out}: can't make the folder {folder} ({e.strerror})") from None
    path = Path(args.ckpt)
    if path.suffix == ".gguf" or (path / "config.json").is_file():
        from convert_dba import load_llama
        model, tokenizer = load_llama(path, device)
        weights = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
        return Subject(model, tokenizer, path.parent, None, file_hash(*weights), device, dtype)
    path = path / "best.pt" if path.is_dir() else path
    ckpt = load_checkpoint(path, device)
    return Subject(load_model(ckpt), ckpt["tokenizer"], path.parent, ckpt["step"], file_hash(path), device, dtype)


def held_out_tokens(args, subject):
    """(ids [N] int64, bytes of their text or None, hash) of --data: a .npy by prepare_fineweb.py or a text, else the
    validation part that the checkpoint was trained with."""
    if args.data is None:
        if subject.cfg.data is None:
            raise UserError("--data is missing: this model doesn't say what it was trained on")
        data = train_dba.load_data(subject.cfg)
        return torch.from_numpy(data.val.astype("int64")), data.val_bytes, data.sha256
    path = Path(args.data)
    if not path.is_file():
        raise UserError(f"--data {path} is not a file")
    if path.suffix == ".npy":
        ids, tokenizer, info = train_dba.open_token_file(path)
        if (tokenizer.name, tokenizer.vocab_size) != (subject.tokenizer.name, subject.tokenizer.vocab_size):
            raise UserError(f"{path} was made with {tokenizer.name}, {tokenizer.vocab_size} types; the model reads "
                            f"{subject.tokenizer.name}, {subject.tokenizer.vocab_size}")
        return torch.from_numpy(ids.astype("int64")), info["text_bytes"], info["sha256"]
    text = train_dba.read_text(path)
    ids = subject.tokenizer.encode(text)
    return torch.from_numpy(ids.astype("int64")), len(text.encode()), file_hash(path)


def cache_settings(subject, name):
    """{stream: format} of a --kv-cache. Raises UserError where it doesn't fit the model."""
    formats = cache_formats(subject.cfg, name)
    if formats is None:
        raise UserError(f"--kv-cache {name} doesn't fit {subject.cfg.attn_mode} attention")
    return formats


def result_path(args, subject, name):
    """--out, or eval_<name>.json in the folder that --out names, or beside the checkpoint."""
    out = Path(args.out or subject.folder)
    return out if out.suffix == ".json" else out / f"eval_{name}.json"


def write_result(args, subject, name, table, **result):
    """Print a table, (head, rows), and write eval_<name>.json."""
    out = result_path(args, subject, name)
    settings = {key: value for key, value in vars(args).items() if key not in ("run", "out")}
    model = dict(step=subject.step, sha256=subject.sha256, config=dataclasses.asdict(subject.cfg))
    whole = dict(settings=settings, model=model, env=provenance(subject.device), **result)
    train_dba.write_whole(out, lambda temporary: temporary.write_text(json.dumps(whole, indent=1) + "\n"))
    columns = [list(map(str, column)) for column in zip(*table)] if len(table) > 1 else []
    widths = [max(map(len, column)) for column in columns]
    for row in table:
        print("  ".join(str(cell).rjust(width) for cell, width in zip(row, widths)))
    print(f"written to {out}")


# -----------------------------------------------------------------------------
# Flags that commands share

def positive(least=1):
    """Type of a flag: a whole number of at least `least`."""
    def parse(text):
        if (value := int(text)) < least:
            raise argparse.ArgumentTypeError(f"{value} must be at least {least}")
        return value
    return parse


def number(text):
    """Type of a flag: a finite number of at least 0."""
    if not 0 <= (value := float(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"{text} must be a finite number of at least 0")
    return value


def flags(parser, data=False):
    parser.add_argument("--ckpt", required=True, help="run folder, checkpoint, .gguf or Hugging Face folder")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="float32", choices=("auto", "float32", "bfloat16", "float16"))
    parser.add_argument("--out", help="file.json, or folder of eval_<command>.json (the checkpoint's)")
    if data:
        parser.add_argument("--data", help=".npy or text (the checkpoint's validation part)")


def cache_flags(parser, several=False):
    parser.add_argument("--kv-cache", choices=(*FORMATS, "hetero"), **(
        dict(nargs="+", default=["fp16"]) if several else dict(default="fp16")))
    parser.add_argument("--kv-residual", type=positive(0), default=0, help="newest tokens that stay fp16 (0)")
    parser.add_argument("--kv-rotate", action="store_true", help="rotate what is cached without RoPE")


# -----------------------------------------------------------------------------
# ppl

def windows(ids, block, stride):
    """Yield (start, ids [block + 1], first) over ids [N]: each token but the first is scored once, tokens from `first`
    on in its window, with at least block - stride tokens before it wherever the text has them."""
    scored = 1                                             # tokens before this one have been scored, or can't be
    for start in range(0, len(ids) - 1, stride):
        window = ids[start:start + block + 1]
        yield start, window, scored - start
        scored = start + len(window)
        if scored == len(ids):
            return


@torch.inference_mode()
def window_nll(subject, batch, formats, residual, kernel=None):
    """nll [B, T - 1] of token ids [B, T] in nats, each row through a cache of its own."""
    cache = KVCache(subject.cfg, len(batch), batch.size(1) - 1, formats, residual, subject.device, kernel)
    nll = []
    with autocast(subject.device, subject.dtype):
        for x, y in zip(*(ids.split(train_dba.PREFILL_CHUNK, 1) for ids in (batch[:, :-1], batch[:, 1:]))):
            logits = subject.model.logits(subject.model.hidden(x, cache))
            nll.append(torch.nn.functional.cross_entropy(logits.mT, y, reduction="none"))
    return torch.cat(nll, 1)


def mean_nll(args, subject, formats, ids, block, stride):
    """(mean nll in nats of all but the first of token ids [N], how many that are), through a cache of these formats."""
    parts, total, count = list(windows(ids, block, stride)), 0.0, 0
    full = [part for part in parts if len(part[1]) == block + 1]
    groups = [full[i:i + args.batch_size] for i in range(0, len(full), args.batch_size)]
    bar = tqdm(total=len(ids) - 1, unit="tok", unit_scale=True, dynamic_ncols=True)
    for group in groups + [[part] for part in parts if len(part[1]) <= block]:
        batch = torch.stack([ids for _, ids, _ in group]).to(subject.device)
        nll = window_nll(subject, batch, formats, args.kv_residual)
        for row, (_, _, first) in zip(nll.double(), group):
            total += row[first - 1:].sum().item()
            count += len(row) - first + 1
        bar.update(count - bar.n)
    bar.close()
    return total / count, count


def ppl_flags(p):
    flags(p, data=True)
    cache_flags(p, several=True)
    p.add_argument("--block", type=positive(2), help="tokens of a window (the model's context)")
    p.add_argument("--stride", type=positive(), help="tokens between windows (half a window)")
    p.add_argument("--batch-size", type=positive(), default=8, help="windows at once (8)")
    p.add_argument("--max-tokens", type=positive(2), help="measure only the first so many tokens")


def ppl(args):
    """Held-out loss, perplexity and bits per byte over a whole file, through a cache of any format."""
    subject = load_subject(args)
    caches = {name: cache_settings(subject, name) for name in args.kv_cache}
    if len(caches) > 1 and args.out and args.out.endswith(".json"):
        raise UserError("--out names one file, --kv-cache several caches; name a folder")
    if args.kv_rotate:
        rotate_cache(subject.model)
    block = args.block or subject.cfg.block
    stride = args.stride or max(1, block // 2)
    if stride > block:
        raise UserError(f"--stride {stride} is longer than the window of {block} tokens")
    ids, text_bytes, data_hash = held_out_tokens(args, subject)
    if len(ids) < 2:
        raise UserError(f"{len(ids)} tokens to measure: nothing to predict")
    whole = args.max_tokens is None or args.max_tokens >= len(ids)
    for cache, formats in caches.items():
        loss, count = mean_nll(args, subject, formats, ids if whole else ids[:args.max_tokens], block, stride)
        if not math.isfinite(loss):
            raise UserError(f"the loss is {loss}: a broken checkpoint, or a cache format that can't hold its values")
        bpb = loss / math.log(2) * count / text_bytes if text_bytes and whole else None
        name = cache + "_rotated" * args.kv_rotate + (f"_residual{args.kv_residual}" if args.kv_residual else "")
        n = bytes_per_token(subject.cfg, formats)
        write_result(args, subject, f"ppl_{name}", [
            ("cache", "B/token", "tokens", "loss", "perplexity", "bits/byte"),
            (name, n, count, f"{loss:.5f}", f"{math.exp(loss):.4f}", "-" if bpb is None else f"{bpb:.4f}")],
            loss=loss, ppl=math.exp(loss), bpb=bpb, tokens=count, block=block, stride=stride, formats=formats,
            bytes_per_token=n, data_sha256=data_hash)


# -----------------------------------------------------------------------------
# Time and memory of a device

COMPARED = ("fp16", "q8_0", "q4_0", "hetero")              # cache formats, where they fit the model
WARM_UP = 8                                                # decode steps that aren't measured: kernels are compiled
COPY_BYTES = 2**29


def compared_formats(args, subject):
    """{name: {stream: format}} of --formats; fp16, which others are compared with, comes first. Raises UserError."""
    cfg, names = subject.cfg, args.formats or [name for name in COMPARED if cache_formats(subject.cfg, name)]
    if "hetero" in names and cache_formats(cfg, "hetero") is None:
        raise UserError(f"--formats hetero doesn't fit {cfg.attn_mode} attention")
    return {name: cache_formats(cfg, name) for name in dict.fromkeys(("fp16", *names))}


def new_cache(subject, tokens, formats, residual=0, kernel=None):
    """A KVCache for one sequence. Raises UserError where there is no memory for it."""
    try:
        return KVCache(subject.cfg, 1, tokens, formats, residual, subject.device, kernel)
    except RuntimeError as e:
        raise UserError(f"no memory for a KV cache of {tokens:,} tokens ({str(e).splitlines()[0]})") from None


def warn_past_context(subject, tokens):
    if tokens > subject.cfg.block:
        print(f"warning: {tokens:,} tokens go past the {subject.cfg.block:,} of the model's context: positions that it "
              "hasn't seen", file=sys.stderr)


def read_prompt(model, ids, cache, chunk=train_dba.PREFILL_CHUNK):
    """Hidden states of the last chunk of ids [1, T], all of which the cache then holds."""
    for part in ids.split(chunk, 1):
        h = model.hidden(part, cache)
    return h


def likeliest(model, h):
    """The token [1, 1] that most likely follows hidden states [1, T, E], on their device."""
    return train_dba.pick_token(model.logits(h[:, -1]), 0, None, None, None).to(h.device)


def decode_step(model, token, cache):
    return likeliest(model, model.hidden(token, cache))


def timed(device, call, *args):
    """(what the call returns, its seconds); the device is idle before and after."""
    synchronize(device)
    started = time.perf_counter()
    result = call(*args)
    synchronize(device)
    return result, time.perf_counter() - started


def copy_rate(device):
    """Bytes per second, read and written, of a copy of a large buffer."""
    x = torch.zeros(COPY_BYTES, dtype=torch.uint8, device=device)
    y = x.clone()
    return 2 * COPY_BYTES / statistics.median(timed(device, y.copy_, x)[1] for _ in range(7))


def weight_bytes(subject):
    """Bytes of weights that a decode step reads: matrices in the type of the products, others as they are stored."""
    return sum(p.numel() * (subject.dtype.itemsize if p.dim() == 2 else p.element_size())
               for p in subject.model.parameters())


def resident(name):
    """VmRSS (now) or VmHWM (peak) of this process in bytes; Linux."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def forget_peak(device):
    """Bytes held now, from which peak_since() counts anew: what PyTorch allocated on a CUDA device, what is resident of
    this process on a Linux CPU; None where neither can be known."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    if device.type != "cpu" or sys.platform != "linux":
        return None
    if platform.libc_ver()[0] == "glibc":                  # give back what was freed, or it would count as held
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:                                        # some containers forbid it
        return None
    return resident("VmRSS")


def peak_since(device):
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident("VmHWM")


def available_memory(device):
    """Bytes that can still be had on a device; all of the machine's memory where it doesn't tell."""
    if device.type == "cuda":
        pooled = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + pooled
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    meminfo, cgroup = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
    room = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if meminfo.is_file():
        lines = meminfo.read_text().splitlines()
        room = int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) * 1024
    if (cgroup / "memory.max").is_file():                  # a container's limit
        limit, used = ((cgroup / f"memory.{name}").read_text().strip() for name in ("max", "current"))
        room = room if limit == "max" else min(room, int(limit) - int(used))
    return room


# -----------------------------------------------------------------------------
# latency

@dataclass
class Run:
    """A cache that is timed beside others. token [1, 1]: the newest, not yet in the cache; times in seconds."""
    cache: KVCache
    why: str
    token: torch.Tensor | None = None
    prefill: list = field(default_factory=list)
    first_token: list = field(default_factory=list)
    steps: list = field(default_factory=list)


@torch.inference_mode()
def decode_times(subject, prompt, formats, args):
    """{name: Run} after a prompt [1, T] and decode steps at which all caches take turns, so that a change of the
    machine's speed meets them all."""
    model, device, runs = subject.model, subject.device, {}
    total = prompt.size(1) + WARM_UP + args.steps
    kernel, why = resolve_kernel(args.kernel, device)
    for name, each in formats.items():
        runs[name] = Run(new_cache(subject, total, each, kernel=kernel), why)
    with autocast(device, subject.dtype):                  # around all, so that weights are cast once
        for run in runs.values():
            read_prompt(model, prompt[:, :train_dba.PREFILL_CHUNK], run.cache)
        for run in list(runs.values()) * args.prefills:
            run.cache.truncate(0)
            h, seconds = timed(device, read_prompt, model, prompt, run.cache)
            run.token, more = timed(device, likeliest, model, h)
            run.prefill.append(seconds)
            run.first_token.append(seconds + more)
        for run in list(runs.values()) * (WARM_UP + args.steps):
            run.token, seconds = timed(device, decode_step, model, run.token, run.cache)
            run.steps.append(seconds)
    return runs


def latency_row(subject, prompt, name, run, steps, fp16_ms, rate):
    """Figures of one cache after a prompt of so many tokens. share_of_copy compares the bytes that a step must read per
    second with `rate`, those of a copy; above 1, some of them stay in the processor's caches."""
    times = [1000 * s for s in run.steps[WARM_UP:]]
    ms, seen = statistics.median(times), prompt + WARM_UP + (steps + 1) / 2     # tokens that the middle step sees
    read = weight_bytes(subject) + seen * bytes_per_token(subject.cfg, name)
    return dict(prompt=prompt, cache=name, kernel=run.cache.kernel.name, kernel_why=run.why, ms_per_token=ms,
                ms_min=min(times), ms_max=max(times), tokens_per_second=1000 / ms, ratio_to_fp16=ms / fp16_ms,
                prefill_seconds=statistics.median(run.prefill), bytes_read_per_token=read,
                first_token_seconds=statistics.median(run.first_token), share_of_copy=read / ms * 1000 / rate,
                copy_bytes_per_second=rate)


def latency_flags(p):
    flags(p)
    p.add_argument("--prompts", type=positive(), nargs="+", default=[128, 512, 2048, 8192], help="their tokens")
    p.add_argument("--formats", nargs="+", choices=(*FORMATS, "hetero"), help=f"of the cache ({' '.join(COMPARED)})")
    p.add_argument("--kernel", default="auto", choices=("auto", "torch", "triton", "metal"))
    p.add_argument("--steps", type=positive(), default=64, help="decode steps (64)")
    p.add_argument("--prefills", type=positive(), default=3, help="times that a prompt is read (3)")


def latency(args):
    """Time of cached decoding, per format of the cache and length of the prompt."""
    train_dba.keep_freed_memory()                          # as sampling does
    subject = load_subject(args)
    formats, longest = compared_formats(args, subject), max(args.prompts)
    warn_past_context(subject, longest + WARM_UP + args.steps)
    ids = torch.randint(subject.model.vocab_size, (1, longest), generator=torch.Generator().manual_seed(0))
    rows = []
    for prompt in tqdm(args.prompts, unit="prompt", dynamic_ncols=True):
        runs = decode_times(subject, ids[:, :prompt].to(subject.device), formats, args)
        rate = copy_rate(subject.device)                   # each time, as the machine may be shared
        fp16_ms = 1000 * statistics.median(runs["fp16"].steps[WARM_UP:])
        rows += [latency_row(subject, prompt, name, run, args.steps, fp16_ms, rate) for name, run in runs.items()]
    write_result(args, subject, "latency", [
        ("prompt", "cache", "kernel", "prefill s", "first token s", "ms/token", "tokens/s", "x fp16", "of copy rate"),
        *((r["prompt"], r["cache"], r["kernel"], f"{r['prefill_seconds']:.3f}", f"{r['first_token_seconds']:.3f}",
           f"{r['ms_per_token']:.3f}", f"{r['tokens_per_second']:.1f}", f"{r['ratio_to_fp16']:.3f}",
           f"{r['share_of_copy']:.3f}") for r in rows)],
        weight_bytes=weight_bytes(subject), warm_up_steps=WARM_UP, rows=rows)


# -----------------------------------------------------------------------------
# memory

@torch.inference_mode()
def memory_row(subject, tokens, name, formats, args):
    """Bytes of a cache of so many tokens, and the peak while they are read and while the last of them are decoded."""
    model, device = subject.model, subject.device
    ids = torch.zeros(1, tokens, dtype=torch.long, device=device)
    kernel, _ = resolve_kernel(args.kernel, device)
    with autocast(device, subject.dtype):                  # first without a cache of size, so that weights are cast
        warm = ids[:, :2 * train_dba.PREFILL_CHUNK]
        read_prompt(model, warm, new_cache(subject, warm.size(1), formats))
        before = forget_peak(device)
        cache = new_cache(subject, tokens, formats, args.kv_residual, kernel)
        read_prompt(model, ids[:, 2 * WARM_UP:], cache)
        fill = before and peak_since(device)
        for _ in range(WARM_UP):                           # compiling holds memory from here on
            decode_step(model, ids[:, :1], cache)
        held = forget_peak(device)
        for _ in range(WARM_UP):
            decode_step(model, ids[:, :1], cache)
        decode = held and peak_since(device)
    owned, formula = cache.nbytes(), cache_bytes(subject.cfg, 1, tokens, formats, args.kv_residual)
    return dict(tokens=tokens, cache=name, kernel=kernel.name, formula_bytes=formula, cache_bytes=owned,
                bytes_per_token=bytes_per_token(subject.cfg, formats), before_bytes=before, fill_peak_bytes=fill,
                fill_extra_bytes=before and fill - before - owned, decode_peak_bytes=decode,
                decode_extra_bytes=held and decode - held)


def memory_flags(p):
    flags(p)
    p.add_argument("--tokens", type=positive(4 * WARM_UP), nargs="+", default=[512, 1024, 2048, 4096, 8192, 16384],
                   help="lengths of the cache")
    p.add_argument("--formats", nargs="+", choices=(*FORMATS, "hetero"), help=f"of the cache ({' '.join(COMPARED)})")
    p.add_argument("--kv-residual", type=positive(0), default=0, help="newest tokens that stay fp16 (0)")
    p.add_argument("--kernel", default="auto", choices=("auto", "torch", "triton", "metal"))


def memory(args):
    """Memory of the cache by formula and as measured, per format and number of tokens."""
    subject = load_subject(args)
    formats = compared_formats(args, subject)
    warn_past_context(subject, max(args.tokens))
    cases = [(tokens, name) for tokens in args.tokens for name in formats]
    rows = [memory_row(subject, tokens, name, formats[name], args) for tokens, name in tqdm(cases, dynamic_ncols=True)]
    write_result(args, subject, "memory", [
        ("tokens", "cache", "B/token", "cache MiB", "by formula", "peak MiB", "beside it, prompt", "decode step"),
        *((r["tokens"], r["cache"], r["bytes_per_token"], mib(r["cache_bytes"]), mib(r["formula_bytes"]),
           mib(r["fill_peak_bytes"]), mib(r["fill_extra_bytes"]), mib(r["decode_extra_bytes"])) for r in rows)],
        what="CUDA: allocated by PyTorch; Linux CPU: resident; null: can't be measured here", rows=rows)


def mib(n):
    return "-" if n is None else f"{n / 2**20:.2f}"


# -----------------------------------------------------------------------------
# sweep

def margin(subject, chunk):
    """Bytes to leave free beside a cache, generously: float32 scores of a chunk of tokens against a part of the cache,
    activations and logits of the chunk, and 256 MiB for what else is allocated and compiled."""
    cfg, shape = subject.cfg, subject.cfg.attention
    scores = max(train_dba.DECODE_CHUNK, cfg.n_head * chunk * train_dba.CACHE_BLOCK)
    widths = 4 * cfg.d_model + 3 * cfg.d_ff + 4 * (cfg.n_head * shape.v_width + sum(shape.streams.values()))
    return 4 * (6 * scores + chunk * (widths + 4 * subject.model.vocab_size)) + 2**28


@torch.inference_mode()
def sweep_row(subject, ids, formats, args):
    """Figures of one context: ids [1, N + 1], of which the cache reads N, before decode steps. status: ok, or what went
    wrong."""
    model, device, context, seconds = subject.model, subject.device, ids.size(1) - 1, 0.0
    total = context + args.steps
    kernel, _ = resolve_kernel(args.kernel, device)
    cache, times = new_cache(subject, total, formats, args.kv_residual, kernel), []
    row = dict(context=context, kernel=kernel.name, cache_bytes=cache.nbytes())
    late = f"stopped: --max-seconds {args.max_seconds} were over"
    with autocast(device, subject.dtype):
        for x, y in zip(ids[:, :-1].split(args.chunk, 1), ids[:, 1:].split(args.chunk, 1)):
            h, more = timed(device, model.hidden, x, cache)
            seconds += more
            if seconds > args.max_seconds:
                return {**row, "status": f"{late} after {cache.length.item():,} tokens"}
        loss = torch.nn.functional.cross_entropy(model.logits(h)[0], y[0]).item()
        token = likeliest(model, h)
        for _ in range(args.steps):
            token, more = timed(device, decode_step, model, token, cache)
            times.append(more)
            if seconds + sum(times) > args.max_seconds:
                return {**row, "prefill_seconds": seconds, "loss": loss, "status": f"{late} after {len(times)} steps"}
    return dict(row, prefill_seconds=seconds, loss=loss, ms_per_token=1000 * statistics.median(times),
                decode_seconds=sum(times), status="ok" if math.isfinite(loss) else f"the loss is {loss}")


def sweep_rows(subject, ids, formats, args):
    """Yield the rows of all contexts, shortest first; one that can't or shouldn't run says why."""
    stopped, spare = None, margin(subject, args.chunk)
    for context in sorted(set(args.contexts)):
        need = cache_bytes(subject.cfg, 1, context + args.steps, formats, args.kv_residual) + spare
        room = available_memory(subject.device)
        if stopped:
            yield dict(context=context, status=f"not run: {stopped:,} tokens took more than the {args.max_seconds} s "
                                               "of --max-seconds")
        elif need > room:
            yield dict(context=context, status=f"not run: needs {need:,} bytes, a margin of {spare:,} among them, of "
                                               f"which {room:,} are free")
        else:
            try:
                row = sweep_row(subject, ids[None, :context + 1].to(subject.device), formats, args)
            except (UserError, torch.OutOfMemoryError) as e:
                row = dict(context=context, status=f"failed: {str(e).splitlines()[0]}")
            stopped = context if row["status"].startswith("stopped") else None
            yield row


def sweep_flags(p):
    flags(p, data=True)
    cache_flags(p)
    p.add_argument("--contexts", type=positive(), nargs="+", help="tokens of the prompts (2048, 4096, ... 131072)",
                   default=[2**n for n in range(11, 18)])
    p.add_argument("--chunk", type=positive(), default=1024, help="prompt tokens per forward pass (1024)")
    p.add_argument("--steps", type=positive(), default=128, help="decode steps (128)")
    p.add_argument("--kernel", default="auto", choices=("auto", "torch", "triton", "metal"))
    p.add_argument("--max-seconds", type=number, default=600, help="of a context; longer ones are not run (600)")


def sweep(args):
    """How prompts up to very long ones go: time of the prompt and of decoding, loss at its end, or why it failed."""
    train_dba.keep_freed_memory()
    subject = load_subject(args)
    formats, longest = cache_settings(subject, args.kv_cache), max(args.contexts)
    if args.kv_rotate:
        rotate_cache(subject.model)
    ids, _, data_hash = held_out_tokens(args, subject)
    if len(ids) < 2:
        raise UserError(f"{len(ids)} tokens to measure: nothing to predict")
    warn_past_context(subject, longest + args.steps)
    repeats = -(-(longest + 1) // len(ids))
    if repeats > 1:
        print(f"warning: the text has {len(ids):,} tokens and is repeated, so that losses past them are of text seen "
              "before", file=sys.stderr)
    rows = []
    for row in sweep_rows(subject, ids.repeat(repeats), formats, args):
        rows.append(row)
        tqdm.write(f"{row['context']:,} tokens: {row['status']}", file=sys.stderr)
    cells = (("prefill_seconds", ".2f"), ("ms_per_token", ".3f"), ("loss", ".4f"))
    write_result(args, subject, "sweep", [
        ("context", "cache MiB", "prefill s", "ms/token", "loss of last chunk", "status"),
        *((r["context"], mib(r.get("cache_bytes")),
           *(format(r[name], how) if name in r else "-" for name, how in cells), r["status"]) for r in rows)],
        formats=formats, margin_bytes=margin(subject, args.chunk), text_tokens=len(ids), text_repeated=repeats > 1,
        data_sha256=data_hash, rows=rows)


# -----------------------------------------------------------------------------
# policy

FOUR_BITS = ("q4_0", "q4_sym", "nf4")
RESIDUALS = (32, 128)                                      # tried where they are at most a quarter of the context
CHECKS = ("delta_nll", "kl", "max_delta_logit")


@dataclass(frozen=True)
class Policy:
    """What a cache may be: a format per stream, as (stream, format) pairs, rotation, and newest tokens in fp16."""
    formats: tuple[tuple[str, str], ...]
    rotate: bool = False
    residual: int = 0

    def bytes_per_token(self, cfg):
        """Mean bytes of a token in a full context, the residual window with the rest."""
        newest = tuple((name, train_dba.ring_format(fmt)) for name, fmt in self.formats)
        old, new = (bytes_per_token(cfg, dict(formats)) for formats in (self.formats, newest))
        return (old * (cfg.block - self.residual) + new * self.residual) / cfg.block

    def __str__(self):
        return (", ".join(map(" ".join, self.formats)) + ", rotated" * self.rotate
                + (f", {self.residual} newest fp16" if self.residual else ""))


def single_streams(streams):
    """Policies that quantise one stream and leave the others fp16."""
    return [Policy(tuple((name, fmt if name == one else "fp16") for name in streams), rotate)
            for rotate in (False, True) for one in streams for fmt in ("q8_0", *FOUR_BITS)]


def mixes(streams, tried):
    """Policies that mix fp16, q8_0 and, per stream, the 4 bits that did best alone (by KL, which is less noisy than
    nll); hetero, and hetero with the paths swapped."""
    def best(stream, rotate):
        alone = [policy for policy in tried if policy.rotate == rotate and dict(policy.formats)[stream] in FOUR_BITS]
        return dict(min(alone, key=lambda policy: tried[policy]["kl"]).formats)[stream]

    special = [HETERO, {**HETERO, "k_sem": HETERO["k_geo"], "k_geo": HETERO["k_sem"]}]
    found = [tuple(formats.items()) for formats in special if formats.keys() == streams.keys()]
    for rotate in (False, True):
        choices = [[(name, fmt) for fmt in ("fp16", "q8_0", best(name, rotate))] for name in streams]
        yield from (Policy(formats, rotate) for formats in [*itertools.product(*choices), *found])


@torch.inference_mode()
def policy_logits(subject, model, ids, policy, last):
    """Logits [B, last, V] at the last positions of ids [B, T]. With a residual window the text is read in pieces of an
    eighth of it, since only tokens at the end of a piece leave it as decoding would; never less is quantised."""
    cache = KVCache(subject.cfg, len(ids), ids.size(1), dict(policy.formats), policy.residual, subject.device)
    with autocast(subject.device, subject.dtype):
        pieces = ids.split(max(1, policy.residual // 8) if policy.residual else train_dba.PREFILL_CHUNK, 1)
        h = torch.cat([model.hidden(piece, cache) for piece in pieces], 1)[:, -last:]
        return model.logits(h)


def compare_logits(expected, logits, targets):
    """[3, B] per sequence of logits [B, T, V] and targets [B, T]: difference in mean nll, mean KL, and the largest
    difference of a logit."""
    p, q = expected.log_softmax(-1), logits.log_softmax(-1)
    nll = (p - q).gather(-1, targets[..., None])[..., 0].double().mean(1)
    kl = (p.exp() * (p - q)).sum(-1).double().mean(1)
    return torch.stack([nll, kl, (expected - logits).double().abs().amax((1, 2))]).cpu()


def measure_policies(subject, rotated, policies, windows, last, batch_size):
    """{policy: measurements} against the fp16 cache, on the last tokens of windows [n, T + 1]: all that they see,
    beyond a residual window, has been quantised."""
    fp16 = Policy(tuple((name, "fp16") for name in subject.cfg.attention.streams))
    parts = {policy: [] for policy in policies}
    bar = tqdm(total=len(windows) * len(parts), unit="window", dynamic_ncols=True, leave=False)
    for batch in windows.to(subject.device).split(batch_size):
        expected = policy_logits(subject, subject.model, batch[:, :-1], fp16, last)
        for policy in parts:
            model = rotated if policy.rotate else subject.model
            logits = policy_logits(subject, model, batch[:, :-1], policy, last)
            parts[policy].append(compare_logits(expected, logits, batch[:, -last:]))
            bar.update(len(batch))
    bar.close()
    found = {}
    for policy, columns in parts.items():
        nll, kl, logit = torch.cat(columns, 1).nan_to_num(math.inf, math.inf, -math.inf)          # [n] each
        error = (nll.std() / math.sqrt(len(nll))).item() if len(nll) > 1 else None
        found[policy] = dict(delta_nll=nll.mean().item(), standard_error=error, kl=kl.mean().item(),
                             max_delta_logit=logit.max().item(), tokens=last * len(nll))
    return found


def calibration_windows(ids, count, length):
    """[count, length + 1] token ids, spread evenly over ids [N]. Raises UserError for a text that is too short."""
    if len(ids) <= length:
        raise UserError(f"{len(ids):,} tokens are too few for a window of {length:,}; give a longer --data")
    starts = torch.linspace(0, len(ids) - length - 1, count).long().tolist()
    return torch.stack([ids[start:start + length + 1] for start in starts])


def frontier(sizes, tried):
    """Policies that no other beats: none has fewer bytes (sizes: {policy: bytes}) and a nll that is no higher, or as
    many bytes and a lower nll."""
    best, found = math.inf, []
    for policy in sorted(tried, key=lambda policy: (sizes[policy], tried[policy]["delta_nll"])):
        if tried[policy]["delta_nll"] < best:
            best = tried[policy]["delta_nll"]
            found.append(policy)
    return found


def search_policies(subject, measure, most_bytes):
    """{policy: measurements}, in three rounds: one stream at a time, mixes of what did well, residual windows for the
    best of those. most_bytes: mixes of more bytes per token are left out. measure: policies -> measurements."""
    cfg, streams = subject.cfg, subject.cfg.attention.streams
    tried = measure(single_streams(streams))

    def new(policies):
        return [policy for policy in dict.fromkeys(policies) if policy not in tried and any(
            fmt not in train_dba.FLOAT_FORMATS for _, fmt in policy.formats)
            and policy.bytes_per_token(cfg) <= most_bytes]

    tried |= measure(new(mixes(streams, tried)))
    best = frontier({policy: policy.bytes_per_token(cfg) for policy in tried}, tried)
    tried |= measure(new(dataclasses.replace(policy, residual=residual) for policy in best
                         for residual in RESIDUALS if residual <= cfg.block // 4))
    return tried


def failures(measured, limits):
    """Names of the checks that are failed; a NaN fails."""
    return [name for name in CHECKS if name in limits and not measured[name] <= limits[name]]


def choose_policy(args, sizes, tried, limits, measure_long):
    """(the best policy that passes or None, {policy: long measurements}). A budget of bytes is used for the least nll,
    one of nll for the fewest bytes. measure_long: None, or policies -> measurements."""
    ok = [policy for policy in tried if not failures(tried[policy], limits)]
    long = {}
    if args.max_kv_bytes_per_token is None:
        order = sorted(ok, key=lambda policy: (sizes[policy], tried[policy]["delta_nll"]))
    else:
        order = sorted((policy for policy in ok if sizes[policy] <= args.max_kv_bytes_per_token),
                       key=lambda policy: (tried[policy]["delta_nll"], sizes[policy]))
    for policy in order:
        if measure_long is None:
            return policy, long
        long |= measure_long([policy])
        if not failures(long[policy], limits):
            return policy, long
    return None, long


def kernel_times(subject, policy, tokens):
    """{--kernel: median ms of a decode step at the end of so many tokens} for a policy's formats, or {} where `auto`
    is the torch path at that length."""
    if resolve_kernel("auto", subject.device)[0] == train_dba.TORCH:
        return {}
    times, steps = {}, 16
    prompt = torch.zeros(1, tokens - WARM_UP - steps, dtype=torch.long, device=subject.device)
    for name in ("auto", "torch"):
        how = argparse.Namespace(kernel=name, steps=steps, prefills=1)
        run = decode_times(subject, prompt, {name: dict(policy.formats)}, how)[name]
        times[name] = 1000 * statistics.median(run.steps[WARM_UP:])
    return times


def policy_table(args, sizes, tried, limits, chosen, long):
    """(head, rows) of all that was tried, fewest bytes first."""
    best, rows = frontier(sizes, tried), []
    for policy in sorted(tried, key=lambda policy: (sizes[policy], tried[policy]["delta_nll"])):
        measured, failed = tried[policy], failures(tried[policy], limits)
        failed += [f"long {name}" for name in failures(long[policy], limits)] if policy in long else []
        if sizes[policy] > (args.max_kv_bytes_per_token or math.inf):
            failed.append("bytes")
        mark = "frontier" * (policy in best) + " <- chosen" * (policy == chosen)
        rows.append((f"{sizes[policy]:.1f}", f"{measured['delta_nll']:+.6f}", f"{measured['kl']:.6f}",
                     f"{measured['max_delta_logit']:.3f}", policy, " ".join(failed) or "ok", mark))
    return [("B/token", "ΔNLL", "KL", "max |Δlogit|", "policy", "fails", ""), *rows]


def finite(measured):
    """Measurements as JSON may hold them."""
    return {name: value if value is None or math.isfinite(value) else None for name, value in measured.items()}


def policy_flags(p):
    flags(p, data=True)
    p.add_argument("--max-kv-bytes-per-token", type=positive(), help="budget: the least loss in so many bytes")
    p.add_argument("--max-delta-nll", type=number, help="budget: the fewest bytes for so much loss, nats per token")
    p.add_argument("--max-kl", type=number, default=0.02, help="largest mean KL of the next token (0.02)")
    p.add_argument("--max-delta-logit", type=number, help="largest difference of any logit (not limited)")
    p.add_argument("--tokens", type=positive(), default=16384, help="calibration tokens (16384)")
    p.add_argument("--long", action="store_true", help="check the choice on longer windows too")
    p.add_argument("--long-factor", type=positive(2), default=4, help="their length in contexts (4)")
    p.add_argument("--kernel-tokens", type=positive(64), default=8192, help="length at which kernels are timed (8192)")
    p.add_argument("--batch-size", type=positive(), default=8, help="windows at once (8)")


def policy(args):
    """Search for the cache policy that meets a budget, and write kv_policy.json, which --kv-cache auto reads."""
    if (args.max_delta_nll is None) == (args.max_kv_bytes_per_token is None):
        raise UserError("give one of --max-delta-nll and --max-kv-bytes-per-token")
    subject = load_subject(args)
    ids, _, data_hash = held_out_tokens(args, subject)
    block, rotated = subject.cfg.block, copy.deepcopy(subject.model)
    rotate_cache(rotated)
    limits = {name: getattr(args, f"max_{name.removeprefix('max_')}") for name in CHECKS}
    limits = {name: limit for name, limit in limits.items() if limit is not None}

    def check(length, last):
        windows = calibration_windows(ids, max(1, args.tokens // length), length)
        return lambda policies: measure_policies(subject, rotated, policies, windows, last, args.batch_size)

    measure_long = check(args.long_factor * block, block) if args.long else None
    tried = search_policies(subject, check(block, max(1, block // 2)), args.max_kv_bytes_per_token or math.inf)
    sizes = {policy: policy.bytes_per_token(subject.cfg) for policy in tried}
    chosen, long = choose_policy(args, sizes, tried, limits, measure_long)
    if chosen is None:
        least = min(tried, key=lambda policy: (tried[policy]["kl"], sizes[policy]))
        raise UserError(f"none of {len(tried)} policies passes; the nearest to the fp16 cache: {least}, "
                        f"{sizes[least]:g} bytes per token, ΔNLL {tried[least]['delta_nll']:+.6f}, "
                        f"KL {tried[least]['kl']:.6f}")
    if not (args.out and args.out.endswith(".json")):
        args.out = Path(args.out or subject.folder) / train_dba.POLICY_FILE
    times = kernel_times(subject, chosen, args.kernel_tokens)
    write_result(args, subject, "policy", policy_table(args, sizes, tried, limits, chosen, long),
                 checkpoint_sha256=subject.sha256, formats=dict(chosen.formats), rotate=chosen.rotate,
                 residual=chosen.residual, kernel=min(times, key=times.get, default="auto"), kernel_ms=times,
                 bytes_per_token=bytes_per_token(subject.cfg, dict(chosen.formats)),
                 bytes_per_token_with_residual=sizes[chosen], thresholds=limits, short=tried[chosen],
                 long=long.get(chosen), data_sha256=data_hash,
                 tried=[dict(formats=dict(p.formats), rotate=p.rotate, residual=p.residual, bytes_per_token=sizes[p],
                             **finite(tried[p]), long=finite(long[p]) if p in long else None) for p in tried])


# -----------------------------------------------------------------------------
# probes

PROBES = Path(__file__).with_name("probes.json")           # the literal cases
WORDS = ("barn bell bird boat bone cave clay coat crow dune dust fern fish flax frog gate goat gold hail hawk iron "
         "kelp kiln lamb lamp leaf lime lion loom mint moon moss moth nest nail pear pine plum pond rain reed rice "
         "rope rust salt sand seal ship silk snow soap star swan tide toad vine wind wolf wool yarn").split()
FILLER = ("The hedge was cut on Monday.", "Two men carried a table upstairs.", "It was too cold to swim.",
          "Her bicycle leaned on the fence.", "The train left without a sound.", "Dust lay on every shelf.",
          "Old maps hung in the hall.", "A dog slept under the bench.")
PROBE_RULES = {
    "exact": "the first line of the output, white space squeezed, is the target",
    "content": "the target's words (runs of letters and digits, case ignored) follow each other in the output, with at "
               "most 2 words before them",
    "preferred": "margin > 0; margin: log p(target) - log p(distractor) after the prompt, teacher-forced, summed, nats",
    "loop": "the output, white space squeezed, ends in a unit that stands there at least 3 times in a row, in 16 "
            "characters or more; its last copy may be cut off",
    "interval": "Wilson, 95 %",
    "compare": "exact McNemar test, two-sided, over the cases in which the two results differ",
}
PROBE_CHECKS = ("exact", "content", "preferred", "loop")


# --- templates: a random generator -> prompt, target, distractor. Target and distractor have as many characters.

def copy_template(form):
    """Lists to copy, in the form that form(items) gives them: two of words, then one of codes."""
    def make(rng):
        first, second = rng.sample(WORDS, 3), rng.sample(WORDS, 3)
        codes = [rng.choice("BCDFGHJKLMNPQRSTVWXZ") + str(rng.randrange(100, 1000)) for _ in range(3)]
        shown = [form(items) for items in (first, second, codes)]
        lines = [f"seen: {text}\ntold: {text}\n" for text in shown[:2]]
        return f"{''.join(lines)}seen: {shown[2]}\ntold:", shown[2], shown[rng.randrange(2)]
    return make


def repeat_template(rng):
    words = rng.sample(WORDS, 5)
    cut = rng.randrange(3)                                 # so many words are given away
    again, rest = " ".join(["again:", *words[:cut]]), words[cut:]
    return f"once: {' '.join(words)}\n{again}", " ".join(rest), " ".join(rest[::-1])


def spelling_template(rng):
    words = rng.sample([word for word in WORDS if word[1] != word[2]], 3)
    spelled = ["-".join(word) for word in words]
    wrong = "-".join(words[2][i] for i in (0, 2, 1, 3))
    return f"{words[0]}: {spelled[0]}\n{words[1]}: {spelled[1]}\n{words[2]}:", spelled[2], wrong


def near(rng, number):
    """A number beside `number` that has as many digits."""
    return rng.choice([n for n in (number - 1, number + 1) if n >= 0 and len(str(n)) == len(str(number))])


def arithmetic_template(rng):
    pairs = [(rng.randrange(2, 50), rng.randrange(2, 50)) for _ in range(3)]
    a, b = pairs[2]
    shown = "".join(f"{x} + {y} = {x + y}\n" for x, y in pairs[:2])
    return f"{shown}{a} + {b} =", a + b, near(rng, a + b)


def counting_template(rng):
    (a, b), word = rng.sample(range(2, 10), 2), rng.choice(WORDS)
    other = rng.choice([n for n in range(2, 10) if n not in (a, b)])
    lines = [f"{' '.join([word] * n)}: {n}\n" for n in (a, other)]
    return f"{''.join(lines)}{' '.join([word] * b)}:", b, a


def passkey_template(rng):
    key, other = (str(n) for n in rng.sample(range(10_000, 100_000), 2))
    text = " ".join(rng.sample(FILLER, rng.randrange(2, 6)))
    lines = rng.sample([f"Door code: {key}\n", f"Safe code: {other}\n"], 2)
    return f"{''.join(lines)}{text}\nDoor code:", key, other


def pattern_template(rng):
    rows = [(rng.randrange(1, 10), step) for step in rng.sample(range(2, 10), 3)]
    shown = [", ".join(str(start + i * step) for i in range(4)) for start, step in rows]
    answer = [start + 4 * step for start, step in rows]
    lines = [f"{text}, next {n}\n" for text, n in zip(shown[:2], answer)]
    return f"{''.join(lines)}{shown[2]}, next", answer[2], near(rng, answer[2])


def identity_template(rng):
    words = rng.sample(WORDS, 4)
    lines = [f"same({word}) = {word}\n" for word in words[:3]]
    return f"{''.join(lines)}same({words[3]}) =", words[3], words[rng.randrange(3)]


TEMPLATES = {
    "copy": copy_template(" ".join),
    "copy_commas": copy_template(", ".join),
    "copy_brackets": copy_template(lambda items: " ".join(f"[{item}]" for item in items)),
    "repeat": repeat_template,
    "spelling": spelling_template,
    "arithmetic": arithmetic_template,
    "counting": counting_template,
    "passkey": passkey_template,
    "pattern": pattern_template,
    "identity": identity_template,
}


def probe_cases(instances, seed):
    """The literal cases, then `instances` different ones of each template: dicts of set, name, kind, prompt, target and
    distractor, the latter two with the space that the prompt leaves to them."""
    try:
        literal = json.loads(PROBES.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise UserError(f"can't read the cases in {PROBES.name} beside eval_dba.py ({type(e).__name__})") from None
    cases = [dict(case, set="literal") for case in literal]
    for kind, template in TEMPLATES.items():
        rng, made = random.Random(f"{kind} {seed}"), {}
        while len(made) < instances:
            prompt, target, distractor = template(rng)
            made[prompt] = dict(kind=kind, prompt=prompt, target=f" {target}", distractor=f" {distractor}")
        cases += [dict(case, set="template") for case in made.values()]
    count = collections.Counter()
    for case in cases:
        count[case["set"], case["kind"]] += 1
        case["name"] = f"{case['kind']} {count[case['set'], case['kind']]}"
    return cases


# --- judging an output

def squeeze(text):
    return " ".join(text.split())


def exact_match(output, target):
    return squeeze(output.partition("\n")[0]) == squeeze(target)


def content_match(output, target):
    found, wanted = (re.findall(r"[^\W_]+", text.lower()) for text in (output, target))
    return any(found[i:i + len(wanted)] == wanted for i in range(3))


def in_loop(output):
    text = squeeze(output)
    for unit in range(1, len(text) // 3 + 1):
        same = 0                                           # characters at the end that are those one unit before
        while same < len(text) - unit and text[-1 - same] == text[-1 - same - unit]:
            same += 1
        if same + unit >= max(3 * unit, 16):
            return True
    return False


def wilson(hits, n, z=1.959964):
    """95 % interval of a share, by Wilson's score."""
    middle, half = hits + z * z / 2, z * math.sqrt(hits * (n - hits) / n + z * z / 4)
    return (middle - half) / (n + z * z), (middle + half) / (n + z * z)


def mcnemar(here, there):
    """Exact two-sided p that so uneven a split of the cases in which two results differ is chance."""
    tail = sum(math.comb(here + there, i) for i in range(min(here, there) + 1))
    return min(1.0, 2 * tail / 2**(here + there))


# --- running the cases

def equal_lengths(rows, most):
    """Yield lists of up to `most` indices of rows that are equally long."""
    same = collections.defaultdict(list)
    for i, row in enumerate(rows):
        same[len(row)].append(i)
    for group in same.values():
        yield from (group[i:i + most] for i in range(0, len(group), most))


def greedy_outputs(args, subject, formats, prompts):
    """The text that follows each prompt (token ids), likeliest token by token through the cache, up to the end of the
    document. A word tokenizer's end of a document is the end of a line, and is read on."""
    outputs, end = [None] * len(prompts), None if subject.tokenizer.name == "word" else subject.tokenizer.eot
    for group in tqdm(list(equal_lengths(prompts, args.batch_size)), desc="outputs", dynamic_ncols=True):
        batch = torch.tensor([prompts[i] for i in group], device=subject.device)
        cache = KVCache(subject.cfg, len(group), batch.size(1) + args.max_new_tokens - 1, formats, args.kv_residual,
                        subject.device)
        with autocast(subject.device, subject.dtype):
            new = list(train_dba.generate(subject.model, batch, args.max_new_tokens, cache, temperature=0))
        for i, ids in zip(group, torch.cat(new, 1).tolist()):
            ids = ids[:ids.index(end)] if end in ids else ids
            outputs[i] = subject.tokenizer.decode(ids).decode("utf-8", "replace")
    return outputs


def margins(args, subject, formats, triples):
    """log p(target) - log p(distractor) in nats, for triples of token ids: the prompt alone, with the target, with the
    distractor. Counted from the first token in which the three differ, wherever a tokenizer draws its borders."""
    rows, start = [row for _, *pair in triples for row in pair], []
    for triple in triples:
        start += [max(1, len(os.path.commonprefix(triple)))] * 2
    score = [0.0] * len(rows)
    for group in tqdm(list(equal_lengths(rows, args.batch_size)), desc="margins", dynamic_ncols=True):
        batch = torch.tensor([rows[i] for i in group], device=subject.device)
        for i, nll in zip(group, window_nll(subject, batch, formats, args.kv_residual)):
            score[i] = -nll[start[i] - 1:].double().sum().item()
    return [target - distractor for target, distractor in zip(score[::2], score[1::2])]


def run_cases(args, subject, formats, cases):
    """The cases, each with its output, margin, checks, and what may have made it unfair: tokens past the training
    context, words that the tokenizer doesn't know."""
    encode, unknown = (lambda text: subject.tokenizer.encode(text).tolist()), None
    if subject.tokenizer.name == "word":
        unknown = subject.tokenizer.ids[train_dba.UNK]
    triples = [[encode(case["prompt"] + more) for more in ("", case["target"], case["distractor"])] for case in cases]
    outputs = greedy_outputs(args, subject, formats, [triple[0] for triple in triples])
    results = []
    for case, triple, output, margin in zip(cases, triples, outputs, margins(args, subject, formats, triples)):
        if not math.isfinite(margin):
            raise UserError(f"{case['name']}: the margin is {margin}: a broken checkpoint, or a cache format that "
                            "can't hold its values")
        checks = dict(exact=exact_match(output, case["target"]), content=content_match(output, case["target"]),
                      preferred=margin > 0, loop=in_loop(output))
        results.append(dict(case, output=output, margin=margin, **checks, prompt_tokens=len(triple[0]),
                            unknown_words=sum(token == unknown for token in triple[1]),
                            past_context=max(map(len, triple)) > subject.cfg.block))
    return results


def probe_counts(results):
    """[{set, kind, n, and per check (hits, low, high); margin: the mean}] per kind, and over all of a set."""
    found = []
    for chosen in dict.fromkeys(r["set"] for r in results):
        cases = [r for r in results if r["set"] == chosen]
        for kind in (*dict.fromkeys(r["kind"] for r in cases), "all"):
            of_kind = [r for r in cases if kind in (r["kind"], "all")]
            hits = {check: sum(r[check] for r in of_kind) for check in PROBE_CHECKS}
            mean = statistics.mean(r["margin"] for r in of_kind)
            found.append(dict(set=chosen, kind=kind, n=len(of_kind), margin=mean,
                              **{check: (k, *wilson(k, len(of_kind))) for check, k in hits.items()}))
    return found


def read_checks(path, cases):
    """The checks of another eval_probes.json, {check: bool} for each of these cases."""
    key = operator.itemgetter("set", "name", "prompt", "target", "distractor")
    try:
        there = json.loads(Path(path).read_text(encoding="utf-8"))["cases"]
        checks = {key(r): {check: bool(r[check]) for check in PROBE_CHECKS} for r in there}
    except (OSError, *train_dba.BROKEN) as e:
        raise UserError(f"--compare {path} is not a result of probes ({type(e).__name__})") from None
    if checks.keys() != {key(case) for case in cases}:
        raise UserError(f"--compare {path} has other cases: give both commands the same --instances and --seed")
    return [checks[key(case)] for case in cases]


def probe_differences(results, others):
    """[{set, n, and per check (true here only, true there only, p)}] for the literal cases and for the templates."""
    found = []
    for chosen in dict.fromkeys(r["set"] for r in results):
        pairs = [(here, there) for here, there in zip(results, others) if here["set"] == chosen]
        splits = {check: (sum(here[check] > there[check] for here, there in pairs),
                          sum(here[check] < there[check] for here, there in pairs)) for check in PROBE_CHECKS}
        found.append(dict(set=chosen, n=len(pairs),
                          **{check: (*split, mcnemar(*split)) for check, split in splits.items()}))
    return found


# --- tables

def visible(text, most=48):
    """One line of printable ASCII: a line's end as \\n, other characters by their numbers, a long text cut."""
    text = text.encode("unicode_escape").decode().replace("\\\\", "\\")
    return text if len(text) <= most else text[:most - 3] + "..."


def markdown(text):
    return re.sub(r"([\\`*_{}\[\]<>#|~&$])", r"\\\1", text)


def latex(text):
    """Text in LaTeX, ASCII; no package is needed, no two characters join into another."""
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}",
               ">": r"\textgreater{}", "|": r"\textbar{}", '"': r"\char34{}", "-": "-{}", "'": "'{}", "`": "`{}",
               "[": "{[}", "]": "{]}", "?": "?{}", "!": "!{}", **{c: "\\" + c for c in "{}$&#_%"}}
    return "".join(special.get(c, c) for c in text)


def markdown_table(head, *rows):
    line = "| " + " | ".join("---" for _ in head) + " |"
    text = ["| " + " | ".join(markdown(str(cell)) for cell in row) + " |" for row in (head, *rows)]
    return "\n".join([text[0], line, *text[1:]]) + "\n"


def latex_table(head, *rows):
    text = [" & ".join(latex(str(cell)) for cell in row) + r" \\" for row in (head, *rows)]
    return "\n".join([rf"\begin{{tabular}}{{{'l' * len(head)}}}", r"\hline", text[0], r"\hline", *text[1:], r"\hline",
                      r"\end{tabular}"]) + "\n"


def count_table(counts, differences):
    """(head, *rows) of hits with their intervals in per cent, and of what the comparison found."""
    rows = [("cases", "kind", "n", *PROBE_CHECKS, "mean margin")]
    for c in counts:
        rows.append((c["set"], c["kind"], c["n"], *("{} ({:.0f}-{:.0f} %)".format(
            c[check][0], *(100 * x for x in c[check][1:])) for check in PROBE_CHECKS), f"{c['margin']:+.2f}"))
    for d in differences:
        rows.append((d["set"], "here only, there only, p", d["n"], *("+{} -{} p {:.3g}".format(*d[check])
                                                                   for check in PROBE_CHECKS), ""))
    return rows


def case_table(results):
    """(head, *rows): target, output and checks of the literal cases."""
    rows = [("case", "target", "output", *PROBE_CHECKS, "margin")]
    for r in (r for r in results if r["set"] == "literal"):
        rows.append((r["name"], visible(r["target"].strip()), visible(r["output"]),
                     *("yes" if r[check] else "no" for check in PROBE_CHECKS), f"{r['margin']:+.2f}"))
    return rows


def probes_flags(p):
    flags(p)
    cache_flags(p)
    p.add_argument("--instances", type=positive(), default=50, help="cases made of each template (50)")
    p.add_argument("--seed", type=positive(0), default=0, help="seed of the templates (0)")
    p.add_argument("--max-new-tokens", type=positive(), default=96, help="tokens of an output (96)")
    p.add_argument("--batch-size", type=positive(), default=32, help="cases at once (32)")
    p.add_argument("--compare", metavar="OTHER.json", help="result of another model, to test the difference")


def probes(args):
    """Behavioural cases: copying, spelling, arithmetic, recall, with exact tests between two checkpoints."""
    cases = probe_cases(args.instances, args.seed)
    others = read_checks(args.compare, cases) if args.compare else None
    subject = load_subject(args)
    formats = cache_settings(subject, args.kv_cache)
    name = "probes" + f"_{args.kv_cache}" * (args.kv_cache != "fp16") + "_rotated" * args.kv_rotate
    name += f"_residual{args.kv_residual}" * (args.kv_residual > 0)
    out = result_path(args, subject, name)                 # the tables are written beside it as .md and .tex
    if args.kv_rotate:
        rotate_cache(subject.model)
    results = run_cases(args, subject, formats, cases)
    counts = probe_counts(results)
    differences = probe_differences(results, others) if others else []
    tables = count_table(counts, differences), case_table(results)
    for suffix, table in ((".md", markdown_table), (".tex", latex_table)):
        text = "\n".join(table(*rows) for rows in tables)
        train_dba.write_whole(out.with_suffix(suffix), lambda temporary: temporary.write_text(text, encoding="utf-8"))
    for key, what in (("unknown_words", "hold words that the tokenizer doesn't know"),
                      ("past_context", "are longer than the training context")):
        if n := sum(bool(r[key]) for r in results):
            print(f"{n} of {len(results)} cases {what}")
    write_result(args, subject, name, tables[0], rules=PROBE_RULES, formats=formats, counts=counts,
                 compare=differences, cases=results)


# -----------------------------------------------------------------------------
# rank

RANK_DEFINITIONS = {
    "entropy_rank_sigma": "exp(-sum p ln p), p = sigma / sum(sigma), sigma = sqrt(lambda)",
    "entropy_rank_lambda": "exp(-sum p ln p), p = lambda / sum(lambda)",
    "participation_ratio": "sum(lambda)^2 / sum(lambda^2)",
    "stable_rank": "sum(lambda) / max(lambda)",
    "k90": "fewest eigenvalues that hold 90 % of sum(lambda)",
    "k95": "fewest eigenvalues that hold 95 % of sum(lambda)",
    "k99": "fewest eigenvalues that hold 99 % of sum(lambda)",
    "Q, K": "lambda: eigenvalues of the second moment of a token's queries or keys; queries carry their path's scale "
            "and the temperature. These ranks depend on the basis: (Q A, K A^-T) gives the same scores",
    "QK": "sigma: singular values of Sq^(1/2) Sk^(1/2) of one head, Sq and Sk the second moments of its queries and "
          "keys; lambda = sigma^2. No change of basis alters them",
    "share": "sum of the first r lambda of QK over all of them: of E[(q.k)^2] over independent queries and keys, what "
             "the best score of width r per head keeps",
    "merged": "all heads as one vector, a key that several heads share once",
    "head": "median over the query heads",
    "path": "sem, geo; total: both paths of a head as one vector (all there is, where a mode has one path)",
    "rope": "before, after; none: this path isn't rotated",
}
SHARE_WIDTHS = (4, 8, 16, 32)
TOKENS_PER_CHANNEL = 10                                    # fewer would bend the small eigenvalues


def effective_ranks(eigenvalues):
    """{measure: [...]} of eigenvalues [..., n] >= 0 in descending order, as RANK_DEFINITIONS has them."""
    p, q = (x / x.sum(-1, keepdim=True) for x in (eigenvalues, eigenvalues.sqrt()))
    few = {f"k{share}": (p.cumsum(-1) < share / 100 - 1e-9).sum(-1) + 1 for share in (90, 95, 99)}
    return dict(entropy_rank_sigma=torch.special.entr(q).sum(-1).exp(),
                entropy_rank_lambda=torch.special.entr(p).sum(-1).exp(),
                participation_ratio=1 / p.square().sum(-1), stable_rank=1 / p[..., 0], **few)


def eigenvalues_of(moment):
    """Eigenvalues [..., n] of symmetric [..., n, n], descending, without the rounding below zero."""
    return torch.linalg.eigvalsh(moment).flip(-1).clamp(min=0)


def product_spectrum(of_q, of_k):
    """Singular values [..., n] of Sq^(1/2) Sk^(1/2), descending, for second moments Sq, Sk [..., n, n]."""
    (a, u), (b, v) = torch.linalg.eigh(of_q), torch.linalg.eigh(of_k)
    a, b = (x.clamp(min=0).sqrt() for x in (a, b))
    return torch.linalg.svdvals(a[..., None] * (u.mT @ v) * b[..., None, :])    # less two rotations, which change none


@contextlib.contextmanager
def watch_projections(model, see):
    """While open, every attention layer calls see(layer, path, (q, k) before RoPE, (q, k) after it) for each of its
    paths, q [B, H, T, w] scaled, k [B, G, T, w]. The layers themselves keep nothing."""
    def watched(layer, project):
        def call(path, *rest):
            found = project(path, *rest)
            see(layer, path, project(dataclasses.replace(path, rotate=False), *rest)[:2], found[:2])
            return found
        return call

    for layer, block in enumerate(model.blocks):
        block.attn.project = watched(layer, block.attn.project)
    try:
        yield
    finally:
        for block in model.blocks:
            del block.attn.project                         # what the instance hid: the method of the class


class Moments:
    """Second moments over tokens, in float64, of the queries and keys of every layer.

    A token's vector is that of all heads, path after path: [H·r | H·p] for queries, [G·r | G·p] for keys.
    sums[layer, side, rotated] = (sum of x xᵀ [C, C], sum of x [C]), side 0: queries, 1: keys.
    """

    def __init__(self, cfg, device):
        self.paths, self.sums, self.tokens, self.parts = cfg.attention.paths, {}, 0, []
        self.device = "cpu" if device.type == "mps" else device                 # where there is float64

    def see(self, layer, path, plain, rotated):
        self.parts.append((plain, rotated))
        if path.name != self.paths[-1].name:
            return
        for side, after in itertools.product((0, 1), (False, True)):
            x = torch.cat([part[after][side].transpose(1, 2).flatten(2) for part in self.parts], 2).flatten(0, 1)
            x = x.to(self.device).double()                                      # [B·T, C]
            old = self.sums.get((layer, side, after), (0.0, 0.0))
            self.sums[layer, side, after] = old[0] + x.T @ x, old[1] + x.sum(0)
        self.tokens += len(x) if layer == 0 else 0
        self.parts = []

    def matrix(self, layer, side, rotated, centred):
        """Second moment [C, C] of a layer's queries or keys, about their mean where centred."""
        product, total = (x / self.tokens for x in self.sums[layer, side, rotated])
        product = product - torch.outer(total, total) if centred else product
        if not product.isfinite().all() or product.trace() <= 0:
            name = ("queries", "keys")[side]
            raise UserError(f"layer {layer}: the {name} are zero, infinite or NaN: a broken checkpoint")
        return product


def channels(shape, n_head):
    """{path: (query channels [H, w], key channels [H, w])}: where the vectors of Moments hold what a query head reads.
    """
    found, start = {}, [0, 0]
    for path in shape.paths:
        found[path.name] = []
        for side, heads in enumerate((n_head, path.groups)):
            ids = start[side] + torch.arange(heads * path.width).view(heads, -1)
            start[side] += ids.numel()
            found[path.name].append(ids.repeat_interleave(n_head // heads, 0))
    total = [torch.cat(ids, 1) for ids in zip(*found.values())]
    return {**found, "total": total} if len(found) > 1 else {"total": total}


def six_digits(x):
    """A tensor as a number or nested lists, six significant digits each."""
    return [six_digits(row) for row in x] if x.dim() else float(f"{x.item():.6g}")


def rank_numbers(eigenvalues):
    """Effective ranks of eigenvalues [n], or their medians over heads [H, n], as numbers."""
    ranks = effective_ranks(eigenvalues).items()
    return {name: six_digits(x.double().quantile(0.5) if x.dim() else x) for name, x in ranks}


def layer_ranks(moments, cfg, layer, centred):
    """Yield a record per path, stage of RoPE and matrix of one layer."""
    turned = {path.name: path.rotate for path in cfg.attention.paths}
    turned["total"] = any(turned.values())
    for name, ids in channels(cfg.attention, cfg.n_head).items():
        for rope, after in (("before", False), ("after", True)) if turned[name] else (("none", False),):
            where, heads = dict(layer=layer, path=name, rope=rope), []
            for side, of in enumerate("QK"):
                moment, own = moments.matrix(layer, side, after, centred), ids[side].to(moments.device)
                merged = own.unique()
                values = eigenvalues_of(moment[merged[:, None], merged])
                heads.append(moment[own[:, :, None], own[:, None]])             # [H, w, w]
                yield dict(where, of=f"{of} merged", channels=len(merged), ranks=rank_numbers(values),
                           spectrum=six_digits(values / values.sum()))
                yield dict(where, of=f"{of} head", channels=own.size(1),
                           ranks=rank_numbers(eigenvalues_of(heads[side])))
            energy = product_spectrum(*heads).square()                          # [H, w]
            energy = energy / energy.sum(1, keepdim=True)
            share = {r: energy[:, :r].sum(1) for r in SHARE_WIDTHS}
            yield dict(where, of="QK head", channels=energy.size(1), ranks=rank_numbers(energy),
                       share={r: six_digits(x.quantile(0.5)) for r, x in share.items()},
                       least_share={r: six_digits(x.min()) for r, x in share.items()}, spectra=six_digits(energy))


@torch.inference_mode()
def measure_ranks(subject, model, batches, centred):
    """Records of all layers of a model, over batches of token ids [B, T]."""
    moments = Moments(model.cfg, subject.device)
    with watch_projections(model, moments.see), autocast(subject.device, subject.dtype):
        for batch in tqdm(batches, unit="batch", dynamic_ncols=True):
            model.hidden(batch.to(subject.device))
    return [record for layer in range(model.cfg.layers) for record in layer_ranks(moments, model.cfg, layer, centred)]


def initial_model(subject):
    """The model as it was before its first step, the same settings and seed; of a pretrained Llama, one of its shape
    that train_dba.py would begin with."""
    torch.manual_seed(subject.cfg.seed)
    return GPT(subject.cfg, subject.model.vocab_size).init_weights().to(subject.device).eval()


def spread_windows(ids, tokens, block):
    """Windows [n, block] that don't overlap, spread evenly over ids [N]: at least `tokens` tokens, if there are."""
    block = min(block, len(ids))
    count = min(-(-tokens // block), len(ids) // block)
    starts = torch.linspace(0, len(ids) - block, count, dtype=torch.float64).long()
    return torch.stack([ids[start:start + block] for start in starts])


def rank_table(trained, initial):
    """(head, *rows): medians over layers, trained / at initialisation."""
    short = {"entropy_rank_sigma": "entropy sigma", "entropy_rank_lambda": "entropy lambda",
             "participation_ratio": "participation", "stable_rank": "stable"}
    rows = [("path", "RoPE", "of", "channels", *(short.get(name, name) for name in trained[0]["ranks"]),
             *(f"share {r}" for r in SHARE_WIDTHS))]
    for place in ({key: record[key] for key in ("path", "rope", "of", "channels")} for record in trained
                  if record["layer"] == 0):
        layers = [[r for r in records if place.items() <= r.items()] for records in (trained, initial)]
        cells = [" / ".join(f"{statistics.median(r[numbers][name] for r in same):{form}}" for same in layers)
                 for numbers, form in (("ranks", ".1f"), ("share", ".3f")) for name in layers[0][0].get(numbers, ())]
        rows.append((*place.values(), *cells, *[""] * (len(rows[0]) - 4 - len(cells))))
    return rows


def rank_flags(p):
    flags(p, data=True)
    p.add_argument("--tokens", type=positive(), help="tokens to measure over (20 per query channel, if there are)")
    p.add_argument("--block", type=positive(), help="tokens of a window (the model's context)")
    p.add_argument("--batch-size", type=positive(), default=8, help="windows at once (8)")
    p.add_argument("--centred", action="store_true", help="second moments about the mean, not about zero")


def rank(args):
    """Effective rank of queries and keys per layer, by named definitions, beside that at initialisation."""
    subject = load_subject(args)
    block = args.block or subject.cfg.block
    width = subject.cfg.n_head * sum(path.width for path in subject.cfg.attention.paths)
    least = TOKENS_PER_CHANNEL * width
    if (args.tokens or least) < least:
        raise UserError(f"--tokens {args.tokens}: spectra of {width} channels need at least {least} tokens")
    ids, _, data_hash = held_out_tokens(args, subject)
    if len(ids) < least:
        raise UserError(f"{len(ids)} tokens to measure: spectra of {width} channels need at least {least}")
    parts = spread_windows(ids, args.tokens or 2 * least, block)                # [n, block]
    if parts.numel() < least:
        raise UserError(f"{parts.numel()} tokens in whole windows of {parts.size(1)}: spectra of {width} channels need "
                        f"at least {least}; shorten --block")
    batches = parts.split(args.batch_size)
    trained = measure_ranks(subject, subject.model, batches, args.centred)
    initial = measure_ranks(subject, initial_model(subject), batches, args.centred)
    moment = "about the mean" if args.centred else "not centred"
    print(f"medians over layers, trained / at initialisation; second moments {moment}")
    write_result(args, subject, "rank", rank_table(trained, initial), definitions=RANK_DEFINITIONS, moment=moment,
                 tokens=parts.numel(), block=parts.size(1), data_sha256=data_hash, trained=trained,
                 initial=initial)


# -----------------------------------------------------------------------------
# tasks

# The task's YAML below lm_eval/tasks, the split that is scored, and the fields of an item of the hub's data set.
TASKS = {
    "hellaswag": ("hellaswag/hellaswag.yaml", "validation", ("activity_label", "ctx_a", "ctx_b", "endings", "label")),
    "winogrande": ("winogrande/default.yaml", "validation", ("sentence", "option1", "option2", "answer")),
    "arc_easy": ("arc/arc_easy.yaml", "test", ("question", "choices", "answerKey")),
    "piqa": ("piqa/piqa.yaml", "validation", ("goal", "sol1", "sol2", "label")),
    "boolq": ("super_glue/boolq/default.yaml", "validation", ("passage", "question", "label")),
}
LOCAL_NAMES = {"validation": "valid", "test": "test"}


def pieces(context, continuation, block):
    """A request (ids of a context, ids of its continuation) as requests that fit the window: itself, or if its
    continuation alone is longer, parts of half a window, each with what comes before it as context."""
    step = block if len(continuation) <= block else max(1, block // 2)
    return [(context + continuation[:i], continuation[i:i + step]) for i in range(0, len(continuation), step)]


def score(subject, requests, batch_size):
    """[(log-probability of a continuation in nats, whether greedy decoding would write it)] of requests (ids of a
    context, ids of its continuation). What is too long for the model's window is cut from the left."""
    if not all(continuation for _, continuation in requests):
        raise UserError("a continuation has no tokens")
    parts = [pieces(context, continuation, subject.cfg.block) for context, continuation in requests]
    found = iter(score_windows(subject, list(itertools.chain.from_iterable(parts)), batch_size))
    scores = [list(itertools.islice(found, len(part))) for part in parts]
    return [(sum(log_p for log_p, _ in part), all(greedy for _, greedy in part)) for part in scores]


@torch.inference_mode()
def score_windows(subject, requests, batch_size):
    """score() of requests whose continuations fit the window."""
    block, same_input = subject.cfg.block, {}
    for i, (context, continuation) in enumerate(requests):
        same_input.setdefault(tuple((context + continuation)[-block - 1:-1]), []).append(i)
    inputs, results = sorted(same_input, key=len, reverse=True), {}
    bar = tqdm(total=len(requests), unit="request", dynamic_ncols=True)
    for batch in (inputs[i:i + batch_size] for i in range(0, len(inputs), batch_size)):
        padded = torch.tensor([ids + (0,) * (len(batch[0]) - len(ids)) for ids in batch], device=subject.device)
        with autocast(subject.device, subject.dtype):
            hidden = subject.model.hidden(padded)          # [B, T, E]; attention is causal: padding is never seen
        for h, ids in zip(hidden, batch):
            tails = {i: torch.tensor(requests[i][1], device=subject.device) for i in same_input[ids]}
            longest = max(map(len, tails.values()))
            with autocast(subject.device, subject.dtype):  # logits of the continuation alone
                log_p = subject.model.logits(h[len(ids) - longest:len(ids)]).log_softmax(-1)      # [longest, V]
            for i, tail in tails.items():
                rows = log_p[-len(tail):]
                results[i] = rows.gather(1, tail[:, None]).sum().item(), bool((rows.argmax(-1) == tail).all())
            bar.update(len(tails))
    bar.close()
    return [results[i] for i in range(len(requests))]


def cut_at(text, until):
    """A text up to the first of some strings, and whether there was one."""
    places = [place for stop in until if stop and (place := text.find(stop)) >= 0]
    return (text[:min(places)], True) if places else (text, False)


def continue_text(subject, prompts, most, until):
    """Greedy continuations, as texts, of prompts [B, T] of token ids: up to a string of `until`, the token that ends a
    text, or `most` tokens."""
    eot, texts = subject.tokenizer.eot, {}
    cache = KVCache(subject.cfg, len(prompts), len(prompts[0]) + most - 1, "fp32", device=subject.device)
    written = [[] for _ in prompts]
    with autocast(subject.device, subject.dtype):
        for tokens in train_dba.generate(subject.model, torch.tensor(prompts, device=subject.device), most, cache, 0):
            for row, token in enumerate(tokens[:, 0].tolist()):
                if row in texts:
                    continue
                written[row] += [token] if token != eot else []
                text, stopped = cut_at(subject.tokenizer.decode(written[row]).decode(errors="replace"), until)
                if stopped or token == eot or len(written[row]) == most:
                    texts[row] = text
            if len(texts) == len(prompts):
                break
    return [texts[row] for row in range(len(prompts))]


def lm_eval_model(subject, batch_size):
    """A Subject as a model of lm-eval."""
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
    tokenizer, block = subject.tokenizer, subject.cfg.block
    starts = getattr(tokenizer, "prefix", [])              # what a pretrained tokenizer puts before a text

    class Model(TemplateLM):
        eot_token_id = tokenizer.eot
        prefix_token_id = getattr(tokenizer, "bos", tokenizer.eot)
        max_length = block

        def tok_encode(self, string, add_special_tokens=None, **how):
            ids = tokenizer.encode(string).tolist()
            return ids if add_special_tokens is False or ids[:1] == starts else starts + ids

        def _loglikelihood_tokens(self, requests, **how):
            return score(subject, [(context, continuation) for _, context, continuation in requests], batch_size)

        def loglikelihood_rolling(self, requests, disable_tqdm=False):
            windows = [[make_disjoint_window(window) for window in get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, block, 1)] for request in requests]
            scores = iter(score(subject, [window for text in windows for window in text], batch_size))
            return [sum(next(scores)[0] for _ in text) for text in windows]

        def generate_until(self, requests, disable_tqdm=False):
            groups, texts = {}, {}                         # prompts of one length and the same settings go together
            for i, request in enumerate(requests):
                how = normalize_gen_kwargs(request.args[1], 256)
                most, until = how["max_gen_toks"], how.get("until") or []
                if how["do_sample"] or not 0 < most < block:
                    raise UserError(f"{request.args[1]}: only greedy texts of 1 to {block - 1} tokens are written")
                ids = self.tok_encode(request.args[0])[most - block:]
                until = (until,) if isinstance(until, str) else tuple(until)
                groups.setdefault((len(ids), most, until), []).append((i, ids))
            for (_, most, until), group in groups.items():
                for start in range(0, len(group), batch_size):
                    rows, prompts = zip(*group[start:start + batch_size])
                    texts.update(zip(rows, continue_text(subject, prompts, most, until)))
            return [texts[i] for i in range(len(requests))]

    return Model()


def check_items(path, fields):
    """Raises UserError unless a file has items, one per line, with these fields."""
    number = 0
    with open(path, "rb") as f:
        for number, line in enumerate(f, 1):
            try:
                lacking = [field for field in fields if field not in json.loads(line)]
            except (ValueError, TypeError) as e:
                raise UserError(f"{path}:{number} is no JSON object ({e})") from None
            if lacking:
                raise UserError(f"{path}:{number} lacks {', '.join(lacking)}")
    if number == 0:
        raise UserError(f"{path} is empty")


def write_task(name, data, folder):
    """Write a task's YAML into a folder: lm-eval's own, or with data, a folder, its own on a local file."""
    from lm_eval import tasks as installed
    yaml, split, fields = TASKS[name]
    task = dict(include=str(Path(installed.__file__).parent / yaml), task=name)
    if data is not None:
        path = Path(data) / f"{name}_{LOCAL_NAMES[split]}.jsonl"
        if not path.is_file():
            raise FileNotFoundError(f"no {path.name} in {data}")
        check_items(path, fields)
        task.update(dict.fromkeys(("training_split", "validation_split", "test_split")), dataset_path="json",
                    dataset_name=None, dataset_kwargs=dict(data_files={split: str(path.resolve())},
                                                           cache_dir=str(folder / "cache")))
        task[f"{split}_split"] = split
    (folder / f"{name}.yaml").write_text(json.dumps(task))                      # JSON is YAML


def load_tasks(names, data, folder):
    """({name: task of lm-eval}, {name: why it can't be run}) on the files of a folder `data` or, if that is None, on
    the hub's. folder: a temporary one that must outlive the tasks."""
    from lm_eval.tasks import TaskManager
    tasks, missing = {}, {}
    for name in dict.fromkeys(names):
        try:
            write_task(name, data, folder)
            tasks.update(TaskManager(include_path=folder, include_defaults=False).load([name])["tasks"])
        except OSError as e:                               # of which are the hub's errors
            missing[name] = str(e).splitlines()[0][:200]
            print(f"{name} is not run: {missing[name]}", file=sys.stderr)
    if not tasks:
        raise UserError(f"no data for any task: {'; '.join(missing.values())}")
    return tasks, missing


def task_result(results, name):
    """What is kept of one task in lm-eval's results: scores, and which items were right, in the data's order."""
    scores, samples = results["results"][name], sorted(results["samples"][name], key=lambda sample: sample["doc_id"])
    items = [f"{sample['doc_id']}-{sample['doc_hash'][:16]}" for sample in samples]
    metrics = [metric for metric in ("acc", "acc_norm") if f"{metric},none" in scores]
    result = dict(n=len(items), version=results["versions"][name],
                  data_sha256=hashlib.sha256("".join(sample["doc_hash"] for sample in samples).encode()).hexdigest())
    for metric in metrics:
        result.update({metric: scores[f"{metric},none"], f"{metric}_stderr": scores[f"{metric}_stderr,none"]})
    return dict(result, items=items, correct={m: [int(sample[m]) for sample in samples] for m in metrics})


def discordant(this, other):
    """(right only in this, right only in the other, McNemar's p) of two 0/1 lists over the same items."""
    b, c = sum(x > y for x, y in zip(this, other)), sum(x < y for x, y in zip(this, other))
    return b, c, mcnemar(b, c)


def compare_tasks(this, other):
    """{(task, metric): pairs, accuracy of the other, McNemar's test} over the items that two results share."""
    rows = {}
    for name in this.keys() & other.keys():
        for metric in this[name]["correct"].keys() & other[name]["correct"].keys():
            mine, its = (dict(zip(result[name]["items"], result[name]["correct"][metric])) for result in (this, other))
            if common := mine.keys() & its.keys():
                b, c, p = discordant(*([right[item] for item in common] for right in (mine, its)))
                rows[name, metric] = dict(pairs=len(common), other=sum(its[item] for item in common) / len(common),
                                          only_this=b, only_other=c, p=p)
    if not rows:
        raise UserError("--compare: the two results have no items in common")
    return rows


def read_tasks(path):
    """The tasks of a result file that `tasks` wrote."""
    try:
        tasks = json.loads(Path(path).read_text())["tasks"]
        [(task["items"], task["correct"].items()) for task in tasks.values()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f"--compare {path} is no result of tasks ({type(e).__name__}: {e})") from None
    return tasks


def tasks_flags(p):
    flags(p)
    p.add_argument("--tasks", nargs="+", choices=TASKS, default=[*TASKS], metavar="TASK", help=f"{', '.join(TASKS)}")
    p.add_argument("--tasks-dir", metavar="DIR", help="local data in the hub's fields: DIR/<task>_valid.jsonl, and "
                   "arc_easy_test.jsonl (the Hugging Face hub)")
    p.add_argument("--limit", type=positive(), help="only the first so many items of each task")
    p.add_argument("--batch-size", type=positive(), default=8, help="texts at once (8)")
    p.add_argument("--compare", metavar="RESULT", help="another result of this command, to test against item by item")


def tasks(args):
    """Zero-shot accuracy on benchmarks by lm-eval, and McNemar's test against another result."""
    try:
        import lm_eval
    except ModuleNotFoundError as e:
        raise UserError(f"tasks needs lm-eval ({e.name} is missing): pip install -r requirements-eval.txt") from None
    other = args.compare and read_tasks(args.compare)
    with tempfile.TemporaryDirectory() as folder:
        loaded, missing = load_tasks(args.tasks, args.tasks_dir, Path(folder))
        for task in loaded.values():
            task.set_config("num_fewshot", 0)
        subject = load_subject(args)
        results = lm_eval.evaluate(lm_eval_model(subject, args.batch_size), {"tasks": loaded}, limit=args.limit)
    done = {name: task_result(results, name) for name in loaded}
    pairs = compare_tasks(done, other) if other else {}
    table = [("task", "metric", "items", "accuracy", "stderr")
             + (("pairs", "other", "only this", "only other", "p") if other else ())]
    for name, metric in ((name, metric) for name, task in done.items() for metric in task["correct"]):
        task, pair = done[name], pairs.get((name, metric))
        row = (name, metric, task["n"], f"{task[metric]:.4f}", f"{task[f'{metric}_stderr']:.4f}")
        row += (pair["pairs"], f"{pair['other']:.4f}", pair["only_this"], pair["only_other"], f"{pair['p']:.4g}") \
            if pair else ("-",) * (len(table[0]) - len(row))
        table.append(row)
    compared = [dict(task=name, metric=metric, **pair) for (name, metric), pair in sorted(pairs.items())]
    write_result(args, subject, "tasks", table, tasks=done, not_run=missing, compared=compared, num_fewshot=0,
                 lm_eval=lm_eval.__version__)


# -----------------------------------------------------------------------------
# Main

COMMANDS = {ppl: ppl_flags, tasks: tasks_flags, probes: probes_flags, latency: latency_flags, memory: memory_flags,
            sweep: sweep_flags, rank: rank_flags, policy: policy_flags}


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for command, add_flags in COMMANDS.items():
        part = commands.add_parser(command.__name__, help=command.__doc__, description=command.__doc__,
                                   allow_abbrev=False)
        add_flags(part)
        part.set_defaults(run=command)
    return parser


def main(argv=None):
    args = make_parser().parse_args(argv)
    try:
        args.run(args)
        return 0
    except UserError as e:
        tqdm.write(f"error: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
