"""Samples in waves: groups that vLLM prefills in one step and can hold to their end.

The streams of a guided sample must take every step together. A wave's rows are admitted together, start only when the
wave before has ended, and never wait for memory, so nothing that a scheduler does can part them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rollouts.vllm_engine.host import BLOCK, Room


@dataclass(frozen=True)
class Sample:
    """One image to draw: its name in vLLM, the request's group and sample, its prefix in each stream, and its seed."""

    name: str
    group_id: str
    sample_id: str
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


def check_room(prefix: Sequence[int], room: Room, image_length: int) -> int:
    """The KV blocks of a request (one to spare). Raises ValueError where the engine cannot hold it even alone."""
    end = len(prefix) + image_length
    if end > room.length:
        raise ValueError(
            f"a prompt and its image take {end} positions and the engine has {room.length}; raise engine.max_length if "
            "it is less than the checkpoint has, shorten the prompt, or make the grid smaller"
        )
    blocks = -(-end // BLOCK) + 1
    _check("kv_megabytes", blocks, room.blocks, "KV blocks")
    return blocks


def _need(sample: Sample, room: Room, image_length: int) -> tuple[int, int, int]:
    """Rows, prefix tokens and KV blocks."""
    blocks = sum(check_room(prefix, room, image_length) for prefix in sample.prefixes)
    rows, tokens = len(sample.prefixes), sum(map(len, sample.prefixes))
    _check("max_rows", rows, room.rows, "rows")
    _check("max_prompt_tokens", tokens, room.prompt_tokens, "prefix tokens")
    _check("kv_megabytes", blocks, room.blocks, "KV blocks")
    return rows, tokens, blocks


def _check(setting: str, count: int, limit: int, what: str) -> None:
    if count > limit:
        raise ValueError(f"one sample needs {count} {what} and the vllm engine has {limit}; raise engine.{setting}")
