"""What a batch decides as a whole (which codes are idle, how often each occurs), where several processes share it.

Collectives: every process must come to them, in the same order, and training does. Alone a process has the whole batch.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def together() -> bool:
    """Whether several processes share the batches."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def of_all(part: Tensor) -> Tensor:
    """Every process's `part` [P, ...], of one shape, in rank order; gradients find their way back to each."""
    return _OfAll.apply(part) if together() else part.unsqueeze(0)  # pyrefly: ignore


class _OfAll(torch.autograd.Function):
    """What each process has; of the gradients that all of them have for a part, its own process takes the sum."""

    @staticmethod
    def forward(ctx: Any, part: Tensor) -> Tensor:
        parts = [torch.empty_like(part) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, part.contiguous())
        return torch.stack(parts)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Tensor:
        grad_P = grad_outputs[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad_P)
        return grad_P[dist.get_rank()]


@torch.no_grad()
def summed(values: Tensor) -> Tensor:
    """The sum over processes, without gradients."""
    return of_all(values).sum(0)
