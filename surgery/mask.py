"""
Learned block-sparse attention on a frozen model: a gate per head says which earlier blocks of keys a query reads.

A gate estimates how much attention each far block would get, from the query and an index of a few bits of each key
(surgery/key_index.py), or from four vectors that a block keeps of its keys (mean, variance, largest and least). The
latter begins as the second-order expansion of log mean exp, m + v/2. Nothing has been learned for either yet.
learn_mass() fits it to the model's own attention, row by row; learn_logits() then moves gates and thresholds together
so that fewest blocks are read at a given KL divergence of the next token. What is read near a query
(surgery/sparse_attention.py) is not chosen.
"""

import contextlib
import copy
import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import train_dba
from surgery.key_index import Index, Survey
from surgery.sparse_attention import (
    Grid,
    block_log_mass,
    dense_attention,
    gathered_attention,
    grouped,
    keep_above,
    log_share,
    near_log_mass,
    share_rows,
)
from train_dba import BROKEN, GPT, UserError, brief

# (layer, q [B, H, T, d], k [B, G, S, d], v [B, G, S, u], scale, visible [B, S] or None) -> [B, H, T, u]
Attention = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor, float, torch.Tensor | None], torch.Tensor]
FAMILIES = ("llama", "gpt2", "mistral", "qwen2")           # of transformers, whose attention is causal and plain
REGISTERED = "chosen_blocks"                               # our name in transformers' table of attentions


# -----------------------------------------------------------------------------
# Models

class Host:
    """A frozen language model in eval mode whose attention can be replaced: a GPT of train_dba.py, or one of
    transformers. Raises UserError where its attention has no place for it."""

    def __init__(self, model: nn.Module):
        self.model = model.eval().requires_grad_(False)
        self.ours = isinstance(model, GPT)
        if self.ours:
            self.attentions = [block.attn for block in model.blocks]
            shape = model.cfg.attention
            self.heads, self.groups = model.cfg.n_head, shape.v_groups
            self.width = sum(path.width for path in shape.paths) + model.cfg.null_attn
            self.most, self.vocab = model.cfg.block, model.vocab_size
        else:
            config = model.config
            refuse_unknown(config)
            register()
            self.attentions = [m for m in model.modules() if hasattr(m, "layer_idx") and hasattr(m, "scaling")]
            self.heads = config.num_attention_heads
            self.groups = getattr(config, "num_key_value_heads", None) or self.heads
            self.width = getattr(config, "head_dim", None) or config.hidden_size // self.heads
            self.most, self.vocab = config.max_position_embeddings, config.vocab_size
            assert len(self.attentions) == config.num_hidden_layers, "an attention that isn't known"
        self.device = next(model.parameters()).device

    def rounded(self) -> "Host":
        """A copy with weights and activations in bfloat16."""
        host = Host(copy.deepcopy(self.model))
        for p in host.model.parameters():                  # but not the frequencies of RoPE
            p.data = p.data.bfloat16()
        if self.ours:                                      # whose norms return float32
            for module in host.model.modules():
                if isinstance(module, train_dba.RMSNorm):
                    module.register_forward_hook(lambda module, inputs, y: y.bfloat16())
        return host

    @contextlib.contextmanager
    def attending(self, attention: Attention | None) -> Iterator[None]:
        """While it lasts, every layer attends by `attention`; by its own where that is None."""
        if attention is None:
            yield
            return
        before = None if self.ours else self.model.config._attn_implementation
        try:
            for layer, module in enumerate(self.attentions):
                if self.ours:
                    module.attend = partial(attend_ours, attention, layer)
                else:
                    module.chosen_blocks = partial(attention, layer)
            if not self.ours:
                self.model.set_attn_implementation(REGISTERED)
            yield
        finally:
            for module in self.attentions:
                module.__dict__.pop("attend" if self.ours else "chosen_blocks", None)
            if not self.ours:
                self.model.set_attn_implementation(before)

    def hidden(self, ids: torch.Tensor, attention: Attention | None = None,
               visible: torch.Tensor | None = None) -> torch.Tensor:
        """ids [B, T] -> what the output embedding multiplies [B, T, E]; visible [B, T]: which ids are no padding
        (transformers' models)."""
        with self.attending(attention):
            if self.ours:
                return self.model.hidden(ids)
            mask = None if visible is None else visible.long()
            return self.model.base_model(ids, attention_mask=mask, use_cache=False).last_hidden_state

    def log_p(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., E] -> log probabilities [..., V], float32 at least."""
        logits = self.model.logits(hidden) if self.ours else self.model.get_output_embeddings()(hidden)
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def attend_ours(attention: Attention, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
                null_v: torch.Tensor | None = None) -> torch.Tensor:
    """train_dba.attend() by another attention. A null token becomes one more token before all others."""
    if null_v is not None:                                 # whose score is the last channel of q
        null_k = F.pad(k.new_ones(1), (k.size(-1), 0)).expand(*k.shape[:2], 1, -1)
        k = torch.cat([null_k, F.pad(k, (0, 1))], 2)
        v = torch.cat([null_v.to(v.dtype)[:, None].expand(len(v), -1, 1, -1), v], 2)
    return attention(layer, q, k, v, 1.0, None).to(v.dtype)


def refuse_unknown(config) -> None:
    """Raise UserError for a model of transformers whose attention isn't causal and plain."""
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    window, most = (getattr(config, name, None) or math.inf for name in ("sliding_window", "max_position_embeddings"))
    for bad, words in ((config.model_type not in FAMILIES, f"it is a {config.model_type}; known are "
                        f"{', '.join(FAMILIES)}"),
                       (layers != {"full_attention"} or window < most,
                        "it has windows of its own"),
                       (getattr(config, "add_cross_attention", False), "it has cross-attention"),
                       (getattr(config, "reorder_and_upcast_attn", False), "it computes scores its own way")):
        if bad:
            raise UserError(f"no learned mask fits this model: {words}")


def register() -> None:
    """Enter our attention into transformers' tables. Its mask stays that of the padding, [B, S]."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import flash_attention_mask

    def forward(module, query, key, value, attention_mask, scaling=None, **_):
        y = module.chosen_blocks(query, key, value, scaling, attention_mask)
        return y.to(query.dtype).transpose(1, 2).contiguous(), None

    AttentionInterface.register(REGISTERED, forward)
    AttentionMaskInterface.register(REGISTERED, flash_attention_mask)


def plain_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """Causal attention to all keys by PyTorch's kernel; there may be keys before the first query."""
    T, S = q.size(2), k.size(2)
    mask = None if T == S else torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    return F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, mask, is_causal=T == S, scale=scale,
                                          enable_gqa=q.size(1) != k.size(1))


# -----------------------------------------------------------------------------
# Gates

class Summary:
    """Four vectors of each block of k [B, G, M·b, d], over its tokens that are no padding: [B, G, M, d] each."""

    def __init__(self, grid: Grid, k: torch.Tensor):
        blocks = k.unflatten(2, (-1, grid.block))
        seen = grid.visible.unflatten(1, (-1, grid.block))[:, None, ..., None]  # [B, 1, M, b, 1]
        self.count = seen.sum(3).clamp(min=1)
        self.mean = (blocks * seen).sum(3) / self.count
        self.variance = ((blocks - self.mean[:, :, :, None]).square() * seen).sum(3) / self.count
        self.most = blocks.masked_fill(~seen, -torch.inf).amax(3).clamp(min=torch.finfo(k.dtype).min)
        self.least = blocks.masked_fill(~seen, torch.inf).amin(3).clamp(max=torch.finfo(k.dtype).max)


class Gate(nn.Module):
    """A layer's gates by four vectors of each block: per query head and channel how much of each vector of a summary
    counts, and per head what a block's distance adds."""
    DISTANCES = 24                                         # half octaves, in blocks

    def __init__(self, heads: int, width: int):
        super().__init__()
        self.mean, self.variance = nn.Parameter(torch.ones(heads, 1, width)), nn.Parameter(torch.ones(heads, 1, width))
        self.most, self.least = nn.Parameter(torch.zeros(heads, 1, width)), nn.Parameter(torch.zeros(heads, 1, width))
        self.bias = nn.Parameter(torch.zeros(heads, self.DISTANCES))

    def forward(self, grid: Grid, q: torch.Tensor, k: torch.Tensor, scale: float) -> torch.Tensor:
        """Estimated log mass of each far block [B, H, R, M], -inf elsewhere. q [B, H, R, d], k [B, G, M·b, d]"""
        q, s = q * scale, Summary(grid, k)
        score = grouped(q * self.mean, s.mean) + grouped(q.square() * (self.variance / 2), s.variance)
        score = score + grouped(q.clamp(min=0) * self.most, s.most) + grouped(q.clamp(max=0) * self.least, s.least)
        octaves = (2 * grid.distance.clamp(min=1).log2()).long().clamp(max=self.DISTANCES - 1)    # [N, M]
        bias = self.bias[:, octaves].repeat_interleave(grid.block, 1)                             # [H, R, M]
        score = score + bias + s.count[:, :, None, :, 0].log()
        return score.masked_fill(~grid.far[:, None].repeat_interleave(grid.block, 2), -torch.inf)


class Gates(nn.Module):
    """The gates of all layers; thresholds [L, H]: the log of attention, in units of an equal share, from which on a
    head reads a far block. groups: key heads; bits: of a channel in the index, 0 for gates by four vectors. rows: how
    many queries choose together, a divisor of block: 1 as in decoding, block as in reading a prompt."""

    def __init__(self, layers: int, heads: int, groups: int, width: int, block: int, rows: int = 1, bits: float = 2.0):
        super().__init__()
        self.block, self.rows = block, rows
        self.facts = dict(layers=layers, heads=heads, groups=groups, width=width, block=block, rows=rows, bits=bits)
        self.layers = nn.ModuleList(Index(heads, groups, width, bits) if bits else Gate(heads, width)
                                    for _ in range(layers))
        self.thresholds = nn.Parameter(torch.full((layers, heads), math.log(0.1)))

    @property
    def bits_read(self) -> float:
        """Bits that a choice reads of each channel of each key: codes and stretch, or four vectors a block, of 16."""
        bits = self.facts["bits"]
        return bits + 16 / self.facts["width"] if bits else 4 * 16 / self.block

    def by_block(self) -> "Gates":
        """The same gates for reading a prompt, where the queries of a block choose together."""
        together = copy.deepcopy(self)
        together.rows = self.block
        return together

    def share(self, layer: int, grid: Grid, q: torch.Tensor, k: torch.Tensor, scale: float) -> torch.Tensor:
        """log of the estimated attention to each far block, in units of an equal share for each block in reach, so that
        a threshold means more of the same in a longer text: [B, H, N', M]."""
        q, k = q.detach(), k.detach()                      # a gate learns nothing through what it reads
        far = self.layers[layer](grid, q, k, scale)
        share = share_rows(grid, log_share(far, near_log_mass(grid, q, k, scale)), self.rows)
        return share + log_reach(grid, self.rows)

    def keep(self, layer: int, grid: Grid, q: torch.Tensor, k: torch.Tensor, scale: float, point: "Point"
             ) -> torch.Tensor:
        """Which blocks are read at an operating point [B, H, N', M], the near ones included."""
        threshold = (self.thresholds[layer] + point.shift)[:, None, None]       # [H, 1, 1]
        far = keep_above(self.share(layer, grid, q, k, scale), threshold)
        if point.drops is not None:
            far = far & ~point.drops[layer][:, None, None]
        return far | near_rows(grid, self.rows)


@dataclass
class Point:
    """How much is read: what is added to all thresholds, and which heads [L, H] read near blocks alone, whose old keys
    needn't be held (all query heads of a key head, or none)."""
    shift: float = 0.0
    drops: torch.Tensor | None = None


def log_reach(grid: Grid, rows: int) -> torch.Tensor:
    """log of the number of blocks that a row could read: [B, 1, N', 1]"""
    blocks = (grid.near | grid.far).sum(-1).clamp(min=1)   # [B, N]
    return blocks.log().repeat_interleave(grid.block // rows, 1)[:, None, :, None]


def near_rows(grid: Grid, rows: int) -> torch.Tensor:
    """[B, 1, N', M]"""
    return grid.near[:, None].repeat_interleave(grid.block // rows, 2)


class Sparse:
    """The Attention that reads the blocks that gates choose and no others."""

    def __init__(self, gates: Gates, point: Point):
        self.gates, self.point = gates, point

    def __call__(self, layer, q, k, v, scale, visible):
        grid = Grid(len(q), q.size(2), k.size(2), self.gates.block, visible, q.device)
        q, k, v = grid.pad_rows(q), grid.pad_keys(k).to(q.dtype), grid.pad_keys(v).to(q.dtype)
        kept = self.gates.keep(layer, grid, q, k, scale, self.point)
        return grid.cut(gathered_attention(grid, q, k, v, scale, kept))


# -----------------------------------------------------------------------------
# Learning

@torch.no_grad()
def survey(host: Host, gates: Gates, texts: Iterable[torch.Tensor]) -> None:
    """Fit indices to the queries and keys that the model has on texts [1, T]."""
    surveys = [Survey() for _ in gates.layers]

    def attention(layer, q, k, v, scale, visible):
        grid = Grid(len(q), q.size(2), k.size(2), gates.block, visible, q.device)
        surveys[layer].add(grid, q, k, scale)
        return plain_attention(q, k, v, scale)

    for ids in texts:
        host.hidden(ids, attention)
    for gate, seen in zip(gates.layers, surveys):
        gate.fit(*seen.moments())


def mass_shares(grid: Grid, q: torch.Tensor, k: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(log shares of attention of a row's far blocks and, last, of its near ones together [B, H, R, M + 1]; log mass of
    the near ones [B, H, R]), as the model has them."""
    far, near = (part[:, None].repeat_interleave(grid.block, 2) for part in (grid.far, grid.near))
    mass = block_log_mass(grid, q, k, scale)
    near = mass.masked_fill(~near, -torch.inf).logsumexp(-1)
    return whole_share(mass.masked_fill(~far, -torch.inf), near), near


def whole_share(far: torch.Tensor, near: torch.Tensor) -> torch.Tensor:
    """log mass of far blocks [B, H, R, M] and of the near ones [B, H, R] -> log shares [B, H, R, M + 1]"""
    mass = torch.cat([far, near[..., None]], -1)
    return mass.masked_fill((near == -torch.inf)[..., None], 0).log_softmax(-1)


def mass_loss(grid: Grid, truth: torch.Tensor, guess: torch.Tensor) -> torch.Tensor:
    """KL divergence of a gate's shares [B, H, R, M + 1] from the true ones in nats; the mean over queries and heads."""
    counts = (grid.real & grid.visible[:, grid.pos])[:, None]                   # [B, 1, R]
    held = truth > -torch.inf
    kl = torch.where(held, truth.exp() * (truth - guess.masked_fill(~held, 0)), 0).sum(-1)
    return (kl * counts).sum() / (counts.sum() * truth.size(1)).clamp(min=1)


def learn_mass(host: Host, gates: Gates, ids: torch.Tensor, optimizers: list[torch.optim.Optimizer],
               updates: int) -> float:
    """Bring gates closer to the attention of the model as it reads ids [B, T]: so many steps for each layer by its
    optimizer. Returns the mean over layers of mass_loss() before them."""
    losses = []

    def attention(layer, q, k, v, scale, visible):
        grid = Grid(len(q), q.size(2), k.size(2), gates.block, visible, q.device)
        rows, keys, gate = grid.pad_rows(q), grid.pad_keys(k).to(q.dtype), gates.layers[layer]
        truth, near = mass_shares(grid, rows, keys, scale)
        with torch.enable_grad():
            for update in range(updates):
                loss = mass_loss(grid, truth, whole_share(gate(grid, rows, keys, scale), near))
                loss.backward()
                optimizers[layer].step()
                optimizers[layer].zero_grad()
                if update == 0:
                    losses.append(loss.item())
        return plain_attention(q, k, v, scale)

    with torch.no_grad():
        host.hidden(ids, attention)
    return sum(losses) / len(losses)


@torch.no_grad()
def equal_loss(host: Host, gates: Gates, texts: Iterable[torch.Tensor], lost: float) -> None:
    """Set each head's threshold so that it leaves out that share of its attention on texts [1, T]: a head whose gate
    can be trusted less reads more."""
    seen: list[list] = [[] for _ in gates.layers]

    def attention(layer, q, k, v, scale, visible):
        grid = Grid(len(q), q.size(2), k.size(2), gates.block, visible, q.device)
        rows, keys = grid.pad_rows(q), grid.pad_keys(k).to(q.dtype)
        truth, near = mass_shares(grid, rows, keys, scale)
        guess = whole_share(gates.layers[layer](grid, rows, keys, scale), near)
        far = grid.far.repeat_interleave(grid.block, 1) & grid.real[:, None]    # [B, R, M]
        guess = guess[..., :-1] + log_reach(grid, 1)
        pairs = [x.transpose(0, 1)[:, far] for x in (guess, truth[..., :-1])]   # [H, queries' far blocks]
        seen[layer].append((*pairs, far.any(-1).sum().item()))
        return plain_attention(q, k, v, scale)

    for ids in texts:
        host.hidden(ids, attention)
    for layer, parts in enumerate(seen):
        guess, truth, queries = (torch.cat([part[0] for part in parts], 1), torch.cat([part[1] for part in parts], 1),
                                 sum(part[2] for part in parts))
        guess, order = guess.sort(1)
        left_out = truth.exp().gather(1, order).cumsum(1) / queries             # by every threshold there could be
        at = (left_out <= lost).sum(1, keepdim=True).clamp(max=guess.size(1) - 1)
        gates.thresholds[layer] = guess.gather(1, at)[:, 0]


class Soft:
    """The Attention in which a far block counts by a sigmoid of (log share - threshold) / temperature, so that gates
    and thresholds learn from the logits. kept: per layer the share of blocks that this keeps, of those in reach."""

    def __init__(self, gates: Gates, temperature: float):
        self.gates, self.temperature, self.kept = gates, temperature, []

    def __call__(self, layer, q, k, v, scale, visible):
        gates = self.gates
        grid = Grid(len(q), q.size(2), k.size(2), gates.block, visible, q.device)
        q, k, v = grid.pad_rows(q), grid.pad_keys(k).to(q.dtype), grid.pad_keys(v).to(q.dtype)
        share = gates.share(layer, grid, q, k, scale)
        far, near = share > -torch.inf, near_rows(grid, gates.rows)
        over = (share.masked_fill(~far, 0) - gates.thresholds[layer][:, None, None]) / self.temperature
        reach = far.sum() + near.sum() * q.size(1)
        self.kept.append(((over.sigmoid() * far).sum() + near.sum() * q.size(1)) / reach)
        bias = torch.where(far, F.logsigmoid(over), torch.where(near, 0.0, -torch.inf))
        return grid.cut(checkpoint(dense_attention, grid, q, k, v, scale, bias, use_reentrant=False))


def learn_logits(host: Host, gates: Gates, ids: torch.Tensor, temperature: float, price: float,
                 target: float) -> tuple[float, float]:
    """Add the gradients of (share of blocks kept) + price · KL / target, and return (KL, share): KL of the next token
    from the model's own in nats, the mean over ids [B, T]."""
    with torch.no_grad():
        truth = host.log_p(host.hidden(ids))
    attention = Soft(gates, temperature)
    guess = host.log_p(host.hidden(ids, attention))
    kl = F.kl_div(guess, truth, reduction="sum", log_target=True) / ids.numel()
    kept = torch.stack(attention.kept).mean()
    (kept + price * kl / target).backward()
    return kl.item(), kept.item()


# -----------------------------------------------------------------------------
# Files

SHAPE = dict.fromkeys(("layers", "heads", "groups", "width", "block", "rows"), int) | dict(bits=float)


def window(ids: torch.Tensor, length: int, seed: int, step: int) -> torch.Tensor:
    """[1, length]: the window of ids [N] that a step learns from, drawn for the step alone."""
    start = np.random.default_rng([seed, step]).integers(len(ids) - length + 1)
    return ids[None, start:start + length]


def save_gates(folder: Path, gates: Gates, **facts) -> None:
    """gates.safetensors and gates.json: their shape and other facts of them."""
    from safetensors.torch import save_file
    train_dba.write_whole(folder / "gates.safetensors", lambda path: save_file(
        {name: tensor.contiguous() for name, tensor in gates.state_dict().items()}, path))
    train_dba.write_text(folder / "gates.json", json.dumps({**gates.facts, **facts}, indent=1) + "\n")


def load_gates(folder: Path) -> tuple[Gates, dict]:
    """(gates, facts) of a folder. Raises UserError."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    try:
        facts = train_dba.read_json(folder / "gates.json", SHAPE)
        gates = Gates(**{name: facts[name] for name in SHAPE})
        gates.load_state_dict(load_file(folder / "gates.safetensors"))
    except (*BROKEN, OSError, RuntimeError, SafetensorError) as e:
        raise UserError(f"{folder} holds no gates that can be read ({brief(e)})") from None
    return gates.requires_grad_(False), facts
