"""A cache of transformers in which heads that read near blocks alone don't hold their old keys and values."""

import torch
from transformers.cache_utils import Cache, DynamicLayer

from surgery.mask import Gates, Point


class DroppingLayer(DynamicLayer):
    """A layer's cache. Key heads where drops [G] is true hold the first block, and all from the block before the next
    token's on; between them update() returns zeros, which Sparse at the same Point doesn't read. For texts without
    padding on the left, whose first block is block 0."""
    is_croppable = False

    def __init__(self, drops: torch.Tensor, block: int):
        super().__init__()
        self.drops, self.block, self.tokens = drops, block, 0

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.at = torch.arange(0, device=self.device)  # positions that dropping heads hold
            self.held = [(x[:, ~self.drops, :0], x[:, self.drops, :0]) for x in (key_states, value_states)]
        before, self.tokens = self.tokens, self.tokens + key_states.size(2)
        at = torch.arange(self.tokens, device=self.device)
        whole = [self.whole(held, new, before) for held, new in zip(self.held, (key_states, value_states))]
        self.at = at[(at < self.block) | (at >= (self.tokens // self.block - 1) * self.block)]
        self.held = [(x[:, ~self.drops], x[:, self.drops][:, :, self.at]) for x in whole]
        return whole

    def whole(self, held: tuple, new: torch.Tensor, before: int) -> torch.Tensor:
        """[B, G, S, d]: what is held and what is new, zeros elsewhere."""
        x = new.new_zeros(*new.shape[:2], self.tokens, new.size(3))
        x[:, :, before:] = new
        full, near = x[:, ~self.drops], x[:, self.drops]
        full[:, :, :before], near[:, :, self.at] = held
        x[:, ~self.drops], x[:, self.drops] = full, near
        return x

    def get_seq_length(self) -> int:
        return self.tokens

    def nbytes(self) -> int:
        return sum(part.nbytes for held in self.held for part in held)


def dropping_cache(gates: Gates, point: Point, groups: int) -> Cache:
    """An empty cache for a model whose attention is Sparse(gates, point), with so many key heads."""
    drops = point.drops.unflatten(1, (groups, -1)).all(-1)                      # [L, G]
    return Cache(layers=[DroppingLayer(of_layer, gates.block) for of_layer in drops])
