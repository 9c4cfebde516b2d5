"""Decode attention on a CPU, by decode.cpp: it reads each code of the cache once and keeps no dequantised copy.

A C++ compiler makes a library of it at the first use on a machine, in two to five seconds; later processes load that
file (about 20 ms). Its name is a hash of the source, the command, and what the compiler says of itself and of this CPU,
so that another source, compiler or CPU gets another library.
"""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("decode.cpp")
FLAGS = ["-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math",
         "-fno-signed-zeros", "-shared", "-fPIC", "-fopenmp-simd" if sys.platform == "darwin" else "-fopenmp"]
FORMATS = ("fp32", "bf16", "fp16", "q8_0", "q4_0", "q4_sym", "nf4")             # in the order of decode.cpp
FAILURES = (RuntimeError, OSError)                         # that the first use may raise


def compiler() -> str:
    return os.environ.get("CXX", "g++")


def missing() -> str | None:
    """What keeps this kernel from running here."""
    return None if shutil.which(compiler()) else f"no C++ compiler ({compiler()})"


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dba_kernels"


@functools.cache
def library(folder: Path | None = None) -> ctypes.CDLL:
    """decode.cpp as a library in the folder (cache_folder()). Raises RuntimeError where the compiler fails, OSError
    where the file can't be written or loaded."""
    command = [compiler(), *FLAGS]
    here = run([*command, "-dM", "-E", "-x", "c++", os.devnull])                # macros of this compiler and this CPU
    key = hashlib.sha256("\0".join([*command, here, SOURCE.read_text(encoding="ascii")]).encode()).hexdigest()[:16]
    path = (folder or cache_folder()) / f"decode-{key}.so"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as building:          # renamed, so that none is loaded half
            run([*command, str(SOURCE), "-o", f"{building}/decode.so"])
            os.replace(f"{building}/decode.so", path)
    return ctypes.CDLL(str(path))


def run(command: list[str]) -> str:
    """Output of a command. Raises RuntimeError with the first line of its complaint."""
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{command[0]}: {(result.stderr.strip() or f'exit {result.returncode}').splitlines()[0]}")
    return result.stdout


def pack(*numbers) -> ctypes.Array:
    """Whole numbers and addresses as a struct of 8 bytes each."""
    return (ctypes.c_int64 * len(numbers))(*numbers)


def address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def describe(stream) -> tuple[int, ...]:
    """Fields of decode.cpp's Stream."""
    return (FORMATS.index(stream.fmt), FORMATS.index(stream.ring_fmt), stream.channels, stream.codes.size(2),
            stream.ring.size(2), stream.codes.data_ptr(), address(stream.scales), stream.ring.data_ptr())


def attention(q, streams, shape, span, null=None) -> torch.Tensor:
    """decode_attention() of train_dba.py for few queries."""
    B, H, T, _ = q.shape
    G, values = 1 if shape.latent else shape.v_groups, streams[shape.v_stream]
    keys = [streams[path.stream] for path in shape.paths]
    q, pos, settled = q.float().contiguous(), span.pos.contiguous(), span.settled.contiguous()
    score, value = (None, None) if null is None else (x.float().contiguous() for x in null)
    out = q.new_empty(B, H, T, values.channels // G)
    fields = [B, H, G, T, span.end, span.window, len(keys), torch.get_num_threads(), pos.data_ptr(), settled.data_ptr(),
              q.data_ptr(), address(score), address(value), out.data_ptr(), *describe(values)]
    for key in keys:
        fields += describe(key)
    library().attend(pack(*fields))
    return out


def append(stream, rows, pos, x) -> None:
    """append() of train_dba.py."""
    rows, pos, x = rows.contiguous(), pos.contiguous(), x.float().contiguous()  # names keep them until the call is over
    library().append(pack(len(x), torch.get_num_threads(), rows.data_ptr(), pos.data_ptr(), x.data_ptr(),
                          *describe(stream)))


# For more queries that share a key, PyTorch's fused kernel over a dequantised chunk is as fast or faster: measured by
# benchmarks/prefill_speed.py, which crosses between 64 and some hundreds, by the width of a head.
KERNEL = dict(name="C++", formats=FORMATS, attention=attention, append=append, most_queries=64)
