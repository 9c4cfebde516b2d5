"""
KV memory at 128k tokens: what the formula says beside what filled caches take.

    python3 plot_memory.py                                 # the papers' 7B and 1B scales: assets/
    python3 plot_memory.py --ckpt runs/demo/decoupled      # one checkpoint's model: runs/demo/decoupled/mem128k.json

Without --ckpt, the caches of many attention shapes at the two scales are compared, the same formats for all: assets/
fig_memory_128k.png, table_memory.tex and memory.json (memory_<tokens> where --tokens isn't 128k). With --ckpt the
checkpoint's model decodes at that length, attending to every token of a cache that random keys and values fill, while
the device's peak memory is read: mem128k.json.

Of the compared caches one layer is filled, since all are alike, with as many tokens as --memory GiB hold; of a
checkpoint's as many layers as they hold, then as many tokens. What was measured, and the factor to full size, stands
beside the figure. Factors ("times smaller") are the bytes of the other cache over its own:

    architecture          standard fp16 / own fp16
    quantisation          standard fp16 / standard in these formats
    quantisation of own   own fp16 / own in these formats
    end to end            standard fp16 / own in these formats
    control               standard, GQA and MLA in these formats / own in these formats; below 1: own is the larger

For other modes, "these formats" of the policy hetero are q8_0 for keys with RoPE and q4_0 for what else is cached.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from evals.subject import load_subject
from evals.timing import cache_bytes, forget_peak, peak_since
from paper.style import COLORS, MARKERS, NORMAL, REPORTED, clean, latex_table, save, write_json, write_text
from train_dba import (
    CACHE_BLOCK,
    HETERO,
    PREFILL_CHUNK,
    KVCache,
    Parser,
    UserError,
    autocast,
    bytes_per_token,
    cache_formats,
    cache_slots,
    exit_code,
    make_config,
    pick_device,
    pick_dtype,
    provenance,
    relative,
    resolve_kernel,
    synchronize,
)

GIB = 2**30
POLICIES = ("fp16", "q8_0", "q4_0", "hetero")

DBA = dict(attn_mode="decoupled")
SHARED = {                                                 # the baselines, the same flags at every scale
    "standard": {},
    "GQA 32Q/8KV": dict(attn_mode="gqa", kv_head=8),
    "GQA 32Q/4KV": dict(attn_mode="gqa", kv_head=4),
    "MLA 512+64": dict(attn_mode="mla", kv_lora_rank=512, rope_dim=64),
}
CONTROLS = ("standard", "GQA 32Q/4KV", "MLA 512+64")
GROUPED = {"DBA 16+32 a head, 4 groups": dict(DBA, sem_dim=512, geo_dim=1024, kv_head=4)}
SCALES = {
    "7B": dict(layers=32, d_model=4096, n_head=32),        # Llama-7B
    "1B": dict(layers=22, d_model=2048, n_head=32),        # the papers' A100 suite
}
MODELS = {
    "7B": {
        **SHARED,
        "bottleneck 96": dict(attn_mode="bottleneck", attn_dim=96, n_head=16),  # RoPE can't turn 32 heads of 3
        "DBA 32/64/96": dict(DBA, sem_dim=32, geo_dim=64),
        "DBA 256/512/768": dict(DBA, sem_dim=256, geo_dim=512),                 # the papers' attn_dim 768
        **GROUPED,
    },
    "1B": {
        **SHARED,
        "bottleneck 48 a head": dict(attn_mode="bottleneck", attn_dim=1536),
        "DBA 8+32 a head": dict(DBA, sem_dim=256, geo_dim=1024),
        "DBA 16+32 a head": dict(DBA, sem_dim=512, geo_dim=1024),
        **GROUPED,
    },
}
# What the two papers' memory tables say at 128k, in their GB.
PAPERS = {"7B": {"standard": {"fp16": 64}, "GQA 32Q/8KV": {"fp16": 16}, "GQA 32Q/4KV": {"fp16": 8, "q4_0": 2},
                 "MLA 512+64": {"fp16": 4.3}, "bottleneck 96": {"fp16": 1.5}, "DBA 32/64/96": {"q4_0": 0.38},
                 "DBA 256/512/768": {"q4_0": 3.0}}}


# -----------------------------------------------------------------------------
# By formula

def model_configs(scale):
    """{name: Config} of the models that are compared at a scale."""
    return {name: make_config(data="-", **{**SCALES[scale], **flags}) for name, flags in MODELS[scale].items()}


def policies(cfg):
    """The policies that apply to a model."""
    return [policy for policy in POLICIES if cache_formats(cfg, policy)]


def same_formats(cfg, policy):
    """{stream: format} of any model for a policy, hetero too: keys with RoPE as its k_geo, all else as its v."""
    if policy != "hetero":
        return cache_formats(cfg, policy)
    return {name: HETERO["k_geo" if name == cfg.attention.paths[-1].stream else "v"] for name in cfg.attention.streams}


def estimate(cfg, tokens):
    """{policy: bytes of a cache of so many tokens}."""
    return {policy: cache_bytes(cfg, 1, tokens, policy) for policy in policies(cfg)}


def factors(cfg, controls, tokens):
    """{policy: how many times smaller than others a model's cache is}; controls: {name: Config}, "standard" among
    them. The table at the top says what the factors are."""
    def size(other, formats):
        return cache_bytes(other, 1, tokens, formats)

    own, standard, of_policy = size(cfg, "fp16"), controls["standard"], {}
    for policy in policies(cfg):
        quantised, full = size(cfg, policy), size(standard, "fp16")
        of_policy[policy] = dict(
            architecture=full / own, quantisation=full / size(standard, same_formats(standard, policy)),
            quantisation_of_own=own / quantised, end_to_end=full / quantised,
            control={name: size(other, same_formats(other, policy)) / quantised for name, other in controls.items()})
    return of_policy


def describe(name, cfg, controls, tokens, reported):
    """What is reported of one model by formula."""
    per_token = {policy: bytes_per_token(cfg, policy) // cfg.layers for policy in policies(cfg)}
    sizes = estimate(cfg, tokens)
    return dict(name=name, mode=cfg.attn_mode, streams=cfg.attention.streams, layers=cfg.layers,
                elements=sum(cfg.attention.streams.values()), bytes_per_token_and_layer=per_token,
                estimate_bytes=sizes, estimate_gib={policy: n / GIB for policy, n in sizes.items()},
                reported_gb=reported.get(name, {}), factors=factors(cfg, controls, tokens))


# -----------------------------------------------------------------------------
# By measurement

def minus(a, b):
    return None if a is None or b is None else a - b


def what_fits(cfg, policy, tokens, limit):
    """(layers, tokens) of a cache within `limit` bytes: fewer layers first, then fewer tokens; at least 1 and 512."""
    layer = dataclasses.replace(cfg, layers=1)
    layers = max(1, min(cfg.layers, limit // cache_bytes(layer, 1, tokens, policy)))
    slots = max(1, limit // (bytes_per_token(layer, policy) * CACHE_BLOCK)) * CACHE_BLOCK
    return layers, min(tokens, slots)


def fill(cache, tokens):
    """Append random keys and values, of standard deviation 1, for so many tokens to every layer."""
    streams, T = cache.shape.streams, min(tokens, PREFILL_CHUNK)
    generator = torch.Generator(cache.device).manual_seed(0)
    noise = {name: torch.randn(1, T, C, generator=generator, device=cache.device) for name, C in streams.items()}
    for start in range(0, tokens, PREFILL_CHUNK):
        span = cache.begin(min(PREFILL_CHUNK, tokens - start))
        for layer in range(len(cache.layers)):
            cache.append(layer, span, {name: x[:, :span.pos.size(1)] for name, x in noise.items()})
        cache.advance(span)


def warm_up(device):
    """Fill a small cache in every format, so that what libraries load on first use isn't counted as a cache's."""
    cfg = make_config(data="-", layers=1, **DBA)
    for policy in POLICIES:
        fill(KVCache(cfg, 1, CACHE_BLOCK, policy, device=device), CACHE_BLOCK)


def allocate(cfg, tokens, formats, device, kernel=None):
    try:
        return KVCache(cfg, 1, tokens, formats, device=device, kernel=kernel)
    except RuntimeError as e:
        raise UserError(f"no memory for a cache of {tokens:,} tokens ({str(e).splitlines()[0]}); lower --memory"
                        ) from None


def size_of(cfg, cache, tokens, measured_tokens, taken):
    """The part of a measurement that says what was measured, and its size scaled up to all layers and tokens."""
    layers = len(cache.layers)
    factor = cfg.layers / layers * cache_slots(tokens, 0)[0] / cache_slots(measured_tokens, 0)[0]
    return dict(tokens=measured_tokens, layers=layers, scale_factor=factor, owned_bytes=cache.nbytes(),
                scaled_owned_bytes=round(cache.nbytes() * factor), peak=dict(
                    taken_bytes=taken, scaled_taken_bytes=None if taken is None else round(taken * factor)))


def measure_fill(cfg, policy, tokens, limit, device):
    """Bytes that a cache's tensors own, and that the device gave for them (`peak`), once the cache is full. One layer
    is measured, since all have the same streams."""
    layer = dataclasses.replace(cfg, layers=1)
    _, fitting = what_fits(layer, policy, tokens, limit)
    before = forget_peak(device)
    cache = allocate(layer, fitting, policy, device)
    fill(cache, fitting)
    synchronize(device)
    return size_of(cfg, cache, tokens, fitting, minus(forget_peak(device), before))


def measure_decode(model, blocks, policy, tokens, limit, device):
    """The same for a model's cache, and the peak while the model decodes the last of the tokens. model: a GPT, which
    gets as many of its blocks as fit the limit."""
    cfg, formats = model.cfg, cache_formats(model.cfg, policy)
    layers, fitting = what_fits(cfg, policy, tokens, limit)
    model.blocks = blocks[:layers]
    kernel, why = resolve_kernel("auto", device)
    token = torch.zeros(1, 1, dtype=torch.long, device=device)
    before = forget_peak(device)
    cache = allocate(dataclasses.replace(cfg, layers=layers), fitting, formats, device, kernel)
    fill(cache, fitting - 1)
    taken = minus(forget_peak(device), before)

    def step():
        cache.truncate(fitting - 1)
        return model.logits(model.hidden(token, cache))

    for _ in range(2):                                     # a kernel may compile
        step()
    ready = forget_peak(device)
    for _ in range(4):
        finite = step().isfinite().all()
    synchronize(device)
    peak = ready and peak_since(device)
    if not finite:
        raise UserError(f"decoding with a {policy} cache gives numbers that aren't finite: a broken checkpoint?")
    result = size_of(cfg, cache, tokens, fitting, taken)
    result["peak"].update(peak_bytes=peak, decode_extra_bytes=minus(peak, ready))
    return dict(kernel=kernel.name, kernel_why=why, attended_tokens=int(cache.length), **result)


# -----------------------------------------------------------------------------
# The comparison at the papers' scales

def compare(tokens, limit, device):
    """Everything that memory.json holds."""
    warm_up(device)
    all_measured = dict(env=provenance(device), limit_bytes=limit, scales={})
    result = dict(tokens=tokens, batch=1, scales={}, measured=all_measured)
    for scale, shape in SCALES.items():
        configs = model_configs(scale)
        controls = {name: configs[name] for name in CONTROLS}
        rows = [describe(name, cfg, controls, tokens, PAPERS.get(scale, {})) for name, cfg in configs.items()]
        result["scales"][scale] = dict(**shape, rows=rows)
        measured = all_measured["scales"][scale] = {}
        for name, cfg in configs.items():
            measured[name] = {}
            for policy in policies(cfg):
                measured[name][policy] = m = measure_fill(cfg, policy, tokens, limit, device)
                taken = m["peak"]["scaled_taken_bytes"]
                taken = "unknown" if taken is None else f"{taken / GIB:.4g}"
                print(f"{scale} {name} {policy}: {cache_bytes(cfg, 1, tokens, policy) / GIB:.4g} GiB by formula, "
                      f"{m['scaled_owned_bytes'] / GIB:.4g} owned, {taken} taken ({m['tokens']:,} tokens of 1 layer "
                      f"x {m['scale_factor']:.4g})", flush=True)
    return result


def draw(result: dict, path: Path) -> None:
    """A row per model and a dot per format on a log axis, a panel per scale; a tick where the measured cache is, a star
    where the papers have it."""
    fig, axes = plt.subplots(1, len(result["scales"]), figsize=(8, 4.2), layout="constrained", sharex=True)
    for ax, (scale, panel) in zip(axes, result["scales"].items()):
        measured = result["measured"]["scales"][scale]
        for y, row in enumerate(panel["rows"]):
            color = COLORS[row["mode"]]
            sizes = row["estimate_gib"]
            ax.plot([min(sizes.values()), max(sizes.values())], [y, y], color=color, linewidth=0.8, alpha=0.5)
            for policy, gib in sizes.items():
                ax.plot(gib, y, MARKERS[policy], color=color, markersize=5, zorder=3)
                taken = measured[row["name"]][policy]["peak"]["scaled_taken_bytes"]
                if taken is not None:
                    ax.plot(taken / GIB, y, "|", color="#777777", markersize=13, markeredgewidth=0.9, zorder=2)
            for gib in row["reported_gb"].values():
                ax.plot(gib, y + 0.33, **REPORTED)
            ax.text(max(sizes.values()) * 1.25, y, f"{max(sizes.values()):.3g}", va="center", fontsize=7)
            ax.text(min(sizes.values()) / 1.25, y, f"{min(sizes.values()):.3g}", va="center", ha="right", fontsize=7)
        names = [row["name"].replace(" a head", "/head").replace(", ", ",\n") for row in panel["rows"]]
        ax.set_yticks(range(len(names)), names)
        ax.set(xscale="log", ylim=(len(names) - 0.4, -0.6), xlabel="KV cache in GiB, one sequence")
        ax.set_title(f"{scale}: {panel['layers']} layers, d_model {panel['d_model']}", loc="left")
        ax.tick_params(axis="y", length=0)
        ax.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        ax.grid(axis="x", alpha=0.3)
    axes[0].margins(x=0.16)
    handles = [plt.Line2D([], [], marker=MARKERS[policy], linestyle="", color="#555555", label=policy)
               for policy in POLICIES]
    handles.append(plt.Line2D([], [], marker="|", markersize=10, linestyle="", color="#777777",
                              label="filled cache, scaled up"))
    handles.append(plt.Line2D([], [], **REPORTED, label="as the papers report, their GB"))
    fig.legend(handles=handles, loc="outside lower center", ncols=6, columnspacing=1.0, handletextpad=0.3)
    fig.suptitle(f"KV cache at {result['tokens']:,} tokens", fontsize=NORMAL)
    save(fig, path)


def deviation(result):
    """Largest relative difference between taken and estimated bytes over all caches, or None if nothing was taken."""
    deviations = []
    for scale, panel in result["scales"].items():
        for row in panel["rows"]:
            for policy, m in result["measured"]["scales"][scale][row["name"]].items():
                if (taken := m["peak"]["scaled_taken_bytes"]) is not None:
                    deviations.append(abs(taken / row["estimate_bytes"][policy] - 1))
    return max(deviations, default=None)


def latex_row(row: dict) -> list[str]:
    """Cells of the table for one model."""
    f = row["factors"].get("hetero") or row["factors"]["q4_0"]
    gib = [f"{row['estimate_gib'][p]:.3g}" if p in row["estimate_gib"] else "--" for p in POLICIES]
    reported = ", ".join(f"{gb:g} ({policy})" for policy, gb in row["reported_gb"].items()) or "--"
    return [row["name"].replace(" a head", "/head"), f"{row['elements']:,}", *gib, f"{f['architecture']:.3g}",
            f"{f['quantisation']:.3g}", f"{row['factors']['q4_0']['end_to_end']:.3g}", f"{f['end_to_end']:.3g}",
            *(f"{f['control'][name]:.3g}" for name in CONTROLS), reported]


CAPTION = """KV cache at {tokens:,} tokens, one sequence, the scales of quantised blocks included.
Elements are cached per token and layer. A row's policy is hetero for DBA, else q4_0. Factors are how many times
smaller: by architecture alone (standard fp16 over own fp16), by quantisation alone (standard fp16 over standard in the
policy's formats), end to end (standard fp16 over own) in q4_0 and in the policy, and against standard, GQA 32Q/4KV and
MLA 512+64 in the policy's formats, where a factor below 1 means that the row is the larger. Memory that filled caches
took (one layer each, at most {limit:.3g} GiB, scaled up): {off}."""
OVER = (r" & & \multicolumn{4}{c}{GiB} & \multicolumn{2}{c}{alone} & \multicolumn{2}{c}{end to end} & "
        r"\multicolumn{3}{c}{same formats, against} & \\",
        r"\cmidrule(lr){3-6}\cmidrule(lr){7-8}\cmidrule(lr){9-10}\cmidrule(lr){11-13}")
HEAD = ("model", "elements", *POLICIES, "arch.", "quant.", "q4_0", "policy", "standard", "GQA-4", "MLA", "reported GB")


def latex(result: dict) -> str:
    """The comparison as a table."""
    off = deviation(result)
    off = "not measured here" if off is None else f"within {100 * off:.2g} % of the formula"
    caption = CAPTION.format(tokens=result["tokens"], limit=result["measured"]["limit_bytes"] / GIB, off=off)
    rows = []
    for scale, panel in result["scales"].items():
        title = clean(f"{scale} scale: {panel['layers']} layers, d_model {panel['d_model']}, {panel['n_head']} heads")
        rows += [r"\midrule", rf"\multicolumn{{14}}{{l}}{{\emph{{{title}}}}} \\", *map(latex_row, panel["rows"])]
    return latex_table(HEAD, rows[1:], caption, label="tab:memory", wide=True, columns="lr rrrr rrrr rrr l", over=OVER)


def length_name(tokens):
    return f"{tokens // 1024}k" if tokens % 1024 == 0 else str(tokens)


def make_folder(path):
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"can't make the folder {path} ({e.strerror}); give another --out") from None
    return path


def write_comparison(args, device):
    out, length = make_folder(Path(args.out or "assets")), length_name(args.tokens)
    suffix = "" if length == "128k" else f"_{length}"
    result = compare(args.tokens, round((args.memory or 1 / 16) * GIB), device)
    write_json(out / f"memory{suffix}.json", result)
    write_text(out / f"table_memory{suffix}.tex", latex(result))
    draw(result, out / f"fig_memory_{length}.png")
    print(f"written to {out}: memory{suffix}.json, table_memory{suffix}.tex, fig_memory_{length}.png")


# -----------------------------------------------------------------------------
# One checkpoint

def control_configs(cfg):
    """{name: Config} of a model's controls, of its depth and width: standard, GQA with an eighth of the heads, MLA."""
    plain = dict(attn_dim=cfg.d_model, kv_head=None, sem_dim=None, geo_dim=None, tie_qk=False, one_temperature=False)
    standard = dataclasses.replace(cfg, attn_mode="standard", **plain)
    groups, rank, half = max(1, cfg.n_head // 8), max(1, cfg.d_model // 4), 2 * max(1, cfg.d_model // cfg.n_head // 4)
    gqa = dataclasses.replace(cfg, attn_mode="gqa", **{**plain, "kv_head": groups})
    mla = dataclasses.replace(cfg, attn_mode="mla", kv_lora_rank=rank, rope_dim=half, **plain)
    return {"standard": standard, f"GQA {cfg.n_head}Q/{groups}KV": gqa, f"MLA {rank}+{half}": mla}


def decomposition(cfg, controls, measured, tokens, limit, device):
    """Bytes of the caches whose quotients the factors are, by formula and taken when filled, and the factors."""
    bytes_, taken = {}, {}
    for name, other in controls.items():
        for policy in policies(cfg):
            formats = same_formats(other, policy)
            bytes_[f"{name} {policy}"] = cache_bytes(other, 1, tokens, formats)
            filled = measure_fill(other, formats, tokens, limit, device)
            taken[f"{name} {policy}"] = filled["peak"]["scaled_taken_bytes"]
    for policy, of_policy in measured.items():
        bytes_[f"own {policy}"] = cache_bytes(cfg, 1, tokens, policy)
        taken[f"own {policy}"] = of_policy["peak"]["scaled_taken_bytes"]
    return dict(estimate_bytes=bytes_, measured=taken, factors=factors(cfg, controls, tokens))


def report(policy, m, factor):
    """Print what was measured for one policy, which makes the cache `factor` times smaller than standard fp16."""
    def number(n):
        return "unknown" if n is None else f"{n:,}"

    part = ""
    if m["scale_factor"] != 1:
        part = f"; measured {m['tokens']:,} tokens of {m['layers']} layers, x {m['scale_factor']:.4g} for all"
    print(f"{policy}: {m['owned_bytes']:,} bytes owned, {number(m['peak']['taken_bytes'])} taken, a decode step "
          f"{number(m['peak']['decode_extra_bytes'])} more ({m['kernel']}); {factor:.3g} times smaller than standard "
          f"fp16{part}", flush=True)


@torch.inference_mode()
def write_checkpoint(args, device):
    """Measure --ckpt and write mem<length>.json beside it, or in --out."""
    dtype, why = pick_dtype("auto", device)
    subject = load_subject(args.ckpt, args.device, str(dtype).removeprefix("torch."))
    model, limit = subject.model, round((args.memory or 1) * GIB)
    cfg, blocks = model.cfg, model.blocks
    warm_up(device)
    with autocast(device, dtype):
        model.hidden(torch.zeros(1, 1, dtype=torch.long, device=device))
    controls, measured = control_configs(cfg), {}
    for policy, of_policy in factors(cfg, controls, args.tokens).items():
        with autocast(device, dtype):
            measured[policy] = measure_decode(model, blocks, policy, args.tokens, limit, device)
        report(policy, measured[policy], of_policy["end_to_end"])
    parts = decomposition(cfg, controls, measured, args.tokens, limit, device)
    out = make_folder(Path(args.out or subject.folder)) / f"mem{length_name(args.tokens)}.json"
    write_json(out, dict(tokens=args.tokens, batch=1, ckpt=relative(str(subject.path)), step=subject.step,
                         config=dataclasses.asdict(cfg), dtype=f"{dtype} ({why})", limit_bytes=limit,
                         estimate_bytes=estimate(cfg, args.tokens), measured=measured, decomposition=parts,
                         env=provenance(device)))
    print(f"written to {out}")


# -----------------------------------------------------------------------------
# Main

def parse_args(argv):
    parser = Parser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", help="run folder, checkpoint, .gguf or Hugging Face folder to measure")
    parser.add_argument("--tokens", type=int, default=131_072, help="length of the context (131072)")
    parser.add_argument("--memory", type=float, help="largest cache that is filled, in GiB (1/16; with --ckpt 1)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", help="folder of the results (assets, or the checkpoint's)")
    return parser.parse_args(argv)


@exit_code("lower --tokens or --memory")
def main(argv=None):
    args = parse_args(argv)
    if args.tokens < 2:
        raise UserError(f"--tokens {args.tokens} must be at least 2")
    if args.memory is not None and not 0 < args.memory < float("inf"):
        raise UserError(f"--memory {args.memory} must be above 0")
    device = pick_device(args.device)
    (write_checkpoint if args.ckpt else write_comparison)(args, device)


if __name__ == "__main__":
    sys.exit(main())
