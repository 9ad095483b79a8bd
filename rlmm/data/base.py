"""What a data set hands to the stages."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from PIL import Image


@dataclass(frozen=True)
class Example:
    """One decoded row.

    `target` is the image the prompt should yield, where the row has one; `sources` are the images the prompt
    is about. `texts` are what the policy should write, an answer or the thought before the image: the first
    is what SFT teaches, each is right for a reward. `codes` are those of a target that was tokenised before.
    `row` is every other column as it was read: it reaches the rewards.
    """

    prompt: str
    target: Image.Image | None = None
    sources: tuple[Image.Image, ...] = ()
    texts: tuple[str, ...] = ()
    codes: tuple[int, ...] | None = None
    row: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Outline:
    """What is known of a row before any image is read: its prompt, and how many source images it has."""

    prompt: str
    sources: int = 0


class UnusableRow(ValueError):
    """A row that cannot be used. `reason` is the category it is counted under, the text has the
    particulars."""

    def __init__(self, reason: str, particulars: str = "") -> None:
        super().__init__(f"{reason}: {particulars}" if particulars else reason)
        self.reason = reason


class Dataset(Protocol):
    """Rows by number. Item i is the same whenever, in whatever order and in whichever process it is read.

    `excluded` counts the rows that were left out, by reason; they are not part of `len`.
    """

    excluded: Counter[str]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...

    def outline(self, index: int) -> Outline:
        """The prompt of item `index` and the number of its sources; no image is decoded for it."""
        ...

    @property
    def rows_read(self) -> int:
        """The rows that exclusions are a share of."""
        return len(self) + self.excluded.total()

    def __iter__(self) -> Iterator[Example]:
        for index in range(len(self)):
            yield self[index]


class Subset(Dataset):
    """The rows `kept` of another data set, in that order; `excluded` counts what neither of them has."""

    def __init__(self, whole: Dataset, kept: Sequence[int], excluded: Counter[str]) -> None:
        self.excluded = excluded
        self._whole, self._kept = whole, kept

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> Example:
        return self._whole[self._kept[position(index, len(self))]]

    def outline(self, index: int) -> Outline:
        return self._whole.outline(self._kept[position(index, len(self))])

    @property
    def rows_read(self) -> int:
        return self._whole.rows_read


def position(index: int, length: int) -> int:
    """`index` if it lies in [0, length), counted from the end if negative; IndexError, which ends a `for`, if
    not."""
    if not -length <= index < length:
        raise IndexError(f"row {index} of a data set of {length} rows")
    return index % length
