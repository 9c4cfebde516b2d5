"""
What a checkpoint attends to: heat maps per layer and head, entropies, the null token's share, mass over depth.

    python3 vis_heatmap.py --ckpt runs/demo/decoupled --prompt "The red fox. The blue fox. The red" --anchor "The red"
    python3 vis_heatmap.py --ckpt runs/demo/standard --compare runs/demo/decoupled --prompt-file prompt.txt

In --out (assets/heatmap_<run>), of each --layers a layer_<n>.png with a row per head and a column per map, and

    summary.png   entropy of attention per layer and head (nats, mean over queries), the null token's mass per query
    query.png     what --query (default: the last token) attends to, layer by layer, mean over heads
    depth.png     with --anchor: that query's mass on the exemplars (tokens before the anchor's last occurrence), on the
                  target (from the anchor on) and on the null token, per layer; dots are the regions' share of tokens
    heatmap.json  the numbers: entropy and null mass of every layer, head and query, masses of every layer and head

Modes with two score paths show the scaled logits of each, semantic and geometric, their sum, and its softmax. Attention
is computed again from what the attention modules are given; the model itself keeps no attention matrices.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import matplotlib.ticker
import torch

from evals.subject import load_subject
from paper.style import OTHERS, STYLES, save, write_json
from train_dba import Parser, UserError, exit_code, relative, split_heads

MOST_TOKENS = 1024                                         # a larger map has fewer pixels than tokens
MOST_LABELS = 16                                           # of an axis of a small panel
PATHS = {"sem": "semantic score", "geo": "geometric score"}
REGIONS = dict(zip(("exemplar", "target", "null"), zip(OTHERS, STYLES, "os^")))        # {region: colour, style, marker}


# -----------------------------------------------------------------------------
# Attention, computed again

@dataclass
class Maps:
    """Attention of one layer to one prompt; N is 1 with a null token, which then is the first key, else 0.

    scores {path: [H, T, T]}: scaled logits from every query to every key, future ones too; null_score [H, T] or None;
    probs [H, T, N + T]: the softmax of their sum over what a query may see; values [H, N + T, v]."""
    scores: dict
    null_score: torch.Tensor | None
    probs: torch.Tensor
    values: torch.Tensor

    @property
    def null(self):
        return int(self.null_score is not None)

    def entropy(self):
        """Entropy of attention [H, T] in nats, over the keys and the null token."""
        return torch.special.entr(self.probs).sum(-1)

    def null_mass(self):
        """Attention to the null token [H, T], or None without one."""
        return self.probs[..., 0] if self.null else None

    def masses(self, query, anchor):
        """{region: [H]} of one query's attention: tokens before the anchor, from it on, the null token if there is."""
        row = self.probs[:, query]
        split = self.null + anchor
        masses = dict(exemplar=row[:, self.null:split].sum(-1), target=row[:, split:].sum(-1))
        return {**masses, "null": row[:, 0]} if self.null else masses


@torch.no_grad()
def attention_maps(attn, x):
    """Maps of an Attention module for its input x [1, T, D], by the module's own projections."""
    shape, H, T = attn.shape, attn.n_head, x.size(1)
    pos, latent, scores, null_score = torch.arange(T, device=x.device)[None], attn.latent(x), {}, 0.0
    for path in shape.paths:
        q, k, null = attn.project(path, x, latent, pos, absorb=False)
        k = k[0].float().repeat_interleave(H // path.groups, 0)                                   # [H, T, w]
        scores[path.name], null_score = q[0] @ k.mT, null_score + null                            # [H, T, T]
    future = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)
    total = sum(scores.values()).masked_fill(future, -torch.inf)
    values = split_heads(attn.v(latent), shape.v_groups)[0]                                       # [G, T, v]
    if attn.null:
        null_v = attn.null[shape.v_stream]
        null_v = (attn.v(null_v) if shape.latent else null_v).view(shape.v_groups, 1, -1)
        total, values = torch.cat([null_score[0, ..., None], total], -1), torch.cat([null_v, values], 1)
    values = values.float().repeat_interleave(H // shape.v_groups, 0)                             # [H, N + T, v]
    return Maps(scores, null_score[0] if attn.null else None, total.softmax(-1), values)


@torch.no_grad()
def read_maps(model, ids):
    """Maps of every layer for token ids [1, T]."""
    maps, hooks = [], []
    for block in model.blocks:
        hooks.append(block.attn.register_forward_pre_hook(
            lambda attn, inputs: maps.append(attention_maps(attn, inputs[0]))))
    try:
        model.hidden(ids)
    finally:
        for hook in hooks:
            hook.remove()
    return maps


# -----------------------------------------------------------------------------
# A prompt's tokens

def readable(piece):
    """The bytes of a token as a label: blanks and what can't be printed escaped."""
    label = ""
    for character in piece.decode("utf-8", "backslashreplace").replace(" ", "␣"):
        label += character if character.isprintable() else character.encode("unicode_escape").decode()
    return label


def merge_labels(pieces, most=MOST_LABELS, longest=14):
    """[(first token, one past the last, label)] for at most `most` labels of the tokens' bytes. Where there are more
    tokens they share labels, cut before a blank if there is one nearby, and never within a UTF-8 character."""
    size, starts = -(-len(pieces) // most), [0]
    for i, piece in enumerate(pieces):
        length, inside = i - starts[-1], piece[:1] and 0x80 <= piece[0] < 0xC0
        if length >= size and not inside and (size == 1 or piece[:1].isspace() or length >= max(2 * size, 8)):
            starts.append(i)
    labels = []
    for start, end in zip(starts, [*starts[1:], len(pieces)]):
        text = readable(b"".join(pieces[start:end]))
        labels.append((start, end, text if len(text) <= longest else text[:longest - 1] + "…"))
    return labels


def find_anchor(pieces, anchor):
    """The token that holds the start of the anchor's last occurrence in the tokens' text."""
    at, end = b"".join(pieces).rfind(anchor.encode()), 0
    if not anchor or at < 0:
        raise UserError(f"--anchor {anchor!r} is not in the prompt")
    for i, piece in enumerate(pieces):
        end += len(piece)
        if at < end:
            return i


# -----------------------------------------------------------------------------
# What is drawn

@dataclass
class View:
    """A checkpoint and its attention to the prompt: pieces are the tokens' bytes, query and anchor are token numbers
    (anchor None without --anchor)."""
    name: str
    cfg: object
    step: int
    ids: list
    pieces: list
    maps: list
    query: int
    anchor: int | None

    @property
    def title(self):
        return f"{self.name} ({self.cfg.attn_mode})"

    def stacked(self, measure):
        """What measure(maps) gives of every layer, in one tensor [L, ...]."""
        return torch.stack(list(map(measure, self.maps))).cpu()

    def of_query(self):
        """What the query attends to [L, N + tokens up to it], mean over heads."""
        return self.stacked(lambda m: m.probs[:, self.query, :m.null + self.query + 1].mean(0))

    def masses(self):
        """{region: [L, H]} of the query's attention."""
        masses = {}
        for region in self.maps[0].masses(self.query, self.anchor):
            masses[region] = self.stacked(lambda m, region=region: m.masses(self.query, self.anchor)[region])
        return masses


def load_view(ckpt, prompt, anchor, query, device):
    """View of a --ckpt's model. Raises UserError where the prompt doesn't fit."""
    subject = load_subject(ckpt, device)
    try:
        ids = subject.tokenizer.encode(prompt).tolist()
    except UnicodeEncodeError:
        raise UserError("--prompt must be UTF-8 text") from None
    if not 1 <= len(ids) <= MOST_TOKENS:
        raise UserError(f"the prompt has {len(ids):,} tokens; a map can show 1 to {MOST_TOKENS:,}")
    if not -len(ids) <= query < len(ids):
        raise UserError(f"--query {query} is not one of the prompt's {len(ids)} tokens")
    if len(ids) > subject.cfg.block:
        print(f"warning: {len(ids)} tokens go past the {subject.cfg.block} of the training context of {subject.path}",
              file=sys.stderr)
    pieces, query = [subject.tokenizer.decode([i]) for i in ids], query % len(ids)
    at = None if anchor is None else find_anchor(pieces, anchor)
    if at is not None and at > query:
        raise UserError(f"--query {query} is before the anchor, token {at}; nothing of the target is visible to it")
    maps = read_maps(subject.model, torch.tensor([ids], device=subject.device))
    for layer in maps:
        if not layer.probs.isfinite().all():
            raise UserError(f"{subject.path} gives attention that isn't finite: a broken checkpoint?")
    return View(subject.path.resolve().parent.name, subject.cfg, subject.step, ids, pieces, maps, query, at)


def rounded(values):
    """Values of a tensor in as many nested lists, with 6 decimals."""
    if isinstance(values, torch.Tensor):
        values = values.tolist()
    return round(values, 6) if isinstance(values, float) else list(map(rounded, values))


def numbers(view, ckpt):
    """What heatmap.json says of one checkpoint. score_std: standard deviation of a path's visible scores, per head."""
    layers, seen = [], torch.ones(len(view.ids), len(view.ids)).tril().bool()
    for m in view.maps:
        layer = dict(entropy=rounded(m.entropy()), mean_entropy=rounded(m.entropy().mean(1)), score_std={})
        for path, x in m.scores.items():
            layer["score_std"][path] = rounded(x.cpu()[:, seen].std(1, correction=0))
        layer["null_mass"] = rounded(m.null_mass()) if m.null else None
        layer["mean_null_mass"] = rounded(m.null_mass().mean(1)) if m.null else None
        if view.anchor is not None:
            layer.update(mass={}, mean_mass={})
            for region, mass in m.masses(view.query, view.anchor).items():
                layer["mass"][region], layer["mean_mass"][region] = rounded(mass), rounded(mass.mean())
        layers.append(layer)
    return dict(ckpt=relative(str(ckpt)), attn_mode=view.cfg.attn_mode, step=view.step, token_ids=view.ids,
                labels=list(map(readable, view.pieces)), query=view.query, anchor_token=view.anchor, layers=layers)


def token_ticks(axis, labels, null=0, rotation=0, size=6):
    """Label an axis with merged tokens, the null token at -1."""
    places, texts = [-1.0] * null, ["null"] * null
    for start, end, text in labels:
        places.append((start + end - 1) / 2)
        texts.append(text)
    axis.set_ticks(places, texts, fontsize=size, rotation=rotation, fontfamily="monospace", parse_math=False)
    axis.set_tick_params(length=2)


@dataclass
class Column:
    """A map of one layer of a view to draw: values [H, T, keys], NaN for future keys, scores or attention."""
    view: View
    title: str
    values: torch.Tensor
    is_score: bool


def columns(view, layer):
    """The columns of one layer of a view: each path's scores where there are several, their sum, attention."""
    m, T = view.maps[layer], len(view.ids)
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    scores = {}
    if len(m.scores) > 1:
        for path, x in m.scores.items():
            scores[PATHS[path]] = x
    scores["total score" if scores else "score"] = sum(m.scores.values())
    drawn = []
    for title, x in scores.items():
        drawn.append(Column(view, title, x.cpu().masked_fill(future, torch.nan), True))
    mask = torch.cat([torch.zeros(T, m.null, dtype=torch.bool), future], 1)
    return [*drawn, Column(view, "attention", m.probs.cpu().masked_fill(mask, torch.nan), False)]


def colors(column):
    """imshow's settings for a column: up to what half a per cent of all magnitudes exceed, so that outliers don't
    bleach the rest."""
    magnitudes = column.values[column.values.isfinite()].abs().sort().values
    top = magnitudes[int(0.995 * (len(magnitudes) - 1))].item() or 1.0
    if column.is_score:
        return dict(cmap="PuOr_r", vmin=-top, vmax=top)
    return dict(cmap="viridis", norm=matplotlib.colors.PowerNorm(0.5, 0, top))


def draw_layer(views, layer, heads, path):
    """A row per head; per view a column for each path's scores, their sum, and attention. Every column has its own
    scale, below it: next to geometric scores, semantic ones can be too small to see."""
    drawn = []
    for view in views:
        if layer < len(view.maps):
            drawn += columns(view, layer)
    size = (2.2 * len(drawn) + 0.9, 2.2 * len(heads) + 1.6)
    fig, axes = plt.subplots(len(heads), len(drawn), figsize=size, squeeze=False, layout="constrained")
    for i, column in enumerate(drawn):
        first = i == 0 or drawn[i - 1].view is not column.view
        lowest = [head for head in heads if head < column.view.cfg.n_head][-1:]
        for ax, head in zip(axes[:, i], heads):
            if head < column.view.cfg.n_head:
                draw_head(fig, ax, column, head, labelled=first, lowest=[head] == lowest)
            else:
                ax.axis("off")
        if first and heads[0] < column.view.cfg.n_head:
            axes[0, i].annotate(column.view.title, (0, 1.16), xycoords="axes fraction", fontsize=10,
                                fontweight="bold")
    fig.suptitle(f"layer {layer}: rows are queries, columns keys", fontsize=10)
    save(fig, path, dpi=150)


def draw_head(fig, ax, column, head, labelled, lowest):
    """One head's map; tokens at its left side where it is `labelled`, and below it with its scale where `lowest`."""
    T, null = len(column.view.ids), column.values.size(2) - len(column.view.ids)
    labels = merge_labels(column.view.pieces)
    image = ax.imshow(column.values[head].numpy(), extent=(-0.5 - null, T - 0.5, T - 0.5, -0.5), aspect="auto",
                      interpolation="nearest", **colors(column))
    ax.set_facecolor("#dddddd")
    ax.set(xticks=[], yticks=[])
    ax.set_title(f"{column.title}, head {head}", fontsize=8)
    if labelled:
        token_ticks(ax.yaxis, labels)
    if lowest:
        token_ticks(ax.xaxis, labels, null, 90)
        bar = fig.colorbar(image, ax=ax, location="bottom", aspect=15, extend="both" if column.is_score else "max")
        bar.set_label("scaled logit" if column.is_score else "attention (square root)", fontsize=7)
        bar.ax.tick_params(labelsize=6)
        bar.locator = matplotlib.ticker.MaxNLocator(4)


def annotated(fig, ax, values, title, top=None):
    """A layer x head table [L, H] in colours from 0 to `top`, its numbers written in."""
    image = ax.imshow(values.numpy(), cmap="viridis", aspect="auto", vmin=0, vmax=top)
    middle = image.get_clim()[1] / 2
    for layer, row in enumerate(values.tolist()):
        for head, value in enumerate(row):
            ax.text(head, layer, f"{value:.2f}", ha="center", va="center", fontsize=6.5,
                    color="white" if value < middle else "black")
    ax.set(xlabel="head", ylabel="layer", xticks=range(values.size(1)), yticks=range(len(values)))
    ax.set_title(title, fontsize=9)
    fig.colorbar(image, ax=ax)


def draw_summary(views, path):
    """Entropy per layer and head, null mass per layer and head, null mass per query and layer (mean over heads)."""
    width = 3 if any(view.maps[0].null for view in views) else 1
    height = max(2.6, 0.3 * max(len(view.maps) for view in views) + 1.4)
    fig, axes = plt.subplots(len(views), width, figsize=(4.6 * width, height * len(views)), squeeze=False,
                             layout="constrained")
    entropies = [view.stacked(lambda m: m.entropy().mean(1)) for view in views]                # [L, H] each
    largest = max(entropy.max().item() for entropy in entropies)
    for line, view, entropy in zip(axes, views, entropies):
        annotated(fig, line[0], entropy, f"{view.title}\nentropy of attention (nats), mean over queries", largest)
        if not view.maps[0].null:
            for ax in line[1:]:
                ax.axis("off")
                ax.text(0.5, 0.5, "no null token", ha="center", fontsize=9, transform=ax.transAxes)
            continue
        null = view.stacked(Maps.null_mass)                                                    # [L, H, T]
        annotated(fig, line[1], null.mean(2), f"{view.title}\nnull mass, mean over queries")
        for layer, mass in enumerate(null.mean(1)):
            color = plt.cm.viridis(layer / len(view.maps))
            line[2].plot(mass, color=color, linestyle=STYLES[layer % len(STYLES)], linewidth=1.2,
                         label=f"layer {layer}")
        line[2].set(ylim=(0, None), xlim=(-0.5, len(view.ids) - 0.5), ylabel="null mass")
        line[2].set_title(f"{view.title}\nnull mass per query, mean over heads", fontsize=9)
        line[2].legend(fontsize=7, ncols=1 + len(view.maps) // 6)
        line[2].grid(alpha=0.3)
        token_ticks(line[2].xaxis, merge_labels(view.pieces), 0, 90)
    save(fig, path, dpi=150)


def draw_query(views, path):
    """What the query attends to, a row per layer, mean over heads; a line at the anchor."""
    heights = [max(1.2, 0.28 * len(view.maps)) for view in views]
    fig, axes = plt.subplots(len(views), 1, figsize=(9, sum(heights) + 1.3 * len(views)), squeeze=False,
                             layout="constrained", gridspec_kw=dict(height_ratios=heights))
    for (ax,), view in zip(axes, views):
        null, seen, layers = view.maps[0].null, view.query + 1, len(view.maps)
        image = ax.imshow(view.of_query().numpy(), cmap="viridis", aspect="auto", interpolation="nearest",
                          norm=matplotlib.colors.PowerNorm(0.5, 0),
                          extent=(-0.5 - null, seen - 0.5, layers - 0.5, -0.5))
        if view.anchor is not None:
            ax.axvline(view.anchor - 0.5, color="white", linewidth=1.5)
        ax.set(ylabel="layer", yticks=range(layers))
        token = readable(view.pieces[view.query])
        ax.set_title(f"{view.title}: attention of token {view.query} “{token}”, mean over heads", fontsize=9,
                     parse_math=False)
        token_ticks(ax.xaxis, merge_labels(view.pieces[:seen], 60, 20), null, 90, 7)
        fig.colorbar(image, ax=ax, pad=0.01)
    save(fig, path, dpi=150)


def draw_depth(views, anchor, path):
    """Mass of the query's attention per region and layer: mean over heads, smallest to largest head shaded."""
    fig, axes = plt.subplots(1, len(views), figsize=(4.4 * len(views), 3.4), squeeze=False, sharey=True,
                             layout="constrained")
    target = readable(anchor.encode())
    names = dict(exemplar=f"exemplar (before “{target}”)", target=f"target (from “{target}”)", null="null token")
    for ax, view in zip(axes[0], views):
        layers, before = range(len(view.maps)), view.anchor / (view.query + 1)
        share = dict(exemplar=before, target=1 - before)
        for region, heads in view.masses().items():
            color, style, marker = REGIONS[region]
            ax.plot(layers, heads.mean(1), color=color, linestyle=style, marker=marker, markersize=4,
                    label=names[region])
            ax.fill_between(layers, heads.amin(1), heads.amax(1), color=color, alpha=0.13, linewidth=0)
            if region in share:
                ax.axhline(share[region], color=color, linestyle=(0, (1, 3)), linewidth=1)
        ax.set(xlabel="layer", ylim=(0, 1), xticks=layers)
        ax.set_title(f"{view.title}\nattention mass of token {view.query}", fontsize=9)
        ax.grid(alpha=0.3)
        for text in ax.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=3,
                              frameon=False).get_texts():
            text.set_parse_math(False)
    axes[0, 0].set_ylabel("mass (mean over heads, range shaded)")
    save(fig, path, dpi=150)


# -----------------------------------------------------------------------------
# Main

def read_prompt(args):
    if (args.prompt is None) == (args.prompt_file is None):
        raise UserError("give one of --prompt and --prompt-file")
    if args.prompt is not None:
        return args.prompt
    try:
        return Path(args.prompt_file).read_bytes().decode()
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"--prompt-file {args.prompt_file} can't be read as UTF-8 text ({type(e).__name__})") from None


def chosen(name, wanted, count):
    """--layers or --heads as a list, all if none was given."""
    for number in wanted or ():
        if not 0 <= number < count:
            raise UserError(f"--{name} {number} is not one of 0 to {count - 1}")
    return wanted or list(range(count))


def draw(args):
    """Everything for one command line."""
    prompt, views = read_prompt(args), []
    ckpts = [args.ckpt, args.compare] if args.compare else [args.ckpt]
    for ckpt in ckpts:
        views.append(load_view(ckpt, prompt, args.anchor, args.query, args.device))
    layers = chosen("layers", args.layers, max(len(view.maps) for view in views))
    heads = chosen("heads", args.heads, max(view.cfg.n_head for view in views))
    out = Path(args.out or "assets/heatmap_" + "_".join(view.name for view in views))
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"can't make the folder {out} ({e.strerror}); give another --out") from None
    for layer in layers:
        draw_layer(views, layer, heads, out / f"layer_{layer}.png")
    draw_summary(views, out / "summary.png")
    draw_query(views, out / "query.png")
    if args.anchor is not None:
        draw_depth(views, args.anchor, out / "depth.png")
    content = dict(prompt=prompt, anchor=args.anchor, models=list(map(numbers, views, ckpts)))
    write_json(out / "heatmap.json", content)
    print(f"written to {out}: {len(layers)} layers, summary.png, query.png, "
          f"{'depth.png, ' if args.anchor is not None else ''}heatmap.json")


@exit_code("give a shorter --prompt, or fewer --layers")
def main(argv=None):
    parser = Parser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", required=True, help="run folder, checkpoint, .gguf or Hugging Face folder")
    parser.add_argument("--compare", help="another one, drawn beside it")
    parser.add_argument("--prompt", help="text to attend to")
    parser.add_argument("--prompt-file", help="file that holds it")
    parser.add_argument("--anchor", help="where in the prompt the target begins")
    parser.add_argument("--query", type=int, default=-1, help="token whose attention is followed (-1: the last)")
    parser.add_argument("--layers", type=int, nargs="+", help="layers to draw, from 0 (all)")
    parser.add_argument("--heads", type=int, nargs="+", help="heads to draw, from 0 (all)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", help="folder of the results (assets/heatmap_<run>)")
    args = parser.parse_args(argv)
    draw(args)


if __name__ == "__main__":
    sys.exit(main())
