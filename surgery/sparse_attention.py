"""
Causal attention over chosen blocks of keys: who chooses is not known here.

A query always reads the block that it is in, the one before, and the first block that holds a token (the sink): its
near blocks. The others before it are its far blocks, of which a choice keeps some. Shapes: B texts, H query heads, G
key heads (H = G·r), T queries, S keys, of which the queries are the last T; R rows, which are the queries padded to
whole blocks; b tokens in a block; N blocks of rows, M of keys; d channels of keys, u of values.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

ROWS = 128                                                 # queries whose scores exist at once
ELEMENTS = 1 << 19                                         # of gathered keys that exist at once


class Grid:
    """Where the blocks of queries and keys lie. visible [B, S]: which keys are no padding (None: all)."""

    def __init__(self, batch: int, queries: int, keys: int, block: int, visible: torch.Tensor | None = None,
                 device="cpu"):
        first = keys - queries                             # position of the first query
        self.block, self.queries, self.front = block, queries, first % block
        self.start = first - self.front                    # position of the first row
        self.rows = -(-(self.front + queries) // block) * block
        self.blocks = self.start // block + self.rows // block                  # M
        if visible is None:
            visible = torch.ones(batch, keys, dtype=torch.bool, device=device)
        self.visible = F.pad(visible, (0, self.blocks * block - keys))          # [B, M·b]
        self.pos = self.start + torch.arange(self.rows, device=device)          # [R]
        self.real = (self.pos >= first) & (self.pos < keys)                     # [R]: rows that are queries
        held = self.visible.unflatten(1, (-1, block)).any(-1)                   # [B, M]
        place = torch.arange(self.blocks, device=device)
        own = (self.pos[::block] // block)[:, None]                             # [N, 1]: the block that a row is in
        self.distance = own - place                                             # [N, M]
        sink = place == held.int().argmax(-1, keepdim=True)                     # [B, M]
        past = held[:, None] & (self.distance >= 0)                             # [B, N, M]
        self.near = past & (sink[:, None] | (self.distance <= 1))
        self.far = past & ~self.near

    def pad_rows(self, q: torch.Tensor) -> torch.Tensor:
        """[B, H, T, d] -> [B, H, R, d]"""
        return F.pad(q, (0, 0, self.front, self.rows - self.front - self.queries))

    def pad_keys(self, k: torch.Tensor) -> torch.Tensor:
        """[B, G, S, d] -> [B, G, M·b, d]"""
        return F.pad(k, (0, 0, 0, self.blocks * self.block - k.size(2)))

    def cut(self, y: torch.Tensor) -> torch.Tensor:
        """[B, H, R, u] -> [B, H, T, u]"""
        return y[:, :, self.front:self.front + self.queries]


def grouped(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Products of q [B, H, R, d] and k [B, G, X, d], each query head with its key head: [B, H, R, X], float32 at
    least."""
    groups = k.size(1)
    products = q.unflatten(1, (groups, -1)).flatten(2, 3) @ k.to(q.dtype).mT    # [B, G, r·R, X]
    products = products.to(torch.promote_types(products.dtype, torch.float32))
    return products.unflatten(2, (-1, q.size(2))).flatten(1, 2)


def score_rows(grid: Grid, q: torch.Tensor, k: torch.Tensor, scale: float) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield (rows, scores [B, H, rows, X]) of all causal scores, X the keys up to the end of the last row's block; -inf
    where a key is padding or after the query."""
    step = max(ROWS // grid.block, 1) * grid.block
    for low in range(0, grid.rows, step):
        rows = slice(low, min(low + step, grid.rows))
        end = grid.start + rows.stop
        later = torch.arange(end, device=q.device) > grid.pos[rows, None]       # [rows, X]
        hidden = later | ~grid.visible[:, None, None, :end]                     # [B, 1, rows, X]
        yield rows, (grouped(q[:, :, rows], k[:, :, :end]) * scale).masked_fill(hidden, -torch.inf)


def weights(scores: torch.Tensor) -> torch.Tensor:
    """softmax over the last dimension; zeros where every score is -inf."""
    empty = (scores == -torch.inf).all(-1, keepdim=True)
    return scores.masked_fill(empty, 0).softmax(-1).masked_fill(empty, 0)


# -----------------------------------------------------------------------------
# Mass

def block_log_mass(grid: Grid, q: torch.Tensor, k: torch.Tensor, scale: float) -> torch.Tensor:
    """log of the sum of exp(score) over each block, row by row: [B, H, R, M], -inf where a row sees none of it."""
    parts = []
    for _, scores in score_rows(grid, q, k, scale):
        mass = scores.unflatten(-1, (-1, grid.block)).logsumexp(-1)
        parts.append(F.pad(mass, (0, grid.blocks - mass.size(-1)), value=-torch.inf))
    return torch.cat(parts, 2)


def slots(kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(indices of the blocks that are kept [..., X], which of them count) of kept [..., M]; X: the most of any row."""
    most = int(kept.sum(-1).max())
    valid, index = kept.to(torch.uint8).sort(dim=-1, descending=True, stable=True)
    return index[..., :most], valid[..., :most].bool()


def near_log_mass(grid: Grid, q: torch.Tensor, k: torch.Tensor, scale: float) -> torch.Tensor:
    """log of the sum of exp(score) over the near blocks of each row: [B, H, R]."""
    B, H = q.size(0), q.size(1)
    index, valid = slots(grid.near)                        # [B, N, X]
    texts = torch.arange(B, device=q.device)[:, None, None]
    blocks = k.unflatten(2, (-1, grid.block)).transpose(1, 2)                   # [B, M, G, b, d]
    keys = blocks[texts, index].permute(0, 3, 1, 2, 4, 5).flatten(3, 4)         # [B, G, N, X·b, d]
    keys = keys.transpose(1, 2).flatten(0, 1)              # [B·N, G, X·b, d]
    rows = q.unflatten(2, (-1, grid.block)).transpose(1, 2).flatten(0, 1)       # [B·N, H, b, d]
    seen = seen_tokens(grid, texts, index, valid)          # [B, N, X·b]
    at = (index[..., None] * grid.block + torch.arange(grid.block, device=q.device)).flatten(2)
    causal = at[:, :, None] <= grid.pos.view(1, -1, grid.block, 1)              # [B, N, b, X·b]
    hidden = ~(causal & seen[:, :, None]).flatten(0, 1)[:, None]
    scores = (grouped(rows, keys) * scale).masked_fill(hidden, -torch.inf)      # [B·N, H, b, X·b]
    return scores.logsumexp(-1).unflatten(0, (B, -1)).transpose(1, 2).reshape(B, H, -1)


def seen_tokens(grid: Grid, texts: torch.Tensor, index: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Which tokens of the blocks in slots [..., X] are no padding: [..., X·b]."""
    visible = grid.visible.unflatten(1, (-1, grid.block))  # [B, M, b]
    return (visible[texts, index] & valid[..., None]).flatten(-2)


def log_share(far: torch.Tensor, near: torch.Tensor) -> torch.Tensor:
    """log of each far block's share of a row's attention: far [B, H, R, M] log mass, -inf where a block isn't far; near
    [B, H, R] log mass of the near blocks."""
    whole = torch.logaddexp(far.logsumexp(-1), near)
    return far - whole.masked_fill(whole == -torch.inf, 0)[..., None]


# -----------------------------------------------------------------------------
# Rules: which far blocks are kept, of log shares [B, H, N, M]

def share_rows(grid: Grid, share: torch.Tensor, rows: int) -> torch.Tensor:
    """The mean over each `rows` rows that choose together of log shares [B, H, R, M], as a log: [B, H, R/rows, M]."""
    if rows == 1:
        return share
    real = grid.real.unflatten(0, (-1, rows))              # [R/rows, rows]
    share = share.unflatten(2, (-1, rows)).masked_fill(~real[..., None], -torch.inf)
    return share.logsumexp(3) - real.sum(-1).clamp(min=1).log()[:, None]


def keep_above(share: torch.Tensor, threshold: torch.Tensor | float) -> torch.Tensor:
    return (share >= threshold) & (share > -torch.inf)


def keep_mass(share: torch.Tensor, mass: float) -> torch.Tensor:
    """The fewest far blocks with which a row keeps that share of its attention, the near blocks included."""
    part, order = share.exp().sort(-1, descending=True)
    near = 1 - part.sum(-1, keepdim=True)
    before = near + part.cumsum(-1) - part
    return torch.zeros_like(share, dtype=torch.bool).scatter(-1, order, (before < mass) & (part > 0))


def keep_top(score: torch.Tensor, near: torch.Tensor, blocks: int) -> torch.Tensor:
    """The far blocks with the highest scores, as many as make `blocks` with the near ones [B, 1, N, M]."""
    order = score.argsort(dim=-1, descending=True, stable=True)
    room = (blocks - near.sum(-1, keepdim=True)).expand(*score.shape[:-1], 1)
    best = torch.arange(score.size(-1), device=score.device) < room
    return torch.zeros_like(score, dtype=torch.bool).scatter(-1, order, best.expand_as(score)) & (score > -torch.inf)


# -----------------------------------------------------------------------------
# Attention

def dense_attention(grid: Grid, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float,
                    bias: torch.Tensor) -> torch.Tensor:
    """Attention with bias [B, H, N', M] added to the scores of each block, -inf where it isn't kept; N' divides R.
    Every score is made. q [B, H, R, d], k [B, G, M·b, d], v [B, G, M·b, u] -> [B, H, R, u]"""
    parts = []
    for rows, scores in score_rows(grid, q, k, scale):
        a = weights(scores + bias_of(grid, bias, rows, scores.size(-1)))
        parts.append(per_head(a.to(v.dtype), v[:, :, :scores.size(-1)]))
    return torch.cat(parts, 2)


def bias_of(grid: Grid, bias: torch.Tensor, rows: slice, keys: int) -> torch.Tensor:
    """bias [B, H, N', M] of some rows and their first keys, token by token."""
    each = grid.rows // bias.size(2)
    part = bias[:, :, rows.start // each:rows.stop // each, :keys // grid.block]
    return part.repeat_interleave(each, 2).repeat_interleave(grid.block, 3)


def per_head(a: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """a [B, H, R, X] · v [B, G, X, u] -> [B, H, R, u]"""
    y = a.unflatten(1, (v.size(1), -1)).flatten(2, 3) @ v
    return y.unflatten(2, (-1, a.size(2))).flatten(1, 2)


def gathered_attention(grid: Grid, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float,
                       kept: torch.Tensor) -> torch.Tensor:
    """The same from kept [B, H, N', M] alone, near blocks included: rows that choose together gather their blocks and
    attend to them by PyTorch's kernels. Time and memory go by the blocks kept. Chunks hold rows that keep about equally
    many."""
    (B, H, R, _), G, b = q.shape, k.size(1), grid.block
    kept = kept.expand(B, H, *kept.shape[2:])
    each = R // kept.size(2)
    flat = kept.flatten(0, 2)                              # [B·H·N', M]
    counts, order = flat.sum(-1).sort(descending=True)
    queries = q.reshape(len(flat), each, -1)
    position = grid.pos.view(-1, each)                     # [N', each]
    keys, values = (x.unflatten(2, (-1, b)).flatten(0, 1) for x in (k, v))      # [B·G, M, b, d]
    outputs, done = [], 0
    while done < len(order):
        most = max(int(counts[done]), 1) * b * max(k.size(-1), each)            # elements of a row's keys or scores
        chunk = order[done:done + max(1, ELEMENTS // most)]
        done += len(chunk)
        index, valid = slots(flat[chunk])                  # [rows, X]
        texts, head, group = chunk // (H * (R // each)), chunk // (R // each) % H, chunk % (R // each)
        owner = (texts * G + head // (H // G))[:, None]
        seen = seen_tokens(grid, texts[:, None], index, valid)                  # [rows, X·b]
        at = (index[..., None] * b + torch.arange(b, device=q.device)).flatten(1)
        mask = (at[:, None] <= position[group][..., None]) & seen[:, None]      # [rows, each, X·b]
        y = F.scaled_dot_product_attention(queries[chunk][:, None], keys[owner, index].flatten(1, 2)[:, None],
                                           values[owner, index].flatten(1, 2)[:, None], mask[:, None], scale=scale)
        outputs.append(y[:, 0].masked_fill(~mask.any(-1, keepdim=True), 0))
    y = torch.cat(outputs)[order.argsort()]
    return y.view(B, H, R, -1)
