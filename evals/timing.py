"""
Time and memory of cached decoding: `latency`, `memory`, `sweep`; the clocks and memory probes that other scripts use.
"""

import ctypes
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

import train_dba
from evals.subject import (
    Progress,
    Report,
    Subject,
    check_out,
    formats_of,
    held_out,
    load_subject,
    quiet,
    result_path,
    text_table,
    write_result,
)
from train_dba import (
    Config,
    KVCache,
    UserError,
    autocast,
    bytes_per_token,
    cache_formats,
    cache_slots,
    resolve_kernel,
    ring_format,
    rotate_cache,
    synchronize,
)

COMPARED = ("fp16", "q8_0", "q4_0", "hetero")              # cache formats, where they fit the model
WARM_UP = 8                                                # decode steps that aren't measured: kernels are compiled
COPY_BYTES = 2**29


def cache_bytes(cfg: Config, batch: int, tokens: int, policy: str | dict[str, str], residual: int = 0) -> int:
    """Bytes that a KVCache of these arguments owns, by formula."""
    settled, ring = cache_slots(tokens, residual)
    formats = cache_formats(cfg, policy)
    of_ring = {name: ring_format(fmt) for name, fmt in formats.items()}
    return batch * (settled * bytes_per_token(cfg, formats) + ring * bytes_per_token(cfg, of_ring))


# -----------------------------------------------------------------------------
# Clocks and memory probes

def timed(device: torch.device, call: Callable, *args) -> tuple[object, float]:
    """(what the call returns, its seconds); the device is idle before and after."""
    synchronize(device)
    started = time.perf_counter()
    result = call(*args)
    synchronize(device)
    return result, time.perf_counter() - started


def copy_rate(device: torch.device) -> float:
    """Bytes per second, read and written, of a copy of a large buffer."""
    x = torch.zeros(COPY_BYTES, dtype=torch.uint8, device=device)
    y = x.clone()
    return 2 * COPY_BYTES / statistics.median(timed(device, y.copy_, x)[1] for _ in range(7))


def status_bytes(path: Path, name: str) -> int:
    """The bytes of a line like `VmRSS:  123 kB` in a file below /proc."""
    for line in path.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise LookupError(f"{path} has no {name}")


def resident(name: str) -> int:
    """VmRSS (now) or VmHWM (peak) of this process in bytes; Linux."""
    return status_bytes(Path("/proc/self/status"), name)


def forget_peak(device: torch.device) -> int | None:
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


def peak_since(device: torch.device) -> int:
    """The most bytes that were held since forget_peak(), where that gave a number."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident("VmHWM")


def available_memory(device: torch.device) -> int:
    """Bytes that can still be had on a device; all of the machine's memory where it doesn't tell."""
    if device.type == "cuda":
        pooled = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + pooled
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    meminfo, limit, used = (Path(path) for path in ("/proc/meminfo", "/sys/fs/cgroup/memory.max",
                                                    "/sys/fs/cgroup/memory.current"))
    room = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if meminfo.is_file():
        room = status_bytes(meminfo, "MemAvailable")
    if limit.is_file() and limit.read_text().strip() != "max":                  # a container's
        room = min(room, int(limit.read_text()) - int(used.read_text()))
    return room


# -----------------------------------------------------------------------------
# Decoding

def new_cache(subject: Subject, tokens: int, formats: dict, residual: int = 0, kernel=None) -> KVCache:
    """A KVCache for one sequence. Raises UserError where there is no memory for it."""
    try:
        return KVCache(subject.cfg, 1, tokens, formats, residual, subject.device, kernel)
    except RuntimeError as e:
        raise UserError(f"no memory for a KV cache of {tokens:,} tokens ({str(e).splitlines()[0]})") from None


def compared_formats(subject: Subject, names: list[str] | None) -> dict[str, dict]:
    """{name: {stream: format}} of --kv-cache, by default those of COMPARED that fit the model; fp16, which others are
    compared with, comes first. Raises UserError."""
    if names is None:
        names = [name for name in COMPARED if cache_formats(subject.cfg, name)]
    return {name: formats_of(subject, name) for name in dict.fromkeys(("fp16", *names))}


def warning_past_context(subject: Subject, tokens: int) -> str | None:
    """What to say of so many tokens where the model hasn't seen such positions."""
    if tokens <= subject.cfg.block:
        return None
    return (f"warning: {tokens:,} tokens go past the {subject.cfg.block:,} of the model's context: positions that it "
            "hasn't seen")


def read_prompt(model, ids: torch.Tensor, cache: KVCache) -> torch.Tensor:
    """Hidden states of the last chunk of ids [1, T], all of which the cache then holds."""
    for part in ids.split(train_dba.PREFILL_CHUNK, 1):
        h = model.hidden(part, cache)
    return h


def likeliest(model, h: torch.Tensor) -> torch.Tensor:
    """The token [1, 1] that most likely follows hidden states [1, T, E], on their device."""
    return train_dba.pick_token(model.logits(h[:, -1]), 0, None, None, None).to(h.device)


def decode_step(model, token: torch.Tensor, cache: KVCache) -> torch.Tensor:
    return likeliest(model, model.hidden(token, cache))


def weight_bytes(subject: Subject) -> int:
    """Bytes of weights that a decode step reads: matrices in the type of the products, others as they are stored."""
    total = 0
    for p in subject.model.parameters():
        total += p.numel() * (subject.dtype.itemsize if p.dim() == 2 else p.element_size())
    return total


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

    @property
    def step_ms(self) -> list[float]:
        """Milliseconds of the decode steps after the warm-up."""
        return [1000 * seconds for seconds in self.steps[WARM_UP:]]


@torch.no_grad()
def decode_times(subject: Subject, prompt: torch.Tensor, formats: dict[str, dict], *, kernel: str = "auto",
                 steps: int = 64, prefills: int = 3, report: Report = quiet) -> dict[str, Run]:
    """{name: Run} after a prompt [1, T] and decode steps at which all caches take turns, so that a change of the
    machine's speed meets them all."""
    model, device, runs = subject.model, subject.device, {}
    tokens = prompt.size(1) + WARM_UP + steps
    for name, streams in formats.items():
        resolved, why = resolve_kernel(kernel, device, streams.values())
        runs[name] = Run(new_cache(subject, tokens, streams, kernel=resolved), why)
    turns = list(runs.values())
    done, passes = 0, len(turns) * (prefills + WARM_UP + steps)
    with autocast(device, subject.dtype):                  # around all, so that weights are cast once
        for run in turns:
            read_prompt(model, prompt[:, :train_dba.PREFILL_CHUNK], run.cache)
        for run in turns * prefills:
            run.cache.truncate(0)
            h, seconds = timed(device, read_prompt, model, prompt, run.cache)
            run.token, more = timed(device, likeliest, model, h)
            run.prefill.append(seconds)
            run.first_token.append(seconds + more)
            report(done := done + 1, passes)
        for run in turns * (WARM_UP + steps):
            run.token, seconds = timed(device, decode_step, model, run.token, run.cache)
            run.steps.append(seconds)
            report(done := done + 1, passes)
    return runs


def latency_row(subject: Subject, prompt: int, name: str, formats: dict, run: Run, fp16_ms: float, rate: float) -> dict:
    """Figures of one cache after a prompt of so many tokens. share_of_copy compares the bytes that a step must read per
    second with `rate`, those of a copy; above 1, some of them stay in the processor's caches."""
    times = run.step_ms
    ms, seen = statistics.median(times), prompt + WARM_UP + (len(times) + 1) / 2  # tokens that the middle step sees
    read = weight_bytes(subject) + seen * bytes_per_token(subject.cfg, formats)
    return dict(prompt=prompt, cache=name, kernel=run.cache.kernel.name, kernel_why=run.why, ms_per_token=ms,
                ms_min=min(times), ms_max=max(times), tokens_per_second=1000 / ms, ratio_to_fp16=ms / fp16_ms,
                prefill_seconds=statistics.median(run.prefill), bytes_read_per_token=read,
                first_token_seconds=statistics.median(run.first_token), share_of_copy=read / ms * 1000 / rate,
                copy_bytes_per_second=rate)


def latency(subject: Subject, prompts: list[int], formats: dict[str, dict], *, kernel: str = "auto", steps: int = 64,
            prefills: int = 3, report: Report = quiet) -> dict:
    """Rows of every length of the prompt and cache, fp16 among these."""
    ids = torch.randint(subject.model.vocab_size, (1, max(prompts)), generator=torch.Generator().manual_seed(0))
    rows = []
    for i, prompt in enumerate(prompts):
        def part(done: int, total: int, before: int = i) -> None:
            report(before * total + done, len(prompts) * total)

        runs = decode_times(subject, ids[:, :prompt].to(subject.device), formats, kernel=kernel, steps=steps,
                            prefills=prefills, report=part)
        rate = copy_rate(subject.device)                   # each time, as the machine may be shared
        fp16_ms = statistics.median(runs["fp16"].step_ms)
        for name, run in runs.items():
            rows.append(latency_row(subject, prompt, name, formats[name], run, fp16_ms, rate))
    return dict(weight_bytes=weight_bytes(subject), warm_up_steps=WARM_UP, rows=rows)


def latency_table(result: dict) -> list[tuple]:
    """(head, *rows) of what latency() returned."""
    rows = [("prompt", "cache", "kernel", "prefill s", "first token s", "ms/token", "tokens/s", "x fp16",
             "of copy rate")]
    for r in result["rows"]:
        rows.append((r["prompt"], r["cache"], r["kernel"], f"{r['prefill_seconds']:.3f}",
                     f"{r['first_token_seconds']:.3f}", f"{r['ms_per_token']:.3f}", f"{r['tokens_per_second']:.1f}",
                     f"{r['ratio_to_fp16']:.3f}", f"{r['share_of_copy']:.3f}"))
    return rows


def latency_main(args) -> None:
    """Time of cached decoding, per format of the cache and length of the prompt."""
    check_out(args.out)
    train_dba.keep_freed_memory()                          # as sampling does
    subject = load_subject(args.ckpt, args.device, args.dtype)
    formats = compared_formats(subject, args.kv_cache)
    if warning := warning_past_context(subject, max(args.prompts) + WARM_UP + args.steps):
        print(warning, file=sys.stderr)
    with Progress("pass", "latency") as report:
        result = latency(subject, args.prompts, formats, kernel=args.kernel, steps=args.steps, prefills=args.prefills,
                         report=report)
    finish(args, subject, "latency", latency_table(result), result)


def finish(args, subject: Subject, command: str, table: list[tuple], result: dict) -> None:
    """What the main functions here end with: print the table, write the result."""
    path = result_path(args.out, subject, f"eval_{command}")
    print(text_table(table))
    write_result(path, subject, vars(args), result)
    print(f"written to {path}")


# -----------------------------------------------------------------------------
# memory

@torch.no_grad()
def memory_row(subject: Subject, tokens: int, name: str, formats: dict, *, residual: int = 0,
               kernel: str = "auto") -> dict:
    """Bytes of a cache of so many tokens, and the peak while they are read and while the last of them are decoded."""
    model, device = subject.model, subject.device
    ids = torch.zeros(1, tokens, dtype=torch.long, device=device)
    resolved, _ = resolve_kernel(kernel, device, formats.values())
    with autocast(device, subject.dtype):                  # first without a cache of size, so that weights are cast
        warm = ids[:, :2 * train_dba.PREFILL_CHUNK]
        read_prompt(model, warm, new_cache(subject, warm.size(1), formats))
        before = forget_peak(device)
        cache = new_cache(subject, tokens, formats, residual, resolved)
        read_prompt(model, ids[:, 2 * WARM_UP:], cache)
        fill = before and peak_since(device)
        for _ in range(WARM_UP):                           # compiling holds memory from here on
            decode_step(model, ids[:, :1], cache)
        held = forget_peak(device)
        for _ in range(WARM_UP):
            decode_step(model, ids[:, :1], cache)
        decode = held and peak_since(device)
    owned, formula = cache.nbytes(), cache_bytes(subject.cfg, 1, tokens, formats, residual)
    return dict(tokens=tokens, cache=name, kernel=resolved.name, formula_bytes=formula, cache_bytes=owned,
                bytes_per_token=bytes_per_token(subject.cfg, formats), before_bytes=before, fill_peak_bytes=fill,
                fill_extra_bytes=before and fill - before - owned, decode_peak_bytes=decode,
                decode_extra_bytes=held and decode - held)


def memory(subject: Subject, lengths: list[int], formats: dict[str, dict], *, residual: int = 0, kernel: str = "auto",
           report: Report = quiet) -> dict:
    """Rows of every length of the cache and format."""
    rows, done, total = [], 0, sum(lengths) * len(formats)
    for tokens in lengths:
        for name, streams in formats.items():
            rows.append(memory_row(subject, tokens, name, streams, residual=residual, kernel=kernel))
            report(done := done + tokens, total)
    return dict(what="CUDA: allocated by PyTorch; Linux CPU: resident; null: can't be measured here", rows=rows)


def mib(n: int | None) -> str:
    return "-" if n is None else f"{n / 2**20:.2f}"


def memory_table(result: dict) -> list[tuple]:
    """(head, *rows) of what memory() returned."""
    rows = [("tokens", "cache", "B/token", "cache MiB", "by formula", "peak MiB", "beside it, prompt", "decode step")]
    for r in result["rows"]:
        rows.append((r["tokens"], r["cache"], r["bytes_per_token"], mib(r["cache_bytes"]), mib(r["formula_bytes"]),
                     mib(r["fill_peak_bytes"]), mib(r["fill_extra_bytes"]), mib(r["decode_extra_bytes"])))
    return rows


def memory_main(args) -> None:
    """Memory of the cache by formula and as measured, per format and number of tokens."""
    check_out(args.out)
    subject = load_subject(args.ckpt, args.device, args.dtype)
    formats = compared_formats(subject, args.kv_cache)
    if warning := warning_past_context(subject, max(args.tokens)):
        print(warning, file=sys.stderr)
    with Progress("tok", "memory") as report:
        result = memory(subject, args.tokens, formats, residual=args.kv_residual, kernel=args.kernel, report=report)
    finish(args, subject, "memory", memory_table(result), result)


# -----------------------------------------------------------------------------
# sweep

@dataclass(frozen=True)
class Sweep:
    """How a context is gone through: formats {stream: format} and residual of the cache, prompt tokens per forward
    pass, decode steps after them, and the seconds after which to stop."""
    formats: dict
    residual: int = 0
    kernel: str = "auto"
    chunk: int = 1024
    steps: int = 128
    max_seconds: float = 600


def margin(subject: Subject, chunk: int) -> int:
    """Bytes to leave free beside a cache, generously: float32 scores of a chunk of tokens against a part of the cache,
    activations and logits of the chunk, and 256 MiB for what else is allocated and compiled."""
    cfg, shape = subject.cfg, subject.cfg.attention
    scores = max(train_dba.DECODE_CHUNK, cfg.n_head * chunk * train_dba.CACHE_BLOCK)
    widths = 4 * cfg.d_model + 3 * cfg.d_ff + 4 * (cfg.n_head * shape.v_width + sum(shape.streams.values()))
    return 4 * (6 * scores + chunk * (widths + 4 * subject.model.vocab_size)) + 2**28


@torch.no_grad()
def sweep_row(subject: Subject, ids: torch.Tensor, plan: Sweep, report: Report = quiet) -> dict:
    """Figures of one context: ids [1, N + 1], of which the cache reads N, before decode steps. status: ok, or what went
    wrong."""
    model, device, context, seconds = subject.model, subject.device, ids.size(1) - 1, 0.0
    total = context + plan.steps
    kernel, _ = resolve_kernel(plan.kernel, device, plan.formats.values())
    cache, times = new_cache(subject, total, plan.formats, plan.residual, kernel), []
    row = dict(context=context, kernel=kernel.name, cache_bytes=cache.nbytes())
    late = f"stopped: --max-seconds {plan.max_seconds} were over"
    with autocast(device, subject.dtype):
        for start in range(0, context, plan.chunk):
            part = ids[:, start:start + plan.chunk + 1]
            h, more = timed(device, model.hidden, part[:, :-1], cache)
            seconds += more
            report(cache.length.item(), total)
            if seconds > plan.max_seconds:
                return {**row, "status": f"{late} after {cache.length.item():,} tokens"}
        loss = torch.nn.functional.cross_entropy(model.logits(h)[0], part[0, 1:]).item()
        token = likeliest(model, h)
        for _ in range(plan.steps):
            token, more = timed(device, decode_step, model, token, cache)
            times.append(more)
            report(cache.length.item(), total)
            if seconds + sum(times) > plan.max_seconds:
                return {**row, "prefill_seconds": seconds, "loss": loss, "status": f"{late} after {len(times)} steps"}
    return dict(row, prefill_seconds=seconds, loss=loss, ms_per_token=1000 * statistics.median(times),
                decode_seconds=sum(times), status="ok" if math.isfinite(loss) else f"the loss is {loss}")


def sweep_rows(subject: Subject, ids: torch.Tensor, contexts: list[int], plan: Sweep,
               report: Report = quiet) -> Iterator[dict]:
    """Yield the rows of all contexts of ids [N], shortest first; one that can't or shouldn't run says why."""
    stopped, spare, done = None, margin(subject, plan.chunk), 0
    contexts = sorted(set(contexts))
    everything = sum(contexts) + plan.steps * len(contexts)
    for context in contexts:
        def part(tokens: int, total: int, before: int = done) -> None:
            report(before + tokens, everything)

        need = cache_bytes(subject.cfg, 1, context + plan.steps, plan.formats, plan.residual) + spare
        room = available_memory(subject.device)
        if stopped:
            yield dict(context=context, status=f"not run: {stopped:,} tokens took more than the {plan.max_seconds} s "
                                               "of --max-seconds")
        elif need > room:
            yield dict(context=context, status=f"not run: needs {need:,} bytes, a margin of {spare:,} among them, of "
                                               f"which {room:,} are free")
        else:
            try:
                row = sweep_row(subject, ids[None, :context + 1].to(subject.device), plan, part)
            except (UserError, torch.OutOfMemoryError) as e:
                row = dict(context=context, status=f"failed: {str(e).splitlines()[0]}")
            stopped = context if row["status"].startswith("stopped") else None
            yield row
        done += context + plan.steps
        report(done, everything)


def sweep_table(rows: list[dict]) -> list[tuple]:
    """(head, *lines) of rows of sweep_rows()."""
    lines = [("context", "cache MiB", "prefill s", "ms/token", "loss of last chunk", "status")]
    for row in rows:
        cells = [row["context"], mib(row.get("cache_bytes"))]
        for name, digits in (("prefill_seconds", ".2f"), ("ms_per_token", ".3f"), ("loss", ".4f")):
            cells.append(format(row[name], digits) if name in row else "-")
        lines.append((*cells, row["status"]))
    return lines


def sweep_main(args) -> None:
    """How prompts up to very long ones go: time of the prompt and of decoding, loss at its end, or why it failed."""
    check_out(args.out)
    train_dba.keep_freed_memory()
    subject = load_subject(args.ckpt, args.device, args.dtype)
    plan = Sweep(formats_of(subject, args.kv_cache), args.kv_residual, args.kernel, args.chunk, args.steps,
                 args.max_seconds)
    held, longest = held_out(subject, args.data), max(args.contexts)
    if args.kv_rotate:
        rotate_cache(subject.model)
    if warning := warning_past_context(subject, longest + args.steps):
        print(warning, file=sys.stderr)
    repeats = -(-(longest + 1) // len(held.ids))
    if repeats > 1:
        print(f"warning: the text has {len(held.ids):,} tokens and is repeated, so that losses past them are of text "
              "seen before", file=sys.stderr)
    rows = []
    with Progress("tok", "sweep") as report:
        for row in sweep_rows(subject, held.ids.repeat(repeats), args.contexts, plan, report):
            rows.append(row)
            tqdm.write(f"{row['context']:,} tokens: {row['status']}", file=sys.stderr)
    result = dict(formats=plan.formats, margin_bytes=margin(subject, args.chunk), text_tokens=len(held.ids),
                  text_repeated=repeats > 1, data_sha256=held.sha256, rows=rows)
    finish(args, subject, "sweep", sweep_table(rows), result)
