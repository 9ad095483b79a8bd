"""Full weights from a trainer to its vLLM servers, through files that both can read.

`broadcast.GroupTransfer` is the other way. Either passes over the weights once, whatever the number of servers.
"""

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from rollouts.vllm_engine.server import ServerHost

SHARD_BYTES = 1 << 30


class FolderTransfer:
    """`folder`: one that this process writes and every server reads. Nothing is left in it."""

    def __init__(self, hosts: Sequence[ServerHost], folder: Path) -> None:
        self.hosts, self.folder = hosts, folder

    def __call__(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        with tempfile.TemporaryDirectory(dir=self.folder) as scratch:
            write_shards(weights, Path(scratch))
            with ThreadPoolExecutor(len(self.hosts)) as pool:
                list(pool.map(lambda host: host.call("rollouts_load", scratch), self.hosts))


def write_shards(weights: Iterable[tuple[str, Tensor]], folder: Path) -> None:
    """Files of about SHARD_BYTES, so that no more than that is held at once of weights that come one at a time."""
    shard: dict[str, Tensor] = {}
    number, size = 0, 0
    for name, tensor in weights:
        shard[name] = tensor.detach().contiguous().cpu()
        size += shard[name].nbytes
        if size >= SHARD_BYTES:
            save_file(shard, folder / f"{number:05}.safetensors")
            shard, number, size = {}, number + 1, 0
    if shard:
        save_file(shard, folder / f"{number:05}.safetensors")


def read_shards(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """What `write_shards` wrote, one weight at a time."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118 (no mapping)
                yield name, weights.get_tensor(name)
