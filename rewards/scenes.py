"""The exact verifier of generated scenes, for text-to-image and for edits. What it verifies:
rewards.scenes_spec.
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image
from scipy.optimize import linear_sum_assignment

from rewards import scenes_detect
from rewards.base import Sample, Score
from rewards.gold import GoldPair
from rewards.gold_images import scene_image
from rewards.images import CorruptImage, load_all, load_rgb
from rewards.scenes_detect import Found, detect
from rewards.scenes_spec import SIZE, Edit, SceneSpec

WRONG = 0.25
"""What a wrong colour, shape or relation multiplies the value by; more than 0, so that partly right beats
wrong.
"""

Cells = dict[tuple[int, int], tuple[str | None, str | None]]
"""What stands in each occupied cell: (shape, color)."""


def _holds(kind: str, a: Found, b: Found) -> bool:
    """By cells, not centres: the centre of a triangle lies lower in its cell than that of a disc."""
    (row_a, column_a), (row_b, column_b) = a.cell, b.cell
    match kind:
        case "left_of":
            return column_a < column_b
        case "right_of":
            return column_a > column_b
        case "above":
            return row_a < row_b
        case _:
            return row_a > row_b


def relation_share(found: Sequence[Found], spec: SceneSpec) -> float:
    """Share of the (a, b) pairs for which the relation holds; 0 where a or b is not there, 1 without a
    relation.
    """
    relation = spec.relation
    if relation is None:
        return 1.0
    groups = [spec.objects[index] for index in (relation.a, relation.b)]
    these, those = [
        [item for item in found if (item.shape, item.color) == (group.shape, group.color)] for group in groups
    ]
    pairs = [_holds(relation.kind, a, b) for a in these for b in those]
    return sum(pairs) / len(pairs) if pairs else 0.0


def object_parts(found: Sequence[Found], spec: SceneSpec) -> dict[str, float]:
    """count, color and shape of the found objects against the wanted ones, each in [0, 1].

    With n found and m wanted objects: count = min(n, m) / max(n, m), so extra objects cost as much as missing
    ones and a blank image has 0; a thing with neither shape nor colour of ours counts as extra only. Found
    and wanted objects are paired so that as many attributes as possible agree; color and shape are the shares
    of the min(n, m) pairs that agree (0 where nothing is found).
    """
    wanted = [group for group in spec.objects for _ in range(group.count)]
    known = [item for item in found if item.shape or item.color]
    if not known:
        return {"count": 0.0, "color": 0.0, "shape": 0.0}
    color = np.array([[item.color == want.color for want in wanted] for item in known], dtype=float)
    shape = np.array([[item.shape == want.shape for want in wanted] for item in known], dtype=float)
    pairs = linear_sum_assignment(color + shape, maximize=True)
    return {
        "count": min(len(known), len(wanted)) / max(len(found), len(wanted)),
        "color": float(color[pairs].mean()),
        "shape": float(shape[pairs].mean()),
    }


def apply_edit(cells: Cells, edit: Edit) -> tuple[Cells, set[tuple[int, int]]]:
    """The cells after an edit, and the cells it touches (for ``add``: none, the place is the policy's
    choice).
    """
    hit = {cell for cell, what in cells.items() if what == (edit.shape, edit.color)}
    match edit.kind:
        case "recolor":
            changed = {cell: (edit.shape, edit.to) for cell in hit}
        case "reshape":
            changed = {cell: (edit.to, edit.color) for cell in hit}
        case "remove":
            return {cell: what for cell, what in cells.items() if cell not in hit}, hit
        case _:
            return dict(cells), set()
    return {**cells, **changed}, hit


def edit_parts(found: Sequence[Found], source: Cells, edit: Edit) -> dict[str, float]:
    """edit, preserved and no_extra of an edited image, each in [0, 1].

    edit: share of the touched cells that are as wanted (for ``add``: 1 if a right object stands in a formerly
    empty cell), so a copy of the source has 0. preserved: share of the untouched objects still in their
    cells. no_extra: 1 / (1 + k) for k objects where there should be none, a second object in one cell
    included.
    """
    expected, touched = apply_edit(source, edit)
    by_cell: Cells = {}
    extra = 0
    for item in found:
        extra += item.cell in by_cell
        by_cell.setdefault(item.cell, (item.shape, item.color))
    new = [cell for cell in by_cell if cell not in expected and cell not in touched]
    if edit.kind == "add":
        right = any(by_cell[cell] == (edit.shape, edit.color) for cell in new)
        done, extra = float(right), extra + len(new) - right
    else:
        done = sum(by_cell.get(cell) == expected.get(cell) for cell in touched) / len(touched)
        extra += len(new)
    kept = [by_cell.get(cell) == what for cell, what in source.items() if cell not in touched]
    return {"edit": done, "preserved": sum(kept) / len(kept) if kept else 1.0, "no_extra": 1 / (1 + extra)}


def _source_cells(sample: Sample, spec: SceneSpec, edit: Edit) -> Cells:
    """The source image's cells. ValueError where source, edit and wanted objects do not fit together."""
    if len(sample.source_images) != 1:
        raise ValueError(f"an edited scene needs one source image, got {len(sample.source_images)}")
    found = detect(_scene_sized(load_rgb(sample.source_images[0])))
    cells: Cells = {item.cell: (item.shape, item.color) for item in found}
    expected, touched = apply_edit(cells, edit)
    if edit.kind != "add" and not touched:
        raise ValueError(f"the source image has no {edit.color} {edit.shape} to {edit.kind}")
    counts = Counter(expected.values())
    if edit.kind == "add":
        counts[edit.shape, edit.color] += 1
    wanted = {(group.shape, group.color): group.count for group in spec.objects}
    if len(cells) != len(found) or counts != wanted:
        raise ValueError(f"the source image and its edit give {dict(counts)}, the row's objects say {wanted}")
    return cells


def _scene_sized(image: Image.Image) -> Image.Image:
    if image.size != (SIZE, SIZE):
        raise ValueError(f"a scene image is {SIZE}x{SIZE} pixels, got {image.width}x{image.height}")
    return image


_Drawn = dict[tuple[int, int], tuple[str, str]]


def _gold(scene: dict[str, Any], cells: _Drawn, source: _Drawn | None = None) -> Sample:
    sources = () if source is None else (scene_image(source),)
    return Sample("gold", "gold", "", (scene_image(cells),), source_images=sources, row={"scene": scene})


class ScenesReward:
    """How much of the scene in `row["scene"]` the image shows, exactly.

    Without an edit, value = count * s(color) * s(shape) * s(relation), with s(p) = 0.25 + 0.75 p (parts:
    `object_parts`, `relation_share`). With one, value = edit * preserved * no_extra * s(relation)
    (`edit_parts`). All products, so neither a blank image nor a copy of the source earns anything. Part
    `strict` is 1 where all is right. A row without a readable scene, an image of another size, or a source
    image that does not fit the row is unavailable; an image that does not decode is invalid output.
    """

    name = "scenes"

    def fingerprint(self) -> str:
        """Version of the formula and the detector's constants."""
        return f"scenes/1 {WRONG} {scenes_detect.fingerprint()}"

    def score(self, samples: Sequence[Sample]) -> list[Score]:
        """One Score a sample, in order."""
        return [self._score(sample) for sample in samples]

    def gold(self) -> Sequence[GoldPair]:
        """A right scene against colours swapped and a blank image; a right edit against a copy of its
        source.
        """
        red, blue = ("circle", "red"), ("square", "blue")
        row = {
            "objects": [
                {"shape": "circle", "color": "red", "count": 2},
                {"shape": "square", "color": "blue"},
            ],
            "relation": {"kind": "above", "a": 0, "b": 1},
        }
        edit = {
            "objects": [{"shape": "circle", "color": "green"}, {"shape": "square", "color": "blue"}],
            "edit": {"kind": "recolor", "shape": "circle", "color": "red", "to": "green"},
        }
        right = _gold(row, {(0, 0): red, (1, 2): red, (3, 1): blue})
        swapped = _gold(row, {(0, 0): ("circle", "blue"), (1, 2): ("circle", "blue"), (3, 1): ("square", "red")})
        source = {(0, 0): red, (2, 3): blue}
        edited = _gold(edit, {(0, 0): ("circle", "green"), (2, 3): blue}, source)
        return [
            GoldPair(right, swapped, "a scene against its colours swapped"),
            GoldPair(right, _gold(row, {}), "a scene against a blank image"),
            GoldPair(edited, _gold(edit, source, source), "an edit against a copy of its source"),
        ]

    def _score(self, sample: Sample) -> Score:
        if sample.row.get("scene") is None:
            columns = ", ".join(sample.row) or "none"
            return Score.unavailable(f"the row has no 'scene' column (it has: {columns})")
        try:
            spec = SceneSpec.from_dict(sample.row["scene"])
            source = None if spec.edit is None else _source_cells(sample, spec, spec.edit)
        except ValueError as error:
            return Score.unavailable(str(error))
        try:
            images = load_all(sample)
        except CorruptImage as error:
            return Score.invalid_output(str(error))
        if len(images) != 1:
            return Score.unavailable(f"a scene is one image, the sample has {len(images)}")
        try:
            found = detect(_scene_sized(images[0]))
        except ValueError as error:
            return Score.unavailable(str(error))
        return score_scene(found, spec, source)


def score_scene(found: Sequence[Found], spec: SceneSpec, source: Cells | None) -> Score:
    """The score of the found objects; `source` is the source image's cells where the scene has an edit."""
    if spec.edit is not None and source is not None:
        parts = edit_parts(found, source, spec.edit)
        hard = math.prod(parts.values())
        parts["relation"] = relation_share(found, spec)
    else:
        parts = object_parts(found, spec) | {"relation": relation_share(found, spec)}
        hard = parts["count"] * _soft(parts["color"]) * _soft(parts["shape"])
    value = hard * _soft(parts["relation"])
    return Score.ok(value, **parts, strict=float(all(part == 1 for part in parts.values())))


def _soft(part: float) -> float:
    return WRONG + (1 - WRONG) * part
