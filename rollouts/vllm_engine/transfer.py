"""Weights from a trainer to its vLLM servers, through files that both can read.

`broadcast.GroupTransfer` is the other way. Either passes over the weights once, whatever the number of servers.
`AdapterTransfer` sends by either of them no more than has changed.
"""

import os
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import wait
from functools import partial
from pathlib import Path
from typing import Protocol

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from rollouts.adapters import adapters_alone
from rollouts.contract import EngineLost
from rollouts.vllm_engine.beside import begin
from rollouts.vllm_engine.server import ServerHost

SHARD_BYTES = 1 << 30


class Transfer(Protocol):
    """Sends weights to all of its servers, which run with them; under a key they keep what they were sent, too."""

    hosts: Sequence[ServerHost]

    def __call__(self, weights: Iterable[tuple[str, Tensor]], key: str = "") -> None: ...


class AdapterTransfer:
    """All weights once, and from then on their adapters alone (`rollouts.adapters.apart`), which each server folds into
    a copy of the base that it keeps in main memory. All again, where a server does not have them: it was started anew,
    serves another run, or what it was sent last did not arrive."""

    def __init__(self, way: Transfer) -> None:
        self.way, self.key = way, uuid.uuid4().hex
        self._held = {"key": self.key, "complete": True}

    def __call__(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        based = all([host.call("rollouts_held") == self._held for host in self.way.hosts])
        self.way(adapters_alone(weights) if based else weights, self.key)


class FolderTransfer:
    """`folder`: one that this process writes and every server reads. Nothing is left in it.

    Raises RuntimeError where a server cannot read there what was written.
    """

    def __init__(self, hosts: Sequence[ServerHost], folder: Path) -> None:
        self.hosts, self.folder = hosts, folder

    def __call__(self, weights: Iterable[tuple[str, Tensor]], key: str = "") -> None:
        with tempfile.TemporaryDirectory(dir=self.folder) as scratch:
            count = write_shards(weights, Path(scratch))
            # In a folder that the user shares, a server may run as another user (of another node, or in a container).
            # The machine's own temporary folder is open to everybody, and what is in it stays this user's.
            if self.folder != Path(tempfile.gettempdir()):
                _let_all_read(Path(scratch))
            loads = begin([partial(host.call, "rollouts_load", scratch, str(count), key) for host in self.hosts])
            wait(loads)  # an interrupt waits for nobody
            errors = [error for one in loads if (error := one.exception()) is not None]
            for error in sorted(errors, key=lambda error: not isinstance(error, EngineLost)):
                raise error  # that a server is lost before what another one says of it


def write_shards(weights: Iterable[tuple[str, Tensor]], folder: Path) -> int:
    """Files of about SHARD_BYTES, so that no more than that is held at once of weights that come one at a time. How
    many there are."""
    shard: dict[str, Tensor] = {}
    number, size = 0, 0
    for name, tensor in weights:
        shard[name] = tensor.detach().contiguous().cpu()
        size += shard[name].nbytes
        if size >= SHARD_BYTES:
            save_file(shard, _shard(folder, number))
            shard, number, size = {}, number + 1, 0
    if shard:
        save_file(shard, _shard(folder, number))
    return number + bool(shard)


def read_shards(folder: Path, count: int) -> Iterator[tuple[str, Tensor]]:
    """The `count` files that `write_shards` wrote, one weight at a time. Raises FileNotFoundError, before the first,
    where one of them cannot be read: vLLM would keep its old weights and go on."""
    files = [_shard(folder, number) for number in range(count)]
    readable = sum(os.access(file, os.R_OK) for file in files)
    if readable < count:
        raise FileNotFoundError(
            f"of the {count} file(s) of weights that the trainer wrote in {folder} this server can read {readable}; "
            "set engine.exchange to a folder that trainer and servers share under the same path, or engine.transfer to "
            "nccl or gloo"
        )
    return _weights(files)


def _weights(files: Iterable[Path]) -> Iterator[tuple[str, Tensor]]:
    for file in files:
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118 (no mapping)
                yield name, weights.get_tensor(name)


def _shard(folder: Path, number: int) -> Path:
    return folder / f"{number:05}.safetensors"


def _let_all_read(folder: Path) -> None:
    folder.chmod(0o755)
    for file in folder.iterdir():
        file.chmod(0o644)
