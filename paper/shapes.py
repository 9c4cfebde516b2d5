"""Shapes of the files that the report is made of, for train_dba.check."""

from collections.abc import Callable
from pathlib import Path

import train_dba
from train_dba import BROKEN, UserError, brief, check
from train_dba import whole_number as count

UNREADABLE = (*BROKEN, OSError)
LARGEST_FILE = 2**26                                       # bytes


def number(value) -> bool:
    """Finite, and small enough to be added up."""
    return type(value) in (int, float) and -1e300 < value < 1e300


def list_of(shape) -> Callable:
    def list_of_these(value):
        check(value, list, "it")
        for i, item in enumerate(value):
            check(item, shape, f"item {i}")
        return True
    return list_of_these


def map_of(shape) -> Callable:
    """An object with any keys."""
    def map_of_these(value):
        check(value, dict, "it")
        for key, item in value.items():
            check(item, shape, f"{key:.60}")
        return True
    return map_of_these


def maybe(shape) -> Callable:
    def this_or_null(value):
        if value is not None:
            check(value, shape, "it")
        return True
    return this_or_null


def both(*shapes) -> Callable:
    def both_of_these(value):
        for shape in shapes:
            check(value, shape, "it")
        return True
    return both_of_these


def read_json(path: Path, shape):
    """The value of a JSON file of that shape. Raises UserError, in one line, for any other file."""
    try:
        return train_dba.read_json(path, shape, LARGEST_FILE)
    except UNREADABLE as e:
        raise UserError(f"{path} is damaged ({brief(e)})") from None


# -----------------------------------------------------------------------------
# What is read of a run folder; the files hold more

RANKS = {"entropy_rank_sigma": "entropy σ", "entropy_rank_lambda": "entropy λ",
         "participation_ratio": "participation", "stable_rank": "stable", "k90": "k90", "k95": "k95", "k99": "k99"}
CHECKS = ("exact", "content", "preferred", "loop")         # of a probe

ENV = dict(cpu=str, device=str, threads=count, commit=maybe(str), dirty=maybe(bool))
META = dict(config=dict, params=dict(total=count), kv_bytes_per_token=dict(fp16=number),
            data=both(dict(sha256=str), map_of(str | int | None)))
TRAIN = {"step": count, "tokens": count, "loss": number, "tok_s": number, "mem_bytes": maybe(number),
         "grad_norm?": number}
EVAL = dict(tokens=count, val_loss=number, val_tokens=count, best_val_loss=number)

RESULT = dict(settings=dict(command=str, dtype=str), env=ENV, model=dict(config=dict))
SPLITS = dict.fromkeys(CHECKS, list_of(number))
MEASURED = dict(delta_nll=number, kl=number, max_delta_logit=number, tokens=count)
RANK_RECORD = dict(path=str, rope=str, of=str, channels=count, ranks=dict.fromkeys(RANKS, number))
LATENCY_ROW = dict(prompt=count, cache=str, kernel=str, prefill_seconds=number, ms_per_token=number,
                   ratio_to_fp16=number, share_of_copy=maybe(number))
MEMORY_ROW = dict(tokens=count, cache=str, bytes_per_token=number, formula_bytes=number, cache_bytes=number,
                  fill_extra_bytes=maybe(number), decode_extra_bytes=maybe(number))
SWEEP_ROW = {"context": count, "status": str, "cache_bytes?": number, "prefill_seconds?": number,
             "ms_per_token?": number, "loss?": number}
TASK = {"n": count, "acc": number, "acc_stderr": number, "acc_norm?": number, "acc_norm_stderr?": number}
BUDGET = dict(max_delta_nll=maybe(number), max_kv_bytes_per_token=maybe(number), tokens=count, long_factor=number)
MASK_ROW = {"text": str, "length": count, "choice": str, "windows": count, "tokens": count, "kept": number,
            "kl": number, "kl_half": maybe(number), "accuracy_kept": maybe(number), "delta_nll": number,
            "accuracy_kept_half": maybe(number), "mass?": number, "mse?": number, "mse_half?": maybe(number),
            "kv_kept?": number, "index_bits?": number}
GRADIENT_ROW = dict(text=str, length=count, start=count, choice=str, least=number, median=number)
COST_ROW = dict(length=count, attention=str, layer_ms=number, layer_bytes=maybe(number), forward_ms=number,
                forward_bytes=maybe(number), ms_per_token=number)
SURGERY = dict(env=ENV, teacher=str, rows=map_of(dict(bytes=number)))
TEXT = dict(kls=list_of(number))                           # of a row: divergence from the teacher, by window
COMMANDS = {                                               # of eval_dba.py: what its results hold beside RESULT
    "ppl": dict(loss=number, ppl=maybe(number), bpb=maybe(number), tokens=count, block=count, stride=count,
                bytes_per_token=number),
    "tasks": dict(tasks=map_of(TASK)),
    "probes": dict(counts=list_of(dict(set=str, kind=str, n=count, margin=number, **SPLITS)),
                   compare=list_of(dict(set=str, n=count, **SPLITS))),
    "rank": dict(trained=list_of(RANK_RECORD), initial=list_of(RANK_RECORD), moment=str, tokens=count, block=count),
    "latency": dict(rows=list_of(LATENCY_ROW)),
    "memory": dict(rows=list_of(MEMORY_ROW)),
    "sweep": dict(formats=map_of(str), rows=list_of(SWEEP_ROW)),
    "policy": {"formats": map_of(str), "rotate": bool, "residual": count, "bytes_per_token": number, "thresholds": dict,
               "bytes_per_token_with_residual": number, "short": MEASURED, "long": maybe(MEASURED), "kernel": str,
               "kernel_ms": map_of(number), "tried": list, "settings": BUDGET, "block?": count},
    "mask": {"summary": list_of(MASK_ROW), "gradients?": list_of(GRADIENT_ROW), "costs?": list_of(COST_ROW)},
}

TRAINING_ROW = {"name": str, "params": count, "times_naive": number, "share_of_matmul_rate": number,
                "times_llama?": number}
DECODE_ROW = dict(shape=str, tokens=count, kernel=str, ms=both(
    dict.fromkeys(("kernel", "torch", "dequantised", "standard"), number), map_of(number)))
QUALITY_ROW = dict(run=str, policy=str, rotate=bool, tokens=count, bytes_per_token=number, delta_nll=number,
                   standard_error=number, kl=number, top1=number)
PARITY_ROW = dict(task=str, metric=str, items=count, ours=number, theirs=number, items_that_differ=count,
                  largest_difference=number)
BENCHMARKS = {                                             # runs/bench/<name>.json
    "train_speed": dict(env=ENV, rounds=count, rows=list_of(TRAINING_ROW)),
    "loss_memory": {"chunked": number, "full logits": number},
    "tokenize_speed": dict(cores=count, ratio=number),
    "decode_speed": dict(env=ENV, rounds=count, rows=list_of(DECODE_ROW)),
    "long_context": dict(tokens=count, cache_bytes=number, prefill_seconds=number, prefill_extra_bytes=maybe(number),
                         decode_ms=number, decode_extra_bytes=maybe(number)),
    "cache_quality": dict(env=ENV, rows=list_of(QUALITY_ROW)),
    "task_parity": dict(ckpt=str, lm_eval=str, rows=list_of(PARITY_ROW)),
}

STEPS_ROW = {"case": str, "micro": count, "block": count, "compiled": bool, "dtype": str, "params": count,
             "tok_s": maybe(number), "slowest?": number, "fastest?": number, "gib?": number, "mfu?": maybe(number),
             "steps?": count}
SDPA_ROW = dict(case=str, width=count, backend=str, ms=maybe(number))
DEVICE_ROW = {"case": str, "format": str, "batch": count, "tokens": count, "us": number, "cache_mib": number,
              "times_faster_than_sdpa?": number}
DEVICE = dict(block=str, toy=bool, env=ENV)                # runs/bench/<machine>/<any name>.json, by bench_dba.py
BLOCKS = dict(train=list_of(STEPS_ROW), sdpa=list_of(SDPA_ROW), decode=list_of(DEVICE_ROW))      # that are reported
