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
import dataclasses
import hashlib
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import train_dba
from train_dba import (FORMATS, GPT, Config, KVCache, UserError, autocast, bytes_per_token, cache_formats,
                       load_checkpoint, load_model, pick_device, pick_dtype, provenance, rotate_cache)


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
