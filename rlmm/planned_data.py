"""What of a data set's first rows a memory plan is made of: of files no image is decoded, and none is converted."""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from rlmm.config.data import Data, RowsData, ScenesData
from rlmm.config.preference import PreferenceData
from rlmm.data import build_dataset
from rlmm.data.base import Example, UnusableRow
from rlmm.data.preferences import answers_of, with_sources
from rlmm.data.requests import parse_row

if TYPE_CHECKING:
    from rlmm.data.loading import FirstRows

ASSUMED = 32
"""Positions of a prompt, with what stands around it, where no row can be read."""
LOOKED_AT = 2000
"""Rows at most that are spelled for a plan."""
PAIRS_LOOKED_AT = 256
"""Of preferences, whose pictures are read with them."""


@dataclass(frozen=True)
class Shown:
    """What of a row decides how long its sequence is. text: what is taught after the prompt; image: whether one
    follows; coded: whether its codes are there."""

    prompt: str
    sources: int = 0
    text: str = ""
    image: bool = True
    coded: bool = False


@dataclass(frozen=True)
class Read:
    """The first rows of a data set. Where there are none `assumed` says why, and a prompt is taken to be about so many
    `sources`."""

    shown: Sequence[Shown] = ()
    sources: int = 0
    assumed: str = ""

    @property
    def encoded(self) -> int | None:
        """Pictures that are to be made codes of, sources apart, among so many rows; None where none was read."""
        return sum(one.image and not one.coded for one in self.shown) if self.shown else None

    @property
    def most_sources(self) -> int:
        return max((one.sources for one in self.shown), default=self.sources)


def has_sources(data: Data) -> bool:
    """Whether prompts hold images."""
    if isinstance(data, RowsData):
        return data.sources_column is not None
    return isinstance(data, ScenesData) and data.variant != "text_to_image"


def read_data(data: Data, seed: int) -> Read:
    """Of training rows. A data set of the hub is not opened."""
    if isinstance(data, RowsData):
        columns = {data.prompt_column, data.text_column, data.codes_column, data.sources_column} - {None}
        return _opened(data, LOOKED_AT, columns, partial(_of_rows, data), has_sources(data))
    rows = build_dataset(data, "train", seed)
    return Read([_of_example(rows[index]) for index in range(min(LOOKED_AT, len(rows)))])


def read_preferences(data: PreferenceData) -> Read:
    """Of preferences from elsewhere, an answer at a time."""
    return _opened(data.rows(), PAIRS_LOOKED_AT, (), partial(_of_preferences, data), data.sources_column is not None)


def _opened(
    data: RowsData,
    count: int,
    columns: Collection[str | None],
    shown_of: "Callable[[FirstRows], Iterator[Shown]]",
    sources: bool,
) -> Read:
    from rlmm.data.loading import FirstRows  # `datasets` takes seconds to import; generated data does without

    if data.format == "hub":
        return Read((), int(sources), f"{data.path} is of the hub, and not opened for a plan")
    try:
        shown = list(shown_of(FirstRows(data, count, [column for column in columns if column is not None])))
    except ValueError as error:  # at which a run stops
        return Read((), int(sources), str(error))
    return Read(shown) if shown else Read((), int(sources), f"none of the first rows of {data.path} can be used")


def _of_example(example: Example) -> Shown:
    text = example.texts[0] if example.texts else ""
    return Shown(example.prompt, len(example.sources), text, example.target is not None)


def _of_rows(data: RowsData, rows: "FirstRows") -> Iterator[Shown]:
    """Target images are taken to be there: of a table they are most of what would be read."""
    unpictured = data.model_copy(update={"target_column": None})
    for row in rows:
        try:
            asked = parse_row(row, unpictured)
        except UnusableRow:  # which a run leaves out, and counts
            continue
        text, coded = asked.texts[0] if asked.texts else "", asked.codes is not None
        drawn = data.target_column is not None or asked.target is not None or coded
        yield Shown(asked.prompt, len(asked.sources), text, drawn, coded)


def _of_preferences(data: PreferenceData, rows: "FirstRows") -> Iterator[Shown]:
    for row in rows:
        named = with_sources(data, list(row), data.path)
        try:
            asked, answers = parse_row(row, named.rows()), answers_of(row, named, rows.root)
        except UnusableRow:
            continue
        for text, drawn, coded in answers:
            yield Shown(asked.prompt, len(asked.sources), text, drawn, coded)
