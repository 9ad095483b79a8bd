"""Generated scenes: the exact verifier agrees, splits are disjoint, items are pure functions of their
number."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rewards.base import Sample
from rewards.scenes import ScenesReward
from rewards.scenes_detect import detect
from rewards.scenes_spec import EDITS, SceneSpec
from rlmm.config.data import ScenesData, Split
from rlmm.data import build_dataset
from rlmm.data.base import Example
from rlmm.data.scenes import render

VARIANTS = ("text_to_image", "edit")


def scenes(**settings: Any) -> ScenesData:
    return ScenesData(**settings)


def strict(item: Example, image: Image.Image | None = None) -> float:
    """The verifier's strict part for an image, by default the item's own target."""
    assert item.target is not None
    sample = Sample("s", "g", item.prompt, (image or item.target,), source_images=item.sources, row=item.row)
    (score,) = ScenesReward().score([sample])
    assert score.status == "ok", score.reason
    return score.parts["strict"] * (score.value == 1)


def digest(item: Example) -> tuple:
    images = [image.tobytes() for image in (item.target, *item.sources) if image is not None]
    return item.prompt, images, repr(item.row)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("placement", ["free", "fixed"])
def test_clean_pictures_pass_the_exact_verifier(variant: str, placement: str) -> None:
    config = scenes(variant=variant, placement=placement, max_count=4, train_images=250)
    assert all(strict(item) == 1 for item in build_dataset(config, "train", 1))


@pytest.mark.parametrize("variant", VARIANTS)
def test_other_pictures_do_not(variant: str) -> None:
    items = list(build_dataset(scenes(variant=variant, train_images=100), "train", 1))
    others = [strict(item, wrong.target) for item, wrong in zip(items, items[1:], strict=False)]
    assert sum(others) <= 2
    if variant == "edit":
        assert not any(strict(item, item.sources[0]) for item in items), "a copy of the source"


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_held_out_is_never_together_in_training(variant: str) -> None:
    config = scenes(variant=variant, shapes=("circle", "square"), train_images=800, held_out=100)

    def sets(split: Split, seed: int) -> set[frozenset]:
        found: set[frozenset] = set()
        for item in build_dataset(config, split, seed):
            image = item.sources[0] if item.sources else None
            spec = SceneSpec.from_dict(item.row["scene"])
            found.add(frozenset(_cells(image).items()) if image else frozenset(spec.objects))
        return found

    held_out = sets("held_out", 0)
    assert len(held_out) > 20
    assert not held_out & sets("train", 7)
    assert not held_out & sets("prompts", 7)


def _cells(image: Image.Image) -> Counter:
    """(shape, color) counts of an image, by the verifier's eyes."""
    return Counter((found.shape, found.color) for found in detect(image))


def test_held_out_prompts_are_distinct_and_of_every_task() -> None:
    items = list(build_dataset(ScenesData(), "held_out", 0))
    assert len({item.prompt for item in items}) == len(items) == 256
    assert set(Counter(item.row["task"] for item in items)) == {"count", "pair", "relation"}


@pytest.mark.parametrize("variant", VARIANTS)
def test_tasks_have_equal_shares_of_train(variant: str) -> None:
    shares = Counter(item.row["task"] for item in build_dataset(scenes(variant=variant, train_images=90), "prompts", 0))
    assert max(shares.values()) - min(shares.values()) <= 1
    assert set(shares) == (set(EDITS) if variant == "edit" else {"count", "pair", "relation"})


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("split", ["train", "prompts", "held_out"])
def test_an_item_is_the_same_in_any_order(variant: str, split: Split) -> None:
    config = scenes(variant=variant, train_images=60, held_out=60)
    forward = [digest(item) for item in build_dataset(config, split, 3)]
    data = build_dataset(config, split, 3)
    assert [digest(data[index]) for index in reversed(range(60))] == forward[::-1]
    other = [digest(item) for item in build_dataset(config, split, 4)]
    assert (other == forward) == (split == "held_out")


def test_prompts_have_sources_and_no_targets() -> None:
    item = build_dataset(scenes(variant="edit"), "prompts", 0)[0]
    assert item.target is None and len(item.sources) == 1
    assert build_dataset(ScenesData(), "prompts", 0)[0].sources == ()


def test_fresh_pairs_are_pictures_of_the_prompts() -> None:
    config = scenes(train_images=40, prompts=55)
    prompts, fresh = build_dataset(config, "prompts", 3), build_dataset(config, "fresh", 3)
    assert [item.prompt for item in fresh] == [item.prompt for item in prompts] and len(fresh) == 55
    assert all(strict(item) == 1 for item in fresh)


def test_the_prompt_says_what_the_record_holds() -> None:
    words = {1: "a", 2: "two", 3: "three"}
    sides = {"left_of": " left of ", "right_of": " right of ", "above": " above ", "below": " below "}
    for item in build_dataset(ScenesData(train_images=300), "train", 2):
        scene = item.row["scene"]
        phrases = [f"{words[g['count']]} {g['color']} {g['shape']}{'s' * (g['count'] > 1)}" for g in scene["objects"]]
        link = sides[scene["relation"]["kind"]] if scene["relation"] else " and "
        assert item.prompt == link.join(phrases)


def test_instructions_read_well() -> None:
    config = ScenesData(variant="edit", colors=("red", "green", "blue", "yellow"), max_count=2, train_images=1000)
    prompts = {item.prompt for item in build_dataset(config, "train", 0)}
    assert {
        "make the red circles blue",
        "make the red circle blue",
        "turn the green squares into triangles",
        "turn the green square into a triangle",
        "remove the blue square",
        "add a yellow triangle",
    } <= prompts


def test_a_fixed_placement_gives_each_prompt_one_picture() -> None:
    looks: dict[str, set[bytes]] = {"free": set(), "fixed": set()}
    for placement, seen in looks.items():
        config = scenes(tasks=("count",), placement=placement, colors=("red", "blue"), train_images=200)
        for item in build_dataset(config, "train", 0):
            if item.prompt == "two red circles":
                seen.add(digest(item)[1][0])
    assert len(looks["fixed"]) == 1
    assert len(looks["free"]) > 5


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_smallest_world_still_gives_all_splits(variant: str) -> None:
    config = scenes(variant=variant, colors=("red",), max_count=1, train_images=30)
    splits: tuple[Split, ...] = ("train", "prompts", "held_out")
    for split in splits:
        assert len(build_dataset(config, split, 0)) >= 1


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_fullest_world_fits_the_grid(variant: str) -> None:
    config = scenes(variant=variant, max_count=4, train_images=400)
    for item in build_dataset(config, "train", 0):
        assert SceneSpec.from_dict(item.row["scene"]).total <= 9


def test_shapes_keep_a_margin_to_their_cell() -> None:
    for shape in ("circle", "square", "triangle"):
        pixels = np.asarray(render({(1, 2): (shape, "blue")}))
        ys, xs = np.nonzero((pixels != 255).any(axis=-1))
        assert (ys.min() >= 13, ys.max() <= 22, xs.min() >= 25, xs.max() <= 34) == (True,) * 4


def test_too_small_a_world_is_refused() -> None:
    with pytest.raises(ValueError, match="too few"):
        ScenesData(colors=("red",), shapes=("circle", "square"))
    with pytest.raises(ValueError, match="colors must list at least one value, each once"):
        ScenesData(colors=("red", "red", "blue"))


def test_rl_may_see_more_prompts_than_there_are_pictures() -> None:
    config = scenes(train_images=20, prompts=300)
    assert len(build_dataset(config, "train", 0)) == 20
    assert len({item.prompt for item in build_dataset(config, "prompts", 0)}) > 200
    assert len(build_dataset(scenes(train_images=20), "prompts", 0)) == 20
