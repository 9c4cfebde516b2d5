"""The Triton kernels without a GPU: interpreted, against references, and compiled as for one, to see what comes out."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train_dba as dba

triton = pytest.importorskip("triton", reason="triton isn't installed")

from triton.backends.compiler import GPUTarget  # noqa: E402

from kernels import triton_decode  # noqa: E402

HERE = Path(__file__).resolve().parent


@pytest.mark.parametrize("interpret", [
    "1", pytest.param("0", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"))])
def test_cases(interpret):
    """A process either interprets kernels or compiles them, as its environment says before the first is defined."""
    result = subprocess.run([sys.executable, "-m", "pytest", "-q", "-W", "ignore::RuntimeWarning", "-p",
                             "no:cacheprovider", HERE / "triton_cases.py"], cwd=HERE.parent, text=True,
                            env={**os.environ, "TRITON_INTERPRET": interpret}, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT)
    assert result.returncode == 0, result.stdout


def mode(attn_mode, heads, **flags):
    return dba.make_config(data="none", layers=1, n_head=heads, d_ff=8, attn_mode=attn_mode,
                           **{"d_model": 8 * heads, **flags})


def decoupled(heads, sem, geo, v=None, groups=None):
    return mode("decoupled", heads, sem_dim=heads * sem, geo_dim=heads * geo, attn_dim=heads * (v or sem + geo),
                kv_head=groups)


D4_8_12, D8_32_40, D16_32_48 = decoupled(12, 4, 8), decoupled(16, 8, 32), decoupled(8, 16, 32)
STANDARD, MLA = mode("standard", 8, d_model=512), mode("mla", 32, d_model=2048, kv_lora_rank=512, rope_dim=64)
MATRIX = [                                                 # chip, config, policy or formats, null token, full tiles
    *((arch, cfg, "hetero", arch == 90, True) for arch in (80, 90) for cfg in (D4_8_12, D8_32_40)),
    *((90, D4_8_12, fmt, False, True) for fmt in triton_decode.FORMATS),
    (90, D4_8_12, "hetero", False, False),
    (80, D4_8_12, ("fp32", "q4_0", "q8_0"), True, True),
    (90, D4_8_12, ("q8_0", "nf4", "bf16"), True, True),
    (80, D16_32_48, ("nf4", "q8_0", "q4_sym"), True, True),
    (80, STANDARD, ("q8_0", "q4_0"), False, True),
    (90, STANDARD, ("fp16", "fp16"), False, False),
    (90, decoupled(8, 3, 6), "q4_0", True, True),
    (80, decoupled(8, 5, 4, 7), ("nf4", "q8_0", "q4_0"), False, True),
    (90, mode("gqa", 32, attn_dim=2048, kv_head=4), ("q8_0", "q4_0"), False, True),
    (90, decoupled(8, 4, 8, groups=2), "hetero", True, True),
    (80, MLA, ("q8_0", "q8_0"), False, True),
    (90, MLA, ("q4_0", "q8_0"), True, True),
]


class Chip:
    """What Triton asks of a GPU's driver before it compiles."""

    def __init__(self, arch):
        self.arch = arch

    def get_current_device(self):
        return self.arch                                   # kernels are kept per device

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", self.arch, 32)


def label(x):
    if not isinstance(x, dba.Config):
        return None
    widths = [x.attention.latent, *(path.width for path in x.attention.paths), x.attention.v_width]
    return f"{x.attn_mode} {'/'.join(str(width) for width in widths if width)}"


def disassemble(tool, *args):
    """Output of one of NVIDIA's tools that come with triton."""
    path = Path(triton.__file__).parent / "backends/nvidia/bin" / tool
    return subprocess.run([path, *args], check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("arch, cfg, formats, null, full", MATRIX, ids=label)
def test_compiled(arch, cfg, formats, null, full, monkeypatch, tmp_path):
    """What a launch compiles: no registers spilled, and codes loaded 8 or 16 bytes at a time."""
    compiled, run = [], triton.JITFunction.run

    def compile_only(kernel, *args, grid, warmup, **options):
        compiled.append(run(kernel, *args, grid=grid, warmup=True, **options))

    monkeypatch.setattr(triton.runtime.driver, "_active", Chip(arch))
    monkeypatch.setattr(triton.JITFunction, "run", compile_only)
    monkeypatch.setattr(triton_decode, "BUSY", 0 if full else 10**9)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))

    shape = cfg.attention
    cache = dba.KVCache(cfg, 2, 1500, formats if isinstance(formats, str) else dict(zip(shape.streams, formats)), 64)
    span, streams, G = cache.begin(1500), cache.layers[0], 1 if shape.latent else shape.v_groups
    w, v = sum(shape.streams[path.stream] for path in shape.paths) // G, shape.streams[shape.v_stream] // G
    value = (torch.zeros(2, cfg.n_head, 1), torch.zeros(G, v)) if null else None
    triton_decode.attention(torch.zeros(2, cfg.n_head, 1, w), streams, shape, span, value)
    settled, ring, _ = compiled
    for stream in streams.values():
        triton_decode.append(stream, torch.zeros(3).long(), torch.arange(3), torch.zeros(3, stream.channels))
    assert len(compiled) == 3 + sum(stream.scales is not None for stream in streams.values())
    for kernel in compiled:
        (tmp_path / "cubin").write_bytes(kernel.asm["cubin"])
        registers = int(re.search(r"REG:(\d+)", disassemble("cuobjdump", "-res-usage", tmp_path / "cubin"))[1])
        print(kernel.name, registers, "registers")
        spilled = re.findall(r"\b(?:STL|LDL)\b.*", disassemble("nvdisasm", "-c", tmp_path / "cubin"))
        assert not spilled, f"{kernel.name} spills: {spilled[:5]}"              # a called division may have a stack
        assert registers <= 255
        if kernel.name == "quantize_tile":
            assert not re.findall(r"fma\.|div\.(?!rn)", kernel.asm["ptx"]), "rounds otherwise than torch"
    for kernel in (settled, ring):
        loads = re.findall(r"ld\.global\S*?((?:\.v\d)?\.[busf]\d+)", kernel.asm["ptx"])
        scalars = loads.count(".b64"), loads.count(".b32")                      # position, length; q and NF4's levels
        print(kernel.name, {load: loads.count(load) for load in set(loads)})
        if kernel.name == "attend_shared_tile":            # copies codes ahead of their use, 4 to 16 bytes at a time
            assert "cp.async" in kernel.asm["ptx"] and not set(loads) & {".b8", ".b16"}, f"loaded in pieces: {loads}"
            continue
        assert scalars[0] == 2 and scalars[1] <= w + 1, f"codes loaded 4 bytes at a time: {loads}"
        wide = {".v4.b32"} if full and kernel is settled else {".v2.b32", ".v4.b32"}
        assert set(loads) - {".b64", ".b32"} <= wide, f"codes loaded in pieces: {loads}"
