"""What a stage needs of data parallelism: who am I, and the same facts known everywhere."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from rlmm.train.heart import phase

T = TypeVar("T")

EXIT_HUNG = 70
"""How a process ends that another keeps waiting in vain: EX_SOFTWARE of BSD's sysexits.h."""


class OtherProcessError(RuntimeError):
    """Another process has failed; the text says which and how."""


class Stopped(BaseException):
    """The run was asked to stop and has. Like KeyboardInterrupt no Exception: what handles failures is not to take it
    for one."""


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
        with phase("wait", waits=True):
            dist.barrier()


def gather(value: Any) -> list[Any]:
    """Every process's value, in rank order."""
    _, size = world()
    if size == 1:
        return [value]
    values: list[Any] = [None] * size
    with phase("gather", waits=True):
        dist.all_gather_object(values, value)
    return values


def average(values: Tensor) -> Tensor:
    """The mean of every process's tensor, in place."""
    _, size = world()
    if size > 1:
        with phase("average", waits=True):
            dist.all_reduce(values)
        values /= size
    return values


def largest(value: int) -> int:
    """The largest of every process's values, known to all."""
    if world()[1] == 1:
        return value
    with phase("largest", waits=True):
        values = torch.tensor([value], device=device())
        dist.all_reduce(values, dist.ReduceOp.MAX)
        return int(values)


def everywhere(work: Callable[[], T]) -> T:
    """This process's result of `work`, once every process has one. What one raises ends all: itself with its own
    error, the others with OtherProcessError (or Stopped, if it was that)."""
    return _done_by_all(work, of_first=False)


def in_first(work: Callable[[], T]) -> T:
    """What `work` gives in the first process, in all of them. What it raises there ends the others too."""
    return _done_by_all(work if world()[0] == 0 else lambda: None, of_first=True)


def _done_by_all(work: Callable[[], Any], *, of_first: bool) -> Any:
    try:
        result = work()
    except BaseException as error:
        gather(("" if isinstance(error, Stopped) else f"{type(error).__name__}: {error}", str(error)))
        raise
    outcomes = gather((None, result if of_first else None))
    failed = [f"process {rank} failed: {fault}" for rank, (fault, _) in enumerate(outcomes) if fault]
    if failed:
        raise OtherProcessError("; ".join(failed))
    if stopped := [told for fault, told in outcomes if fault is not None]:
        raise Stopped(stopped[0])
    return outcomes[0][1] if of_first else result
