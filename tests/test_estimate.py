"""What a step takes by formula, against PyTorch's own bookkeeping of every tensor, on fake ones of the real size."""

import contextlib
import json
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._functorch.aot_autograd import aot_module_simplified
from torch._functorch.compilers import nop
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

import estimate
from train_dba import EXPS, GPT, Block, UserError, autocast, make_config, make_optimizer

ROOT = Path(estimate.__file__).parent
VOCAB = 50_257
CPU = torch.device("cpu")


class OneOutput(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        return (self.block(x),)


def partition(block, cfg, micro):
    """Let the block keep for its backward pass what torch.compile would let it keep."""
    x = torch.empty(micro, cfg.block, cfg.d_model, requires_grad=True)
    call = aot_module_simplified(OneOutput(block), [x], fw_compiler=nop, bw_compiler=nop,
                                 partition_fn=partial(min_cut_rematerialization_partition, compiler="inductor"),
                                 decompositions=select_decomp_table())
    block.forward = lambda x: call(x)[0]


def tracked(cfg):
    """(bytes when the last forward pass of the second step has ended, bytes at the peak of both steps)"""
    micro = cfg.micro_batch or cfg.batch_size
    with FakeTensorMode(), contextlib.ExitStack() as stack:
        model = GPT(cfg, VOCAB)
        optimizer = make_optimizer(model, cfg)
        batch = torch.randint(VOCAB, (2, cfg.batch_size, cfg.block))
        if cfg.compile:
            with autocast(CPU, torch.bfloat16):
                for block in model.blocks:
                    partition(block, cfg, micro)
        tracker = MemTracker()
        tracker.track_external(model, optimizer, batch)
        stack.enter_context(tracker)
        for _ in range(2):
            for x, y in zip(*(tensor.split(micro) for tensor in batch)):
                with autocast(CPU, torch.bfloat16):
                    nll = model(x, y)
                turn = tracker.get_tracker_snapshot("current")[CPU]["Total"]
                (nll / 7).backward()
                tracker.reset_mod_stats()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return turn, tracker.get_tracker_snapshot("peak")[CPU]["Total"]


CASES = {
    "baseline": dict(exp="paper_baseline"),
    "8+32": dict(exp="paper_decoupled_sem8"),
    "mla": dict(exp="paper_mla"),
    "latent": dict(exp="paper_decoupled", kv_lora_rank=768),
    "null token, GELU": dict(exp="paper_decoupled", null_attn=True, mlp="gelu"),
    "gqa, two micro-batches": dict(exp="paper_gqa", micro_batch=4),
}
EAGER = {
    "checkpointing": dict(exp="paper_baseline", activation_checkpointing=True),
    "one sequence": dict(exp="paper_baseline", batch_size=1),                   # the fullest moment is the end
    "large vocabulary": dict(exp="paper_baseline", d_model=256, d_ff=512, batch_size=2),            # or the loss
}


def config(layers=4, **settings):
    return make_config(data="-", layers=layers, **settings)


@pytest.mark.parametrize("name", [*CASES, *EAGER])
def test_an_eager_step_peaks_at_the_formula(name):
    cfg = config(**{**CASES, **EAGER}[name])
    _, peak = tracked(cfg)
    near = pytest.approx(peak, rel=0.01 if name in CASES else 0.05)
    assert estimate.training_memory(cfg, VOCAB, on_gpu=False)["peak"] == near


@pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
def test_a_compiled_step_keeps_what_the_formula_says(settings):
    """When the forward pass has ended. What fused kernels need after that can't be seen without fusing them: the peak
    is held to a GPU's below."""
    cfg = config(compile=True, layers=2, **settings)
    parts = estimate.training_memory(cfg, VOCAB, on_gpu=False)
    tokens = (cfg.micro_batch or cfg.batch_size) * cfg.block
    last_norm_and_loss = tokens * cfg.d_model * (2 * estimate.FULL + estimate.HALF)
    kept, _ = tracked(cfg)
    assert parts["peak"] - parts["working"] + last_norm_and_loss == pytest.approx(kept, rel=0.01)


@pytest.mark.parametrize("settings", [
    dict(attn_mode="bottleneck", attn_dim=40), dict(attn_mode="decoupled", sem_dim=12, geo_dim=40),
    dict(attn_mode="mla", attn_dim=48, kv_lora_rank=40)], ids=lambda settings: settings["attn_mode"])
def test_an_eager_block_keeps_one_copy_of_each_norm(settings):
    """However many products read it. All bytes that autograd keeps of a token are the formula's."""
    cfg = make_config(data="-", d_model=72, n_head=2, d_ff=88, layers=1, **settings)
    kept, tokens = {}, 7 * 13                              # no weight has so many elements, or twice as many
    block, x = Block(cfg), torch.randn(7, 13, cfg.d_model, requires_grad=True)
    for p in block.parameters():
        nn.init.normal_(p, std=0.1)

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast(CPU, torch.bfloat16):
        block(x)
    norms = [t for t in kept.values() if t.dtype == torch.bfloat16 and t.numel() == x.numel()]
    assert len(norms) == 2
    of_tokens = [t.untyped_storage().nbytes() for t in kept.values() if t.numel() % tokens == 0]
    assert sum(of_tokens) / tokens == estimate.kept_by_block(cfg, on_gpu=False)


def measured_steps():
    rows = [row for _, _, row in estimate.measured_rows(ROOT / "runs/bench") if row["case"] in EXPS]
    return pytest.mark.parametrize("row", rows, ids=lambda row: f"{row['case']}-{row['micro']}-{row['compiled']}")


# Copies of norms, in half precision, that an eager block kept beyond one each when a GPU measured it.
SPARE_COPIES = {"paper_baseline": 3, "paper_decoupled_sem8": 5}


@measured_steps()
def test_the_formula_is_what_a_gpu_measured(row):
    cfg = make_config(data="-", exp=row["case"], batch_size=row["micro"], block=row["block"], compile=row["compiled"])
    spare = 0 if row["compiled"] else SPARE_COPIES[row["case"]]
    spare *= cfg.layers * row["micro"] * cfg.block * estimate.HALF * cfg.d_model
    peak = estimate.training_memory(cfg, VOCAB)["peak"] + spare
    assert peak / 2**30 == pytest.approx(row["gib"], rel=0.02)


def test_utilisation_is_measured_or_says_that_it_is_not(tmp_path):
    cfg = make_config(data="-", exp="paper_gqa", compile=True)
    assert estimate.utilisation(cfg, tmp_path) == (estimate.UTILISATION, "assumed: nothing was measured")
    (tmp_path / "h9").mkdir()
    path = tmp_path / "h9/train.json"
    rows = [dict(case=case, compiled=compiled, mfu=mfu) for case, compiled, mfu in (
        ("paper_gqa", False, 0.1), ("paper_baseline", True, 0.2), ("paper_mla", True, 0.3), ("llama", True, None))]
    document = dict(rows=rows, env=dict(device="NVIDIA H9"), toy=False)
    path.write_text(json.dumps(document))
    assert estimate.utilisation(cfg, tmp_path)[0] == 0.25
    rows.append(dict(case="paper_gqa", compiled=True, mfu=0.5))
    path.write_text(json.dumps(document))
    assert estimate.utilisation(cfg, tmp_path) == (0.5, f"measured on NVIDIA H9: {path}")
    for damaged in ({}, {**document, "rows": [dict(mfu=0.5)]}, {**document, "rows": [[]]},
                    {**document, "rows": [dict(case="paper_gqa", compiled=True, mfu="0.5")]}):
        path.write_text(json.dumps(damaged))
        with pytest.raises(UserError, match="train.json is no result"):
            estimate.utilisation(cfg, tmp_path)


def test_peaks_of_devices():
    assert estimate.peak_of("NVIDIA H100 PCIe") < estimate.peak_of("NVIDIA H100 80GB HBM3")
    assert estimate.peak_of("Tesla T4") is None
