"""
Decoupled Bottleneck Attention (DBA): training and sampling for standard, bottleneck, decoupled, GQA and MLA attention.

DBA splits the attention score of a head in two. A low-rank semantic path sees content without position, a geometric
path carries RoPE, and the two scaled scores add up:

    score = q_sem · k_sem / sqrt(r)  +  rope(q_geo) · rope(k_geo) / sqrt(p)

Once each part of q is scaled, the sum is one dot product of concatenated vectors, so every mode is a row of widths for
the same code (totals over the H query heads; d = d_model, a = attn_dim, s = sem_dim, p = geo_dim):

    mode         semantic          geometric           values     key groups    cached per token and layer
    standard     -                 d                   d          H             2d
    bottleneck   -                 a                   a          H             2a
    gqa          -                 a                   a          kv_head       2a · kv_head / H
    decoupled    s                 p                   a          kv_head or H  (s + p + a) · groups / H
      + latent   s, from a latent  p                   a, latent  kv_head or H  kv_lora_rank + p · groups / H
    mla          a, from a latent  one key for all     a, latent  H             kv_lora_rank + rope_dim

Dimensions: B batch, T query tokens, S key tokens, H query heads, G key/value groups, D d_model, V vocabulary, L layers,
and per head r semantic width, p geometric width, v value width.

    python3 train_dba.py --data data/wikitext2.npy --attn-mode decoupled --tie-qk --null-attn
    python3 train_dba.py --data data/fineweb_1b.npy --exp paper_decoupled --compile
    torchrun --nproc-per-node 8 train_dba.py --data data/fineweb_1b.npy --batch-size 64 --compile
    python3 train_dba.py --mode sample --ckpt runs/tiny --prompt "The list" --temperature 0.8

The same command started again resumes its run folder.
"""

import argparse
import codecs
import contextlib
import ctypes
import dataclasses
import difflib
import errno
import fcntl
import functools
import hashlib
import json
import math
import operator
import os
import pickle
import platform
import reprlib
import resource
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
import tokenize
import zipfile
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Callable, get_args, get_type_hints

# OpenMP's threads spin at barriers, by default so long that a busy neighbour costs them its time slices. Read when
# torch is imported. Two threads, a small model: 118 ms a step against 113 to 119 alone, 305 against 490 to 560 beside
# one busy process (docs/LOG.md).
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm


class UserError(Exception):
    """A mistake that the user can mend: main() prints it as one line and exits with 1."""


# =============================================================================
# Part I: training

# -----------------------------------------------------------------------------
# Config: every flag is declared once, as a field; argparse is generated from the fields.

SIZES = {
    "tiny":   dict(d_model=128, layers=4, n_head=4, d_ff=512),
    "small":  dict(d_model=512, layers=6, n_head=8, d_ff=2048),             # the papers' WikiText-2 suite
    "medium": dict(d_model=1024, layers=12, n_head=16, d_ff=2816, block=1024),
    "large":  dict(d_model=2048, layers=12, n_head=32, d_ff=5632, block=2048),  # the papers' local suite
    "1b":     dict(d_model=2048, layers=22, n_head=32, d_ff=5632, block=2048),  # the papers' A100 suite
}
# January 2026 paper, section 4.1: widths per head, so that they hold at other --sizes (the latent of mla is absolute).
EXPS = {
    "paper_baseline":       lambda H: dict(attn_mode="standard"),
    "paper_bottleneck":     lambda H: dict(attn_mode="bottleneck", attn_dim=48 * H),
    "paper_decoupled":      lambda H: dict(attn_mode="decoupled", sem_dim=16 * H, geo_dim=32 * H, lr=2e-4),
    "paper_decoupled_sem8": lambda H: dict(attn_mode="decoupled", sem_dim=8 * H, geo_dim=32 * H, lr=2e-4),
    "paper_gqa":            lambda H: dict(attn_mode="gqa", kv_head=max(1, H // 8)),
    "paper_mla":            lambda H: dict(attn_mode="mla", kv_lora_rank=512, rope_dim=64),
}
EXP_DEFAULTS = dict(size="1b", steps=10_000)

# Formats of the KV cache: bits of a value, and bytes of the scale that 32 channels share.
FORMATS = {"fp32": (32, 0), "bf16": (16, 0), "fp16": (16, 0), "q8_0": (8, 2), "q4_0": (4, 2), "q4_sym": (4, 2),
           "nf4": (4, 2), "q3_0": (3, 2), "q2_0": (2, 2)}
KERNELS = ("auto", "torch", "triton", "metal")


def number_or_auto(text):
    if text != "auto" and not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is neither auto nor a whole number of at least 1")
    return 0 if text == "auto" else int(text)


def tokenizer_name(text):
    if text.startswith("bpe"):
        raise argparse.ArgumentTypeError("bpe:N is learned by prepare_fineweb.py --dataset text --tokenizer bpe:N "
                                         "--input TEXT --output TOKENS.npy; then give --data TOKENS.npy alone")
    return text


def flag(group, default, help, choices=None, low=None, above=None, below=None, top=None, modes=None, read=None):
    """One flag. group: its heading in --help, and the --mode that reads it; low, above, below, top: the range of values
    (>=, >, <, <=); modes: the attention modes that read it (None: all); read: makes the value of a text (its type)."""
    return field(default=default, metadata=dict(group=group, help=help, choices=choices, modes=modes, read=read,
                                                limits=dict(low=low, above=above, below=below, top=top)))


@dataclass(frozen=True)
class ScorePath:
    """One summand of the attention score: `width` per head, `groups` of keys, and the cache stream that holds them."""
    name: str                                              # "sem" or "geo"
    width: int
    groups: int
    scale: float
    rotate: bool
    tied: bool
    stream: str


@dataclass(frozen=True)
class AttentionShape:
    """What an attention mode is: its one or two score paths, the values, and the tensors of which the cache is made."""
    paths: tuple[ScorePath, ...]
    v_width: int
    v_groups: int
    v_stream: str
    latent: int                                            # width of the latent, 0 where there is none
    latent_norm: bool = False                              # MLA's has an RMSNorm

    @property
    def streams(self):
        """{name: channels} of what is cached per token and layer; a latent stands for semantic keys and values."""
        widths = {path.stream: path.groups * path.width for path in self.paths}
        widths[self.v_stream] = self.v_groups * self.v_width
        return {name: self.latent if name == "latent" else width for name, width in widths.items()}


@dataclass(frozen=True)
class Config:
    """All settings of a run. Build it by make_config(), which fills in presets and derived defaults and validates."""

    mode: str = flag("run", "train", "what to do", choices=("train", "sample"))
    config: str | None = flag("run", None, "resolved_config.json of another run: its settings, where no flag says else")
    seed: int = flag("run", 1337, "seed of initialisation, data order, dropout and sampling", low=0, below=2**63)
    device: str = flag("run", "auto", "cpu, cuda, mps or auto")
    dtype: str = flag("run", "auto", "of matrix products; weights stay float32; auto: bfloat16 where it is fast",
                      choices=("auto", "float32", "bfloat16", "float16"))

    data: str | None = flag("data", None, "training tokens: .npy by prepare_fineweb.py, or text")
    val_data: str | None = flag("data", None, "validation tokens (default: what the sidecar of --data names)")
    val_frac: float | None = flag("data", None, "validation part, cut from the end (0.1)", above=0, below=1)
    tokenizer: str = flag("data", "auto", "for text; auto: .npy as its sidecar says, .tokens word, other text gpt2 "
                          "(bpe:N, learned from the text: prepare_fineweb.py)",
                          choices=("auto", "word", "gpt2", "byte"), read=tokenizer_name)
    out_dir: str | None = flag("data", None, "run folder (runs/<exp or mode>_seed<seed>)")
    overwrite: bool = flag("data", False, "start afresh, each time it is given, in a run folder that is used")

    size: str | None = flag("model", None, "preset of d_model, layers, heads, d_ff, block", choices=tuple(SIZES))
    exp: str | None = flag("model", None, "preset of the papers' 1B suite (--size 1b unless said)", choices=tuple(EXPS))
    attn_mode: str = flag("model", "standard", "attention mode",
                          choices=("standard", "bottleneck", "decoupled", "gqa", "mla"))
    d_model: int = flag("model", 512, "width of the residual stream", low=1)
    layers: int = flag("model", 6, "number of blocks", low=1, top=10_000)
    n_head: int = flag("model", 8, "query heads", low=1)
    d_ff: int = flag("model", 2048, "hidden width of the MLP", low=1)
    embed_dim: int | None = flag("model", None, "width of a factorised embedding (d_model: not factorised)", low=1)
    block: int = flag("model", 256, "context length in tokens", low=1)
    attn_dim: int | None = flag("model", None, "total width of values (and keys, unless decoupled); default d_model, "
                                "decoupled sem + geo, bottleneck none", low=1)
    sem_dim: int | None = flag("model", None, "total semantic width (32; with --size 4 a head)", low=1,
                               modes=("decoupled",))
    geo_dim: int | None = flag("model", None, "total geometric width (64; with --size 8 a head)", low=1,
                               modes=("decoupled",))
    kv_head: int | None = flag("model", None, "key/value groups (decoupled: n_head)", low=1, modes=("gqa", "decoupled"))
    kv_lora_rank: int | None = flag("model", None, "width of one latent for all semantic keys and values (mla: d_model "
                                    "/ 4; decoupled: none)", low=1, modes=("mla", "decoupled"))
    rope_dim: int | None = flag("model", None, "width of MLA's one rotated key (half a head)", low=1, modes=("mla",))
    null_attn: bool = flag("model", False, "a learned null token that every query may attend to")
    tie_qk: bool = flag("model", False, "one projection for queries and keys (decoupled: of the semantic path only)",
                        modes=("standard", "bottleneck", "gqa", "decoupled"))
    learned_temp: bool = flag("model", False, "a learned temperature per head")
    one_temperature: bool = flag("model", False, "one scale for both paths: partial RoPE", modes=("decoupled",))
    rope: bool = flag("model", True, "rotate the geometric path")
    rope_base: float = flag("model", 10000.0, "base of the RoPE wavelengths", low=1)
    mlp: str = flag("model", "swiglu", "MLP", choices=("swiglu", "gelu"))
    norm_eps: float = flag("model", 1e-5, "epsilon of RMSNorm", low=0)

    init_from: str | None = flag("training", None, "begin with these weights: a run folder, a checkpoint, or a Llama "
                                 "(.gguf, Hugging Face folder)")
    dropout: float = flag("training", 0.0, "on the embedding and what blocks add to the stream", low=0, below=1)
    steps: int = flag("training", 6000, "optimiser steps", low=1, below=2**53)
    batch_size: int = flag("training", 8, "sequences per micro-step, over all ranks", low=1)
    grad_accum: int = flag("training", 1, "micro-steps per optimiser step", low=1)
    micro_batch: int | None = flag("training", None, "sequences per forward pass (batch-size / ranks); auto: as many "
                                   "as a GPU has memory for", low=0, read=number_or_auto)
    lr: float = flag("training", 3e-4, "peak learning rate", above=0)
    schedule: str | None = flag("training", None, "of the rate after warm-up; wsd: constant, then linear in the last "
                                "fifth (constant; with --min-lr cosine)", choices=("constant", "cosine", "wsd"))
    min_lr: float | None = flag("training", None, "where the schedule ends (lr / 10; constant: lr)", low=0)
    warmup_steps: int | None = flag("training", None, "linear (a tenth up to 100; --exp: a fifth up to 2000)", low=0)
    weight_decay: float = flag("training", 0.1, "of AdamW, on matrices only", low=0)
    grad_clip: float = flag("training", 1.0, "largest gradient norm; 0 clips nothing", low=0)
    eval_every: int = flag("training", 500, "steps between evaluations", low=1)
    eval_iters: int | None = flag("training", None, "evaluate so many batches, spread evenly (all)", low=1)
    log_every: int = flag("training", 10, "steps between log lines", low=1)
    save_every: int = flag("training", 500, "steps between checkpoints", low=1)
    keep_every: int | None = flag("training", None, "steps between weights that are kept, as step<N>.pt (none)", low=1)
    tensorboard: bool = flag("training", False, "write the log's numbers for TensorBoard, too")
    compile: bool = flag("training", False, "torch.compile the blocks and the loss")
    shard: bool = flag("training", False, "split weights, gradients and optimiser over the ranks that torchrun started")
    activation_checkpointing: bool = flag("training", False, "blocks are computed again in the backward pass")

    ckpt: str | None = flag("sampling", None, "checkpoint to sample from")
    prompt: str | None = flag("sampling", None, "text to continue; -: standard input")
    prompt_file: str | None = flag("sampling", None, "file whose text to continue")
    prompt_tokens: str | None = flag("sampling", None, "token ids to continue, separated by commas or spaces")
    interactive: bool = flag("sampling", False, "continue each line of standard input, on its own")
    num_samples: int = flag("sampling", 1, "continuations of a prompt, of seeds that count up", low=1)
    max_new_tokens: int = flag("sampling", 128, "tokens to generate", low=1, below=2**62)
    stop: str | None = flag("sampling", None, "end before this text")
    stop_at_eot: bool = flag("sampling", True, "end at the token that ends a document (words have none)")
    temperature: float = flag("sampling", 1.0, "0 takes the likeliest token", low=0)
    top_k: int | None = flag("sampling", None, "sample among the k likeliest tokens", low=1)
    top_p: float | None = flag("sampling", None, "sample among the likeliest of this joint probability", above=0, top=1)
    kv_cache: str = flag("sampling", "fp16", "format of the KV cache; hetero (decoupled): k_geo q8_0, all else q4_0; "
                         "auto: as kv_policy.json beside the checkpoint says", choices=(*FORMATS, "hetero", "auto"))
    kv_cache_k: str | None = flag("sampling", None, "format of one stream, where the mode has it", choices=(*FORMATS,))
    kv_cache_k_sem: str | None = flag("sampling", None, "the same", choices=(*FORMATS,))
    kv_cache_k_geo: str | None = flag("sampling", None, "the same", choices=(*FORMATS,))
    kv_cache_v: str | None = flag("sampling", None, "the same", choices=(*FORMATS,))
    kv_cache_latent: str | None = flag("sampling", None, "the same, where the mode has a latent", choices=(*FORMATS,))
    kv_cache_k_rope: str | None = flag("sampling", None, "the same, mla's rotated key", choices=(*FORMATS,))
    kv_residual: int = flag("sampling", 0, "keep so many of the newest tokens in fp16 instead of quantised", low=0)
    kv_rotate: bool = flag("sampling", False, "spread outliers before quantising: rotate keys and values")
    kernel: str = flag("sampling", "auto", "what reads the cache; auto: the fastest here", choices=KERNELS)

    @property
    def attention(self):
        """The row of the table of modes, as an AttentionShape."""
        H, d, a = self.n_head, self.d_model, self.attn_dim
        G = self.kv_head or H
        mla = self.attn_mode == "mla"
        latent = (self.kv_lora_rank or 0) if self.attn_mode in ("mla", "decoupled") else 0
        of_decoupled = ("latent", "k_geo", "latent") if latent else ("k_sem", "k_geo", "v")
        sem, geo, v, groups, geo_groups, streams = {       # widths over all query heads
            "standard":   (0, d, d, H, H, ("", "k", "v")),
            "bottleneck": (0, a, a, H, H, ("", "k", "v")),
            "gqa":        (0, a, a, G, G, ("", "k", "v")),
            "decoupled":  (self.sem_dim, self.geo_dim, a, G, G, of_decoupled),
            "mla":        (a, (self.rope_dim or 0) * H, a, H, 1, ("latent", "k_rope", "latent")),
        }[self.attn_mode]
        r, p = sem // H, geo // H
        joint = self.one_temperature or mla
        paths = [ScorePath("geo", p, geo_groups, (r + p if joint else p) ** -0.5, self.rope, self.tie_qk and not sem,
                           streams[1])]
        if sem:
            scale = (r + p if joint else r) ** -0.5
            paths.insert(0, ScorePath("sem", r, groups, scale, False, self.tie_qk, streams[0]))
        return AttentionShape(tuple(paths), v // H, groups, streams[2], latent, mla)

    @property
    def tokens_per_step(self):
        return self.batch_size * self.grad_accum * self.block


DEFAULTS = {f.name: f.default for f in dataclasses.fields(Config)}


def flag_name(field_name):
    return "--" + field_name.replace("_", "-")


# -----------------------------------------------------------------------------
# Attention

def rope(x, pos, inv_freq):
    """Rotate x [B, n, T, p] to the positions pos [B or 1, T]; halves form pairs. inv_freq [1 or G, p/2]. float32."""
    theta = pos[:, None, None, :, None] * inv_freq[:, None, None]               # [B, G, 1, T, p/2]
    cos, sin = theta.cos(), theta.sin()
    a, b = x.float().unflatten(1, (len(inv_freq), -1)).chunk(2, -1)             # [B, G, n/G, T, p/2]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).flatten(1, 2)


def linear(n_in, n_out):
    return nn.Linear(n_in, n_out, bias=False)


class RMSNorm(nn.RMSNorm):
    """In float32 at least, also where --shard made the weight bfloat16, or autocast x; cast back here, once, since each
    product that reads it would make, and keep, a copy of its own."""

    def forward(self, x):
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        y = F.rms_norm(x.to(dtype), self.normalized_shape, self.weight.to(dtype), self.eps)
        return y.to(torch.get_autocast_dtype(x.device.type)) if torch.is_autocast_enabled(x.device.type) else y


def split_heads(x, n):
    return x.unflatten(-1, (n, -1)).transpose(1, 2)        # [B, T, n·w] -> [B, n, T, w]


class Attention(nn.Module):
    """Every mode of the table at the top: project, rotate, cache, attend, merge (January 2026 paper, section 3)."""

    def __init__(self, cfg):
        super().__init__()
        self.shape = shape = cfg.attention
        self.n_head, D, H = cfg.n_head, cfg.d_model, cfg.n_head
        source = shape.latent or D                         # what semantic keys and values are projected from
        self.latent = nn.Identity()
        if shape.latent:
            norm = RMSNorm(source, cfg.norm_eps) if shape.latent_norm else nn.Identity()
            self.latent = nn.Sequential(linear(D, source), norm)
        self.q, self.k = nn.ModuleDict(), nn.ModuleDict()
        for path in shape.paths:
            n_in, n_out = source if path.name == "sem" else D, path.groups * path.width
            self.q[path.name] = linear(D, H * path.width)
            self.k[path.name] = self.q[path.name] if path.tied else linear(n_in, n_out)
        self.v = linear(source, shape.v_groups * shape.v_width)
        self.o = linear(H * shape.v_width, D)
        null = shape.streams if cfg.null_attn else {}      # the null token is one more entry of the cache, learned
        self.null = nn.ParameterDict({name: torch.empty(C) for name, C in null.items()})
        self.log_temp = nn.Parameter(torch.zeros(H)) if cfg.learned_temp else None
        self.turn = None                                   # [p, p], orthogonal: what --kv-rotate applies after RoPE
        geo = shape.paths[-1]
        inv_freq = cfg.rope_base ** (-torch.arange(geo.width // 2)[None] / (geo.width // 2))
        rows = geo.groups if shape.latent else 1           # a converted model has a latent, and frequencies per group
        self.register_buffer("inv_freq", inv_freq.repeat(rows, 1))

    def project(self, path, x, latent, pos, absorb):
        """Scaled queries [B, H, T, w], keys [B, G, T, w] and null scores [B, H, T] (or 0) of one score path.

        absorb: leave semantic keys in latent space, and bring the queries there instead. All heads then share all that
        is cached; a query is zero where it holds the geometric keys of other groups.
        """
        temperature = 1.0 if self.log_temp is None else self.log_temp.exp()[:, None, None]            # [H, 1, 1]
        q = split_heads(self.q[path.name](x), self.n_head).float() * (path.scale * temperature)       # [B, H, T, w]
        null_score = 0.0
        if self.null:                                      # with q unrotated: the score must not depend on position
            null_k = self.null[path.stream]
            null_k = (self.k[path.name](null_k) if path.stream == "latent" else null_k).float()       # [G·w]
            null_k = null_k.view(path.groups, 1, -1).repeat_interleave(self.n_head // path.groups, 0)
            null_score = (q * null_k).sum(-1)
        if absorb and path.stream == "latent":
            up = self.k[path.name].weight.view(path.groups, path.width, -1)                           # [G, r, C]
            return times_own(q, up.float()), latent[:, None], null_score
        k = split_heads(self.k[path.name](latent if path.name == "sem" else x), path.groups)          # [B, G, T, w]
        if path.rotate:
            dtype = k.dtype
            q, k = rope(q, pos, self.inv_freq), rope(k, pos, self.inv_freq)
            if self.turn is not None:
                q, k = q @ self.turn, k @ self.turn
            k = k.to(dtype)
        if absorb and path.groups > 1:
            own = torch.eye(path.groups, device=x.device).repeat_interleave(self.n_head // path.groups, 0)
            q = (q[..., None, :] * own[:, None, :, None]).flatten(3)            # [B, H, T, G·p]
        return q, k, null_score

    def forward(self, x, cache=None, layer=None, span=None):
        """x [B, T, D] -> [B, T, D]. cache: a KVCache, whose layer is given the T tokens of the span."""
        shape = self.shape
        absorb = cache is not None and shape.latent > 0
        pos = torch.arange(x.size(1), device=x.device)[None] if cache is None else span.pos           # [B or 1, T]
        latent = self.latent(x)                            # x itself where there is none
        v = latent if absorb else self.v(latent)           # [B, T, G·v]
        q, k, null_score = zip(*(self.project(path, x, latent, pos, absorb) for path in shape.paths))
        null_v = None
        if self.null:
            null_v = self.null[shape.v_stream]
            null_v = self.v(null_v) if shape.latent and not absorb else null_v
            null_v = null_v.view(1 if absorb else shape.v_groups, -1)
        if cache is None:
            if self.null:
                q = [*q, sum(null_score)[..., None]]
            k = torch.cat([part.expand(-1, shape.v_groups, -1, -1) for part in k], -1)  # MLA's rotated key serves all
            y = self.attend(torch.cat(q, -1), k, split_heads(v, shape.v_groups), null_v)
        else:
            entry = {path.stream: part.transpose(1, 2).flatten(2) for path, part in zip(shape.paths, k)}
            recent = cache.append(layer, span, {**entry, shape.v_stream: v})
            null = (sum(null_score), null_v) if self.null else None
            y = cache.attend(layer, span, torch.cat(q, -1), null, recent).to(v.dtype)
            if absorb:
                up = self.v.weight.view(shape.v_groups, shape.v_width, -1).mT                         # [G, C, v]
                y = times_own(y, up.to(v.dtype))                                                      # [B, H, T, v]
        return self.o(y.transpose(1, 2).flatten(2))        # [B, H, T, v] -> [B, T, D]

    @staticmethod
    def attend(q, k, v, null_v):                           # without a cache; surgery/mask.py gives a layer another
        return attend(q, k, v, null_v)


def times_own(x, weight):
    """x [B, H, T, n] of each head times the matrix of its group, weight [G, n, m] -> [B, H, T, m]."""
    y = x.reshape(len(x), len(weight), -1, x.size(3)) @ weight                  # [B, G, H/G·T, m]
    return y.view(*x.shape[:3], -1)


def attend(q, k, v, null_v=None):
    """Causal self-attention by the fused kernels of PyTorch.

    q [B, H, T, w] is scaled, k [B, G, T, w'], v [B, G, T, u]. With null_v [G, u], the last channel of q (w = w' + 1)
    scores the null token, one more key and value that every query may attend to. Returns [B, H, T, u] in v's type.
    """
    u, w = v.size(-1), q.size(-1)
    width = -(-max(w, u) // 8) * 8                         # without one width for all, the CPU leaves its fused kernel
    # float32 is faster for narrow heads: 10 ms against 22 with AMX, 109 against 126 without (two shapes)
    narrow = q.device.type == "cpu" and width <= 16
    dtype = torch.float32 if narrow and v.dtype == torch.bfloat16 else v.dtype
    q, k, v_ = (F.pad(x.to(dtype), (0, width - x.size(-1))) for x in (q, k, v))
    if null_v is not None:                                 # a dummy first query keeps the triangle of is_causal
        null_k = F.pad(k.new_ones(1), (w - 1, width - w)).expand(*k.shape[:2], 1, -1)             # one-hot
        null_v = F.pad(null_v.to(dtype), (0, width - u))[:, None].expand(*k.shape[:2], 1, -1)
        q, k, v_ = F.pad(q, (0, 0, 1, 0)), torch.cat([null_k, k], 2), torch.cat([null_v, v_], 2)  # [B, ., 1 + T, width]
    with torch.autocast(q.device.type, enabled=False):
        y = F.scaled_dot_product_attention(q, k, v_, is_causal=True, scale=1.0, enable_gqa=q.size(1) != k.size(1))
    return y[:, :, int(null_v is not None):, :u].to(v.dtype)


# -----------------------------------------------------------------------------
# Model

class MLP(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.up = linear(cfg.d_model, cfg.d_ff)
        self.gate = linear(cfg.d_model, cfg.d_ff) if cfg.mlp == "swiglu" else None
        self.down = linear(cfg.d_ff, cfg.d_model)

    def forward(self, x):
        return self.down(F.gelu(self.up(x)) if self.gate is None else F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.attn_norm, self.mlp_norm = RMSNorm(cfg.d_model, cfg.norm_eps), RMSNorm(cfg.d_model, cfg.norm_eps)
        self.attn, self.mlp = Attention(cfg), MLP(cfg)
        self.dropout = cfg.dropout

    def forward(self, x, *cache):
        x = x + F.dropout(self.attn(self.attn_norm(x), *cache), self.dropout, self.training)
        return x + F.dropout(self.mlp(self.mlp_norm(x)), self.dropout, self.training)


# Most logits that exist at once. On CUDA a guess until one is measured.
LOGIT_CHUNK = {"cpu": 20_000_000, "mps": 20_000_000, "cuda": 100_000_000}


def nll_and_grad(h, w, targets, vocab_size, dw=None):
    """Sum over h [n, E] of -log softmax(w·hᵀ)[target] and, if dw is given, its gradient by h; that by w [rows, E] is
    added to dw. Rows from vocab_size on take no part; targets [n] below 0 don't count."""
    known, target = targets >= 0, targets.clamp(min=0)[None]                    # [n], [1, n]
    x = (w @ h.T).float()                                  # [rows, n]: this way round, both products below are faster
    x[vocab_size:] = -torch.inf
    top, at_target = x.amax(0), x.gather(0, target)
    p = x.sub_(top).exp_()                                 # in place: each pass over the logits takes time
    total = p.sum(0)                                       # [n]
    log_p = at_target - top - total.log()                  # [1, n]
    nll = -(known * log_p).sum()
    if dw is None:
        return nll, None
    grad = p.mul_(known / total).to(h.dtype)
    grad.scatter_(0, target, (known * (log_p.exp() - 1)).to(h.dtype))           # p - 1 at the target, before rounding
    dw += grad @ h
    return nll, grad.T @ w


class LinearCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy of h [N, E] · weightᵀ [E, rows]. The gradients are made on the way forward, a chunk of h at
    a time, so that nothing is computed twice and the full logits never exist at once."""

    @staticmethod
    def forward(ctx, h, weight, targets, vocab_size, chunk_loss, with_grad):
        w = weight.to(h.dtype)
        dw = torch.zeros_like(weight) if with_grad else None
        chunks = -(-len(h) * len(w) // LOGIT_CHUNK[h.device.type])
        rows = -(-len(h) // chunks)                        # of h, in chunks of even size
        nll, dh = zip(*(chunk_loss(x, w, y, vocab_size, dw) for x, y in zip(h.split(rows), targets.split(rows))))
        ctx.save_for_backward(torch.cat(dh) if with_grad else None, dw)
        return sum(nll)

    @staticmethod
    def backward(ctx, grad_output):
        dh, dw = ctx.saved_tensors                         # freed by this backward, so that dw may be scaled in place
        return dh * grad_output, dw.mul_(grad_output), None, None, None, None


# PyTorch's own of the same, from 2.13 on: in float32 0.72 to 1.00 of our CPU time at five shapes, in bfloat16 0.67 to
# 1.01 (runs/bench/epyc/compact.json), where its dw has more than twice the error of ours, which adds it up in float32.
COMPACT = None
if hasattr(nn, "LinearCrossEntropyOptions"):
    COMPACT = nn.LinearCrossEntropyOptions(acc_policy="compact", batch_chunk_size=512)


class GPT(nn.Module):
    """Pre-norm transformer with a tied, optionally factorised embedding. vocab_size counts the tokenizer's ids; the
    embedding has that many rows rounded up to a multiple of 64."""

    def __init__(self, cfg, vocab_size):
        super().__init__()
        self.cfg, self.vocab_size = cfg, vocab_size
        self.embed = nn.Embedding(-(-vocab_size // 64) * 64, cfg.embed_dim)
        factorised = cfg.embed_dim != cfg.d_model
        self.embed_up = linear(cfg.embed_dim, cfg.d_model) if factorised else nn.Identity()
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.layers))
        self.norm = RMSNorm(cfg.d_model, cfg.norm_eps)
        self.embed_down = linear(cfg.d_model, cfg.embed_dim) if factorised else nn.Identity()
        self.nll_and_grad = nll_and_grad                   # --compile replaces it by its compiled form

    @torch.no_grad()
    def init_weights(self):
        """Normal with standard deviation 0.02, projections into the residual stream less by sqrt(2 L); norms 1; log
        temperatures 0."""
        for name, p in self.named_parameters():
            if p.dim() == 2 or ".null." in name:           # the others are built as 1 and 0
                into_stream = name.endswith(("attn.o.weight", "mlp.down.weight"))
                p.normal_(std=0.02 / math.sqrt(2 * self.cfg.layers) if into_stream else 0.02)
        return self

    def hidden(self, idx, cache=None):
        """idx [B, T] -> what the output embedding multiplies, [B, T, E]; a KVCache is given the T tokens."""
        span = None if cache is None else cache.begin(idx.size(1))
        x = F.dropout(self.embed_up(self.embed(idx)), self.cfg.dropout, self.training)
        for i, block in enumerate(self.blocks):
            if cache is not None:
                x = block(x, cache, i, span)
            else:
                again = self.cfg.activation_checkpointing and self.training
                x = checkpoint(block, x, use_reentrant=False) if again else block(x)
        if cache is not None:
            cache.advance(span)
        return self.embed_down(self.norm(x))

    def logits(self, h):
        return F.linear(h, self.embed.weight)[..., :self.vocab_size].float()                      # [B, T, V]

    def forward(self, idx, targets=None, cache=None):
        """idx [B, T] -> logits [B, T, V], or with targets [B, T] (-1: ignored) the sum of their nll in nats."""
        h = self.hidden(idx, cache)
        if targets is None:
            return self.logits(h)
        h, targets, training = h.flatten(0, 1), targets.flatten(), torch.is_grad_enabled()
        if COMPACT and training and h.device.type == "cpu" and h.dtype == torch.float32:
            return F.linear_cross_entropy(h, self.embed.weight[:self.vocab_size], targets, reduction="sum",
                                          ignore_index=-1, options=COMPACT)
        return LinearCrossEntropy.apply(h, self.embed.weight, targets, self.vocab_size, self.nll_and_grad, training)


def count_params(cfg, vocab_size):
    """Parameters by part, by formula: embedding, attention, mlp, norm, null and their total."""
    D, H, L, shape = cfg.d_model, cfg.n_head, cfg.layers, cfg.attention
    source = shape.latent or D
    attention = sum(D * H * p.width for p in shape.paths)                                             # W_q
    attention += sum((source if p.name == "sem" else D) * p.groups * p.width for p in shape.paths if not p.tied)  # W_k
    attention += source * shape.v_groups * shape.v_width + H * shape.v_width * D                      # W_v, W_o
    attention += D * shape.latent + shape.latent * shape.latent_norm + H * cfg.learned_temp
    parts = {
        "embedding": -(-vocab_size // 64) * 64 * cfg.embed_dim + 2 * D * cfg.embed_dim * (cfg.embed_dim != D),
        "attention": L * attention,
        "mlp": L * D * cfg.d_ff * (3 if cfg.mlp == "swiglu" else 2),
        "norm": (2 * L + 1) * D,
        "null": L * sum(shape.streams.values()) * cfg.null_attn,
    }
    return {**parts, "total": sum(parts.values())}


# -----------------------------------------------------------------------------
# What is read from files: of a bounded size, of a shape that is checked in one place, known by its hash

# What reading damaged data may raise.
BROKEN = (LookupError, ValueError, TypeError, AttributeError, ArithmeticError, RecursionError, MemoryError, EOFError,
          SyntaxError, tokenize.TokenError)


def brief(e):
    """An exception in a few words, on one line."""
    return f"{type(e).__name__}: {' '.join(str(e).split())[:200]}"


def check(value, shape, name):
    """Raise ValueError unless a value read from a file has a shape: {key: shape} (a key that ends in "?" may be
    absent, others may be there), a tensor (a plain one of the same shape and type), a predicate, or a type."""
    if isinstance(shape, dict):
        check(value, dict, name)
        for key, part in shape.items():
            if (plain := key.removesuffix("?")) in value:
                check(value[plain], part, f"{name}.{plain}")
            elif plain == key:
                raise ValueError(f"{name} lacks {key}")
        return
    if isinstance(shape, torch.Tensor):                    # neither sparse, quantised, complex, expanded nor on "meta"
        fits = (isinstance(value, torch.Tensor) and value.layout == torch.strided and value.dtype == shape.dtype
                and value.shape == shape.shape and value.is_contiguous() and not value.is_meta)
        expected = f"a plain {str(shape.dtype).removeprefix('torch.')} tensor {list(shape.shape)}"
    elif isinstance(shape, type) or get_args(shape):       # a type, or int | None
        kinds = get_args(shape) or (shape,)
        fits = type(value) is int and float in kinds or isinstance(value, kinds) and (
            type(value) is not bool or bool in kinds)
        expected = " or ".join(kind.__name__ for kind in kinds)
    else:
        fits, expected = shape(value), shape.__name__.replace("_", " ")
    if not fits:
        shown = f"{list(value.shape)}" if isinstance(value, torch.Tensor) else reprlib.repr(value)
        raise ValueError(f"{name} is no {expected} but {type(value).__name__} {shown}")


def whole_number(value):
    return type(value) is int and 0 <= value < 2**53


def file_name(value):
    """Of a file in the same folder, or null."""
    return value is None or type(value) is str and value not in ("", "..") and Path(value).name == value


def loss_or_infinity(value):
    return type(value) is float and value >= 0


def file_hash(*paths):
    """sha256 of files, one after the other, in hexadecimal; a folder stands for the weights in it (*.safetensors)."""
    digest = hashlib.sha256()
    for path in paths:
        for part in sorted(path.glob("*.safetensors")) if path.is_dir() else [path]:
            with open(part, "rb") as f:
                hashlib.file_digest(f, lambda: digest)
    return digest.hexdigest()


def read_bytes(path, limit):
    """What a regular file holds. Raises OSError, or ValueError if it has more than `limit` bytes."""
    if not os.path.isfile(path):                           # /dev/zero would never end
        raise FileNotFoundError(errno.ENOENT, "no such regular file", str(path))
    if path.stat().st_size > limit:
        raise ValueError(f"{path.stat().st_size:,} bytes, more than {limit:,}")
    return path.read_bytes()


def read_json(path, shape, limit=2**20):
    """The value in a JSON file. Raises OSError, or one of BROKEN where it doesn't have the shape."""
    value = json.loads(read_bytes(path, limit))
    check(value, shape, path.name)
    return value


@contextlib.contextmanager
def exclusive(path, what, wait=False):
    """Hold a lock that the system releases however this process ends; the file at `path` names the process. Raises
    UserError where another one holds it (wait: until it doesn't), OSError where the file can't be made."""
    while True:
        with open(path, "a+", encoding="utf-8", errors="replace") as f:
            try:
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                f.seek(0)
                message = f"another run is writing {what}: {f.read(200) or 'its process has no name yet'}"
                if not wait:
                    raise UserError(f"{message}; wait for it or stop it") from None
                print(f"{message}; waiting for it", file=sys.stderr)
                fcntl.flock(f, fcntl.LOCK_EX)
            except OSError as e:
                print(f"note: the file system of {what} can't lock ({e.strerror}): see to it that nothing else writes "
                      "there", file=sys.stderr)
            if os.fstat(f.fileno()).st_nlink == 0:         # its last holder removed it after we had opened it
                continue
            f.truncate(0)
            with contextlib.suppress(OSError):             # a full disk still locks
                os.write(f.fileno(), f"process {os.getpid()} on {platform.node()}".encode())
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


# -----------------------------------------------------------------------------
# Data

EOS, UNK = "<eos>", "<unk>"


def split_words(text):
    """Word-level tokens as WikiText has them: lines that aren't blank, split on white space, <eos> between lines."""
    return f" {EOS} ".join(line for line in text.split("\n") if line.strip()).split()


class ByteTokenizer:
    """UTF-8 bytes; id 256 ends a document."""
    name, vocab_size, eot = "byte", 257, 256

    def encode(self, text):
        return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.uint16)

    def decode(self, ids):
        return bytes(i for i in ids if i < 256)


class GPT2Tokenizer:
    """GPT-2's byte-pair encoding by tiktoken; id 50256 (<|endoftext|>) ends a document."""
    name, vocab_size, eot = "gpt2", 50257, 50256

    def __init__(self):
        try:
            import tiktoken
            self.bpe = tiktoken.get_encoding("gpt2")
        except (ImportError, OSError) as e:                # requests' errors are OSErrors
            raise UserError(f"no GPT-2 tokenizer ({type(e).__name__}): pip install tiktoken, and go online once or set "
                            "TIKTOKEN_CACHE_DIR to a folder that holds its vocabulary") from None

    def encode(self, text):
        return self.bpe.encode_to_numpy(text, disallowed_special=()).astype(np.uint16)

    def decode(self, ids):
        return b"".join(self.bpe.decode_single_token_bytes(i) for i in ids)


class WordTokenizer:
    """White-space words; `words` lists the vocabulary in id order; <eos> ends a line and so a document."""
    name = "word"

    def __init__(self, words):
        self.words = list(words)
        self.ids = {w: i for i, w in enumerate(self.words)}
        "".join(self.words).encode()                       # words, of which text can be made
        if len(self.ids) != len(self.words) or not {EOS, UNK} <= self.ids.keys():
            raise ValueError(f"a vocabulary must list distinct words, {EOS} and {UNK} among them")
        self.vocab_size, self.eot = len(self.words), self.ids[EOS]

    @classmethod
    def build(cls, words):
        """Vocabulary of a list of words in order of first appearance; <eos> and <unk> are added if absent."""
        return cls(dict.fromkeys([*dict.fromkeys(words), EOS, UNK]))

    def encode(self, text):
        return self.encode_words(split_words(text))

    def encode_words(self, words):
        unk = self.ids[UNK]
        return np.array([self.ids.get(w, unk) for w in words], dtype=np.uint32)

    def decode(self, ids):
        return "".join("\n" if i == self.eot else self.words[i] + " " for i in ids).encode()


# The character that byte-level BPE writes for each byte: itself where it can be seen, else one from 256 on.
SEEN = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
UNSEEN = [byte for byte in range(256) if byte not in SEEN]
BYTE_CHARS = [chr(byte if byte in SEEN else 256 + UNSEEN.index(byte)) for byte in range(256)]
LONGEST_TOKEN = 256                                        # bytes


class BPETokenizer:
    """Byte pairs learned from the training part, by prepare_fineweb.py --tokenizer bpe:N. Ids 0 to 255 are the bytes;
    `words` lists the merges, [i, j] for tokens i and j, each of which makes the next token unless there is one of the
    same bytes; the last id ends a document. Text is first cut into words as GPT-2 cuts it."""
    name = "bpe"

    def __init__(self, words):
        self.words = [list(pair) for pair in words]
        tokens = {bytes([byte]): byte for byte in range(256)}
        spelled = self.spelled = list(tokens)              # [id] -> bytes
        for pair in self.words:
            if len(pair) != 2 or not all(type(i) is int and 0 <= i < len(spelled) for i in pair):
                raise UserError(f"a bpe vocabulary must list pairs of earlier tokens, not {str(pair)[:60]}")
            token = spelled[pair[0]] + spelled[pair[1]]
            if len(token) > LONGEST_TOKEN:
                raise UserError(f"a bpe vocabulary has a token of {len(token)} bytes, more than {LONGEST_TOKEN}")
            if tokens.setdefault(token, len(spelled)) == len(spelled):
                spelled.append(token)
        self.eot, self.vocab_size = len(spelled), len(spelled) + 1

    @functools.cached_property
    def encoder(self):
        """The same tokens in the library tokenizers. Raises UserError where that is missing."""
        try:
            from tokenizers import Tokenizer, models, pre_tokenizers
        except ImportError:
            raise UserError("the bpe tokenizer needs tokenizers: pip install tokenizers") from None
        chars = ["".join(BYTE_CHARS[byte] for byte in token) for token in self.spelled]
        vocabulary = {token: i for i, token in enumerate(chars)}
        encoder = Tokenizer(models.BPE(vocabulary, [(chars[i], chars[j]) for i, j in self.words]))
        encoder.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        return encoder

    def encode(self, text):
        return np.array(self.encoder.encode(text).ids, dtype=np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)

    def decode(self, ids):
        return b"".join(self.spelled[i] for i in ids if i < self.eot)


TOKENIZERS = {"byte": ByteTokenizer, "gpt2": GPT2Tokenizer, "word": WordTokenizer, "bpe": BPETokenizer}
AGAIN = "make it again with prepare_fineweb.py"
SIDECAR = {"tokenizer": str, "vocab_size": whole_number, "tokens": whole_number, "sha256": str,
           "text_bytes": whole_number, "val": file_name, "vocab?": file_name}
IDENTITY = {"train_tokens": whole_number, "val_tokens": whole_number, "vocab_size": whole_number, "sha256": str,
            "val_sha256?": str | None, "tokenizer_sha256?": str}                # the last two are younger
MARKUP = {".jsonl", ".ndjson", ".json", ".parquet", ".csv", ".tsv"}


def make_tokenizer(name, words):
    if name == "llama":                                    # of weights that were a Llama's
        return converter().LlamaTokenizer.of_words(words)
    return TOKENIZERS[name]() if words is None else TOKENIZERS[name](words)


def converter():
    """convert_dba.py, which Llamas alone need. Raises UserError where it is missing."""
    try:
        import convert_dba
        return convert_dba
    except ModuleNotFoundError as e:
        raise UserError(f"a Llama needs the module {e.name}: the whole repository, and pip install -r "
                        "requirements-eval.txt") from None


def tokenizer_hash(tokenizer):
    """What a tokenizer is: its name and, where it isn't one for all, its vocabulary (tiktoken checks GPT-2's)."""
    return hashlib.sha256(json.dumps([tokenizer.name, getattr(tokenizer, "words", None)]).encode()).hexdigest()


def digest_ids(path, offset, dtype):
    """(sha256 of a token file, its largest id), in one pass. offset: where the ids begin."""
    digest, top = hashlib.sha256(), 0
    with open(path, "rb") as f:
        digest.update(f.read(offset))
        while chunk := f.read(2**24):
            digest.update(chunk)
            top = max(top, int(np.frombuffer(chunk, dtype).max()))
    return digest.hexdigest(), top


KEPT_FROM = 2**26                                          # bytes: smaller files are read at every start


def known_digest(path, offset, dtype):
    """digest_ids() of a file. For a large one it is kept in ~/.cache/dba (or $XDG_CACHE_HOME), which whoever comes
    second, say another rank, waits for.

    It costs a CPU second per GB, or what the disk takes: 40 s for 20B tokens (40 GB), once; 1 ms from then on. An entry
    is good for the same path, size, times and inode, under a seal of its own; a file that was changed just now is not
    entered, since it could change again within a tick of its clock.
    """
    def state():
        stat = path.stat()
        return [str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]

    before, answer = state(), None
    if before[1] < KEPT_FROM:
        return digest_ids(path, offset, dtype)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "dba"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with open(cache / hashlib.sha256(os.fsencode(before[0])).hexdigest(), "a+b") as f:
            with contextlib.suppress(OSError):             # without locks each process reads for itself
                fcntl.flock(f, fcntl.LOCK_EX)
            f.seek(0)
            seal, _, entry = f.read(2**16).partition(b" ")
            if hashlib.sha256(entry).hexdigest().encode() == seal and json.loads(entry)[0] == before:
                return tuple(json.loads(entry)[1])
            print(f"hashing {path} ({before[1] / 1e9:.1f} GB); later starts take it from {cache}", file=sys.stderr)
            answer = digest_ids(path, offset, dtype)
            if state() == before and time.time_ns() - max(before[2:4]) > 2e9:
                entry = json.dumps([before, answer]).encode()
                f.truncate(0)
                f.write(hashlib.sha256(entry).hexdigest().encode() + b" " + entry)
    except OSError as e:
        print(f"note: {path} is hashed at every start, as {cache} can't be written ({e.strerror})", file=sys.stderr)
    return answer or digest_ids(path, offset, dtype)


def open_token_file(path):
    """(ids as a memory map, tokenizer, sidecar) of a file by prepare_fineweb.py. Raises UserError unless sidecar,
    length, type, hash and vocabulary agree and every id is within the vocabulary."""
    sidecar = path.with_suffix(".json")
    if not sidecar.is_file():
        raise UserError(f"{path} has no sidecar {sidecar.name}: an unfinished file? {AGAIN}")
    try:
        reading, words = sidecar, None
        info = read_json(sidecar, SIDECAR)
        if info["tokenizer"] in ("word", "bpe"):
            reading = path.parent / info["vocab"]
            words = read_json(reading, list, 2**30)
        tokenizer = make_tokenizer(info["tokenizer"], words)
        reading = path
        with open(path, "rb") as f:
            if np.lib.format.read_magic(f) != (1, 0):
                raise ValueError("a header of another version")
            shape, _, dtype = np.lib.format.read_array_header_1_0(f)
            offset, size = f.tell(), path.stat().st_size
        whole = (dtype in (np.uint16, np.uint32) and shape == (info["tokens"],)
                 and size == offset + info["tokens"] * dtype.itemsize)
        if not whole:
            raise UserError(f"{path} holds {str(dtype):.60} {str(shape):.60} in {size:,} bytes, but its sidecar "
                            f"promises {info['tokens']} ids as uint16 or uint32; {AGAIN}")
        sha256, top = known_digest(path, offset, dtype)
        ids = np.memmap(path, dtype, "r", offset, shape)
    except (*BROKEN, OSError) as e:
        raise UserError(f"{reading} is damaged ({brief(e)}); {AGAIN}") from None
    if not top < info["vocab_size"] == tokenizer.vocab_size:
        raise UserError(f"{path} holds ids up to {top}, its sidecar says {info['vocab_size']} types, its vocabulary "
                        f"has {tokenizer.vocab_size}; {AGAIN}")
    if sha256 != info["sha256"]:
        raise UserError(f"{path} holds other ids than its sidecar says (sha256 {sha256:.12}, not "
                        f"{info['sha256']:.12}); {AGAIN}")
    return ids, tokenizer, info


def read_text(path):
    """A text file, without a byte-order mark. Raises UserError for what isn't plain text."""
    if path.suffix.lower() in MARKUP:
        raise UserError(f"{path} is not plain text: its markup would be read as words. `prepare_fineweb.py --dataset "
                        "text` makes token files of .jsonl (its field text), .parquet (its column text) and .txt")
    try:
        text = read_bytes(path, 2**32).decode("utf-8-sig")                      # read_text would change ends of lines
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is not UTF-8 text ({e.reason} at byte {e.start}); token files end in .npy") from None
    except (OSError, ValueError, MemoryError) as e:
        raise UserError(f"{path} can't be read at once ({brief(e)}); prepare_fineweb.py makes token files of large "
                        "texts") from None
    head = text[:10_000]
    if head.strip() and not head.translate(str.maketrans("", "", "0123456789,;[] \t\r\n")):
        raise UserError(f"{path} holds numbers: token ids? As text they would be numbered anew; prepare_fineweb.py "
                        "makes token files")
    return text


@dataclass
class Data:
    """Training and validation ids (arrays or memory maps), tokenizer, bytes of the validation text or None, sha256 of
    the training file and of the validation file (None: the end of the training file)."""
    train: np.ndarray
    val: np.ndarray
    tokenizer: object
    val_bytes: int | None
    sha256: str
    val_sha256: str | None

    @property
    def identity(self) -> dict:
        """What logs and checkpoints say of the data, wherever the files lie."""
        return dict(train_tokens=len(self.train), val_tokens=len(self.val), vocab_size=self.tokenizer.vocab_size,
                    sha256=self.sha256, val_sha256=self.val_sha256, tokenizer_sha256=tokenizer_hash(self.tokenizer))


def check_same_data(recorded: dict, data: Data, trained: object, advice: str):
    """Raise UserError unless data are those that `trained` (a run folder or checkpoint, for the message) records: the
    `data` of its log or checkpoint. Only what is recorded is compared, since older ones lack keys."""
    differ = [f"{name} was {recorded[name]!s:.12}, is {value!s:.12}" for name, value in data.identity.items()
              if recorded.get(name, value) != value]
    if differ:
        raise UserError(f"{trained} was trained on other data ({'; '.join(differ)}); {advice}")


def load_data(cfg, tokenizer=None):
    """Data of --data, --val-data, --val-frac, --tokenizer. tokenizer: that of --init-from, which the data must be in,
    or are put into. Raises UserError for whatever is wrong with the files."""
    paths = [Path(p) for p in (cfg.data, cfg.val_data) if p]
    for path in paths:
        if os.path.isdir(path):
            raise UserError(f"{path} is a folder; make a token file of its texts: prepare_fineweb.py --dataset text "
                            f"--input {shlex.quote(str(path))} --tokenizer bpe:4096 --output data/mine.npy")
        if not os.path.isfile(path):
            raise UserError(f"{path} is not a file; `make setup` prepares WikiText-2, prepare_fineweb.py other data")
        if path.stat().st_size == 0:
            raise UserError(f"{path} is empty; make or download it again")
    if len({path.suffix == ".npy" for path in paths}) > 1:
        raise UserError("--data and --val-data must both be .npy or both be text")
    if tokenizer and cfg.tokenizer not in ("auto", tokenizer.name):
        raise UserError(f"--tokenizer {cfg.tokenizer}, but --init-from reads {tokenizer.name}; leave it out")
    data = load_token_files(cfg, paths) if paths[0].suffix == ".npy" else load_texts(cfg, paths, tokenizer)
    if tokenizer and tokenizer_hash(tokenizer) != tokenizer_hash(data.tokenizer):
        raise UserError(f"{paths[0]} was made with {data.tokenizer.name}, {data.tokenizer.vocab_size} types; what "
                        f"--init-from names reads {tokenizer.name}, {tokenizer.vocab_size}, or other words")
    if data.sha256 == data.val_sha256:
        raise UserError(f"{paths[0]} and its validation data {cfg.val_data or ''} hold the same: the loss would be "
                        "that of the training data; give another --val-data, or --val-frac")
    if len(data.train) < cfg.block + 1:
        raise UserError(f"--block {cfg.block} is too long for {len(data.train)} training tokens; shorten it")
    if len(data.val) < 2:
        raise UserError(f"the validation part has {len(data.val)} tokens; give --val-data or a larger --val-frac")
    return data


def split_off(parts, val_frac):
    """Training and validation part: the two that there are, or of a single one its last val_frac (default 0.1)."""
    if len(parts) == 2:
        return parts
    ids, = parts
    cut = len(ids) - round(len(ids) * (val_frac or 0.1))
    return [ids[:cut], ids[cut:]]


def load_token_files(cfg, paths):
    train, tokenizer, info = open_token_file(paths[0])
    if cfg.tokenizer not in ("auto", tokenizer.name):
        raise UserError(f"--tokenizer {cfg.tokenizer}, but {paths[0]} was made with {tokenizer.name}; leave it out")
    if len(paths) == 1 and info["val"] and cfg.val_frac is None:
        paths = [*paths, paths[0].parent / info["val"]]
    if len(paths) == 1:
        return Data(*split_off([train], cfg.val_frac), tokenizer, None, info["sha256"], None)
    val, val_tokenizer, val_info = open_token_file(paths[1])
    if tokenizer_hash(val_tokenizer) != tokenizer_hash(tokenizer):
        raise UserError(f"{paths[0]} and its validation file have different vocabularies; prepare them together")
    return Data(train, val, tokenizer, val_info["text_bytes"], info["sha256"], val_info["sha256"])


def load_texts(cfg, paths, tokenizer=None):
    """Text files, tokenised here; unless there is one already, a word vocabulary is that of the training part alone."""
    kind = cfg.tokenizer if cfg.tokenizer != "auto" else "word" if paths[0].suffix == ".tokens" else "gpt2"
    kind = tokenizer.name if tokenizer else kind
    texts = [read_text(path) for path in paths]
    hashes = [hashlib.sha256(text.encode()).hexdigest() for text in texts]
    if kind == "word":
        parts = split_off([split_words(text) + [EOS] for text in texts], cfg.val_frac)
        tokenizer = tokenizer or WordTokenizer.build(parts[0])
        parts = [tokenizer.encode_words(words) for words in parts]
    else:
        tokenizer = tokenizer or make_tokenizer(kind, None)
        parts = [tokenizer.encode(text) for text in texts]
        parts = split_off([np.append(ids, ids.dtype.type(tokenizer.eot)) for ids in parts], cfg.val_frac)
    if len(texts) == 2:
        return Data(*parts, tokenizer, len(texts[1].encode()), *hashes)
    val_bytes = None if kind == "word" else len(tokenizer.decode(parts[1][parts[1] != tokenizer.eot]))
    return Data(*parts, tokenizer, val_bytes, *hashes, None)


def sample_batch(rng, tokens, batch, block):
    """Random windows: inputs and targets [batch, block], targets one token on. Every mode gets the same draws."""
    starts = rng.integers(0, len(tokens) - block, size=batch)
    windows = np.stack([tokens[s:s + block + 1] for s in starts]).astype(np.int64)
    return torch.from_numpy(windows[:, :-1]), torch.from_numpy(windows[:, 1:])


def eval_batches(tokens, batch, block, limit=None):
    """Fixed windows that cover all of tokens once, as inputs and targets [batch, block]; targets past the end are -1.
    limit: that many batches, evenly spread."""
    batches = -(-(len(tokens) - 1) // (batch * block))
    for b in np.linspace(0, batches - 1, min(limit or batches, batches)).round().astype(int):
        part = torch.from_numpy(tokens[b * batch * block:(b + 1) * batch * block + 1].astype(np.int64))
        spare = (0, batch * block + 1 - len(part))
        x, y = F.pad(part[:-1], spare), F.pad(part[1:], spare, value=-1)
        yield x.view(batch, block), y.view(batch, block)


# -----------------------------------------------------------------------------
# Device, ranks, precision

@dataclass(frozen=True)
class Ranks:
    """This process among those of a data-parallel run."""
    rank: int
    world: int
    device: torch.device

    def sum(self, *numbers):
        """Sums over all ranks, as floats."""
        if self.world == 1:
            return numbers
        tensor = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return tensor.tolist()

    def from_first(self, make):
        """What rank 0 makes, on every rank."""
        box = [make() if self.rank == 0 else None]
        if self.world > 1:
            dist.broadcast_object_list(box, device=self.device)
        return box[0]

    def agree(self, **facts):
        """Wait for all ranks. Raises UserError unless they hold the same facts, such as the step of the run folder."""
        seen = [facts] * self.world
        if self.world > 1:
            dist.all_gather_object(seen, facts)
        differ = [f"{name} {' and '.join(dict.fromkeys(str(other[name]) for other in seen))}" for name in facts
                  if any(other[name] != facts[name] for other in seen)]
        if differ:
            raise UserError(f"the ranks don't see the same run ({'; '.join(differ)}); start them all with the same "
                            "command, code and data, and a run folder that they share")


def mesh_sizes():
    """Nodes, and ranks of each, as torchrun started them."""
    if "RANK" not in os.environ:                           # of the others, schedulers set some as well
        return 1, 1
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return int(os.environ.get("WORLD_SIZE", 1)) // ranks, ranks


def start_ranks(device):
    """Join the other processes that torchrun started, if it did, and share the cores with them."""
    if "RANK" not in os.environ:
        return Ranks(0, 1, device)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    on_gpu = device.type == "cuda"
    # torchrun keeps its store over restarts, where ranks would find the addresses of those that died. Nodes may count
    # restarts differently: docs/scale.md has the variable that helps there.
    try:
        nodes, local_ranks = mesh_sizes()
        if not 0 <= int(os.environ["RANK"]) < nodes * local_ranks:              # it would wait for itself
            raise ValueError(f"WORLD_SIZE {nodes * local_ranks}")
        torch.set_num_threads(max(1, cores // local_ranks))                     # torchrun would leave one thread
        store, rank, world = next(dist.rendezvous("env://"))
    except (ValueError, ArithmeticError, dist.DistError) as e:
        raise UserError(f"the environment has RANK={os.environ['RANK']}, but not all that torchrun sets beside it "
                        f"({brief(e)}); unset RANK, or start ranks by torchrun") from None
    store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "") if nodes == 1 else "", store)
    dist.init_process_group("nccl" if on_gpu else "gloo", device_id=device if on_gpu else None, store=store, rank=rank,
                            world_size=world, timeout=timedelta(minutes=30))    # rank 0 may be saving for minutes
    return Ranks(dist.get_rank(), dist.get_world_size(), device)


def pick_device(name):
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda":                                     # PyTorch asks for a number in places
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.device(name)
        if device.type not in LOGIT_CHUNK:
            raise RuntimeError("it is none of cpu, cuda and mps")
        torch.zeros(1, device=device).item()
        if device.type == "cuda":
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError) as e:            # AssertionError: PyTorch was built without CUDA
        raise UserError(f"--device {name} can't be used here ({str(e).splitlines()[0]}); try --device cpu") from None
    return device


def product_rates(tokens, n_in, n_out, training=True, clock=time.perf_counter, layers=1):
    """TFLOP/s of this CPU in float32 and bfloat16, as {name: rate}, in x [tokens, n_in] · wᵀ [n_in, n_out] and, in
    training, the product that makes w's gradient: medians over some 50 ms, the types in turn. layers: how many w take
    turns, since one alone would stay in the cache; at most 64 MB of them."""
    tokens = min(tokens, 256)                              # more would take long and change little
    flop = 2 * tokens * n_in * n_out * (2 if training else 1)
    seconds = {"float32": [], "bfloat16": []}
    layers = min(layers, 1 + 2**24 // (n_in * n_out))
    operands = {name: [torch.ones(shape, dtype=getattr(torch, name)) for shape in (
        (tokens, n_in), (layers, n_out, n_in), (tokens, n_out))] for name in seconds}
    while len(seconds["float32"]) < 4 or sum(map(sum, seconds.values())) < 0.05:
        for name, (x, weights, grad) in operands.items():
            w = weights[len(seconds[name]) % layers]
            started = clock()
            F.linear(x, w)
            if training:
                grad.T @ x
            seconds[name].append(clock() - started)
    return {name: flop / statistics.median(times[1:]) / 1e12 for name, times in seconds.items()}  # [0] is the warm-up


def pick_dtype(name, device, measure=lambda: product_rates(256, 512, 2048)):
    """Type of the matrix products, and the reason for it. measure(): the product_rates() that auto goes by on a CPU."""
    if name != "auto":
        return getattr(torch, name), "asked for"
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
        return (torch.bfloat16, "this GPU has it") if fast else (torch.float32, "this GPU lacks bfloat16")
    if device.type != "cpu":
        return torch.float32, f"no fast bfloat16 on this {device.type}"
    rates = measure()
    fast = rates["bfloat16"] > 1.1 * rates["float32"]      # casting weights and activations costs some of the gain
    return torch.bfloat16 if fast else torch.float32, (
        f"timed: {rates['float32']:.3g} TFLOP/s in float32, {rates['bfloat16']:.3g} in bfloat16")


def autocast(device, dtype):
    return torch.autocast(device.type, dtype) if dtype != torch.float32 else contextlib.nullcontext()


def synchronize(device):
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def peak_memory(device):
    """Peak bytes: what PyTorch allocated on a CUDA device; on a CPU what the process held; unknown elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit if device.type == "cpu" else None


def keep_freed_memory():
    """Ask glibc to reuse freed memory rather than return it: a third of a CPU step is page faults otherwise."""
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        libc, M_MMAP_MAX, M_TRIM_THRESHOLD = ctypes.CDLL(None), -4, -1
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


# -----------------------------------------------------------------------------
# Optimiser and schedule

def make_optimizer(model, cfg):
    params = [p for p in model.parameters() if p.requires_grad]
    groups = [dict(params=[p for p in params if p.dim() >= 2], weight_decay=cfg.weight_decay),
              dict(params=[p for p in params if p.dim() < 2], weight_decay=0.0)]
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=(0.9, 0.95), eps=1e-8, fused=True)


DECAY = 0.2                                                # of the steps: the end of a warm-up, stable, decay schedule


def default_schedule(min_lr, lr):
    return "constant" if min_lr in (None, lr) else "cosine"


def lr_at(step, cfg):
    """Learning rate of a step (from 1): linear warm-up, then as --schedule says, to min_lr at the last step."""
    if step <= cfg.warmup_steps:
        return cfg.lr * step / cfg.warmup_steps
    if cfg.schedule == "constant":
        return cfg.lr
    begin = cfg.warmup_steps
    if cfg.schedule == "wsd":
        begin = max(begin, cfg.steps - round(DECAY * cfg.steps))
    progress = max(0, step - begin) / max(1, cfg.steps - begin)
    left = 1 - progress if cfg.schedule == "wsd" else 0.5 * (1 + math.cos(math.pi * progress))
    return cfg.min_lr + (cfg.lr - cfg.min_lr) * left


def compile_model(model, device=None):
    """The same model with its blocks and its loss compiled. device: where it will run, if not where it is. Raises
    UserError where nothing could compile them."""
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if (device or model.embed.weight.device).type == "cpu" and shutil.which(compiler) is None:
        raise UserError(f"--compile needs a C++ compiler, but {compiler} is missing; install it, or set CXX")
    for block in model.blocks:
        block.compile(dynamic=False)
    model.nll_and_grad = torch.compile(nll_and_grad, dynamic=False)
    return model


def shard_model(model, device, dtype):
    """The same model with its parameters split over the ranks of a node, each node with a copy (FSDP2, HSDP). A block's
    are put together in dtype while it runs, the embedding's in float32; gradients are added up in float32."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard  # takes half a second

    nodes, ranks = mesh_sizes()
    sizes = (nodes, ranks) if nodes > 1 and ranks > 1 else (nodes * ranks,)
    mesh = dist.init_device_mesh(device.type, sizes, mesh_dim_names=("nodes", "ranks")[-len(sizes):])
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh)


def whole(state, keep):
    """A state with its sharded tensors put together on the CPU, one at a time, if this rank is to keep them. All ranks
    must call it."""
    if isinstance(state, dict):
        return {key: whole(value, keep) for key, value in state.items()}
    if not hasattr(state, "full_tensor"):
        return state
    full = state.full_tensor()
    return full.cpu() if keep else None


def share_of(tensor, p):
    """A copy of a whole tensor as the parameter p is: on its device, and sharded if that is."""
    if not hasattr(p, "full_tensor"):
        return tensor.to(p.device, copy=True)
    return dist.tensor.distribute_tensor(tensor, p.device_mesh, p.placements, src_data_rank=None).clone()


# -----------------------------------------------------------------------------
# Run folder: command.txt, resolved_config.json, env.json, train.jsonl, last.pt, best.pt

# What may differ on resume: nothing that changes the losses. Data are compared by their hash.
MAY_CHANGE = {"data", "out_dir", "device", "eval_every", "eval_iters", "log_every", "save_every", "keep_every",
              "overwrite", "config", "size", "exp", "shard", "activation_checkpointing", "tensorboard"}
RUN_FILES = ("command.txt", "resolved_config.json", "env.json", "train.jsonl", "last.pt", "best.pt")
KEPT_WEIGHTS = "step[0-9]*.pt"                             # of --keep-every
ELSEWHERE = "use another --out-dir, or --overwrite"
KEPT = "what was saved before is kept. Free some space (or make the folder writable) and run the command again"
CONFIG = {f"{name}?": kind for name, kind in get_type_hints(Config).items()}
CHECKPOINT = {"format": whole_number, "config": dict, "tokenizer": {"name": str, "words": list | None}, "model": dict,
              "step": whole_number, "best_val_loss?": loss_or_infinity, "data?": IDENTITY, "rng?": dict,
              "optimizer?": {"state": dict, "param_groups": list}}
LOG_LINE = {"type": str, "step?": whole_number, "config?": dict}


def relative(path):
    """A path as logs may show it: from the working directory, not from the root of this machine."""
    return os.path.relpath(path) if path and os.path.isabs(path) else path


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def why_unwritten(e):
    """Why the system refused to write, which PyTorch tells by where its file ends."""
    e = e.__context__ if isinstance(e.__context__, OSError) else e
    if isinstance(e, OSError) and e.errno in FULL:
        return f"disk full: {e.strerror}"
    return getattr(e, "strerror", None) or brief(e)


@contextlib.contextmanager
def writing(path):
    """Raise UserError where the system refuses to write what is written here."""
    try:
        yield
    except (OSError, RuntimeError, UnicodeError) as e:     # torch.save reports a full disk as a RuntimeError
        raise UserError(f"can't write {path} ({why_unwritten(e)}); {KEPT}") from None


def write_whole(path, write):
    """Replace a file by what write(temporary path) makes, synced, or leave it as it was."""
    temporary = path.with_name(f"{path.name}.{os.urandom(6).hex()}.tmp")
    try:
        with writing(path):
            write(temporary)
            with open(temporary, "rb") as f:
                os.fsync(f.fileno())
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def own_folder(folder):
    """Make the run folder this process's own: locked, and without what killed runs left half written. A folder that
    nothing was written to is removed again. Raises UserError where another run holds it, or it can't be made."""
    made = [path for path in (folder, *folder.parents) if not os.path.exists(path)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"can't make the run folder {folder} ({e.strerror}); use another --out-dir") from None
    with contextlib.ExitStack() as stack:
        stack.callback(remove_empty, made)
        try:
            stack.enter_context(exclusive(folder / "lock", folder))
            for path in (path for name in (*RUN_FILES, KEPT_WEIGHTS) for path in folder.glob(f"{name}.*tmp")):
                path.unlink()
        except OSError as e:                               # a finished run is still said to be finished
            print(f"note: {folder} isn't locked ({brief(e)}): let nothing else write there", file=sys.stderr)
        yield


def refuse_own_source(source, folder):
    """Raise UserError where a model that is to be read is of the run folder that is to be written."""
    source = Path(source)
    if folder.resolve() == (source if source.is_dir() else source.parent).resolve():
        raise UserError(f"--out-dir {folder} is where {source} is read from, which would be replaced; use another")


def remove_empty(folders):
    with contextlib.suppress(OSError):                     # the first that isn't empty ends it
        for folder in folders:
            folder.rmdir()


def write_text(path, text):
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def save_checkpoint(path, cfg, tokenizer, model, keep=True, **state):
    """state: step, tokens, best_val_loss, data, and in last.pt optimizer and rng. Every rank of a sharded model must
    call it; the one that is to keep it writes."""
    words = getattr(tokenizer, "words", None)
    content = dict(format=1, config=dataclasses.asdict(cfg), tokenizer=dict(name=tokenizer.name, words=words),
                   model=whole(model.state_dict(), keep), **whole(state, keep))

    def write(temporary):
        with open(temporary, "wb") as f:                   # by its path, PyTorch would hide why it can't be written
            torch.save(content, f)

    if keep:
        write_whole(path, write)


def verify_records(f):
    """Raise ValueError or zipfile.BadZipFile unless each record of an open checkpoint has the CRC-32 that torch.save
    gave it, which torch.load doesn't look at: a flipped bit would be a weight of 1e36. Half a second per GB."""
    with zipfile.ZipFile(f) as archive:
        if any(record.compress_type != zipfile.ZIP_STORED for record in archive.infolist()):
            raise ValueError("compressed records")         # a small file could unpack to any size
        if damaged := archive.testzip():
            raise ValueError(f"the checksum of {damaged}")
    f.seek(0)


def config_of(logged: dict) -> Config:
    """The Config in a log, checkpoint or result; a flag that is younger has today's default. Raises ValueError or
    TypeError where it isn't one."""
    check(logged, CONFIG, "config")
    cfg = Config(**logged)
    return dataclasses.replace(cfg, schedule=cfg.schedule or default_schedule(cfg.min_lr, cfg.lr))


def checkpoint_file(path):
    """Path of the checkpoint that --ckpt means: of a run folder its best.pt. Raises UserError where none is."""
    path = Path(path, "best.pt") if os.path.isdir(path) else Path(path)
    if not os.path.isfile(path):
        raise UserError(f"{path} is not a file; give a run folder, or a last.pt or best.pt of one (`make checkpoints` "
                        "trains two small ones)")
    return path


def load_checkpoint(path, device="cpu", mmap=False):
    """Checkpoint as a dict, with config as a Config and tokenizer as a tokenizer. Only tensors and plain values are
    unpickled, so a hostile file can't run code. mmap: leave the tensors on disk until they are read, which ranks that
    share a machine do once. Raises UserError for a file that isn't a checkpoint of this script."""
    path = checkpoint_file(path)
    try:
        with open(path, "rb") as f:
            verify_records(f)
            source = f"/dev/fd/{f.fileno()}" if mmap else f                     # PyTorch maps by a name, in UTF-8
            ckpt = torch.load(source, map_location=device, weights_only=True, mmap=mmap)
    except (*BROKEN, RuntimeError, OSError, pickle.UnpicklingError, zipfile.BadZipFile) as e:
        raise UserError(f"{path} is damaged, or holds more than weights and settings ({brief(e)}); nothing in it was "
                        "run") from None
    try:
        check(ckpt, CHECKPOINT, "it")
    except BROKEN as e:                                    # what it shows of a value may nest too deep
        raise UserError(f"{path} is not a checkpoint of train_dba.py, or not a whole one ({e})") from None
    try:
        cfg = ckpt["config"] = config_of(ckpt["config"])
        tokenizer = ckpt["tokenizer"] = make_tokenizer(ckpt["tokenizer"]["name"], ckpt["tokenizer"]["words"])
        wrong = list(out_of_range(vars(cfg))) or problems(dataclasses.replace(cfg, mode="train"), {})
        if ckpt["step"] > cfg.steps:
            wrong.append(f"step {ckpt['step']} of {cfg.steps}")
    except BROKEN as e:
        wrong = [brief(e)]
    if wrong:
        raise UserError(f"{path} has broken settings, or those of another version of train_dba.py ({'; '.join(wrong)})")
    if "data" in ckpt:                                     # a checkpoint that is older than this key has the vocabulary
        ckpt["data"].setdefault("tokenizer_sha256", tokenizer_hash(tokenizer))
    return ckpt


def load_model(ckpt):
    """The GPT of a loaded checkpoint, on the device that the checkpoint was loaded to, in eval mode. Raises UserError
    unless the weights are those of its settings."""
    try:
        with torch.device("meta"):                         # nothing is allocated for what a hostile config asks
            model = GPT(ckpt["config"], ckpt["tokenizer"].vocab_size)
        check(ckpt["model"], model.state_dict(), "model")
        model.load_state_dict(ckpt["model"], assign=True)
    except (*BROKEN, RuntimeError) as e:
        raise UserError(f"the checkpoint's weights don't fit its settings ({brief(e)})") from None
    return model.eval()


def read_model(path, device="cpu"):
    """(GPT in eval mode, tokenizer, path of the file or folder, checkpoint or {}) of a run folder, a checkpoint, or a
    Llama: a .gguf file or a Hugging Face folder. Raises UserError."""
    path = Path(path)
    if path.suffix == ".gguf" and os.path.isfile(path) or os.path.isfile(path / "config.json"):
        return *converter().load_llama(path, device), path, {}
    path = checkpoint_file(path)
    ckpt = load_checkpoint(path, device)
    return load_model(ckpt), ckpt["tokenizer"], path, ckpt


def provenance(device):
    """What a reader needs to place the numbers of a run: versions, hardware, threads, and the code's commit. That is
    unknown where the code was unpacked inside another repository."""
    def git(*args):
        try:
            command = ["git", "-C", str(Path(__file__).parent), *args]
            return subprocess.run(command, capture_output=True, check=True).stdout.decode().strip()
        except (OSError, ValueError, subprocess.CalledProcessError):            # no git, or not a clone
            return None

    own = git("rev-parse", "--show-prefix") == "" and git("ls-files", Path(__file__).name)
    commit = git("rev-parse", "HEAD") if own else None
    return dict(python=platform.python_version(), torch=torch.__version__, numpy=np.__version__,
                platform=platform.system(), cpu=torch.cpu.get_capabilities().get("cpu_name", platform.processor()),
                device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
                threads=torch.get_num_threads(), ranks=math.prod(mesh_sizes()), commit=commit,
                dirty=bool(git("status", "--porcelain", "--", "*.py")) if commit else None)


def append_line(path, **line):
    with writing(path), open(path, "a") as f:
        f.write(json.dumps(line) + "\n")


def summary_writer():
    """TensorBoard's class of a folder's writer. Raises UserError where it isn't installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--tensorboard needs tensorboard: pip install tensorboard, or leave it out") from None
    threading.excepthook = lambda _: None                  # what stops its thread comes back by flush(), too
    return SummaryWriter


def read_log(path, shape=LOG_LINE):
    """The lines of a log as dicts of a shape; a torn last line, left by a kill, is dropped."""
    if not path.exists():
        return []
    try:
        lines = read_bytes(path, 2**30).splitlines()
    except (OSError, ValueError) as e:
        raise UserError(f"{path} is no log ({brief(e)}); use another --out-dir") from None
    parsed = []
    for n, line in enumerate(lines, 1):
        try:
            value = json.loads(line)
            check(value, shape, "the line")
        except BROKEN as e:
            if n == len(lines):
                break
            raise UserError(f"{path}:{n} is no log line ({brief(e)}); mend it, or use another --out-dir") from None
        parsed.append(value)
    return parsed


def read_run(folder):
    """(lines of the log, last.pt or None) of a run folder. Raises UserError for what can't be gone on with."""
    log, last = read_log(folder / "train.jsonl"), folder / "last.pt"
    ckpt = load_checkpoint(last, mmap=True) if last.exists() else None
    kept = sorted(path.name for name in ("best.pt", KEPT_WEIGHTS) for path in folder.glob(name))
    if not log and not ckpt and kept:
        raise UserError(f"{folder} holds {kept[0]} of a run whose log is gone; {ELSEWHERE}")
    if ckpt and (lacking := {"optimizer", "rng", "data", "best_val_loss"} - ckpt.keys()):
        raise UserError(f"{last} lacks {', '.join(sorted(lacking))}: a copy of best.pt? That can be sampled from, but "
                        "not trained on")
    if log and "config" not in log[0]:
        raise UserError(f"{folder}/train.jsonl doesn't begin with a meta line; {ELSEWHERE}")
    return log, ckpt


def as_begun(cfg, given, saved):
    """The Config with what a run of the saved settings began with where the command leaves it open: choices of `auto`,
    and defaults that follow from --steps, which may have grown, and from --size, which widths didn't always."""
    kept = [name for name, auto in (("dtype", "auto"), ("micro_batch", 0)) if getattr(cfg, name) == auto]
    following = ["warmup_steps", "sem_dim", "geo_dim", "attn_dim"] if cfg.size else ["warmup_steps"]
    kept += [name for name in following if name not in given]
    return dataclasses.replace(cfg, **{name: saved[name] for name in kept})


def find_run(cfg, given):
    """What the run folder holds for this command: (cfg, checkpoint or None, finished). Raises UserError if that is
    a run with other settings, or can't be gone on with."""
    folder = Path(cfg.out_dir)
    log, ckpt = ([], None) if cfg.overwrite else read_run(folder)
    if not log and not ckpt:
        return cfg, None, False
    try:
        saved = dataclasses.asdict(ckpt["config"] if ckpt else config_of(log[0]["config"]))
    except BROKEN as e:
        raise UserError(f"{folder}/train.jsonl has broken settings ({brief(e)}); {ELSEWHERE}") from None
    cfg = as_begun(cfg, given, saved)
    if ckpt and ckpt["step"] == saved["steps"] < cfg.steps:                     # a finished run may be extended
        saved["steps"] = cfg.steps
    may_change = MAY_CHANGE | ({"val_data"} if ckpt and "val_sha256" in ckpt["data"] else set())
    differ = [f"{flag_name(name)} was {saved[name]!r}, is {value!r}" for name, value in dataclasses.asdict(cfg).items()
              if name not in may_change and value != saved[name]]
    if differ:
        raise UserError(f"{folder} holds a run with other settings ({'; '.join(differ)}); {ELSEWHERE}")
    finished = bool(log) and log[-1]["type"] == "done" and log[-1].get("step") == cfg.steps
    if ckpt is None and len(log) > 1 and not finished:
        raise UserError(f"{folder} has a log but no last.pt to go on from; {ELSEWHERE}")
    return cfg, ckpt, finished


def shell_quote(arg):
    """An argument as a shell reads it, in characters that any file can hold: a path may have bytes that aren't text."""
    if arg.isprintable():
        return shlex.quote(arg)
    plain = b"'\\"
    return "$'" + "".join(chr(b) if 32 <= b < 127 and b not in plain else f"\\x{b:02x}" for b in os.fsencode(arg)) + "'"


def start_folder(cfg, ckpt, env, meta, argv):
    """Write command, config and environment, and the log: its first line, or on resume all up to the checkpoint."""
    folder = Path(cfg.out_dir)
    kept = read_log(folder / "train.jsonl") if ckpt else []
    kept = [line for line in kept if line.get("step", 0) <= ckpt["step"] and line["type"] != "done"]
    first = dict(type="resume_meta", step=ckpt["step"], env=env, **meta) if kept else dict(type="meta", **meta)
    nodes, ranks = mesh_sizes()
    launcher = f"torchrun --nproc-per-node {ranks}" if dist.is_initialized() else "python3"
    if nodes > 1:                                          # HEAD: name and port of one of the nodes
        launcher += f' --nnodes {nodes} --rdzv-backend c10d --rdzv-endpoint "$HEAD"'
    args = ("=".join(map(relative, arg.split("=", 1))) for arg in argv)
    texts = {"command.txt": " ".join([launcher, "train_dba.py", *map(shell_quote, args)]) + "\n",
             "resolved_config.json": json.dumps(dataclasses.asdict(cfg), indent=1) + "\n",
             "env.json": json.dumps(env, indent=1) + "\n",
             "train.jsonl": "".join(json.dumps(line) + "\n" for line in [*kept, first])}
    if ckpt is None:
        for path in [folder / "last.pt", folder / "best.pt", *folder.glob(KEPT_WEIGHTS)]:
            with writing(path):
                path.unlink(missing_ok=True)
    for name, text in texts.items():
        write_text(folder / name, text)


# -----------------------------------------------------------------------------
# Progress

LINE_SECONDS = 30                                          # between lines where standard error is no terminal


class PlainLines:
    """The file of a bar that nobody watches: each of its states becomes a line of standard error."""

    def write(self, text):
        if text.strip():
            sys.stderr.write(text.strip() + "\n")

    def flush(self):
        sys.stderr.flush()


def progress(total, unit, desc, **options):
    """A tqdm on standard error: a bar, or without a terminal a line every LINE_SECONDS. options: of tqdm."""
    plain = dict(file=PlainLines(), mininterval=LINE_SECONDS, delay=LINE_SECONDS, miniters=1, bar_format=(
        "{desc}: {percentage:.0f} %, {n_fmt} of {total_fmt} " + unit + ", {rate_fmt}, {remaining} left{postfix}"))
    where = dict(dynamic_ncols=True) if sys.stderr.isatty() else plain
    return tqdm(total=total, unit=unit, desc=desc, unit_scale=total > 10_000, **where, **options)


# -----------------------------------------------------------------------------
# Evaluation

def perplexity(nll: float) -> float | None:
    """exp of a mean nll in nats; None above 709, where a float has no room for it."""
    return math.exp(nll) if nll <= 709 else None


@torch.no_grad()
def evaluate(model, data, cfg, micro, ranks, dtype):
    """Mean nll in nats over the fixed validation windows, and the number of tokens it is over. Every rank takes part
    in each forward pass, of `micro` windows."""
    model.eval()
    nll, count = 0.0, 0
    batches = -(-(len(data.val) - 1) // (cfg.batch_size * cfg.block))
    bar = progress(min(batches, cfg.eval_iters or batches), "batch", "evaluating", leave=False, disable=ranks.rank > 0)
    for x, y in eval_batches(data.val, cfg.batch_size, cfg.block, cfg.eval_iters):
        spare = -len(x) % (micro * ranks.world)            # rows without a target, so that ranks have as many parts
        parts = zip(F.pad(x, (0, 0, 0, spare)).split(micro), F.pad(y, (0, 0, 0, spare), value=-1).split(micro))
        for inputs, targets in list(parts)[ranks.rank::ranks.world]:
            with autocast(ranks.device, dtype):
                nll += model(inputs.to(ranks.device), targets.to(ranks.device)).item()
            count += int((targets >= 0).sum())
        bar.update()
    bar.close()
    model.train()
    nll, count = ranks.sum(nll, count)
    return nll / count, int(count)


# -----------------------------------------------------------------------------
# Training

def share_out(cfg, ranks):
    """Micro-batch size, and the micro-batches of a step that this rank takes: fixed globally, dealt round-robin."""
    if ranks.world > 1 and cfg.dropout and not cfg.micro_batch:
        raise UserError("dropout masks are drawn per micro-batch; give --micro-batch a number, so that ranks don't "
                        "change them")
    micro = cfg.micro_batch or max(1, cfg.batch_size // ranks.world)
    count = cfg.batch_size * cfg.grad_accum // micro
    if cfg.batch_size % micro or count % ranks.world:
        raise UserError(f"--batch-size {cfg.batch_size} x --grad-accum {cfg.grad_accum} in parts of {micro} "
                        f"can't be dealt to {ranks.world} ranks evenly; change --batch-size or --micro-batch")
    return micro, range(ranks.rank, count, ranks.world)


def step_gradients(model, batch, cfg, step, micro, mine, ranks, dtype):
    """Add up the gradients of this rank's micro-batches, scaled to the global batch's mean. Returns its summed nll."""
    x, y = (tensor.to(ranks.device) for tensor in batch)
    total = torch.zeros((), device=ranks.device)
    for m in mine:
        if cfg.dropout:
            torch.manual_seed(int(np.random.SeedSequence([cfg.seed, step, m]).generate_state(1)[0]))
        rows, last = slice(m * micro, (m + 1) * micro), m == mine[-1]           # whose backward pass adds up ranks
        if cfg.shard:
            model.set_requires_gradient_sync(last)
        with model.no_sync() if isinstance(model, DistributedDataParallel) and not last else contextlib.nullcontext():
            with autocast(ranks.device, dtype):
                nll = model(x[rows], y[rows])
            (nll * (ranks.world / y.numel())).backward()                        # DDP and FSDP average over ranks
        total += nll.detach()
    return total.item()


def catch_signals(waits_for):
    """List that SIGINT and SIGTERM append themselves to; a second SIGINT ends the process at once. waits_for() makes
    the sentence, or "", that a signal is answered with."""
    caught = []

    def note(signum, frame):
        caught.append(signum)
        os.write(2, waits_for().encode())                  # print may be what the signal has interrupted
        if signum == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)

    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, note)
    return caught


NARROW = 4                                                 # channels a head: fewer get a warning


def describe(cfg, data, ranks, dtype, why):
    """Print what was decided, and return the `meta` line of the log."""
    params, kv = count_params(cfg, data.tokenizer.vocab_size), kv_bytes_per_token(cfg)
    if ranks.rank == 0:
        print(f"{cfg.attn_mode} attention in {dtype} ({why}) on {ranks.device}, {ranks.world} rank(s) of "
              f"{torch.get_num_threads()} CPU threads")
        print("parameters:", ", ".join(f"{part} {n:,}" for part, n in params.items()))
        print("KV cache, bytes per token:", ", ".join(f"{fmt} {n:,}" for fmt, n in kv.items() if n is not None))
        sizes = [f"{name} {n:,}" for name, n in data.identity.items() if isinstance(n, int)]
        print("data:", ", ".join(sizes), f"({data.tokenizer.name})")
        print(f"tokens per step: {cfg.batch_size} x {cfg.grad_accum} x {cfg.block} = {cfg.tokens_per_step:,}",
              flush=True)
        if narrow := [f"{path.name} {path.width}" for path in cfg.attention.paths if path.width < NARROW]:
            print(f"warning: channels per head: {', '.join(narrow)}; fewer than {NARROW} hold little. Give larger "
                  "widths, or fewer heads", file=sys.stderr)
    return dict(config=dataclasses.asdict(cfg), params=params, kv_bytes_per_token=kv, data=data.identity)


def estimator():
    """estimate.py, which knows what GPUs can do, or None where it isn't here."""
    try:
        import estimate
        return estimate
    except ModuleNotFoundError:
        return None


def build(cfg, vocab_size, device, source=None):
    """Model, compiled and sharded if it is to be, optimiser and the generator that decides the order of the data, all
    from the seed. source: a model of the same shape whose weights it gets."""
    torch.manual_seed(cfg.seed)
    model = GPT(cfg, vocab_size).init_weights()
    if source:
        model.load_state_dict(source.state_dict())
    if not cfg.shard:                                      # sharding brings it there block by block
        model.to(device)
    if cfg.compile:
        compile_model(model, device)
    if cfg.shard:
        shard_model(model, device, getattr(torch, cfg.dtype))
    return model, make_optimizer(model, cfg), np.random.Generator(np.random.PCG64(cfg.seed))


def restore(ckpt, model, optimizer, rng):
    """Put them where a checkpoint left them. Of the optimiser only its state is taken: its settings are the run's."""
    groups, saved = optimizer.state_dict()["param_groups"], ckpt["optimizer"]
    params = [p for group in optimizer.param_groups for p in group["params"]]
    try:
        own, state = model.state_dict(), {}
        check(ckpt["model"], own, "model")
        for name, tensor in ckpt["model"].items():
            own[name].copy_(share_of(tensor, own[name]))
        if [group["params"] for group in saved["param_groups"]] != [group["params"] for group in groups]:
            raise ValueError("another model's parameters")
        steps = torch.tensor(float(min(ckpt["step"], 2**24)))                   # of which float32 counts no more
        for i, p in enumerate(params if ckpt["step"] else []):
            check(saved["state"][i], dict(step=steps, exp_avg=p, exp_avg_sq=p), f"optimizer {i}")
            if saved["state"][i]["step"] != steps:
                raise ValueError(f"the optimizer's step {saved['state'][i]['step']} at step {ckpt['step']}")
            state[i] = dict(step=steps.clone(), **{name: share_of(saved["state"][i][name], p) for name in (
                "exp_avg", "exp_avg_sq")})
        optimizer.load_state_dict(dict(state=state, param_groups=groups))
        rng.bit_generator.state = ckpt["rng"]
    except (*BROKEN, RuntimeError) as e:
        raise UserError(f"last.pt doesn't fit this run ({brief(e)}); {ELSEWHERE}") from None


@dataclass
class Training:
    """A model between two steps of its training, and all that the next ones need. data: the identity of its tokens;
    extra: what last.pt holds besides; of_peak: mfu of a token per second."""
    cfg: Config
    folder: Path
    data: dict
    tokenizer: object
    model: nn.Module
    optimizer: torch.optim.Optimizer
    rng: np.random.Generator
    ranks: Ranks
    steps: int
    tokens_per_step: int
    step: int = 0
    best: float = math.inf                                 # the least val_loss
    saved_at: int = 0
    extra: dict = field(default_factory=dict)
    of_peak: float | None = None
    board: object = None                                   # TensorBoard's writer

    @property
    def tokens(self):
        return self.step * self.tokens_per_step

    def log(self, kind, **fields):
        if self.ranks.rank == 0:
            append_line(self.folder / "train.jsonl", type=kind, step=self.step, tokens=self.tokens, **fields)
        if self.board:
            with writing(self.folder / "events.out.tfevents"):
                for name, value in fields.items():
                    if value is not None:
                        self.board.add_scalar(f"{kind}/{name}", value, self.step)
                self.board.flush()

    def save(self, name, model=None, **state):
        """Write a checkpoint of the model, or of one in its place."""
        save_checkpoint(self.folder / name, self.cfg, self.tokenizer, model or self.model, self.ranks.rank == 0,
                        step=self.step, tokens=self.tokens, best_val_loss=self.best, data=self.data, **state)
        self.ranks.sum(0)                                  # all wait, in the group that lets them wait for long

    def save_last(self):
        self.save("last.pt", optimizer=self.optimizer.state_dict(), rng=self.rng.bit_generator.state, **self.extra)
        self.saved_at = self.step

    def improves(self, loss):
        """Whether a validation loss is the least so far. Raises UserError for one that isn't finite."""
        if not math.isfinite(loss):
            raise UserError(f"step {self.step}: validation loss {loss}; {self.folder}/last.pt holds step "
                            f"{self.saved_at}")
        improved, self.best = loss < self.best, min(loss, self.best)
        return improved

    def update(self, gradients):
        """Take a step. gradients(step) adds them up, and returns what the log says of it, a loss among that. Returns
        the same with learning rate and gradient norm. Raises UserError, before the update, where they aren't finite."""
        self.step += 1
        lr = lr_at(self.step, self.cfg)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        measured = gradients(self.step)
        params = [p for p in self.model.parameters() if p.requires_grad]
        norm = nn.utils.get_total_norm(p.grad for p in params)
        norm = norm.full_tensor() if self.cfg.shard else norm
        nn.utils.clip_grads_with_norm_(params, self.cfg.grad_clip or math.inf, norm)
        measured = dict(measured, lr=lr, grad_norm=norm.item())
        if not math.isfinite(measured["loss"] + measured["grad_norm"]):
            raise UserError(f"step {self.step}: loss {measured['loss']}, gradient norm {measured['grad_norm']}; "
                            f"stopped before the update. {self.folder}/last.pt holds step {self.saved_at}; start "
                            "afresh with a lower --lr or longer --warmup-steps")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        synchronize(self.ranks.device)
        return measured

    def go_on(self, what, gradients, evaluate):
        """Take all steps that are left, or until a signal; log, evaluate and save where the Config says, and at the
        last. gradients: of update(). evaluate() measures, logs and keeps the model. Returns the exit code."""
        cfg, main_rank, doing = self.cfg, self.ranks.rank == 0, "finishing"
        caught = catch_signals(lambda: f"\n{doing} step {self.step}, then saving\n" if main_rank else "")
        bar = progress(self.steps * self.tokens_per_step, "tok", what, initial=self.tokens, disable=not main_rank)
        seconds, timed_steps, stop_with = 0.0, 0, 0
        while self.step < self.steps and not stop_with:
            started = time.perf_counter()
            measured = self.update(gradients)
            seconds, timed_steps = seconds + time.perf_counter() - started, timed_steps + 1
            bar.set_postfix_str(f"step {self.step} loss {measured['loss']:.4f}", refresh=False)
            bar.update(self.tokens_per_step)
            last = self.step == self.steps
            if self.step % cfg.log_every == 0 or self.step == 1 or last:
                tok_s = timed_steps * self.tokens_per_step / seconds
                self.log("train", **measured, tok_s=tok_s, mfu=self.of_peak and self.of_peak * tok_s,
                         step_ms=1000 * seconds / timed_steps, mem_bytes=peak_memory(self.ranks.device))
                seconds, timed_steps = 0.0, 0
            if self.step % cfg.eval_every == 0 or last:
                doing = "finishing the evaluation after"
                evaluate()
                doing = "finishing"
            if cfg.keep_every and self.step % cfg.keep_every == 0:
                self.save(f"step{self.step:07}.pt")
            interrupted, terminated = self.ranks.sum(signal.SIGINT in caught, signal.SIGTERM in caught)
            stop_with = 128 + signal.SIGINT if interrupted else 128 + signal.SIGTERM if terminated else 0
            if self.step % cfg.save_every == 0 or last or stop_with:
                self.save_last()
        bar.close()
        if stop_with and main_rank:
            print(f"stopped at step {self.step}, saved; the same command goes on", file=sys.stderr)
        return stop_with


def decide(cfg, given, ranks, env, tokenizer):
    """What a command leaves to this machine: (cfg with the type of its products and its micro-batch, data, that type,
    why that one). env is told what was timed for it."""
    def measure():
        env["product_tflops"] = ranks.from_first(lambda: product_rates(cfg.block, cfg.d_model, cfg.d_ff))
        return env["product_tflops"]

    dtype, why = pick_dtype(cfg.dtype, ranks.device, measure)
    if given.get("dtype", "auto") == "auto" != cfg.dtype:
        why = "as this run began"
    cfg = dataclasses.replace(cfg, dtype=str(dtype).removeprefix("torch."))
    data = load_data(cfg, tokenizer)
    if cfg.micro_batch == 0:                               # auto
        if not (estimate := estimator()):
            raise UserError("--micro-batch auto: no module estimate beside train_dba.py")
        fitting = estimate.fitting_micro_batch(cfg, data.tokenizer.vocab_size, ranks, dtype)
        cfg = dataclasses.replace(cfg, micro_batch=fitting)
    return cfg, data, dtype, why


def train(cfg, given, argv, source=()):
    """Train until cfg.steps, from last.pt if there is one. source: [tokenizer, model] of --init-from, or empty; the
    model is taken out of it, so as not to be held all along. Returns the exit code."""
    device = pick_device(cfg.device)
    ranks = start_ranks(device)
    main_rank = ranks.rank == 0
    if cfg.shard and not dist.is_initialized():
        raise UserError("--shard splits a model over ranks; start them with torchrun, or give --no-shard")
    share_out(cfg, ranks)                                  # refuses early what can't be dealt
    folder = Path(cfg.out_dir)
    cfg, ckpt, finished = find_run(cfg, given)
    env = provenance(device)
    settings = {flag_name(name): value for name, value in vars(cfg).items() if name not in MAY_CHANGE}
    ranks.agree(step=ckpt["step"] if ckpt else 0, finished=finished, commit=env["commit"], **settings,
                shard=cfg.shard and "of {} x {}".format(*mesh_sizes()))
    if finished:
        if main_rank:
            further = "larger --steps go on" if ckpt else "its checkpoints are gone"
            print(f"{folder} is finished ({cfg.steps} steps); {further}, --overwrite starts afresh")
        return 0
    cfg, data, dtype, why = decide(cfg, given, ranks, env, source[0] if source else None)
    micro, mine = share_out(cfg, ranks)
    meta = describe(cfg, data, ranks, dtype, why)
    weights = source.pop() if source else None
    model, optimizer, rng = build(cfg, data.tokenizer.vocab_size, device, None if ckpt else weights)
    del weights
    if source and not ckpt and main_rank:
        print(f"weights of {cfg.init_from}; the optimiser begins afresh", flush=True)
    run = Training(cfg, folder, meta["data"], data.tokenizer, model, optimizer, rng, ranks, cfg.steps,
                   cfg.tokens_per_step)
    if estimate := estimator():
        run.of_peak = estimate.share_of_peak(cfg, data.tokenizer.vocab_size, ranks, env["device"])
    if ckpt:
        check_same_data(ckpt["data"], data, folder, ELSEWHERE)
        restore(ckpt, model, optimizer, rng)
        run.step, run.best, run.saved_at = ckpt["step"], ckpt["best_val_loss"], ckpt["step"]
    runner = model
    if ranks.world > 1 and not cfg.shard:
        runner = DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None,
                                         broadcast_buffers=False, gradient_as_bucket_view=True)
    writer = summary_writer() if cfg.tensorboard and main_rank else None
    ranks.agree(data=meta["data"], dtype=cfg.dtype)        # before rank 0 writes to the folder
    if main_rank:
        start_folder(cfg, ckpt, env, meta, argv)
    if writer:
        with writing(folder):
            run.board = writer(folder, purge_step=run.step + 1)
    if ckpt is None:
        run.save_last()                                    # so that a log without a checkpoint means a deleted one
    del ckpt

    def gradients(step):
        batch = sample_batch(rng, data.train, cfg.batch_size * cfg.grad_accum, cfg.block)
        nll = step_gradients(runner, batch, cfg, step, micro, mine, ranks, dtype)
        return dict(loss=ranks.sum(nll)[0] / cfg.tokens_per_step)

    def validate():
        val_loss, val_tokens = evaluate(model, data, cfg, micro, ranks, dtype)
        improved = run.improves(val_loss)
        bpb = val_loss / math.log(2) * (len(data.val) - 1) / data.val_bytes if data.val_bytes else None
        run.log("eval", val_loss=val_loss, val_ppl=perplexity(val_loss), val_bpb=bpb, val_tokens=val_tokens,
                best_val_loss=run.best)
        if main_rank:
            tqdm.write(f"step {run.step}: validation loss {val_loss:.4f} nats", file=sys.stderr)
        if improved:
            run.save("best.pt")

    if cfg.compile and main_rank:
        print("compiling: the first step, and the first evaluation, take a minute or more", file=sys.stderr)
    stop_with = run.go_on("training", gradients, validate)
    if not stop_with:
        run.log("done", best_val_loss=run.best)
    return stop_with


# =============================================================================
# Part II: decoding, of which training only tells the sizes; then the command line

# -----------------------------------------------------------------------------
# Quantisation: blocks of 32 channels of one token, across heads, share a float16 scale; the last block may be short.

FLOAT_FORMATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
HETERO = {"k_sem": "q4_0", "k_geo": "q8_0", "v": "q4_0", "latent": "q4_0"}      # the papers' policy; decoupled only
NF4 = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
       -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
       0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)  # QLoRA, appendix E
# What a block's largest value becomes, in units of its scale.
EXTREMES = {"q8_0": 127, "q4_0": -8, "q4_sym": 7, "nf4": 1, "q3_0": -4, "q2_0": -2}


def stream_bytes(fmt, C):
    """Bytes that one token of a stream of C channels costs."""
    bits, scale = FORMATS[fmt]
    return -(-C * bits // 8) + scale * -(-C // 32)


def regroup(x, bits, to, n):
    """Numbers x [N, ., S] of so many bits -> the first n [N, n, S] of `to` bits each that the same bits make, the first
    in the lowest. Packs codes into bytes (n = ceil(C · bits / 8) of C channels), and unpacks them."""
    together = math.lcm(bits, to)                          # what whole numbers of both sizes fill: 8 bits, or 24
    x = F.pad(x, (0, 0, 0, -x.size(1) % (together // bits))).unflatten(1, (-1, together // bits))
    first, *others = x.to(torch.uint8 if together == 8 else torch.int32).unbind(2)
    for i, part in enumerate(others, 1):
        first = first | part << bits * i
    shift = torch.arange(0, together, to, dtype=first.dtype, device=x.device)[:, None]
    return (first[:, :, None] >> shift & 2**to - 1).flatten(1, 2)[:, :n]


def quantize(x, fmt):
    """x [N, C] -> codes [N, C] int8 (q8_0) or packed, [N, ceil(C · bits / 8)] uint8 (4 bits: the even channel in the
    low half of a byte), scales [N, ceil(C / 32)] float16.

    q8_0 and q4_0 give the values of ggml: the code from the unrounded scale, the value from the float16 scale; q3_0 and
    q2_0 are q4_0 in fewer bits. A block that holds an infinity or a NaN, or needs a scale above float16's largest, has
    a NaN scale and reads as NaN throughout; one whose scale rounds to zero reads as zeros.
    """
    C, bits = x.size(1), FORMATS[fmt][0]
    x = F.pad(x.float(), (0, -C % 32)).unflatten(1, (-1, 32))                   # [N, blocks, 32]
    extreme = x.gather(2, x.abs().argmax(2, keepdim=True))                      # [N, blocks, 1], the first if tied
    extreme = extreme if EXTREMES[fmt] < 0 else extreme.abs()
    d = extreme / x.new_tensor(EXTREMES[fmt])         # a tensor: CUDA would multiply by the inverse of a number
    fits = d.abs() < 65520                                 # rounds to a finite float16; false for a NaN
    x = torch.where(fits, x, 0.0) * torch.where(fits & (d.abs() > 2**-25), 1 / d, 0.0)            # in units of d
    if fmt == "q8_0":
        size = x.abs().floor()
        codes = ((size + (x.abs() - size >= 0.5)) * x.sign()).to(torch.int8)    # halves away from zero
    elif fmt == "nf4":
        levels = torch.tensor(NF4, device=x.device)
        codes = torch.bucketize(x.contiguous(), (levels[1:] + levels[:-1]) / 2).to(torch.uint8)
    else:
        zero = 2 ** (bits - 1)                             # the code of 0
        codes = (x + zero + 0.5).floor().clamp(0, 2 * zero - 1).to(torch.uint8)
    codes = codes.flatten(1)[:, :C]
    if fmt != "q8_0":
        codes = regroup(codes[..., None], bits, 8, -(-C * bits // 8))[..., 0].byte()
    return codes, torch.where(fits, d, torch.nan)[..., 0].half()


def dequantize(codes, scales, fmt, C):
    """float32 values [B, C, S] of channel-major codes, as quantize() packs them, and scales [B, ceil(C / 32), S]."""
    if fmt in FLOAT_FORMATS:
        return codes.float()
    bits = FORMATS[fmt][0]
    codes = codes if fmt == "q8_0" else regroup(codes, 8, bits, C)              # [B, C, S]
    x = torch.tensor(NF4, device=codes.device)[codes.int()] if fmt == "nf4" else codes.float()
    if fmt not in ("q8_0", "nf4"):
        x -= 2 ** (bits - 1)
    for block, scale in zip(x.split(32, 1), scales.float().split(1, 1)):
        block *= scale
    return x


# -----------------------------------------------------------------------------
# KV cache

CACHE_BLOCK, RING_BLOCK = 512, 128                         # token slots are allocated in multiples of these
DECODE_CHUNK = 2**21                                       # elements of the cache, or of scores, in float32 at once


def cache_formats(cfg, policy):
    """{stream: format} of a cache policy: one format for all streams, hetero (None unless attention is decoupled), or
    already such a dict."""
    streams = cfg.attention.streams
    if policy == "hetero":
        return {name: HETERO[name] for name in streams} if "k_geo" in streams else None
    return policy if isinstance(policy, dict) else dict.fromkeys(streams, policy)


def bytes_per_token(cfg, policy):
    """Bytes of KV cache per token over all layers, or None where the policy doesn't apply."""
    formats = cache_formats(cfg, policy)
    return formats and cfg.layers * sum(stream_bytes(formats[name], C) for name, C in cfg.attention.streams.items())


def kv_bytes_per_token(cfg):
    """{policy: bytes of KV cache per token over all layers, or None where the policy doesn't apply}."""
    return {policy: bytes_per_token(cfg, policy) for policy in (*FORMATS, "hetero")}


def ring_format(fmt):
    """Format of a stream's newest tokens, those of --kv-residual."""
    return fmt if fmt in FLOAT_FORMATS else "fp16"


def cache_slots(tokens, residual):
    """Slots that are allocated for so many tokens: settled ones, and those of the ring of the newest."""
    ring = min(residual, tokens)
    return -(-(tokens - ring) // CACHE_BLOCK) * CACHE_BLOCK, -(-ring // RING_BLOCK) * RING_BLOCK


class CacheStream:
    """One cached tensor of one layer, channel-major, so that tokens are contiguous. Settled tokens are codes
    [B, rows, slots] and scales [B, blocks, slots], as quantize() makes them, or plain floats and None; ring
    [B, C, slots] holds the newest tokens as floats, its slots a multiple of ring_block. Kernels know no more of the
    formats than what is here: their names, bits, and the levels of nf4."""
    levels, ring_block = NF4, RING_BLOCK

    def __init__(self, batch, channels, settled, ring, fmt, device):
        self.fmt, self.ring_fmt, self.channels = fmt, ring_format(fmt), channels
        self.bits, scale_bytes = FORMATS[fmt]
        dtype = FLOAT_FORMATS.get(fmt, torch.int8 if self.bits == 8 else torch.uint8)
        rows = -(-channels * self.bits // 8) if scale_bytes else channels
        self.codes = torch.empty(batch, rows, settled, dtype=dtype, device=device)
        self.scales = None
        if scale_bytes:
            self.scales = torch.empty(batch, -(-channels // 32), settled, dtype=torch.float16, device=device)
        self.ring = torch.empty(batch, channels, ring, dtype=FLOAT_FORMATS[self.ring_fmt], device=device)

    def read(self, part, start, stop):
        """Values in slots start..stop of a part, "settled" or "ring", as float32 [B, C, stop - start]."""
        if part == "ring":
            return self.ring[..., start:stop].float()
        scales = None if self.scales is None else self.scales[..., start:stop]
        return dequantize(self.codes[..., start:stop], scales, self.fmt, self.channels)

    def nbytes(self):
        return sum(x.nbytes for x in (self.codes, self.scales, self.ring) if x is not None)


def append(stream, rows, pos, x):
    """Settle x [N, C], the tokens at positions pos [N] of the sequences rows [N]."""
    if stream.scales is None:
        stream.codes[rows, :, pos] = x.to(stream.codes.dtype)
    else:
        stream.codes[rows, :, pos], stream.scales[rows, :, pos] = quantize(x, stream.fmt)


@dataclass(frozen=True)
class Span:
    """The T tokens per sequence of one forward pass, and where the cache holds what they may see.

    pos [B, T]: their positions. Tokens below settled [B] are settled, all below `end`, and those below `seen` are read
    so by every query; the newer ones, up to `window`, are in the ring, position p in slot p mod window. Of leaving,
    (rows, positions), the ring is relieved; of the new tokens, settling (rows, t) settle at once and staying (rows, t)
    go into the ring.

    Where several tokens come at once, some settle that the earlier of the queries must still see as floats, as they
    would if the tokens came one by one. recent [B, window + T], else None, has the positions of what was in the ring
    before and of the new tokens; a query reads those from position floats [B, T] on as floats, all others settled.

        window 3, T 2:      settled before   ring before   new
        position            0  1  2  3       4  5  6       7  8
        query 7 reads       q  q  q  q       q  f  f       f
        query 8 reads       q  q  q  q       q  q  f       f  f       and 4, 5 have settled when the pass ends
    """
    pos: torch.Tensor
    settled: torch.Tensor
    seen: int
    end: int
    window: int
    leaving: tuple
    settling: tuple
    staying: tuple
    floats: torch.Tensor
    recent: torch.Tensor | None

    def chunks(self, most, newest="ring"):
        """Yield (part, start, stop, positions [B, stop - start]) for ranges of at most `most` slots of the cache, the
        settled ones, none of which begins before `seen` and ends after it, and those of newest, "ring" or "recent". The
        position of an empty slot is beyond all queries."""
        settled, beyond = self.settled[:, None], torch.iinfo(torch.long).max
        newer = self.recent.size(1) if newest == "recent" else self.window
        for part, first, end in (("settled", 0, self.seen), ("settled", self.seen, self.end), (newest, 0, newer)):
            for start in range(first, end, most):
                stop = min(start + most, end)
                slot = torch.arange(start, stop, device=self.pos.device)
                if part == "settled":
                    pos = torch.where(slot < settled, slot, beyond)
                elif part == "ring":
                    pos = settled + (slot - settled) % self.window
                else:
                    pos = self.recent[:, start:stop]
                yield part, start, stop, pos


FUSED_FROM = 64                                            # queries that share a key: benchmarks/prefill_speed.py
HIDDEN = torch.finfo(torch.float32).min / 2                # a score; the fused kernel has wrong sums for infinities


def product_chunk(q, k, v, visible):
    """Attention over some of the keys, and the log-sum-exp of its scores, to merge it with that over others.

    q and k: per score path, [B, G, M, w] scaled and [B, G, w, S]; v [B, G, u, S]; visible [B, 1, M, S], or None if all
    are. Returns float32 [B, G, M, u], [B, G, M, 1]; the latter is about HIDDEN where a query sees nothing.
    """
    scores = sum(a @ b for a, b in zip(q, k))                                   # [B, G, M, S]
    scores = scores if visible is None else torch.where(visible, scores, -torch.inf)
    top = scores.amax(-1, keepdim=True).clamp(min=HIDDEN)
    p = torch.exp(scores - top)
    total = p.sum(-1, keepdim=True)
    return p @ v.mT / total.clamp(min=1e-30), top + total.log()


def fused_chunk(q, k, v, visible):
    """The same by the CPU's fused kernel, which takes tokens in rows and one width for all, for many queries."""
    q, k, v, u = torch.cat(q, 3), torch.cat([part.mT for part in k], 3), v.mT, v.size(2)
    width = max(q.size(3), u)
    q, k, v = (F.pad(x, (0, width - x.size(3))).contiguous() for x in (q, k, v))
    mask = None if visible is None else torch.where(visible, 0.0, HIDDEN)
    out, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=mask, scale=1.0)
    return out[..., :u], log_sum[..., None]


def decode_attention(q, streams, shape, span, null=None, recent=None):
    """Causal attention of new tokens over a cache that already holds them, a chunk of it at a time, so that no float
    copy of the whole exists.

    q [B, H, T, w]: scaled queries, the paths' widths concatenated, at positions span.pos. null: None or (score
    [B, H, T], value [G, v]). recent: None, or of every stream the floats [B, C, window + T] at the positions
    span.recent, which queries read from span.floats on in place of the ring and of what has settled since. Returns
    [B, H, T, v], all in float32. Buffers may hold NaN where there is no token.
    """
    B, H, T, _ = q.shape
    G = 1 if shape.latent else shape.v_groups
    names = [path.stream for path in shape.paths]
    q = q.float().reshape(B, G, H // G * T, -1).split([streams[name].channels // G for name in names], 3)
    if null is None:
        log_sum, out = q[0].new_full((B, G, H // G * T, 1), torch.finfo(torch.float32).min), 0.0
    else:                                                                       # the null token is the first key seen
        score, value = null
        log_sum, out = score.float().reshape(B, G, H // G * T, 1), value.float()[None, :, None]       # [1, G, 1, v]
    fused = q[0].device.type == "cpu" and H // G * T >= FUSED_FROM
    attend_chunk, scores = (fused_chunk, 0) if fused else (product_chunk, H * T)
    per_token = B * max(scores, sum(shape.streams.values()))                    # scores, or channels, of a cached token
    with torch.autocast(q[0].device.type, enabled=False):
        most, newest = max(CACHE_BLOCK, DECODE_CHUNK // per_token), "ring" if recent is None else "recent"
        for part, start, stop, pos in span.chunks(most, newest):
            if part == "recent":
                held = {name: x[..., start:stop].float() for name, x in recent.items()}
            else:
                held = {name: stream.read(part, start, stop) for name, stream in streams.items()}
            held = {name: x.unflatten(1, (G, -1)) for name, x in held.items()}                        # [B, G, ., S]
            visible = None
            if part != "settled" or stop > span.seen:      # not by all queries; and there may be a NaN
                there = pos[:, None, None] <= span.pos[:, -1:, None, None]                            # [B, 1, 1, S]
                held = {name: torch.where(there, x, 0.0) for name, x in held.items()}
                visible = pos[:, None] <= span.pos[:, :, None]                                        # [B, T, S]
                if recent is not None:
                    visible &= (pos[:, None] >= span.floats[:, :, None]) == (part == "recent")
                visible = visible.repeat(1, H // G, 1)[:, None]                                       # [B, 1, H/G·T, S]
            more, more_log_sum = attend_chunk(q, [held[name] for name in names], held[shape.v_stream], visible)
            new = torch.logaddexp(log_sum, more_log_sum)
            out, log_sum = out * torch.exp(log_sum - new) + more * torch.exp(more_log_sum - new), new
    return out.reshape(B, H, T, -1)


@dataclass(frozen=True)
class Kernel:
    """Back-end of the cache. attention and append: as decode_attention() and append() above; most_queries: how many
    queries that share a key it takes at once; formats: those that it reads."""
    name: str
    attention: Callable
    append: Callable = append
    most_queries: float = math.inf
    formats: tuple = tuple(FORMATS)


TORCH = Kernel("torch", decode_attention)


class KVCache:
    """The streams of all layers, each in the format that the policy gives it, allocated once for `tokens` tokens and
    appended in place; of the tokens that a query sees, the newest `residual` are floats, however many come in a pass.
    length [B], on the CPU, counts the tokens that all layers hold; a forward pass adds its own at its end. kernel: what
    reads and writes the settled tokens."""

    def __init__(self, cfg, batch, tokens, policy, residual=0, device="cpu", kernel=None):
        formats, (settled, ring) = cache_formats(cfg, policy), cache_slots(tokens, residual)
        self.shape, self.device, self.kernel = cfg.attention, device, kernel or TORCH
        self.window = min(residual, tokens)
        self.capacity = settled + self.window
        self.layers = [{name: CacheStream(batch, C, settled, ring, formats[name], device)
                        for name, C in self.shape.streams.items()} for _ in range(cfg.layers)]
        self.length, self.settled = torch.zeros(2, batch, dtype=torch.long)

    def begin(self, T):
        """Span of the next T tokens of every sequence. Raises ValueError past what is allocated."""
        length, end = self.length, self.length + T
        if end.max() > self.capacity:
            raise ValueError(f"the KV cache has room for {self.capacity} tokens, not {end.max()}")
        settled = torch.maximum(self.settled, end - self.window)
        pos, old = length[:, None] + torch.arange(T), self.settled[:, None] + torch.arange(T)     # [B, T]
        rows, t = (old < torch.minimum(settled, length)[:, None]).nonzero(as_tuple=True)
        new = pos < settled[:, None]
        leaving, settling, staying = (tuple(x.to(self.device) for x in pair) for pair in (
            (rows, old[rows, t]), new.nonzero(as_tuple=True), (~new).nonzero(as_tuple=True)))
        seen, recent = int(torch.minimum(settled, length + min(T, 1)).min()), None
        if T > 1 and self.window and (settled > self.settled).any():
            seen, recent = int(self.settled.min()), self.recent_positions(pos).to(self.device)
        floats = torch.maximum(self.settled[:, None], pos + 1 - self.window).to(self.device)
        return Span(pos.to(self.device), settled.to(self.device), seen, int(settled.max()), self.window, leaving,
                    settling, staying, floats, recent)

    def recent_positions(self, pos):
        """Positions [B, window + T] of what is in the ring now and of new tokens at pos [B, T]."""
        settled = self.settled[:, None]
        ring = settled + (torch.arange(self.window) - settled) % self.window
        ring = torch.where(ring < self.length[:, None], ring, torch.iinfo(torch.long).max)
        return torch.cat([ring, pos], 1)

    def append(self, layer, span, entries):
        """Store the new tokens of one layer, {stream: [B, T, C]}. With a window, all are rounded as in the ring first,
        so that a settled value doesn't depend on when it settled. Returns {stream: floats [B, C, window + T]} at the
        positions of span.recent, or None without those."""
        recent = None if span.recent is None else {}
        for name, x in entries.items():
            stream = self.layers[layer][name]
            if self.window:
                x, (rows, pos) = x.to(stream.ring.dtype), span.leaving
                if recent is not None:
                    recent[name] = torch.cat([stream.ring[..., :self.window], x.mT], 2)
                self.kernel.append(stream, rows, pos, stream.ring[rows, :, pos % self.window])
            rows, t = span.settling
            self.kernel.append(stream, rows, span.pos[rows, t], x[rows, t])
            rows, t = span.staying
            stream.ring[rows, :, span.pos[rows, t] % max(1, self.window)] = x[rows, t].to(stream.ring.dtype)
        return recent

    def attend(self, layer, span, q, null, recent=None):
        """decode_attention() over one layer, by the kernel unless there are too many queries for it, or what append()
        returned holds tokens that some of them see as floats and others settled."""
        if recent is not None:
            return decode_attention(q, self.layers[layer], self.shape, span, null, recent)
        G = 1 if self.shape.latent else self.shape.v_groups
        few = q.size(1) // G * q.size(2) <= self.kernel.most_queries
        return (self.kernel if few else TORCH).attention(q, self.layers[layer], self.shape, span, null)

    def advance(self, span):
        """Count the tokens of a span, which all layers hold by now."""
        self.length = self.length + span.pos.size(1)
        self.settled = torch.maximum(self.settled, self.length - self.window)

    def truncate(self, n):
        """Forget all but the first n tokens of every sequence; n: a number, or one per sequence [B]."""
        self.length = torch.minimum(self.length, torch.as_tensor(n).cpu())
        self.settled = torch.minimum(self.settled, self.length)

    def nbytes(self):
        """Bytes that the cache's tensors own."""
        return sum(stream.nbytes() for layer in self.layers for stream in layer.values())


# -----------------------------------------------------------------------------
# Sampling

def pick_token(logits, temperature, top_k, top_p, generator):
    """Token ids [B, 1] for logits [B, V]: the likeliest at temperature 0, else drawn after top-k, then top-p. On the
    CPU, where a seed means the same whatever the model's device."""
    logits = logits.cpu()
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits = (logits - logits.amax(-1, keepdim=True)).double() / temperature
    p, order = logits.softmax(-1).sort(-1, descending=True)                     # [B, V] each
    if top_k is not None:
        p[:, top_k:] = 0
    if top_p is not None:                                  # keep a token while those before it hold less than top_p
        before = p.cumsum(-1) - p
        before[:, 0] = -1                                  # the likeliest always stays
        p[before >= top_p * p.sum(-1, keepdim=True)] = 0
    return order.gather(1, torch.multinomial(p, 1, generator=generator))


def why_not_finite(cache):
    """Why the logits after a cache of one sequence aren't finite, and what to do: the first stream that is to blame."""
    settled, length = int(cache.settled[0]), int(cache.length[0])
    slots = torch.arange(settled, length) % max(1, cache.window)
    for i, layer in enumerate(cache.layers):
        for name, stream in layer.items():
            held = stream.read("settled", 0, settled), stream.read("ring", 0, cache.window)[..., slots]
            if all(values.isfinite().all() for values in held):
                continue
            if stream.fmt in ("fp32", "bf16"):
                return f"layer {i}'s {name} isn't, before it is cached; try --dtype float32, or another checkpoint"
            return f"layer {i}'s {name} is beyond float16, which --kv-cache {stream.fmt} uses; give fp32 or bf16"
    return "what is cached is; try --dtype float32, or another checkpoint"


PREFILL_CHUNK = 512                                        # prompt tokens per forward pass


@torch.no_grad()                                           # under inference_mode, autocast casts weights at every step
def generate(model, prompt, max_new_tokens, cache, temperature=1.0, top_k=None, top_p=None, seed=0):
    """Yield token ids [B, 1] that go on from prompt [B, T]; the cache needs room for T + max_new_tokens - 1 tokens.
    Raises UserError where the logits aren't finite."""
    generator = torch.Generator().manual_seed(seed)
    for chunk in prompt.split(PREFILL_CHUNK, 1):
        h = model.hidden(chunk, cache)
    for i in range(max_new_tokens):
        logits = model.logits(h[:, -1])
        if not logits.isfinite().all():
            raise UserError(f"the logits of token {cache.length.max() + 1} aren't finite: {why_not_finite(cache)}")
        token = pick_token(logits, temperature, top_k, top_p, generator)
        yield token
        if i + 1 < max_new_tokens:
            h = model.hidden(token.to(prompt.device), cache)


LONGEST_PROMPT = 2**24                                     # bytes of a file, characters of standard input


def prompt_texts(cfg):
    """Yield the texts to continue. Raises UserError for what can't be read."""
    if (cfg.interactive or cfg.prompt == "-") and sys.stdin is None:
        raise UserError("standard input is closed; give --prompt TEXT or --prompt-file")
    if cfg.prompt_file is not None:
        try:
            yield read_bytes(Path(cfg.prompt_file), LONGEST_PROMPT).decode("utf-8-sig")
        except (OSError, ValueError) as e:
            raise UserError(f"--prompt-file {cfg.prompt_file} can't be read as UTF-8 text ({brief(e)})") from None
    elif cfg.interactive:
        if hasattr(sys.stdin, "reconfigure"):
            sys.stdin.reconfigure(errors="surrogateescape")                     # or no line would follow one that isn't
        for n, line in enumerate(sys.stdin, 1):
            if any("\ud800" <= character <= "\udfff" for character in line):
                print(f"error: line {n} of standard input is not UTF-8 text; passed over", file=sys.stderr)
            else:
                yield line.removesuffix("\n")
    elif cfg.prompt == "-":
        text = sys.stdin.read(LONGEST_PROMPT + 1)
        if len(text) > LONGEST_PROMPT:
            raise UserError(f"--prompt -: standard input has more than {LONGEST_PROMPT:,} characters; shorten it")
        yield text
    else:
        yield cfg.prompt or ""


def prompts(cfg, tokenizer):
    """Yield the token ids of every prompt; without one, the end-of-text token, which starts a document. Raises
    UserError for what can't be read, or has no ids."""
    try:
        if cfg.prompt_tokens is None:
            for text in prompt_texts(cfg):
                ids = [*getattr(tokenizer, "prefix", []), *tokenizer.encode(text).tolist()]       # of a Llama: BOS
                yield ids or [tokenizer.eot]
            return
        ids = [int(word) for word in cfg.prompt_tokens.replace(",", " ").split()]
    except ValueError:                                     # of which UnicodeEncodeError is one
        raise UserError("--prompt and standard input must be UTF-8 text, --prompt-tokens whole numbers") from None
    if not ids or not all(0 <= i < tokenizer.vocab_size for i in ids):
        raise UserError(f"--prompt-tokens must be ids from 0 to {tokenizer.vocab_size - 1}")
    yield ids


class Printer:
    """Prints tokens as text as soon as they make whole characters, up to a text `stop`, which isn't shown."""

    def __init__(self, tokenizer, stop):
        self.tokenizer, self.stop, self.held = tokenizer, stop or "", ""
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")         # a character may span tokens

    def prompt(self, ids):
        print(self.decoder.decode(self.tokenizer.decode(ids)), end="", flush=True)

    def add(self, ids):
        """Print more tokens. Returns whether `stop` has come."""
        self.held += self.decoder.decode(self.tokenizer.decode(ids))
        stopped = bool(self.stop) and self.stop in self.held
        ready = self.held.index(self.stop) if stopped else len(self.held) - self.beginning()
        print(self.held[:ready], end="", flush=True)
        self.held = "" if stopped else self.held[ready:]
        if stopped:                                        # nor the beginning of a character after it
            self.decoder.reset()
        return stopped

    def beginning(self):
        """How many characters at the end of what is held may be the beginning of `stop`."""
        return max((n for n in range(1, len(self.stop)) if self.held.endswith(self.stop[:n])), default=0)

    def end(self):
        print(self.held + self.decoder.decode(b"", final=True), flush=True)


def stream_formats(cfg, model_cfg):
    """{stream: format} by --kv-cache and its --kv-cache-<stream> overrides. Raises UserError where a flag doesn't fit
    the checkpoint's attention mode, or would do nothing."""
    streams, formats = model_cfg.attention.streams, cache_formats(model_cfg, cfg.kv_cache)
    given = dict(k=cfg.kv_cache_k, k_sem=cfg.kv_cache_k_sem, k_geo=cfg.kv_cache_k_geo, v=cfg.kv_cache_v,
                 latent=cfg.kv_cache_latent, k_rope=cfg.kv_cache_k_rope)
    overrides = {name: fmt for name, fmt in given.items() if fmt}
    if formats is None:
        raise UserError(f"--kv-cache hetero is for decoupled attention; this checkpoint caches {', '.join(streams)}")
    if strange := overrides.keys() - streams.keys():
        raise UserError(f"{flag_name(f'kv_cache_{min(strange)}')}: this checkpoint's {model_cfg.attn_mode} attention "
                        f"caches {', '.join(streams)}")
    formats = {**formats, **overrides}
    if cfg.kv_residual and all(fmt in FLOAT_FORMATS for fmt in formats.values()):
        raise UserError("--kv-residual does nothing where no stream is quantised; leave it out, or choose a --kv-cache")
    return formats


POLICY_FILE = "kv_policy.json"


def auto_policy(cfg, model_cfg):
    """The same Config with the cache that `eval_dba.py policy` found for the checkpoint. Raises UserError unless it was
    found for this very file."""
    ckpt = Path(cfg.ckpt)
    path = (ckpt if os.path.isdir(ckpt) else ckpt.parent) / POLICY_FILE         # of a Llama's folder in it
    again = (f"make it by python3 eval_dba.py policy --ckpt {shlex.quote(cfg.ckpt)} --max-delta-nll 0.005, or choose "
             "another --kv-cache")
    if not path.is_file():
        raise UserError(f"--kv-cache auto: {path} is missing; {again}")

    def known_format(value):
        return type(value) is str and value in FORMATS

    def known_kernel(value):
        return value in KERNELS

    shape = {"formats": dict.fromkeys(model_cfg.attention.streams, known_format), "rotate": bool,
             "residual": whole_number, "kernel?": known_kernel, "checkpoint_sha256?": str}
    try:
        policy = read_json(path, shape)
        if policy["formats"].keys() != model_cfg.attention.streams.keys():
            raise ValueError(f"formats of {', '.join(policy['formats'])}")
    except (*BROKEN, OSError) as e:
        raise UserError(f"--kv-cache auto: {path} is damaged, or doesn't fit {model_cfg.attn_mode} attention "
                        f"({brief(e)}); {again}") from None
    formats, rotate, residual = policy["formats"], policy["rotate"], policy["residual"]
    kernel = policy.get("kernel", "auto") if cfg.kernel == "auto" else cfg.kernel
    if policy.get("checkpoint_sha256") != file_hash(ckpt):
        raise UserError(f"--kv-cache auto: {path} was made for another checkpoint than {ckpt}; {again}")
    print(f"--kv-cache auto ({path}): {', '.join(map(' '.join, formats.items()))}, {'' if rotate else 'not '}rotated, "
          f"residual {residual}, kernel {kernel}", file=sys.stderr)
    return dataclasses.replace(cfg, kv_cache="fp16", kv_rotate=rotate, kv_residual=residual, kernel=kernel,
                               **{f"kv_cache_{name}": fmt for name, fmt in formats.items()})


def rotate_cache(model):
    """rotate_cache() of kernels/rotate.py, for --kv-rotate: the same model. Raises UserError if it can't."""
    try:
        from kernels import rotate
        return rotate.rotate_cache(model)
    except ModuleNotFoundError as e:
        raise UserError(f"--kv-rotate: no module {e.name} beside train_dba.py") from None
    except ValueError as e:
        raise UserError(f"--kv-rotate: {e}") from None


def compare_bytes(cfg, formats):
    """Sentence: bytes per token of a cache beside those of standard attention and GQA of the same depth and width."""
    mine, groups = bytes_per_token(cfg, formats), max(1, cfg.n_head // 8)
    same = formats[cfg.attention.paths[-1].stream], formats[cfg.attention.v_stream]
    gqa = f"gqa with {groups} key head{'s' * (groups > 1)}", -(-cfg.d_model * groups // cfg.n_head)
    sentence = f"{mine:,} bytes per token"
    others = (("standard", cfg.d_model), ("fp16", "fp16")), (("standard", cfg.d_model), same), (gqa, same)
    for (name, width), (k, v) in dict.fromkeys(others):    # the first two may be the same
        ratio = mine / (cfg.layers * (stream_bytes(k, width) + stream_bytes(v, width)))
        sentence += f", {ratio:.3g} x {name} in {k if k == v else f'k {k} v {v}'}"
    return sentence


# Heads that share keys, and whose channels straddle bytes and blocks.
KERNEL_TEST = Config(attn_mode="decoupled", layers=1, n_head=8, kv_head=4, sem_dim=32, geo_dim=72, attn_dim=104)


def resolve_kernel(name, device, formats=()):
    """(Kernel, why) of --kernel for a cache of these formats. None is trusted before it agreed with TORCH over a small
    cache. Raises UserError where a kernel asked for by name can't serve; auto says so and takes TORCH."""
    if name == "torch":
        return TORCH, "asked for"
    try:
        import kernels
        module, why = kernels.choose(name, device)
    except ModuleNotFoundError as e:
        if name != "auto" or not e.name.startswith("kernels"):
            raise UserError(f"--kernel {name}: no module {e.name}") from None
        return TORCH, f"no module {e.name} beside train_dba.py"
    except ValueError as e:
        raise UserError(f"--kernel {name}: {e}") from None
    if module is None:
        return TORCH, why
    kernel = Kernel(**module.KERNEL)
    if unread := [fmt for fmt in dict.fromkeys(formats) if fmt not in kernel.formats]:
        if name != "auto":
            raise UserError(f"--kernel {name} doesn't read {' and '.join(unread)}; use --kernel torch")
        return TORCH, f"{kernel.name} doesn't read {' and '.join(unread)}"
    try:
        caches = [KVCache(KERNEL_TEST, 2, 640, "hetero", 32, device, each) for each in (kernel, TORCH)]
        error = kernels.difference(*caches, KERNEL_TEST.n_head)
        problem = "" if error <= kernels.TOLERANCE else f"it differs from torch by {error:.1e} on a small cache"
    except module.FAILURES as e:
        problem = f"it fails here ({str(e).splitlines()[0]})"
    if not problem:
        return kernel, f"{why}, agrees with torch on a small cache"
    if name != "auto":
        raise UserError(f"--kernel {name}: {problem}; use --kernel torch")
    print(f"warning: no kernel {kernel.name}: {problem}", file=sys.stderr)
    return TORCH, f"{kernel.name}: {problem}"


def continue_text(model, tokenizer, ids, cache, cfg, seed):
    """Print a prompt and what the model makes of it, then on standard error how long that took."""
    printer, ends = Printer(tokenizer, cfg.stop), cfg.stop_at_eot and tokenizer.name != "word"
    printer.prompt(ids)
    count, first, started = 0, None, time.perf_counter()
    prompt = torch.tensor([ids], device=cache.device)
    for token in generate(model, prompt, cfg.max_new_tokens, cache, cfg.temperature, cfg.top_k, cfg.top_p, seed):
        count, first = count + 1, first or time.perf_counter()
        if ends and token.item() == tokenizer.eot or printer.add([token.item()]):
            break
    printer.end()
    rate = f", then {(count - 1) / (time.perf_counter() - first):.1f} tokens/s" if count > 1 else ""
    print(f"{count} tokens: the first after {1000 * (first - started):.0f} ms{rate}", file=sys.stderr)


def sample(cfg):
    """Stream continuations of the prompts to standard output. Nothing is written to the run folder."""
    device = pick_device(cfg.device)
    model, tokenizer, path, ckpt = read_model(cfg.ckpt, device)
    cfg = dataclasses.replace(cfg, ckpt=str(path))
    dtype, why = pick_dtype(cfg.dtype, device, lambda: product_rates(           # of vectors and matrices
        1, model.cfg.d_model, model.cfg.d_ff, training=False, layers=model.cfg.layers))
    cfg = auto_policy(cfg, model.cfg) if cfg.kv_cache == "auto" else cfg
    formats = stream_formats(cfg, model.cfg)
    kernel, why_kernel = resolve_kernel(cfg.kernel, device, formats.values())
    if cfg.kv_rotate:
        rotate_cache(model)
    trained = f"step {ckpt['step']}" if ckpt else "a Llama"
    header = (f"{model.cfg.attn_mode} attention, {trained}, {dtype} ({why}) on {device}, kernel "
              f"{kernel.name} ({why_kernel})\nKV cache ({', '.join(map(' '.join, formats.items()))}): "
              f"{compare_bytes(model.cfg, formats)}")
    with autocast(device, dtype):                          # around the whole loop, so that weights are cast once
        for ids in prompts(cfg, tokenizer):
            tokens = len(ids) + cfg.max_new_tokens - 1
            try:
                cache = KVCache(model.cfg, 1, tokens, formats, cfg.kv_residual, device, kernel)
            except RuntimeError as e:
                raise UserError(f"no memory for a KV cache of {tokens:,} tokens ({str(e).splitlines()[0]}); lower "
                                "--max-new-tokens") from None
            if header:
                print(f"{header}; {cache.nbytes():,} bytes allocated for {cache.capacity:,} tokens", file=sys.stderr)
                header = ""
            if tokens > model.cfg.block:
                print(f"warning: {tokens:,} tokens go past the {model.cfg.block:,} of the training context: positions "
                      "that the model hasn't seen", file=sys.stderr)
            for n in range(cfg.num_samples):
                cache.truncate(0)
                continue_text(model, tokenizer, ids, cache, cfg, cfg.seed + n)
    return 0


# -----------------------------------------------------------------------------
# Flags: what the command line leaves out, what it may not say, and how it is read

def derived(c):
    """Defaults that depend on other settings. c: dict of all fields, None where unset -> the same, filled in."""
    schedule = c["schedule"] or default_schedule(c["min_lr"], c["lr"])
    fallback = dict(embed_dim=c["d_model"], schedule=schedule, min_lr=c["lr"] / (1 if schedule == "constant" else 10),
                    out_dir=f"runs/{c['exp'] or c['attn_mode']}_seed{c['seed']}",
                    warmup_steps=min(2000, c["steps"] // 5) if c["exp"] else min(100, c["steps"] // 10))
    if c["attn_mode"] == "decoupled":
        sem, geo = (4 * c["n_head"], 8 * c["n_head"]) if c["size"] else (32, 64)
        fallback.update(sem_dim=sem, geo_dim=geo, attn_dim=(c["sem_dim"] or sem) + (c["geo_dim"] or geo))
    elif c["attn_mode"] != "bottleneck":
        fallback.update(attn_dim=c["d_model"])
    if c["attn_mode"] == "mla":
        head = (c["attn_dim"] or c["d_model"]) // c["n_head"]
        fallback.update(kv_lora_rank=max(1, c["d_model"] // 4), rope_dim=2 * max(1, head // 4))
    c = {name: fallback.get(name) if value is None else value for name, value in c.items()}
    for name in ("data", "val_data", "out_dir", "config", "init_from"):
        c[name] = c[name] and relative(str(Path(c[name])))                      # ./runs/a/ is runs/a
    return c


def out_of_range(settings):
    """Sentences about the values in a dict of all fields that their flags don't allow."""
    for f in dataclasses.fields(Config):
        value, name, choices, limits = settings[f.name], flag_name(f.name), f.metadata["choices"], f.metadata["limits"]
        if value is None:
            continue
        if isinstance(value, float) and not math.isfinite(value):
            yield f"{name} {value} must be a finite number"
        if f.metadata["group"] == "model" and type(value) is int and value >= 2**63:                # a tensor's limit
            yield f"{name} {value} must be below 2**63"
        for limit, holds, words in (("low", operator.ge, "at least"), ("above", operator.gt, "above"),
                                    ("below", operator.lt, "below"), ("top", operator.le, "at most")):
            if limits[limit] is not None and not holds(value, limits[limit]):
                yield f"{name} {value} must be {words} {limits[limit]}"
        if choices and value not in choices:
            yield f"{name} {value} must be one of {', '.join(choices)}"


def width_problems(c):
    """What is wrong with the attention widths, taken together."""
    H, G = c.n_head, c.kv_head or c.n_head
    if c.attn_dim is None:
        yield f"--attn-mode {c.attn_mode} needs --attn-dim"
        return
    if c.attn_mode == "gqa" and not c.kv_head:
        yield "--attn-mode gqa needs --kv-head"
    if c.attn_mode == "standard" and c.attn_dim != c.d_model:
        yield f"--attn-mode standard attends at full width, not --attn-dim {c.attn_dim}; use bottleneck, or --d-model"
    widths = ("d_model",) if c.attn_mode == "standard" else ("attn_dim", "sem_dim", "geo_dim")
    uneven = [f"{flag_name(name)} {getattr(c, name)}" for name in widths if (getattr(c, name) or 0) % H]
    if uneven:
        yield f"--n-head {H} must divide {' and '.join(uneven)}"
    elif c.rope and (p := c.attention.paths[-1].width) % 2:
        yield f"RoPE turns pairs: the geometric width per head must be even, not {p}; change it, or give --no-rope"
    if H % G:
        yield f"--kv-head {G} must divide --n-head {H}"
    if c.tie_qk and c.kv_lora_rank:
        yield f"--tie-qk can't tie keys that come from a latent; leave out --kv-lora-rank {c.kv_lora_rank} or --tie-qk"
    elif c.tie_qk and G != H:
        yield f"--tie-qk needs a key per query head; leave out --kv-head {G} or --tie-qk"


UNREAD = {"train": ("sampling",), "sample": ("data", "model", "training")}      # flag groups that a --mode ignores


def problems(c, given):
    """Everything wrong with a Config, as sentences: the values seen and what to do. given: what the user set."""
    wrong = []
    for f in dataclasses.fields(c):
        name, modes = flag_name(f.name), f.metadata["modes"]
        if modes and c.attn_mode not in modes and given.get(f.name) not in (None, False):
            wrong.append(f"{name} does nothing with --attn-mode {c.attn_mode}; it is for {' and '.join(modes)}")
        if f.name in given and f.metadata["group"] in UNREAD[c.mode]:
            wrong.append(f"{name} does nothing with --mode {c.mode}; leave it out")
        if given.get(f.name) == "" and f.name != "prompt":                      # of a shell's variable that isn't set
            wrong.append(f"{name} is empty; give it a value, or leave it out")
    checks = [
        (c.exp and c.attn_mode != EXPS[c.exp](1)["attn_mode"],
         f"--attn-mode {c.attn_mode} contradicts --exp {c.exp}; leave one out"),
        (c.mode == "sample" and c.config, "--config does nothing with --mode sample; leave it out"),
        (not c.rope and "rope_base" in given, "--rope-base does nothing with --no-rope; leave one out"),
    ]
    overrides = [flag_name(name) for name in given if name.startswith(("kv_cache_", "kv_rotate", "kv_residual"))]
    if c.mode == "sample":
        asked = [flag_name(name) for name in ("prompt", "prompt_file", "prompt_tokens", "interactive")
                 if getattr(c, name) not in (None, False)]
        checks += [
            (not c.ckpt, "--mode sample needs --ckpt, the checkpoint to sample from"),
            (len(asked) > 1, f"{' and '.join(asked)} exclude each other; give one"),
            (c.temperature == 0 and (c.top_k or c.top_p),
             "--temperature 0 takes the likeliest token; leave out --top-k and --top-p"),
            (c.kv_cache == "auto" and overrides,
             f"--kv-cache auto says what {' and '.join(overrides)} would; leave one out"),
        ]
    else:
        checks += [
            (not c.data, "--data is missing: a .npy by prepare_fineweb.py, or a text file"),
            (c.val_data and c.val_frac, "--val-data and --val-frac exclude each other; give one"),
            (c.dtype == "float16", "--dtype float16 needs loss scaling, which training here doesn't do; use bfloat16"),
            (c.min_lr > c.lr, f"--min-lr {c.min_lr} is above --lr {c.lr}"),
            (c.schedule == "constant" and c.min_lr != c.lr,
             f"--schedule constant stays at --lr {c.lr}: leave out --min-lr"),
            (c.tokens_per_step >= 2**53, f"--batch-size {c.batch_size} x --grad-accum {c.grad_accum} x --block "
             f"{c.block} tokens a step are too many to count"),
            (c.warmup_steps > c.steps, f"--warmup-steps {c.warmup_steps} is more than --steps {c.steps}"),
            (c.micro_batch and c.batch_size % c.micro_batch,
             f"--micro-batch {c.micro_batch} must divide --batch-size {c.batch_size}"),
            *((True, message) for message in width_problems(c)),
        ]
    return wrong + [message for bad, message in checks if bad]


def make_config(**given):
    """Config from explicit settings; --exp and --size, then derived defaults, fill in the rest. Raises UserError."""
    exp = given.get("exp")
    preset = dict(EXP_DEFAULTS) if exp in EXPS else {}
    preset.update(SIZES.get(given.get("size") or preset.get("size"), {}))
    if exp in EXPS:
        preset.update(EXPS[exp](given.get("n_head") or preset.get("n_head", 1)))
    settings = {**DEFAULTS, **preset, **given}
    wrong = list(out_of_range(settings))
    if not wrong:
        cfg = Config(**derived(settings))
        wrong = problems(cfg, given)
    if wrong:
        raise UserError("; ".join(wrong))
    return cfg


def settings_of(path, attn_mode=None):
    """What a resolved_config.json says, as flags would: not where a run lay and on what device, nor what would follow
    from the rest, nor the widths of its attention where another mode is asked for. {} without a path. Raises UserError
    for a file that is none."""
    if path is None:
        return {}
    try:
        settings = vars(config_of(read_json(Path(path), CONFIG)))
        for problem in out_of_range(settings):
            raise ValueError(problem)
    except (*BROKEN, OSError) as e:
        raise UserError(f"--config {path} is no resolved_config.json ({brief(e)})") from None
    own = {"mode", "device", "config", "out_dir", "overwrite", "size", "exp"}
    fields = dataclasses.fields(Config)
    own |= {f.name for f in fields if f.metadata["group"] == "sampling"}
    if attn_mode not in (None, settings["attn_mode"]):
        own |= {"attn_dim"} | {f.name for f in fields if f.metadata["modes"] and attn_mode not in f.metadata["modes"]}
    given = {name: value for name, value in settings.items() if value != DEFAULTS[name] and name not in own}
    for name in reversed([*given]):
        if DEFAULTS[name] is None and derived({**DEFAULTS, **given, name: None})[name] == given[name]:
            del given[name]
    return given


def shape_from(cfg, given):
    """The flags given, and the settings of a model's shape that it has by its Config; the context may be another.
    Raises UserError where a flag says else."""
    shape = {f.name: getattr(cfg, f.name) for f in dataclasses.fields(Config) if f.metadata["group"] == "model"}
    shape.update(size=None, exp=None)
    differ = [flag_name(name) for name in shape if name in given and given[name] != shape[name] and name != "block"]
    if differ:
        raise UserError(f"--init-from {given['init_from']} has a shape of its own; leave out {' and '.join(differ)}")
    return {**{name: value for name, value in shape.items() if value != DEFAULTS[name]}, **given}


class Parser(argparse.ArgumentParser):
    """One that says a mistake in one line, with the flag that an unknown one was perhaps meant to be."""

    def error(self, message):
        unknown = message.removeprefix("unrecognized arguments: ").split(" ")[0].split("=")[0]
        near = difflib.get_close_matches(unknown, self._option_string_actions, 1) if unknown.startswith("--") else []
        hint = f"did you mean {near[0]}? " if near else ""
        self.exit(2, f"error: {message} ({hint}--help lists the flags)\n")


def parse_args(argv=None):
    """Command line -> dict of the flags that were given."""
    parser = Parser(prog="train_dba.py", usage="train_dba.py [flags]", description=__doc__,
                    allow_abbrev=False, argument_default=argparse.SUPPRESS,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    hints = get_type_hints(Config)
    groups = {name: parser.add_argument_group(name) for name in ("run", "data", "model", "training", "sampling")}
    for f in dataclasses.fields(Config):
        m = f.metadata
        kind = next(t for t in (bool, int, float, str) if hints[f.name] in (t, t | None))
        reading = dict(type=m["read"] or kind, choices=m["choices"])
        if kind is bool:
            reading = dict(action=argparse.BooleanOptionalAction)
        default = "" if f.default is None or kind is bool else f" ({f.default})"
        groups[m["group"]].add_argument(flag_name(f.name), help=m["help"] + default, **reading)
    return vars(parser.parse_args(argv))


# -----------------------------------------------------------------------------
# Main

def exit_code(advice="ask for less at once"):
    """Decorator of a script's main(), which then returns the exit code: what main does, or 0; 1 after one line that
    says a UserError, or that there is no memory, with advice, no access to a path, or no space for what is printed; 130
    for Ctrl-C, and 141 where the reader of what is printed has gone, as in `| head`."""
    def decorate(main):
        @functools.wraps(main)
        def run(argv=None):
            if sys.stderr is None:                         # closed, as by 2>&-: print would turn to standard output
                sys.stderr = open(os.devnull, "w")
            try:
                code = main(argv) or 0
                print(end="", flush=True)
                return code
            except UserError as e:
                problem = str(e)
            except (MemoryError, RuntimeError) as e:       # PyTorch's of a CPU is known by its words alone
                if not isinstance(e, (MemoryError, torch.OutOfMemoryError)) and not (
                        "allocate memory" in str(e) or "size calculation overflowed" in str(e)):
                    raise
                problem = f"no memory ({brief(e)}); {advice}"
            except KeyboardInterrupt:
                return 128 + signal.SIGINT
            except OSError as e:
                if e.errno in (errno.EACCES, errno.ENAMETOOLONG) and e.filename:                      # of Path.exists()
                    problem = f"{e.filename}: {e.strerror}"
                elif e.errno in (errno.EPIPE, *FULL):
                    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())   # Python flushes, too
                    if e.errno == errno.EPIPE:
                        return 128 + signal.SIGPIPE
                    problem = f"can't write what is printed ({why_unwritten(e)})"
                else:
                    raise
            tqdm.write(f"error: {problem}", file=sys.stderr)                    # on a line of its own, beside a bar
            return 1
        return run
    return decorate


@exit_code("a smaller --batch-size, --block or model takes less, and --micro-batch parts of a batch")
def main(argv=None):
    """Run a command line. Returns 0, or 130 or 143 if training was stopped by a signal. Raises UserError."""
    argv = sys.argv[1:] if argv is None else argv
    if hasattr(sys.stdout, "reconfigure"):                 # a file, not a test's buffer
        sys.stdout.reconfigure(errors="replace")           # what its encoding can't hold becomes a question mark
    given = parse_args(argv)
    if "config" in given and (both := {"size", "exp"} & given.keys()):
        raise UserError(f"--config and {flag_name(min(both))} exclude each other; give one")
    source = ()
    if given.get("mode") != "sample":
        given = {**settings_of(given.get("config"), given.get("attn_mode")), **given}
        if given.get("init_from"):
            model, tokenizer, *_ = read_model(given["init_from"])
            source, given = [tokenizer, model], shape_from(model.cfg, given)
            del model
    cfg = make_config(**given)
    if source:
        refuse_own_source(cfg.init_from, Path(cfg.out_dir))
    keep_freed_memory()
    if cfg.mode == "sample":
        return sample(cfg)
    main_rank = os.environ.get("RANK", "0") == "0"
    try:
        with own_folder(Path(cfg.out_dir)) if main_rank else contextlib.nullcontext():
            return train(cfg, given, argv, source)
    except RuntimeError as e:
        if not dist.is_initialized() or "by peer" not in str(e):                # as gloo says it; NCCL waits
            raise
        raise UserError(f"rank {dist.get_rank()} lost another rank, which says why it ended, or was killed") from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def leave(code):
    """End the process with an exit code. One of several ranks ends at once: gloo's threads outlive the group, and one
    that frees a tensor while Python shuts down aborts a run that is finished (pytorch/pytorch pull request 179291)."""
    if "RANK" not in os.environ:
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    sys.modules["train_dba"] = sys.modules[__name__]       # which convert_dba.py imports: this file, not it once more
    leave(main())
