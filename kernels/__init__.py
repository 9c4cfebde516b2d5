"""Back-ends of the KV cache: `choose` names the one that --kernel gets. Each module has attention() and append() with
the arguments and results of decode_attention() and append() of train_dba.py; none of them dequantises the cache."""

import importlib.util
import os
import shutil

COMPILED_FROM = 8192                                       # tokens; for fewer, compiling takes longer than it saves


def choose(name, device, tokens):
    """(settings of train_dba.Kernel or None for its own torch path, why).

    name: auto, triton or metal; device: torch.device; tokens: what the cache is for. Raises ValueError if the named
    kernel can't run here.
    """
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if name == "triton" or name == "auto" and device.type == "cuda":
        if importlib.util.find_spec("triton") is None:
            if name == "auto":
                return None, "pip install triton for its kernels"
            raise ValueError("triton is missing; pip install triton")
        if device.type != "cuda" and not interpreted:
            raise ValueError(f"needs a CUDA device, not {device.type} (TRITON_INTERPRET=1 interprets it anywhere)")
        from . import triton_decode
        return triton_decode.KERNEL, "interpreted" if interpreted else "a CUDA device"
    if name == "metal" or name == "auto" and device.type == "mps":
        if device.type != "mps":
            raise ValueError(f"needs an Apple GPU, not {device.type}")
        from . import metal_decode
        try:
            error = metal_decode.self_test()
            problem = "" if error <= metal_decode.TOLERANCE else f"it differs from torch by {error:.1e} here"
        except (RuntimeError, SyntaxError) as e:           # what torch.mps.compile_shader raises
            problem = f"it fails here ({str(e).splitlines()[0]})"
        if not problem:
            return metal_decode.KERNEL, "an Apple GPU, a small cache compared with torch"
        if name == "metal":
            raise ValueError(f"{problem}; use --kernel torch")
        return None, f"metal: {problem}"
    if device.type != "cpu":
        return None, f"no kernel for {device.type}"
    if tokens < COMPILED_FROM:
        return None, f"fewer than {COMPILED_FROM} tokens on a CPU"
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        return None, "no C++ compiler for torch.compile"
    from . import cpu_decode
    return cpu_decode.KERNEL, f"{COMPILED_FROM} tokens or more on a CPU"
