"""Detected objects against what should be there: GenEval's rule, strict and graded.

Strict is GenEval's own: at least `count` of each class; of the most confident `count` of them, all of the colour and
all in their place; fewer than an excluded count. Graded lies in [0, 1], is 1 exactly where strict is, and 0 for a
picture with none of the objects. It differs from the soft score of a published reward server, which goes below 0 for
too many objects and gives a wrong place credit besides.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol, get_args

from PIL import Image

from rewards.base import Sample, Score
from rewards.gold import GoldPair
from rewards.images import CorruptImage, load_all
from rewards.names import nearest
from rewards.object_spec import ObjectSpec, Wanted, read_spec

Form = Literal["graded", "strict"]
MARGIN = 0.1
"""Share of both objects' widths (heights) by which they must be apart before they are beside (above) each other."""


@dataclass(frozen=True)
class Detection:
    """One object. `box`: left, top, right, bottom in pixels. `color` where the detector tells it."""

    name: str
    confidence: float
    box: tuple[float, float, float, float]
    color: str | None = None


class Detector(Protocol):
    """Finds objects of named classes. `tells_colours`: whether it fills in a detection's colour."""

    tells_colours: bool

    def detect(self, images: Sequence[Image.Image], names: Sequence[Sequence[str]]) -> list[list[Detection]]:
        """Each RGB image's objects of its own names, in any order. Raises ValueError for a name it cannot find."""
        ...

    def gold(self) -> Sequence[GoldPair]:
        """Pairs of samples, with metadata in their rows, that the detector must tell apart; or none."""
        ...

    def fingerprint(self) -> str:
        """Identity of the detector: model, settings."""
        ...


class Colours(Protocol):
    """Names the colours of detected objects."""

    def name_colours(self, image: Image.Image, objects: Sequence[Detection]) -> list[str]:
        """A colour of `object_spec.COLORS` for each object."""
        ...

    def fingerprint(self) -> str: ...


def relations(a: Detection, b: Detection) -> set[str]:
    """How a lies to b: the relations within 60 degrees of whose axis the centres' offset points, after MARGIN of both
    extents is taken off it; none where the boxes' middles are too near.
    """
    size = [[box[2] - box[0], box[3] - box[1]] for box in (a.box, b.box)]
    offset = [(a.box[axis] + a.box[axis + 2] - b.box[axis] - b.box[axis + 2]) / 2 for axis in (0, 1)]
    length = math.hypot(*offset)
    apart = [max(abs(o) - MARGIN * (abs(size[0][axis]) + abs(size[1][axis])), 0) for axis, o in enumerate(offset)]
    if length == 0 or max(apart) < 1e-3:
        return set()
    x, y = (math.copysign(far, o) / length for far, o in zip(apart, offset, strict=True))
    held = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {relation for relation, holds in held.items() if holds}


def judge_objects(found: Sequence[Detection], spec: ObjectSpec, *, exact: bool = False) -> dict[str, float]:
    """strict, graded, and the means of count, color, position, of objects that are all kept, the most confident first.

    With m objects of an entry wanted and n found: count = min(n, m) / m; color = the share of m of the first m found
    that have the colour; position = the share of the m x m' pairs with the other entry's first m' for which the
    relation holds. graded is the mean of all of these that the spec has, times (c - 1) / n for each class of which
    n >= c objects are found and c are one too many. `exact`: one more than an entry's count is one too many.
    """
    groups = [[item for item in found if item.name == wanted.name] for wanted in spec.include]
    first = [group[: wanted.count] for group, wanted in zip(groups, spec.include, strict=True)]
    parts: dict[str, list[float]] = {}
    for wanted, chosen in zip(spec.include, first, strict=True):
        parts.setdefault("count", []).append(len(chosen) / wanted.count)
        if wanted.color is not None:
            parts.setdefault("color", []).append(sum(one.color == wanted.color for one in chosen) / wanted.count)
        if wanted.relation is not None:
            parts.setdefault("position", []).append(_placed(wanted, chosen, first[wanted.other], spec))
    limits = {item.name: item.count for item in spec.exclude}
    if exact:
        most = {item.name: 1 + max(one.count for one in spec.include if one.name == item.name) for item in spec.include}
        limits = most | limits
    spared = 1.0
    for name, limit in limits.items():
        number = sum(item.name == name for item in found)
        spared *= (limit - 1) / number if number >= limit else 1.0
    every = [value for values in parts.values() for value in values]
    graded = spared * math.fsum(every) / len(every)
    return {
        "strict": float(spared == 1 and all(value == 1 for value in every)),
        "graded": graded,
        **{name: math.fsum(values) / len(values) for name, values in parts.items()},
    }


def _placed(wanted: Wanted, these: Sequence[Detection], those: Sequence[Detection], spec: ObjectSpec) -> float:
    pairs = wanted.count * spec.include[wanted.other].count
    return sum(wanted.relation in relations(a, b) for a in these for b in those) / pairs


class ObjectsReward:
    """The graded (or strict) share of the objects in the row that a detector finds; parts as `judge_objects` has them.

    The metadata is the row itself, or its column `column`. Detections above `threshold` count, above
    `counting_threshold` where the tag is counting (None: `threshold`), at most `max_objects` a class, and of two of a
    class whose boxes overlap by more than `max_overlap` (intersection over union) the more confident one. A row without
    readable metadata is unavailable, as is one that asks for a colour where neither detector nor `colours` tell it.
    """

    def __init__(
        self,
        detector: Detector,
        *,
        colours: Colours | None = None,
        form: Form = "graded",
        exact: bool = False,
        column: str | None = None,
        threshold: float = 0.3,
        counting_threshold: float | None = None,
        max_objects: int = 16,
        max_overlap: float = 1.0,
        name: str = "objects",
    ) -> None:
        if form not in (known := get_args(Form)):
            raise ValueError(f"objects has no form {form!r}. {nearest(form, known)}")
        counting = threshold if counting_threshold is None else counting_threshold
        if not (0 <= threshold < 1 and 0 <= counting < 1 and max_objects >= 1 and 0 < max_overlap <= 1):
            raise ValueError(
                "objects needs thresholds in [0, 1), max_objects >= 1 and max_overlap in (0, 1], got "
                f"{threshold}, {counting}, {max_objects} and {max_overlap}"
            )
        self.name, self.detector, self.colours = name, detector, colours
        self.form: Form = form
        self.exact, self.column = exact, column
        self.threshold, self.counting_threshold = threshold, counting
        self.max_objects, self.max_overlap = max_objects, max_overlap

    def fingerprint(self) -> str:
        """The detector's and the colour namer's identity, and the settings."""
        colours = self.colours.fingerprint() if self.colours else None
        return (
            f"objects/1 [{self.detector.fingerprint()}] [{colours}] {self.form} exact={self.exact} "
            f"column={self.column} {self.threshold} {self.counting_threshold} {self.max_objects} {self.max_overlap} "
            f"{MARGIN}"
        )

    def score(self, samples: Sequence[Sample]) -> list[Score]:
        """One Score a sample, in order."""
        scores: dict[int, Score] = {}
        ready: dict[int, tuple[ObjectSpec, Image.Image]] = {}
        for row, sample in enumerate(samples):
            taken = self._take(sample)
            if isinstance(taken, Score):
                scores[row] = taken
            else:
                ready[row] = taken
        found = self._detect(list(ready.values()))
        scores |= {row: self._score(*ready[row], each) for row, each in zip(ready, found, strict=True)}
        return [scores[row] for row in range(len(samples))]

    def gold(self) -> Sequence[GoldPair]:
        """The detector's own pairs, whose rows are metadata."""
        if self.column is None:
            return self.detector.gold()
        column = self.column
        moved = [[replace(one, row={column: one.row}) for one in (p.good, p.bad)] for p in self.detector.gold()]
        return [GoldPair(good, bad, p.what) for (good, bad), p in zip(moved, self.detector.gold(), strict=True)]

    def _take(self, sample: Sample) -> tuple[ObjectSpec, Image.Image] | Score:
        try:
            spec = read_spec(sample.row if self.column is None else sample.row.get(self.column))
        except ValueError as error:
            return Score.unavailable(str(error))
        try:
            images = load_all(sample)
        except CorruptImage as error:
            return Score.invalid_output(str(error))
        if len(images) != 1:
            return Score.unavailable(f"objects are looked for in one image, and the sample has {len(images)}")
        return spec, images[0]

    def _detect(self, ready: Sequence[tuple[ObjectSpec, Image.Image]]) -> list[list[Detection] | Score]:
        """Each image's detections. A detector that does not know a name is asked about the others without it."""
        images, names = [image for _, image in ready], [spec.names for spec, _ in ready]
        try:
            return [*self.detector.detect(images, names)]
        except ValueError as error:
            if len(ready) == 1:
                return [Score.unavailable(str(error))]
            return [found for one in ready for found in self._detect([one])]

    def _score(self, spec: ObjectSpec, image: Image.Image, found: list[Detection] | Score) -> Score:
        if isinstance(found, Score):
            return found
        kept = self._kept(found, self.counting_threshold if spec.counting else self.threshold)
        if any(item.color for item in spec.include) and self.colours is not None:
            named = self.colours.name_colours(image, kept) if kept else []
            kept = [replace(one, color=color) for one, color in zip(kept, named, strict=True)]
        elif self.colours is None and (asked := self._untold(spec)):
            return Score.unavailable(f"a colour of {asked[0]} is asked for; set the option `colours` to a CLIP model")
        parts = judge_objects(kept, spec, exact=self.exact)
        score = Score.ok(parts[self.form], **parts)
        return replace(score, reason="found " + (", ".join(map(_told, kept)) or "nothing"))

    def _untold(self, spec: ObjectSpec) -> list[str]:
        """Classes of which a colour is asked for that nobody tells."""
        return [item.name for item in spec.include if item.color and not self.detector.tells_colours]

    def _kept(self, found: Sequence[Detection], threshold: float) -> list[Detection]:
        """Above the threshold, the most confident first, without the less confident of two that overlap too much."""
        kept: list[Detection] = []
        for one in sorted(found, key=lambda item: -item.confidence):
            same = [other for other in kept if other.name == one.name]
            overlaps = self.max_overlap < 1 and any(overlap(one.box, other.box) > self.max_overlap for other in same)
            if one.confidence > threshold and len(same) < self.max_objects and not overlaps:
                kept.append(one)
        return kept


def overlap(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two boxes, 0 for boxes without area."""
    wide, high = (min(a[axis + 2], b[axis + 2]) - max(a[axis], b[axis]) for axis in (0, 1))
    both = max(wide, 0) * max(high, 0)
    either = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)) - both
    return both / either if either else 0.0


def _told(one: Detection) -> str:
    return f"{one.color + ' ' if one.color else ''}{one.name} {one.confidence:.2f}"
