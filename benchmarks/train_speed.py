"""
Training speed of decoupled 32/64 on this machine, as ratios to baselines that run interleaved in the same process.

    python3 benchmarks/train_speed.py --out runs/bench/train_speed.json

Every contender takes full optimiser steps (forward, backward, clipping, AdamW) on the same batch. `naive` is the same
model in float32 with explicit score matrices, a mask, and the full logits in memory; `llama` is transformers' Llama of
the same shape under the same bfloat16 autocast, left out where transformers is not installed. `matmul` is no model: the
model's own matrix products (forward, and both backward) on random bfloat16 data, the rate that a step could reach if
nothing else took time. Model FLOPs are counted as 6 x parameters per token.
"""

import torch
import torch.nn.functional as F

from common import medians, parser_of, train_dba, write
from train_dba import (
    GPT,
    autocast,
    compile_model,
    count_params,
    make_config,
    make_optimizer,
)

VOCAB = 33_278                                             # WikiText-2, word level


def naive_attend(q, k, v, null_v=None):
    """What attend() computes, with the scores as a matrix."""
    B, H, T, w = q.shape
    k, v = (x.repeat_interleave(H // x.size(1), 1) for x in (k, v))
    scores = q[..., :k.size(-1)] @ k.mT                                         # [B, H, T, T]
    scores = scores.masked_fill(torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1), -torch.inf)
    if null_v is not None:
        scores = torch.cat([q[..., -1:], scores], -1)
        v = torch.cat([null_v[None, :, None].expand(B, -1, -1, -1), v], 2)
    return scores.softmax(-1) @ v


class Naive(GPT):
    def forward(self, idx, targets):
        fast, train_dba.attend = train_dba.attend, naive_attend
        try:
            logits = self.logits(self.hidden(idx))
        finally:
            train_dba.attend = fast
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")


def llama(cfg):
    from transformers import LlamaConfig, LlamaForCausalLM
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, hidden_size=cfg.d_model, intermediate_size=cfg.d_ff,
                                         num_hidden_layers=cfg.layers, num_attention_heads=cfg.n_head,
                                         max_position_embeddings=cfg.block, tie_word_embeddings=True))

    def loss(idx, targets):
        logits = model(input_ids=idx).logits.float()
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    return model, loss


def contenders(cfg, device):
    """{name: (function that takes one optimiser step, parameters)}"""
    made = {}

    def add(name, model, loss, dtype):
        optimizer = make_optimizer(model, cfg)

        def step(idx, targets):
            with autocast(device, dtype):
                nll = loss(idx, targets)
            (nll / targets.numel()).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        made[name] = step, sum(p.numel() for p in model.parameters())

    def fresh(kind=GPT):
        torch.manual_seed(0)
        return kind(cfg, VOCAB).init_weights().to(device)

    for name, model, dtype in (("naive fp32", fresh(Naive), torch.float32), ("fp32", fresh(), torch.float32),
                               ("bf16", fresh(), torch.bfloat16),
                               ("bf16 compiled", compile_model(fresh()), torch.bfloat16)):
        add(name, model, model, dtype)
    try:
        model, loss = llama(cfg)
        add("transformers Llama bf16", model.to(device), loss, torch.bfloat16)
    except ImportError as e:
        print(f"no Llama baseline: {e}")
    return made


def matmul_step(cfg, device):
    """A function that does a step's matrix products on random data, and their FLOPs."""
    N, shape = cfg.batch_size * cfg.block, cfg.attention
    widths = [(cfg.d_model, cfg.n_head * p.width) for p in shape.paths]
    widths += [(cfg.d_model, p.groups * p.width) for p in shape.paths if not p.tied]
    widths += [(cfg.d_model, shape.v_groups * shape.v_width), (cfg.n_head * shape.v_width, cfg.d_model)]
    widths += [(cfg.d_model, cfg.d_ff)] * 2 + [(cfg.d_ff, cfg.d_model)]
    widths = widths * cfg.layers + [(cfg.d_model, -(-VOCAB // 64) * 64)]        # a tensor each: no cache holds them all
    tensors = [[torch.randn(size, dtype=torch.bfloat16, device=device) for size in ((N, i), (o, i), (N, o))]
               for i, o in widths]

    def step():
        for x, w, g in tensors:
            x @ w.T, g @ w, g.T @ x
    return step, sum(6 * x.numel() * w.size(0) for x, w, g in tensors)


def main():
    parser = parser_of(__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="timed steps of each, interleaved (7)")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    train_dba.keep_freed_memory()
    device = train_dba.pick_device(args.device)
    cfg = make_config(data="-", attn_mode="decoupled", attn_dim=128, null_attn=True, tie_qk=True)
    torch.manual_seed(0)
    batch = torch.randint(VOCAB, (2, cfg.batch_size, cfg.block), device=device)
    steps = contenders(cfg, device)
    products, flops = matmul_step(cfg, device)
    calls = {**{name: lambda step=step: step(*batch) for name, (step, _) in steps.items()}, "matmul": products}
    median, seconds = medians(calls, args.rounds, device)  # after two steps each: allocation, compilation

    tokens, params = cfg.batch_size * cfg.block, count_params(cfg, VOCAB)["total"]
    rate = flops / median["matmul"]
    rows = []
    for name, (_, n) in steps.items():
        rows.append(dict(name=name, params=n, tokens_per_second=tokens / median[name],
                         times_naive=median["naive fp32"] / median[name],
                         share_of_matmul_rate=6 * n * tokens / median[name] / rate))
        if "transformers Llama bf16" in median:
            rows[-1]["times_llama"] = median["transformers Llama bf16"] / median[name]
    print(f"decoupled {cfg.sem_dim}/{cfg.geo_dim}, {params:,} parameters, batch {cfg.batch_size} x {cfg.block}, on "
          f"{device}, medians of {args.rounds} steps; matrix products alone: {rate / 1e12:.2f} TFLOP/s")
    print(f"{'':26}{'tokens/s':>10}{'x naive':>9}{'x Llama':>9}{'of matmul rate':>16}")
    for row in rows:
        ratio = f"{row['times_llama']:9.2f}" if "times_llama" in row else f"{'-':>9}"
        print(f"{row['name']:26}{row['tokens_per_second']:10.0f}{row['times_naive']:9.2f}{ratio}"
              f"{row['share_of_matmul_rate']:16.2f}")
    write(args.out, device, rounds=args.rounds, matmul_tflops=rate / 1e12, rows=rows, seconds=seconds)


if __name__ == "__main__":
    main()
