"""Finds the coloured shapes in a scene image: pixels -> palette colours -> connected components -> shape
templates.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image
from skimage.measure import label, regionprops

from rewards.scenes_spec import BACKGROUND, CELL, PALETTE, SHAPES

MIN_AREA = 8
"""Pixels; smaller components are specks of the image codec (the smallest shape has about 18)."""
MAX_EXTENT = CELL + 2
"""Pixels; a component wider or higher than this fills more than a cell, as a painted background does."""
MAX_COLOR_DISTANCE = 100.0
"""RGB distance of a component's mean colour from its palette colour beyond which the colour is none of
ours.
"""
MIN_IOU = 0.7
"""Overlap with the best template below which a component is none of our shapes."""
_SIDE = 24
_SETTINGS = (MIN_AREA, MAX_EXTENT, MAX_COLOR_DISTANCE, MIN_IOU, _SIDE)


@dataclass(frozen=True)
class Found:
    """One thing in an image; `shape` or `color` is None where it is not one of ours. Centre in pixels."""

    shape: str | None
    color: str | None
    y: float
    x: float
    box: tuple[int, int, int, int] | None = None
    """left, top, right, bottom."""

    @property
    def cell(self) -> tuple[int, int]:
        """Grid cell (row, column) of the centre."""
        return int(self.y // CELL), int(self.x // CELL)


def fingerprint() -> str:
    """The constants a detection depends on."""
    return f"{_SETTINGS} {BACKGROUND} {PALETTE}"


def _templates() -> np.ndarray:
    """Boolean masks [shapes, side, side] of a disc, a square and a triangle that fill their box."""
    centres = (np.arange(_SIDE) + 0.5) / _SIDE
    y, x = np.meshgrid(centres, centres, indexing="ij")
    masks = {
        "circle": (y - 0.5) ** 2 + (x - 0.5) ** 2 <= 0.25,
        "square": np.ones_like(y, dtype=bool),
        "triangle": np.abs(x - 0.5) <= y / 2,
    }
    return np.stack([masks[shape] for shape in SHAPES])


_TEMPLATES = _templates()
_COLORS = np.array(list(PALETTE.values()), dtype=np.float32)
_AXES = np.array(BACKGROUND, dtype=np.float32) - _COLORS
_LENGTHS = np.linalg.norm(_AXES, axis=1)


def _pixel_labels(rgb_HWC: np.ndarray) -> np.ndarray:
    """0 for background, 1 + palette index for the colour whose direction from the background is nearest.

    A blend of background and colour has the colour's direction, so a soft edge keeps its colour; it counts as
    foreground from half way on, which leaves the outline where it was.
    """
    offset = np.array(BACKGROUND, dtype=np.float32) - rgb_HWC
    along = offset @ (_AXES / _LENGTHS[:, None]).T
    nearest = along.argmax(axis=-1)
    solid = np.take_along_axis(along, nearest[..., None], axis=-1)[..., 0] >= 0.5 * _LENGTHS[nearest]
    return np.where(solid, nearest + 1, 0)


def _shape(mask: np.ndarray) -> str | None:
    """The shape whose template overlaps best with a component's mask, stretched to the template's square."""
    height, width = mask.shape
    if max(height, width) > 1.5 * min(height, width):
        return None
    rows = ((np.arange(_SIDE) + 0.5) * height / _SIDE).astype(int)
    columns = ((np.arange(_SIDE) + 0.5) * width / _SIDE).astype(int)
    stretched = mask[np.ix_(rows, columns)]
    both = (_TEMPLATES & stretched).sum(axis=(1, 2))
    either = (_TEMPLATES | stretched).sum(axis=(1, 2))
    overlap = both / either
    best = int(overlap.argmax())
    return SHAPES[best] if overlap[best] >= MIN_IOU else None


def detect(image: Image.Image) -> Sequence[Found]:
    """The objects of an RGB scene image, top to bottom. Anything large enough is reported, also what is not
    ours.
    """
    rgb_HWC = np.asarray(image, dtype=np.float32)
    labels = _pixel_labels(rgb_HWC)
    found: list[Found] = []
    for region in regionprops(label(labels, background=0, connectivity=1)):
        if region.num_pixels < MIN_AREA:
            continue
        ys, xs = region.coords.T
        top, left, bottom, right = region.bbox
        if max(bottom - top, right - left) > MAX_EXTENT:
            y, x = region.centroid
            found.append(Found(None, None, float(y), float(x), (left, top, right, bottom)))
            continue
        color = int(labels[ys[0], xs[0]]) - 1
        distance = float(np.linalg.norm(rgb_HWC[ys, xs].mean(axis=0) - _COLORS[color]))
        name = list(PALETTE)[color] if distance <= MAX_COLOR_DISTANCE else None
        y, x = region.centroid
        found.append(Found(_shape(region.image), name, float(y), float(x), (left, top, right, bottom)))
    return found
