"""What a data set hands to the stages."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from PIL import Image


@dataclass(frozen=True)
class Example:
    """One decoded row.

    `target` is the image the prompt should yield, where the row has one; `sources` are the images the prompt
    is about. `row` is every other column as it was read: it reaches the rewards.
    """

    prompt: str
    target: Image.Image | None = None
    sources: tuple[Image.Image, ...] = ()
    row: Mapping[str, Any] = field(default_factory=dict)


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

    def __iter__(self) -> Iterator[Example]:
        for index in range(len(self)):
            yield self[index]


def position(index: int, length: int) -> int:
    """`index` if it lies in [0, length), counted from the end if negative; IndexError, which ends a `for`, if
    not."""
    if not -length <= index < length:
        raise IndexError(f"row {index} of a data set of {length} rows")
    return index % length
