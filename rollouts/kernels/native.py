"""The fused kernels, compiled for this processor on first use and kept in the user's cache folder.

Without a C++ compiler the packed decoder runs on torch operations instead, and vLLM on its own kernels: the same law,
rounded otherwise and slower.
"""

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from rollouts.kernels.building import NoKernels, built

SOURCES = tuple(Path(__file__).with_name(name) for name in ("vectors.h", "decode.cpp", "paged.cpp"))
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-fno-math-errno", "-shared", "-fPIC")
HEAD_SIZES = (16, 32, 48, 64, 80, 96, 128)
PAGED_HEAD_SIZES = (32, 64, 96, 128)
"""Those of `attend_paged`."""
GROUP = 32
"""A page's positions are a multiple of it."""
LANES = 16
"""Positions in one block of keys, floats in one vector."""


class Kernels:
    """The calls of the compiled library. Tensors must be on the CPU, float32 or bfloat16, and contiguous unless it says
    otherwise."""

    def __init__(self, library: ctypes.CDLL) -> None:
        pointer, integer, word, real = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float
        self._add_norm, self._gate, self._attend = library.rlmm_add_norm, library.rlmm_gate, library.rlmm_attend
        self._large_pages = library.rlmm_large_pages
        self._large_pages.argtypes = [pointer, word, integer]
        self._add_norm.argtypes = [integer, integer, *[pointer] * 4, word, word, real]
        self._gate.argtypes = [integer, *[pointer] * 2, word, word]
        self._attend.argtypes = [integer, *[pointer] * 7, *[word] * 6, real]
        self._add_norm_bf16, self._attend_paged = library.rlmm_add_norm_bf16, library.rlmm_attend_paged
        self._add_norm_bf16.argtypes = [*[pointer] * 4, word, word, real]
        self._attend_paged.argtypes = [integer, *[pointer] * 7, *[word] * 9, real]

    def empty(self, *sizes: int, dtype: torch.dtype) -> Tensor:
        """Unwritten memory on large pages where the system grants them: a cache is fresh, large and read whole."""
        tensor = torch.empty(sizes, dtype=dtype)
        self._large_pages(tensor.data_ptr(), tensor.numel() * tensor.element_size(), 0)
        return tensor

    def zeros_anew(self, memory: torch.UntypedStorage) -> None:
        """Memory of its own mapping that holds zeros alone, on large pages from now on where the system grants them."""
        self._large_pages(memory.data_ptr(), memory.nbytes(), 1)

    def add_norm(self, x_NH: Tensor, delta_NH: Tensor | None, weight_H: Tensor, out_NH: Tensor, eps: float) -> None:
        """x += delta, in place; out = RMSNorm(x) weight (Zhang & Sennrich 2019, arXiv 1910.07467).

        x and the weight are float32, or all four bfloat16. `out` may be `delta`."""
        delta = 0 if delta_NH is None else delta_NH.data_ptr()
        if x_NH.dtype == torch.bfloat16:
            self._add_norm_bf16(x_NH.data_ptr(), delta, weight_H.data_ptr(), out_NH.data_ptr(), *x_NH.shape, eps)
            return
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

    def attend_paged(
        self,
        q_NED: Tensor,
        k_NFD: Tensor,
        v_NFD: Tensor,
        cache_BFSX: Tensor,
        table_NP: Tensor,
        length_N: Tensor,
        out_NED: Tensor,
        *,
        scale: float,
    ) -> None:
        """Append keys and values at position `length - 1` >= 0 of every row, and attend from 0 to it.

        Args:
            q_NED: turned queries. Rows of it, of keys and of values may lie apart, as in a slice of the fused product.
            cache_BFSX: of B pages of S positions, a multiple of 32: of each key head, keys [D, S], then values [S, D].
            table_NP: int32, the pages of each row; `length_N` int32.
        """
        _, kv_heads, page, _ = cache_BFSX.shape
        rows, heads, size = q_NED.shape
        tensors = (q_NED, k_NFD, v_NFD, cache_BFSX, out_NED, table_NP, length_N)
        strides = (table_NP.stride(0), q_NED.stride(0), k_NFD.stride(0), v_NFD.stride(0))
        half = int(out_NED.dtype == torch.bfloat16)
        if self._attend_paged(
            half, *(tensor.data_ptr() for tensor in tensors), rows, heads, kv_heads, size, page, *strides, scale
        ):
            raise ValueError(f"the kernels have no head size {size} for pages; known: {PAGED_HEAD_SIZES}")


@functools.cache
def load_kernels() -> Kernels:
    """The library of this processor, compiled if it is not in the cache. Raises NoKernels."""
    path = built("kernels", SOURCES, FLAGS)
    try:
        return Kernels(ctypes.CDLL(str(path)))
    except OSError as error:
        raise NoKernels(f"{path} cannot be loaded ({error})") from error
