"""Work in forked children of a program that has imported everything once: alone, or as processes of one group."""

import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch.distributed.distributed_c10d as c10d

from rlmm import pipeline
from rlmm.config.recipe import read_recipe
from rlmm.train.faults import StorageError
from rlmm.train.launch import processes
from rlmm.train.processes import Stopped
from rlmm.train.signals import EXIT_STOPPED, listening
from rollouts.ports import free_port


def run_forked(
    recipe: Path,
    overrides: Sequence[str],
    log: Path,
    *,
    count: int = 1,
    prepare: Callable[[int], None] | None = None,
) -> list[int]:
    """`rlmm run` of a recipe in each child, after `prepare(rank)`: see `fork_group`."""

    def work(rank: int) -> None:
        if prepare:
            prepare(rank)
        with processes(deepspeed=False), listening():
            pipeline.run_recipe(read_recipe(recipe, list(overrides)), print)

    return fork_group(work, log, count=count)


def fork_group(work: Callable[[int], None], log: Path, *, count: int = 1) -> list[int]:
    """Each child's exit status (negative: the signal that ended it) after `work(rank)`. When one fails the others are
    killed, as torchrun does. One that would use a collective of objects, which pickles, fails."""
    group = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks: dict[int, int] = {}
    for rank in range(count):
        child = os.fork()
        if child == 0:
            _log_to(log)
            code = 1
            try:
                if count > 1:
                    c10d._object_to_tensor = c10d._tensor_to_object = _no_pickle  # pyrefly: ignore
                    os.environ.update(group | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
                work(rank)
                code = 0
            except Stopped as stopped:
                print(stopped)
                code = EXIT_STOPPED
            except StorageError as error:
                print(f"error: {error}")
                code = 2
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(code)
        ranks[child] = rank
    return _wait(ranks)


def _no_pickle(*_: Any) -> Any:
    raise AssertionError("a pickle over the process group")


def _log_to(path: Path) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)


def _wait(ranks: dict[int, int]) -> list[int]:
    """Statuses by rank of the children `ranks` (process id -> rank)."""
    found: dict[int, int] = {}
    while len(found) < len(ranks):
        pid, status = os.wait()
        found[ranks[pid]] = os.waitstatus_to_exitcode(status)
        if found[ranks[pid]]:
            for other in (other for other, rank in ranks.items() if rank not in found):
                os.kill(other, signal.SIGKILL)
    return [found[rank] for rank in range(len(ranks))]
