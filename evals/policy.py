"""The search for the cache policy that meets a budget; its result is the kv_policy.json that --kv-cache auto reads."""

import copy
import dataclasses
import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

import train_dba
from evals.subject import (
    Progress,
    Report,
    Subject,
    check_out,
    held_out,
    load_subject,
    quiet,
    read_through,
    text_table,
    write_result,
)
from evals.timing import WARM_UP, decode_times
from paper.stats import frontier
from train_dba import HETERO, KVCache, UserError, autocast, bytes_per_token, resolve_kernel, rotate_cache

FOUR_BITS = ("q4_0", "q4_sym", "nf4")
TRIED = ("q8_0", *FOUR_BITS, "q3_0")                       # on one stream alone
RESIDUALS = (32, 128)                                      # tried where they are at most a quarter of the context
CHECKS = ("delta_nll", "kl", "max_delta_logit")


@dataclass(frozen=True)
class Policy:
    """What a cache may be: a format per stream, as (stream, format) pairs, rotation, and newest tokens in fp16."""
    formats: tuple[tuple[str, str], ...]
    rotate: bool = False
    residual: int = 0

    def bytes_per_token(self, cfg, block: int) -> float:
        """Mean bytes of a token in a window of `block` tokens, the residual window with the rest."""
        newest = {name: train_dba.ring_format(fmt) for name, fmt in self.formats}
        old, new = bytes_per_token(cfg, dict(self.formats)), bytes_per_token(cfg, newest)
        return (old * (block - self.residual) + new * self.residual) / block

    def quantises(self) -> bool:
        return any(fmt not in train_dba.FLOAT_FORMATS for _, fmt in self.formats)

    def __str__(self):
        words = [f"{name} {fmt}" for name, fmt in self.formats]
        if self.rotate:
            words.append("rotated")
        if self.residual:
            words.append(f"{self.residual} newest fp16")
        return ", ".join(words)


@dataclass(frozen=True)
class Budget:
    """What a policy must keep to: {check: limit}, and the most bytes per token; which of the two was asked for decides
    what is best within them."""
    limits: dict
    most_bytes: float = math.inf

    def failures(self, measured: dict) -> list[str]:
        """Names of the checks that are failed; a NaN fails."""
        return [name for name in CHECKS if name in self.limits and not measured[name] <= self.limits[name]]


# -----------------------------------------------------------------------------
# What is tried

def single_streams(streams: Iterable[str]) -> list[Policy]:
    """Policies that quantise one stream and leave the others fp16."""
    policies = []
    for rotate, alone, fmt in itertools.product((False, True), streams, TRIED):
        policies.append(Policy(tuple((name, fmt if name == alone else "fp16") for name in streams), rotate))
    return policies


def best_four_bits(stream: str, rotate: bool, tried: dict[Policy, dict]) -> str:
    """The 4-bit format that did best on one stream alone, by KL, which is less noisy than nll."""
    least = {}
    for policy, measured in tried.items():
        fmt = dict(policy.formats)[stream]
        if policy.rotate == rotate and fmt in FOUR_BITS:
            least[fmt] = measured["kl"]
    return min(least, key=least.get)


def mixes(streams: dict[str, int], tried: dict[Policy, dict]) -> Iterator[Policy]:
    """Policies that mix fp16, q8_0, q3_0 and, per stream, the 4 bits that did best alone; hetero, and hetero with the
    paths swapped."""
    for rotate in (False, True):
        choices = []
        for name in streams:
            formats = ("fp16", "q8_0", best_four_bits(name, rotate, tried), "q3_0")
            choices.append([(name, fmt) for fmt in formats])
        for formats in itertools.product(*choices):
            yield Policy(formats, rotate)
        if "k_geo" in streams:
            semantic = next(iter(streams))                 # k_sem, or the latent
            hetero = {name: HETERO[name] for name in streams}
            for formats in (hetero, {**hetero, semantic: hetero["k_geo"], "k_geo": hetero[semantic]}):
                yield Policy(tuple(formats.items()), rotate)


def best_first(sizes: dict[Policy, float], tried: dict[Policy, dict]) -> list[Policy]:
    """The policies that no other beats in both bytes and nll, fewest bytes first."""
    points = [(sizes[policy], measured["delta_nll"], i, policy) for i, (policy, measured) in enumerate(tried.items())]
    return [point[-1] for point in frontier(points)]


def sizes_of(policies: Iterable[Policy], cfg, block: int) -> dict[Policy, float]:
    return {policy: policy.bytes_per_token(cfg, block) for policy in policies}


def search(subject: Subject, block: int, measure: Callable[[list[Policy]], dict],
           most_bytes: float) -> dict[Policy, dict]:
    """{policy: measurements}, in three rounds: one stream at a time, mixes of what did well, residual windows for the
    best of those. most_bytes: mixes of more bytes per token, in a window of `block` tokens, are left out. measure:
    policies -> measurements."""
    cfg, streams = subject.cfg, subject.cfg.attention.streams
    tried = measure(single_streams(streams))

    def untried(policies: Iterable[Policy]) -> list[Policy]:
        new = []
        for policy in dict.fromkeys(policies):
            if policy not in tried and policy.quantises() and policy.bytes_per_token(cfg, block) <= most_bytes:
                new.append(policy)
        return new

    tried |= measure(untried(mixes(streams, tried)))
    with_window = []
    for policy, residual in itertools.product(best_first(sizes_of(tried, cfg, block), tried), RESIDUALS):
        if residual <= block // 4:
            with_window.append(dataclasses.replace(policy, residual=residual))
    tried |= measure(untried(with_window))
    return tried


# -----------------------------------------------------------------------------
# How it is measured

@torch.inference_mode()
def policy_logits(subject: Subject, model, ids: torch.Tensor, policy: Policy, last: int) -> torch.Tensor:
    """Logits [B, last, V] at the last positions of ids [B, T]."""
    cache = KVCache(subject.cfg, len(ids), ids.size(1), dict(policy.formats), policy.residual, subject.device)
    with autocast(subject.device, subject.dtype):
        hidden = torch.cat([*read_through(model, ids, cache)], 1)
        return model.logits(hidden[:, -last:])


def compare_logits(expected: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """[3, B] per sequence of logits [B, T, V] and targets [B, T]: difference in mean nll, mean KL, and the largest
    difference of a logit."""
    p, q = expected.log_softmax(-1), logits.log_softmax(-1)
    nll = (p - q).gather(-1, targets[..., None])[..., 0].double().mean(1)
    kl = (p.exp() * (p - q)).sum(-1).double().mean(1)
    return torch.stack([nll, kl, (expected - logits).double().abs().amax((1, 2))]).cpu()


def measure_policies(subject: Subject, rotated, policies: list[Policy], windows: torch.Tensor, last: int,
                     batch_size: int = 8, report: Report = quiet) -> dict[Policy, dict]:
    """{policy: measurements} against the fp16 cache, on the last tokens of windows [n, T + 1]: all that they see,
    beyond a residual window, has been quantised. rotated: the model after rotate_cache()."""
    fp16 = Policy(tuple((name, "fp16") for name in subject.cfg.attention.streams))
    parts = {policy: [] for policy in policies}
    done, total = 0, len(windows) * len(parts)
    for batch in windows.to(subject.device).split(batch_size):
        expected = policy_logits(subject, subject.model, batch[:, :-1], fp16, last)
        for policy in parts:
            model = rotated if policy.rotate else subject.model
            logits = policy_logits(subject, model, batch[:, :-1], policy, last)
            parts[policy].append(compare_logits(expected, logits, batch[:, -last:]))
            report(done := done + len(batch), total)
    results = {}
    for policy, columns in parts.items():
        nll, kl, logit = torch.cat(columns, 1).nan_to_num(math.inf, math.inf, -math.inf)          # [n] each
        error = (nll.std() / math.sqrt(len(nll))).item() if len(nll) > 1 else None
        results[policy] = dict(delta_nll=nll.mean().item(), standard_error=error, kl=kl.mean().item(),
                               max_delta_logit=logit.max().item(), tokens=last * len(nll))
    return results


def calibration_windows(ids: torch.Tensor, count: int, length: int) -> torch.Tensor:
    """[count, length + 1] token ids, spread evenly over ids [N]. Raises UserError for a text that is too short."""
    if len(ids) <= length:
        raise UserError(f"{len(ids):,} tokens are too few for a window of {length:,}; give a longer --data")
    starts = torch.linspace(0, len(ids) - length - 1, count, dtype=torch.float64).long().tolist()
    return torch.stack([ids[start:start + length + 1] for start in starts])


def separate_windows(ids: torch.Tensor, count: int, length: int) -> torch.Tensor:
    """calibration_windows(), at most as many as lie side by side in the text: in windows that overlapped, a token would
    count more than once, and the standard error would be too small."""
    return calibration_windows(ids, min(count, max(1, (len(ids) - 1) // length)), length)


def kernel_times(subject: Subject, policy: Policy, tokens: int) -> dict[str, float]:
    """{--kernel: median ms of a decode step at the end of so many tokens} for a policy's formats, or {} where `auto`
    is the torch path at that length."""
    if resolve_kernel("auto", subject.device, dict(policy.formats).values())[0] == train_dba.TORCH:
        return {}
    times, steps = {}, 16
    prompt = torch.zeros(1, tokens - WARM_UP - steps, dtype=torch.long, device=subject.device)
    for kernel in ("auto", "torch"):
        runs = decode_times(subject, prompt, {"policy": dict(policy.formats)}, kernel=kernel, steps=steps, prefills=1)
        times[kernel] = statistics.median(runs["policy"].step_ms)
    return times


# -----------------------------------------------------------------------------
# The choice

def choose(sizes: dict[Policy, float], tried: dict[Policy, dict], budget: Budget,
           measure_long: Callable[[list[Policy]], dict] | None = None) -> tuple[Policy | None, dict]:
    """(the best policy that passes or None, {policy: long measurements}). A budget of bytes is used for the least nll,
    one of nll for the fewest bytes. measure_long: None, or policies -> measurements."""
    passing = []
    for policy, measured in tried.items():
        if not budget.failures(measured) and sizes[policy] <= budget.most_bytes:
            order = (sizes[policy], measured["delta_nll"])
            passing.append((order if math.isinf(budget.most_bytes) else order[::-1], len(passing), policy))
    long = {}
    for _, _, policy in sorted(passing):
        if measure_long is None:
            return policy, long
        long |= measure_long([policy])
        if not budget.failures(long[policy]):
            return policy, long
    return None, long


def table(sizes: dict[Policy, float], tried: dict[Policy, dict], budget: Budget, chosen: Policy,
          long: dict[Policy, dict]) -> list[tuple]:
    """(head, *rows) of all that was tried, fewest bytes first."""
    rows = [("B/token", "ΔNLL", "KL", "max |Δlogit|", "policy", "fails", "")]
    best = best_first(sizes, tried)
    for policy in sorted(tried, key=lambda policy: (sizes[policy], tried[policy]["delta_nll"])):
        measured, failed, marks = tried[policy], budget.failures(tried[policy]), []
        if policy in long:
            failed += [f"long {name}" for name in budget.failures(long[policy])]
        if sizes[policy] > budget.most_bytes:
            failed.append("bytes")
        if policy in best:
            marks.append("frontier")
        if policy == chosen:
            marks.append("<- chosen")
        rows.append((f"{sizes[policy]:.1f}", f"{measured['delta_nll']:+.6f}", f"{measured['kl']:.6f}",
                     f"{measured['max_delta_logit']:.3f}", policy, " ".join(failed) or "ok", " ".join(marks)))
    return rows


def finite(measured: dict | None) -> dict | None:
    """Measurements as JSON may hold them."""
    if measured is None:
        return None
    return {name: value if value is None or math.isfinite(value) else None for name, value in measured.items()}


def result_of(subject: Subject, sizes: dict[Policy, float], tried: dict[Policy, dict], budget: Budget, chosen: Policy,
              long: dict[Policy, dict], times: dict[str, float]) -> dict:
    """What kv_policy.json says; train_dba.py reads checkpoint_sha256, formats, rotate, residual and kernel of it."""
    rows = []
    for policy, measured in tried.items():
        rows.append(dict(formats=dict(policy.formats), rotate=policy.rotate, residual=policy.residual,
                         bytes_per_token=sizes[policy], **finite(measured), long=finite(long.get(policy))))
    return dict(checkpoint_sha256=subject.sha256, formats=dict(chosen.formats), rotate=chosen.rotate,
                residual=chosen.residual, kernel=min(times, key=times.get, default="auto"), kernel_ms=times,
                bytes_per_token=bytes_per_token(subject.cfg, dict(chosen.formats)),
                bytes_per_token_with_residual=sizes[chosen], thresholds=budget.limits, short=tried[chosen],
                long=long.get(chosen), tried=rows)


def main(args) -> None:
    """Search for the cache policy that meets a budget, and write kv_policy.json, which --kv-cache auto reads."""
    if (args.max_delta_nll is None) == (args.max_kv_bytes_per_token is None):
        raise UserError("give one of --max-delta-nll and --max-kv-bytes-per-token")
    check_out(args.out)
    subject = load_subject(args.ckpt, args.device, args.dtype)
    held = held_out(subject, args.data)
    block, rotated = args.block or subject.cfg.block, rotate_cache(copy.deepcopy(subject.model))
    limits = dict(delta_nll=args.max_delta_nll, kl=args.max_kl, max_delta_logit=args.max_delta_logit)
    budget = Budget({name: limit for name, limit in limits.items() if limit is not None},
                    args.max_kv_bytes_per_token or math.inf)

    def check(what: str, length: int, last: int) -> Callable[[list[Policy]], dict]:
        count = max(1, args.tokens // length)
        windows = separate_windows(held.ids, count, length)
        if len(windows) < count:
            print(f"{what}: {len(windows)} of {length:,} tokens fit into the text side by side, not {count}")

        def measure(policies: list[Policy]) -> dict:
            with Progress("window", what) as report:
                return measure_policies(subject, rotated, policies, windows, last, args.batch_size, report)
        return measure

    measure_long = check("long windows", args.long_factor * block, block) if args.long else None
    tried = search(subject, block, check("policies", block, max(1, block // 2)), budget.most_bytes)
    sizes = sizes_of(tried, subject.cfg, block)
    chosen, long = choose(sizes, tried, budget, measure_long)
    if chosen is None:
        least = min(tried, key=lambda policy: (tried[policy]["kl"], sizes[policy]))
        raise UserError(f"none of {len(tried)} policies passes; the nearest to the fp16 cache: {least}, "
                        f"{sizes[least]:g} bytes per token, ΔNLL {tried[least]['delta_nll']:+.6f}, "
                        f"KL {tried[least]['kl']:.6f}")
    times = kernel_times(subject, chosen, args.kernel_tokens)
    result = result_of(subject, sizes, tried, budget, chosen, long, times)
    path = Path(args.out or subject.folder)
    path = path if path.suffix == ".json" else path / train_dba.POLICY_FILE
    print(text_table(table(sizes, tried, budget, chosen, long)))
    write_result(path, subject, vars(args), dict(result, block=block, data_sha256=held.sha256))
    print(f"written to {path}")
