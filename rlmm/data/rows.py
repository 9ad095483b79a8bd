"""A user's own rows as a data set: parquet, JSON lines, CSV, text, image folders, the hub, streams."""

import logging
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from PIL import Image

from rlmm.config.base import nearest
from rlmm.config.data import RowsData, Split
from rlmm.data.base import Dataset, Example, Outline, UnusableRow, position
from rlmm.data.images import ImageReader
from rlmm.data.requests import Request, parse_row, prompts_in
from rlmm.seeds import derive

if TYPE_CHECKING:
    from rlmm.data.loading import RawRows

logger = logging.getLogger(__name__)

FAULTS_SHOWN = 5
TRAINED = "prompt also in training"


def is_held_out(prompt: str, share: float) -> bool:
    """Whether a prompt falls on the held-out side: a function of its text alone."""
    return derive("rows", "held out", prompt) < share * 2**63


class Rows(Dataset):
    """The usable rows of one split, decoded when asked for.

    `excluded` counts the rows of this split that were left out, by reason; rows whose prompt cannot be read
    belong to every split. `faults` describes the first few of them, and the first of each reason, by row
    number (from 0) in the file.
    `unread_turns` counts earlier and system turns of messages, which no prompt contains.
    """

    def __init__(
        self, raw: "RawRows", config: RowsData, side: Split, *, divided: bool, trained: frozenset[str] = frozenset()
    ) -> None:
        """Checks every row of `raw`; with `divided`, keeps those on `side` of the hash of their prompt. Rows whose
        prompt, white space around it apart, is among `trained` are excluded.

        Raises ValueError for a missing column, more exclusions than `max_excluded_share`, or nothing left.
        """
        self.excluded = Counter()
        self.faults: list[str] = []
        self.unread_turns = 0
        self._raw, self._config, self._trained = raw, config, trained
        self._reader = ImageReader(raw.root, config.image_size, config.image_mode, config.resize)
        _require_columns(raw, config)
        outlines = {number: self._outline(number, row, side, divided) for number, row in enumerate(raw)}
        self._outlines = [outline for outline in outlines.values() if outline is not None]
        self._kept = [number for number, outline in outlines.items() if outline is not None]
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

    def outline(self, index: int) -> Outline:
        return self._outlines[position(index, len(self._kept))]

    @property
    def rows_read(self) -> int:
        """All rows of the file, on whichever side of the division they fall."""
        return len(self._raw)

    def _decode(self, request: Request) -> Example:
        target: Image.Image | None = None if request.target is None else self._reader.read(request.target)
        sources = tuple(self._reader.read(source) for source in request.sources)
        return Example(request.prompt, target, sources, request.texts, request.codes, request.row)

    def _outline(self, number: int, row: Mapping[str, Any], side: Split, divided: bool) -> Outline | None:
        """The outline of a row of this split; None, with the reason counted, for one that cannot be used."""
        try:
            request = parse_row(row, self._config)
            held_out = is_held_out(request.prompt, self._config.held_out_share)
            if divided and held_out != (side == "held_out"):
                return None
            if request.prompt.strip() in self._trained:
                raise UnusableRow(TRAINED, f"{request.prompt!r:.60}")
            check = self._reader.read if self._config.check_images == "decode" else self._reader.probe
            for image in request.images:
                check(image)
            self.unread_turns += request.unread_turns
        except UnusableRow as error:
            self.excluded[error.reason] += 1
            if len(self.faults) < FAULTS_SHOWN or self.excluded[error.reason] == 1:
                self.faults.append(f"row {number}: {error}")
            return None
        return Outline(request.prompt, len(request.sources))

    def _judge(self, side: Split) -> None:
        """Report the exclusions; ValueError if they are too many, or if no row is left."""
        out, read = self.excluded.total(), len(self._raw)
        counts = ", ".join(f"{reason}: {count}" for reason, count in self.excluded.most_common())
        story = f"{self._raw.name}: {out} of {read} rows excluded ({counts}). First: " + "; ".join(self.faults)
        if out > self._config.max_excluded_share * read:
            apart = "take such prompts out of the held-out or of the training rows, " if self.excluded[TRAINED] else ""
            raise ValueError(
                f"{story}. That is more than data.max_excluded_share {self._config.max_excluded_share}:"
                f" {apart}mend the rows or raise it"
            )
        if not self._kept:
            raise ValueError(
                f"{self._raw.name} has no rows for the {side} split ({out} of {read} excluded: {counts or 'none'});"
                " give more rows, or change data.held_out_share, held_out_path or held_out_split"
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
        "text_column": config.text_column,
        "codes_column": config.codes_column,
    }
    for setting, column in wanted.items():
        if column is not None and raw.columns and column not in raw.columns:
            raise ValueError(
                f"{raw.name} has no column {column!r} (data.{setting}).{nearest(column, list(raw.columns))}"
            )


def build(config: RowsData, split: Split, seed: int) -> Rows:
    """Rows of a split; `train` and `prompts` are the same ones. `seed` plays no part: order is the file's.

    The held-out rows come from `held_out_path` or `held_out_split` if one is set, less those whose prompt is
    among the training rows too, else from the same rows by a hash of the prompt.
    """
    from rlmm.data.loading import load_raw  # `datasets` takes seconds to import; generated data does without

    if split == "fresh":
        raise ValueError(
            "fresh pairs are pictures made for the prompts of RL, which only generated data (words, scenes) can give; "
            "for rows of your own use the train split"
        )
    path, part, trained = config.path, config.split, frozenset()
    own = config.held_out_path or config.held_out_split
    if split == "held_out":
        if own:
            training = load_raw(config, path, part)
            _require_columns(training, config)
            trained = prompts_in(training.column(config.prompt_column))
        path, part = config.held_out_path or path, config.held_out_split or part
    return Rows(load_raw(config, path, part), config, split, divided=not own, trained=trained)
