"""Effective rank of queries and keys per layer, by named definitions, beside that at initialisation."""

import contextlib
import dataclasses
import itertools
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from evals.subject import (
    Progress,
    Report,
    Subject,
    check_out,
    held_out,
    load_subject,
    quiet,
    result_path,
    text_table,
    write_result,
)
from train_dba import GPT, UserError, autocast, write_whole

DEFINITIONS = {
    "entropy_rank_sigma": "exp(-sum p ln p), p = sigma / sum(sigma), sigma = sqrt(lambda)",
    "entropy_rank_lambda": "exp(-sum p ln p), p = lambda / sum(lambda)",
    "participation_ratio": "sum(lambda)^2 / sum(lambda^2)",
    "stable_rank": "sum(lambda) / max(lambda)",
    "k90": "fewest eigenvalues that hold 90 % of sum(lambda)",
    "k95": "fewest eigenvalues that hold 95 % of sum(lambda)",
    "k99": "fewest eigenvalues that hold 99 % of sum(lambda)",
    "Q, K": "lambda: eigenvalues of the second moment of a token's queries or keys; queries carry their path's scale "
            "and the temperature. These ranks depend on the basis: (Q A, K A^-T) gives the same scores",
    "QK": "sigma: singular values of Sq^(1/2) Sk^(1/2) of one head, Sq and Sk the second moments of its queries and "
          "keys; lambda = sigma^2. No change of basis alters them",
    "share": "sum of the first r lambda of QK over all of them: of E[(q.k)^2] over independent queries and keys, what "
             "the best score of width r per head keeps",
    "left_out": "sum of all but the first 1, 2, ... lambda of QK over all of them, median over the query heads",
    "merged": "all heads as one vector, a key that several heads share once",
    "head": "median over the query heads",
    "path": "sem, geo; total: both paths of a head as one vector (all there is, where a mode has one path)",
    "rope": "before, after; none: this path isn't rotated",
}
COLUMNS = {"entropy_rank_sigma": "entropy sigma", "entropy_rank_lambda": "entropy lambda",
           "participation_ratio": "participation", "stable_rank": "stable", "k90": "k90", "k95": "k95", "k99": "k99"}
SHARE_WIDTHS = (4, 8, 16, 32)
TOKENS_PER_CHANNEL = 10                                    # fewer would bend the small eigenvalues


# -----------------------------------------------------------------------------
# Definitions

def effective_ranks(eigenvalues: torch.Tensor) -> dict[str, torch.Tensor]:
    """{measure: [...]} of eigenvalues [..., n] >= 0 in descending order, as DEFINITIONS has them."""
    p, q = (x / x.sum(-1, keepdim=True) for x in (eigenvalues, eigenvalues.sqrt()))
    ranks = dict(entropy_rank_sigma=torch.special.entr(q).sum(-1).exp(),
                 entropy_rank_lambda=torch.special.entr(p).sum(-1).exp(),
                 participation_ratio=1 / p.square().sum(-1), stable_rank=1 / p[..., 0])
    for share in (90, 95, 99):
        ranks[f"k{share}"] = (p.cumsum(-1) < share / 100 - 1e-9).sum(-1) + 1
    return ranks


def eigenvalues_of(moment: torch.Tensor) -> torch.Tensor:
    """Eigenvalues [..., n] of symmetric [..., n, n], descending, without the rounding below zero."""
    return torch.linalg.eigvalsh(moment).flip(-1).clamp(min=0)


def product_spectrum(of_q: torch.Tensor, of_k: torch.Tensor) -> torch.Tensor:
    """Singular values [..., n] of Sq^(1/2) Sk^(1/2), descending, for second moments Sq, Sk [..., n, n]."""
    (a, u), (b, v) = torch.linalg.eigh(of_q), torch.linalg.eigh(of_k)
    a, b = a.clamp(min=0).sqrt(), b.clamp(min=0).sqrt()
    return torch.linalg.svdvals(a[..., None] * (u.mT @ v) * b[..., None, :])    # less two rotations, which change none


# -----------------------------------------------------------------------------
# Second moments

@contextlib.contextmanager
def watch_projections(model: GPT, see: Callable):
    """While open, every attention layer calls see(layer, path, (q, k) before RoPE, (q, k) after it) for each of its
    paths, q [B, H, T, w] scaled, k [B, G, T, w]. The layers themselves keep nothing."""
    def watched(layer, project):
        def call(path, *rest):
            projected = project(path, *rest)
            see(layer, path, project(dataclasses.replace(path, rotate=False), *rest)[:2], projected[:2])
            return projected
        return call

    for layer, block in enumerate(model.blocks):
        block.attn.project = watched(layer, block.attn.project)
    try:
        yield
    finally:
        for block in model.blocks:
            del block.attn.project                         # what the instance hid: the method of the class


class Moments:
    """Second moments over tokens, in float64, of the queries and keys of every layer.

    A token's vector is that of all heads, path after path: [H·r | H·p] for queries, [G·r | G·p] for keys.
    sums[layer, side, rotated] = (sum of x xᵀ [C, C], sum of x [C]), side 0: queries, 1: keys.
    """

    def __init__(self, cfg, device: torch.device):
        self.paths, self.sums, self.tokens, self.parts = cfg.attention.paths, {}, 0, []
        self.device = "cpu" if device.type == "mps" else device                 # where there is float64

    def see(self, layer: int, path, plain: tuple, rotated: tuple) -> None:
        self.parts.append((plain, rotated))
        if path.name != self.paths[-1].name:
            return
        for side, after in itertools.product((0, 1), (False, True)):
            columns = [part[after][side].transpose(1, 2).flatten(2) for part in self.parts]
            x = torch.cat(columns, 2).flatten(0, 1).to(self.device).double()    # [B·T, C]
            old = self.sums.get((layer, side, after), (0.0, 0.0))
            self.sums[layer, side, after] = old[0] + x.T @ x, old[1] + x.sum(0)
        self.tokens += len(x) if layer == 0 else 0
        self.parts = []

    def matrix(self, layer: int, side: int, rotated: bool, centred: bool) -> torch.Tensor:
        """Second moment [C, C] of a layer's queries or keys, about their mean where centred."""
        product, total = (x / self.tokens for x in self.sums[layer, side, rotated])
        product = product - torch.outer(total, total) if centred else product
        if not product.isfinite().all() or product.trace() <= 0:
            name = ("queries", "keys")[side]
            raise UserError(f"layer {layer}: the {name} are zero, infinite or NaN: a broken checkpoint")
        return product


def channels(shape, n_head: int) -> dict[str, list[torch.Tensor]]:
    """{path: (query channels [H, w], key channels [H, w])}: where the vectors of Moments hold what a query head reads.
    """
    places, start = {}, [0, 0]
    for path in shape.paths:
        places[path.name] = []
        for side, heads in enumerate((n_head, path.groups)):
            ids = start[side] + torch.arange(heads * path.width).view(heads, -1)
            start[side] += ids.numel()
            places[path.name].append(ids.repeat_interleave(n_head // heads, 0))
    total = [torch.cat(ids, 1) for ids in zip(*places.values())]
    return {**places, "total": total} if len(places) > 1 else {"total": total}


# -----------------------------------------------------------------------------
# Records

def six_digits(x: torch.Tensor):
    """A tensor as a number or nested lists, six significant digits each."""
    return [six_digits(row) for row in x] if x.dim() else float(f"{x.item():.6g}")


def rank_numbers(eigenvalues: torch.Tensor) -> dict[str, float]:
    """Effective ranks of eigenvalues [n], or their medians over heads [H, n], as numbers."""
    numbers = {}
    for name, x in effective_ranks(eigenvalues).items():
        numbers[name] = six_digits(x.double().quantile(0.5) if x.dim() else x)
    return numbers


def product_record(heads: list[torch.Tensor]) -> dict:
    """The record of QK for second moments [H, w, w] of queries and of keys."""
    energy = product_spectrum(*heads).square()                                  # [H, w]
    energy = energy / energy.sum(1, keepdim=True)
    share, least_share = {}, {}
    for r in SHARE_WIDTHS:
        kept = energy[:, :r].sum(1)
        share[r], least_share[r] = six_digits(kept.quantile(0.5)), six_digits(kept.min())
    beyond = energy.flip(1).cumsum(1).flip(1)[:, 1:]                            # [H, w - 1]
    beyond = beyond.quantile(0.5, 0) if beyond.numel() else energy.new_empty(0)
    return dict(of="QK head", channels=energy.size(1), ranks=rank_numbers(energy), share=share,
                least_share=least_share, left_out=six_digits(beyond), spectrum=energy.float().numpy(force=True))


def layer_ranks(moments: Moments, cfg, layer: int, centred: bool) -> Iterator[dict]:
    """Yield a record per path, stage of RoPE and matrix of one layer; spectrum: an array [channels] of what is merged,
    [H, channels] of QK."""
    turned = {path.name: path.rotate for path in cfg.attention.paths}
    turned["total"] = any(turned.values())
    for name, ids in channels(cfg.attention, cfg.n_head).items():
        for rope, after in (("before", False), ("after", True)) if turned[name] else (("none", False),):
            place, heads = dict(layer=layer, path=name, rope=rope), []
            for side, of in enumerate("QK"):
                moment, own = moments.matrix(layer, side, after, centred), ids[side].to(moments.device)
                merged = own.unique()
                values = eigenvalues_of(moment[merged[:, None], merged])
                heads.append(moment[own[:, :, None], own[:, None]])             # [H, w, w]
                yield dict(place, of=f"{of} merged", channels=len(merged), ranks=rank_numbers(values),
                           spectrum=(values / values.sum()).float().numpy(force=True))
                yield dict(place, of=f"{of} head", channels=own.size(1),
                           ranks=rank_numbers(eigenvalues_of(heads[side])))
            yield dict(place, **product_record(heads))


@torch.inference_mode()
def measure_ranks(subject: Subject, model: GPT, batches: list[torch.Tensor], centred: bool = False,
                  report: Report = quiet) -> list[dict]:
    """Records of all layers of a model, over batches of token ids [B, T]."""
    moments = Moments(model.cfg, subject.device)
    steps = len(batches) + model.cfg.layers
    with watch_projections(model, moments.see), autocast(subject.device, subject.dtype):
        for i, batch in enumerate(batches):
            model.hidden(batch.to(subject.device))
            report(i + 1, steps)
    records = []
    for layer in range(model.cfg.layers):
        records += layer_ranks(moments, model.cfg, layer, centred)
        report(len(batches) + layer + 1, steps)
    return records


def initial_model(subject: Subject) -> GPT:
    """The model as it was before its first step, the same settings and seed; of a pretrained Llama, one of its shape
    that train_dba.py would begin with."""
    torch.manual_seed(subject.cfg.seed)
    return GPT(subject.cfg, subject.model.vocab_size).init_weights().to(subject.device).eval()


def spread_windows(ids: torch.Tensor, tokens: int, block: int) -> torch.Tensor:
    """Windows [n, block] that don't overlap, spread evenly over ids [N]: at least `tokens` tokens, if there are."""
    block = min(block, len(ids))
    count = min(-(-tokens // block), len(ids) // block)
    starts = torch.linspace(0, len(ids) - block, count, dtype=torch.float64).long()
    return torch.stack([ids[start:start + block] for start in starts])


def take_spectra(records: dict[str, list[dict]]) -> dict[str, np.ndarray]:
    """The spectra of {stage: records}, out of the records, as {stage/path/rope/of: [layers, ...]}."""
    spectra = {}
    for stage, of_stage in records.items():
        for record in of_stage:
            if "spectrum" in record:
                name = "/".join((stage, record["path"], record["rope"], record["of"]))
                spectra.setdefault(name, []).append(record.pop("spectrum"))
    return {name: np.stack(layers) for name, layers in spectra.items()}


def write_spectra(path: Path, spectra: dict[str, np.ndarray]) -> None:
    def write(temporary: Path) -> None:
        with open(temporary, "wb") as f:
            np.savez_compressed(f, **spectra)

    write_whole(path, write)


# -----------------------------------------------------------------------------
# Table

def by_place(records: list[dict]) -> dict[tuple, list[dict]]:
    """{(path, rope, of, channels): the records of all layers}, in the order of the first layer."""
    places = {}
    for record in records:
        places.setdefault((record["path"], record["rope"], record["of"], record["channels"]), []).append(record)
    return places


def median_of(layers: list[dict], numbers: str, name: str | int) -> float:
    return statistics.median(record[numbers][name] for record in layers)


def rank_table(trained: list[dict], initial: list[dict]) -> list[tuple]:
    """(head, *rows): medians over layers, trained / at initialisation."""
    rows = [("path", "RoPE", "of", "channels", *COLUMNS.values(), *(f"share {r}" for r in SHARE_WIDTHS))]
    start = by_place(initial)
    for place, layers in by_place(trained).items():
        cells = []
        for name in COLUMNS:
            cells.append(f"{median_of(layers, 'ranks', name):.1f} / {median_of(start[place], 'ranks', name):.1f}")
        for r in SHARE_WIDTHS:
            cells.append(f"{median_of(layers, 'share', r):.3f} / {median_of(start[place], 'share', r):.3f}"
                         if "share" in layers[0] else "")
        rows.append((*place, *cells))
    return rows


def windows_for(subject: Subject, ids: torch.Tensor, tokens: int | None, block: int) -> torch.Tensor:
    """Windows [n, block] of ids [N] for spectra of this model. Raises UserError where they hold too few tokens."""
    width = subject.cfg.n_head * sum(path.width for path in subject.cfg.attention.paths)
    least = TOKENS_PER_CHANNEL * width
    need = f"spectra of {width} channels need at least {least}"
    if (tokens or least) < least:
        raise UserError(f"--max-tokens {tokens}: {need} tokens")
    if len(ids) < least:
        raise UserError(f"{len(ids)} tokens to measure: {need}")
    parts = spread_windows(ids, tokens or 2 * least, block)
    if parts.numel() < least:
        raise UserError(f"{parts.numel()} tokens in whole windows of {parts.size(1)}: {need}; shorten --block")
    return parts


def main(args) -> None:
    """Effective rank of queries and keys per layer, by named definitions, beside that at initialisation."""
    check_out(args.out)
    subject = load_subject(args.ckpt, args.device, args.dtype)
    held = held_out(subject, args.data)
    parts = windows_for(subject, held.ids, args.tokens, args.block or subject.cfg.block)            # [n, block]
    batches, records = parts.split(args.batch_size), {}
    for stage, model in (("trained", subject.model), ("initial", initial_model(subject))):
        with Progress("batch or layer", stage) as report:
            records[stage] = measure_ranks(subject, model, batches, args.centred, report)
    moment = "about the mean" if args.centred else "not centred"
    path = result_path(args.out, subject, "eval_rank")
    print(f"medians over layers, trained / at initialisation; second moments {moment}")
    print(text_table(rank_table(**records)))
    write_spectra(path.with_suffix(".npz"), take_spectra(records))
    write_result(path, subject, vars(args), dict(definitions=DEFINITIONS, moment=moment, tokens=parts.numel(),
                                                 block=parts.size(1), data_sha256=held.sha256, **records))
    print(f"written to {path}")
