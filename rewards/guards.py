"""Cheap looks at a picture that no prompt is needed for: is it blank, how many edges and colours has it, is it another
one over again. They say when a policy has stopped drawing; none of them says that it draws well.

Shapes: H, W pixels; N pictures; K numbers of a thumbnail.
"""

import hashlib
import io
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from rewards.base import Sample, Score
from rewards.gold import GoldPair
from rewards.gold_images import scene_image, word_image
from rewards.images import CorruptImage, load_all

BLANK_SHARE, BLANK_DISTANCE = 0.995, 16
"""A picture is blank where this share of its pixels lies within so many levels (of 255) of its median colour."""

EDGE_STEP = 0.1
"""Two neighbours whose lightness differs by more than this, of 0 to 1, are an edge."""

JPEG_QUALITY = 95

THUMBNAIL, NEAR_SHARE, FLOOR = 16, 0.02, 4
"""Side of the thumbnails that are compared; the share of their summed variance that the squared difference of
near-duplicates may have; and the difference, in levels, that is forgiven pictures without any variance."""


def rgb(image: Image.Image) -> np.ndarray:
    """uint8 [H, W, 3]. Raises as `Image.convert` does for a picture that does not decode."""
    return np.asarray(image.convert("RGB"))


def is_blank(pixels_HW3: np.ndarray) -> bool:
    """Whether (nearly) every pixel has one colour."""
    flat = pixels_HW3.reshape(-1, 3).astype(np.int16)
    near = np.abs(flat - np.median(flat, axis=0)).max(axis=1) <= BLANK_DISTANCE
    return float(near.mean()) >= BLANK_SHARE


def edge_density(pixels_HW3: np.ndarray) -> float:
    """Share of pixels whose lightness steps by more than `EDGE_STEP` to the right or below; 0 for one row or column."""
    lightness_HW = pixels_HW3.mean(axis=2) / 255
    across, down = np.abs(np.diff(lightness_HW, axis=1))[:-1], np.abs(np.diff(lightness_HW, axis=0))[:, :-1]
    return float((np.maximum(across, down) > EDGE_STEP).mean()) if across.size else 0.0


def colour_entropy(pixels_HW3: np.ndarray) -> float:
    """Entropy, in bits, of the colours in bins of 8 levels a channel: 0 for one colour, at most 9; grey at most 3."""
    levels = (pixels_HW3 >> 5).astype(np.int64)
    counts = np.bincount((levels[..., 0] * 64 + levels[..., 1] * 8 + levels[..., 2]).ravel())
    share = counts[counts > 0] / counts.sum()
    return float(abs(-(share * np.log2(share)).sum()))


def jpeg_bits(pixels_HW3: np.ndarray) -> float:
    """Bits a pixel of the picture as a JPEG at JPEG_QUALITY without chroma subsampling: what cannot be foretold in it.
    Near 0 for a large blank one; noise has 10 and more. A small picture's file is headers for the most part.
    """
    file = io.BytesIO()
    Image.fromarray(pixels_HW3).save(file, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return 8 * file.tell() / (pixels_HW3.shape[0] * pixels_HW3.shape[1])


@dataclass(frozen=True)
class Print:
    """What two pictures are compared by: a hash of their pixels, and a thumbnail, float64 [K], levels 0 to 255."""

    exact: str
    thumbnail_K: np.ndarray

    @property
    def variance(self) -> float:
        """Summed squared distance of the thumbnail's pixels from its mean colour."""
        small = self.thumbnail_K.reshape(-1, 3)
        return float(((small - small.mean(axis=0)) ** 2).sum())


def fingerprint(image: Image.Image) -> Print:
    """The print of a picture: equal `exact` means equal size and pixels."""
    picture = image.convert("RGB")
    small = picture.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
    exact = hashlib.sha256(f"{picture.size}".encode() + picture.tobytes()).hexdigest()
    return Print(exact, np.asarray(small, np.float64).ravel())


def near_duplicates(prints: Sequence[Print]) -> np.ndarray:
    """bool [N, N]: the pairs that look the same, |a - b|^2 <= NEAR_SHARE (var a + var b) on thumbnails.

    The ratio is 1 for unrelated pictures, about 0.1 for two words that share most letters and under 0.01 for noise of
    12 levels. Unlike an average hash it sees colours that are all darker than the ground, and unlike a plain distance
    it does not let a large empty ground make everything alike.
    """
    apart_NN, spread_NN = _apart(prints)
    return apart_NN <= NEAR_SHARE * spread_NN + len(prints[0].thumbnail_K) * FLOOR**2


def distances(prints: Sequence[Print]) -> np.ndarray:
    """float64 [N, N] in [0, 1]: that ratio, cut at 1; of two flat pictures 0 where they are alike, else 1."""
    apart_NN, spread_NN = _apart(prints)
    flat_NN = spread_NN == 0
    ratio_NN = apart_NN / np.where(flat_NN, 1.0, spread_NN)
    return np.where(flat_NN, ~near_duplicates(prints), ratio_NN.clip(0, 1))


def _apart(prints: Sequence[Print]) -> tuple[np.ndarray, np.ndarray]:
    """|a - b|^2 and var a + var b [N, N] of every pair of thumbnails."""
    small_NK = np.array([one.thumbnail_K for one in prints])
    variance_N = np.array([one.variance for one in prints])
    square_N = (small_NK**2).sum(axis=1)
    apart_NN = square_N[:, None] + square_N[None] - 2 * small_NK @ small_NK.T
    return apart_NN, variance_N[:, None] + variance_N[None]


def repeats_within(alike_NN: np.ndarray, group_N: Sequence[Hashable]) -> float | None:
    """Pictures alike to an earlier one of their group / those that could be (all but one a group): 1 is a collapse
    of every group. None where no group has two pictures.
    """
    same_NN = _same(group_N)
    before_NN = np.tri(len(group_N), k=-1, dtype=bool)
    could = int((same_NN & before_NN).any(axis=1).sum())
    return int((alike_NN & same_NN & before_NN).any(axis=1).sum()) / could if could else None


def alike_across(alike_NN: np.ndarray, prompt_N: Sequence[Hashable]) -> float | None:
    """Pairs of pictures of different prompts that are alike / all such pairs; its square root is about the share of
    pictures that are one and the same. None where there is one prompt.
    """
    other_NN = ~_same(prompt_N)
    return float((alike_NN & other_NN).sum() / other_NN.sum()) if other_NN.any() else None


def _same(names: Sequence[Hashable]) -> np.ndarray:
    _, number = np.unique([str(name) for name in names], return_inverse=True)
    return number[:, None] == number[None]


class GuardReward:
    """One look as a reward: its figure, averaged over the sample's images. An image that does not decode is invalid
    output. For use as a recipe's `gate`, or with a transform that clips it: alone it is soon gamed.
    """

    def __init__(self, name: str, figure: Callable[[np.ndarray], float], gold: tuple[Image.Image, Image.Image]) -> None:
        self.name = name
        self._figure, self._gold = figure, gold

    def fingerprint(self) -> str:
        """Name, version of the formulas, and their constants."""
        return f"guard {self.name}/1 {BLANK_SHARE} {BLANK_DISTANCE} {EDGE_STEP}"

    def score(self, samples: Sequence[Sample]) -> list[Score]:
        """One Score a sample, in order."""
        return [self._score(sample) for sample in samples]

    def gold(self) -> Sequence[GoldPair]:
        """A drawing against a blank picture."""
        good, bad = (Sample(f"gold {i}", "gold", "", (image,)) for i, image in enumerate(self._gold))
        return [GoldPair(good, bad, "a drawing against a blank picture")]

    def _score(self, sample: Sample) -> Score:
        try:
            images = load_all(sample)
        except CorruptImage as error:
            return Score.invalid_output(str(error))
        return Score.ok(float(np.mean([self._figure(rgb(image)) for image in images])))


def not_blank() -> GuardReward:
    """1 for a picture that shows something, 0 for a blank one."""
    return GuardReward("not_blank", lambda pixels: float(not is_blank(pixels)), (word_image("WORD"), word_image("")))


def edges() -> GuardReward:
    """The picture's edge density, 0 to 1."""
    return GuardReward("edge_density", edge_density, (word_image("WORD"), word_image("")))


def colours() -> GuardReward:
    """The picture's colour entropy in bits, 0 to 9."""
    drawn = scene_image({(0, 0): ("circle", "red"), (2, 1): ("square", "blue"), (3, 3): ("triangle", "green")})
    return GuardReward("colour_entropy", colour_entropy, (drawn, scene_image({})))


def jpeg_size() -> GuardReward:
    """The picture's size as a JPEG, bits a pixel."""
    return GuardReward("jpeg_size", jpeg_bits, (word_image("WORD"), word_image("")))
