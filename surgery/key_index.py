"""
An index of keys: a few bits of each key, from which a query's score for it is estimated.

A key is written in coordinates of unit variance that are uncorrelated, and so are the query's (the singular vectors of
what queries and keys have in common), so that the loss of each can be told apart: bits go where they save most of the
score's error, none to coordinates that hardly count. What a block of keys holds is then the sum of exp(score) as
always, with half the variance of the score's error added to each score, its second-order expansion. The idea of an
index beside the cache is that of DeepSeek-V3.2 (2512.02556) and Loki (2406.02542); it isn't trained but measured.
"""

import torch
import torch.nn as nn

from surgery.convert import root
from surgery.sparse_attention import Grid, block_log_mass, grouped

# Bits -> (step, mean square error) of the uniform quantiser with 2^bits levels that is best for a normal variable of
# variance 1 (Max 1960, table II).
QUANTISERS = ((0.0, 1.0), (1.5958, 0.36338), (0.9957, 0.11885), (0.5860, 0.037440), (0.3352, 0.011543),
              (0.1881, 0.0034952), (0.1041, 0.0010400))
RIDGE = 1e-4                                               # of the keys' covariance, in units of its mean diagonal
TINY = 1e-12                                               # the same where no key differs from another


def share_bits(importance: torch.Tensor, total: int) -> torch.Tensor:
    """Bits of each coordinate [d], int64, of which there are `total`: each goes where it saves most of the error, the
    sum of importance [d] times the mean square error."""
    bits, errors = [0] * len(importance), [error for _, error in QUANTISERS]
    saved = importance.double() * (errors[0] - errors[1])
    for _ in range(total):
        i = int(saved.argmax())
        bits[i] += 1
        gain = errors[bits[i]] - errors[bits[i] + 1] if bits[i] + 1 < len(errors) else -torch.inf
        saved[i] = importance[i] * gain if gain > 0 else -torch.inf
    return torch.tensor(bits)


class Index(nn.Module):
    """A layer's index with `bits` a channel of each key, and one number of 16 bits a key by which its codes are
    stretched where they wouldn't reach it. What may be learned of it: how much each coordinate counts per query head,
    and its error."""

    def __init__(self, heads: int, groups: int, width: int, bits: float):
        super().__init__()
        self.total = round(bits * width)
        self.weight, self.error = (nn.Parameter(torch.ones(heads, 1, width)) for _ in range(2))
        self.register_buffer("mean", torch.zeros(groups, 1, width))
        self.register_buffer("to_query", torch.eye(width).repeat(groups, 1, 1))
        self.register_buffer("to_key", torch.eye(width).repeat(groups, 1, 1))
        self.register_buffer("bits", share_bits(torch.ones(width), self.total).repeat(groups, 1))

    def fit(self, queries: torch.Tensor, mean: torch.Tensor, keys: torch.Tensor) -> None:
        """Take coordinates and bits from the mean product q qᵀ of scaled queries [G, d, d], the keys' mean [G, 1, d]
        and their covariance [G, d, d], all float64."""
        self.mean.copy_(mean)
        for g, (query, key) in enumerate(zip(queries, keys)):
            whiten = root(key + TINY * torch.eye(len(key)), RIDGE)
            _, sizes, directions = torch.linalg.svd(root(query) @ whiten)
            self.to_query[g] = whiten @ directions.T
            self.to_key[g] = torch.linalg.solve(whiten, directions.T)
            self.bits[g] = share_bits(sizes.square(), self.total)

    def quantisers(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(step, error) of each coordinate [G, 1, d]."""
        step, error = self.mean.new_tensor(QUANTISERS)[self.bits].unsqueeze(1).unbind(-1)
        return step, error

    def rounded(self, k: torch.Tensor) -> torch.Tensor:
        """What codes and stretch keep of the coordinates of keys [B, G, S, d], of the same shape."""
        coordinates, (step, _) = (k - self.mean) @ self.to_key, self.quantisers()
        half = 2.0 ** (self.bits[:, None] - 1)             # levels on either side
        reach = (half * step).masked_fill(self.bits[:, None] == 0, torch.inf)
        stretch = (coordinates.abs() / reach).amax(-1, keepdim=True).clamp(min=1)
        step = step.masked_fill(step == 0, torch.inf) * stretch
        codes = (coordinates / step).floor().clamp(-half, half - 1) + 0.5
        return torch.where(self.bits[:, None] > 0, codes * step, 0)

    def forward(self, grid: Grid, q: torch.Tensor, k: torch.Tensor, scale: float) -> torch.Tensor:
        """Estimated log mass of each far block [B, H, R, M], -inf elsewhere. q [B, H, R, d], k [B, G, M·b, d]"""
        q, (_, error) = q * scale, self.quantisers()
        coordinates = (q.unflatten(1, (len(self.mean), -1)) @ self.to_query[:, None]).flatten(1, 2)       # [B, H, R, d]
        spread = coordinates.square() * self.error * error.repeat_interleave(len(self.weight) // len(error), 0)
        of_mean = grouped(q, self.mean.expand(len(q), -1, -1, -1))              # [B, H, R, 1]
        mass = block_log_mass(grid, coordinates * self.weight, self.rounded(k), 1.0)
        mass = mass + of_mean + spread.sum(-1, keepdim=True) / 2
        return mass.masked_fill(~grid.far[:, None].repeat_interleave(grid.block, 2), -torch.inf)


class Survey:
    """Moments of one layer's queries and keys, of tokens past the first block: what Index.fit() takes."""

    def __init__(self):
        self.count, self.queries, self.sum, self.keys = 0, 0.0, 0.0, 0.0

    def add(self, grid: Grid, q: torch.Tensor, k: torch.Tensor, scale: float) -> None:
        """q [B, H, T, d], k [B, G, T, d] of a text without padding; the first block, which is always read, has the
        sink, whose key is like no other."""
        groups, past = k.size(1), slice(grid.block, None)
        rows = (q[:, :, past] * scale).unflatten(1, (groups, -1)).transpose(0, 1).flatten(1, 3)   # [G, n, d]
        keys = k[:, :, past].transpose(0, 1).flatten(1, 2)                      # [G, n', d]
        rows, keys = (x.cpu().double() for x in (rows, keys))                   # not every device has float64
        self.count += keys.size(1)
        self.queries = self.queries + rows.mT @ rows / rows.size(1)
        self.sum = self.sum + keys.sum(1, keepdim=True)
        self.keys = self.keys + keys.mT @ keys

    def moments(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        mean = self.sum / self.count
        return self.queries, mean, self.keys / self.count - mean.mT @ mean
