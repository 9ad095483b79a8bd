"""The cheap looks at pictures: what is blank, an edge, a colour, a duplicate; and as rewards."""

import math
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from rewards import build
from rewards.base import Sample, SeesGroups
from rewards.gold import HasGold, gold_check_pairs
from rewards.gold_images import scene_image, word_image
from rewards.guards import (
    Print,
    alike_across,
    colour_entropy,
    edge_density,
    fingerprint,
    is_blank,
    jpeg_bits,
    near_duplicates,
    repeats_within,
    rgb,
)
from rewards.runner import RewardRunner
from rlmm.data.words import render

GUARDS = ("not_blank", "edge_density", "colour_entropy", "jpeg_size")
SCENE = {(0, 0): ("circle", "red"), (2, 1): ("square", "blue")}


def noisy(image: Image.Image, levels: float, seed: int = 0) -> Image.Image:
    """The picture with Gaussian noise of so many levels."""
    pixels = rgb(image) + np.random.default_rng(seed).normal(0, levels, rgb(image).shape)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def alike(*images: Image.Image) -> np.ndarray:
    return near_duplicates([fingerprint(image) for image in images])


@pytest.mark.parametrize("color", ["white", "black", "red", (120, 130, 140)])
def test_one_colour_is_blank_also_with_a_little_noise(color: str | tuple[int, int, int]) -> None:
    image = Image.new("RGB", (48, 48), color)
    assert is_blank(rgb(image)) and is_blank(rgb(noisy(image, 3)))


@pytest.mark.parametrize("image", [word_image("I"), render("A"), scene_image({(1, 1): ("triangle", "yellow")})])
def test_the_barest_drawing_is_not_blank(image: Image.Image) -> None:
    assert not is_blank(rgb(image))


def test_noise_and_two_halves_are_not_blank() -> None:
    halves = Image.new("RGB", (48, 48), "white")
    halves.paste("black", (0, 0, 24, 48))
    assert not is_blank(rgb(halves))
    assert not is_blank(rgb(noisy(Image.new("RGB", (48, 48), (128, 128, 128)), 40)))


def test_edge_density_of_stripes_by_hand() -> None:
    stripes = np.zeros((8, 10, 3), np.uint8)
    stripes[:, 5:] = 255  # one vertical edge: 7 of the 7 x 9 places that have a neighbour to the right and below
    assert edge_density(stripes) == pytest.approx(1 / 9)
    assert edge_density(stripes.transpose(1, 0, 2)) == pytest.approx(1 / 9)
    assert edge_density(255 - stripes) == edge_density(255 - stripes.transpose(1, 0, 2)) == pytest.approx(1 / 9)
    assert edge_density(np.where(stripes > 0, 100, 80).astype(np.uint8)) == 0.0  # a step of 0.08
    assert edge_density(np.zeros((1, 5, 3), np.uint8)) == 0.0


def test_colour_entropy_of_known_shares() -> None:
    pixels = np.zeros((4, 4, 3), np.uint8)
    assert colour_entropy(pixels) == 0.0
    pixels[:2, :2], pixels[:2, 2:], pixels[2:, :2] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    assert colour_entropy(pixels) == pytest.approx(2.0)
    pixels[2:, 2:] = (255, 0, 0)
    assert colour_entropy(pixels) == pytest.approx(0.5 * 1 + 2 * 0.25 * 2)
    every = np.stack(np.meshgrid(*[np.arange(0, 256, 32)] * 3), -1).reshape(16, 32, 3).astype(np.uint8)
    assert colour_entropy(every) == pytest.approx(9.0)
    shades = np.array([[[0, 0, 0], [31, 31, 31]]], np.uint8)
    assert colour_entropy(shades) == 0.0 and colour_entropy(shades + np.uint8(1)) == pytest.approx(1.0)


def test_near_duplicates_forgive_noise_and_see_drawings_apart() -> None:
    word = render("RIVER")
    found = alike(word, noisy(word, 6), render("RIDER"), render("RIVER", "bold"), render("STONE"))
    assert found[0, 1] and found[1, 0] and found.diagonal().all()
    assert not found[0, 2:].any() and not found[1, 2:].any()
    assert alike(word, noisy(word, 16))[0, 1] and not alike(word, noisy(word, 60))[0, 1]


@pytest.mark.parametrize(("step", "same"), [(77, True), (100, False)])
def test_near_duplicates_differ_by_little_of_the_variance_of_both(step: float, same: bool) -> None:
    """Variances 195075 and about 180000, so that 7691 or so of squared difference are forgiven: 77^2 and not 100^2."""
    halves_K = np.repeat([0.0, 0.0, 255.0, 255.0], 3)
    changed_K = halves_K + np.eye(12)[0] * step
    found = near_duplicates([Print("a", halves_K), Print("b", changed_K)])
    assert found.tolist() == [[True, same], [same, True]]


def test_blank_pictures_are_alike_despite_noise() -> None:
    grey = Image.new("RGB", (48, 48), (128, 128, 128))
    assert alike(noisy(grey, 3), noisy(grey, 3, seed=1)).all()


def test_near_duplicates_see_colour_place_and_ground() -> None:
    other = scene_image({(0, 0): ("circle", "green"), (2, 1): ("square", "blue")})
    moved = scene_image({(0, 1): ("circle", "red"), (2, 1): ("square", "blue")})
    found = alike(scene_image(SCENE), other, moved, Image.new("RGB", (48, 48), "white"), Image.new("RGB", (48, 48)))
    assert found.sum() == len(found)  # each with itself alone


def test_equal_pixels_have_equal_exact_hashes_whatever_the_mode() -> None:
    word = render("LEMON")
    assert fingerprint(word).exact == fingerprint(word.convert("RGB")).exact
    assert fingerprint(word).exact != fingerprint(noisy(word, 6)).exact
    wide, tall = Image.new("RGB", (8, 2)), Image.new("RGB", (2, 8))
    assert fingerprint(wide).exact != fingerprint(tall).exact


def test_duplicate_shares_by_hand() -> None:
    same = np.eye(6, dtype=bool)
    for a, b in ((0, 1), (0, 4), (1, 4)):  # two of the first group are alike, and one of the second is their like
        same[a, b] = same[b, a] = True
    assert repeats_within(same, ["p", "p", "p", "q", "q", "r"]) == pytest.approx(1 / 3)
    assert alike_across(same, ["p", "p", "p", "q", "q", "r"]) == pytest.approx(2 / 11)
    assert repeats_within(same, range(6)) is None and alike_across(same, ["p"] * 6) is None
    everything = np.ones((4, 4), bool)
    assert repeats_within(everything, "ppqq") == 1.0 and alike_across(everything, "ppqq") == 1.0


@pytest.mark.parametrize("name", GUARDS)
def test_guards_are_rewards_that_bring_their_gold(name: str) -> None:
    reward = build(name)
    assert reward.name == name and isinstance(reward, HasGold)
    assert gold_check_pairs(reward, list(reward.gold())).passed
    assert len({build(each).fingerprint() for each in GUARDS}) == len(GUARDS)


def test_guard_scores_and_what_cannot_be_judged() -> None:
    buffer = BytesIO()
    word_image("TORN").save(buffer, "PNG")
    torn = Image.open(BytesIO(buffer.getvalue()[:120]))
    blank, drawn = word_image(""), word_image("WORD")
    samples = [Sample("a", "g", "", (drawn,)), Sample("b", "g", "", (drawn, blank)), Sample("c", "g", "", (torn,))]
    scores = build("not_blank").score([*samples, Sample("d", "g", "")])
    assert [score.value for score in scores] == [1.0, 0.5, None, None]
    assert [score.status for score in scores[2:]] == ["invalid_output", "invalid_output"]
    (density,) = build("edge_density").score(samples[:1])
    (entropy,) = build("colour_entropy").score(samples[:1])
    assert density.value == edge_density(rgb(drawn)) and entropy.value == colour_entropy(rgb(drawn))
    assert density.value and entropy.value and math.isfinite(density.value + entropy.value)


def test_jpeg_bits_grow_with_what_cannot_be_foretold() -> None:
    blank = Image.new("RGB", (256, 256), "white")
    smooth = Image.linear_gradient("L").convert("RGB")
    noise = noisy(blank.point(lambda level: level // 2), 60)
    bits = [jpeg_bits(rgb(image)) for image in (blank, smooth, noise)]
    assert bits[0] < 0.3 and bits[0] < bits[1] < 3 < 10 < bits[2] < 24
    file = BytesIO()
    noise.save(file, "JPEG", quality=95, subsampling=0)
    assert bits[2] == 8 * len(file.getvalue()) / 256**2


def test_distinct_counts_the_copies_of_each_in_its_own_group() -> None:
    word, other, scene = word_image("WORD"), word_image("LAMP"), scene_image(SCENE)
    rows = [("a", word), ("b", word), ("a", noisy(word, 4)), ("a", other), ("b", scene), ("a", word), ("c", word)]
    samples = [Sample(str(at), group, "p", (image,)) for at, (group, image) in enumerate(rows)]
    broken = Sample("x", "b", "p")
    reward = build("distinct")
    assert isinstance(reward, SeesGroups)
    scores = RewardRunner(reward, batch_size=1, cache=9).score([*samples, broken])
    # of group a three of four are one picture, so each of them is unlike one of three others
    assert [s.value for s in scores] == [
        pytest.approx(1 / 3),
        1,
        pytest.approx(1 / 3),
        1,
        1,
        pytest.approx(1 / 3),
        None,
        None,
    ]
    assert [s.status for s in scores[-2:]] == ["unavailable", "invalid_output"]


def test_how_far_apart_a_groups_pictures_are_tells_variations_from_pictures_of_their_own() -> None:
    word, white, black = word_image("WORD"), *(Image.new("RGB", (64, 64), colour) for colour in ("white", "black"))
    groups = {
        "copies": [word, word, word],
        "variations": [word, word_image("WORE"), word_image("LORD")],
        "pictures": [word, scene_image(SCENE).resize(word.size), word_image("II")],
        "flat": [white, white, black],
    }
    apart = {}
    for name, images in groups.items():
        samples = [Sample(str(at), name, "p", (image,)) for at, image in enumerate(images)]
        apart[name] = [score.parts["apart"] for score in build("distinct").score(samples)]
    assert apart["copies"] == [0, 0, 0] and apart["flat"] == [0.5, 0.5, 1]
    assert 0 < min(apart["variations"]) <= max(apart["variations"]) < min(apart["pictures"]) <= 1
