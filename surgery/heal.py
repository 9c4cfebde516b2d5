"""
Healing of a converted model: its attention weights learn the teacher's next-token distributions.

The loss is KL(teacher ‖ student) + 0.1 cross-entropy, over random windows of the training text. A run folder as
train_dba.py writes one: train.jsonl, last.pt to go on from, best.pt of the least KL on held-out text.
"""

import copy
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from train_dba import (
    ELSEWHERE,
    GPT,
    MAY_CHANGE,
    Config,
    Ranks,
    Training,
    UserError,
    autocast,
    flag_name,
    load_checkpoint,
    make_optimizer,
    perplexity,
    read_log,
    restore,
    sample_batch,
    write_text,
)

CROSS_ENTROPY = 0.1                                        # its weight beside the KL
LATENT_SCALE = "latent_scale"                              # in last.pt: what the latents' channels were divided by


@dataclass
class Texts:
    """Token ids: train [N], held-out windows [n, window + 1] and what the checkpoint says of both."""
    train: np.ndarray
    held_out: Tensor
    identity: dict


@torch.no_grad()
def distance(teacher, student, windows: Tensor, skip: int = 0, report=lambda done, total: None) -> dict:
    """{"kl": KL(teacher ‖ student), "nll", "teacher_nll"}: nats per token of windows [n, T + 1] in float32, leaving out
    the first `skip` predictions of each, and "tokens", their number. The models take ids [1, T]."""
    sums = dict(kl=0.0, nll=0.0, teacher_nll=0.0)
    for n, window in enumerate(windows):
        t, s = (model(window[None, :-1])[0, skip:].log_softmax(-1) for model in (teacher, student))   # [T, V]
        targets = window[skip + 1:, None]
        sums["kl"] += (t.exp() * (t - s)).sum().item()
        sums["nll"] -= s.gather(1, targets).sum().item()
        sums["teacher_nll"] -= t.gather(1, targets).sum().item()
        report(n + 1, len(windows))
    tokens = windows[:, skip + 1:].numel()
    means = {name: total / tokens for name, total in sums.items()}
    means["kl"] = max(means["kl"], 0.0)                    # which rounding may take below; a NaN stays
    return {**means, "tokens": tokens}


@torch.no_grad()
def scale_latents(model: GPT, factors: list[Tensor]) -> None:
    """Multiply each layer's latent by a factor per channel, in place; what reads it is divided."""
    for block, factor in zip(model.blocks, factors):
        block.attn.latent[0].weight.mul_(factor[:, None])
        for reader in (block.attn.k["sem"], block.attn.v):
            reader.weight.div_(factor)
        for null in [block.attn.null["latent"]] if block.attn.null else []:
            null.mul_(factor)


@torch.no_grad()
def latent_sizes(model: GPT, window: Tensor) -> list[Tensor]:
    """Root mean square of each channel of each layer's latent, over a window of tokens [T]; of none where there is no
    latent, or its norm takes care of it."""
    sizes, shape = [], model.cfg.attention
    if not shape.latent or shape.latent_norm:
        return sizes

    def note(module, args, latent):
        sizes.append(latent.square().mean((0, 1)).sqrt().clamp(min=1e-12))

    hooks = [block.attn.latent.register_forward_hook(note) for block in model.blocks]
    model.hidden(window[None])
    for hook in hooks:
        hook.remove()
    return sizes


def freeze_all_but_attention(model: GPT) -> None:
    for name, p in model.named_parameters():
        p.requires_grad_(".attn." in name)


def loss_of(teacher: GPT, student: GPT, x: Tensor, y: Tensor, dtype) -> tuple[Tensor, float]:
    """(KL + CROSS_ENTROPY · nll, KL) in nats per token, over inputs x and targets y [B, T]; gradients are accumulated a
    sequence at a time."""
    total, kls = 0.0, 0.0
    for ids, targets in zip(x, y):
        with autocast(x.device, dtype):
            with torch.no_grad():
                t = teacher(ids[None])[0].log_softmax(-1)                       # [T, V]
            s = student(ids[None])[0].log_softmax(-1)
        kl = F.kl_div(s, t, reduction="sum", log_target=True) / y.numel()
        loss = kl + CROSS_ENTROPY * F.nll_loss(s, targets, reduction="sum") / y.numel()
        loss.backward()
        total, kls = total + loss.item(), kls + kl.item()
    return total, kls


def check_begun(folder: Path, ckpt: dict, settings: dict) -> None:
    """Raises UserError where a checkpoint was healed with other settings than these."""
    before = vars(ckpt["config"])
    differ = [f"{flag_name(name)} was {before[name]!r}, is {value!r}" for name, value in settings.items()
              if before[name] != value]
    if differ:
        raise UserError(f"{folder}/last.pt was healed otherwise ({'; '.join(differ)}); {ELSEWHERE}")


def resume(folder: Path, cfg: Config, student: GPT, optimizer, rng, identity: dict):
    """(step, best KL, latent scale or None) where the folder's last.pt left off; model, optimiser and generator are put
    there. Raises UserError where that is another run."""
    if not (folder / "last.pt").exists():
        return 0, math.inf, None
    ckpt = load_checkpoint(folder / "last.pt")
    if lacking := {"optimizer", "rng", "best_val_loss", LATENT_SCALE} - ckpt.keys():
        raise UserError(f"{folder}/last.pt lacks {min(lacking)}: a copy of best.pt? Use another --out-dir, or "
                        "--overwrite")
    if ckpt.get("data") != identity:
        raise UserError(f"{folder}/last.pt was healed on other text; {ELSEWHERE}")
    check_begun(folder, ckpt, {name: value for name, value in vars(cfg).items() if name not in MAY_CHANGE | {"steps"}})
    restore(ckpt, student, optimizer, rng)
    return ckpt["step"], ckpt["best_val_loss"], [*ckpt[LATENT_SCALE].to(student.embed.weight.device)]


def heal(student: GPT, teacher: GPT, tokenizer, texts: Texts, steps: int, window: int, folder: Path, dtype,
         meta: dict) -> int:
    """Train the student, whose config is that of the run, for so many steps (0: it is only measured and saved), on from
    the folder's last.pt if there is one. Returns the exit code."""
    cfg, device = student.cfg, student.embed.weight.device
    teacher.requires_grad_(False)
    freeze_all_but_attention(student)
    optimizer, rng = make_optimizer(student, cfg), np.random.Generator(np.random.PCG64(cfg.seed))
    step, best, sizes = resume(folder, cfg, student, optimizer, rng, texts.identity)
    fresh = sizes is None
    if fresh:                                              # in last.pt, latents have a variance of 1, as Adam likes it
        sizes = latent_sizes(student, texts.held_out[0].to(device))
        scale_latents(student, [1 / size for size in sizes])
    log_path = folder / "train.jsonl"
    kept = [] if fresh else read_log(log_path)
    kept = [line for line in kept if line.get("step", 0) <= step and line["type"] != "done"]
    first = dict(type="resume_meta", step=step) if kept else dict(type="meta")
    write_text(log_path, "".join(json.dumps(line) + "\n" for line in [*kept, {**first, **meta}]))
    scales = torch.stack(sizes) if sizes else torch.empty(0)
    run = Training(cfg, folder, texts.identity, tokenizer, student, optimizer, rng, Ranks(0, 1, device), steps,
                   cfg.batch_size * window, step, best, step, {LATENT_SCALE: scales})

    def gradients(step: int) -> dict:
        x, y = (part.to(device) for part in sample_batch(rng, texts.train, cfg.batch_size, window))
        loss, kl = loss_of(teacher, student, x, y, dtype)
        return dict(loss=loss, kl=kl)

    def evaluate() -> None:
        """Log the distance on held-out text, and keep the student where it is the least so far."""
        student.eval()
        result = distance(teacher, student, texts.held_out.to(device))
        student.train()
        improved = run.improves(result["kl"])
        run.log("eval", val_loss=result["nll"], val_ppl=perplexity(result["nll"]), val_bpb=None,
                val_tokens=result["tokens"], val_kl=result["kl"], teacher_loss=result["teacher_nll"],
                best_val_kl=run.best)
        if improved:
            converted = copy.deepcopy(student)             # whose latents' errors cost alike in all channels
            scale_latents(converted, sizes)
            run.save("best.pt", converted)

    measured = {line["step"] for line in kept if line["type"] == "eval"}
    if fresh or step == steps and step not in measured:    # stopped where now no step is left
        evaluate()
    if fresh and steps:
        run.save_last()
    student.train()
    stop_with = run.go_on("healing", gradients, evaluate)
    if not stop_with:
        run.log("done", best_val_kl=run.best)
    return stop_with
