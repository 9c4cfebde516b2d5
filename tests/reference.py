"""
Float64 reference of the attention modes and of the whole model, written from the papers' formulas, one head and one
explicit score matrix at a time. It shares no code with train_dba.py: it sees only weights by name and the settings of a
case.
"""

import itertools
import math

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import train_dba as dba

# The settings that make a mode. Widths per head differ between paths and values wherever a mode allows it.
MODES = {
    "standard":      dict(attn_mode="standard", n_head=4, d_model=32),                   # 8
    "bottleneck":    dict(attn_mode="bottleneck", n_head=4, d_model=24, attn_dim=16),              # 4
    "decoupled":     dict(attn_mode="decoupled", n_head=4, d_model=24, sem_dim=16, geo_dim=32),  # 4, 8, 12
    "decoupled_gqa": dict(attn_mode="decoupled", n_head=4, d_model=24, sem_dim=12, geo_dim=24, attn_dim=20, kv_head=2),
    "gqa":           dict(attn_mode="gqa", n_head=6, d_model=24, attn_dim=36, kv_head=2),   # 6, three heads a group
    "mla":           dict(attn_mode="mla", n_head=4, d_model=24, attn_dim=32, kv_lora_rank=12, rope_dim=6),
}
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


def attention(w, x, given):
    """Attention of x [B, T, D] with weights w by name. Returns the output and all scores that entered a softmax."""
    mode, H = given["attn_mode"], given["n_head"]
    mla, null, base = mode == "mla", given.get("null_attn", False), given["rope_base"]
    names = [name for name in ("sem", "geo") if f"q.{name}.weight" in w]
    G = given.get("kv_head") or H
    width = {name: w[f"q.{name}.weight"].size(0) // H for name in names}
    v_width = w["o.weight"].size(1) // H
    rows, seen = [], []
    for sequence in x:
        T = len(sequence)
        source = sequence
        if mla:
            source = rms_norm(sequence @ w["latent.0.weight"].T, w["latent.1.weight"], given["norm_eps"])
        heads = []
        for h in range(H):
            g = h // (H // G)                              # neighbouring heads share a group
            total, null_total = 0.0, 0.0
            for name in names:
                n, wq = width[name], w[f"q.{name}.weight"]
                wk = w.get(f"k.{name}.weight", wq)         # absent: tied
                key_head = 0 if mla and name == "geo" else g
                wk_head = wk[key_head * n:(key_head + 1) * n]
                q = sequence @ wq[h * n:(h + 1) * n].T                              # [T, n]
                k = (source if name == "sem" else sequence) @ wk_head.T
                scale = math.sqrt(sum(width.values()) if mla or given.get("one_temperature") else n)
                if null:
                    if mla:
                        null_k = wk_head @ w["null.latent"] if name == "sem" else w["null.k_rope"]
                    else:
                        null_k = w["null.k" if len(names) == 1 else f"null.k_{name}"][key_head * n:(key_head + 1) * n]
                    null_total = null_total + q @ null_k / scale                    # [T]
                if name == "geo" and given.get("rope", True):
                    q, k = rotate(q, base), rotate(k, base)
                total = total + q @ k.T / scale                                     # [T, T]
            temperature = torch.exp(w["log_temp"][h]) if "log_temp" in w else 1.0
            scores = (total * temperature).masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf)
            wv = w["v.weight"][g * v_width:(g + 1) * v_width]
            values = source @ wv.T
            if null:
                null_v = wv @ w["null.latent"] if mla else w["null.v"][g * v_width:(g + 1) * v_width]
                scores = torch.cat([(null_total * temperature)[:, None], scores], 1)
                values = torch.cat([null_v[None], values])
            seen.append(scores[scores.isfinite()].detach())
            heads.append(softmax_rows(scores) @ values)                             # [T, v]
        rows.append(torch.cat(heads, 1) @ w["o.weight"].T)
    return torch.stack(rows), torch.cat(seen)


def gpt(w, idx, given, vocab_size):
    """Logits [B, T, V] of the pre-norm transformer with a tied, optionally factorised embedding."""
    eps = given["norm_eps"]
    x = w["embed.weight"][idx]
    if "embed_up.weight" in w:
        x = x @ w["embed_up.weight"].T
    for layer in range(given["layers"]):
        prefix = f"blocks.{layer}."
        attn = {name.removeprefix(prefix + "attn."): p for name, p in w.items() if name.startswith(prefix + "attn.")}
        x = x + attention(attn, rms_norm(x, w[prefix + "attn_norm.weight"], eps), given)[0]
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
