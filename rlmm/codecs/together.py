"""What a batch decides as a whole (which codes are idle, how often each occurs), where several processes share it.

Collectives: every process must come to them, in the same order, and training does. Alone a process has the whole batch.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.nn.functional import all_gather


def together() -> bool:
    """Whether several processes share the batches."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def of_all(part: Tensor) -> Tensor:
    """Every process's `part` [P, ...], of one shape, in rank order; gradients find their way back to each."""
    return torch.stack(all_gather(part)) if together() else part.unsqueeze(0)


@torch.no_grad()
def summed(values: Tensor) -> Tensor:
    """The sum over processes, without gradients."""
    return of_all(values).sum(0)
