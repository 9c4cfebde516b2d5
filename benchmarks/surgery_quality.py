"""
What conversion to one latent costs a pretrained model, beside what quantising its cache costs, on held-out text.

    python3 benchmarks/surgery_quality.py SmolLM2.gguf --data wiki.train.tokens --text wiki.test.tokens piqa.jsonl \
        --windows 34 9 --healed '50 %, healed=runs/heal50' --out runs/llama/smollm2_135m/surgery.json

--rows says which rows to measure; those of an earlier call stay in the file, which must be of the same windows. All
rows see the same windows of 512 tokens; the first 16 predictions of a window don't count. Per row and text: mean KL of
the next-token distribution to the teacher's, in nats per token, its standard error over windows, and the difference in
nll. A row's bytes are those of a token in a full window, what of it is fp16 included. A .jsonl is PIQA's: its goals
with the right solutions. Weights and activations are float32. The file is written after every window; `windows` and
`kls` say which a row has seen.

Conversions: `latent` is surgery/convert.py's, `fitted` with the output projections of surgery/refit.py. Two controls
keep RoPE on as many pairs but cut each head by itself: `per head` chooses pairs by de-rotation error, folds what stands
in for the others into the queries, and cuts keys by the SVD of whitened queries and keys, values by that of W_o and
W_v; `MHA2MLA-like` is the published recipe (2502.14837) as far as a cache per head goes: pairs of the largest norms, no
fold, the SVD of the key matrix. Its one latent for all heads has an RMSNorm and training behind it, which isn't
compared here. `target per-head`, `target mla` and `target gqa` are surgery/targets.py's, not healed. `KVTC-like` rows
code the teacher's cache by benchmarks/kvtc.py.
"""

import json
import math
import re
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch

from common import parser_of, write
from evals.policy import Policy
from evals.subject import formats_of, load_subject
from kernels.rotate import rotated
from kvtc import coded
from surgery.calibrate import Moments, calibrate
from surgery.convert import Layer, choose, convert, root, split
from surgery.refit import refit_outputs
from surgery.targets import TARGETS
from train_dba import GPT, Config, KVCache, UserError, bytes_per_token, exit_code, progress, read_text

WINDOW, SKIP, CALIBRATED, GRADED, FITTED, NEWEST = 512, 16, 12, 6, 36, 32
RIDGE = 1e-4


# -----------------------------------------------------------------------------
# Controls: a cut per key head

def cut_keys(layer, group, parts, rank, whitened):
    """(of queries, of keys): matrices [rank, n] for the unrotated part of a key head."""
    keys, C, mean = parts.keys[group], layer.moments.inputs, layer.moments.mean
    if not whitened:
        basis = torch.linalg.svd(keys, full_matrices=False)[0][:, :rank].T
        return basis, basis
    spread = root(keys @ (C - torch.outer(mean, mean)) @ keys.T, RIDGE)
    scores = sum(parts.queries[h] @ C @ parts.queries[h].T for h in layer.heads(group))
    basis = torch.linalg.eigh(spread @ scores @ spread)[1][:, -rank:].T
    return basis @ spread, torch.linalg.solve(spread, basis.T).T


def cut_values(layer, width):
    """(W_v [G·width, D], W_o [D, H·width]): values by the SVD of W_o W_v, W_o fitted anew to what the cut tells of all
    averaged values."""
    H, M, cuts, wv = len(layer.wo), layer.moments.values, [], []
    own = M.unflatten(0, (H, -1)).unflatten(2, (H, -1))[range(H), :, range(H)]  # [H, v, v]
    for g, weight in enumerate(layer.wv):
        heads = layer.heads(g)
        spread = root(sum(own[h] for h in heads) / len(heads), RIDGE)
        reads = sum(layer.wo[h].T @ layer.wo[h] for h in heads)
        basis = torch.linalg.eigh(spread @ reads @ spread)[1][:, -width:].T
        cuts += [torch.linalg.solve(spread, basis.T).T] * len(heads)
        wv.append(cuts[-1] @ weight)
    cut, wo = torch.block_diag(*cuts), layer.wo.transpose(0, 1).flatten(1)
    gram = cut @ M @ cut.T
    gram += RIDGE * gram.diagonal().mean() * torch.eye(len(gram))
    return torch.cat(wv), torch.linalg.solve(gram, cut @ M @ wo.T).T


class ByNorm(Layer):
    """A layer whose pairs are worth their norms, and for whose rotation nothing stands in."""
    stand_ins = property(lambda self: torch.ones(len(self.wq), self.wq.size(1) // 2, dtype=torch.complex128))

    @property
    def derotation(self):
        C = self.moments.inputs
        q, k = (torch.einsum("hwd,de,hwe->hw", x, C, x).unflatten(1, (2, -1)).sum(1) for x in (self.wq, self.wk))
        return (q.sqrt().unflatten(0, (len(self.wk), -1)).sum(1) * k.sqrt())


class ByError(Layer):
    """A layer whose pairs are worth their de-rotation errors in scores, all heads counting alike."""
    energies = property(lambda self: torch.ones(len(self.wq), dtype=torch.float64))


def per_head(teacher, layers, pairs, rank, values, kind, whitened):
    """GPT of a cut per key head: pairs, rank and values are widths per head."""
    shape, H = teacher.cfg.attention, teacher.cfg.n_head
    cfg = Config(**{**vars(teacher.cfg), "attn_mode": "decoupled", "sem_dim": rank * H, "geo_dim": 2 * pairs * H,
                    "attn_dim": values * H, "kv_head": shape.v_groups, "one_temperature": True})
    scale, half = ((rank + 2 * pairs) / shape.paths[0].width) ** 0.5, shape.paths[0].width // 2
    student = GPT(cfg, teacher.vocab_size)
    own = {name: tensor for name, tensor in teacher.state_dict().items() if ".attn." not in name}
    student.load_state_dict(own, strict=False, assign=True)
    for layer, block in zip(layers, student.blocks):
        layer = kind(layer.wq, layer.wk, layer.wv, layer.wo, layer.inv_freq, layer.moments)
        parts, queries, turned, keys = split(layer, pairs), [], [], []
        kept = torch.cat([parts.kept, parts.kept + half], 1)
        for g in range(len(kept)):
            of_queries, of_keys = cut_keys(layer, g, parts, rank, whitened)
            keys.append(of_keys @ parts.keys[g])
            for h in layer.heads(g):
                queries.append(scale * of_queries @ parts.queries[h])
                turned.append(scale * layer.wq[h][kept[g]])
        wv, wo = cut_values(layer, values)
        attn = block.attn
        for module, weight in ((attn.q["sem"], torch.cat(queries)), (attn.q["geo"], torch.cat(turned)),
                               (attn.k["sem"], torch.cat(keys)), (attn.v, wv), (attn.o, wo),
                               (attn.k["geo"], torch.cat([layer.wk[g][kept[g]] for g in range(len(kept))]))):
            module.weight = torch.nn.Parameter(weight.float())
        attn.inv_freq = layer.inv_freq[parts.kept].float()
    return student.eval().requires_grad_(False)


# -----------------------------------------------------------------------------
# Rows

class Row(NamedTuple):
    """make: the function that makes the model; formats: of its cache, None for none; residual: how many of the newest
    tokens a query reads in fp16; bits: the share of fp16's bytes where make codes them itself."""
    make: Callable[[], GPT]
    formats: str | None = None
    residual: int = 0
    bits: float | None = None


def rows_of(teacher, layers, windows, healed):
    """{name: Row} of the table; windows() gives those [n, WINDOW + 1] that output projections are fitted on."""
    @cache
    def latent(share):
        pairs, width, _ = choose(teacher.cfg, layers, share)
        return convert(teacher, layers, pairs, width)

    @cache
    def fitted(share):
        cfg = latent(share).cfg
        student = convert(teacher, layers, cfg.attention.paths[-1].width // 2, cfg.kv_lora_rank)
        bar = progress(len(layers), "layer", "fitting outputs")
        refit_outputs(teacher, student, windows()[:, :-1], lambda done, total: bar.update())
        bar.close()
        return student

    @cache
    def turned():
        return rotated(teacher)

    def aimed(target, share):
        return TARGETS[target](teacher, layers, share, lambda done, total: None)[0]

    made = {}
    for share in (0.75, 0.625, 0.5, 0.25):
        made[f"latent {100 * share:g} %"] = partial(latent, share)
        made[f"latent {100 * share:g} %, fitted"] = partial(fitted, share)
    for name, path in healed.items():
        made[f"latent {name}"] = lambda path=path: load_subject(path, "cpu").model
    rows = {"teacher": Row(lambda: teacher)}
    for name, formats in (("q8_0", "q8_0"), ("q4_0", "q4_0"), ("k q4_0, v q3_0", "k=q4_0,v=q3_0"), ("q3_0", "q3_0"),
                          ("k q4_0, v q2_0", "k=q4_0,v=q2_0"), ("k q3_0, v q2_0", "k=q3_0,v=q2_0"), ("q2_0", "q2_0")):
        rows[name] = Row(turned, formats)
        rows[f"{name}, {NEWEST} newest fp16"] = Row(turned, formats, NEWEST)
    for share, eighths in ((75, (2, 2, 6)), (62.5, (2, 2, 4)), (50, (1, 2, 4))):      # of a head: pairs, rank, values
        cut = [teacher.cfg.attention.paths[-1].width * part // 8 for part in eighths]
        rows[f"per head {share} %"] = Row(partial(per_head, teacher, layers, *cut, ByError, True))
        if share == 75:
            rows["MHA2MLA-like 75 %"] = Row(partial(per_head, teacher, layers, *cut, ByNorm, False))
    for target, share in (("per-head", 0.75), ("mla", 0.75), ("per-head", 0.5), ("mla", 0.5), ("gqa", 1 / 3)):
        rows[f"target {target} {100 * share:.3g} %"] = Row(partial(aimed, target, share))
    for bits in (3.5, 2.5, 1.5):                           # a value, as q3_0 and q2_0 have and one less
        whole = (bits * (WINDOW - NEWEST) + 16 * NEWEST) / WINDOW
        make = partial(coded, teacher, layers, bits / 16, NEWEST)
        rows[f"KVTC-like {bits} bits, {NEWEST} newest fp16"] = Row(make, bits=whole / 16)
    for name, make in made.items():
        rows[name] = Row(make)
        rows[f"{name}, q8_0"] = Row(lambda make=make: rotated(make()), "q8_0")
        for residual in (0, NEWEST):
            title = f"{name}, q4_0" + (f", {residual} newest fp16" if residual else "")
            rows[title] = Row(lambda make=make: rotated(make()), "q4_0", residual)
    return rows


def add_rows(parser):
    """The flags of what is measured."""
    parser.add_argument("model", help="the teacher: .gguf file, Hugging Face folder, run folder")
    parser.add_argument("--data", required=True, help="text to calibrate on")
    parser.add_argument("--healed", nargs="*", default=[], metavar="NAME=RUN", help="more rows, called latent NAME")
    parser.add_argument("--rows", default=".*", help="regular expression of the rows' names (all)")
    parser.add_argument("--moments", type=Path, help="file that keeps the moments")


def chosen_rows(args):
    """(Subject of the teacher, {name: Row}) of add_rows()'s flags."""
    subject = load_subject(args.model, "cpu")
    teacher = subject.model.requires_grad_(False)
    if args.moments and args.moments.exists():
        moments = [Moments(**fields) for fields in torch.load(args.moments)]
    else:
        calibration = windows_of(subject.tokenizer, args.data, CALIBRATED)[:, :-1]
        bar = progress(CALIBRATED, "window", "calibrating")
        moments = calibrate(teacher, calibration, GRADED, report=lambda done, total: bar.update())
        bar.close()
        if args.moments:
            torch.save([vars(each) for each in moments], args.moments)
    layers = [Layer.of(block.attn, each) for block, each in zip(teacher.blocks, moments)]
    windows = partial(windows_of, subject.tokenizer, args.data, FITTED)
    rows = rows_of(teacher, layers, windows, dict(pair.split("=", 1) for pair in args.healed))
    return subject, {name: row for name, row in rows.items() if re.fullmatch(args.rows, name)}


def described(row, model, teacher):
    """What a row caches: shares of the teacher's elements and of its fp16 cache's bytes, formats, widths."""
    formats = formats_of(SimpleNamespace(cfg=model.cfg), row.formats or "fp16")
    elements = [sum(each.cfg.attention.streams.values()) for each in (model, teacher)]
    size = Policy(tuple(formats.items()), residual=row.residual).bytes_per_token(model.cfg, WINDOW)
    about = dict(elements=elements[0] / elements[1], bytes=row.bits or size / bytes_per_token(teacher.cfg, "fp16"),
                 formats=formats if row.formats else None, residual=row.residual)
    if model.cfg.attention.latent:
        about.update(pairs=model.cfg.attention.paths[-1].width // 2, latent=model.cfg.attention.latent)
    return about


@torch.inference_mode()
def log_probabilities(model, ids, formats, residual=0):
    """[T, V] of one window of ids [T], through a cache of these formats or None."""
    kept = None if formats is None else KVCache(model.cfg, 1, len(ids), formats, residual)
    return model(ids[None], cache=kept)[0, SKIP:].log_softmax(-1)


# -----------------------------------------------------------------------------
# Text

def windows_of(tokenizer, path, count):
    """[count, WINDOW + 1] token ids of a text's beginning."""
    path = Path(path)
    if path.suffix == ".jsonl":
        items = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        text = "\n".join(f"{item['goal']} {item['sol2' if item['label'] else 'sol1']}" for item in items)
    else:
        text = read_text(path)
    ids = torch.from_numpy(tokenizer.encode(text[:count * WINDOW * 12]).astype("int64"))
    if len(ids) < count * WINDOW + 1:
        raise UserError(f"{path} has {len(ids)} tokens, too few for {count} windows of {WINDOW}")
    return ids[:count * WINDOW + 1].unfold(0, WINDOW + 1, WINDOW)


def figures(losses, teacher_losses, kls):
    """Means over windows of equal size, and the standard error of the KL."""
    kl, nll, base = (torch.tensor(x) for x in (kls, losses, teacher_losses))
    error = kl.std().item() / math.sqrt(len(kl)) if len(kl) > 1 else None
    return dict(kl=kl.mean().item(), kl_se=error, dnll=(nll - base).mean().item(), windows=len(kl), kls=kls,
                teacher_nll=base.mean().item(), tokens=len(kl) * (WINDOW - SKIP))


@exit_code()
def main(argv=None):
    parser = parser_of(__doc__)
    add_rows(parser)
    parser.add_argument("--text", nargs="+", required=True, help="texts to measure on")
    parser.add_argument("--windows", type=int, nargs="+", required=True, help="windows of each")
    args = parser.parse_args(argv)
    subject, rows = chosen_rows(args)
    teacher, models, table = subject.model, {}, {}
    for name, row in rows.items():
        models[name] = row.make()
        table[name] = described(row, models[name], teacher)
    windows = {Path(path).stem: windows_of(subject.tokenizer, path, count)
               for path, count in zip(args.text, args.windows)}
    order = sorted((place / len(each), text, place) for text, each in windows.items() for place in range(len(each)))
    before = json.loads(args.out.read_text()) if args.out and args.out.exists() else {}
    settings = dict(teacher=Path(args.model).name, calibration=Path(args.data).name, window=WINDOW, skipped=SKIP)
    if any(before.get(name, value) != value for name, value in settings.items()):
        raise UserError(f"{args.out} is of other windows; name another --out")
    base = {text: [] for text in windows}
    seen = {(name, text): ([], []) for name in models for text in windows}
    bar = progress(len(order) * (1 + len(models)), "pass", "measuring")
    for _, text, place in order:                           # texts in turn, so that a stopped run has some of each
        window = windows[text][place]
        targets = window[SKIP + 1:, None]
        t = log_probabilities(teacher, window[:-1], None)
        base[text].append(-t.gather(1, targets).mean().item())
        bar.update()
        for name, model in models.items():
            s = log_probabilities(model, window[:-1], table[name]["formats"], table[name]["residual"])
            losses, kls = seen[name, text]
            losses.append(-s.gather(1, targets).mean().item())
            kls.append((t.exp() * (t - s)).sum(-1).mean().item())
            table[name][text] = figures(losses, base[text], kls)
            bar.update()
        write(args.out, torch.device("cpu"), **settings, rows={**before.get("rows", {}), **table})
    bar.close()
    for name, row in table.items():
        print(f"{name}: {row['bytes']:.3f} of the bytes", *(f"{text} KL {row[text]['kl']:.4f}" for text in windows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
