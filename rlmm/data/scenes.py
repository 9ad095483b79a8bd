"""Generated scenes of counted, coloured shapes on a grid of cells, to draw from a text or to edit.

What a scene is, and the record in `row["scene"]`, is `rewards.scenes_spec`; cells of 12 pixels put every
shape on whole image tokens. Scenes are built, never drawn at random until they fit.
"""

from collections import Counter
from collections.abc import Sequence
from functools import cache
from itertools import zip_longest

import numpy as np
from PIL import Image

from rewards.scenes_spec import BACKGROUND, CELL, GRID, PALETTE, SIZE, Edit, ObjectGroup, Relation, SceneSpec
from rlmm.config.data import ScenesData, Split
from rlmm.data.base import Dataset, Example, Outline, position
from rlmm.data.scene_combinations import Combination, by_task
from rlmm.seeds import derive, generator

Cells = dict[tuple[int, int], tuple[str, str]]
"""(row, column) of each occupied cell -> (shape, color)."""

QUESTION = "what is shown?"
_FINE = 8  # samples a pixel side, for soft edges


@cache
def _coverage(shape: str) -> np.ndarray:
    """Share of each pixel of a cell that a shape covers, [12, 12] float; one pixel of margin or more all
    round."""
    at = (np.arange(CELL * _FINE) + 0.5) / _FINE - CELL / 2
    y, x = np.meshgrid(at, at, indexing="ij")
    radius = CELL / 2 - 1
    match shape:
        case "circle":
            inside = x**2 + y**2 <= radius**2
        case "square":  # smaller than the disc's box, or it would look larger than the disc
            inside = np.maximum(abs(x), abs(y)) <= radius - 1
        case _:
            inside = (abs(x) <= (y + radius) / 2) & (y <= radius)
    return inside.reshape(CELL, _FINE, CELL, _FINE).mean(axis=(1, 3))


def render(cells: Cells) -> Image.Image:
    """The scene as a 48x48 RGB image, edges softened."""
    pixels = np.empty((SIZE, SIZE, 3))
    pixels[:] = BACKGROUND
    for (row, column), (shape, color) in cells.items():
        alpha = _coverage(shape)[..., None]
        place = np.s_[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL]
        pixels[place] = alpha * PALETTE[color] + (1 - alpha) * pixels[place]
    return Image.fromarray(pixels.round().astype(np.uint8), "RGB")


def _zones(relation: str | None, cut: int, groups: int) -> list[list[tuple[int, int]]]:
    """Cells open to each group in reading order: those on its side of row or column `cut`, or all of them."""
    every = [(row, column) for row in range(GRID) for column in range(GRID)]
    if relation is None:
        return [every] * groups
    axis = 0 if relation in ("above", "below") else 1
    first = [cell for cell in every if cell[axis] < cut]
    last = [cell for cell in every if cell[axis] >= cut]
    return [first, last] if relation in ("above", "left_of") else [last, first]


def place(combination: Combination, draw: np.random.Generator | None) -> Cells:
    """Cells for the groups' objects, drawn freely, or in reading order without `draw`.

    A side of a cut keeps at least GRID cells, which is as many as a group may have objects.
    """
    cut = GRID // 2 if draw is None else int(draw.integers(1, GRID))
    cells: Cells = {}
    zones = _zones(combination.relation, cut, len(combination.groups))
    for group, zone in zip(combination.groups, zones, strict=True):
        free = [cell for cell in zone if cell not in cells]
        order = range(len(free)) if draw is None else draw.permutation(len(free)).tolist()
        cells |= dict.fromkeys([free[index] for index in order[: group.count]], (group.shape, group.color))
    return cells


def edited(cells: Cells, edit: Edit, draw: np.random.Generator | None) -> Cells:
    """The cells after an edit; an added object takes a free cell, the first one without `draw`."""
    named = (edit.shape, edit.color)
    match edit.kind:
        case "recolor":
            new = (edit.shape, str(edit.to))
        case "reshape":
            new = (str(edit.to), edit.color)
        case "remove":
            return {cell: what for cell, what in cells.items() if what != named}
        case _:
            free = [cell for cell in np.ndindex(GRID, GRID) if cell not in cells]
            return cells | {free[0 if draw is None else int(draw.integers(len(free)))]: named}
    return {cell: new if what == named else what for cell, what in cells.items()}


class Scenes(Dataset):
    """One split: a combination an item; cells are drawn from `seed` and the item's number, unless they are
    fixed."""

    def __init__(
        self, items: Sequence[Combination], seed: int, *, drawn: bool, fixed: bool, described: bool = False
    ) -> None:
        self.excluded = Counter()
        self._items, self._seed, self._drawn, self._fixed = items, seed, drawn, fixed
        self._described = described

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> Example:
        index = position(index, len(self))
        asked = self._items[index]
        draw = None if self._fixed else generator(self._seed, index)
        cells = source = place(asked, draw)
        if asked.edit is not None:
            cells = edited(source, asked.edit, draw)
        objects = tuple(ObjectGroup(*what, count) for what, count in Counter(cells.values()).items())
        relation = None if asked.relation is None else Relation(asked.relation, 0, 1)
        if self._described:
            row = {"scene": SceneSpec(objects, relation, None).to_dict(), "task": asked.task}
            return Example(QUESTION, sources=(render(cells),), texts=asked.descriptions, row=row)
        return Example(
            prompt=asked.prompt,
            target=render(cells) if self._drawn else None,
            sources=() if asked.edit is None else (render(source),),
            row={"scene": SceneSpec(objects, relation, asked.edit).to_dict(), "task": asked.task},
        )

    def outline(self, index: int) -> Outline:
        asked = self._items[position(index, len(self))]
        if self._described:
            return Outline(QUESTION, 1)
        return Outline(asked.prompt, 0 if asked.edit is None else 1)


def build(config: ScenesData, split: Split, seed: int) -> Scenes:
    """`train`: `train_images` scenes with pictures, tasks in turn. `prompts`: `prompts` requests, without
    pictures. `fresh`: the same requests with pictures. `held_out`: up to `held_out` combinations that none of them
    has, each once, with pictures, in every run alike.

    `row["scene"]` is the wanted scene, `row["task"]` the kind of request.
    """
    tasks = by_task(config, held_out=split == "held_out")
    fixed = config.placement == "fixed"
    run = 0 if split == "held_out" else seed
    order = "prompts" if split == "fresh" else split
    shuffled = [
        [combinations[index] for index in generator(run, "scenes", order, task).permutation(len(combinations))]
        for task, combinations in tasks.items()
    ]
    if split == "held_out":
        turns = zip_longest(*shuffled)
        items = [one for turn in turns for one in turn if one is not None][: config.held_out]
    else:
        items = []
        asked = config.train_images if order == "train" or config.prompts is None else config.prompts
        for number in range(asked):
            turn, task = divmod(number, len(shuffled))
            items.append(shuffled[task][turn % len(shuffled[task])])
    described, seeded = config.variant == "describe", derive(run, "scenes", split)
    return Scenes(items, seeded, drawn=split != "prompts", fixed=fixed, described=described)
