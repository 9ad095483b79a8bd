"""What a stage needs of data parallelism: who am I, and the same facts known everywhere.

What travels between processes is tensors, JSON, and arrays in NumPy's format: nothing is unpickled.
"""

import io
import json
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
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
    """Every process's value, in rank order: None, bool, int, float, str, and lists and dicts (by str) of such. Floats
    come as they went, NaN and infinities too. Raises TypeError for anything else, a tuple too: it would come as a list.
    """
    return [json.loads(sent) for sent in _gather_bytes(_encoded(value))]


def gather_arrays(array: np.ndarray) -> list[np.ndarray]:
    """Every process's array of numbers or bools, in rank order. Raises ValueError for an array of objects."""
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return [np.load(io.BytesIO(sent), allow_pickle=False) for sent in _gather_bytes(file.getvalue())]


def _gather_bytes(sent: bytes) -> list[bytes]:
    """Every process's, in rank order: their lengths first, then all of them as long as the longest."""
    _, size = world()
    if size == 1:
        return [sent]
    with phase("gather", waits=True):
        length = torch.tensor([len(sent)], device=device())
        lengths = [torch.empty_like(length) for _ in range(size)]
        dist.all_gather(lengths, length)
        longest = max(int(one) for one in lengths)
        mine = torch.frombuffer(bytearray(sent.ljust(longest, b"\0")), dtype=torch.uint8).to(device())
        found = [torch.empty_like(mine) for _ in range(size)]
        dist.all_gather(found, mine)
        return [one[: int(length)].cpu().numpy().tobytes() for one, length in zip(found, lengths, strict=True)]


def _encoded(value: Any) -> bytes:
    _check_plain(value, "the value")
    return json.dumps(value).encode()


def _check_plain(value: Any, place: str) -> None:
    """Raises TypeError, with the place, for what JSON would not give back as it was."""
    if value is None or isinstance(value, bool | int | float | str):
        return
    if isinstance(value, list):
        for at, one in enumerate(value):
            _check_plain(one, f"{place}[{at}]")
        return
    if not isinstance(value, dict):
        named = f"{type(value).__module__}.{type(value).__name__}"
        raise TypeError(f"{place} is a {named}, and processes tell each other what JSON has")
    for key, one in value.items():
        if not isinstance(key, str):
            raise TypeError(f"{place} has a key of type {type(key).__name__}, and JSON has strings")
        _check_plain(one, f"{place}[{key!r}]")


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
    """What `work` gives in the first process, in all of them: a value that `gather` takes. What it raises there ends
    the others too, and so does a value of another kind (TypeError)."""
    return _done_by_all(work if world()[0] == 0 else lambda: None, of_first=True)


def _done_by_all(work: Callable[[], Any], *, of_first: bool) -> Any:
    try:
        result = work()
        _encoded(result if of_first else None)  # here its TypeError ends the others
    except BaseException as error:
        gather(["" if isinstance(error, Stopped) else f"{type(error).__name__}: {error}", str(error)])
        raise
    outcomes = gather([None, result if of_first else None])
    failed = [f"process {rank} failed: {fault}" for rank, (fault, _) in enumerate(outcomes) if fault]
    if failed:
        raise OtherProcessError("; ".join(failed))
    if stopped := [told for fault, told in outcomes if fault is not None]:
        raise Stopped(stopped[0])
    return outcomes[0][1] if of_first else result
