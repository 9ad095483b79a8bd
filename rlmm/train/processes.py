"""What a stage needs of data parallelism: who am I, and the same facts known everywhere."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world() -> tuple[int, int]:
    """(rank, number of processes)."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def share(count: int, what: str) -> slice:
    """This process's contiguous part of `count` things; they must divide evenly, so that no gradient is weighted."""
    rank, size = world()
    if count % size:
        raise ValueError(f"{what} = {count} does not divide over {size} processes; use a multiple of {size}")
    each = count // size
    return slice(rank * each, (rank + 1) * each)


def device() -> torch.device:
    """Where this process computes: its GPU, or the CPU where there is none."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def wait() -> None:
    """Go on when every process has come here: what the first one wrote before is then there for all."""
    if world()[1] > 1:
        dist.barrier()


def gather(value: Any) -> list[Any]:
    """Every process's value, in rank order."""
    _, size = world()
    if size == 1:
        return [value]
    values: list[Any] = [None] * size
    dist.all_gather_object(values, value)
    return values


def average(values: Tensor) -> Tensor:
    """The mean of every process's tensor, in place."""
    _, size = world()
    if size > 1:
        dist.all_reduce(values)
        values /= size
    return values
