"""
What the format of the KV cache costs in quality, against a float32 cache, on validation text.

    python3 benchmarks/cache_quality.py runs/checkpoints/standard runs/checkpoints/decoupled \
        --out runs/bench/cache_quality.json

Windows of the model's context, spread over the validation part, each through a cache of its own without a residual
window: every key and value that is attended to has been quantised. Weights and activations are float32. Per format,
and with q4_0 for one stream and float32 for the rest, with and without rotation: the difference in nll (nats per token,
with the standard error over windows), the mean Kullback-Leibler divergence of the next-token distribution, and how
often the likeliest token is the same.
"""

import math
from pathlib import Path

import torch
from tqdm import tqdm

from common import parser_of, train_dba, write
from train_dba import FORMATS, KVCache, bytes_per_token, load_checkpoint, load_data, load_model

BATCH = 8


@torch.inference_mode()
def log_probabilities(model, windows, policy):
    """Log-probabilities [B, T, V] of windows of token ids [B, T] through a cache of that policy."""
    cache = KVCache(model.cfg, len(windows), windows.size(1), policy, device=windows.device)
    return model(windows, cache=cache).log_softmax(-1)


def window_nll(log_p, y):
    """Mean nll [B] of the targets y [B, T] by log-probabilities [B, T, V]."""
    return -log_p.gather(-1, y[..., None])[..., 0].double().mean(1)


def policies_of(cfg):
    """{name: cache policy}: what the mode takes of the formats, then each stream alone in q4_0."""
    policies = {name: name for name in (*FORMATS, "hetero") if bytes_per_token(cfg, name)}
    for stream in cfg.attention.streams:
        policies[f"{stream} q4_0"] = {**dict.fromkeys(cfg.attention.streams, "fp32"), stream: "q4_0"}
    return policies


def measure(models, batches):
    """One row of figures per policy and model. models: {rotate: GPT}; the float32 cache of models[False] is what all
    are compared with."""
    cfg, sums = models[False].cfg, {}
    policies = policies_of(cfg)
    for x, y in tqdm(batches, desc=cfg.attn_mode):
        p = log_probabilities(models[False], x, "fp32")
        for name, policy in policies.items():
            for rotate, model in models.items():
                q = log_probabilities(model, x, policy)
                losses, kl, same = sums.get((name, rotate), ([], 0.0, 0))
                sums[name, rotate] = (losses + [torch.stack([window_nll(p, y), window_nll(q, y)])],
                                        kl + (p.exp() * (p - q)).double().sum().item(),
                                        same + (p.argmax(-1) == q.argmax(-1)).sum().item())
    tokens = sum(y.numel() for _, y in batches)
    for (name, rotate), (losses, kl, same) in sums.items():
        losses = torch.cat(losses, 1)                                           # [2, windows]
        delta = losses[1] - losses[0]
        yield dict(policy=name, rotate=rotate, tokens=tokens, bytes_per_token=bytes_per_token(cfg, policies[name]),
                   nll_fp32=losses[0].mean().item(), delta_nll=delta.mean().item(),
                   standard_error=delta.std().item() / math.sqrt(len(delta)), kl=kl / tokens, top1=same / tokens)


def main():
    parser = parser_of(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders with a best.pt")
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    device = train_dba.pick_device(args.device)
    rows = []
    for run in args.runs:
        ckpt = load_checkpoint(str(run / "best.pt"), device)
        model, rotated = load_model(ckpt), load_model(load_checkpoint(str(run / "best.pt"), device))
        train_dba.rotate_cache(rotated)
        data = load_data(model.cfg)
        starts = torch.linspace(0, len(data.val) - model.cfg.block - 1, args.windows).long().tolist()
        text = torch.stack([torch.from_numpy(data.val[i:i + model.cfg.block + 1].astype("int64")) for i in starts])
        batches = [(x[:, :-1].to(device), x[:, 1:].to(device)) for x in text.split(BATCH)]
        for row in measure({False: model, True: rotated}, batches):
            label = f"{run.resolve().parent.name}/{run.name}"
            rows.append(dict(run=label, step=ckpt["step"], mode=model.cfg.attn_mode, **row))
            name = f"{row['policy']} rotated" if row["rotate"] else row["policy"]
            print(f"{run.name} {name}: {row['bytes_per_token']} B/token, "
                  f"ΔNLL {row['delta_nll']:+.5f} ± {row['standard_error']:.5f}, KL {row['kl']:.6f}, "
                  f"top-1 {row['top1']:.4f}", flush=True)
    write(args.out, device, rows=rows)


if __name__ == "__main__":
    main()
