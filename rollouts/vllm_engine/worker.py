"""What a vLLM server's worker can be asked over HTTP: vLLM's `--worker-extension-cls`.

The methods become the worker's own. vLLM passes strings and gives back lists and dicts.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from rollouts.vllm_engine.processor import on_processor
from rollouts.vllm_engine.weights import refresh_tied_head, running_fingerprint


class RolloutWorker:
    """Mixed into vLLM's worker class."""

    model_runner: Any
    vllm_config: Any

    def rollouts_room(self) -> dict[str, Any]:
        """The sizes this server was started with; `host.Room`."""
        scheduler = self.vllm_config.scheduler_config
        return {
            "rows": scheduler.max_num_seqs,
            "prompt_tokens": scheduler.max_num_batched_tokens,
            "blocks": self.vllm_config.cache_config.num_gpu_blocks - 1,  # block 0 stands for "none"
            "length": self.vllm_config.model_config.max_model_len,
            "streams": getattr(self.model_runner.get_model(), "streams", 1),
            "dtype": str(self.vllm_config.model_config.dtype).removeprefix("torch."),
        }

    def rollouts_collect(self, names: str) -> list[dict[str, Any]]:
        """What was drawn for these samples (a JSON list of names)."""
        wanted = json.loads(names)
        return [drawn.to_wire() for drawn in on_processor(self, lambda processor: processor.collect(wanted))]

    def rollouts_load(self, folder: str) -> None:
        """Take the weights in a folder of safetensors files that this server can read."""
        self.reload_weights(weights_iterator=_weights(Path(folder)))  # pyrefly: ignore  (vLLM's worker has it)
        refresh_tied_head(self.model_runner.get_model())

    def rollouts_fingerprint(self) -> str:
        return running_fingerprint(self.model_runner.get_model())


def _weights(folder: Path) -> Iterator[tuple[str, Tensor]]:
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118 (no mapping)
                yield name, weights.get_tensor(name)
