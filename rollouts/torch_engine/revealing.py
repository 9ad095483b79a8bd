"""A masked policy's hidden states of a span that is being revealed: with its prompts, or after their keys and values.

Where every position sees every other, a prompt's hidden states change with each revealed token, so keys and values kept
from the step before would be another function: an approximation, which is not offered. Where a prompt sees itself alone
(`Layout.causal_prompt`), they are the same at every step and for every sample of it.

Shapes: Q prefixes (requests x streams, stream-major), P prefix positions, B samples, K streams, N = B x K rows, S span
positions, H hidden size.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from rollouts.contract import MaskedDecoder
from rollouts.torch_engine.steps import Prefixes


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
    """One forward of the span, which sees the kept keys and values of its prompts. `prompts` holds those of all [Q]."""

    def __init__(self, decoder: MaskedDecoder, prefixes: Prefixes, prompts: Cache) -> None:
        self.decoder, self.streams = decoder, prefixes.streams
        self.mask_NP = prefixes.mask_QP[prefixes.rows_N]
        self.prompts = Cache(layers=[_Given(layer, prefixes.rows_N) for layer in prompts.layers])

    def hidden(self, ids_BS: Tensor) -> Tensor:
        ids_NS = ids_BS.repeat(self.streams, 1)
        return self.decoder.hidden(ids_NS, _seen(self.mask_NP, ids_BS), cache=self.prompts).unflatten(
            0, (self.streams, -1)
        )


def read_prompts(decoder: MaskedDecoder, prefixes: Prefixes, max_rows: int) -> Cache:
    """Keys and values of all prefixes [Q], each read once, `max_rows` in a forward."""
    parts: list[Cache] = []
    for at in range(0, len(prefixes.ids_QP), max_rows):
        parts.append(DynamicCache())
        decoder.hidden(prefixes.ids_QP[at : at + max_rows], prefixes.mask_QP[at : at + max_rows], cache=parts[-1])
    return Cache(layers=[_joined([part.layers[i] for part in parts]) for i in range(len(parts[0].layers))])


class _Given(DynamicLayer):
    """A layer whose row i starts with the keys and values of row `rows[i]` of another, and forgets what comes after."""

    def __init__(self, layer: DynamicLayer, rows: Tensor) -> None:
        super().__init__()
        assert layer.keys is not None and layer.values is not None, "prompts were read"
        rows = rows.to(layer.keys.device)
        self.lazy_initialization(layer.keys, layer.values)
        self.keys, self.values = layer.keys[rows], layer.values[rows]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        assert self.keys is not None and self.values is not None, "given when made"
        return torch.cat([self.keys, key_states], -2), torch.cat([self.values, value_states], -2)


def _joined(layers: Sequence[DynamicLayer]) -> DynamicLayer:
    whole = DynamicLayer()
    for layer in layers:
        assert layer.keys is not None and layer.values is not None, "prompts were read"
    whole.lazy_initialization(layers[0].keys, layers[0].values)
    whole.keys = torch.cat([layer.keys for layer in layers])
    whole.values = torch.cat([layer.values for layer in layers])
    return whole


def _seen(mask_NP: Tensor, ids_BS: Tensor) -> Tensor:
    return torch.nn.functional.pad(mask_NP, (0, ids_BS.shape[1]), value=True)
