"""
What a conversion can aim at, each in closed form: {name: function} in TARGETS.

`latent` is surgery/convert.py's. `per-head` is decoupled attention that cuts each key head by itself. `mla` has one
latent and one rotated key for all heads (2405.04434); of its RMSNorm a loud constant channel takes most of the effect.
`gqa` has fewer key heads, each the mean of those in whose place it stands (2305.13245). The first three keep RoPE on
some pairs only.

Legend: that of surgery/convert.py; r width of a head's unrotated keys, u of its values.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from surgery.convert import (
    RIDGE,
    Layer,
    Split,
    assemble,
    choose,
    convert,
    losses_seen,
    read_from_latent,
    root,
    scale_of,
    split,
)
from train_dba import GPT, Config, UserError

Report = Callable[[int, int], None]
STEADY = 0.1                                               # spread of a channel that may be taken for constant
LOUD = 100.0                                               # its size, in units of the norm that all others have


def pair_counts(cfg: Config) -> range:
    """Numbers of RoPE pairs that are tried."""
    w = cfg.attention.paths[0].width
    step = max(1, w // 16)
    return range(step, w // 2 + 1, step)


def least(predicted: Iterator[tuple], share: float, target: str) -> tuple:
    """(widths, nats) of the least predicted loss among (widths, nats of a layer). Raises UserError for none."""
    totals: dict[tuple, float] = {}
    for widths, nats in predicted:
        totals[widths] = totals.get(widths, 0.0) + nats
    if not totals:
        raise UserError(f"--cache-share {share} leaves too few channels for --target {target}; give more")
    return min(totals.items(), key=lambda item: item[1])


# -----------------------------------------------------------------------------
# A cut per key head

class Cut(NamedTuple):
    """Channels of a vector y [n], the most telling first: write @ y makes them, readers of y read read.T @ them. What
    leaving a channel out costs, in nats."""
    read: Tensor                                           # [n, n]
    write: Tensor                                          # [n, n]
    losses: Tensor                                         # [n]


def cut(moments: Tensor, reads: Tensor) -> Cut:
    """The Cut of y with second moments [n, n], where an error d costs d·reads·d / 2 nats."""
    spread = root(moments, RIDGE) if len(moments) else moments
    losses, basis = torch.linalg.eigh(spread @ reads @ spread)
    basis = basis.flip(1).T
    return Cut(basis @ spread, torch.linalg.solve(spread, basis.T).T, losses.flip(0).clamp(min=0) / 2)


def worth_to_all(layer: Layer) -> Tensor:
    """[G, f]: worth of pairs that all key heads keep alike, since a layer has one row of frequencies."""
    return layer.derotation.sum(0).expand(len(layer.wk), -1)


def key_cuts(layer: Layer, parts: Split) -> list[Cut]:
    """Of each key head's unrotated keys; softmax doesn't see their mean."""
    C, mean, w, cuts = layer.moments.inputs, layer.moments.mean, layer.wq.size(1), []
    centred = C - torch.outer(mean, mean)
    for g, keys in enumerate(parts.keys):
        reads = sum(layer.energies[h] / w * parts.queries[h] @ C @ parts.queries[h].T for h in layer.heads(g))
        cuts.append(cut(keys @ centred @ keys.T, reads))
    return cuts


def value_cuts(layer: Layer) -> list[Cut]:
    """Of each key head's values, token by token: that attention averages their errors is left out, as its query heads
    have them in common."""
    cuts = []
    for g, values in enumerate(layer.wv):
        reads = sum(layer.weighted_outputs[h].T @ layer.weighted_outputs[h] for h in layer.heads(g))
        cuts.append(cut(values @ layer.moments.inputs @ values.T, reads))
    return cuts


def head_losses(cfg: Config, layers: list[Layer], share: float, report: Report) -> Iterator[tuple]:
    """((pairs, r, u), nats) of each layer and choice of widths that fits."""
    w, v = cfg.attention.paths[0].width, cfg.attention.v_width
    room = int(share * (w + v) + 1e-9)
    for i, layer in enumerate(layers):
        values = sum(each.losses for each in value_cuts(layer))
        unrotated = worth_to_all(layer)[0].sort(descending=True).values
        for pairs in pair_counts(cfg):
            keys = sum(each.losses for each in key_cuts(layer, split(layer, pairs, worth_to_all(layer))))
            for u in range(1, v + 1):
                r = min(room - 2 * pairs - u, max(1, w - 2 * pairs))
                if r >= 1:
                    yield (pairs, r, u), (unrotated[pairs:].sum() + keys[r:].sum() + values[u:].sum()).item()
        report(i + 1, len(layers))


def refitted(layer: Layer, writes: list[Tensor]) -> Tensor:
    """W_o [D, H·u], fitted to what values cut by `writes` [u, v] of each query head tell of all averaged values."""
    wo, M, cuts = layer.wo.transpose(0, 1).flatten(1), layer.moments.values, torch.block_diag(*writes)
    gram = cuts @ M @ cuts.T
    gram += RIDGE * gram.diagonal().mean() * torch.eye(len(gram))
    return torch.linalg.solve(gram, cuts @ M @ wo.T).T


def per_head(teacher: GPT, layers: list[Layer], pairs: int, r: int, u: int) -> GPT:
    shape, H, converted = teacher.cfg.attention, teacher.cfg.n_head, []
    cfg = dataclasses.replace(teacher.cfg, attn_mode="decoupled", sem_dim=r * H, geo_dim=2 * pairs * H, attn_dim=u * H,
                              kv_head=shape.v_groups, one_temperature=True)
    scale = scale_of(cfg, shape.paths[0].width)
    for layer in layers:
        parts = split(layer, pairs, worth_to_all(layer))
        kept = torch.cat([parts.kept[0], parts.kept[0] + layer.wq.size(1) // 2])
        of_keys, of_values = key_cuts(layer, parts), value_cuts(layer)
        queries, keys, turned, writes = [], [], [], []
        for g in range(shape.v_groups):
            keys.append(widened(of_keys[g].write[:r] @ parts.keys[g], r))
            for h in layer.heads(g):
                queries.append(widened(of_keys[g].read[:r] @ parts.queries[h], r))
                turned.append(layer.wq[h][kept])
                writes.append(of_values[g].write[:u])
        converted.append({
            "q.sem.weight": scale * torch.cat(queries), "k.sem.weight": torch.cat(keys),
            "q.geo.weight": scale * torch.cat(turned), "k.geo.weight": layer.wk[:, kept].flatten(0, 1),
            "v.weight": torch.cat([each.write[:u] @ weight for each, weight in zip(of_values, layer.wv)]),
            "o.weight": refitted(layer, writes), "inv_freq": layer.inv_freq[parts.kept[:1]]})
    return assemble(teacher, cfg, converted)


def widened(rows: Tensor, n: int) -> Tensor:
    """rows [m, D] and zeros below them: [n, D]."""
    return F.pad(rows, (0, 0, 0, n - len(rows)))


def to_heads(teacher: GPT, layers: list[Layer], share: float, report: Report) -> tuple[GPT, dict]:
    (pairs, r, u), nats = least(head_losses(teacher.cfg, layers, share, report), share, "per-head")
    return per_head(teacher, layers, pairs, r, u), dict(pairs=pairs, semantic=r, values=u, predicted_nats=nats)


# -----------------------------------------------------------------------------
# MLA

class SharedKeys(NamedTuple):
    """For each RoPE pair the complex key that is nearest to those of all key heads: k_g = factors_g · key."""
    keys: Tensor                                           # [f, D], complex
    factors: Tensor                                        # [f, G], complex
    losses: Tensor                                         # [f]: nats that it costs to share a pair


def shared_keys(layer: Layer) -> SharedKeys:
    """By the first singular vector of all key heads' keys of a pair, each weighed by what its error costs."""
    C, w, half = layer.moments.inputs, layer.wq.size(1), layer.wq.size(1) // 2
    size_q = torch.einsum("hwd,de,hwe->hw", layer.wq, C, layer.wq).unflatten(1, (2, -1)).sum(1)       # [H, f]
    cost = (layer.energies[:, None] * size_q / (4 * w)).unflatten(0, (len(layer.wk), -1)).sum(1)      # [G, f]
    weights = cost.clamp(min=1e-30).sqrt().T[..., None]                         # [f, G, 1]
    keys = torch.complex(layer.wk[:, :half], layer.wk[:, half:]).transpose(0, 1)                      # [f, G, D]
    spread = root(C).to(keys.dtype)
    u, sizes, _ = torch.linalg.svd(weights * keys @ spread, full_matrices=False)
    first = u[:, :, :1]                                    # [f, G, 1]
    return SharedKeys((first.mH @ (weights * keys))[:, 0], (first / weights)[..., 0], sizes[:, 1:].square().sum(1))


def mla_split(layer: Layer, shared: SharedKeys, pairs: int) -> Split:
    """Keep the pairs for which it is worth most to share a rotated key rather than to have none."""
    worth = layer.derotation.sum(0) - shared.losses
    return split(layer, pairs, worth.expand(len(layer.wk), -1))


def constant(layer: Layer) -> tuple[Tensor, bool]:
    """(weights [D] of the channel that is nearest to 1 on all inputs, whether its spread is below STEADY)."""
    C, mean = layer.moments.inputs, layer.moments.mean
    weights = torch.linalg.solve(C + RIDGE * C.diagonal().mean() * torch.eye(len(C)), mean)
    met = (mean @ weights).item()                          # 1 less the share of 1 that is missed
    return weights / met, 1 / met - 1 < STEADY ** 2


def mla_losses(cfg: Config, layers: list[Layer], share: float, report: Report) -> Iterator[tuple]:
    """((pairs, latent), nats) of each layer and choice of widths that fits."""
    shape = cfg.attention
    G, w, v = shape.v_groups, shape.paths[0].width, shape.v_width
    room = int(share * G * (w + v) + 1e-9)
    for i, layer in enumerate(layers):
        shared, (_, steady) = shared_keys(layer), constant(layer)
        for pairs in pair_counts(cfg):
            latent = min(room - 2 * pairs, cfg.d_model, G * (w - 2 * pairs + v) + steady)
            if latent < 1 + steady:
                continue
            parts = mla_split(layer, shared, pairs)
            kept = parts.kept[0]
            of_pairs = layer.derotation.sum() - layer.derotation[:, kept].sum() + shared.losses[kept].sum()
            tail = torch.linalg.svdvals(losses_seen(layer, parts) @ layer.spread)[latent - steady:].square().sum() / 2
            yield (pairs, latent), (of_pairs + tail).item()
        report(i + 1, len(layers))


def through_norm(layer: Layer, parts: Split, latent: int) -> tuple[Tensor, Tensor, Tensor]:
    """(P [m, D], gains [m], R [D, m]) of read_from_latent(), with the gains of an RMSNorm between the two. It divides
    by the size of the latent, which hangs on the token; where inputs have a channel that is nearly constant, the
    latent's first is that, loud enough to be most of its size, and silent in what is cached."""
    weights, steady = constant(layer)
    P, R = read_from_latent(layer, parts, latent - steady)
    power = (P @ layer.moments.inputs @ P.T).diagonal()
    seen = power > RIDGE * power.max()                     # not all, where inputs are few: layer 0's are the tokens
    sizes = power.clamp(min=0).sqrt() * seen
    P, R = P / torch.where(seen, sizes, torch.inf)[:, None], R * sizes          # channels of mean square 1
    if not steady:
        return P, seen.double().mean().sqrt().expand(latent), R
    loudest = LOUD * latent ** 0.5 * weights
    return torch.cat([loudest[None], P]), F.pad(torch.full((latent - 1,), LOUD), (1, 0)), F.pad(R, (1, 0))


def mla(teacher: GPT, layers: list[Layer], pairs: int, latent: int) -> GPT:
    shape, H, converted = teacher.cfg.attention, teacher.cfg.n_head, []
    w, v, own = shape.paths[0].width, shape.v_width, H // shape.v_groups        # own: query heads of a key head
    cfg = dataclasses.replace(teacher.cfg, attn_mode="mla", kv_lora_rank=latent, rope_dim=2 * pairs, attn_dim=v * H,
                              kv_head=None)
    scale = scale_of(cfg, w)
    for layer in layers:
        shared = shared_keys(layer)
        parts = mla_split(layer, shared, pairs)
        kept, half, rest = parts.kept[0], w // 2, v - parts.keys.size(1)        # rest: channels of zeros
        P, gains, R = through_norm(layer, parts, latent)
        factors = shared.factors[kept].T.conj().repeat_interleave(own, 0)       # [H, pairs]
        turned = torch.complex(layer.wq[:, kept], layer.wq[:, kept + half]) * factors[..., None]      # [H, pairs, D]
        key = shared.keys[kept]
        converted.append({
            "latent.0.weight": P, "latent.1.weight": gains,
            "q.sem.weight": scale * F.pad(parts.queries, (0, 0, 0, rest)).flatten(0, 1),
            "k.sem.weight": F.pad(parts.keys @ R, (0, 0, 0, rest)).repeat_interleave(own, 0).flatten(0, 1),
            "q.geo.weight": scale * torch.cat([turned.real, turned.imag], 1).flatten(0, 1),
            "k.geo.weight": torch.cat([key.real, key.imag]),
            "v.weight": (layer.wv @ R).repeat_interleave(own, 0).flatten(0, 1),
            "o.weight": layer.wo.transpose(0, 1).flatten(1), "inv_freq": layer.inv_freq[parts.kept[:1]]})
    return assemble(teacher, cfg, converted)


def to_mla(teacher: GPT, layers: list[Layer], share: float, report: Report) -> tuple[GPT, dict]:
    (pairs, latent), nats = least(mla_losses(teacher.cfg, layers, share, report), share, "mla")
    return mla(teacher, layers, pairs, latent), dict(pairs=pairs, latent=latent, predicted_nats=nats)


# -----------------------------------------------------------------------------
# The others

def to_latent(teacher: GPT, layers: list[Layer], share: float, report: Report) -> tuple[GPT, dict]:
    pairs, latent, nats = choose(teacher.cfg, layers, share, report)
    return convert(teacher, layers, pairs, latent), dict(pairs=pairs, latent=latent, predicted_nats=nats)


def gqa(teacher: GPT, layers: list[Layer], groups: int) -> GPT:
    """Every key head the mean of those in whose place it stands."""
    shape, H, converted = teacher.cfg.attention, teacher.cfg.n_head, []
    cfg = dataclasses.replace(teacher.cfg, attn_mode="gqa", attn_dim=shape.v_width * H, kv_head=groups)
    for layer in layers:
        k, v = (weight.unflatten(0, (groups, -1)).mean(1).flatten(0, 1) for weight in (layer.wk, layer.wv))
        converted.append({"q.geo.weight": layer.wq.flatten(0, 1), "k.geo.weight": k, "v.weight": v,
                          "o.weight": layer.wo.transpose(0, 1).flatten(1), "inv_freq": layer.inv_freq[None]})
    return assemble(teacher, cfg, converted)


def to_groups(teacher: GPT, layers: list[Layer], share: float, report: Report) -> tuple[GPT, dict]:
    G = teacher.cfg.attention.v_groups
    fitting = [groups for groups in range(1, G + 1) if G % groups == 0 and groups <= share * G + 1e-9]
    if not fitting:
        raise UserError(f"--cache-share {share}: --target gqa keeps at least one of {G} key heads; give {1 / G:.3g}")
    report(1, 1)
    return gqa(teacher, layers, fitting[-1]), dict(key_heads=fitting[-1])


FITTED = ("latent", "per-head", "gqa")                     # by surgery/refit.py, which brings mla nearer on the text
#                                                            that it was fitted on, and further away on another
TARGETS = {"latent": to_latent, "per-head": to_heads, "mla": to_mla, "gqa": to_groups}
