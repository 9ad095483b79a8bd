"""A masked policy's hidden states of a span that is being revealed: with its prompts, or after their keys and values.

Where every position sees every other, a prompt's hidden states change with each revealed token, so keys and values kept
from the step before would be another function: an approximation, which is not offered. Where a prompt sees itself alone
(`Layout.causal_prompt`), they are the same at every step and for every sample of it.

Shapes: Q prefixes (requests x streams, stream-major), P prefix positions, B samples, K streams, N = B x K rows, S span
positions, H hidden size.
"""

from typing import Protocol

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from rollouts.contract import MaskedDecoder
from rollouts.torch_engine.steps import Prefixes

Prompts = list[tuple[Tensor, Tensor]]
"""Keys and values [Q, heads, P, head size] of all prefixes, a layer each."""


class Revealing(Protocol):
    """The forward of a batch that is being revealed."""

    def hidden(self, ids_BS: Tensor) -> Tensor:
        """Of the whole span as it now stands [K, B, S, H]."""
        ...


class WithPrompts:
    """One forward of prompt and span together."""

    def __init__(self, decoder: MaskedDecoder, prefixes: Prefixes) -> None:
        self.decoder, self.streams = decoder, prefixes.streams
        self.ids_NP, self.mask_NP = prefixes.ids_QP[prefixes.rows_N], prefixes.mask_QP[prefixes.rows_N]

    def hidden(self, ids_BS: Tensor) -> Tensor:
        ids_NT = torch.cat([self.ids_NP, ids_BS.repeat(self.streams, 1)], 1)
        hidden = self.decoder.hidden(ids_NT, _seen(self.mask_NP, ids_BS))
        return hidden[:, self.ids_NP.shape[1] :].unflatten(0, (self.streams, -1))


class AfterPrompts:
    """One forward of the span, which sees the kept keys and values of its prompts."""

    def __init__(self, decoder: MaskedDecoder, prefixes: Prefixes, prompts: Prompts) -> None:
        self.decoder, self.streams = decoder, prefixes.streams
        self.ids_NP, self.mask_NP = prefixes.ids_QP[prefixes.rows_N], prefixes.mask_QP[prefixes.rows_N]
        rows_N = prefixes.rows_N.to(prompts[0][0].device)
        self.cache = Cache(layers=[_Given(keys[rows_N], values[rows_N]) for keys, values in prompts])

    def hidden(self, ids_BS: Tensor) -> Tensor:
        ids_NT = torch.cat([self.ids_NP, ids_BS.repeat(self.streams, 1)], 1)
        hidden = self.decoder.hidden(ids_NT, _seen(self.mask_NP, ids_BS), cache=self.cache)
        return hidden.unflatten(0, (self.streams, -1))


def read_prompts(decoder: MaskedDecoder, prefixes: Prefixes, max_rows: int) -> Prompts:
    """Every prefix read once, `max_rows` in a forward."""
    parts: list[Prompts] = []
    for at in range(0, len(prefixes.ids_QP), max_rows):
        cache = DynamicCache()
        decoder.hidden(prefixes.ids_QP[at : at + max_rows], prefixes.mask_QP[at : at + max_rows], cache=cache)
        parts.append([_kept(layer) for layer in cache.layers])
    return [(torch.cat([k for k, _ in layer]), torch.cat([v for _, v in layer])) for layer in zip(*parts, strict=True)]


def _kept(layer: object) -> tuple[Tensor, Tensor]:
    assert isinstance(layer, DynamicLayer) and layer.keys is not None and layer.values is not None, "it was fed"
    return layer.keys, layer.values


class _Given(DynamicLayer):
    """A layer that starts with these keys and values at every step: what comes after them is forgotten."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        assert self.keys is not None and self.values is not None, "given when made"
        return torch.cat([self.keys, key_states], -2), torch.cat([self.values, value_states], -2)


def _seen(mask_NP: Tensor, ids_BS: Tensor) -> Tensor:
    return torch.nn.functional.pad(mask_NP, (0, ids_BS.shape[1]), value=True)
