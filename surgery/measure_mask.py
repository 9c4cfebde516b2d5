"""
What a choice of blocks costs: KL of the next token, accuracy, attention's mass and mean square, gradients.

A choice says which blocks of keys each query reads; all of them are measured on the same windows of tokens, over the
second half of each, where there is something to leave out. Scores are made in full here, to compare with.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch.utils.checkpoint import checkpoint

from paper.stats import mean_interval
from surgery.calibrate import check_finite
from surgery.mask import Gates, Host, Point, near_rows
from surgery.sparse_attention import (
    Grid,
    block_log_mass,
    grouped,
    keep_mass,
    keep_top,
    log_share,
    near_log_mass,
    per_head,
    score_rows,
    weights,
)


@dataclass
class TokenWindow:
    """The newest `width` tokens and the first `sink`."""
    width: int
    sink: int = 0


# (layer, grid, q [B, H, R, d], k [B, G, M·b, d], scale) -> blocks kept [B, H, N', M], or a TokenWindow
Choice = Callable[[int, Grid, torch.Tensor, torch.Tensor, float], torch.Tensor | TokenWindow]


# -----------------------------------------------------------------------------
# Choices

def far_scores(grid: Grid, scores: torch.Tensor) -> torch.Tensor:
    """[B, H, R, M], -inf where a block isn't far"""
    return scores.masked_fill(~grid.far[:, None].repeat_interleave(grid.block, 2), -torch.inf)


def oracle_mass(mass: float, layer, grid, q, k, scale):
    """The fewest blocks that hold that share of each query's attention, which is known only afterwards."""
    share = log_share(far_scores(grid, block_log_mass(grid, q, k, scale)), near_log_mass(grid, q, k, scale))
    return keep_mass(share, mass) | near_rows(grid, 1)


def oracle_top(blocks: int, layer, grid, q, k, scale):
    """The blocks that hold most of each query's attention."""
    near = near_rows(grid, 1)
    return keep_top(far_scores(grid, block_log_mass(grid, q, k, scale)), near, blocks) | near


def quest_top(blocks: int, layer, grid, q, k, scale):
    """Quest (2406.10774): the blocks in which a score could be largest, by the bounds of each channel of their keys."""
    tokens = k.unflatten(2, (-1, grid.block))
    seen = grid.visible.unflatten(1, (-1, grid.block))[:, None, ..., None]
    most, least = (tokens.masked_fill(~seen, 0).amax(3), tokens.masked_fill(~seen, 0).amin(3))
    bound = grouped(q.clamp(min=0), most) + grouped(q.clamp(max=0), least)
    near = near_rows(grid, 1)
    return keep_top(far_scores(grid, bound), near, blocks) | near


def gate_top(gates: Gates, blocks: int, layer, grid, q, k, scale):
    near = near_rows(grid, gates.rows)
    return keep_top(gates.share(layer, grid, q, k, scale), near, blocks) | near


def gate_point(gates: Gates, point: Point, layer, grid, q, k, scale):
    return gates.keep(layer, grid, q, k, scale, point)


def token_window(width: int, sink: int, layer, grid, q, k, scale):
    return TokenWindow(width, sink)


def controls(block: int, budgets: list[int]) -> dict[str, Choice]:
    """The choices that learn nothing, by name; budgets in blocks."""
    choices = {f"oracle mass {mass}": partial(oracle_mass, mass) for mass in (0.99, 0.95, 0.9)}
    for budget in budgets:
        choices[f"oracle top {budget}"] = partial(oracle_top, budget)
        choices[f"quest top {budget}"] = partial(quest_top, budget)
    choices[f"window 256, sink {block}"] = partial(token_window, 256, block)
    choices["window 10"] = partial(token_window, 10, 0)
    return choices


# -----------------------------------------------------------------------------
# Attention that is looked at

class Measured:
    """The Attention of a choice. Beside attending it adds up, over the queries from `first` on, what was kept: tokens
    of those in reach, attention's mass, the square of its difference; and far [L, H], the share of far blocks."""

    def __init__(self, choice: Choice, block: int, first: int):
        self.choice, self.block, self.first = choice, block, first
        self.kept = self.reach = self.mass = self.square = self.rows = 0.0
        self.far: dict[int, torch.Tensor] = {}

    def __call__(self, layer, q, k, v, scale, visible):
        grid = Grid(len(q), q.size(2), k.size(2), self.block, visible, q.device)
        q, k, v = grid.pad_rows(q), grid.pad_keys(k).to(q.dtype), grid.pad_keys(v).to(q.dtype)
        with torch.no_grad():
            chosen = self.choice(layer, grid, q, k, scale)
        if not isinstance(chosen, TokenWindow):
            far = grid.far[:, None].repeat_interleave(chosen.size(2) // grid.far.size(1), 2)
            self.far[layer] = (chosen & far).sum((0, 2, 3)) / far.sum().clamp(min=1)
        if q.requires_grad:
            return grid.cut(checkpoint(self.attend, grid, q, k, v, scale, chosen, use_reentrant=False))
        return grid.cut(self.attend(grid, q, k, v, scale, chosen, look=True))

    def attend(self, grid, q, k, v, scale, chosen, look=False):
        parts = []
        for rows, scores in score_rows(grid, q, k, scale):
            mask = token_mask(grid, chosen, rows, scores.size(-1))
            part = weights(scores.masked_fill(~mask, -torch.inf))
            parts.append(per_head(part, v[:, :, :scores.size(-1)]))
            late = grid.real[rows] & (grid.pos[rows] >= self.first)
            if look and late.any():
                self.look(scores[:, :, late], part[:, :, late], mask.expand_as(scores)[:, :, late])
        return torch.cat(parts, 2)

    def look(self, scores, part, mask):
        reach, whole = scores > -torch.inf, weights(scores)
        self.kept += (mask & reach).sum().item()
        self.reach += reach.sum().item()
        self.mass += (whole * mask).sum().item()
        self.square += (whole - part).square().sum().item()
        self.rows += scores.numel() // scores.size(-1)

    def result(self) -> dict:
        return dict(kept=self.kept / self.reach, mass=self.mass / self.rows, mse=self.square / self.reach)


def token_mask(grid: Grid, chosen: torch.Tensor | TokenWindow, rows: slice, keys: int) -> torch.Tensor:
    """[B or 1, H or 1, rows, keys]: which tokens are kept."""
    if isinstance(chosen, TokenWindow):
        at = torch.arange(keys, device=grid.pos.device)
        return ((grid.pos[rows, None] - at < chosen.width) | (at < chosen.sink))[None, None]
    each = grid.rows // chosen.size(2)
    part = chosen[:, :, rows.start // each:rows.stop // each, :keys // grid.block]
    return part.repeat_interleave(each, 2).repeat_interleave(grid.block, 3)


# -----------------------------------------------------------------------------
# Measurements

def compare(truth: torch.Tensor, log_p: torch.Tensor, targets: torch.Tensor) -> dict:
    """Means over rows of log probabilities [n, V] against the model's own: kl in nats, nll, hits of the next token's
    first guess, and how often both guess the same."""
    rows = torch.arange(len(targets))
    return dict(kl=(truth.exp() * (truth - log_p)).sum(-1).mean().item(), nll=-log_p[rows, targets].mean().item(),
                base_nll=-truth[rows, targets].mean().item(), hits=(log_p.argmax(-1) == targets).sum().item(),
                base_hits=(truth.argmax(-1) == targets).sum().item(),
                agree=(log_p.argmax(-1) == truth.argmax(-1)).float().mean().item(), tokens=len(targets))


class Reference:
    """The model's own log probabilities of the second half of ids [T + 1], to hold choices to. Raises UserError where
    they aren't finite."""

    @torch.no_grad()
    def __init__(self, host: Host, ids: torch.Tensor):
        self.host, self.inputs, self.first = host, ids[None, :-1], (len(ids) - 1) // 2
        self.targets = ids[self.first + 1:]
        self.truth = self.log_p(host, None)
        check_finite(self.truth)

    def log_p(self, host: Host, attention) -> torch.Tensor:
        """[n, V]"""
        return host.log_p(host.hidden(self.inputs, attention)[0, self.first:])

    @torch.no_grad()
    def measure(self, choice: Choice | None, block: int) -> tuple[dict, Measured | None]:
        """What compare() says of a choice and what its attention kept, and that attention. A choice of None is the
        floor: the model's own attention, all in bfloat16."""
        if choice is None:
            kept = dict(kept=1.0, mass=None, mse=None)
            return dict(**kept, **compare(self.truth, self.log_p(self.host.rounded(), None), self.targets)), None
        attention = Measured(choice, block, self.first)
        compared = compare(self.truth, self.log_p(self.host, attention), self.targets)
        return dict(**attention.result(), **compared), attention


def gradient_cosines(host: Host, ids: torch.Tensor, choices: dict[str, Choice], block: int) -> dict[str, list[float]]:
    """{choice: cosine of a layer's gradients, of all weights of its attention, with those of the model itself}, by the
    mean nll of ids [T + 1]."""
    def gradients(attention):
        parameters = [list(module.parameters()) for module in host.attentions]
        flat = [p for layer in parameters for p in layer]
        for p in flat:
            p.requires_grad_(True)
        hidden = host.hidden(ids[None, :-1], attention)
        nll = -host.log_p(hidden[0]).gather(1, ids[1:, None]).mean()
        made = iter(torch.autograd.grad(nll, flat))
        for p in flat:
            p.requires_grad_(False)
        return [torch.cat([next(made).flatten() for _ in layer]) for layer in parameters]

    plain, cosines = gradients(None), {}
    for name, choice in choices.items():
        masked = gradients(Measured(choice, block, 0))
        cosines[name] = [torch.cosine_similarity(a, b, 0).item() for a, b in zip(plain, masked)]
    return cosines


def summary(records: list[dict]) -> list[dict]:
    """Records of one choice and length on several windows as one: means over windows with half-widths of 95 % intervals
    (None of one window); accuracy kept in %, None where the model itself hits nothing."""
    groups: dict[tuple, list[dict]] = {}
    for record in records:
        groups.setdefault((record["text"], record["length"], record["choice"]), []).append(record)
    rows = []
    for (text, length, choice), part in groups.items():
        row = dict(text=text, length=length, choice=choice, windows=len(part),
                   tokens=sum(record["tokens"] for record in part))
        for key in ("kept", "mass", "mse", "kl", "agree"):
            if part[0][key] is not None:
                row[key], row[f"{key}_half"] = mean_interval([record[key] for record in part])
        row["delta_nll"], row["delta_nll_half"] = mean_interval([r["nll"] - r["base_nll"] for r in part])
        kept = [100 * record["hits"] / record["base_hits"] for record in part if record["base_hits"]]
        row["accuracy_kept"], row["accuracy_kept_half"] = mean_interval(kept) if kept else (None, None)
        row["base_nll"] = math.fsum(record["base_nll"] for record in part) / len(part)
        rows.append(row)
    return rows
