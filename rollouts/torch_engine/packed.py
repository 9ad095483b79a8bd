"""A Llama's forward for sampling: fused products, a static cache, one new position a row and step.

The same function as `LlamaForCausalLM` (rounding apart), prefill with left padding included. On a CPU the parts between
the products run in `rollouts/kernels`; elsewhere, and for prefill, on torch operations, on a GPU recorded as a CUDA
graph.

Shapes: Q prompts, P prefix positions, N decode rows, H hidden size, D head size, S cache positions, B = S / 16 blocks.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from rollouts.kernels.building import NoKernels
from rollouts.kernels.native import HEAD_SIZES, LANES, Kernels, load_kernels
from rollouts.torch_engine.graphs import Graphs
from rollouts.torch_engine.llama import LlamaShape
from rollouts.torch_engine.weights import Layer, LlamaWeights, take_weights


@dataclass(frozen=True)
class Prefix:
    """What a prefill leaves: the last hidden state [Q, H], and turned keys and values [Q, heads, P, D] a layer."""

    hidden_QH: Tensor
    keys: list[Tensor]
    values: list[Tensor]


@dataclass
class Rows:
    """The decode rows' cache: keys [N, heads, B, D, 16] (kernels) or [N, heads, S, D], values [N, heads, S, D] a layer.

    `start_N` is each row's first real position; `filled` positions hold something. On a GPU `graphs` makes the steps.
    """

    keys: list[Tensor]
    values: list[Tensor]
    start_N: Tensor
    filled: int
    graphs: Graphs | None = None


class PackedLlama:
    """The decoder. It samples from its own copy of the weights, taken by `take`.

    Args:
        dtype: of the products and the cache: float32, or bfloat16 for a policy under bfloat16 autocast.
        use_kernels: look for the compiled kernels, else use torch operations; `without` says why they are not used.
        use_graphs: record a step as a CUDA graph, where the model is on a GPU.
    """

    def __init__(
        self, shape: LlamaShape, dtype: torch.dtype, *, use_kernels: bool = True, use_graphs: bool = True
    ) -> None:
        self.shape, self.dtype = shape, dtype
        self.device = shape.cos_PD.device
        self.graphs = use_graphs and self.device.type == "cuda"
        self.kernels: Kernels | None = None
        self.without = "" if use_kernels else "they are switched off"
        self._weights: LlamaWeights | None = None
        if use_kernels:
            self._find_kernels()

    def _find_kernels(self) -> None:
        shape = self.shape
        if self.device.type != "cpu":
            self.without = f"they are for a CPU, and the model is on {self.device.type}"
        elif shape.head_size not in HEAD_SIZES or shape.hidden % LANES:
            self.without = (
                f"they need a head size in {HEAD_SIZES} and a hidden size that {LANES} divides, and these are "
                f"{shape.head_size} and {shape.hidden}"
            )
        else:
            try:
                self.kernels = load_kernels()
            except NoKernels as error:
                self.without = str(error)

    @property
    def weights(self) -> LlamaWeights:
        if self._weights is None:
            raise RuntimeError("the packed decoder has no weights yet: sync the engine before it generates")
        return self._weights

    def take(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Copy and pack a model's full weights (float32, under the checkpoint's names)."""
        self._weights = None  # the old ones go first: two copies would stand beside the model
        self._weights = take_weights(weights, self.shape, self.dtype)

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """The weights sampled from, read back under the checkpoint's names."""
        return self.weights.named()

    def prefill(self, ids_QP: Tensor, mask_QP: Tensor, length: int) -> Prefix:
        """One forward over left-padded prefixes that `length` positions will follow."""
        most, needed = self.shape.cos_PD.shape[0], ids_QP.shape[1] + length - 1
        if needed > most:
            raise ValueError(
                f"a sequence of {needed} tokens (prompt and image) exceeds the model's {most} positions; shorten the "
                "prompts (data.max_prompt_characters) or raise policy.max_positions"
            )
        ids_QP, mask_QP = ids_QP.to(self.device), mask_QP.to(self.device)
        prompts, width = ids_QP.shape
        position_QP = (mask_QP.long().cumsum(-1) - 1).clamp_min(0)
        seen_PP = torch.ones(width, width, dtype=torch.bool, device=self.device).tril()
        # A padded position attends to itself: a row without keys is not a number.
        self_PP = torch.eye(width, dtype=torch.bool, device=self.device)
        mask_Q1PP = ((seen_PP & mask_QP[:, None, :]) | self_PP).unsqueeze(1)
        x_NH = F.embedding(ids_QP.reshape(-1), self.weights.embedding_VH)
        keys, values = [], []
        for layer in self.weights.layers:
            q, k, v = self._turned(self._normed(x_NH, layer.norm_in), layer, position_QP)
            keys.append(k)
            values.append(v.contiguous())  # a view would keep the queries, too
            x_NH = self._after_attention(x_NH, _attention(q, k, v, mask_Q1PP), layer)
        last_QH = x_NH.unflatten(0, (prompts, width))[:, -1]
        return Prefix(self._norm(last_QH, self.weights.norm_H), keys, values)

    def widen(self, prefix: Prefix, rows_N: Tensor, mask_QP: Tensor, length: int) -> Rows:
        """The cache of decode rows, row i continuing prompt `rows_N[i]`, with room for `length` more positions."""
        rows_N = rows_N.to(self.device)
        filled = mask_QP.shape[1]
        start_N = (filled - mask_QP.to(self.device).sum(-1))[rows_N]
        capacity = -(-(filled + length) // LANES) * LANES

        shape = (len(rows_N), self.shape.kv_heads, capacity, self.shape.head_size)
        keys, values = self._room(shape), self._room(shape)
        for index, (key, value) in enumerate(zip(prefix.keys, prefix.values, strict=True)):
            values[index][:, :, :filled] = value[rows_N]
            if self.kernels is None:
                keys[index][:, :, :filled] = key[rows_N]
            else:
                blocks = F.pad(key, (0, 0, 0, -filled % LANES)).unflatten(2, (-1, LANES)).transpose(3, 4)
                keys[index] = keys[index].view(*shape[:2], -1, shape[3], LANES)
                keys[index][:, :, : blocks.shape[2]] = blocks[rows_N]
        return Rows(keys, values, start_N, filled, Graphs(capacity) if self.graphs else None)

    def _room(self, shape: tuple[int, int, int, int]) -> list[Tensor]:
        """A layer's cache each, in one piece of memory. What is not yet filled is never read by the kernels; a step on
        torch operations may read it at weight 0, so there it must be a number."""
        sizes = (self.shape.layers, *shape)
        if self.kernels is not None:
            return list(self.kernels.empty(*sizes, dtype=self.dtype).unbind())
        return list(torch.zeros(sizes, dtype=self.dtype, device=self.device).unbind())

    def step(self, ids_N: Tensor, rows: Rows) -> Tensor:
        """Feed one token a row; the final hidden state [N, H] of each, in float32."""
        ids_N, at = ids_N.to(self.device), rows.filled
        if self.kernels is not None:
            hidden_NH = self._step_kernels(F.embedding(ids_N, self.weights.embedding_VH), rows)
        elif rows.graphs is not None:
            hidden_NH = rows.graphs(partial(self._step_torch, rows), ids_N, at)
        else:
            hidden_NH = self._step_torch(rows, ids_N, torch.tensor(at, device=self.device), at + 1)
        rows.filled += 1
        return hidden_NH

    def _step_kernels(self, x_NH: Tensor, rows: Rows) -> Tensor:
        kernels, shape, count = self.kernels, self.shape, x_NH.shape[0]
        assert kernels is not None, "called only with kernels"
        normed = x_NH.new_empty(count, shape.hidden, dtype=self.dtype)
        attended = x_NH.new_empty(count, shape.heads * shape.head_size, dtype=self.dtype)
        gated = x_NH.new_empty(count, shape.intermediate, dtype=self.dtype)
        delta: Tensor | None = None
        for index, layer in enumerate(self.weights.layers):
            use = layer.products
            kernels.add_norm(x_NH, delta, layer.norm_in, normed, shape.eps)
            cache = (shape.cos_PD, shape.sin_PD, rows.keys[index], rows.values[index], rows.start_N)
            kernels.attend(use["qkv"](normed), *cache, attended, heads=shape.heads, position=rows.filled)
            kernels.add_norm(x_NH, use["out"](attended), layer.norm_post, normed, shape.eps)
            kernels.gate(use["gate_up"](normed), gated)
            delta = use["down"](gated)
        hidden_NH = torch.empty_like(x_NH)
        kernels.add_norm(x_NH, delta, self.weights.norm_H, hidden_NH, shape.eps)
        return hidden_NH

    def _step_torch(self, rows: Rows, ids_N: Tensor, at: Tensor, extent: int) -> Tensor:
        """Feed tokens at position `at` [], a number on the device, of a cache of which `extent` positions are read."""
        x_NH = F.embedding(ids_N, self.weights.embedding_VH)
        position_N1 = (at - rows.start_N).unsqueeze(1)
        place_S = torch.arange(extent, device=self.device)
        seen_NS = (place_S >= rows.start_N[:, None]) & (place_S <= at)
        bias_NS = torch.zeros(seen_NS.shape, dtype=self.dtype, device=self.device).masked_fill(~seen_NS, -torch.inf)
        for index, layer in enumerate(self.weights.layers):
            q, k, v = self._turned(self._normed(x_NH, layer.norm_in), layer, position_N1)
            keys, values = rows.keys[index], rows.values[index]
            keys.index_copy_(2, at.view(1), k)
            values.index_copy_(2, at.view(1), v)
            # Queries of one key head are so many queries of one sequence: nothing is repeated for them.
            grouped = q.unflatten(1, (self.shape.kv_heads, -1)).squeeze(3)
            attended = _attention(grouped, keys[:, :, :extent], values[:, :, :extent], bias_NS[:, None, None])
            x_NH = self._after_attention(x_NH, attended.flatten(1, 2).unsqueeze(2), layer)
        return self._norm(x_NH, self.weights.norm_H)

    def _turned(self, normed_NH: Tensor, layer: Layer, position_QT: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys after the rotary embedding, and values [Q, heads, T, D]."""
        shape, (rows, width) = self.shape, position_QT.shape
        qkv = layer.products["qkv"](normed_NH).view(rows, width, -1, shape.head_size).transpose(1, 2)
        q, k, v = qkv.split([shape.heads, shape.kv_heads, shape.kv_heads], 1)
        cos, sin = shape.cos_PD[position_QT].unsqueeze(1), shape.sin_PD[position_QT].unsqueeze(1)
        return _rotate(q, cos, sin).to(self.dtype), _rotate(k, cos, sin).to(self.dtype), v

    def _after_attention(self, x_NH: Tensor, attended_QETD: Tensor, layer: Layer) -> Tensor:
        x_NH = x_NH + layer.products["out"](attended_QETD.transpose(1, 2).reshape(x_NH.shape[0], -1))
        gate, up = layer.products["gate_up"](self._normed(x_NH, layer.norm_post)).chunk(2, -1)
        return x_NH + layer.products["down"](F.silu(gate) * up)

    def _norm(self, x_NH: Tensor, weight_H: Tensor) -> Tensor:
        return F.rms_norm(x_NH, (self.shape.hidden,), weight_H, self.shape.eps)

    def _normed(self, x_NH: Tensor, weight_H: Tensor) -> Tensor:
        return self._norm(x_NH, weight_H).to(self.dtype)


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])


def _rotate(x_QETD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x_QETD.chunk(2, -1)
    return x_QETD * cos + torch.cat([-second, first], -1) * sin
