"""
Measure a checkpoint.

    python3 eval_dba.py ppl --ckpt runs/ckpt_decoupled --kv-cache hetero
    python3 eval_dba.py latency --ckpt runs/ckpt_decoupled --prompts 128 1024 8192
    python3 eval_dba.py ppl --ckpt SmolLM2.q8_0.gguf --data wiki.test.tokens --kv-cache q4_0

--ckpt is a run folder (its best.pt), a checkpoint, or a pretrained Llama as a .gguf file or a Hugging Face folder. A
command writes eval_<command>.json beside the checkpoint, or --out, with its settings, the hash of its data and the
hardware, and prints a short table.
"""

import argparse
import copy
import ctypes
import dataclasses
import hashlib
import itertools
import json
import math
import os
import platform
import statistics
import sys
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


def file_hash(path):
    """sha256 of a file, in hexadecimal."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def load_subject(args):
    """The Subject of --ckpt, --device and --dtype. Raises UserError."""
    device = pick_device(args.device)
    dtype, _ = pick_dtype(args.dtype, device)
    path = Path(args.ckpt)
    if path.suffix == ".gguf" or (path / "config.json").is_file():
        from convert_dba import load_llama
        model, tokenizer = load_llama(path, device)
        weights = path if path.is_file() else path / "config.json"
        return Subject(model, tokenizer, path.parent, None, file_hash(weights), device, dtype)
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


def cache_settings(args, subject):
    """{stream: format} of --kv-cache. Raises UserError where it doesn't fit the model."""
    formats = cache_formats(subject.cfg, args.kv_cache)
    if formats is None:
        raise UserError(f"--kv-cache {args.kv_cache} doesn't fit {subject.cfg.attn_mode} attention")
    return formats


def write_result(args, subject, name, table, **result):
    """Print a table, (head, rows), and write eval_<name>.json."""
    out = Path(args.out or subject.folder / f"eval_{name}.json")
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


def ppl(args):
    """Held-out loss, perplexity and bits per byte over a whole file, through a cache of any format."""
    subject = load_subject(args)
    formats = cache_settings(args, subject)
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
    ids = ids if whole else ids[:args.max_tokens]
    parts = list(windows(ids, block, stride))
    total, count = 0.0, 0
    bar = tqdm(total=len(ids) - 1, unit="tok", unit_scale=True, dynamic_ncols=True)
    full = [part for part in parts if len(part[1]) == block + 1]
    groups = [full[i:i + args.batch_size] for i in range(0, len(full), args.batch_size)]
    for group in groups + [[part] for part in parts if len(part[1]) <= block]:
        batch = torch.stack([ids for _, ids, _ in group]).to(subject.device)
        nll = window_nll(subject, batch, formats, args.kv_residual)
        for row, (_, _, first) in zip(nll.double(), group):
            total += row[first - 1:].sum().item()
            count += len(row) - first + 1
        bar.update(count - bar.n)
    bar.close()
    loss = total / count
    if not math.isfinite(loss):
        raise UserError(f"the loss is {loss}: a broken checkpoint, or a cache format that can't hold its values")
    bpb = loss / math.log(2) * count / text_bytes if text_bytes and whole else None
    name = args.kv_cache + "_rotated" * args.kv_rotate + (f"_residual{args.kv_residual}" if args.kv_residual else "")
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
    if sys.platform == "linux":
        lines = Path("/proc/meminfo").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


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
    for name, each in formats.items():
        kernel, why = resolve_kernel(args.kernel, subject.cfg, each, device, total)
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
    kernel, _ = resolve_kernel(args.kernel, subject.cfg, formats, device, tokens)
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
    kernel, _ = resolve_kernel(args.kernel, subject.cfg, formats, device, total)
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


def sweep(args):
    """How prompts up to very long ones go: time of the prompt and of decoding, loss at its end, or why it failed."""
    train_dba.keep_freed_memory()
    subject = load_subject(args)
    formats, longest = cache_settings(args, subject), max(args.contexts)
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
    args.out = args.out or subject.folder / train_dba.POLICY_FILE
    write_result(args, subject, "policy", policy_table(args, sizes, tried, limits, chosen, long),
                 checkpoint_sha256=subject.sha256, formats=dict(chosen.formats), rotate=chosen.rotate,
                 residual=chosen.residual, bytes_per_token=bytes_per_token(subject.cfg, dict(chosen.formats)),
                 bytes_per_token_with_residual=sizes[chosen], thresholds=limits, short=tried[chosen],
                 long=long.get(chosen), data_sha256=data_hash,
                 tried=[dict(formats=dict(p.formats), rotate=p.rotate, residual=p.residual, bytes_per_token=sizes[p],
                             **finite(tried[p]), long=finite(long[p]) if p in long else None) for p in tried])


# -----------------------------------------------------------------------------
# Main

def flags(parser, data=False, cache=False):
    """Flags that commands share."""
    parser.add_argument("--ckpt", required=True, help="run folder, checkpoint, .gguf or Hugging Face folder")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="float32", choices=("auto", "float32", "bfloat16", "float16"))
    parser.add_argument("--out", help="result file (eval_<command>.json beside the checkpoint)")
    if data:
        parser.add_argument("--data", help=".npy or text (the checkpoint's validation part)")
    if cache:
        parser.add_argument("--kv-cache", default="fp16", choices=(*FORMATS, "hetero"))
        parser.add_argument("--kv-residual", type=positive(0), default=0, help="newest tokens that stay fp16 (0)")
        parser.add_argument("--kv-rotate", action="store_true", help="rotate what is cached without RoPE")


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


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    p = commands.add_parser("ppl", help=ppl.__doc__, allow_abbrev=False)
    flags(p, data=True, cache=True)
    p.add_argument("--block", type=positive(2), help="tokens of a window (the model's context)")
    p.add_argument("--stride", type=positive(), help="tokens between windows (half a window)")
    p.add_argument("--batch-size", type=positive(), default=8, help="windows at once (8)")
    p.add_argument("--max-tokens", type=positive(2), help="measure only the first so many tokens")
    p.set_defaults(run=ppl)

    p = commands.add_parser("latency", help=latency.__doc__, allow_abbrev=False)
    flags(p)
    p.add_argument("--prompts", type=positive(), nargs="+", default=[128, 512, 2048, 8192], help="their tokens")
    p.add_argument("--formats", nargs="+", choices=(*FORMATS, "hetero"), help=f"of the cache ({' '.join(COMPARED)})")
    p.add_argument("--kernel", default="auto", choices=("auto", "torch", "triton", "metal"))
    p.add_argument("--steps", type=positive(), default=64, help="decode steps (64)")
    p.add_argument("--prefills", type=positive(), default=3, help="times that a prompt is read (3)")
    p.set_defaults(run=latency)

    p = commands.add_parser("memory", help=memory.__doc__, allow_abbrev=False)
    flags(p)
    p.add_argument("--tokens", type=positive(4 * WARM_UP), nargs="+", default=[512, 1024, 2048, 4096, 8192, 16384],
                   help="lengths of the cache")
    p.add_argument("--formats", nargs="+", choices=(*FORMATS, "hetero"), help=f"of the cache ({' '.join(COMPARED)})")
    p.add_argument("--kv-residual", type=positive(0), default=0, help="newest tokens that stay fp16 (0)")
    p.add_argument("--kernel", default="auto", choices=("auto", "torch", "triton", "metal"))
    p.set_defaults(run=memory)

    p = commands.add_parser("sweep", help=sweep.__doc__, allow_abbrev=False)
    flags(p, data=True, cache=True)
    p.add_argument("--contexts", type=positive(), nargs="+", help="tokens of the prompts (2048, 4096, ... 131072)",
                   default=[2**n for n in range(11, 18)])
    p.add_argument("--chunk", type=positive(), default=1024, help="prompt tokens per forward pass (1024)")
    p.add_argument("--steps", type=positive(), default=128, help="decode steps (128)")
    p.add_argument("--kernel", default="auto", choices=("auto", "torch", "triton", "metal"))
    p.add_argument("--max-seconds", type=number, default=600, help="of a context; longer ones are not run (600)")
    p.set_defaults(run=sweep)

    p = commands.add_parser("policy", help=policy.__doc__, allow_abbrev=False)
    flags(p, data=True)
    p.add_argument("--max-kv-bytes-per-token", type=positive(), help="budget: the least loss in so many bytes")
    p.add_argument("--max-delta-nll", type=number, help="budget: the fewest bytes for so much loss, nats per token")
    p.add_argument("--max-kl", type=number, default=0.02, help="largest mean KL of the next token (0.02)")
    p.add_argument("--max-delta-logit", type=number, help="largest difference of any logit (not limited)")
    p.add_argument("--tokens", type=positive(), default=16384, help="calibration tokens (16384)")
    p.add_argument("--long", action="store_true", help="check the choice on longer windows too")
    p.add_argument("--long-factor", type=positive(2), default=4, help="their length in contexts (4)")
    p.add_argument("--batch-size", type=positive(), default=8, help="windows at once (8)")
    p.set_defaults(run=policy)
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
