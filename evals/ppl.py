"""Held-out loss, perplexity and bits per byte over a whole file, through a cache of any format."""

import math
import sys

import torch

from evals.subject import (
    HeldOut,
    Progress,
    Report,
    Subject,
    cache_name,
    check_out,
    formats_of,
    held_out,
    load_subject,
    quiet,
    read_through,
    result_path,
    text_table,
    write_result,
)
from evals.timing import warning_past_context
from paper.stats import mean_interval, perplexity
from train_dba import KVCache, UserError, autocast, bytes_per_token, rotate_cache


def windows(ids: torch.Tensor, block: int, stride: int):
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
def window_nll(subject: Subject, batch: torch.Tensor, formats: dict, residual: int = 0) -> torch.Tensor:
    """nll [B, T - 1] of token ids [B, T] in nats, each row through a cache of its own."""
    cache = KVCache(subject.cfg, len(batch), batch.size(1) - 1, formats, residual, subject.device)
    nll, scored = [], 1
    with autocast(subject.device, subject.dtype):
        for hidden in read_through(subject.model, batch[:, :-1], cache):
            targets = batch[:, scored:scored + hidden.size(1)]
            nll.append(torch.nn.functional.cross_entropy(subject.model.logits(hidden).mT, targets, reduction="none"))
            scored += hidden.size(1)
    return torch.cat(nll, 1)


def window_sums(subject: Subject, formats: dict, ids: torch.Tensor, block: int, stride: int, *, residual: int = 0,
                batch_size: int = 8, report: Report = quiet) -> list[tuple[float, int]]:
    """[(sum of nll in nats, how many tokens)] of the windows of ids [N], through a cache of these formats."""
    full, short = [], []
    for _, window, first in windows(ids, block, stride):
        (full if len(window) == block + 1 else short).append((window, first))
    groups = [full[i:i + batch_size] for i in range(0, len(full), batch_size)]
    groups += [[window] for window in short]
    sums, done = [], 0
    for group in groups:
        batch = torch.stack([window for window, _ in group]).to(subject.device)
        nll = window_nll(subject, batch, formats, residual).double()
        for row, (_, first) in zip(nll, group):
            scored = row[first - 1:]
            sums.append((scored.sum().item(), len(scored)))
            done += len(scored)
        report(done, len(ids) - 1)
    return sums


def paired_difference(sums: list[tuple], others: list[tuple]) -> tuple[float, float | None]:
    """(difference of mean nll per token from others, half-width of its 95 % interval or None) over the same windows:
    that of a ratio of sums over windows, by its linearisation."""
    tokens = sum(count for _, count in sums)
    differences = []
    for (nll, count), (other, _) in zip(sums, others):
        differences.append((nll - other, count))
    mean = sum(nll for nll, _ in differences) / tokens
    scale = len(sums) / tokens
    _, half = mean_interval([(nll - mean * count) * scale for nll, count in differences])
    return mean, half


def measure(subject: Subject, held: HeldOut, caches: dict[str, dict], *, block: int, stride: int, residual: int = 0,
            batch_size: int = 8, report: Report = quiet) -> dict[str, dict]:
    """{cache: its loss in nats per token, ppl (None where exp is no float), bpb, delta_nll ± delta_nll_half against
    fp16 where that is among the caches}. Raises UserError for a loss that is no number."""
    sums, tokens, results = {}, len(held.ids) - 1, {}
    for i, (name, formats) in enumerate(caches.items()):
        def part(done: int, total: int, before: int = i * tokens) -> None:
            report(before + done, len(caches) * total)

        sums[name] = window_sums(subject, formats, held.ids, block, stride, residual=residual, batch_size=batch_size,
                                 report=part)
        loss = sum(nll for nll, _ in sums[name]) / tokens
        if not math.isfinite(loss):
            raise UserError(f"the loss is {loss}: a broken checkpoint, or a cache format that can't hold its values")
        bpb = loss / math.log(2) * tokens / held.text_bytes if held.text_bytes else None
        results[name] = dict(loss=loss, ppl=perplexity(loss), bpb=bpb, tokens=tokens, block=block, stride=stride,
                             formats=formats, bytes_per_token=bytes_per_token(subject.cfg, formats),
                             data_sha256=held.sha256)
    for name, result in results.items():
        delta = paired_difference(sums[name], sums["fp16"]) if "fp16" in sums and name != "fp16" else (None, None)
        result.update(delta_nll=delta[0], delta_nll_half=delta[1], windows=len(sums[name]))
    return results


def table(results: dict[str, dict]) -> list[tuple]:
    """(head, *rows) of what measure() returned."""
    rows = [("cache", "B/token", "tokens", "loss", "ΔNLL to fp16", "perplexity", "bits/byte")]
    for name, measured in results.items():
        delta, half = measured["delta_nll"], measured["delta_nll_half"]
        change = "-" if delta is None else f"{delta:+.5f}" if half is None else f"{delta:+.5f} ± {half:.5f}"
        ppl = "-" if measured["ppl"] is None else f"{measured['ppl']:.4f}"
        bpb = "-" if measured["bpb"] is None else f"{measured['bpb']:.4f}"
        rows.append((name, measured["bytes_per_token"], measured["tokens"], f"{measured['loss']:.5f}", change, ppl,
                     bpb))
    return rows


def main(args) -> None:
    """Held-out loss, perplexity and bits per byte over a whole file, through a cache of any format."""
    check_out(args.out)
    subject = load_subject(args.ckpt, args.device, args.dtype)
    caches = {name: formats_of(subject, name) for name in args.kv_cache}
    if len(caches) > 1 and args.out and args.out.endswith(".json"):
        raise UserError("--out names one file, --kv-cache several caches; name a folder")
    block = args.block or subject.cfg.block
    stride = args.stride or max(1, block // 2)
    if stride > block:
        raise UserError(f"--stride {stride} is longer than the window of {block} tokens")
    if warning := warning_past_context(subject, block):
        print(warning, file=sys.stderr)
    held = held_out(subject, args.data, args.max_tokens)
    if args.kv_rotate:
        rotate_cache(subject.model)
    with Progress("tok", "loss") as report:
        results = measure(subject, held, caches, block=block, stride=stride, residual=args.kv_residual,
                          batch_size=args.batch_size, report=report)
    named = {}
    for name, measured in results.items():
        named[cache_name(name, args.kv_rotate, args.kv_residual)] = measured
    print(text_table(table(named)))
    for name, measured in named.items():
        path = result_path(args.out, subject, f"eval_ppl_{name}")
        write_result(path, subject, vars(args), measured)
        print(f"written to {path}")
