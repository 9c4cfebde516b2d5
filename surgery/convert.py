"""
A Llama as decoupled attention with one latent, in closed form: no step of training.

Of each key head, `pairs` of its RoPE pairs stay geometric, with their own frequencies. The others lose their rotation
and, together with all values, are read from one latent of `latent` channels that all heads share. Each error is counted
in nats, by the Fisher matrix of the layer's output, so that keys and values compete for the latent's channels.

Legend: D stream, H query heads, G key heads, w width of a key, v width of a value, n = w - 2 pairs, m latent, f = w / 2
pairs of a head. Everything is float64.
"""

import dataclasses
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from surgery.calibrate import Moments
from train_dba import GPT, Config, UserError

DAMPING = 0.1                                              # of a Fisher matrix, in units of its mean diagonal
RIDGE = 1e-6                                               # the same of matrices that are inverted


def root(matrix: Tensor, damping: float = 0.0) -> Tensor:
    """Symmetric square root of a positive semidefinite matrix, damped by a share of its mean diagonal."""
    values, vectors = torch.linalg.eigh(matrix + damping * matrix.diagonal().mean() * torch.eye(len(matrix)))
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


@dataclass
class Layer:
    """A teacher's layer in float64, with the moments of its inputs."""
    wq: Tensor                                             # [H, w, D]
    wk: Tensor                                             # [G, w, D]
    wv: Tensor                                             # [G, v, D]
    wo: Tensor                                             # [H, D, v]
    inv_freq: Tensor                                       # [f]
    moments: Moments

    @classmethod
    def of(cls, attn, moments: Moments):
        H, G = attn.n_head, attn.shape.v_groups
        q, k, v = (x.weight.double().unflatten(0, (heads, -1)) for x, heads in (
            (attn.q["geo"], H), (attn.k["geo"], G), (attn.v, G)))
        wo = attn.o.weight.double().unflatten(1, (H, -1)).transpose(0, 1)
        return cls(q, k, v, wo, attn.inv_freq[0].double(), moments)

    def heads(self, group: int) -> range:
        """The query heads that share a key head."""
        share = len(self.wq) // len(self.wk)
        return range(group * share, (group + 1) * share)

    @cached_property
    def weighted_outputs(self) -> Tensor:
        """[H, D, v]: W_o with errors in nats, F^½ W_o."""
        F = self.moments.fisher
        return root(F, DAMPING) @ self.wo

    @cached_property
    def energies(self) -> Tensor:
        """[H]: how many nats the output of a head is worth, E |F^½ W_o z|²."""
        wo, H = self.weighted_outputs, len(self.wo)
        own = self.moments.values.unflatten(0, (H, -1)).unflatten(2, (H, -1))[range(H), :, range(H)]  # [H, v, v]
        return torch.einsum("hdv,hdu,hvu->h", wo, wo, own)

    @cached_property
    def stand_ins(self) -> Tensor:
        """Complex [H, f]: for each query head and pair the constant that is nearest to its rotation, over the distances
        that the head attends to."""
        turns = torch.exp(1j * self.inv_freq[:, None] * torch.arange(self.moments.mass.size(1)))      # [f, T]
        return self.moments.mass.to(turns.dtype) @ turns.T

    @cached_property
    def derotation(self) -> Tensor:
        """[G, f]: nats that it costs to take its rotation from a pair of a key head."""
        C, w = self.moments.inputs, self.wq.size(1)
        size_q, size_k = (torch.einsum("hwd,de,hwe->hw", x, C, x).unflatten(1, (2, -1)).sum(1) for x in (
            self.wq, self.wk))                             # [H, f], [G, f]: E |q|², E |k|² of a pair
        unseen = 1 - self.stand_ins.abs().square()
        cost = self.energies[:, None] * size_q * unseen / (4 * w)             # |q|²|k|² / 2w, and half of that
        return cost.unflatten(0, (len(self.wk), -1)).sum(1) * size_k

    @cached_property
    def spread(self) -> Tensor:
        """[D, D]: square root of the inputs' moments, half centred: softmax doesn't see the mean of keys, values do."""
        return root(self.moments.inputs - torch.outer(self.moments.mean, self.moments.mean) / 2)


@dataclass
class Split:
    """A layer whose key heads kept `pairs` of their pairs: kept [G, pairs]; keys [G, n, D] and folded queries [H, n, D]
    of the others, whose scores need no position."""
    kept: Tensor
    keys: Tensor
    queries: Tensor


def split(layer: Layer, pairs: int, worth: Tensor | None = None) -> Split:
    """Keep the pairs of most worth [G, f], by default of what losing their rotation costs."""
    order = (layer.derotation if worth is None else worth).argsort(1, descending=True)
    stand_ins, half, keys, queries = layer.stand_ins, layer.wq.size(1) // 2, [], []
    for g, dropped in enumerate(order[:, pairs:].sort(1).values):
        keys.append(layer.wk[g][torch.cat([dropped, dropped + half])])
        for h in layer.heads(g):
            a, b = layer.wq[h][dropped], layer.wq[h][dropped + half]            # [n/2, D]: a + ib, times what stands in
            x, y = stand_ins[h][dropped].real[:, None], stand_ins[h][dropped].imag[:, None]
            queries.append(torch.cat([x * a - y * b, y * a + x * b]))
    return Split(order[:, :pairs].sort(1).values, torch.stack(keys), torch.stack(queries))


def losses_seen(layer: Layer, parts: Split) -> Tensor:
    """B [G·n + G·v, D]: |B d|² / 2 is what an error d of an input costs when keys and values are read from it, in
    nats."""
    C, w, of_keys, of_values = layer.moments.inputs, layer.wq.size(1), [], []
    for g in range(len(layer.wk)):
        heads = layer.heads(g)
        scores = sum(layer.energies[h] / w * parts.queries[h] @ C @ parts.queries[h].T for h in heads)          # [n, n]
        of_keys.append(root(scores, RIDGE) @ parts.keys[g] if len(scores) else parts.keys[g])
        reads = sum(layer.weighted_outputs[h].T @ layer.weighted_outputs[h] for h in heads)           # [v, v]
        of_values.append(root(reads, RIDGE) @ layer.wv[g])
    return torch.cat([*of_keys, *of_values])


def predicted_losses(layer: Layer, choices: dict[int, int]) -> dict[int, float]:
    """{pairs: nats} for {pairs: width of the latent}: what losing rotations and channels costs, to second order."""
    derotation, losses = layer.derotation.sort(1, descending=True).values, {}
    for pairs, latent in choices.items():
        seen = losses_seen(layer, split(layer, pairs)) @ layer.spread
        tail = torch.linalg.svdvals(seen)[latent:].square().sum() / 2
        losses[pairs] = (derotation[:, pairs:].sum() + tail).item()
    return losses


def widths(cfg: Config, share: float) -> dict[int, int]:
    """{pairs: latent} that fit into a share of the teacher's cached elements."""
    shape = cfg.attention
    G, w, v = shape.v_groups, shape.paths[0].width, shape.v_width
    room = int(share * G * (w + v) + 1e-9)
    step = max(1, w // 16)                                 # eight numbers of pairs, or a few more
    choices = {pairs: min(room - 2 * pairs * G, cfg.d_model, G * (w - 2 * pairs + v))
               for pairs in range(step, w // 2 + 1, step)}
    choices = {pairs: latent for pairs, latent in choices.items() if latent > 0}
    if not choices:
        raise UserError(f"--cache-share {share} leaves {room} of {G * (w + v)} channels: too few for {G} key heads, "
                        "which take 2 each, and a latent; give more")
    return choices


def choose(cfg: Config, layers: list[Layer], share: float, report=lambda done, total: None):
    """(pairs, latent, predicted nats): the widths, the same for all layers, of the least predicted loss."""
    choices, totals = widths(cfg, share), {}
    for i, layer in enumerate(layers):
        for pairs, nats in predicted_losses(layer, choices).items():
            totals[pairs] = totals.get(pairs, 0.0) + nats
        report(i + 1, len(layers))
    pairs = min(totals, key=totals.get)
    return pairs, choices[pairs], totals[pairs]


def student_config(cfg: Config, pairs: int, latent: int) -> Config:
    """Of the teacher's Config, that of its conversion."""
    shape, H = cfg.attention, cfg.n_head
    rest = max(1, shape.paths[0].width - 2 * pairs)        # of a head; one channel of zeros where all pairs are kept
    return dataclasses.replace(
        cfg, attn_mode="decoupled", sem_dim=rest * H, geo_dim=2 * pairs * H, attn_dim=shape.v_width * H,
        kv_head=shape.v_groups, kv_lora_rank=latent, one_temperature=True)


def read_from_latent(layer: Layer, parts: Split, latent: int) -> tuple[Tensor, Tensor]:
    """(P [m, D], R [D, m]): the latent P x, of whose channels an error costs alike in all, and what it tells of x by
    least squares."""
    B, C = losses_seen(layer, parts), layer.moments.inputs
    P = torch.linalg.svd(B @ layer.spread, full_matrices=False)[0][:, :latent].T @ B
    return P, told_by(P, C)


def told_by(P: Tensor, C: Tensor) -> Tensor:
    """R [n, m]: the x that P x tells of by least squares is R P x. P [m, n], C [n, n]: second moments of x."""
    gram = P @ C @ P.T
    sizes = gram.diagonal().clamp(min=0).sqrt()[:, None]
    sizes = sizes.clamp(min=1e-9 * sizes.max() + 1e-30)    # all channels of like size, however little some say
    gram = gram / sizes / sizes.T + 1e-12 * torch.eye(len(gram))
    return (torch.linalg.solve(gram, P @ C / sizes) / sizes).T


@torch.no_grad()
def convert(teacher: GPT, layers: list[Layer], pairs: int, latent: int, report=lambda done, total: None) -> GPT:
    """The teacher with decoupled attention of these widths. Its other weights are shared, not copied."""
    cfg, w, converted = student_config(teacher.cfg, pairs, latent), teacher.cfg.attention.paths[0].width, []
    scale = scale_of(cfg, w)
    for i, layer in enumerate(layers):
        parts, half = split(layer, pairs), w // 2
        P, R = read_from_latent(layer, parts, latent)
        kept = torch.cat([parts.kept, parts.kept + half], 1)                    # [G, 2 pairs]
        queries = torch.cat([layer.wq[h][kept[g]] for g in range(len(kept)) for h in layer.heads(g)])
        unturned, keys = parts.queries.flatten(0, 1), (parts.keys @ R).flatten(0, 1)
        if not len(unturned):
            unturned, keys = torch.zeros(len(layer.wq), layer.wq.size(2)), torch.zeros(len(layer.wk), latent)
        converted.append({
            "latent.0.weight": P, "q.geo.weight": scale * queries, "q.sem.weight": scale * unturned,
            "k.geo.weight": torch.cat([layer.wk[g][kept[g]] for g in range(len(kept))]), "k.sem.weight": keys,
            "v.weight": (layer.wv @ R).flatten(0, 1), "o.weight": layer.wo.transpose(0, 1).flatten(1),
            "inv_freq": layer.inv_freq[parts.kept]})
        report(i + 1, len(layers))
    return assemble(teacher, cfg, converted)


def scale_of(cfg: Config, w: int) -> float:
    """What queries are multiplied by, so that scores, which are divided by the root of a key's width, keep the size
    that they had at width w."""
    return (sum(path.width for path in cfg.attention.paths) / w) ** 0.5


def assemble(teacher: GPT, cfg: Config, converted: list[dict[str, Tensor]]) -> GPT:
    """The teacher with other attention: converted has the weights of each layer's, by their names in Attention."""
    with torch.device("meta"):
        student = GPT(cfg, teacher.vocab_size)
    state = {name: tensor for name, tensor in teacher.state_dict().items() if ".attn." not in name}
    for i, weights in enumerate(converted):
        state.update({f"blocks.{i}.attn.{name}": tensor.float().contiguous() for name, tensor in weights.items()})
    student.load_state_dict(state, assign=True)
    return student.eval()
