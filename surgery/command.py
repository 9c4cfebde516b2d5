"""
The commands of convert_dba.py that give a pretrained model other attention (dba), and that measure what a share of its
cache's bytes is best spent on (advise).
"""

import argparse
import dataclasses
import json
import math
import sys
from pathlib import Path

import torch

from evals.policy import Policy, calibration_windows
from evals.subject import (
    Progress,
    Subject,
    check_out,
    json_text,
    load_subject,
    read_data,
    text_table,
)
from kernels.rotate import rotated
from surgery.calibrate import SINK, calibrate, check_teacher
from surgery.convert import Layer, choose, convert, student_config
from surgery.heal import Texts, check_begun, distance, heal
from surgery.refit import refit_outputs
from surgery.targets import FITTED, TARGETS
from train_dba import (
    BROKEN,
    DEFAULTS,
    ELSEWHERE,
    GPT,
    RUN_FILES,
    Config,
    KVCache,
    UserError,
    brief,
    bytes_per_token,
    count_params,
    derived,
    file_hash,
    kv_bytes_per_token,
    load_checkpoint,
    load_model,
    own_folder,
    pick_device,
    pick_dtype,
    provenance,
    read_json,
    read_log,
    refuse_own_source,
    relative,
    shell_quote,
    tokenizer_hash,
    write_text,
)

RECORD = "convert.json"                                    # in the run folder: what was asked for, and what was chosen
QUANTISED = ("q8_0", "q4_0", "q3_0", "q2_0")               # what advise() tries, keys never below values
NEWEST = 32                                                # tokens that stay fp16, in windows of four times as many
LEAST_SHARE, MOST_TRIED = 0.2, 3                           # of the elements; and candidates of a kind


def fraction(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most 1")
    return value


def positive(text: str) -> int:
    if not 1 <= (value := int(text)) < 2**31:
        raise argparse.ArgumentTypeError(f"{text} is not from 1 to below 2**31")
    return value


def count(text: str) -> int:
    if not 0 <= (value := int(text)) < 2**63:
        raise argparse.ArgumentTypeError(f"{text} is not from 0 to below 2**63")
    return value


def rate(text: str) -> float:
    if not 0 < (value := float(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and finite")
    return value


def common_flags(p: argparse.ArgumentParser) -> None:
    p.add_argument("--model", required=True, help="the teacher: .gguf file, Hugging Face folder or run folder")
    p.add_argument("--cache-share", type=fraction, required=True, help="of the teacher's cache that may be kept")
    p.add_argument("--data", type=Path, nargs="+", required=True, help="texts to calibrate on, a window of each in "
                   "turn, and to heal on")
    p.add_argument("--val-data", type=Path, nargs="+", help="texts to measure on (the last tenths of --data)")
    p.add_argument("--window", type=positive, default=512, help="tokens of a window (%(default)s)")
    p.add_argument("--calibration", type=positive, default=36, help="windows of the moments, and of the output "
                   "projections' fit (%(default)s)")
    p.add_argument("--fisher", type=positive, default=6, help="of these, windows of the Fisher matrices (%(default)s)")
    p.add_argument("--val-windows", type=positive, default=8, help="windows to measure on (%(default)s)")


def dba_flags(p: argparse.ArgumentParser) -> None:
    common_flags(p)
    p.add_argument("--target", choices=TARGETS, default="latent", help="decoupled attention with one latent, or per "
                   "key head; mla; gqa, whose key heads are means (%(default)s)")
    p.add_argument("--out-dir", type=Path, required=True, help="run folder; what it has is gone on with")
    p.add_argument("--heal-tokens", type=count, default=0, help="tokens to heal on after the conversion (none)")
    p.add_argument("--lr", type=rate, default=3e-5, help="of healing (%(default)s; 2e-4 destroyed)")
    p.add_argument("--batch-size", type=positive, default=1, help="windows of a step (%(default)s)")
    p.add_argument("--eval-every", type=positive, default=50, help="steps (%(default)s)")
    p.add_argument("--save-every", type=positive, default=50, help="steps (%(default)s)")
    p.add_argument("--seed", type=count, default=0)
    p.add_argument("--device", default="auto", help="of healing; the conversion is a CPU's")
    p.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    p.add_argument("--overwrite", action="store_true", help="start afresh")


def advise_flags(p: argparse.ArgumentParser) -> None:
    common_flags(p)
    p.add_argument("--out", type=Path, help="write the table as JSON")


# -----------------------------------------------------------------------------
# What both begin with

def open_teacher(path: str) -> Subject:
    """The teacher, frozen; of its settings those of its shape alone, as how a run was trained doesn't fit its
    conversion."""
    subject = load_subject(path, "cpu")
    check_teacher(subject.model)
    subject.model.requires_grad_(False)
    shape = {f.name: getattr(subject.cfg, f.name) for f in dataclasses.fields(Config) if f.metadata["group"] == "model"}
    settings = {**DEFAULTS, **shape, "size": None, "exp": None, "tokenizer": subject.cfg.tokenizer}
    subject.model.cfg = Config(**derived(settings))
    return subject


def in_turn(texts: list[torch.Tensor], count: int, length: int) -> torch.Tensor:
    """[count, length + 1] token ids, spread evenly over each of the texts, which take turns."""
    each = [calibration_windows(ids, -(-count // len(texts)), length) for ids in texts]
    return torch.stack(each, 1).flatten(0, 1)[:count]


def read_texts(subject: Subject, args: argparse.Namespace) -> tuple[Texts, torch.Tensor]:
    """(texts to train and to measure on, calibration windows [n, window])."""
    if args.window <= SINK:
        raise UserError(f"--window {args.window}: the gradients of its first {SINK} tokens are left out; give more")
    if args.window > subject.cfg.block:
        raise UserError(f"--window {args.window} is longer than the model's context of {subject.cfg.block}")
    train = [read_data(subject, path).ids for path in args.data]
    if args.val_data:
        val = [read_data(subject, path).ids for path in args.val_data]
    else:
        val = [ids[-len(ids) // 10:] for ids in train]
        train = [ids[:-len(ids) // 10] for ids in train]
    identity = dict(train_tokens=sum(map(len, train)), val_tokens=sum(map(len, val)),
                    vocab_size=subject.tokenizer.vocab_size, sha256=file_hash(*args.data),
                    val_sha256=file_hash(*args.val_data) if args.val_data else None,
                    tokenizer_sha256=tokenizer_hash(subject.tokenizer))
    windows, held_out = (in_turn(parts, count, args.window) for parts, count in (
        (train, args.calibration), (val, args.val_windows)))
    return Texts(torch.cat(train).numpy(), held_out, identity), windows[:, :-1]


def layers_of(teacher: GPT, windows: torch.Tensor, graded: int) -> list[Layer]:
    with Progress("window", "calibrating") as report:
        moments = calibrate(teacher, windows, min(graded, len(windows)), report=report)
    return [Layer.of(block.attn, each) for block, each in zip(teacher.blocks, moments)]


# -----------------------------------------------------------------------------
# dba

def check_record(folder: Path, asked: dict, overwrite: bool) -> dict:
    """The folder's record, {} where it is empty. Raises UserError where that is of other settings, or the run is no
    conversion's."""
    path = folder / RECORD
    if overwrite:
        return {}
    if not path.exists():
        if held := [name for name in RUN_FILES if (folder / name).exists()]:
            raise UserError(f"{folder} holds {held[0]} of another run; {ELSEWHERE}")
        return {}
    try:
        record = read_json(path, {"asked": dict})
    except (*BROKEN, OSError) as e:
        raise UserError(f"{path} is damaged ({brief(e)}); {ELSEWHERE}") from None
    differ = [f"{name} was {record['asked'].get(name)!s:.20}, is {value!s:.20}" for name, value in asked.items()
              if record["asked"].get(name) != value]
    if differ:
        raise UserError(f"{folder} holds another conversion ({'; '.join(differ)}); {ELSEWHERE}")
    return record


def make_dba(args: argparse.Namespace, argv: list[str]) -> int:
    """Convert, then heal where that was asked for. Returns the exit code."""
    with own_folder(args.out_dir):
        return make_dba_in(args.out_dir, args, argv)


def make_dba_in(folder: Path, args: argparse.Namespace, argv: list[str]) -> int:
    check_out(str(folder))
    refuse_own_source(args.model, folder)
    teacher = open_teacher(args.model)
    texts, windows = read_texts(teacher, args)
    asked = dict(model=teacher.sha256, data=texts.identity["sha256"], val_data=texts.identity["val_sha256"],
                 **{name: getattr(args, name) for name in ("target", "cache_share", "window", "calibration", "fisher",
                                                         "val_windows", "seed")})
    record, steps = check_record(folder, asked, args.overwrite), -(-args.heal_tokens // (args.batch_size * args.window))
    log = read_log(folder / "train.jsonl") if record else []
    ckpt = load_checkpoint(folder / "last.pt") if record and (folder / "last.pt").exists() else None
    if ckpt:
        check_begun(folder, ckpt, dict(batch_size=args.batch_size, lr=args.lr))
    if log and log[-1]["type"] == "done" and log[-1]["step"] >= steps:
        print(f"{folder} is finished ({log[-1]['step']} steps of healing); larger --heal-tokens go on, --overwrite "
              "starts afresh")
        return 0
    if ckpt and ckpt["step"] > steps:
        raise UserError(f"{folder} was healed for {ckpt['step']} steps already, and {steps} are asked for; larger "
                        "--heal-tokens go on, --overwrite starts afresh")
    device = pick_device(args.device)
    dtype, _ = pick_dtype(args.dtype, device)
    warmup = min(5, steps)
    if ckpt:                                               # heal() puts the student where that left off
        student, warmup = load_model(ckpt), ckpt["config"].warmup_steps
        dtype = getattr(torch, ckpt["config"].dtype) if args.dtype == "auto" else dtype
    else:
        layers = layers_of(teacher.model, windows, args.fisher)
        try:
            with Progress("layer", "choosing widths") as report:
                student, chosen = TARGETS[args.target](teacher.model, layers, args.cache_share, report)
            if args.target in FITTED:
                with Progress("layer", "fitting outputs") as report:
                    refit_outputs(teacher.model, student, windows, report)
        except torch.linalg.LinAlgError as e:
            raise UserError(f"--data says too little of the model to convert it by ({brief(e)}); give a longer or more "
                            "varied text") from None
        record = dict(asked=asked, **chosen)
        sizes = " of ".join(f"{bytes_per_token(cfg, 'fp16'):,}" for cfg in (student.cfg, teacher.cfg))
        words = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in chosen.items())
        print(f"{args.target}: {words}; {sizes} bytes per token in fp16", flush=True)
    student.cfg = cfg = dataclasses.replace(
        student.cfg, seed=args.seed, data=", ".join(relative(str(path)) for path in args.data), val_data=None,
        out_dir=relative(str(folder)),
        dtype=str(dtype).removeprefix("torch."), steps=max(1, steps), batch_size=args.batch_size, lr=args.lr,
        min_lr=args.lr / 10, schedule="wsd", warmup_steps=warmup, weight_decay=0.0, eval_every=args.eval_every,
        save_every=args.save_every)
    for name in ("last.pt", "best.pt", "train.jsonl") if args.overwrite else ():
        (folder / name).unlink(missing_ok=True)            # not before all else has gone well
    for name, content in ((RECORD, record), ("resolved_config.json", dataclasses.asdict(cfg)),
                          ("env.json", provenance(device))):
        write_text(folder / name, json.dumps(content, indent=1) + "\n")
    write_text(folder / "command.txt", " ".join(["python3 convert_dba.py", *map(shell_quote, argv)]) + "\n")
    meta = dict(config=dataclasses.asdict(cfg), params=count_params(cfg, student.vocab_size),
                kv_bytes_per_token=kv_bytes_per_token(cfg), data=texts.identity, conversion=record)
    return heal(student.to(device), teacher.model.to(device), teacher.tokenizer, texts, steps, args.window, folder,
                dtype, meta)


# -----------------------------------------------------------------------------
# advise

def through_cache(model: GPT, policy: Policy):
    """The model as a function of token ids [1, T], each window through a cache of its own."""
    def logits(ids: torch.Tensor) -> torch.Tensor:
        return model(ids, cache=KVCache(model.cfg, len(ids), ids.size(1), dict(policy.formats), policy.residual))
    return logits


def alike(cfg: Config, fmt: str, residual: int) -> Policy:
    """One format for all that a model caches."""
    return Policy(tuple((name, fmt) for name in cfg.attention.streams), True, residual)


def residuals(window: int) -> tuple[int, ...]:
    """Numbers of newest tokens that stay fp16."""
    return (0, NEWEST) if NEWEST <= window // 4 else (0,)


def quantised_alone(subject: Subject, most: float, window: int) -> list[Policy]:
    """Formats of keys and values that fit, without and with a residual window, the largest first."""
    chosen = []
    for residual in residuals(window):
        fitting = []
        for i, k in enumerate(QUANTISED):
            for v in QUANTISED[i:]:
                policy = Policy((("k", k), ("v", v)), True, residual)
                if (size := policy.bytes_per_token(subject.cfg, window)) <= most:
                    fitting.append((size, policy))
        chosen += [policy for _, policy in sorted(fitting, key=lambda pair: -pair[0])[:MOST_TRIED]]
    return chosen


def converted(teacher: GPT, windows: torch.Tensor, graded: int, most: float) -> list[tuple[GPT, Policy]]:
    """(rotated student, its cache) of each format in which a conversion, calibrated on windows [n, T], fits."""
    layers, window, students = layers_of(teacher, windows, graded), windows.size(1), []
    for fmt, residual in (("fp16", 0), ("q8_0", 0), *(("q4_0", newest) for newest in residuals(window))):
        share = most / alike(teacher.cfg, fmt, residual).bytes_per_token(teacher.cfg, window)
        if not LEAST_SHARE <= share < 1:
            continue
        try:
            with Progress("layer", f"converting for {fmt}") as report:
                pairs, latent, _ = choose(teacher.cfg, layers, share, report)
        except UserError as e:
            print(f"no conversion for {fmt}: {e}", file=sys.stderr)
            continue
        cfg = student_config(teacher.cfg, pairs, latent)
        while latent > 1 and alike(cfg, fmt, residual).bytes_per_token(cfg, window) > most:
            latent -= 1                                    # blocks' scales take their share, too
            cfg = student_config(teacher.cfg, pairs, latent)
        student = convert(teacher, layers, pairs, latent)
        with Progress("layer", "fitting outputs") as report:
            refit_outputs(teacher, student, windows, report)
        students.append((rotated(student), alike(cfg, fmt, residual)))
    return students


def advise(args: argparse.Namespace) -> None:
    """Print, and write, the KL of what fits into a share of the bytes of an fp16 cache, and the best of it."""
    check_out(args.out and str(args.out.parent))
    if args.out and args.out.is_dir():
        raise UserError(f"--out {args.out} is a folder; name a file in it")
    subject = open_teacher(args.model)
    texts, windows = read_texts(subject, args)
    teacher, full = subject.model, bytes_per_token(subject.cfg, "fp16")
    most, turned = args.cache_share * full, rotated(teacher)
    candidates = [("quantised", turned, policy) for policy in quantised_alone(subject, most, args.window)]
    for student, policy in converted(teacher, windows, args.fisher, most):
        candidates.append(("converted", student, policy))
    if not candidates:
        raise UserError(f"nothing that is tried fits into --cache-share {args.cache_share}; give more")
    rows = []
    for kind, model, policy in candidates:
        with Progress("window", f"{kind} {policy}") as report:
            figures = distance(teacher, through_cache(model, policy), texts.held_out, report=report)
        rows.append(dict(kind=kind, cache=str(policy), formats=dict(policy.formats), residual=policy.residual,
                         bytes_share=policy.bytes_per_token(model.cfg, args.window) / full,
                         elements_share=sum(model.cfg.attention.streams.values()) / sum(
                             subject.cfg.attention.streams.values()), **figures))
    rows.sort(key=lambda row: row["kl"])
    print(text_table([("cache", "of fp16's bytes", "of the elements", "KL", "nll more"), *(
        (f"{row['kind']}, {row['cache']}", f"{100 * row['bytes_share']:.1f} %",
         f"{100 * row['elements_share']:.1f} %", f"{row['kl']:.4f}", f"{row['nll'] - row['teacher_nll']:+.4f}")
        for row in rows)]))
    best = rows[0]
    what = "quantise the cache" if best["kind"] == "quantised" else "convert, then quantise the cache"
    print(f"{what}: {best['cache']} has the least KL, {best['kl']:.4f} nats per token over {best['tokens']:,} tokens, "
          f"windows of {args.window} (conversions are not healed here)")
    if args.out:
        write_text(args.out, json_text(dict(model=Path(args.model).name, cache_share=args.cache_share, rows=rows,
                                            env=provenance(subject.device))))
