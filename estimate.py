"""
What training costs, by formula: FLOPs of a token, bytes of GPU memory, hours on a named GPU. Nothing is run, but for
--micro-batch auto, which tries whether what should fit does.

The formula of the memory is held to PyTorch's own bookkeeping of fake tensors by tests/test_estimate.py, and stands
beside what was measured in docs/scale.md.
"""

import dataclasses
import gc
import statistics
from pathlib import Path

import torch

import train_dba
from train_dba import BROKEN, LOGIT_CHUNK, Config, Ranks, UserError, brief, check, count_params, mesh_sizes, read_json

# FLOP/s in dense bfloat16, of the data sheets; the first whose words all occur in a device's name.
PEAKS = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H200 NVL": 835e12, "H100": 989e12, "H200": 989e12, "A100": 312e12}
UTILISATION = 0.4                                          # assumed where nothing was measured
ROOM = 0.95                                                # of free memory: assumed; the rest is work space, fragments
HALF, FULL = 2, 4                                          # bytes of a value under autocast, and in float32
MEASURED = {"rows": list, "env": {"device": str}, "toy": bool}
ROW = {"case": str, "compiled": bool, "mfu": float, "layers?": int}             # of a step that was measured


def peak_of(name: str) -> float | None:
    """FLOP/s of the device of that name, or None for one that PEAKS doesn't list."""
    return next((peak for part, peak in PEAKS.items() if all(word in name for word in part.split())), None)


def model_flops(cfg: Config, vocab_size: int, causal: bool = True) -> float:
    """FLOPs of a training step's token: 6 per parameter of a matrix product, and 6 L H (w + v) T / 2 for attention, of
    query-key width w and value width v; without causal, not halved."""
    params = count_params(cfg, vocab_size)
    width = sum(path.width for path in cfg.attention.paths) + cfg.attention.v_width
    attention = 6 * cfg.layers * cfg.n_head * width * cfg.block
    return 6 * (params["total"] - params["norm"] - params["null"]) + attention / (2 if causal else 1)


def share_of_peak(cfg: Config, vocab_size: int, ranks: Ranks, device: str) -> float | None:
    """What a token per second is of the FLOP/s of all ranks' devices, each of that name; None where PEAKS doesn't list
    it, or a run isn't in bfloat16."""
    peak = peak_of(device) if cfg.dtype == "bfloat16" else None
    return peak and model_flops(cfg, vocab_size) / (peak * ranks.world)


def kept_by_block(cfg: Config, on_gpu: bool) -> int:
    """Bytes that a block keeps of each token for its backward pass, under autocast and without dropout.

    A compiled block keeps what a matrix product or the attention reads, once, and works out the rest anew. An eager one
    keeps what every operation reads: the inputs of both norms, and SiLU's output beside its input; off the GPU, where
    RMSNorm isn't one kernel, what that normalises twice.
    """
    D, H, shape, gated = cfg.d_model, cfg.n_head, cfg.attention, cfg.mlp == "swiglu"
    widest = max(sum(path.width for path in shape.paths) + cfg.null_attn, shape.v_width)
    width = -(-widest // 8) * 8                            # attend() pads queries, keys, values and output to it
    attention = HALF * 2 * (H + shape.v_groups) * width + HALF * H * shape.v_width + FULL * H         # and log-sum-exp
    if cfg.null_attn:                                      # queries before they are rotated, which its score needs
        attention += (HALF if cfg.compile else FULL) * H * sum(path.width for path in shape.paths)
    if cfg.compile:
        stream = FULL * D + HALF * 3 * D                   # a block's input; both norms' outputs; attention's
        latent = HALF * (1 + shape.latent_norm) * shape.latent                  # before its norm, if any, and after
        mlp = HALF * (3 if gated else 2) * cfg.d_ff
    else:
        norm = FULL * (1 if on_gpu else 2)
        latent = (HALF + norm * shape.latent_norm) * shape.latent
        stream = 2 * (norm + HALF) * D
        mlp = HALF * (4 if gated else 2) * cfg.d_ff
    return stream + latent + mlp + attention + FULL * (2 + shape.latent_norm)                         # a scale a norm


def training_memory(cfg: Config, vocab_size: int, on_gpu: bool = True) -> dict[str, int]:
    """{part: bytes} of an optimiser step on one device under autocast to half precision, at its fullest moment, and
    `peak`, their sum.

    That moment is when backward begins (everything is kept, no gradient but the embedding's exists) or, of a small
    micro-batch, when it ends (every gradient exists, the embedding's twice). A step of several micro-batches holds the
    gradients of the first ones all along. A compiled and an eager step use about the same beyond what they keep. With
    activation checkpointing only the inputs of blocks are kept, and one block at a time is computed again.
    """
    params, D, E, L = count_params(cfg, vocab_size), cfg.d_model, cfg.embed_dim, cfg.layers
    micro = cfg.micro_batch or cfg.batch_size
    tokens, several = micro * cfg.block, micro < cfg.batch_size or cfg.grad_accum > 1
    rows = -(-vocab_size // 64) * 64
    logits = min(tokens * rows, LOGIT_CHUNK["cuda" if on_gpu else "cpu"])
    state = {"parameters": FULL * params["total"], "AdamW": 2 * FULL * params["total"]}
    norm = FULL * D * (1 if on_gpu else 2)                 # what the last one keeps, gone when blocks run backward
    in_loss = tokens * (norm + 3 * HALF * E) + HALF * rows * E                  # and h, its gradient, the weights
    in_loss += logits * (FULL + HALF) + (0 if cfg.compile else HALF * rows * E)                   # a chunk's gradients
    in_block = tokens * (3 * HALF * cfg.d_ff + 2 * FULL * D)                    # gradients while they flow through one
    kept, weights = L * kept_by_block(cfg, on_gpu), HALF * (params["attention"] + params["mlp"])
    if cfg.activation_checkpointing:
        in_loss += 0 if cfg.compile else weights           # autocast's copies, until it ends
        in_block += tokens * kept // L
        kept, weights = L * FULL * D, weights // L
    turn = {
        **state,
        "gradients": several * FULL * params["total"],
        "activations": tokens * kept,
        "half-precision weights": weights,
        "loss": FULL * rows * E,                           # the embedding's gradient
        "working": max(in_loss, in_block),
    }
    end = {**state, "gradients": FULL * params["total"], "loss": FULL * rows * E}
    fullest = max(turn, end, key=lambda parts: sum(parts.values()))
    return {**fullest, "peak": sum(fullest.values())}


def fits_by_formula(cfg: Config, vocab_size: int, sizes: list[int], free: int, shards: int = 1) -> int:
    """The first of `sizes`, micro-batches from large to small, whose step takes at most ROOM of `free` bytes on a GPU,
    or else the last. shards: how many ranks share parameters, gradients and the optimiser's state (--shard)."""
    for size in sizes:
        parts = training_memory(dataclasses.replace(cfg, micro_batch=size), vocab_size)
        shared = parts["parameters"] + parts["AdamW"] + parts["gradients"]
        if parts["peak"] - shared + shared / shards <= ROOM * free:
            break
    return size


def free_memory(device: torch.device) -> int:
    """Free bytes of a CUDA device. Raises UserError on others: a system that lends more than it has can't tell."""
    if device.type != "cuda":
        raise UserError(f"--micro-batch auto asks a CUDA device for its free memory; give a number on {device.type}")
    return torch.cuda.mem_get_info(device)[0]


def lacks_memory(cfg: Config, vocab_size: int, ranks: Ranks, dtype: torch.dtype) -> bool:
    """Whether any rank's memory runs out in two steps of a model that is then forgotten; the second step has the
    optimiser's state, and gradients beside a micro-batch's activations where the run's steps have them. With --shard
    ranks wait for each other within a step: there all run out, or none."""
    lacking, parts = False, range(2 if cfg.micro_batch < cfg.batch_size * cfg.grad_accum else 1)
    try:
        model, optimizer, _ = train_dba.build(cfg, vocab_size, ranks.device)
        batch = torch.zeros(2, len(parts) * cfg.micro_batch, cfg.block, dtype=torch.int64)
        for _ in range(2):
            train_dba.step_gradients(model, batch, cfg, 1, cfg.micro_batch, parts, ranks, dtype)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    except torch.OutOfMemoryError:
        lacking = True
    model = optimizer = None
    gc.collect()                                           # a compiled model is part of a cycle
    if ranks.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()               # the log's is the run's own
    return ranks.sum(lacking)[0] > 0


def fitting_micro_batch(cfg: Config, vocab_size: int, ranks: Ranks, dtype: torch.dtype) -> int:
    """What --micro-batch auto stands for, on every rank: the first part of a batch that fits by formula, or the next of
    at most half its size that does when it is tried. Raises UserError if none does."""
    free = free_memory(ranks.device)
    sizes = [size for size in range(cfg.batch_size, 0, -1) if cfg.batch_size % size == 0
             and cfg.batch_size * cfg.grad_accum // size % ranks.world == 0]
    nodes, local_ranks = mesh_sizes()
    shards = (local_ranks if local_ranks > 1 else nodes) if cfg.shard else 1    # as shard_model() splits
    first = ranks.from_first(lambda: fits_by_formula(cfg, vocab_size, sizes, free, shards))
    sizes = [size for size in sizes if size <= first]
    while lacks_memory(dataclasses.replace(cfg, micro_batch=sizes[0]), vocab_size, ranks, dtype):
        if not (smaller := [size for size in sizes if size <= sizes[0] // 2]):
            raise UserError(f"no memory for --micro-batch {sizes[0]} (auto); --activation-checkpointing takes less, "
                            "and --shard on several GPUs")
        sizes = smaller
    return sizes[0]


def measured_rows(folder: Path) -> list[tuple]:
    """[(device, path, row)] of the training steps that bench_dba.py timed on devices that PEAKS lists. Raises UserError
    for a damaged file."""
    timed = []
    for path in sorted(folder.glob("*/train*.json")):
        try:
            document = read_json(path, MEASURED)
            for row in [] if document["toy"] else document["rows"]:
                if row.get("mfu"):
                    check(row, ROW, "a row")
                    timed.append((document["env"]["device"], path, row))
        except (*BROKEN, OSError) as e:
            raise UserError(f"{path} is no result of bench_dba.py train ({brief(e)})") from None
    return timed


def utilisation(cfg: Config, folder: Path) -> tuple[float, str]:
    """(share of a GPU's peak that a run would reach, where that comes from): as measured of the same preset, compiled
    or not, else the median of the measured presets, else UTILISATION. Raises UserError for a damaged result."""
    timed = [entry for entry in measured_rows(folder) if entry[2]["compiled"] == cfg.compile]
    if not timed:
        return UTILISATION, "assumed: nothing was measured"
    for device, path, row in timed:
        if row["case"] == cfg.exp and row.get("layers", cfg.layers) == cfg.layers:
            return row["mfu"], f"measured on {device}: {path}"
    shares = [row["mfu"] for _, _, row in timed]
    return statistics.median(shares), f"the median of other presets, measured on {timed[0][0]}"
