"""A sequence fed a position at a time: the last hidden state of every decode row, by the model or the packed decoder.

Shapes: Q prefixes (requests x streams, stream-major), P prefix positions, B samples, N decode rows (samples x streams,
stream-major), T response positions so far, H hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from rollouts.contract import CausalDecoder
from rollouts.torch_engine.cache import preallocated_cache, widen
from rollouts.torch_engine.packed import PackedLlama, Rows
from rollouts.trajectory import Stream


@dataclass(frozen=True)
class Prefixes:
    """Left-padded prefixes of all streams, and the row of them that each decode row continues."""

    ids_QP: Tensor
    mask_QP: Tensor
    rows_N: Tensor
    streams: int


def join_prefixes(streams: Sequence[Stream], owner_B: Tensor, pad: int) -> Prefixes:
    """The prefixes of all streams at one width. `owner_B`: the request of each sample."""
    width = max(stream.ids_BP.shape[1] for stream in streams)
    ids_QP = torch.cat([_widened(stream.ids_BP, width, pad) for stream in streams])
    mask_QP = torch.cat([_widened(stream.mask_BP, width, False) for stream in streams])
    requests = ids_QP.shape[0] // len(streams)
    rows_N = torch.cat([owner_B + k * requests for k in range(len(streams))])
    return Prefixes(ids_QP, mask_QP, rows_N, len(streams))


class ModelStepper:
    """Through the policy's own forward. `layers` None: no cache, everything is computed again at each step."""

    def __init__(self, decoder: CausalDecoder, prefixes: Prefixes, length: int, layers: int | None) -> None:
        self.decoder, self.prefixes = decoder, prefixes
        self.ids_NP, self.mask_NP = prefixes.ids_QP[prefixes.rows_N], prefixes.mask_QP[prefixes.rows_N]
        self.cache = None if layers is None else preallocated_cache(layers, prefixes.ids_QP.shape[1] + length)

    def hidden(self, ids_BT: Tensor) -> Tensor:
        """Last hidden states [N, H] after the response so far."""
        decoder, position, given = self.decoder, ids_BT.shape[1], self.prefixes
        if self.cache is not None and position == 0:
            last_NH = decoder.hidden(given.ids_QP, given.mask_QP, cache=self.cache)[:, -1][given.rows_N]
            self.cache = widen(self.cache, given.rows_N.to(last_NH.device))
            return last_NH
        self.ids_NP, self.mask_NP = self.ids_NP.to(ids_BT.device), self.mask_NP.to(ids_BT.device)
        whole_NT = torch.cat([self.ids_NP, ids_BT.repeat(given.streams, 1)], 1)
        return decoder.hidden(whole_NT, F.pad(self.mask_NP, (0, position), value=True), cache=self.cache)[:, -1]

    def head(self, hidden_NH: Tensor, vocabulary: tuple[int, int]) -> Tensor:
        return self.decoder.head(hidden_NH, vocabulary)


class PackedStepper:
    """Through the packed decoder."""

    def __init__(self, packed: PackedLlama, prefixes: Prefixes, length: int) -> None:
        self.packed, self.prefixes, self.length = packed, prefixes, length
        self.rows: Rows | None = None

    def hidden(self, ids_BT: Tensor) -> Tensor:
        """Last hidden states [N, H] after the response so far, of which the last token is fed."""
        given = self.prefixes
        if self.rows is None:
            prefix = self.packed.prefill(given.ids_QP, given.mask_QP, self.length)
            self.rows = self.packed.widen(prefix, given.rows_N, given.mask_QP, self.length)
            return prefix.hidden_QH[given.rows_N.to(prefix.hidden_QH.device)]
        return self.packed.step(ids_BT[:, -1].repeat(given.streams), self.rows)

    def head(self, hidden_NH: Tensor, vocabulary: tuple[int, int]) -> Tensor:
        return self.packed.weights.head(hidden_NH, vocabulary)


def _widened(values_BP: Tensor, width: int, fill: int | bool) -> Tensor:
    return F.pad(values_BP, (width - values_BP.shape[1], 0), value=fill)
