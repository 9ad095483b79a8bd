"""A Llama's weights as the packed decoder samples from them: fused, and packed for oneDNN on a CPU.

Fused matrices: query, key and value in one; gate and up in one. In bfloat16 the products are bfloat16, and norms,
embedding and head stay float32, as under autocast.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from rollouts.torch_engine.llama import LlamaShape

FUSED = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "out": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}


@dataclass(frozen=True)
class Product:
    """x [N, in] -> x W^T + b [N, out] in the arithmetic of `matrix`: W in oneDNN's layout, or plain.

    `taken` is W as it was handed over, where `matrix` does not give it back exactly (bfloat16).
    """

    matrix: Tensor
    taken: Tensor | None
    bias: Tensor | None
    dtype: torch.dtype

    def __call__(self, x_NI: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(self.dtype)
        if self.matrix.is_mkldnn:
            return torch.ops.mkldnn._linear_pointwise(x_NI, self.matrix, bias, "none", [], "")
        return F.linear(x_NI, self.matrix, bias)

    def plain(self) -> Tensor:
        """W [out, in] in float32: what products are made with, or what that was rounded from."""
        if self.taken is not None:
            return self.taken
        return self.matrix.to_dense() if self.matrix.is_mkldnn else self.matrix


def product(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Product:
    """The product with a float32 weight (the caller's own copy) in the arithmetic of `dtype`."""
    matrix, taken = weight.to(dtype), None if dtype == weight.dtype else weight
    if weight.device.type == "cpu" and torch.backends.mkldnn.is_available():
        matrix = torch.ops.mkldnn._reorder_linear_weight(matrix, None)
    return Product(matrix, taken, bias, dtype)


@dataclass(frozen=True)
class Layer:
    """One decoder layer: norms [H] and products."""

    norm_in: Tensor
    norm_post: Tensor
    products: dict[str, Product]


@dataclass(frozen=True)
class LlamaWeights:
    """All weights, and the head cut to the vocabulary slices asked for since they were taken."""

    embedding_VH: Tensor
    layers: tuple[Layer, ...]
    norm_H: Tensor
    head_VH: Tensor
    shape: LlamaShape
    _heads: dict[tuple[int, int], Product] = field(default_factory=dict)

    def head(self, hidden_NH: Tensor, vocabulary: tuple[int, int]) -> Tensor:
        """Logits [N, V] of the slice, in float32."""
        if vocabulary not in self._heads:
            rows = self.head_VH[slice(*vocabulary)].contiguous()
            self._heads[vocabulary] = product(rows, None, torch.float32)
        return self._heads[vocabulary](hidden_NH)

    def named(self) -> Iterator[tuple[str, Tensor]]:
        """The weights as they were taken, under the checkpoint's names."""
        yield "model.embed_tokens.weight", self.embedding_VH
        for index, layer in enumerate(self.layers):
            prefix = f"model.layers.{index}."
            yield f"{prefix}input_layernorm.weight", layer.norm_in
            yield f"{prefix}post_attention_layernorm.weight", layer.norm_post
            for key, names in FUSED.items():
                yield from _parts(layer.products[key], [prefix + name for name in names], _sizes(self.shape)[key])
        yield "model.norm.weight", self.norm_H
        if not self.shape.tied:
            yield "lm_head.weight", self.head_VH


def take_weights(weights: Iterable[tuple[str, Tensor]], shape: LlamaShape, dtype: torch.dtype) -> LlamaWeights:
    """A copy of a model's weights, packed. Raises ValueError where a weight is missing or has no place."""
    plain = {name: weight.detach() for name, weight in weights}

    def copied(name: str) -> Tensor:
        if name not in plain:
            raise ValueError(
                f"a weight sync lacks {name!r}; give every weight of the model, under the checkpoint's names"
            )
        return plain.pop(name).to(torch.float32, copy=True)

    def fused(prefix: str, key: str, biased: bool) -> Product:
        names = [prefix + name for name in FUSED[key]]
        weight = torch.cat([copied(f"{name}.weight") for name in names])
        bias = torch.cat([copied(f"{name}.bias") for name in names]) if biased else None
        return product(weight, bias, dtype)

    def layer(index: int) -> Layer:
        prefix = f"model.layers.{index}."
        biased = {"qkv": shape.attention_bias, "out": shape.attention_bias}
        products = {key: fused(prefix, key, biased.get(key, shape.mlp_bias)) for key in FUSED}
        norm_in, norm_post = (copied(f"{prefix}{name}_layernorm.weight") for name in ("input", "post_attention"))
        return Layer(norm_in, norm_post, products)

    embedding, norm = copied("model.embed_tokens.weight"), copied("model.norm.weight")
    layers = tuple(layer(index) for index in range(shape.layers))
    head = embedding if shape.tied else copied("lm_head.weight")
    if plain:
        raise ValueError(f"a weight sync brings {sorted(plain)[:3]}, which a plain Llama does not have")
    return LlamaWeights(embedding, layers, norm, head, shape)


def _sizes(shape: LlamaShape) -> dict[str, list[int]]:
    query, key = shape.heads * shape.head_size, shape.kv_heads * shape.head_size
    return {
        "qkv": [query, key, key],
        "out": [shape.hidden],
        "gate_up": [shape.intermediate, shape.intermediate],
        "down": [shape.hidden],
    }


def _parts(whole: Product, names: list[str], sizes: list[int]) -> Iterator[tuple[str, Tensor]]:
    yield from zip([f"{name}.weight" for name in names], whole.plain().split(sizes), strict=True)
    if whole.bias is not None:
        yield from zip([f"{name}.bias" for name in names], whole.bias.split(sizes), strict=True)
