"""What a vLLM server's worker can be asked over HTTP: vLLM's `--worker-extension-cls`.

The methods become the worker's own. vLLM passes strings and gives back lists and dicts.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rollouts.adapters import BesideBase
from rollouts.fingerprint import weights_fingerprint
from rollouts.vllm_engine.broadcast import Group, join
from rollouts.vllm_engine.cpu_kernels import use_kernels
from rollouts.vllm_engine.host import room_of_model
from rollouts.vllm_engine.processor import on_processor
from rollouts.vllm_engine.transfer import read_shards
from rollouts.vllm_engine.weights import refresh_tied_head, reload_all, running_fingerprint

use_kernels()  # vLLM's workers import this module before they build the model


class RolloutWorker:
    """Mixed into vLLM's worker class."""

    model_runner: Any
    vllm_config: Any
    device: torch.device
    rank: int
    rollouts_group: Group
    rollouts_base: BesideBase | None = None
    """What this server folds adapters into; None: it is sent whole weights."""

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

    def rollouts_load(self, folder: str, count: str, key: str) -> None:
        """Take the weights in a folder of so many safetensors files that this server can read. `key`: see `_take`."""
        self._take(read_shards(Path(folder), int(count)), key)

    def rollouts_held(self) -> dict[str, Any]:
        """The key of the trainer whose base is there, and whether all that was sent last arrived."""
        base = self.rollouts_base
        return {"key": "", "complete": False} if base is None else {"key": base.key, "complete": base.complete}

    def rollouts_devices(self) -> int:
        """How many workers this server has."""
        return self.vllm_config.parallel_config.world_size

    def rollouts_join(self, address: str, port: str, first: str, size: str, backend: str) -> None:
        """Enter the trainer's process group; this server's workers have the ranks from `first` on."""
        device = torch.device("cpu") if backend == "gloo" else self.device
        self.rollouts_group = join(address, int(port), int(first) + self.rank, int(size), backend, device)

    def rollouts_receive(self, key: str) -> None:
        """Take the weights that the trainer broadcasts. After an error the group is left: nobody waits for us."""
        try:
            self._take(self.rollouts_group.receive(), key)
        except BaseException:
            del self.rollouts_group
            raise

    def rollouts_fingerprint(self) -> str:
        """Of the weights that run. Where adapters came apart, of what came, if what runs is what was made of it."""
        running, base = running_fingerprint(self.model_runner.get_model()), self.rollouts_base
        if base is None:
            return running
        made = weights_fingerprint(base.folded(self.device), self.vllm_config.model_config.dtype)
        return base.fingerprint() if made == running else f"{running} runs, and {made} was folded"

    def _take(self, weights: Iterator[tuple[str, Tensor]], key: str) -> None:
        """With a key, weights and adapters apart: all that this trainer sends at first, its adapters later."""
        if not key:
            self.rollouts_base = None
            self._load(weights)
            return
        if self.rollouts_base is None or self.rollouts_base.key != key:
            self.rollouts_base = BesideBase(key)
        self.rollouts_base.take(weights)
        self._load(self.rollouts_base.folded(self.device))

    def _load(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        reload_all(self.reload_weights, weights)  # pyrefly: ignore  (vLLM's worker has it)
        refresh_tied_head(self.model_runner.get_model())
