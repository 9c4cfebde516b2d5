"""
Time of one layer's attention over a KV cache by how many new tokens come at once: what serves a step, what a prompt.

    python3 benchmarks/prefill_speed.py --out runs/bench/prefill_speed.json
    python3 benchmarks/prefill_speed.py --shapes "9/3 x 64" --formats fp16 q4_0 --cached 2048 --new 1 512

`products` is the torch path with the scores as matrices, `fused` the same with PyTorch's fused CPU kernel for each
chunk of the cache, `kernel` what --kernel auto chooses. The three take turns. FUSED_FROM of train_dba.py and
most_queries of kernels/cpu_decode.py, in queries that share a key (new tokens x query heads / key heads), are where
the medians cross.
"""

import itertools
import math

import torch

from common import medians, parser_of, train_dba, write
from train_dba import KVCache, decode_attention, make_config, resolve_kernel

SHAPES = {                                                 # query heads / key heads x widths; 1: MLA's latent
    "12 x 4/8/12": dict(attn_mode="decoupled", n_head=12, sem_dim=48, geo_dim=96, d_model=768, null_attn=True),
    "16 x 8/32/40": dict(attn_mode="decoupled", n_head=16, sem_dim=128, geo_dim=512, d_model=640),
    "9/3 x 64": dict(attn_mode="gqa", n_head=9, kv_head=3, d_model=576),
    "16/1 x 160/128": dict(attn_mode="mla", n_head=16, d_model=512, kv_lora_rank=128, rope_dim=32),
}
MOST = 64                                                  # queries that share a key, for which the kernel is timed


def case(cfg, fmt, cached, new, kernel, device):
    """{name: call without arguments}: the attention of `new` tokens after `cached` ones."""
    shape = cfg.attention
    cache = KVCache(cfg, 1, cached + new, fmt, device=device, kernel=kernel)
    for tokens in (*torch.arange(cached).split(2048), range(new)):
        span = cache.begin(len(tokens))
        cache.append(0, span, {name: torch.randn(1, len(tokens), C, device=device)
                               for name, C in shape.streams.items()})
        cache.advance(span)
    G = 1 if shape.latent else shape.v_groups
    width = sum(shape.streams[path.stream] for path in shape.paths) // G
    q = torch.randn(1, cfg.n_head, new, width, device=device) / math.sqrt(width)
    null = None
    if cfg.null_attn:
        null = (torch.randn(1, cfg.n_head, new, device=device), torch.randn(G, shape.v_width, device=device))

    def torch_path(fused_from):
        def call():
            train_dba.FUSED_FROM = fused_from
            return decode_attention(q, cache.layers[0], shape, span, null)
        return call

    calls = {"products": torch_path(math.inf), "fused": torch_path(0)}
    if cfg.n_head // G * new <= MOST and kernel is not train_dba.TORCH:
        calls["kernel"] = lambda: kernel.attention(q, cache.layers[0], shape, span, null)
    return calls


@torch.inference_mode()
def main():
    parser = parser_of(__doc__)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--formats", nargs="+", default=["fp16", "q4_0"], choices=train_dba.FORMATS)
    parser.add_argument("--cached", type=int, nargs="+", default=[1024, 7680])
    parser.add_argument("--new", type=int, nargs="+", default=[1, 4, 16, 64, 512])
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds of each, interleaved (7)")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    torch.manual_seed(0)
    train_dba.keep_freed_memory()
    device = train_dba.pick_device(args.device)
    kernel, _ = resolve_kernel("auto", device)
    rows = []
    for shape, fmt, cached, new in itertools.product(args.shapes, args.formats, args.cached, args.new):
        cfg = make_config(data="-", layers=1, **SHAPES[shape])
        calls = case(cfg, fmt, cached, new, kernel, device)
        outputs = {name: call() for name, call in calls.items()}
        error = max((each - outputs["products"]).abs().max().item() for each in outputs.values())
        seconds, _ = medians(calls, args.rounds, device, least=0.02)
        ms = {name: 1000 * s for name, s in seconds.items()}
        G = 1 if cfg.attention.latent else cfg.attention.v_groups
        rows.append(dict(shape=shape, format=fmt, cached=cached, new=new, queries=cfg.n_head // G * new,
                         kernel=kernel.name, ms=ms, largest_difference=error))
        print(f"{shape} {fmt}, {cached} cached, {new} new ({rows[-1]['queries']} queries a key): "
              f"{', '.join(f'{name} {each:.3f} ms' for name, each in ms.items())}; "
              f"products / fused {ms['products'] / ms['fused']:.2f}, difference {error:.1e}", flush=True)
    write(args.out, device, rounds=args.rounds, threads=torch.get_num_threads(), rows=rows)


if __name__ == "__main__":
    main()
