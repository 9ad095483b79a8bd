"""Rows of preferences, as `rlmm pairs` writes them or a public set has them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from rlmm.config.base import nearest
from rlmm.config.preference import PreferenceData
from rlmm.data.base import UnusableRow
from rlmm.data.images import ImageReader
from rlmm.data.requests import parse_row

IDENTICAL = "chosen and rejected are the same"
UNASKED = "no pair of answers about a picture"
NO_MARGIN = "margin that is no finite number"
SIDES = ("chosen", "rejected")


@dataclass(frozen=True)
class RawSide:
    """An answer: an image or its codes, with the text before it where there is one, or a text alone."""

    image: Image.Image | None = None
    codes: tuple[int, ...] | None = None
    text: str | None = None


@dataclass(frozen=True)
class RawPreference:
    """A decoded row. One side and a label, or two sides; `codec`: hash of the codec that made the codes, if known."""

    prompt: str
    sides: tuple[RawSide, ...]
    desirable: bool | None = None
    sources: tuple[Image.Image, ...] = ()
    codec: str | None = None


def check_columns(columns: Sequence[str], config: PreferenceData, name: str) -> None:
    """Raises ValueError for a column that is named and not there. Codes may stand for a column of images."""
    paired = config.completion_column is None
    wanted = {"prompt_column": config.prompt_column, "sources_column": config.sources_column}
    wanted |= {"completion_column": config.completion_column} if not paired else {}
    wanted |= {"label_column": config.label_column} if not paired else {}
    for side in SIDES if paired else ():
        if f"{side}_codes" not in columns:
            wanted[f"{side}_column"] = getattr(config, f"{side}_column")
    for setting, column in wanted.items():
        if column is not None and column not in columns:
            raise ValueError(f"{name} has no column {column!r} (data.{setting}).{nearest(column, list(columns))}")


def parse_preference(raw: Mapping[str, Any], config: PreferenceData, reader: ImageReader) -> RawPreference:
    """A row, its images decoded. Raises UnusableRow."""
    asked = parse_row(raw, config.rows())
    sources = tuple(reader.read(source) for source in asked.sources)
    codec = raw.get("codec")
    if config.completion_column is not None:
        label = raw[config.label_column]
        if not isinstance(label, bool | int) or label not in (0, 1):
            raise UnusableRow("label that is neither true nor false", f"{config.label_column} is {label!r:.60}")
        side = _side(raw, "completion", config.completion_column, reader)
        return RawPreference(asked.prompt, (side,), bool(label), sources, codec)
    _check_margin(raw)
    columns = (config.chosen_column, config.rejected_column)
    sides = tuple(_side(raw, side, column, reader) for side, column in zip(SIDES, columns, strict=True))
    if _same(*sides):
        raise UnusableRow(IDENTICAL)
    return RawPreference(asked.prompt, sides, None, sources, codec)


def parse_asked(raw: Mapping[str, Any], reader: ImageReader) -> RawPreference:
    """The question about the row's `picture` and the pair of answers to it, in columns `question`, `chosen_answer` and
    `rejected_answer`. Raises UnusableRow."""
    missing = [name for name in ("question", "picture", "chosen_answer", "rejected_answer") if raw.get(name) is None]
    if missing:
        raise UnusableRow(UNASKED, f"{missing[0]} is missing")
    chosen, rejected = (RawSide(text=str(raw[f"{side}_answer"])) for side in SIDES)
    if chosen == rejected:
        raise UnusableRow(IDENTICAL, "the answers are")
    return RawPreference(str(raw["question"]), (chosen, rejected), sources=(reader.read(raw["picture"]),))


def _side(raw: Mapping[str, Any], side: str, column: str, reader: ImageReader) -> RawSide:
    text, codes, image = raw.get(f"{side}_text"), raw.get(f"{side}_codes"), raw.get(column)
    if codes is not None:
        return RawSide(codes=tuple(codes), text=text)
    if isinstance(image, list):
        if len(image) > 1:
            raise UnusableRow("answer with several images", f"{column} has {len(image)}; an answer is one image")
        image = image[0] if image else None
    if image is None and text is not None:
        return RawSide(text=text)
    if image is None:
        raise UnusableRow("missing image", f"{column} is null")
    return RawSide(image=reader.read(image), text=text)


def _check_margin(raw: Mapping[str, Any]) -> None:
    """Where a row has scores or a margin, they are finite."""
    for name in ("margin", *(f"{side}_score" for side in SIDES)):
        if name in raw and not (isinstance(raw[name], int | float) and math.isfinite(raw[name])):
            raise UnusableRow(NO_MARGIN, f"{name} is {raw[name]!r}")


def _same(chosen: RawSide, rejected: RawSide) -> bool:
    if chosen.text != rejected.text or chosen.codes != rejected.codes:
        return False
    if chosen.image is None or rejected.image is None:
        return chosen.image is rejected.image
    return chosen.image.size == rejected.image.size and chosen.image.tobytes() == rejected.image.tobytes()
