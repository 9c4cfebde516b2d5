"""
The idea of KVTC (2511.01815) as a control: keys before RoPE and values in their principal components, more bits for the
larger ones; no weight changes, and the newest and the first tokens stay as they are. Coded here is what attention
reads; nothing is packed, and neither the entropy coding that follows in the paper nor the bytes of the bases, which all
caches of a model share, are counted.
"""

import copy
import heapq
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from surgery.convert import Layer
from train_dba import GPT

SINKS = 4                                                  # first tokens
# Of the uniform quantiser of b bits that is best for a Gaussian of variance 1 (Max, 1960): its step, its squared error.
STEPS = (0.0, 1.596, 0.9957, 0.5860, 0.3352, 0.1881, 0.1041, 0.0569, 0.0308)
ERRORS = (1.0, 0.3634, 0.1188, 0.03744, 0.01154, 0.003495, 0.001041, 0.0003035, 0.0000877)


def shared_out(variances: Tensor, bits: int) -> Tensor:
    """[n] bits of each component, of so many in all, by variance [n]: each bit where it takes most from the error."""
    sizes, shares = variances.tolist(), [0] * len(variances)
    gains = [(-(ERRORS[0] - ERRORS[1]) * size, i) for i, size in enumerate(sizes)]
    heapq.heapify(gains)
    for _ in range(min(bits, (len(STEPS) - 1) * len(sizes))):
        _, i = heapq.heappop(gains)
        shares[i] += 1
        if (b := shares[i]) < len(STEPS) - 1:
            heapq.heappush(gains, (-(ERRORS[b] - ERRORS[b + 1]) * sizes[i], i))
    return torch.tensor(shares)


@dataclass
class Coder:
    """What codes vectors [..., n] of one stream: its principal components, their mean and sizes, bits of each."""
    basis: Tensor                                          # [n, n], a component a column
    mean: Tensor                                           # [n]
    sizes: Tensor                                          # [n], standard deviations
    bits: Tensor                                           # [n]

    @classmethod
    def of(cls, weight: Tensor, layer: Layer, share: float):
        """Of what weight [n, D] makes of a layer's inputs, in a share of the bits of fp16."""
        mean = weight @ layer.moments.mean
        variances, basis = torch.linalg.eigh(weight @ layer.moments.inputs @ weight.T - torch.outer(mean, mean))
        variances = variances.clamp(min=0)
        bits = shared_out(variances, int(share * 16 * len(mean) + 1e-9))
        return cls(basis.float(), mean.float(), variances.sqrt().float(), bits)

    def __call__(self, y: Tensor) -> Tensor:
        steps = torch.tensor(STEPS)[self.bits] * self.sizes
        half = 2.0 ** self.bits / 2                        # levels lie half a step off zero, on both sides
        codes = ((y - self.mean) @ self.basis / steps.clamp(min=1e-30)).floor().clamp(-half, half - 1)
        return torch.where(self.bits > 0, (codes + 0.5) * steps, 0.0) @ self.basis.T + self.mean


def attend_coded(newest: int, q: Tensor, k: Tensor, v: Tensor, null_v: Tensor | None = None) -> Tensor:
    """train_dba.attend() of a batch whose second half reads coded keys and values: what both return is attention to the
    exact ones of the newest tokens and the first, and to the coded ones of the others."""
    distance = torch.arange(q.size(2))[:, None] - torch.arange(q.size(2))
    exact = (distance < newest) | (torch.arange(q.size(2)) < SINKS)
    k, v = (x.repeat_interleave(q.size(1) // x.size(1), 1).chunk(2) for x in (k, v))
    q = q.chunk(2)[0]
    scores = torch.where(exact, q @ k[0].mT, q @ k[1].mT).masked_fill(distance < 0, -torch.inf)
    p = scores.softmax(-1)
    y = (p * exact) @ v[0] + (p * ~exact) @ v[1]
    return torch.cat([y, y])


def coded(teacher: GPT, layers: list[Layer], share: float, newest: int = 32) -> GPT:
    """A copy of the teacher that reads keys and values as they come out of that share of an fp16 cache's bits, but for
    those of the newest and the first tokens. It runs each text twice: as it is, and coded."""
    model = copy.deepcopy(teacher)
    for block, layer in zip(model.blocks, layers):
        block.attn.attend = partial(attend_coded, newest)
        for module, weight in ((block.attn.k["geo"], layer.wk), (block.attn.v, layer.wv)):
            coder = Coder.of(weight.flatten(0, 1), layer, share)

            def code_second(module, args, y, coder=coder):
                first, second = y.chunk(2)
                return torch.cat([first, coder(second)])

            module.register_forward_hook(code_second)
    forward = model.forward
    model.forward = lambda ids, cache=None: forward(torch.cat([ids, ids])).chunk(2)[0]
    return model
