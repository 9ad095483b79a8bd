"""What a vLLM server's worker can be asked over HTTP: vLLM's `--worker-extension-cls`.

The methods become the worker's own. vLLM passes strings and gives back lists and dicts.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rollouts.vllm_engine.broadcast import Group, join
from rollouts.vllm_engine.cpu_kernels import use_kernels
from rollouts.vllm_engine.host import room_of_model
from rollouts.vllm_engine.processor import on_processor
from rollouts.vllm_engine.transfer import read_shards
from rollouts.vllm_engine.weights import refresh_tied_head, running_fingerprint

use_kernels()  # vLLM's workers import this module before they build the model


class RolloutWorker:
    """Mixed into vLLM's worker class."""

    model_runner: Any
    vllm_config: Any
    device: torch.device
    rank: int
    rollouts_group: Group

    def rollouts_room(self) -> dict[str, Any]:
        """The sizes this server was started with; `host.Room`."""
        scheduler = self.vllm_config.scheduler_config
        return {
            "rows": scheduler.max_num_seqs,
            "prompt_tokens": scheduler.max_num_batched_tokens,
            "blocks": self.vllm_config.cache_config.num_gpu_blocks - 1,  # block 0 stands for "none"
            "length": self.vllm_config.model_config.max_model_len,
            "dtype": str(self.vllm_config.model_config.dtype).removeprefix("torch."),
            **room_of_model(self.model_runner.get_model()),
        }

    def rollouts_collect(self, names: str) -> list[dict[str, Any]]:
        """What was drawn for these samples (a JSON list of names)."""
        wanted = json.loads(names)
        return [drawn.to_wire() for drawn in on_processor(self, lambda processor: processor.collect(wanted))]

    def rollouts_load(self, folder: str, count: str) -> None:
        """Take the weights in a folder of so many safetensors files that this server can read."""
        self._take(read_shards(Path(folder), int(count)))

    def rollouts_devices(self) -> int:
        """How many workers this server has."""
        return self.vllm_config.parallel_config.world_size

    def rollouts_join(self, address: str, port: str, first: str, size: str, backend: str) -> None:
        """Enter the trainer's process group; this server's workers have the ranks from `first` on."""
        device = torch.device("cpu") if backend == "gloo" else self.device
        self.rollouts_group = join(address, int(port), int(first) + self.rank, int(size), backend, device)

    def rollouts_receive(self) -> None:
        """Take the weights that the trainer broadcasts. After an error the group is left: nobody waits for us."""
        try:
            self._take(self.rollouts_group.receive())
        except BaseException:
            del self.rollouts_group
            raise

    def rollouts_fingerprint(self) -> str:
        return running_fingerprint(self.model_runner.get_model())

    def _take(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        self.reload_weights(weights_iterator=weights)  # pyrefly: ignore  (vLLM's worker has it)
        refresh_tied_head(self.model_runner.get_model())
