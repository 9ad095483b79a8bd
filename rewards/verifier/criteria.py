"""What a judge may be asked to score: the criteria as a recipe lists them, and which of them suit a sample."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from rewards.gold import GoldPair
from rewards.names import nearest
from rewards.verifier.errors import JudgeError
from rewards.verifier.gold import drawing_pair, edit_pair, target_pair
from rewards.verifier.prompts import (
    ARTEFACTS,
    CRITERIA,
    NATURALNESS,
    OVER_EDIT,
    SAME_CONTENT,
    SAME_LOOK,
    SUCCESS,
    Criterion,
    Shows,
)
from rewards.verifier.views import View

DEFAULT = (SUCCESS, OVER_EDIT, NATURALNESS, ARTEFACTS)
TARGET = (SAME_CONTENT, SAME_LOOK)
VIEWS = (View("?", ("",), (), ("",)), View("?", ("",), ("",), ("",)))
"""What a fingerprint's messages are about: a picture and an edit, each with a target."""


def fitting(criteria: Sequence[Criterion], view: View) -> list[Criterion]:
    """The criteria that a sample is scored by: those about edits for an edit alone. Raises JudgeError where none is
    left, and for a criterion that needs a target which the sample lacks.
    """
    chosen = [item for item in criteria if item.edit in (None, view.edit)]
    if not chosen:
        raise JudgeError(
            f"no criterion suits a sample {'with a source image' if view.edit else 'without source image'}"
        )
    if (needy := [item for item in chosen if item.shows == "target"]) and not view.targets:
        raise JudgeError(f"the criterion {needy[0].part!r} compares with a target image, and the sample has none")
    return chosen


def gold_pairs(criteria: Sequence[Criterion]) -> list[GoldPair]:
    """Pairs that the built-in criteria must rank rightly; none where a criterion of one's own counts too."""
    parts = {item.part for item in criteria}
    if not parts <= set(CRITERIA):
        return []
    if any(item.shows == "target" for item in criteria):
        return [target_pair()] if "same_content" in parts else []
    drawing = [drawing_pair()] if "success" in parts else []
    return drawing + [edit_pair()] if {"success", "over_edit"} <= parts else drawing


def read_criteria(listed: Sequence[Mapping[str, Any]] | None) -> tuple[Criterion, ...]:
    """Criteria as a recipe lists them: ``{name: success}`` for a built-in one, ``{name: mood, low: "...", high:
    "..."}`` for one of your own, each with an optional weight; nothing for the four of VIEScore. Raises ValueError
    that names the entry.
    """
    criteria = DEFAULT if listed is None else tuple(_criterion(entry) for entry in listed)
    names = [item.part for item in criteria]
    if not names:
        raise ValueError("criteria is an empty list, so there is nothing to score; leave it out for the built-in ones")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"two criteria are called {twice[0]!r}; rename one of them")
    return criteria


def _criterion(entry: Mapping[str, Any]) -> Criterion:
    known = ("name", "low", "high", "weight", "shows")
    if not isinstance(entry, Mapping) or not isinstance(entry.get("name"), str) or not entry["name"].isidentifier():
        raise ValueError(f'a criterion is written {{name: mood, low: "...", high: "...", weight: 1}}, got {entry!r}')
    name, weight = entry["name"], entry.get("weight", 1.0)
    if unknown := [key for key in entry if key not in known]:
        raise ValueError(f"criterion {name!r} has no setting {unknown[0]!r}. {nearest(str(unknown[0]), known)}")
    if name in ("value", "mass", "reasoning"):
        raise ValueError(f"a criterion cannot be called {name!r}, which every answer has already; rename it")
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
        raise ValueError(f"criterion {name!r} needs a weight above 0, got {weight!r}")
    ends = [entry.get("low", ""), entry.get("high", "")]
    if name in CRITERIA:
        if any(ends) or "shows" in entry:
            raise ValueError(f"the criterion {name!r} is built in; leave out low, high and shows, or rename yours")
        item = CRITERIA[name]
        return Criterion(item.part, item.key, item.low, item.high, float(weight), item.edit, item.shows)
    if not all(isinstance(end, str) and end.strip() for end in ends):
        raise ValueError(f"criterion {name!r} is not built in and needs low and high. {nearest(name, CRITERIA)}")
    shows = entry.get("shows", "prompt")
    if shows not in (all_shows := get_args(Shows)):
        raise ValueError(f"criterion {name!r} shows {shows!r}. {nearest(str(shows), all_shows)}")
    return Criterion(name, name, ends[0].rstrip("."), ends[1].rstrip("."), float(weight), None, shows)
