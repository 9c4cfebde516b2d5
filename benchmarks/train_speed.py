"""
Training speed on this machine, as shares of what its matrix products alone would allow and as ratios to baselines.

    python3 benchmarks/train_speed.py --out runs/bench/train_speed.json
    python3 benchmarks/train_speed.py --only "fp32" "fp32 compiled" "products fp32" --rounds 3

Every contender is a process of its own, so that baselines don't run under train_dba.py's setting of the allocator; they
take turns, some steps each. Ratios are of medians, to the faster type of each baseline, by wall and by CPU time. A step
is a whole optimiser step (forward, backward, clipping, AdamW) on the same batch. `naive` is the same model with
explicit score matrices, a mask, and the full logits in memory; `Llama` is transformers' of the same shape, left out
where transformers is not installed. `products` is no model: the model's own matrix products (forward, and both
backward) on random data, which is what a step would take if nothing else took time.
"""

import json
import os
import statistics
import subprocess
import sys
import time

import torch
import torch.nn.functional as F

from common import parser_of, train_dba, write
from train_dba import GPT, autocast, compile_model, count_params, make_config, make_optimizer, pick_device

VOCAB = 33_278                                             # WikiText-2, word level
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CONTENDERS = [f"{kind}{dtype}{how}" for kind, how in (("products ", ""), ("naive ", ""), ("Llama ", ""), ("", ""),
                                                      ("", " compiled")) for dtype in DTYPES]


def config():
    return make_config(data="-", attn_mode="decoupled", attn_dim=128, null_attn=True, tie_qk=True)


# -----------------------------------------------------------------------------
# One contender

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
        logits = self.logits(self.hidden(idx))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")


def llama(cfg):
    """Raises ImportError without transformers."""
    from transformers import LlamaConfig, LlamaForCausalLM
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, hidden_size=cfg.d_model, intermediate_size=cfg.d_ff,
                                         num_hidden_layers=cfg.layers, num_attention_heads=cfg.n_head,
                                         max_position_embeddings=cfg.block, tie_word_embeddings=True))
    inner = model.forward

    def forward(idx, targets):
        logits = inner(input_ids=idx, use_cache=False).logits.float()
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    model.forward = forward
    return model


def products(cfg, dtype, device):
    """A function that does a step's matrix products on random data."""
    N, shape = cfg.batch_size * cfg.block, cfg.attention
    widths = [(cfg.d_model, cfg.n_head * p.width) for p in shape.paths]
    widths += [(cfg.d_model, p.groups * p.width) for p in shape.paths if not p.tied]
    widths += [(cfg.d_model, shape.v_groups * shape.v_width), (cfg.n_head * shape.v_width, cfg.d_model)]
    widths += [(cfg.d_model, cfg.d_ff)] * 2 + [(cfg.d_ff, cfg.d_model)]
    widths = widths * cfg.layers + [(cfg.d_model, -(-VOCAB // 64) * 64)]        # a tensor each: no cache holds them all
    tensors = [[torch.randn(size, dtype=dtype, device=device) for size in ((N, i), (o, i), (N, o))]
               for i, o in widths]

    def step():
        for x, w, g in tensors:
            x @ w.T, g @ w, g.T @ x
    return step


def contender(name, cfg, device):
    """(function that takes one step, parameters) of a contender by its name."""
    dtype = DTYPES[name.split()[-2 if name.endswith("compiled") else -1]]
    if name.startswith("products"):
        return products(cfg, dtype, device), count_params(cfg, VOCAB)["total"]
    torch.manual_seed(0)
    if name.startswith("Llama"):
        model = llama(cfg).to(device)
    else:
        model = (Naive if name.startswith("naive") else GPT)(cfg, VOCAB).init_weights().to(device)
    if name.startswith("naive"):
        train_dba.attend = naive_attend
    if name in ("fp32", "bf16") or name.endswith("compiled"):
        train_dba.keep_freed_memory()
    if name.endswith("compiled"):
        compile_model(model)
    optimizer = make_optimizer(model, cfg)
    idx, targets = torch.randint(VOCAB, (2, cfg.batch_size, cfg.block), device=device)

    def step():
        with autocast(device, dtype):
            nll = model(idx, targets)
        (nll / targets.numel()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return step, sum(p.numel() for p in model.parameters())


def serve(name, device):
    """Take two steps; then one for each line of standard input, answered by its seconds of wall and of CPU time."""
    step, params = contender(name, config(), device)
    for _ in range(2):
        step()
    print(json.dumps(params), flush=True)
    for _ in sys.stdin:
        started, spent = time.perf_counter(), time.process_time()
        step()
        train_dba.synchronize(device)
        print(json.dumps((time.perf_counter() - started, time.process_time() - spent)), flush=True)


# -----------------------------------------------------------------------------
# All of them

def start(name, device):
    process = subprocess.Popen([sys.executable, __file__, "--serve", name, "--device", str(device)],
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    return process, process.stdout.readline()


def ask(process):
    process.stdin.write("\n")
    process.stdin.flush()
    return json.loads(process.stdout.readline())


def main():
    parser = parser_of(__doc__)
    parser.add_argument("--turns", type=int, default=2, help="turns of each, in processes of their own (2)")
    parser.add_argument("--rounds", type=int, default=4, help="timed steps of a turn (4)")
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=CONTENDERS)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--serve", choices=CONTENDERS, help="be one of them (for this script itself)")
    args = parser.parse_args()
    device = pick_device(args.device)
    if args.serve:
        serve(args.serve, device)
        return
    params, seconds, load = {}, {}, os.getloadavg()[0]
    for name in args.turns * args.only:                    # one at a time: there need not be memory for all
        process, ready = start(name, device)
        if not ready:
            print(f"{name} is left out: exit code {process.wait()}", file=sys.stderr)
            continue
        params[name] = json.loads(ready)
        seconds.setdefault(name, []).extend(ask(process) for _ in range(args.rounds))
        process.stdin.close()
        process.wait()
    median = {name: [statistics.median(clock) for clock in zip(*times)] for name, times in seconds.items()}
    tokens, rows = config().batch_size * config().block, []
    fastest = {}                                           # of each kind of baseline, by both clocks
    for kind in ("products", "naive", "Llama"):
        times = [best for name, best in median.items() if name.startswith(kind)]
        if times:
            fastest[kind] = tuple(map(min, zip(*times)))
    for name, (wall, cpu) in median.items():
        rows.append(dict(name=name, params=params[name], tokens_per_second=tokens / wall, cpu_seconds=cpu,
                         seconds=seconds[name]))
        for key, kind in (("share_of_matmul_rate", "products"), ("times_naive", "naive"), ("times_llama", "Llama")):
            if kind in fastest:
                rows[-1] |= {key: fastest[kind][0] / wall, f"{key}_cpu": fastest[kind][1] / cpu}
        print(f"{name:16}{tokens / wall:8.0f} tokens/s" + "".join(
            f"  {base[0] / wall:5.2f} x {kind} ({base[1] / cpu:.2f} by CPU time)" for kind, base in fastest.items()))
    write(args.out, device, block="speed", toy=False, rounds=args.turns * args.rounds, load=load, rows=rows)


if __name__ == "__main__":
    main()
