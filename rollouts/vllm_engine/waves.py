"""Samples in waves: groups that vLLM prefills in one step and can hold to their end.

The streams of a guided sample must take every step together. A wave's rows are admitted together, start only when the
wave before has ended, and never wait for memory, so nothing that a scheduler does can part them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rollouts.vllm_engine.host import BLOCK, Room


@dataclass(frozen=True)
class Sample:
    """One image to draw: its name, its prefix in each stream, and its seed."""

    name: str
    prefixes: tuple[tuple[int, ...], ...]
    seed: int


def plan_waves(samples: Sequence[Sample], room: Room, image_length: int) -> Iterator[list[Sample]]:
    """In order. Raises ValueError where one sample alone is too large."""
    wave: list[Sample] = []
    used = (0, 0, 0)
    limits = (room.rows, room.prompt_tokens, room.blocks)
    for sample in samples:
        need = _need(sample, room, image_length)
        total = tuple(a + b for a, b in zip(used, need, strict=True))
        if wave and any(a > b for a, b in zip(total, limits, strict=True)):
            yield wave
            wave, total = [], need
        wave.append(sample)
        used = total
    yield wave


def _need(sample: Sample, room: Room, image_length: int) -> tuple[int, int, int]:
    """Rows, prefix tokens and KV blocks (one to spare a stream)."""
    ends = [len(prefix) + image_length for prefix in sample.prefixes]
    if max(ends) > room.length:
        raise ValueError(
            f"a prompt and its image take {max(ends)} positions and the engine has {room.length}; "
            "shorten the prompt or make the grid smaller"
        )
    need = (len(ends), sum(map(len, sample.prefixes)), sum(-(-end // BLOCK) + 1 for end in ends))
    limits = {"max_rows": room.rows, "max_prompt_tokens": room.prompt_tokens, "kv_bytes": room.blocks}
    for (name, limit), count in zip(limits.items(), need, strict=True):
        if count > limit:
            raise ValueError(f"one sample needs {count} of {limit} in the vllm engine's {name}; raise {name}")
    return need
