"""
Float64 reference of the attention modes and of the whole model, written from the papers' formulas, one head and one
explicit score matrix at a time. It shares no code with train_dba.py: it sees only weights by name and the settings of a
case.
"""

import functools
import itertools
import math
from unittest import mock

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import train_dba as dba

# The settings that make a mode. Widths per head differ between paths and values wherever a mode allows it.
MODES = {
    "standard":      dict(attn_mode="standard", n_head=4, d_model=32),                   # 8
    "bottleneck":    dict(attn_mode="bottleneck", n_head=4, d_model=24, attn_dim=16),              # 4
    "decoupled":     dict(attn_mode="decoupled", n_head=4, d_model=24, sem_dim=16, geo_dim=32),  # 4, 8, 12
    "decoupled_gqa": dict(attn_mode="decoupled", n_head=4, d_model=24, sem_dim=12, geo_dim=24, attn_dim=20, kv_head=2),
    "decoupled_latent": dict(attn_mode="decoupled", n_head=6, d_model=24, sem_dim=24, geo_dim=36, attn_dim=42,
                             kv_head=3, kv_lora_rank=14),  # 4, 6, 7, two heads a group
    "gqa":           dict(attn_mode="gqa", n_head=6, d_model=24, attn_dim=36, kv_head=2),   # 6, three heads a group
    "mla":           dict(attn_mode="mla", n_head=4, d_model=24, attn_dim=32, kv_lora_rank=12, rope_dim=6),
}
VOCAB = 50
UNGROUPED = ("standard", "bottleneck", "decoupled")        # where --tie-qk is allowed


def settings(mode, **flags):
    """Settings of a mode, with a coarse epsilon and a short RoPE base: a test notices if either is not passed on."""
    return {**MODES[mode], **dict(norm_eps=1e-2, rope_base=500.0, layers=2, d_ff=40, block=64), **flags}


def config(given):
    unread = "rope_base" if given.get("rope") is False else ""
    return dba.make_config(data="none", **{name: value for name, value in given.items() if name != unread})


def null_and_tie():
    """(mode, null_attn, tie_qk) wherever they are allowed together."""
    return [(m, n, t) for m, n, t in itertools.product(MODES, (False, True), (False, True)) if m in UNGROUPED or not t]


def randomize(module, seed=0, gain=1.5):
    """Weights that give scores of order 1 to 3, where a wrong scale moves outputs by tens of per cent."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            if "log_temp" in name:
                p.copy_(0.4 * noise)
            elif "norm" in name or "latent.1" in name:
                p.copy_(1 + 0.3 * noise)
            elif "null" in name or "embed.weight" in name:
                p.copy_(noise)
            else:
                p.copy_(noise * (gain if ".q." in name or name.startswith("q.") else 1.0) / math.sqrt(p.size(1)))
    return module


def weights(module):
    """{name: float64 leaf} of a module's parameters; a tied projection has one name, that of the query."""
    return {name: p.detach().double().clone().requires_grad_() for name, p in module.named_parameters()}


def rotate(x, base):
    """RoPE of x [T, p]: channels i and i + p/2 are a complex number, turned by t · base^(-2i/p)."""
    T, p = x.shape
    i = torch.arange(p // 2, dtype=torch.float64)
    turn = torch.polar(torch.ones(T, p // 2, dtype=torch.float64),
                       torch.arange(T, dtype=torch.float64)[:, None] * base ** (-2 * i / p))
    z = torch.complex(x[:, :p // 2].contiguous(), x[:, p // 2:].contiguous()) * turn
    return torch.cat([z.real, z.imag], 1)


def rms_norm(x, gain, eps):
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * gain


def softmax_rows(scores):
    e = torch.exp(scores - scores.max(-1, keepdim=True).values.detach())
    return e / e.sum(-1, keepdim=True)


def attention(w, x, given, see=lambda row, stream, values: values):
    """Attention of x [B, T, D] with weights w by name. Returns the output and all scores that entered a softmax.

    see(row, stream, values [T, C]): what a cache keeps of values, [T, C] or, if that depends on the query, [T, T, C].
    """
    mode, H = given["attn_mode"], given["n_head"]
    mla, null, base = mode == "mla", given.get("null_attn", False), given["rope_base"]
    latent = "latent.0.weight" in w
    turn = given.get("turn", lambda n: torch.eye(n, dtype=torch.float64))       # [n, n], after RoPE
    names = [name for name in ("sem", "geo") if f"q.{name}.weight" in w]
    stream = dict(sem="k_sem", geo="k_rope" if mla else "k_geo" if len(names) == 2 else "k")
    if latent:                                             # in place of these keys
        del stream["sem"]
    G = given.get("kv_head") or H
    width = {name: w[f"q.{name}.weight"].size(0) // H for name in names}
    v_width = w["o.weight"].size(1) // H
    rows, seen = [], []
    for row, sequence in enumerate(x):
        T = len(sequence)
        source = sequence
        if latent:
            source = sequence @ w["latent.0.weight"].T
            source = rms_norm(source, w["latent.1.weight"], given["norm_eps"]) if mla else source
            source = see(row, "latent", source)
        keys = {}
        for name in names:
            k = (source if name == "sem" else sequence) @ w.get(f"k.{name}.weight", w[f"q.{name}.weight"]).T  # or tied
            if name == "geo" and given.get("rope", True):
                k = torch.cat([rotate(head, base) @ turn(width[name]) for head in k.split(width[name], 1)], 1)
            keys[name] = see(row, stream[name], k) if name in stream else k         # [(T,) T, C]
        merged = source @ w["v.weight"].T if latent else see(row, "v", source @ w["v.weight"].T)
        heads = []
        for h in range(H):
            g = h // (H // G)                              # neighbouring heads share a group
            total, null_total = 0.0, 0.0
            for name in names:
                n, wq = width[name], w[f"q.{name}.weight"]
                wk = w.get(f"k.{name}.weight", wq)         # absent: tied
                key_head = 0 if mla and name == "geo" else g
                mine = slice(key_head * n, (key_head + 1) * n)
                q = sequence @ wq[h * n:(h + 1) * n].T                              # [T, n]
                scale = math.sqrt(sum(width.values()) if mla or given.get("one_temperature") else n)
                if null:
                    if latent and name == "sem":
                        null_k = wk[mine] @ w["null.latent"]
                    else:
                        null_k = w[f"null.{stream[name]}"][mine]
                    null_total = null_total + q @ null_k / scale                    # [T]
                if name == "geo" and given.get("rope", True):
                    q = rotate(q, base) @ turn(n)
                total = total + (q[:, None] * keys[name][..., mine]).sum(-1) / scale                # [T, T]
            temperature = torch.exp(w["log_temp"][h]) if "log_temp" in w else 1.0
            scores = (total * temperature).masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf)
            mine = slice(g * v_width, (g + 1) * v_width)
            values = merged[..., mine]                     # [(T,) T, v]
            if null:
                null_v = w["v.weight"][mine] @ w["null.latent"] if latent else w["null.v"][mine]
                scores = torch.cat([(null_total * temperature)[:, None], scores], 1)
                values = torch.cat([null_v.expand(*values.shape[:-2], 1, -1), values], -2)
            seen.append(scores[scores.isfinite()].detach())
            heads.append((softmax_rows(scores)[..., None] * values).sum(-2))        # [T, v]
        rows.append(torch.cat(heads, 1) @ w["o.weight"].T)
    return torch.stack(rows), torch.cat(seen)


def gpt(w, idx, given, vocab_size, see=lambda layer, row, stream, values: values):
    """Logits [B, T, V] of the pre-norm transformer with a tied, optionally factorised embedding. see: as attention()
    takes it, and the layer."""
    eps = given["norm_eps"]
    x = w["embed.weight"][idx]
    if "embed_up.weight" in w:
        x = x @ w["embed_up.weight"].T
    for layer in range(given["layers"]):
        prefix = f"blocks.{layer}."
        attn = {name.removeprefix(prefix + "attn."): p for name, p in w.items() if name.startswith(prefix + "attn.")}
        h = rms_norm(x, w[prefix + "attn_norm.weight"], eps)
        x = x + attention(attn, h, given, functools.partial(see, layer))[0]
        h = rms_norm(x, w[prefix + "mlp_norm.weight"], eps)
        up = h @ w[prefix + "mlp.up.weight"].T
        if given.get("mlp", "swiglu") == "swiglu":
            gate = h @ w[prefix + "mlp.gate.weight"].T
            up = gate / (1 + torch.exp(-gate)) * up
        else:
            up = up * 0.5 * (1 + torch.erf(up / math.sqrt(2)))
        x = x + up @ w[prefix + "mlp.down.weight"].T
    x = rms_norm(x, w["norm.weight"], eps)
    if "embed_down.weight" in w:
        x = x @ w["embed_down.weight"].T
    return x @ w["embed.weight"][:vocab_size].T


# --- quantisers: gguf's, and those that it lacks from their definitions

QUANTISED = ("q8_0", "q4_0", "q4_sym", "nf4", "q3_0", "q2_0")
QUANTILES = [torch.special.ndtri(torch.linspace(0.9677083, 0.5, n, dtype=torch.float64))[:-1] for n in (8, 9)]
LEVELS = {                                                 # of a code, in units of the scale; nf4: of a normal variable
    "q8_0": np.arange(-127, 128), "q4_0": np.arange(-8, 8), "q4_sym": np.arange(-7, 8),
    "nf4": np.sort(np.concatenate([-QUANTILES[0].numpy(), [0], QUANTILES[1].numpy()])) / float(QUANTILES[1].max()),
    "q3_0": np.arange(-4, 4), "q2_0": np.arange(-2, 2),
}
TOP = {"q8_0": 127, "q4_0": 8, "q4_sym": 7, "nf4": 1, "q3_0": 4, "q2_0": 2}     # a block's largest value in its scales
SIGNED = ("q4_0", "q3_0", "q2_0")                          # whose scale has the sign that makes that the lowest code


def quantised(x, fmt):
    """What x [..., C] reads as, float32, after a cache of this format, in blocks of 32 channels with float16 scales."""
    if fmt in ("fp32", "bf16", "fp16"):
        return x.to(dict(fp32=torch.float32, bf16=torch.bfloat16, fp16=torch.float16)[fmt]).float()
    if not len(x):
        return x
    C = x.size(-1)
    blocks = np.pad(x.detach().float().reshape(-1, C).numpy(), ((0, 0), (0, -C % 32))).reshape(-1, 32)
    with np.errstate(all="ignore"):
        d = np.abs(blocks).max(1, keepdims=True) / np.float32(TOP[fmt])
        bad, zero = ~np.isfinite(d.astype(np.float16)), d.astype(np.float16) == 0   # bad: NaN and infinity, too
        blocks = np.where(bad | zero, 0, blocks)
        if fmt in ("q8_0", "q4_0"):
            import gguf  # not on every GPU machine, and the Triton cases need none

            kind = gguf.GGMLQuantizationType[fmt.upper()]
            read = gguf.dequantize(gguf.quantize(blocks, kind), kind)
        elif fmt in SIGNED:                                # as gguf makes q4_0: the first of the largest gives the sign
            top = np.take_along_axis(blocks, np.abs(blocks).argmax(1)[:, None], 1) / np.float32(-TOP[fmt])
            units = blocks * np.where(zero, 0, np.float32(1) / top)
            code = np.trunc(units + np.float32(TOP[fmt] + 0.5)).astype(int).clip(0, 2 * TOP[fmt] - 1)
            read = LEVELS[fmt][code] * top.astype(np.float16).astype(np.float32)
        else:
            units = np.where(zero, 0, blocks * (1 / d))
            distance = np.abs(units[..., None] - LEVELS[fmt])                       # [N, 32, levels]
            code = distance.argmin(-1) if fmt == "nf4" else np.trunc(units + np.float32(8.5)).astype(int) - 1
            read = LEVELS[fmt][code] * d.astype(np.float16).astype(np.float32)
        read = np.where(bad, np.nan, read)
    return torch.from_numpy(read.astype(np.float32)).reshape(-1, C + -C % 32)[:, :C].reshape(x.shape)


def hard_tokens(C):
    """Tokens [N, C] with ties, halves, zeros of both signs, values midway between codes and scales midway between
    float16s, scales that are subnormal, zero or infinite, and what is not finite."""
    generator, channel = torch.Generator().manual_seed(C), torch.arange(C)
    x = torch.randn(35, C, generator=generator)
    x[1], x[2, :] = 0, -0.0
    x[3], x[4] = 1.0 - channel % 2 * 2, channel % 2 * 2 - 1.0
    x[5] = torch.randint(-254, 255, (C,), generator=generator) / 2
    x[5, 0] = 127
    x[6] = torch.randint(-15, 16, (C,), generator=generator) / 2
    x[6, 0] = -8
    x[7] *= 1e7
    x[8] *= 1e38
    x[9, C - 1], x[10, 0], x[11, C // 2] = float("inf"), -float("inf"), float("nan")
    x[12] *= 1e-5
    x[13] *= 1e-7
    x[14] *= 1e-42
    x[15], x[16, 0] = -3.0, 65504 * 8
    levels = torch.tensor(dba.NF4)
    x[17:22] = ((levels[1:] + levels[:-1]) / 2)[torch.randint(15, (5, C), generator=generator)]
    x[17:22, 0] = 1
    most = torch.rand(6, 1, generator=generator) + 1
    x[22:28] = (torch.randint(-127, 127, (6, C), generator=generator) + 0.5) * (most / 127)
    x[22:28, :1] = most
    x[28:34, 0] = 7 * (1 + torch.arange(685, 709, 4) / 2048)                    # where x · (1/7) isn't x / 7
    return x


class Seen:
    """`see` of gpt(): what a model's quantised cache keeps of the keys and values that were put into it.

    put {(layer, stream): [B, T, C]} are compared with the reference's own; query t sees the newest `residual` tokens
    up to its own as ring() gives them, and all others quantised, in whatever passes they came.
    """

    def __init__(self, put, formats, residual):
        self.put, self.formats, self.residual = put, formats, residual

    def __call__(self, layer, row, stream, values):
        x, fmt = self.put[layer, stream][row], self.formats[stream]
        close(x, values, 5e-5, f"what was cached of {stream}")
        if not self.residual:
            return quantised(x, fmt).double()
        new = ring(x, fmt)
        newest = torch.arange(len(x)) > torch.arange(len(x))[:, None] - self.residual               # [query, token]
        return torch.where(newest[..., None], new, quantised(new, fmt)).double()


def ring(x, fmt):
    """What a token reads as while it is among the newest: fp16, or its own format if that is not quantised."""
    return quantised(x, fmt if fmt in ("fp32", "bf16") else "fp16")


# --- what tests of the model and of its cache share

def model_of(given, seed=0):
    model = dba.GPT(config(given), VOCAB)
    return randomize(model, seed).eval()


def tokens(B, T, seed=0):
    return torch.randint(0, VOCAB, (B, T), generator=torch.Generator().manual_seed(seed))


def tensors(cache):
    """All tensors of a KVCache's layers."""
    streams = [stream for layer in cache.layers for stream in layer.values()]
    return [x for stream in streams for x in vars(stream).values() if isinstance(x, torch.Tensor)]


def poison_free_slots(cache):
    """NaN, and codes that nothing wrote, wherever a KVCache holds no token."""
    def poison(tensor, row, free):
        if tensor is not None:
            tensor[row, :, free] = torch.nan if tensor.is_floating_point() else 0x5A

    for row, (n, settled) in enumerate(zip(cache.length.tolist(), cache.settled.tolist())):
        used = {p % cache.window for p in range(settled, n)}
        for stream in (stream for layer in cache.layers for stream in layer.values()):
            for tensor in (stream.codes, stream.scales):
                poison(tensor, row, slice(settled, None))
            poison(stream.ring, row, [slot for slot in range(stream.ring.size(2)) if slot not in used])


def poisoned(cfg, batch, capacity, policy="fp32", *more):
    """A KVCache whose buffers hold NaN and other values that nothing wrote, as uninitialised memory may."""
    cache = dba.KVCache(cfg, batch, capacity, policy, *more)
    for tensor in tensors(cache):
        tensor.fill_(torch.nan if tensor.is_floating_point() else 0x5A)
    return cache


@torch.no_grad()
def cached_logits(model, idx, schedule, policy="fp32", *more):
    """Logits of all positions, the tokens being appended in chunks of the lengths of the schedule."""
    cache = poisoned(model.cfg, len(idx), idx.size(1), policy, *more)
    return torch.cat([model(chunk, cache=cache) for chunk in idx.split(schedule, 1)], 1)


@torch.no_grad()
def cached_and_expected(model, given, idx, schedule, formats, residual=0, kernel=None):
    """Logits by a quantised cache, and those of the float64 reference with quantised keys and values."""
    put, append = {}, dba.KVCache.append

    def spy(self, layer, span, entries):
        for name, x in entries.items():
            put[layer, name] = torch.cat([*([put[layer, name]] if (layer, name) in put else []), x.float()], 1)
        return append(self, layer, span, entries)

    with mock.patch.object(dba.KVCache, "append", spy):
        actual = cached_logits(model, idx, schedule, formats, residual, "cpu", kernel)
    see = Seen(put, formats, residual)
    return actual, gpt(weights(model), idx, given, model.vocab_size, see)


class Recorder(TorchDispatchMode):
    """Names of the operators that ran below autograd, and the most elements that one of them allocated."""

    def __init__(self):
        super().__init__()
        self.names, self.largest = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.names.append(func._schema.name)
        outputs = out if isinstance(out, (tuple, list)) else [out]
        for tensor, returned in zip(outputs, func._schema.returns):
            if isinstance(tensor, torch.Tensor) and returned.alias_info is None:    # neither a view nor in place
                self.largest = max(self.largest, tensor.numel())
        return out


def close(actual, expected, tolerance, what=""):
    """Largest difference, relative to the largest expected value, is within tolerance."""
    actual, expected = actual.detach().double(), expected.detach().double()
    assert actual.shape == expected.shape, f"{what}: {tuple(actual.shape)} instead of {tuple(expected.shape)}"
    error = (actual - expected).abs().max() / expected.abs().max().clamp(min=1e-9)
    assert error <= tolerance, f"{what}: off by {error:.2e} of the largest value, allowed {tolerance:.0e}"
