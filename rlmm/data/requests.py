"""A raw row as a request: its prompt, its images still encoded, and the columns that are neither."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from rlmm.config.data import RowsData
from rlmm.data.base import UnusableRow
from rlmm.data.messages import last_request


@dataclass(frozen=True)
class Request:
    """A row with its images still encoded."""

    prompt: str
    target: Any
    sources: tuple[Any, ...]
    row: Mapping[str, Any]
    texts: tuple[str, ...] = ()
    codes: tuple[int, ...] | None = None
    unread_turns: int = 0

    @property
    def images(self) -> tuple[Any, ...]:
        return self.sources if self.target is None else (self.target, *self.sources)


def parse_row(raw: Mapping[str, Any], config: RowsData) -> Request:
    """Split a raw row into prompt, images and the rest, as the config names its columns.

    A null in the target or sources column is a missing image; an empty list of sources is none. Raises
    UnusableRow.
    """
    used = {config.prompt_column, config.target_column, config.sources_column, config.text_column, config.codes_column}
    rest = {name: value for name, value in raw.items() if name not in used}
    asked = raw[config.prompt_column]
    given = () if config.sources_column is None else raw[config.sources_column]
    given = tuple(given) if isinstance(given, list | tuple) else (given,)
    target, unread, texts = None, 0, ()
    if isinstance(asked, list):
        turn = last_request(asked)
        prompt, sources, unread = turn.text, _placed(turn.images, given), turn.unread
        target = _answer(turn.answer_images) if config.target_column is None else None
        texts = (turn.answer_text,) if turn.answer_text else ()
    else:
        prompt, sources = asked, given
    if config.target_column is not None:
        target = raw[config.target_column]
        if target is None:
            raise UnusableRow("missing image", f"{config.target_column} is null")
    if config.text_column is not None:
        texts = _texts(raw[config.text_column], config.text_column)
    codes = None if config.codes_column is None else codes_of(raw[config.codes_column], config.codes_column)
    prompt = _checked_prompt(prompt, config.max_prompt_characters)
    return Request(prompt, target, sources, rest, texts, codes, unread)


def _texts(value: Any, column: str) -> tuple[str, ...]:
    texts = tuple(value) if isinstance(value, list | tuple) else (value,)
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise UnusableRow("no text", f"{column} is {value!r:.60}")
    return texts


def codes_of(value: Any, column: str) -> tuple[int, ...]:
    """The codes of an image: a list, or a list a row of its grid. Raises UnusableRow."""
    rows = value if isinstance(value, list) else []
    flat = [code for row in rows for code in (row if isinstance(row, list) else [row])]
    if not flat or not all(isinstance(code, int) for code in flat):
        raise UnusableRow("codes that are no list of whole numbers", f"{column} is {value!r:.60}")
    return tuple(flat)


def _checked_prompt(prompt: Any, longest: int | None) -> str:
    if prompt is None or prompt == "" or isinstance(prompt, str) and not prompt.strip():
        raise UnusableRow("empty prompt")
    if not isinstance(prompt, str):
        raise UnusableRow("prompt is neither text nor messages", f"{type(prompt).__name__}: {prompt!r:.60}")
    if longest is not None and len(prompt) > longest:
        raise UnusableRow(f"prompt longer than {longest} characters", f"{len(prompt)} characters")
    return prompt


def _placed(parts: tuple[Any, ...], given: tuple[Any, ...]) -> tuple[Any, ...]:
    """Images of the message parts, with those of the sources column in the empty ones, or in front if there
    are none."""
    empty = sum(part is None for part in parts)
    if not empty:
        return given + parts
    if empty != len(given):
        raise UnusableRow("image parts without images", f"{empty} empty image parts, {len(given)} images in sources")
    rest = iter(given)
    return tuple(next(rest) if part is None else part for part in parts)


def _answer(images: tuple[Any, ...]) -> Any:
    if len(images) > 1:
        raise UnusableRow("answer with several images", f"{len(images)}; a target is one image")
    return images[0] if images else None


def prompts_in(column: Iterable[Any]) -> frozenset[str]:
    """The prompts in a column of text or messages, without the white space around them; what is neither is passed
    over."""
    found = set()
    for asked in column:
        try:
            text = last_request(asked).text if isinstance(asked, list) else asked
        except UnusableRow:
            continue
        if isinstance(text, str):
            found.add(text.strip())
    return frozenset(found)
