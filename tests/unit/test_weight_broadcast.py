"""Weights between a trainer and the workers of its servers, over a real gloo group of threads."""

import threading
from collections.abc import Iterator, Sequence
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from rollouts.contract import EngineLost
from rollouts.vllm_engine.broadcast import GroupTransfer, join
from rollouts.vllm_engine.server import ServerHost

CPU = torch.device("cpu")
WEIGHTS = [
    ("a", torch.randn(3, 4)),
    ("b.half", torch.randn(5).bfloat16()),
    ("scalar", torch.tensor(2.0)),
    ("none", torch.zeros(0, 7)),
    ("across", torch.randn(4, 3).T),
]


class Workers:
    """A server of `count` workers in threads of this process; `deaf`: calls for a pass are not followed."""

    def __init__(self, count: int, deaf: bool = False) -> None:
        self.count, self.deaf = count, deaf
        self.groups: dict[int, Any] = {}
        self.taken: dict[int, list[tuple[str, Tensor]]] = {}
        self.lost = threading.Event()

    def call(self, method: str, *arguments: str) -> Any:
        if method == "rollouts_devices":
            return self.count
        if method == "rollouts_join":
            address, port, first, size, backend = arguments
            return self._each(lambda k: self._join(k, address, int(port), int(first) + k, int(size), backend))
        if self.deaf:
            self.groups.clear()
            raise EngineLost("gone")
        return self._each(self._receive)

    def _join(self, k: int, address: str, port: int, rank: int, size: int, backend: str) -> None:
        self.groups[k] = join(address, port, rank, size, backend, CPU)

    def _receive(self, k: int) -> None:
        try:
            self.taken[k] = list(self.groups[k].receive())
        except EngineLost:
            self.lost.set()

    def _each(self, act: Any) -> None:
        threads = [threading.Thread(target=act, args=(k,)) for k in range(self.count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def transfer(*servers: Workers) -> GroupTransfer:
    return GroupTransfer(cast(Sequence[ServerHost], servers), "127.0.0.1", "gloo", CPU)


def test_every_worker_of_every_server_takes_each_weight_once_and_again() -> None:
    servers = [Workers(2), Workers(1)]
    load, passes = transfer(*servers), 0

    def weights() -> Iterator[tuple[str, Tensor]]:
        nonlocal passes
        passes += 1
        yield from WEIGHTS

    for _ in range(2):
        load(weights())
        for taken in [taken for server in servers for taken in server.taken.values()]:
            assert [name for name, _ in taken] == [name for name, _ in WEIGHTS]
            for (_, got), (_, sent) in zip(taken, WEIGHTS, strict=True):
                assert got.dtype == sent.dtype and torch.equal(got, sent)
    assert passes == 2 and [len(server.taken) for server in servers] == [2, 1]


def test_a_server_that_does_not_follow_is_lost() -> None:
    load = transfer(Workers(1, deaf=True))
    with pytest.raises(EngineLost):
        load(WEIGHTS * 50)


class Refusing(Workers):
    """Takes one weight, and fails in the second."""

    def _receive(self, k: int) -> None:
        next(self.groups.pop(k).receive())

    def call(self, method: str, *arguments: str) -> Any:
        super().call(method, *arguments)
        if method == "rollouts_receive":
            raise RuntimeError("the weight has another shape")
        return self.count


def test_what_a_server_says_of_its_own_fault_is_what_is_raised() -> None:
    load = transfer(Refusing(1))
    with pytest.raises(RuntimeError, match="another shape"):
        load(WEIGHTS * 50)


def test_the_trainers_own_error_is_its_own_and_the_server_waits_no_longer_than_it_lives() -> None:
    server = Workers(1)
    load = transfer(server)

    def broken() -> Iterator[tuple[str, Tensor]]:
        yield WEIGHTS[0]
        raise ValueError("no such parameter")

    with pytest.raises(ValueError, match="no such parameter"):
        load(broken())
    del load
    assert server.lost.wait(10)
