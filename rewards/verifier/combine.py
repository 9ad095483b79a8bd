"""Several answers of a judge made into one value."""

import math
from collections.abc import Sequence
from typing import Literal, get_args

from rewards.names import nearest

Combine = Literal["geometric", "mean"]


def check_combine(combine: str) -> None:
    """Raises ValueError, naming the nearest, for an unknown way to combine."""
    if combine not in (known := get_args(Combine)):
        raise ValueError(f"there is no way to combine called {combine!r}. {nearest(combine, known)}")


def combined(weighted: Sequence[tuple[float, float]], combine: Combine) -> float:
    """The weighted mean, arithmetic or geometric, of (weight, value) pairs with weights > 0 and values in [0, 1]."""
    total = math.fsum(weight for weight, _ in weighted)
    shares = [(weight / total, value) for weight, value in weighted]
    if combine == "mean":
        value = math.fsum(share * value for share, value in shares)
    else:
        value = math.prod(value**share for share, value in shares)
    return min(value, 1.0)  # rounding
