"""What happens to a term's raw values before they are weighed: one by one, or against those of their group."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

GroupTransform = Literal["", "rank", "zscore"]


class Transform(Protocol):
    """Maps a finite raw value to the scale on which terms are combined."""

    def __call__(self, value: float) -> float: ...


def identity(value: float) -> float:
    """The raw value."""
    return value


@dataclass(frozen=True)
class Affine:
    """Maps `lo` to 0 and `hi` to 1 and clips to [0, 1]. With hi < lo, a lower raw value is the better one."""

    lo: float
    hi: float

    def __post_init__(self) -> None:
        if self.lo == self.hi or not (math.isfinite(self.lo) and math.isfinite(self.hi)):
            raise ValueError(f"affine needs two different finite ends, got lo={self.lo}, hi={self.hi}")

    def __call__(self, value: float) -> float:
        return min(1.0, max(0.0, (value - self.lo) / (self.hi - self.lo)))


@dataclass(frozen=True)
class Sigmoid:
    """1 / (1 + exp(-(value - centre) / width)), in (0, 1), 1/2 at `centre`. With a negative width, a lower raw value is
    the better one.
    """

    centre: float
    width: float

    def __post_init__(self) -> None:
        if not self.width or not (math.isfinite(self.centre) and math.isfinite(self.width)):
            raise ValueError(
                f"sigmoid needs a finite centre and width, and no width 0, got {self.centre}, {self.width}"
            )

    def __call__(self, value: float) -> float:
        # tanh never overflows, as exp would far from the centre.
        return (1 + math.tanh((value - self.centre) / self.width / 2)) / 2


def ranks(values: Sequence[float]) -> list[float]:
    """Each value's place among them, 0 for the lowest to 1 for the highest; equal values share the mean of their
    places, and one alone has 1/2.
    """
    if len(values) == 1:
        return [0.5]
    below = [sum(other < value for other in values) for value in values]
    equal = [sum(other == value for other in values) - 1 for value in values]
    return [(low + same / 2) / (len(values) - 1) for low, same in zip(below, equal, strict=True)]


def zscores(values: Sequence[float]) -> list[float]:
    """(value - mean) / sample standard deviation (n - 1); 0 where all are equal."""
    if not values or max(values) == min(values):
        return [0.0] * len(values)
    mean = math.fsum(values) / len(values)
    std = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))
    return [(value - mean) / std if std else 0.0 for value in values]


IN_GROUP: dict[GroupTransform, Callable[[Sequence[float]], list[float]]] = {
    "": list,
    "rank": ranks,
    "zscore": zscores,
}
"""Values of a group's members -> their values among them."""


def by_group(
    groups: Sequence[str], values: Sequence[float], function: Callable[[Sequence[float]], list[float]]
) -> list[float]:
    """`function` of each group's values, put back in their places."""
    places: dict[str, list[int]] = {}
    for at, group in enumerate(groups):
        places.setdefault(group, []).append(at)
    made = [0.0] * len(values)
    for rows in places.values():
        for at, value in zip(rows, function([values[at] for at in rows]), strict=True):
            made[at] = value
    return made
