"""
What a conversion needs to know of a teacher: second moments of every layer on calibration text.

Everything is per token, float64. The Fisher matrix F of a layer's attention output y [D] is E g gᵀ, g the gradient by y
of the log-probability of a next token that the teacher itself draws: to second order, an error d of y costs d·F·d / 2
nats of KL.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from train_dba import GPT, UserError, split_heads


@dataclass
class Moments:
    """Of one layer. D: width of the stream, H: query heads, v: width of a value, T: tokens of a calibration window."""
    inputs: Tensor                                         # [D, D]: E x xᵀ of attention's input, after its norm, with
    #                                                        UNSEEN of its mean diagonal in all directions
    mean: Tensor                                           # [D]: E x
    values: Tensor                                         # [H·v, H·v]: E z zᵀ of the heads' averaged values
    mass: Tensor                                           # [H, T]: attention at each distance, from 0; sums to 1
    fisher: Tensor                                         # [D, D]


UNSEEN = 1e-9                                              # of inputs that no window shows, as a text has few tokens
SINK = 4                                                   # first tokens, whose gradients are unlike any: left out


def check_teacher(model: GPT) -> None:
    """Raises UserError for a model that isn't a Llama: of one rotated score path, and nothing besides."""
    cfg = model.cfg
    extras = {"--null-attn": cfg.null_attn, "--tie-qk": cfg.tie_qk, "--learned-temp": cfg.learned_temp,
              "--no-rope": not cfg.rope, f"--attn-mode {cfg.attn_mode}": len(cfg.attention.paths) > 1}
    if wrong := [flag for flag, on in extras.items() if on]:
        raise UserError(f"a model with {', '.join(wrong)} can't be converted; it must be standard, bottleneck or gqa")


class Recorder:
    """Sums up the moments of one layer while the teacher runs; add_gradient() takes what backward brings."""

    def __init__(self, attn: nn.Module, T: int):
        D, H, shape = attn.o.out_features, attn.n_head, attn.shape
        self.attn, self.tokens, self.graded, self.output = attn, 0, 0, None
        distance = torch.arange(T)[:, None] - torch.arange(T)
        self.distance = distance.clamp(min=0).flatten()    # of attention that no query has, 0
        self.sums = Moments(*(torch.zeros(size, dtype=torch.float64) for size in (
            (D, D), (D,), (H * shape.v_width, H * shape.v_width), (H, T), (D, D))))

    def hook(self, module, args, output):
        """A forward hook of an Attention: x [B, T, D] -> [B, T, D]."""
        for x in args[0].detach():
            self.add(x)
        if torch.is_grad_enabled():
            output.retain_grad()
            self.output = output

    @torch.no_grad()
    def add(self, x):
        """One window x [T, D]."""
        attn, sums, T = self.attn, self.sums, len(x)
        path, H, G = attn.shape.paths[0], attn.n_head, attn.shape.v_groups
        q, k, _ = attn.project(path, x[None], x[None], torch.arange(T)[None], absorb=False)
        v = split_heads(attn.v(x[None]), G)
        k, v = k.repeat_interleave(H // G, 1)[0], v.repeat_interleave(H // G, 1)[0]
        p = (q[0] @ k.mT).masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf).softmax(-1)        # [H, T, T]
        z = (p @ v).transpose(0, 1).flatten(1).double()    # [T, H·v]
        x = x.double()
        sums.inputs += x.T @ x
        sums.mean += x.sum(0)
        sums.values += z.T @ z
        for head, row in enumerate(p.double()):
            sums.mass[head].index_add_(0, self.distance, row.flatten())
        self.tokens += T

    def add_gradient(self):
        g = self.output.grad[:, SINK:].flatten(0, 1).double()                   # [B·T, D]
        self.sums.fisher += g.T @ g
        self.graded += len(g)
        self.output = None

    def result(self) -> Moments:
        per = {field.name: self.tokens for field in fields(Moments)} | {"fisher": max(1, self.graded)}
        moments = Moments(*(getattr(self.sums, name) / count for name, count in per.items()))
        moments.inputs.diagonal().add_(UNSEEN * moments.inputs.diagonal().mean())
        return moments


def check_finite(logits: Tensor) -> None:
    """Raises UserError for those of a model that is broken."""
    if not logits.isfinite().all():
        raise UserError("the model's own logits aren't finite: its weights are damaged")


def calibrate(model: GPT, windows: Tensor, graded: int, seed: int = 0, report=lambda done, total: None):
    """[Moments] of the layers on windows of tokens [N, T]; the Fisher matrices on the first `graded` of these. The
    model's parameters are left frozen."""
    model.requires_grad_(False)                            # gradients by the layers' outputs only
    recorders = [Recorder(block.attn, windows.size(1)) for block in model.blocks]
    hooks = [block.attn.register_forward_hook(recorder.hook) for block, recorder in zip(model.blocks, recorders)]
    hooks.append(model.embed.register_forward_hook(lambda module, args, out: out.detach().requires_grad_()))
    generator = torch.Generator().manual_seed(seed)
    for n, window in enumerate(windows):
        with torch.set_grad_enabled(n < graded):
            logits = model(window[None])[0]                # [T, V]
            check_finite(logits)
            if n < graded:
                drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)
                logits.log_softmax(-1).gather(1, drawn).sum().backward()
        if n < graded:
            for recorder in recorders:
                recorder.add_gradient()
        report(n + 1, len(windows))
    for hook in hooks:
        hook.remove()
    return [recorder.result() for recorder in recorders]
