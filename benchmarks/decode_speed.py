"""
Time of one decode step's attention over the KV cache of one layer, against baselines interleaved in the same process.

    python3 benchmarks/decode_speed.py --out runs/bench/decode_speed.json
    python3 benchmarks/decode_speed.py --device cuda --tokens 32768 131072 --batch 1 8 --shapes "32 x 8/32/40"

The cache is hetero (k_sem q4_0, k_geo q8_0, v q4_0), filled with random values. `kernel` is what --kernel auto chooses
on this device for a long cache, `torch` the chunked path of train_dba.py. `dequantised` makes float32 keys and values
of the whole cache, then attends. `bf16` (`fp16` on a GPU) is PyTorch's scaled_dot_product_attention over an unquantised
cache of the same widths, [B, H, S, w]; `standard` the same for standard attention of as many heads, 64 wide. A copy of
a large buffer on the device tells what share of its bandwidth the bytes read per second are.
"""

import itertools
from functools import partial

import torch
import torch.nn.functional as F

from common import medians, parser_of, train_dba, write  # isort: skip

from bench_dba import filled
from train_dba import decode_attention, make_config, resolve_kernel

LEAST = 0.02                                               # seconds that a call is repeated for
SHAPES = {"12 x 4/8/12": (12, 4, 8), "16 x 8/32/40": (16, 8, 32), "32 x 8/32/40": (32, 8, 32)}


def dequantised(q, streams, shape, span):
    """decode_attention() for one query and no ring, with the whole cache in float32."""
    G = shape.v_groups
    k, v = (torch.cat([streams[name].read("settled", 0, span.end).unflatten(1, (G, -1)) for name in names], 2)
            for names in ([path.stream for path in shape.paths], [shape.v_stream]))
    return (q @ k).softmax(-1) @ v.mT


def contenders(H, r, p, batch, tokens, device):
    """{name: (call without arguments, bytes of cache that it reads)}"""
    cfg = make_config(data="-", attn_mode="decoupled", n_head=H, sem_dim=H * r, geo_dim=H * p, d_model=64 * H, layers=1)
    kernel, _ = resolve_kernel("auto", device)
    cache, span = filled(cfg, batch, tokens, "hetero", kernel, device)
    q, streams, shape = torch.randn(batch, H, 1, r + p, device=device), cache.layers[0], cache.shape
    half, n = torch.bfloat16 if device.type == "cpu" else torch.float16, train_dba.bytes_per_token(cfg, "hetero")
    calls = {"kernel": (lambda: kernel.attention(q, streams, shape, span), n),
             "torch": (lambda: decode_attention(q, streams, shape, span), n),
             "dequantised": (lambda: dequantised(q, streams, shape, span), n)}
    for name, w in (("bf16" if half == torch.bfloat16 else "fp16", r + p), ("standard", 64)):
        k, v = torch.randn(2, batch, H, tokens, w, dtype=half, device=device)
        query = torch.ones(batch, H, 1, w, dtype=half, device=device)
        calls[name] = (partial(F.scaled_dot_product_attention, query, k, v, scale=1.0), 4 * H * w)
    torch.testing.assert_close(calls["kernel"][0](), calls["dequantised"][0](), atol=1e-4, rtol=1e-4)
    return {name: (call, n * batch * tokens) for name, (call, n) in calls.items()}, kernel.name


def copy_rate(device):
    """Bytes per second, read and written, of a copy of 1 GiB."""
    x = torch.zeros(2**30, dtype=torch.uint8, device=device)
    y = x.clone()
    return 2 * 2**30 / medians({"copy": lambda: y.copy_(x)}, 7, device)[0]["copy"]


@torch.inference_mode()
def main():
    parser = parser_of(__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 8192, 32768])
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES)[:2], choices=SHAPES)
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds of each, interleaved (15)")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    torch.manual_seed(0)
    device = train_dba.pick_device(args.device)
    rate = copy_rate(device)
    rows = []
    for shape, batch, tokens in itertools.product(args.shapes, args.batch, args.tokens):
        calls, kernel = contenders(*SHAPES[shape], batch, tokens, device)
        seconds, _ = medians({name: call for name, (call, _) in calls.items()}, args.rounds, device, LEAST, warm_up=3)
        row = dict(shape=shape, batch=batch, tokens=tokens, kernel=kernel,
                   ms={name: 1000 * s for name, s in seconds.items()},
                   cache_bytes={name: n for name, (_, n) in calls.items()})
        row["share_of_copy"] = row["cache_bytes"]["kernel"] / seconds["kernel"] / rate
        rows.append(row)
        print(f"{shape}, batch {batch}, {tokens} tokens:", ", ".join(f"{k} {v:.3f} ms" for k, v in row["ms"].items()),
              f"({kernel}; {row['share_of_copy']:.2f} of a copy's bytes per second)", flush=True)
    write(args.out, device, copy_bytes_per_second=rate, rounds=args.rounds, rows=rows)


if __name__ == "__main__":
    main()
