"""
What is measured and on which tokens: --ckpt to a Subject, --data to token ids; and a result to its file.

load_subject() reads what train_dba.read_model() does: a run folder (its best.pt), a checkpoint, or a pretrained Llama
as a .gguf file or a Hugging Face folder.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

import train_dba
from train_dba import (
    GPT,
    Config,
    KVCache,
    UserError,
    cache_formats,
    check_same_data,
    file_hash,
    pick_device,
    pick_dtype,
    provenance,
    read_model,
    tokenizer_hash,
)


@dataclass
class Subject:
    """What is measured: a model in eval mode, its tokenizer, the file or folder that both are from, the device and type
    of it, and what its checkpoint says of the data that it was trained on, where it does."""
    model: GPT
    tokenizer: object
    path: Path
    step: int | None
    sha256: str
    device: torch.device
    dtype: torch.dtype
    data: dict | None = None

    @property
    def cfg(self) -> Config:
        return self.model.cfg

    @property
    def folder(self) -> Path:
        """Where its results go."""
        return self.path.parent


def load_subject(ckpt: str | Path, device: str = "auto", dtype: str = "float32") -> Subject:
    """The Subject of --ckpt, --device and --dtype. Raises UserError."""
    device = pick_device(device)
    dtype, _ = pick_dtype(dtype, device)
    model, tokenizer, path, content = read_model(ckpt, device)
    return Subject(model, tokenizer, path, content.get("step"), file_hash(path), device, dtype, content.get("data"))


# -----------------------------------------------------------------------------
# Tokens

class HeldOut(NamedTuple):
    """Tokens to measure on: ids [N] int64, bytes of their text where they are known, and the sha256 of their file."""
    ids: torch.Tensor
    text_bytes: int | None
    sha256: str


def own_validation(subject: Subject) -> HeldOut:
    """The validation part that a checkpoint was trained with. Raises UserError unless it is the very same, in the ids
    of the checkpoint's own vocabulary."""
    cfg = subject.cfg
    if cfg.data is None:
        raise UserError("--data is missing: this model doesn't say what it was trained on")
    if subject.data is None:
        raise UserError("--data is missing: this checkpoint doesn't hold the hash of what it was trained on")
    brought = cfg.init_from or subject.tokenizer.name == "llama"                # a tokenizer that no flag names
    data = train_dba.load_data(cfg, subject.tokenizer if brought else None)
    check_same_data(subject.data, data, "the checkpoint", "put that file back, or name a text to measure by --data")
    return HeldOut(torch.from_numpy(data.val.astype("int64")), data.val_bytes, data.val_sha256 or data.sha256)


def read_data(subject: Subject, path: Path) -> HeldOut:
    """The tokens of a --data: a .npy by prepare_fineweb.py, or a text in the checkpoint's vocabulary."""
    if not path.is_file():
        raise UserError(f"--data {path} is not a file")
    if path.suffix == ".npy":
        ids, tokenizer, info = train_dba.open_token_file(path)
        if (tokenizer.name, tokenizer_hash(tokenizer)) != (subject.tokenizer.name, tokenizer_hash(subject.tokenizer)):
            raise UserError(f"{path} was made with {tokenizer.name}, {tokenizer.vocab_size} types; the model reads "
                            f"{subject.tokenizer.name}, {subject.tokenizer.vocab_size}, or other words")
        return HeldOut(torch.from_numpy(ids.astype("int64")), info["text_bytes"], info["sha256"])
    text = train_dba.read_text(path)
    ids = subject.tokenizer.encode(text)
    return HeldOut(torch.from_numpy(ids.astype("int64")), len(text.encode()), file_hash(path))


def held_out(subject: Subject, path: str | None, most: int | None = None) -> HeldOut:
    """The first `most` tokens of --data or, without it, of the validation part that the checkpoint was trained with.
    Bytes of a part of a text are known of byte tokens alone. Raises UserError."""
    ids, text_bytes, sha256 = own_validation(subject) if path is None else read_data(subject, Path(path))
    if most is not None and most < len(ids):
        ids, text_bytes = ids[:most], None
    if len(ids) < 2:
        raise UserError(f"{len(ids)} tokens to measure: nothing to predict")
    if subject.tokenizer.name == "byte":
        text_bytes = int((ids != subject.tokenizer.eot).sum())
    return HeldOut(ids, text_bytes, sha256)


# -----------------------------------------------------------------------------
# Caches

def formats_of(subject: Subject, name: str) -> dict[str, str]:
    """{stream: format} of a --kv-cache: one format for all, hetero, or k=q4_0,v=q3_0, which names every stream. Raises
    UserError where it doesn't fit the model."""
    streams = subject.cfg.attention.streams
    formats = dict(pair.split("=") for pair in name.split(",")) if "=" in name else cache_formats(subject.cfg, name)
    if formats is None or formats.keys() != streams.keys():
        raise UserError(f"--kv-cache {name} doesn't fit {subject.cfg.attn_mode} attention, which caches "
                        f"{', '.join(streams)}")
    return {stream: formats[stream] for stream in streams}


def cache_name(kv_cache: str, rotated: bool, residual: int) -> str:
    """The name of a cache in tables and file names."""
    parts = [kv_cache]
    if rotated:
        parts.append("rotated")
    if residual:
        parts.append(f"residual{residual}")
    return "_".join(parts)


def read_through(model: GPT, ids: torch.Tensor, cache: KVCache) -> Iterator[torch.Tensor]:
    """Final hidden states [B, n, E] of token ids [B, T], piece by piece: each token sees what the cache holds of those
    before it, and of itself."""
    for piece in ids.split(train_dba.PREFILL_CHUNK, 1):
        yield model.hidden(piece, cache)


# -----------------------------------------------------------------------------
# Results

def check_out(out: str | None) -> None:
    """Make the folder of --out, before hours of work. Raises UserError."""
    if out is None:
        return
    folder = Path(out).parent if out.endswith(".json") else Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"--out {out}: can't make the folder {folder} ({e.strerror})") from None


def result_path(out: str | None, subject: Subject, name: str) -> Path:
    """--out, or <name>.json in the folder that --out names, or beside the checkpoint."""
    path = Path(out or subject.folder)
    return path if path.suffix == ".json" else path / f"{name}.json"


def write_result(path: Path, subject: Subject, flags: dict, result: dict) -> None:
    """Write a result with the flags that it was asked for by, what was measured, and the hardware."""
    settings = {name: value for name, value in flags.items() if name not in ("run", "out")}
    model = dict(step=subject.step, sha256=subject.sha256, config=dataclasses.asdict(subject.cfg))
    text = json_text(dict(settings=settings, model=model, env=provenance(subject.device), **result))
    train_dba.write_text(path, text)


def json_text(result: dict) -> str:
    """A result as JSON in which every record of a list has one line."""
    fields = []
    for name, value in result.items():
        if isinstance(value, list):
            text = "[\n  " + ",\n  ".join(map(json.dumps, value)) + "\n ]"
        else:
            text = json.dumps(value, indent=1).replace("\n", "\n ")
        fields.append(f" {json.dumps(name)}: {text}")
    return "{\n" + ",\n".join(fields) + "\n}\n"


def text_table(rows: list[tuple]) -> str:
    """Rows, the head first, as lines with columns flushed right."""
    widths = [max(len(str(cell)) for cell in column) for column in zip(*rows)]
    lines = []
    for row in rows:
        cells = [str(cell).rjust(width) for cell, width in zip(row, widths)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


# -----------------------------------------------------------------------------
# Progress

Report = Callable[[int, int], None]                        # (units done, units in all)


def quiet(done: int, total: int) -> None:
    """The Report of who doesn't want one."""


class Progress:
    """A bar with rate and time left, without a terminal lines of them, as a Report; made when the work begins to be
    counted, and anew where it begins again."""

    def __init__(self, unit: str, what: str):
        self.unit, self.what, self.bar = unit, what, None

    def __enter__(self) -> Report:
        return self.report

    def report(self, done: int, total: int) -> None:
        if self.bar is None or done < self.bar.n:
            self.__exit__()
            self.bar = train_dba.progress(total, self.unit, self.what)
        self.bar.total = total
        self.bar.update(done - self.bar.n)

    def __exit__(self, *_) -> None:
        if self.bar is not None:
            self.bar.close()
