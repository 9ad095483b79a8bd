"""A decode step on a GPU as one CUDA graph: a step is some hundreds of kernels, each shorter than its launch.

A graph has fixed addresses and shapes. So the position is a number on the device, and the cache is read up to a whole
number of `BUCKET` positions, one graph each, where what is not yet filled is masked.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

BUCKET = 256
"""Positions. A step reads at most that much more of the cache than it must."""

Step = Callable[[Tensor, Tensor, int], Tensor]
"""Tokens [N], the position [] they stand at, the positions of the cache that are read -> hidden states [N, H]."""


@dataclass(frozen=True)
class Recorded:
    """A graph with what goes in and comes out of it."""

    graph: Any
    ids_N: Tensor
    at: Tensor
    hidden_NH: Tensor


@dataclass
class Graphs:
    """The graphs of one batch: they hold its cache's addresses. The step is handed over at each call, so that the cache
    that owns them is in no cycle: one that is collected during a later recording spoils that."""

    capacity: int
    recorded: dict[int, Recorded] = field(default_factory=dict)

    def __call__(self, step: Step, ids_N: Tensor, position: int) -> Tensor:
        """Hidden states [N, H] after the tokens `ids_N` at `position`, which the cache then holds."""
        extent = extent_of(position, self.capacity)
        if extent not in self.recorded:
            self.recorded[extent] = self._record(step, ids_N, position, extent)
        found = self.recorded[extent]
        found.ids_N.copy_(ids_N)
        found.at.fill_(position)
        found.graph.replay()
        return found.hidden_NH.clone()

    def _record(self, step: Step, ids_N: Tensor, position: int, extent: int) -> Recorded:
        given_N, at = ids_N.clone(), torch.full((), position, dtype=torch.long, device=ids_N.device)
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # what libraries allocate at first use must not be recorded
            step(given_N, at, extent)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        pool = next((one.graph.pool() for one in self.recorded.values()), None)
        # This thread's calls alone are watched: another may be scoring on the same GPU.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            hidden_NH = step(given_N, at, extent)
        return Recorded(graph, given_N, at, hidden_NH)


def extent_of(position: int, capacity: int) -> int:
    """How much of a cache of `capacity` positions a step at `position` reads: whole buckets."""
    return min(capacity, (position // BUCKET + 1) * BUCKET)
