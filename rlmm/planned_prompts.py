"""What a memory plan takes to stand before an image."""

from collections.abc import Iterator
from dataclasses import dataclass

from rlmm.config.data import Data, RowsData, ScenesData
from rlmm.data import build_dataset
from rlmm.policies.spelling import Spelling, UnusablePrompt

ASSUMED = 32
"""Positions of prompts in files, which a plan does not open."""
LOOKED_AT = 2000
"""Prompts at most that are spelled for a plan."""


@dataclass(frozen=True)
class Asked:
    """Positions of a `prompt` with what stands around it in a sequence, and whether a source image does."""

    prompt: int
    sources: bool


def asked_of(data: Data, spelling: Spelling, seed: int) -> Asked:
    """As the longest training prompt that is made here, or ASSUMED."""
    lengths = () if isinstance(data, RowsData) else _lengths(data, spelling, seed)
    return Asked(max(lengths, default=ASSUMED), has_sources(data))


def has_sources(data: Data) -> bool:
    """Whether prompts hold an image; one is counted."""
    if isinstance(data, RowsData):
        return data.sources_column is not None
    return isinstance(data, ScenesData) and data.variant != "text_to_image"


def _lengths(data: Data, spelling: Spelling, seed: int) -> Iterator[int]:
    rows = build_dataset(data, "train", seed)
    for index in range(min(LOOKED_AT, len(rows))):
        try:
            yield len(spelling.layout.prefix(spelling.encode(rows.outline(index).prompt)))
        except UnusablePrompt:  # which a run leaves out, and counts
            continue
