"""Rows to prompts, target images and source images."""

from collections.abc import Callable
from typing import Any, get_args

from rlmm.config.base import nearest
from rlmm.config.data import RowsData, ScenesData, Split, WordsData
from rlmm.data import rows, scenes, words
from rlmm.data.base import Dataset, Example

SOURCES: dict[str, Callable[[Any, Split, int], Dataset]] = {
    "words": words.build,
    "scenes": scenes.build,
    "rows": rows.build,
}
"""Builder of each config kind. A new source is a config class with its `kind`, a builder, and a line here."""


def build_dataset(config: WordsData | ScenesData | RowsData, split: Split, seed: int) -> Dataset:
    """The rows of one split. `seed` is the run's; what is held out does not depend on it.

    Raises ValueError for an unknown split, and whatever the source finds wrong with its config or files.
    """
    if split not in get_args(Split):
        raise ValueError(f"unknown split {split!r}.{nearest(str(split), list(get_args(Split)))}")
    return SOURCES[config.kind](config, split, seed)


__all__ = ["SOURCES", "Dataset", "Example", "build_dataset"]
