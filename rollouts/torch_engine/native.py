"""The fused kernels of `kernels.cpp`, compiled for this processor on first use and kept in the user's cache folder.

Without a C++ compiler the packed decoder runs on torch operations instead: the same law, rounded otherwise and slower.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("kernels.cpp")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-fno-math-errno", "-shared", "-fPIC")
HEAD_SIZES = (16, 32, 48, 64, 80, 96, 128)
LANES = 16
"""Positions in one block of keys, floats in one vector."""


class NoKernels(RuntimeError):
    """The kernels cannot be built or loaded here; the text says why."""


class Kernels:
    """The calls of the compiled library. Tensors must be contiguous, on the CPU, float32 or bfloat16."""

    def __init__(self, library: ctypes.CDLL) -> None:
        pointer, integer, word, real = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float
        self._add_norm, self._gate, self._attend = library.rlmm_add_norm, library.rlmm_gate, library.rlmm_attend
        self._large_pages = library.rlmm_large_pages
        self._large_pages.argtypes = [pointer, word]
        self._add_norm.argtypes = [integer, integer, *[pointer] * 4, word, word, real]
        self._gate.argtypes = [integer, *[pointer] * 2, word, word]
        self._attend.argtypes = [integer, *[pointer] * 7, *[word] * 6, real]

    def empty(self, *sizes: int, dtype: torch.dtype) -> Tensor:
        """Unwritten memory on large pages where the system grants them: a cache is fresh, large and read whole."""
        tensor = torch.empty(sizes, dtype=dtype)
        self._large_pages(tensor.data_ptr(), tensor.numel() * tensor.element_size())
        return tensor

    def add_norm(self, x_NH: Tensor, delta_NH: Tensor | None, weight_H: Tensor, out_NH: Tensor, eps: float) -> None:
        """x += delta, in place; out = RMSNorm(x) weight (Zhang & Sennrich 2019, arXiv 1910.07467)."""
        delta = 0 if delta_NH is None else delta_NH.data_ptr()
        halves = int(delta_NH is not None and delta_NH.dtype == torch.bfloat16), int(out_NH.dtype == torch.bfloat16)
        self._add_norm(*halves, x_NH.data_ptr(), delta, weight_H.data_ptr(), out_NH.data_ptr(), *x_NH.shape, eps)

    def gate(self, gate_up_NI: Tensor, out_NI: Tensor) -> None:
        """out [N, I] = silu(first half) second half of gate_up [N, 2I] (Shazeer 2020, arXiv 2002.05202)."""
        self._gate(int(out_NI.dtype == torch.bfloat16), gate_up_NI.data_ptr(), out_NI.data_ptr(), *out_NI.shape)

    def attend(
        self,
        qkv_NX: Tensor,
        cos_PD: Tensor,
        sin_PD: Tensor,
        keys_NHBDL: Tensor,
        values_NHSD: Tensor,
        start_N: Tensor,
        out_NX: Tensor,
        *,
        heads: int,
        position: int,
    ) -> None:
        """Turn queries and keys, append to the cache at `position`, attend from `start_N` to `position`."""
        rows, kv_heads, capacity, size = values_NHSD.shape
        tensors = (qkv_NX, cos_PD, sin_PD, keys_NHBDL, values_NHSD, start_N, out_NX)
        sizes = (rows, heads, kv_heads, size, capacity, position)
        half = int(out_NX.dtype == torch.bfloat16)
        if self._attend(half, *(tensor.data_ptr() for tensor in tensors), *sizes, size**-0.5):
            raise ValueError(f"the kernels have no head size {size}; known: {HEAD_SIZES}")


@functools.cache
def load_kernels() -> Kernels:
    """The library of this processor, compiled if it is not in the cache. Raises NoKernels."""
    compiler = os.environ.get("CXX") or next(filter(None, map(shutil.which, ("g++", "clang++", "c++"))), None)
    if compiler is None:
        raise NoKernels("no C++ compiler (g++, clang++ or $CXX) was found")
    path = _folder() / f"kernels-{_key(compiler)}.so"
    try:
        if not path.is_file():
            _compile(compiler, path)
        return Kernels(ctypes.CDLL(str(path)))
    except OSError as error:
        raise NoKernels(f"{path} cannot be written or loaded ({error})") from error


def _folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rlmm"


def _key(compiler: str) -> str:
    """Of the source, the flags and the processor: another machine on the same home folder compiles its own."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else [platform.processor(), platform.machine()]
    kind = [line for line in lines if line.startswith(("model name", "flags", "Features"))][:2] or lines[:2]
    return hashlib.sha256("\n".join([SOURCE.read_text(), *FLAGS, compiler, *kind]).encode()).hexdigest()[:16]


def _compile(compiler: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        built = Path(folder, path.name)
        command = [*compiler.split(), *FLAGS, "-o", str(built), str(SOURCE)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            said = (done.stderr.strip().splitlines() or ["no message"])[0]
            raise NoKernels(f"{compiler} cannot compile them ({said})")
        built.replace(path)
