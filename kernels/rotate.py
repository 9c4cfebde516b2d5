"""Rotation of what a KV cache holds, so that no channel is an outlier when it is quantised: a change of a model's
weights from outside. It works on any model whose blocks have the attributes of train_dba.py's Attention."""

import copy
import math

import torch
import torch.nn.functional as F


def hadamard(n: int) -> torch.Tensor | None:
    """A Hadamard matrix [n, n] of 1 and -1, by Paley's and Sylvester's constructions, or None where these give none."""
    if n == 1:
        return torch.ones(1, 1)
    p = n - 1
    if n % 4 == 0 and all(p % i for i in range(2, math.isqrt(p) + 1)):          # Paley: p prime, p = 3 mod 4
        squares = {i * i % p for i in range(1, p)}
        character = torch.tensor([0] + [1 if i in squares else -1 for i in range(1, p)])
        matrix = torch.ones(n, n)
        matrix[1:, 1:] = character[(torch.arange(p) - torch.arange(p)[:, None]) % p] - torch.eye(p)
        return matrix
    half = hadamard(n // 2) if n % 2 == 0 else None
    return None if half is None else torch.kron(torch.tensor([[1.0, 1], [1, -1]]), half)


def rotation(n: int) -> torch.Tensor:
    """An orthogonal matrix [n, n], float32, that spreads one channel over all: Hadamard's, else the DCT-II."""
    matrix = hadamard(n)
    if matrix is None:
        i = torch.arange(n, dtype=torch.float64)
        matrix = torch.cos(math.pi / n * i[:, None] * (i + 0.5))
    return F.normalize(matrix.double(), dim=1).float()


def rotate(tensor: torch.Tensor, groups: int) -> None:
    """Rotate, in place, each of the groups of rows of [groups·w, ...], or of entries of [groups·w]."""
    heads = tensor.view(groups, tensor.size(0) // groups, -1)
    tensor.copy_((rotation(heads.size(1)).to(heads) @ heads).view_as(tensor))


def rotate_rows(tensor: torch.Tensor, rows: torch.Tensor | slice) -> None:
    """Rotate, in place, some rows of [n, ...]: those that a mask [n] or a slice names."""
    part = tensor[rows]
    rotate(part, 1)
    tensor[rows] = part


@torch.no_grad()
def rotate_cache(model: torch.nn.Module) -> torch.nn.Module:
    """The same model, in which what it caches, keys, values and the latent, is rotated per key head. Queries and output
    weights are rotated along, so that nothing but rounding in the cache changes. Only keys with RoPE cost more per
    token, a product with `turn` after it, as llama.cpp has it since April 2026 (pull request 21038).

    Raises ValueError, before anything is changed, where a norm's gain of 0 would have to be folded into a null token.
    """
    layers = [block.attn for block in model.blocks]
    if any(attn.shape.latent_norm and attn.null and not attn.latent[1].weight.all() for attn in layers):
        raise ValueError("a norm's gain of 0 can't be folded into a null token; leave the rotation out")
    for attn in layers:
        geo = attn.shape.paths[-1]
        if geo.rotate:
            attn.turn = rotation(geo.width).T.to(attn.o.weight)
        for stream, groups in (rotate_latent if attn.shape.latent else rotate_heads)(attn).items():
            if stream in attn.null:
                rotate(attn.null[stream], groups)
    return model


def rotate_heads(attn: torch.nn.Module) -> dict[str, int]:
    """Rotate the keys without RoPE and the values of one layer. Returns {stream: groups} of what was rotated."""
    shape, rotated = attn.shape, {attn.shape.v_stream: attn.shape.v_groups}
    for path in shape.paths:
        if path.rotate:                                    # by position first, so not in the weights
            continue
        rotated[path.stream] = path.groups
        rotate(attn.q[path.name].weight, attn.n_head)
        if not path.tied:                                  # else it is the same weight
            rotate(attn.k[path.name].weight, path.groups)
    rotate(attn.v.weight, shape.v_groups)
    rotate(attn.o.weight.T, attn.n_head)
    return rotated


def rotate_latent(attn: torch.nn.Module) -> dict[str, int]:
    """The same where there is a latent: that, whose norm (MLA's) commutes with a rotation once its gain is folded into
    what reads it, and the keys beside it if they are without RoPE. Channels of gain 0 stay: they are cached as 0."""
    shape, rotated = attn.shape, {attn.shape.v_stream: 1}
    project, norm = attn.latent
    heard = norm.weight != 0 if shape.latent_norm else slice(None)
    for reader in (attn.k["sem"], attn.v):
        if shape.latent_norm:
            reader.weight *= norm.weight
        rotate_rows(reader.weight.T, heard)
    if shape.latent_norm:
        if attn.null:
            attn.null[shape.v_stream] /= norm.weight
        norm.weight[heard] = 1.0
    rotate_rows(project.weight, heard)
    for path in shape.paths:
        if not path.rotate and path.stream != shape.v_stream:
            rotated[path.stream] = path.groups
            rotate(attn.q[path.name].weight, attn.n_head)
            rotate(attn.k[path.name].weight, path.groups)
    return rotated


def rotated(model: torch.nn.Module) -> torch.nn.Module:
    """A copy of a model, whose cache is rotated. Raises ValueError as rotate_cache() does."""
    return rotate_cache(copy.deepcopy(model))
