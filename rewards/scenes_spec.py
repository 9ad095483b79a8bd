"""What a generated scene should show: the record in `row["scene"]`, for who draws it and for the verifier.

A scene is 1 to 16 coloured shapes on a 4x4 grid of 12-pixel cells over a white 48x48 RGB image, at most one
shape a cell, every shape whole inside its cell with a margin of at least one pixel to the cell's border. A
circle is a disc, a square an axis-parallel square, a triangle an isosceles one with a horizontal base at the
bottom. Where in the grid a shape stands is free, except for what the relation says.

The plain-dict form (`to_dict` / `from_dict`; null and missing mean the same)::

    {"objects":  [{"shape": "circle", "color": "red", "count": 2},
                  {"shape": "square", "color": "blue", "count": 1}],
     "relation": {"kind": "above", "a": 0, "b": 1},
     "edit":     {"kind": "recolor", "shape": "circle", "color": "red", "to": "green"}}

`objects` lists every shape of the wanted image, each (shape, color) pair once. `relation` says that every
object of group `a` lies on that side of every object of group `b`, by cells (``above``: in a row above;
``left_of``: in a column further left). With `edit`, the sample has one source image, `objects` is the scene
*after* the edit, and everything the edit does not name stays in its cell:

- ``recolor``: all source objects of (shape, color) take the colour `to`, in place.
- ``reshape``: all source objects of (shape, color) take the shape `to`, in place.
- ``remove``: all source objects of (shape, color) are gone (never the whole scene: `objects` is never empty).
- ``add``: one more (shape, color) in a cell that was empty.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rewards.names import nearest

GRID = 4
"""Cells a side."""
CELL = 12
"""Pixels a cell side."""
SIZE = GRID * CELL
"""Pixels an image side."""
BACKGROUND = (255, 255, 255)
PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (225, 30, 30),
    "green": (30, 165, 60),
    "blue": (30, 70, 225),
    "yellow": (250, 205, 0),
    "purple": (170, 30, 210),
}
SHAPES = ("circle", "square", "triangle")
RELATIONS = ("left_of", "right_of", "above", "below")
EDITS = ("recolor", "reshape", "remove", "add")


def _one_of(what: str, value: object, known: Sequence[str]) -> str:
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"scene: {what} {value!r} is unknown. {nearest(str(value), known)}")
    return value


def _fields(what: str, data: object, required: Sequence[str], optional: Sequence[str] = ()) -> dict[str, Any]:
    """The given fields of a plain dict, nulls dropped; refuses unknown and missing keys."""
    if not isinstance(data, Mapping):
        raise ValueError(f"scene: {what} must be a mapping, got {type(data).__name__}: {data!r}")
    given = {str(key): value for key, value in data.items() if value is not None}
    for key in given:
        if key not in (*required, *optional):
            raise ValueError(f"scene: {what} has an unknown key {key!r}. {nearest(key, (*required, *optional))}")
    if missing := [key for key in required if key not in given]:
        raise ValueError(f"scene: {what} lacks {', '.join(missing)}; it has {', '.join(given) or 'nothing'}.")
    return given


@dataclass(frozen=True)
class ObjectGroup:
    """`count` objects of one shape and colour."""

    shape: str
    color: str
    count: int = 1

    def __post_init__(self) -> None:
        _one_of("shape", self.shape, SHAPES)
        _one_of("color", self.color, list(PALETTE))
        if not isinstance(self.count, int) or not 1 <= self.count <= GRID * GRID:
            raise ValueError(f"scene: count must be a whole number from 1 to {GRID * GRID}, got {self.count!r}.")


@dataclass(frozen=True)
class Relation:
    """Every object of group index `a` lies `kind` every object of group index `b`."""

    kind: str
    a: int
    b: int

    def __post_init__(self) -> None:
        _one_of("relation", self.kind, RELATIONS)


@dataclass(frozen=True)
class Edit:
    """What changes between the source image and the wanted one. `to` is a colour (recolor) or a shape
    (reshape).
    """

    kind: str
    shape: str
    color: str
    to: str | None = None

    def __post_init__(self) -> None:
        _one_of("edit", self.kind, EDITS)
        _one_of("shape", self.shape, SHAPES)
        _one_of("color", self.color, list(PALETTE))
        if self.kind == "recolor":
            _one_of("recolor target", self.to, list(PALETTE))
        elif self.kind == "reshape":
            _one_of("reshape target", self.to, SHAPES)
        elif self.to is not None:
            raise ValueError(f"scene: an edit of kind {self.kind} takes no 'to', got {self.to!r}.")
        if self.to is not None and self.to in (self.shape, self.color):
            raise ValueError(f"scene: {self.kind} to {self.to!r} changes nothing.")


@dataclass(frozen=True)
class SceneSpec:
    """The wanted image. Raises ValueError, naming the part, for anything that could not be drawn or
    checked.
    """

    objects: tuple[ObjectGroup, ...]
    relation: Relation | None = None
    edit: Edit | None = None

    def __post_init__(self) -> None:
        kinds = [(group.shape, group.color) for group in self.objects]
        if len(set(kinds)) != len(kinds):
            raise ValueError(f"scene: each (shape, color) pair may be listed once; got {kinds}.")
        if not kinds:
            raise ValueError("scene: no objects; an empty image would then be the right answer.")
        if self.total > GRID * GRID:
            raise ValueError(f"scene: {self.total} objects do not fit {GRID * GRID} cells.")
        if self.relation is not None:
            a, b = self.relation.a, self.relation.b
            if a == b or not (0 <= a < len(kinds) and 0 <= b < len(kinds)):
                raise ValueError(f"scene: relation needs two different groups below {len(kinds)}, got a={a}, b={b}.")

    @property
    def total(self) -> int:
        """Number of objects in the wanted image."""
        return sum(group.count for group in self.objects)

    def to_dict(self) -> dict[str, Any]:
        """The plain-dict form, as stored in a data row's `scene` column."""
        plain = asdict(self)
        plain["objects"] = list(plain["objects"])
        return plain

    @staticmethod
    def from_dict(data: object) -> "SceneSpec":
        """Reads the plain-dict form; ValueError names what is wrong."""
        given = _fields("scene", data, ["objects"], ["relation", "edit"])
        if isinstance(given["objects"], str | Mapping) or not isinstance(given["objects"], Sequence):
            raise ValueError(f"scene: objects must be a list, got {type(given['objects']).__name__}.")
        objects = tuple(
            ObjectGroup(**_fields("object", item, ["shape", "color"], ["count"])) for item in given["objects"]
        )
        relation = given.get("relation")
        edit = given.get("edit")
        return SceneSpec(
            objects,
            None if relation is None else Relation(**_fields("relation", relation, ["kind", "a", "b"])),
            None if edit is None else Edit(**_fields("edit", edit, ["kind", "shape", "color"], ["to"])),
        )
