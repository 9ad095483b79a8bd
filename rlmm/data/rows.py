"""A user's own rows as a data set: parquet, JSON lines, CSV, text, image folders, the hub, streams."""

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from PIL import Image

from rlmm.config.base import nearest
from rlmm.config.data import RowsData, Split
from rlmm.data.base import Dataset, Example, UnusableRow, position
from rlmm.data.images import ImageReader
from rlmm.data.messages import last_request
from rlmm.seeds import derive

if TYPE_CHECKING:
    from rlmm.data.loading import RawRows

logger = logging.getLogger(__name__)

FAULTS_SHOWN = 5


@dataclass(frozen=True)
class Request:
    """A row with its images still encoded."""

    prompt: str
    target: Any
    sources: tuple[Any, ...]
    row: Mapping[str, Any]
    unread_turns: int = 0

    @property
    def images(self) -> tuple[Any, ...]:
        return self.sources if self.target is None else (self.target, *self.sources)


def parse_row(raw: Mapping[str, Any], config: RowsData) -> Request:
    """Split a raw row into prompt, images and the rest, as the config names its columns.

    A null in the target or sources column is a missing image; an empty list of sources is none. Raises
    UnusableRow.
    """
    used = {config.prompt_column, config.target_column, config.sources_column}
    rest = {name: value for name, value in raw.items() if name not in used}
    asked = raw[config.prompt_column]
    given = () if config.sources_column is None else raw[config.sources_column]
    given = tuple(given) if isinstance(given, list | tuple) else (given,)
    target, unread = None, 0
    if isinstance(asked, list):
        turn = last_request(asked)
        prompt, sources, unread = turn.text, _placed(turn.images, given), turn.unread
        target = _answer(turn.answer_images) if config.target_column is None else None
    else:
        prompt, sources = asked, given
    if config.target_column is not None:
        target = raw[config.target_column]
        if target is None:
            raise UnusableRow("missing image", f"{config.target_column} is null")
    return Request(_checked_prompt(prompt, config.max_prompt_characters), target, sources, rest, unread)


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


def is_held_out(prompt: str, share: float) -> bool:
    """Whether a prompt falls on the held-out side: a function of its text alone."""
    return derive("rows", "held out", prompt) < share * 2**63


class Rows(Dataset):
    """The usable rows of one split, decoded when asked for.

    `excluded` counts the rows of this split that were left out, by reason; rows whose prompt cannot be read
    belong to every split. `faults` describes the first few of them, by row number (from 0) in the file.
    `unread_turns` counts earlier and system turns of messages, which no prompt contains.
    """

    def __init__(self, raw: "RawRows", config: RowsData, side: Split, *, divided: bool) -> None:
        """Checks every row of `raw`; with `divided`, keeps those on `side` of the hash of their prompt.

        Raises ValueError for a missing column, more exclusions than `max_excluded_share`, or nothing left.
        """
        self.excluded = Counter()
        self.faults: list[str] = []
        self.unread_turns = 0
        self._raw, self._config = raw, config
        self._reader = ImageReader(raw.root, config.image_size, config.image_mode, config.resize)
        _require_columns(raw, config)
        self._kept = [number for number, row in enumerate(raw) if self._usable(number, row, side, divided)]
        self._judge(side)

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> Example:
        number = self._kept[position(index, len(self._kept))]
        request = parse_row(self._raw[number], self._config)
        try:
            return self._decode(request)
        except UnusableRow as error:
            raise ValueError(
                f"row {number} of {self._raw.name} could be used at the start and cannot now: {error}. With "
                "data.check_images: decode, images that are damaged at the start are excluded"
            ) from error

    def _decode(self, request: Request) -> Example:
        target: Image.Image | None = None if request.target is None else self._reader.read(request.target)
        sources = tuple(self._reader.read(source) for source in request.sources)
        return Example(request.prompt, target, sources, request.row)

    def _usable(self, number: int, row: Mapping[str, Any], side: Split, divided: bool) -> bool:
        try:
            request = parse_row(row, self._config)
            held_out = is_held_out(request.prompt, self._config.held_out_share)
            if divided and held_out != (side == "held_out"):
                return False
            check = self._reader.read if self._config.check_images == "decode" else self._reader.probe
            for image in request.images:
                check(image)
            self.unread_turns += request.unread_turns
        except UnusableRow as error:
            self.excluded[error.reason] += 1
            if len(self.faults) < FAULTS_SHOWN:
                self.faults.append(f"row {number}: {error}")
            return False
        return True

    def _judge(self, side: Split) -> None:
        """Report the exclusions; ValueError if they are too many, or if no row is left."""
        out, read = self.excluded.total(), len(self._raw)
        counts = ", ".join(f"{reason}: {count}" for reason, count in self.excluded.most_common())
        story = f"{self._raw.name}: {out} of {read} rows excluded ({counts}). First: " + "; ".join(self.faults)
        if out > self._config.max_excluded_share * read:
            raise ValueError(
                f"{story}. That is more than data.max_excluded_share {self._config.max_excluded_share}:"
                " mend the rows or raise it"
            )
        if not self._kept:
            raise ValueError(
                f"{self._raw.name} has no rows for the {side} split ({out} of {read} excluded); give"
                " more rows, or change data.held_out_share, held_out_path or held_out_split"
            )
        if out:
            logger.warning(story)
        if self.unread_turns:
            logger.warning("%s: %d earlier or system turns are in no prompt", self._raw.name, self.unread_turns)


def _require_columns(raw: "RawRows", config: RowsData) -> None:
    wanted = {
        "prompt_column": config.prompt_column,
        "target_column": config.target_column,
        "sources_column": config.sources_column,
    }
    for setting, column in wanted.items():
        if column is not None and raw.columns and column not in raw.columns:
            raise ValueError(
                f"{raw.name} has no column {column!r} (data.{setting}).{nearest(column, list(raw.columns))}"
            )


def build(config: RowsData, split: Split, seed: int) -> Rows:
    """Rows of a split; `train` and `prompts` are the same ones. `seed` plays no part: order is the file's.

    The held-out rows come from `held_out_path` or `held_out_split` if one is set, else from the same rows by
    a hash of the prompt.
    """
    from rlmm.data.loading import load_raw  # `datasets` takes seconds to import; generated data does without

    path, part = config.path, config.split
    own = config.held_out_path or config.held_out_split
    if split == "held_out":
        path, part = config.held_out_path or path, config.held_out_split or part
    return Rows(load_raw(config, path, part), config, split, divided=not own)
