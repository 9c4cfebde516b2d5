"""
What the format of the KV cache costs in quality, against a float32 cache, on validation text.

    python3 benchmarks/cache_quality.py runs/checkpoints/standard runs/checkpoints/decoupled \
        --out runs/bench/cache_quality.json
    python3 benchmarks/cache_quality.py SmolLM2.gguf --data wiki.test.tokens --block 1024 --windows 8 --batch-size 1 \
        --kv-cache q8_0 q4_0 k=q4_0,v=q3_0 q3_0 q2_0

Windows of the model's context, spread over the validation part, each through a cache of its own without a residual
window: every key and value that is attended to has been quantised. Per format, and with q4_0 for one stream and float32
for the rest, with and without rotation: the difference in nll (nats per token, with the standard error over windows),
the mean Kullback-Leibler divergence of the next-token distribution, and how often the likeliest token is the same.
Products are float32, or of --dtype, whose rounding the row of fp16 then shows.
"""

import copy
import math
import sys

import torch
from tqdm import tqdm

from common import parser_of, train_dba, write
from evals.policy import separate_windows
from evals.subject import formats_of, held_out, load_subject
from train_dba import FORMATS, KVCache, autocast, bytes_per_token, exit_code


@torch.inference_mode()
def log_probabilities(model, windows, policy, dtype):
    """Log-probabilities [B, T, V] of windows of token ids [B, T] through a cache of that policy."""
    cache = KVCache(model.cfg, len(windows), windows.size(1), policy, device=windows.device)
    with autocast(windows.device, dtype):
        return model(windows, cache=cache).log_softmax(-1)


def window_nll(log_p, y):
    """Mean nll [B] of the targets y [B, T] by log-probabilities [B, T, V]."""
    return -log_p.gather(-1, y[..., None])[..., 0].double().mean(1)


def policies_of(cfg):
    """{name: {stream: format}}: what the mode takes of the formats, then each stream alone in q4_0."""
    policies = {name: name for name in (*FORMATS, "hetero") if bytes_per_token(cfg, name)}
    for stream in cfg.attention.streams:
        policies[f"{stream} q4_0"] = {**dict.fromkeys(cfg.attention.streams, "fp32"), stream: "q4_0"}
    return policies


def measure(models, batches, policies, dtype):
    """One row of figures per policy and model. models: {rotate: GPT}; the float32 cache of models[False] is what all
    are compared with."""
    cfg, sums = models[False].cfg, {}
    for x, y in tqdm(batches, desc=cfg.attn_mode):
        p = log_probabilities(models[False], x, "fp32", dtype)
        for name, policy in policies.items():
            for rotate, model in models.items():
                q = log_probabilities(model, x, policy, dtype)
                losses, kl, same = sums.get((name, rotate), ([], 0.0, 0))
                sums[name, rotate] = (losses + [torch.stack([window_nll(p, y), window_nll(q, y)])],
                                        kl + (p.exp() * (p - q)).sum(-1).double().sum().item(),
                                        same + (p.argmax(-1) == q.argmax(-1)).sum().item())
    tokens = sum(y.numel() for _, y in batches)
    for (name, rotate), (losses, kl, same) in sums.items():
        losses = torch.cat(losses, 1)                                           # [2, windows]
        delta = losses[1] - losses[0]
        size = bytes_per_token(cfg, policies[name])
        yield dict(policy=name, rotate=rotate, tokens=tokens, bytes_per_token=size,
                   share_of_fp16=size / bytes_per_token(cfg, "fp16"), nll_fp32=losses[0].mean().item(),
                   delta_nll=delta.mean().item(), standard_error=delta.std().item() / math.sqrt(len(delta)),
                   kl=kl / tokens, top1=same / tokens)


@exit_code()
def main(argv=None):
    parser = parser_of(__doc__)
    parser.add_argument("ckpts", nargs="+", help="run folders, checkpoints, .gguf files or Hugging Face folders")
    parser.add_argument("--data", help=".npy or text (the validation part that a checkpoint was trained with)")
    parser.add_argument("--block", type=int, help="tokens of a window (the model's context)")
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=8, help="windows at once")
    parser.add_argument("--kv-cache", nargs="+", help="formats, as eval_dba.py takes them (all, and each stream alone)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    args = parser.parse_args(argv)
    rows, sources = [], {}
    for ckpt in args.ckpts:
        subject = load_subject(ckpt, args.device, args.dtype)
        held = held_out(subject, args.data)
        windows = separate_windows(held.ids, args.windows, args.block or subject.cfg.block)
        policies = {name: formats_of(subject, name) for name in args.kv_cache or ()} or policies_of(subject.cfg)
        rotated = train_dba.rotate_cache(copy.deepcopy(subject.model))
        batches = [(ids[:, :-1], ids[:, 1:]) for ids in windows.to(subject.device).split(args.batch_size)]
        label = subject.path.name if subject.step is None else "/".join(subject.folder.resolve().parts[-2:])
        sources[label] = dict(sha256=subject.sha256, data_sha256=held.sha256, block=windows.size(1) - 1,
                              dtype=args.dtype)
        for row in measure({False: subject.model, True: rotated}, batches, policies, subject.dtype):
            rows.append(dict(run=label, step=subject.step, mode=subject.cfg.attn_mode, **row))
            name = f"{row['policy']} rotated" if row["rotate"] else row["policy"]
            print(f"{label} {name}: {row['bytes_per_token']} B/token, {100 * row['share_of_fp16']:.0f} % of fp16, "
                  f"ΔNLL {row['delta_nll']:+.5f} ± {row['standard_error']:.5f}, KL {row['kl']:.6f}, "
                  f"top-1 {row['top1']:.4f}", flush=True)
    write(args.out, subject.device, sources=sources, rows=rows)


if __name__ == "__main__":
    sys.exit(main())
