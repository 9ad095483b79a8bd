"""Where a vLLM runs: in this process, or as a server. The engine plans, draws and checks the same way on either."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from rollouts.vllm_engine.drawn import Drawn

Load = Callable[[Iterable[tuple[str, Tensor]]], None]
"""Brings weights, which come one at a time, to the hosts of an engine."""
BLOCK = 32
"""Positions a KV block holds: the least a CPU allows, so that samples of one prompt share most of its prefix."""
ABANDON_SECONDS = 60
"""How long a host may take to give up its rows."""
AGAIN_SECONDS = 0.2
"""After which it is told again: it may not have begun when it was told first."""
MEMORY_SHARE = 0.01
"""vLLM's `gpu_memory_utilization`: it asks that so much of the device be free, which training holds most of, and takes
the bytes of keys and values that it is told whatever this says."""
SURROUNDINGS = {
    "VLLM_USE_V2_MODEL_RUNNER": "0",  # the second runner has another interface for logits processors
    # vLLM's attention in float32 is Triton's on a GPU, whose products are of TF32 unless told otherwise: log-probs were
    # then 0.01 nats from the trainer's, and are 1e-5.
    "TRITON_F32_DEFAULT": "ieee",
}
"""What must be in the environment of a process in which vLLM runs."""


@dataclass(frozen=True)
class Room:
    """What a vLLM can hold at once. `blocks`: KV blocks that requests can have; `length`: positions of a request;
    `streams`: what one request carries, 2 where the model is one of `two_streams`; `dtype` of the weights;
    `whole_prompts`: the model reads a prompt at once, and no keys of another one stand in for its beginning."""

    rows: int
    prompt_tokens: int
    blocks: int
    length: int
    streams: int = 1
    dtype: str = "float32"
    whole_prompts: bool = False


def room_of_model(model: Any) -> dict[str, Any]:
    """What of a `Room` vLLM's model decides."""
    return {"streams": getattr(model, "streams", 1), "whole_prompts": getattr(model, "whole_prompts", False)}


@dataclass(frozen=True)
class Row:
    """One request: a stream of a sample, or all of them. `arguments`: what the processor needs of it, as plain data.
    It ends after `length` tokens, or after one of `stop`. `embeds` [P, H]: what stands for the prefix, where not all of
    its ids are of the vocabulary."""

    prefix: tuple[int, ...]
    arguments: dict[str, Any]
    length: int
    stop: tuple[int, ...] = ()
    embeds: Tensor | None = None


class Host(Protocol):
    """A running vLLM with the law's processor and the wave scheduler in it."""

    @property
    def room(self) -> Room: ...

    def run(self, rows: Sequence[Row], samples: Sequence[str]) -> tuple[list[list[int]], list[Drawn]]:
        """The tokens vLLM took for each row, and what was drawn for each sample, in order.

        Raises EngineLost where it is gone; it holds no rows afterwards, whatever was raised."""
        ...

    def abandon(self) -> None:
        """From another thread: the `run` under way is to give up its rows and raise soon; nothing where none is. May be
        called again."""
        ...

    def forget(self) -> None:
        """Drop every key and value: they are of older weights."""
        ...

    def fingerprint(self) -> str: ...

    def close(self) -> None: ...
