"""Rows of preferences, as `rlmm pairs` writes them or a public set has them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from rlmm.config.base import nearest
from rlmm.config.preference import PreferenceData
from rlmm.data.base import UnusableRow
from rlmm.data.images import ImageReader
from rlmm.data.messages import answer_of
from rlmm.data.requests import codes_of, parse_row

IDENTICAL = "chosen and rejected are the same"
UNASKED = "no pair of answers about a picture"
NO_MARGIN = "margin that is no finite number"
UNLIKE = "one side is an image and the other a text"
SIDES = ("chosen", "rejected")
SOURCES = ("sources", "images", "image")
"""Columns of source images that need not be named: that of `rlmm pairs`, and TRL's two."""


@dataclass(frozen=True)
class RawSide:
    """An answer: an image or its codes, with the text before it where there is one, or a text alone."""

    image: Image.Image | None = None
    codes: tuple[int, ...] | None = None
    text: str | None = None

    @property
    def drawn(self) -> bool:
        return self.image is not None or self.codes is not None


@dataclass(frozen=True)
class RawPreference:
    """A decoded row. One side and a label, or two sides; `codec`: hash of the codec that made the codes, if known."""

    prompt: str
    sides: tuple[RawSide, ...]
    desirable: bool | None = None
    sources: tuple[Image.Image, ...] = ()
    codec: str | None = None
    unread_turns: int = 0


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
            hint = (
                " Set apart the prompts that conversations begin with." if setting == "prompt_column" and paired else ""
            )
            raise ValueError(f"{name} has no column {column!r} (data.{setting}).{nearest(column, list(columns))}{hint}")


def with_sources(config: PreferenceData, columns: Sequence[str], name: str) -> PreferenceData:
    """The settings with `sources_column` filled in, where a set has one of `SOURCES` and none is named. Raises
    ValueError where it has several."""
    answers = (config.chosen_column, config.rejected_column, config.completion_column)
    found = [column for column in SOURCES if column in columns and column not in answers]
    if config.sources_column is not None or not found:
        return config
    if len(found) > 1:
        raise ValueError(
            f"{name} has columns {' and '.join(found)}, and any may hold the images that prompts are about; name the "
            "right one in data.sources_column"
        )
    return config.model_copy(update={"sources_column": found[0]})


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
        return RawPreference(asked.prompt, (side,), bool(label), sources, codec, asked.unread_turns)
    _check_margin(raw)
    columns = (config.chosen_column, config.rejected_column)
    sides = tuple(_side(raw, side, column, reader) for side, column in zip(SIDES, columns, strict=True))
    if len({side.drawn for side in sides}) > 1:
        raise UnusableRow(UNLIKE)
    if _same(*sides):
        raise UnusableRow(IDENTICAL)
    return RawPreference(asked.prompt, sides, None, sources, codec, asked.unread_turns)


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


def answers_of(raw: Mapping[str, Any], config: PreferenceData, root: Path | None) -> list[tuple[str, bool, bool]]:
    """The text of each answer, "" without one, whether an image is drawn, and whether its codes are there; none is
    decoded. Raises UnusableRow."""
    reader = ImageReader(root)
    if config.completion_column is not None:
        columns = {"completion": config.completion_column}
    else:
        columns = dict(zip(SIDES, (config.chosen_column, config.rejected_column), strict=True))
    found = []
    for side, column in columns.items():
        coded = raw.get(f"{side}_codes") is not None
        said, image = (None, None) if coded else _answer(raw.get(column), column, reader)
        found.append((said or _text(raw, side) or "", coded or image is not None, coded))
    return found


def _side(raw: Mapping[str, Any], side: str, column: str, reader: ImageReader) -> RawSide:
    text, codes = _text(raw, side), raw.get(f"{side}_codes")
    if codes is not None:
        return RawSide(codes=codes_of(codes, f"{side}_codes"), text=text)
    said, image = _answer(raw.get(column), column, reader)
    if said is not None and text is not None:
        raise UnusableRow("answer with two texts", f"one in {column}, one in {side}_text")
    text = text if said is None else said
    if image is None and text is None:
        raise UnusableRow("missing image", f"{column} is null")
    return RawSide(None if image is None else reader.read(image), text=text)


def _text(raw: Mapping[str, Any], side: str) -> str | None:
    text = raw.get(f"{side}_text")
    if text is not None and not isinstance(text, str):
        raise UnusableRow("text that is none", f"{side}_text is {text!r:.60}")
    return text


def _answer(value: Any, column: str, reader: ImageReader) -> tuple[str | None, Any]:
    """Text and image, still encoded, of a cell: an image, a list with one, a text, or messages of the assistant."""
    text = None
    if isinstance(value, list) and value and isinstance(value[0], Mapping) and "role" in value[0]:
        text, images = answer_of(value)
        if not text and not images:
            raise UnusableRow("empty answer", f"{column} says nothing")
        text, value = text or None, list(images)
    if isinstance(value, list):
        if len(value) > 1:
            raise UnusableRow("answer with several images", f"{column} has {len(value)}; an answer is one image")
        return text, value[0] if value else None
    if isinstance(value, str) and not value.strip():
        raise UnusableRow("empty answer", f"{column} is an empty text")
    return (value, None) if isinstance(value, str) and not reader.is_named_by(value) else (None, value)


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
