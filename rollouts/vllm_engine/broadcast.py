"""Weights from a trainer to its vLLM servers over a process group of their own: gloo, or NCCL between GPUs.

The trainer is rank 0; the workers of its servers (one a device) follow. Weights travel one at a time, so neither side
needs to know how many there are, and no more than one is held: a header (JSON: name, dtype, shape), then the tensor; an
empty header ends the pass. The group is apart from the trainer's own and from the one inside each server.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributed import PrefixStore, TCPStore

from rollouts.contract import EngineLost
from rollouts.vllm_engine.beside import begin
from rollouts.vllm_engine.server import ServerHost

T = TypeVar("T")
ROOT = 0
SECONDS = 600
"""How long either side waits for the other before it gives up."""
BROKE_OFF = "the transfer of weights between trainer and vLLM broke off"
ANSWER_SECONDS = 5
"""How long a server's answer may take after its connection broke."""


@dataclass(frozen=True)
class Group:
    """One end of a broadcast. `device`: where the tensors that travel must lie."""

    group: Any
    device: torch.device

    def broadcast(self, tensor: Tensor) -> None:
        try:
            self.group.broadcast(tensor, ROOT).wait()
        except RuntimeError as error:  # the other end closed its connection, or did not come in time
            raise EngineLost(f"{BROKE_OFF}: {error}") from error

    def send(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        for name, weight in weights:
            self._header({"name": name, "dtype": str(weight.dtype).removeprefix("torch."), "shape": list(weight.shape)})
            self.broadcast(weight.detach().to(self.device).contiguous())
        self._header({})

    def receive(self) -> Iterator[tuple[str, Tensor]]:
        while header := self._read_header():
            weight = torch.empty(header["shape"], dtype=getattr(torch, header["dtype"]), device=self.device)
            self.broadcast(weight)
            yield header["name"], weight

    def _header(self, record: dict[str, Any]) -> None:
        text = torch.tensor(list(json.dumps(record).encode()), dtype=torch.uint8, device=self.device)
        self.broadcast(torch.tensor([len(text)], device=self.device))
        self.broadcast(text)

    def _read_header(self) -> dict[str, Any]:
        length = torch.zeros(1, dtype=torch.int64, device=self.device)
        self.broadcast(length)
        text = torch.empty(int(length), dtype=torch.uint8, device=self.device)
        self.broadcast(text)
        return json.loads(bytes(text.tolist()))


def join(address: str, port: int, rank: int, size: int, backend: str, device: torch.device) -> Group:
    """Enter the group that the trainer at `address` has opened; returns when all have."""
    return _enter(_meeting(address, port), rank, size, backend, device)


class GroupTransfer:
    """Calls every server to the group once, and to each pass after that.

    Args:
        address: this machine's, as the servers reach it.
        backend: gloo, or nccl where trainer and servers are on GPUs.
        device: of this end; a GPU under nccl.

    Raises EngineLost where a server is gone, at the start or in a pass.
    """

    def __init__(self, hosts: Sequence[ServerHost], address: str, backend: str, device: torch.device) -> None:
        self.hosts = hosts
        sizes = [int(host.call("rollouts_devices")) for host in hosts]
        store, total = _meeting(address), 1 + sum(sizes)
        calls = [
            ("rollouts_join", address, str(store.port), str(1 + sum(sizes[:at])), str(total), backend)
            for at in range(len(hosts))
        ]
        self.group = _beside(hosts, calls, lambda: _enter(store, ROOT, total, backend, device))

    def __call__(self, weights: Iterable[tuple[str, Tensor]], key: str = "") -> None:
        _beside(self.hosts, [("rollouts_receive", key)] * len(self.hosts), lambda: self.group.send(weights))


def _meeting(address: str, port: int | None = None) -> TCPStore:
    """The store where members meet: opened on a free port where none is named."""
    return TCPStore(address, port or 0, None, port is None, timedelta(seconds=SECONDS), wait_for_workers=False)


def _enter(store: TCPStore, rank: int, size: int, backend: str, device: torch.device) -> Group:
    own, wait = PrefixStore("rollouts", store), timedelta(seconds=SECONDS)
    if backend == "gloo":
        return Group(torch.distributed.ProcessGroupGloo(own, rank, size, wait), device)
    options = torch.distributed.ProcessGroupNCCL.Options()
    options._timeout = wait
    return Group(torch.distributed.ProcessGroupNCCL(own, rank, size, options), device)


def _beside(hosts: Sequence[ServerHost], calls: Sequence[tuple[str, ...]], own: Callable[[], T]) -> T:
    """Our part of what every server does at the same time. After a failure here the servers wait for us until their
    time is up, or this process ends; nobody waits for them."""
    theirs = begin([partial(host.call, *call) for host, call in zip(hosts, calls, strict=True)])
    try:
        made = own()
    except EngineLost:
        # What a server says itself is worth more than that its connection broke, and comes a moment later.
        _raise_first(wait(theirs, timeout=ANSWER_SECONDS).done)
        raise
    _raise_first(theirs)
    return made


def _raise_first(theirs: Iterable[Future[Any]]) -> None:
    """Raises what went wrong first among servers. One that is gone breaks the pass off for the others, who then say no
    more than that, and are lost to this pass themselves."""
    errors = [error for one in theirs if (error := one.exception()) is not None]
    for error in sorted(errors, key=lambda error: (not isinstance(error, EngineLost), BROKE_OFF in str(error))):
        if BROKE_OFF in str(error) and not isinstance(error, EngineLost):
            raise EngineLost(str(error)) from error
        raise error
