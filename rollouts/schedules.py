"""Schedules: the share of a span still masked over time, from 1 at time 0 to 0 at time 1."""

import math
import re

Schedule = str
"""`linear` (1 - t), `square` (1 - t**2), `cosine` (MaskGIT, arXiv 2202.04200, section 3.3), or a power of one's own by
its formula, such as `1 - t**3`."""

POWERS: dict[str, float] = {"linear": 1, "square": 2}
FORMULA = re.compile(r"\s*1\s*-\s*t\s*\*\*\s*(\d+(\.\d*)?|\.\d+)\s*")


def check_schedule(schedule: Schedule) -> Schedule:
    """The same. Raises ValueError for what is no schedule."""
    if schedule != "cosine":
        _power(schedule)
    return schedule


def masked_share(schedule: Schedule, time: float) -> float:
    """Share still masked at a time in [0, 1]."""
    return math.cos(math.pi / 2 * time) if schedule == "cosine" else 1 - time ** _power(schedule)


def time_of(schedule: Schedule, share: float) -> float:
    """The time at which that share is still masked."""
    return math.acos(share) * 2 / math.pi if schedule == "cosine" else (1 - share) ** (1 / _power(schedule))


def _power(schedule: Schedule) -> float:
    if schedule in POWERS:
        return POWERS[schedule]
    found = FORMULA.fullmatch(schedule)
    if found is None or not (power := float(found[1])):
        raise ValueError(
            f"schedule {schedule!r} is none of {', '.join(['cosine', *POWERS])} and no formula 1 - t**P with a "
            "number P above 0, such as '1 - t**3'"
        )
    return power
