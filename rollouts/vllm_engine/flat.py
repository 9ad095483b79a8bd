"""A decode step of vLLM's Llama without the calls of its modules, on a CPU.

Modules, registries and operations that hide from a compiler cost a small model a tenth of its step. Here are the same
products and kernels on the same numbers in the same order, called directly: hidden states are the model's, bit for bit.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding
from vllm.model_executor.models.llama import LlamaAttention, LlamaDecoderLayer, LlamaMLP, LlamaModel

from rollouts.kernels.native import LANES, load_kernels
from rollouts.vllm_engine.cpu_kernels import DTYPES, KernelGate, KernelNorm
from rollouts.vllm_engine.two_streams import TwoStreamAttention, TwoStreamModel


@dataclass(frozen=True)
class Layer:
    """Parts of a decoder layer. attentions: one a stream. norm_after: the next layer's first, or the model's last."""

    qkv: Callable[[Tensor], Tensor]
    out: Callable[[Tensor], Tensor]
    gate_up: Callable[[Tensor], Tensor]
    down: Callable[[Tensor], Tensor]
    rotary: Any
    attentions: Sequence[Any]
    sizes: tuple[int, int, int]
    norm_post: Any
    norm_after: Any


class FlatLlama:
    """One token a row, after steps that went through `attend_paged` in every layer (`StepsRunner._decodes_by_kernels`).

    It holds parts of vLLM's model as they are now: a reload of its weights may put others in their place.
    """

    def __init__(self, model: Any) -> None:
        self.model = model.model
        layers = list(self.model.layers)
        norms = [*(layer.input_layernorm for layer in layers[1:]), self.model.norm]
        self.first = layers[0].input_layernorm
        self.layers = [_layer(layer, after) for layer, after in zip(layers, norms, strict=True)]
        self.streams = len(self.layers[0].attentions)

    def __call__(self, ids_N: Tensor, position_N: Tensor) -> Tensor:
        """Final hidden states [N, streams x H]. Inside vLLM's forward context of the last whole step."""
        if self.streams > 1:
            ids_N, position_N = torch.cat([ids_N, self.model.uncond_V[ids_N]]), position_N.repeat(self.streams)
        kernels, sum_NH = load_kernels(), self.model.embed_input_ids(ids_N)
        normed_NH = torch.empty_like(sum_NH)
        kernels.add_norm(sum_NH, None, self.first.weight, normed_NH, self.first.variance_epsilon)
        for layer in self.layers:
            normed_NH = layer.out(_attended(layer, layer.qkv(normed_NH), position_N))
            post, after = layer.norm_post, layer.norm_after
            kernels.add_norm(sum_NH, normed_NH, post.weight, normed_NH, post.variance_epsilon)
            gate_up_NI = layer.gate_up(normed_NH)
            gated_NI = gate_up_NI.new_empty(len(gate_up_NI), gate_up_NI.shape[1] // 2)
            kernels.gate(gate_up_NI, gated_NI)
            normed_NH = layer.down(gated_NI)
            kernels.add_norm(sum_NH, normed_NH, after.weight, normed_NH, after.variance_epsilon)
        return normed_NH if self.streams == 1 else torch.cat(normed_NH.chunk(self.streams), dim=-1)


def is_flat(model: Any) -> bool:
    """Whether `model` (vLLM's, on one device) is a Llama that computes nothing else than `FlatLlama`."""
    inner = getattr(model, "model", None)
    if not isinstance(inner, LlamaModel) or type(inner).forward not in (LlamaModel.forward, TwoStreamModel.forward):
        return False
    return _is_norm(inner.norm) and all(_is_plain(layer) for layer in inner.layers)


def _is_plain(layer: Any) -> bool:
    if not isinstance(layer, LlamaDecoderLayer) or type(layer).forward is not LlamaDecoderLayer.forward:
        return False
    attention: Any = layer.self_attn
    if type(attention).forward not in (LlamaAttention.forward, TwoStreamAttention.forward):
        return False
    linears: Sequence[Any] = (attention.qkv_proj, attention.o_proj, layer.mlp.gate_up_proj, layer.mlp.down_proj)
    return (
        type(layer.mlp) is LlamaMLP
        and all(_is_norm(norm) for norm in (layer.input_layernorm, layer.post_attention_layernorm))
        and type(layer.mlp.act_fn) is KernelGate
        and all(type(one.quant_method) is UnquantizedLinearMethod and one.tp_size == 1 for one in linears)
        and getattr(type(attention.rotary_emb), "forward_cpu", None) is RotaryEmbedding.forward_cpu
    )


def _is_norm(norm: Any) -> bool:
    """One that goes through the kernel, whatever the rows."""
    own = type(norm) is KernelNorm and norm.pass_weight and norm.variance_size_override is None
    return own and norm.weight.dtype in DTYPES and len(norm.weight) % LANES == 0


def _layer(layer: Any, norm_after: Any) -> Layer:
    attention, mlp = layer.self_attn, layer.mlp
    second = [attention.attn_uncond] if isinstance(attention, TwoStreamAttention) else []
    return Layer(
        qkv=_product(attention.qkv_proj),
        out=_product(attention.o_proj),
        gate_up=_product(mlp.gate_up_proj),
        down=_product(mlp.down_proj),
        rotary=attention.rotary_emb,
        attentions=(attention.attn, *second),
        sizes=(attention.q_size, attention.kv_size, attention.kv_size),
        norm_post=layer.post_attention_layernorm,
        norm_after=norm_after,
    )


def _product(linear: Any) -> Callable[[Tensor], Tensor]:
    method, bias = linear.quant_method, linear.bias
    return lambda x_NI: method.apply(linear, x_NI, bias)


def _attended(layer: Layer, qkv_NX: Tensor, position_N: Tensor) -> Tensor:
    q, k, v = qkv_NX.split(layer.sizes, dim=-1)
    layer.rotary.forward_cpu(position_N, q, k)
    size = layer.attentions[0].head_size
    out_NX = torch.empty_like(q, memory_format=torch.contiguous_format)
    heads = [part.unflatten(1, (-1, size)) for part in (q, k, v, out_NX)]
    steps: Any = get_forward_context().attn_metadata
    rows = len(position_N) // len(layer.attentions)
    for at, attention in enumerate(layer.attentions):
        step, (q_NED, k_NFD, v_NFD, out_NED) = (
            steps[attention.layer_name],
            (one[at * rows : (at + 1) * rows] for one in heads),
        )
        load_kernels().attend_paged(
            q_NED,
            k_NFD,
            v_NFD,
            attention.kv_cache,
            step.block_table,
            step.seq_lens,
            out_NED,
            scale=attention.impl.scale,
        )
    return out_NX
