"""`rlmm run` in forked children of a program that has imported everything once: alone, or as processes of one group."""

import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rlmm import pipeline
from rlmm.config.recipe import read_recipe
from rlmm.train.launch import processes


def run_forked(
    recipe: Path,
    overrides: Sequence[str],
    log: Path,
    *,
    count: int = 1,
    prepare: Callable[[int], None] | None = None,
) -> list[int]:
    """Each child's exit status (negative: the signal that ended it), after `prepare(rank)` in each. When one fails the
    others are killed, as torchrun does."""
    port = _free_port()
    ranks = {_child(recipe, overrides, log, rank, count, port, prepare): rank for rank in range(count)}
    found: dict[int, int] = {}
    while len(found) < count:
        pid, status = os.wait()
        found[ranks[pid]] = os.waitstatus_to_exitcode(status)
        if found[ranks[pid]]:
            for other in (other for other, rank in ranks.items() if rank not in found):
                os.kill(other, signal.SIGKILL)
    return [found[rank] for rank in range(count)]


def _child(
    recipe: Path,
    overrides: Sequence[str],
    log: Path,
    rank: int,
    count: int,
    port: int,
    prepare: Callable[[int], None] | None,
) -> int:
    child = os.fork()
    if child:
        return child
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    code = 1
    try:
        if count > 1:
            group = {"WORLD_SIZE": count, "RANK": rank, "LOCAL_RANK": rank, "MASTER_PORT": port}
            os.environ.update({name: str(value) for name, value in group.items()} | {"MASTER_ADDR": "127.0.0.1"})
        if prepare:
            prepare(rank)
        with processes(deepspeed=False):
            pipeline.run_recipe(read_recipe(recipe, list(overrides)), print)
        code = 0
    finally:
        sys.stdout.flush()
        os._exit(code)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
