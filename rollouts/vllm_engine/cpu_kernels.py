"""This project's kernels in a vLLM on a CPU, through vLLM's doors for other backends and operations.

`use_kernels` makes a vLLM that is built afterwards in this process take them: attention of steps that read one new
position a request, residual and norm, SwiGLU. Whatever they do not cover (prompts, other dtypes and head sizes,
windows) goes through vLLM's own as before, in the same cache.
"""

import logging
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.custom_op import op_registry_oot
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from rollouts.kernels.building import NoKernels
from rollouts.kernels.native import GROUP, LANES, PAGED_HEAD_SIZES, load_kernels

DTYPES = (torch.float32, torch.bfloat16)
LAYOUT = "vec"
"""vLLM's name of the cache layout that `attend_paged` reads."""
MATRIX_LAYOUT = "amx"
logger = logging.getLogger(__name__)


def use_kernels() -> None:
    """Where vLLM runs on a CPU and there is a compiler; else it keeps its own. May be called many times."""
    if not current_platform.is_cpu():
        return
    try:
        load_kernels()
    except NoKernels as error:
        logger.info("vLLM decodes by its own kernels, which are slower: %s", error)
        return
    register_backend(AttentionBackendEnum.CPU_ATTN, f"{__name__}.{KernelAttention.__name__}")
    op_registry_oot[RMSNorm.__name__] = KernelNorm
    op_registry_oot[SiluAndMul.__name__] = KernelGate


class KernelBuilder(CPUAttentionMetadataBuilder):
    """Keys and values lie as the kernels read them, also where vLLM would lay them out for matrix units: a step's one
    query a head leaves those idle."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.isa == MATRIX_LAYOUT and self.head_dim in PAGED_HEAD_SIZES and self.kv_cache_dtype == "auto":
            self.isa = LAYOUT
            self._set_isa_to_layers(self.layer_names)


class KernelImpl(CPUAttentionBackendImpl):
    """One layer's attention. `by_kernel`: whether its last step was one of `attend_paged`."""

    by_kernel = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.plain = (
            self.head_size in PAGED_HEAD_SIZES
            and self.attn_type == AttentionType.DECODER
            and self.alibi_slopes is None
            and self.sliding_window == -1
            and self.logits_soft_cap == 0
            and self.sinks is None
            and self.kv_sharing_target_layer_name is None
        )

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: CPUAttentionMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """With the writing of keys and values, which vLLM else asks for in a call of its own."""
        if attn_metadata is None:  # vLLM warms up
            return output
        step = attn_metadata
        one_each = self.plain and step.causal and step.max_query_len == 1
        self.by_kernel = one_each and layer.isa == LAYOUT and self._readable(query, key, value, kv_cache, output)
        if not self.by_kernel:
            if self.kv_sharing_target_layer_name is None and key is not None:
                self.do_kv_cache_update(layer, key, value, kv_cache, step.slot_mapping)
            scales = (output_scale, output_block_scale)
            return super().forward(layer, query, key, value, kv_cache, step, output, *scales)
        rows = step.num_actual_tokens
        load_kernels().attend_paged(
            query[:rows], key[:rows], value[:rows], kv_cache, step.block_table, step.seq_lens, output[:rows],
            scale=self.scale,
        )  # fmt: skip
        return output

    def _readable(self, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor, output: Tensor) -> bool:
        """Whether all lies as the kernel takes it. Rows may lie apart, as in a slice of the fused product, and a row's
        heads may not."""
        together = all(part.stride()[1:] == (self.head_size, 1) for part in (query, key, value))
        whole = kv_cache.is_contiguous() and kv_cache.shape[2] % GROUP == 0
        alike = all(part.dtype == kv_cache.dtype for part in (query, key, value, output))
        return together and whole and alike and kv_cache.dtype in DTYPES


class KernelAttention(CPUAttentionBackend):
    """vLLM's on a CPU, with these kernels where they fit."""

    forward_includes_kv_cache_update: bool = True

    @staticmethod
    def get_impl_cls() -> type[KernelImpl]:
        return KernelImpl

    @staticmethod
    def get_builder_cls() -> type[KernelBuilder]:
        return KernelBuilder


class KernelNorm(RMSNorm):
    """Residual and norm in one pass; both are written where they lie, as vLLM allows."""

    def forward_cpu(  # pyrefly: ignore  (the base's is one that raises)
        self, x: Tensor, residual: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        hidden = x.shape[-1]
        into = x if residual is None else residual
        whole = x.is_contiguous() and into.is_contiguous() and hidden % LANES == 0 and x.dim() == 2
        same = x.dtype == into.dtype == self.weight.dtype and x.dtype in DTYPES
        if not (whole and same and self.pass_weight and self.variance_size_override is None):
            return self.forward_native(x, residual)
        weight_H = self.weight.detach()
        if residual is None:
            out = torch.empty_like(x)
            load_kernels().add_norm(x, None, weight_H, out, self.variance_epsilon)
            return out
        load_kernels().add_norm(residual, x, weight_H, x, self.variance_epsilon)
        return x, residual


class KernelGate(SiluAndMul):
    """SwiGLU in one pass."""

    def forward_cpu(self, x: Tensor) -> Tensor:
        if not (x.is_contiguous() and x.dim() == 2 and x.dtype in DTYPES):
            return self.forward_native(x)
        out = x.new_empty(x.shape[0], x.shape[1] // 2)
        load_kernels().gate(x, out)
        return out
