"""What should be in a picture, as GenEval writes it: objects with counts, colours and places (Ghosh et al. 2023, arXiv
2310.11513). Read once and checked; an unknown colour or relation is an error, never a score of 0.

    {"tag": "position", "prompt": "a photo of a red dog right of two cats",
     "include": [{"class": "cat", "count": 2},
                 {"class": "dog", "count": 1, "color": "red", "position": ["right of", 0]}],
     "exclude": [{"class": "cat", "count": 3}]}

`include` lists what must be there, at least `count` of it; `position` says how each of these objects lies to those of
an earlier entry. `exclude`: fewer than `count` of a class may be there.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rewards.names import nearest

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")


@dataclass(frozen=True)
class Wanted:
    """`count` objects of a class, of a colour where one is named; `relation` to the objects of entry `other`."""

    name: str
    count: int
    color: str | None = None
    relation: str | None = None
    other: int = 0


@dataclass(frozen=True)
class Excluded:
    """Fewer than `count` objects of a class."""

    name: str
    count: int


@dataclass(frozen=True)
class ObjectSpec:
    """What a picture must and may not show. `counting`: whether its point is the number, as its tag says."""

    include: tuple[Wanted, ...]
    exclude: tuple[Excluded, ...] = ()
    counting: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """Every class named, once."""
        return tuple(dict.fromkeys(item.name for item in (*self.include, *self.exclude)))


def read_spec(given: Any) -> ObjectSpec:
    """A row's metadata: a mapping with `include` and perhaps `tag` and `exclude`, or that as JSON; other keys are left
    alone, and missing means null. Raises ValueError that names the entry.
    """
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except ValueError as error:
            raise ValueError(f"the object metadata is no JSON: {error}") from error
    if not isinstance(given, Mapping) or not _listed(given.get("include")):
        has = ", ".join(map(str, given)) if isinstance(given, Mapping) else repr(given)
        raise ValueError(f"the row says nothing of the objects: no list `include` (it has: {has or 'nothing'})")
    include = tuple(_wanted(entry, at) for at, entry in enumerate(given["include"]))
    exclude = given.get("exclude") or ()
    if not isinstance(exclude, Sequence) or isinstance(exclude, str):
        raise ValueError(f"`exclude` is no list: {exclude!r}")
    excluded = tuple(Excluded(*_class_and_count(entry, f"exclude[{at}]")) for at, entry in enumerate(exclude))
    for item in excluded:
        if wanted := [one for one in include if one.name == item.name and one.count >= item.count]:
            raise ValueError(f"{wanted[0].count} {item.name} are to be there, and {item.count} are one too many")
    return ObjectSpec(include, excluded, given.get("tag") == "counting")


def _listed(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and len(value) > 0


def _class_and_count(entry: Any, where: str, more: Sequence[str] = ()) -> tuple[str, int]:
    known = ("class", "count", *more)
    if not isinstance(entry, Mapping) or not isinstance(entry.get("class"), str) or not entry["class"].strip():
        raise ValueError(f"{where} has no `class`: {entry!r}")
    if unknown := [key for key, value in entry.items() if key not in known and value is not None]:
        raise ValueError(f"{where} has an unknown key {unknown[0]!r}. {nearest(str(unknown[0]), known)}")
    count = entry.get("count")
    if type(count) is not int or count < 1:
        raise ValueError(f"{where} needs a count of at least 1, got {count!r}")
    return entry["class"], count


def _wanted(entry: Any, at: int) -> Wanted:
    where = f"include[{at}]"
    name, count = _class_and_count(entry, where, ("color", "position"))
    color, position = entry.get("color"), entry.get("position")
    if color is not None and color not in COLORS:
        raise ValueError(f"{where} has the unknown color {color!r}. {nearest(str(color), COLORS)}")
    if position is None:
        return Wanted(name, count, color)
    if not _listed(position) or len(position) != 2:
        raise ValueError(f"{where} has the position {position!r}; expected [relation, number of an earlier entry]")
    relation, other = position
    if relation not in RELATIONS:
        raise ValueError(f"{where} has the unknown relation {relation!r}. {nearest(str(relation), RELATIONS)}")
    # A table's column of lists has one type, so the number may have been written as text.
    number = int(other) if isinstance(other, str) and other.isdecimal() else other
    if type(number) is not int or not 0 <= number < at:
        raise ValueError(f"{where} lies {relation} entry {other!r}, which is none of the {at} before it")
    return Wanted(name, count, color, relation, number)
