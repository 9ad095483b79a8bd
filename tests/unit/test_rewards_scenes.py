"""The exact scene verifier on drawings of its own specification."""

import itertools
import random
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rewards.base import Sample, Score
from rewards.gold import gold_check_pairs
from rewards.gold_images import scene_image
from rewards.scenes import ScenesReward
from rewards.scenes_detect import detect
from rewards.scenes_spec import GRID, PALETTE, SHAPES, Edit, ObjectGroup, Relation, SceneSpec

RED, BLUE = ("circle", "red"), ("square", "blue")
TWO_OVER_ONE = {
    "objects": [{"shape": "circle", "color": "red", "count": 2}, {"shape": "square", "color": "blue"}],
    "relation": {"kind": "above", "a": 0, "b": 1},
}
RIGHT = {(0, 0): RED, (1, 3): RED, (3, 1): BLUE}
CELLS = list(itertools.product(range(GRID), range(GRID)))
Drawn = dict[tuple[int, int], tuple[str, str]]


def verdict(scene: Any, image: Drawn | Image.Image, source: Drawn | None = None) -> Score:
    picture = image if isinstance(image, Image.Image) else scene_image(image)
    sources = () if source is None else (scene_image(source),)
    row = {} if scene is None else {"scene": scene}
    return ScenesReward().score([Sample("s", "g", "", (picture,), source_images=sources, row=row)])[0]


def random_scene(seed: int) -> Drawn:
    draw = random.Random(seed)
    cells = draw.sample(CELLS, draw.randint(1, 9))
    return {cell: (draw.choice(SHAPES), draw.choice(list(PALETTE))) for cell in cells}


def spec_of(cells: Drawn) -> dict[str, Any]:
    kinds = sorted(set(cells.values()))
    groups = tuple(ObjectGroup(*kind, sum(what == kind for what in cells.values())) for kind in kinds)
    return SceneSpec(groups).to_dict()


@pytest.mark.parametrize("damage", ["none", "blur", "noise"])
def test_what_was_drawn_is_what_is_found(damage: str) -> None:
    for seed in range(40):
        cells = random_scene(seed)
        image = scene_image(cells)
        if damage == "blur":
            image = image.resize((36, 36), Image.Resampling.BILINEAR).resize((48, 48), Image.Resampling.BICUBIC)
        if damage == "noise":
            noise = np.random.default_rng(seed).normal(0, 12, (48, 48, 3))
            image = Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8))
        found = detect(image)
        assert {item.cell: (item.shape, item.color) for item in found} == cells
        assert len(found) == len(cells)


def test_right_scenes_score_1_and_shuffled_prompts_score_low() -> None:
    scenes = [random_scene(seed) for seed in range(60)]
    right = [verdict(spec_of(cells), cells) for cells in scenes]
    assert {score.value for score in right} == {1.0} and {score.parts["strict"] for score in right} == {1.0}
    pairs = zip(scenes, scenes[1:] + scenes[:1], strict=True)
    shuffled = [verdict(spec_of(asked), drawn) for asked, drawn in pairs]
    assert np.mean([score.parts["strict"] for score in shuffled]) < 0.05
    assert np.mean([score.value or 0 for score in shuffled]) < 0.3


@pytest.mark.parametrize("scene", [TWO_OVER_ONE, {"objects": [{"shape": "circle", "color": "red"}]}])
@pytest.mark.parametrize("color", ["white", "black", "gray", "red", "blue"])
def test_a_blank_image_earns_nothing(scene: dict[str, Any], color: str) -> None:
    score = verdict(scene, Image.new("RGB", (48, 48), color))
    assert (score.status, score.value, score.parts["strict"]) == ("ok", 0, 0)


@pytest.mark.parametrize(
    ("change", "part", "value"),
    [
        ({(2, 2): RED}, "count", 0.75),
        ({(0, 0): None}, "count", 2 / 3),
        ({(3, 1): ("square", "green")}, "color", 2 / 3),
        ({(3, 1): ("triangle", "blue")}, "shape", 2 / 3),
        ({(3, 1): None, (0, 1): BLUE}, "relation", 0.0),
        ({(3, 1): None, (1, 1): BLUE}, "relation", 0.5),
    ],
)
def test_each_fault_lowers_its_own_part_and_the_value(change: dict[Any, Any], part: str, value: float) -> None:
    cells = {cell: what for cell, what in {**RIGHT, **change}.items() if what is not None}
    score = verdict(TWO_OVER_ONE, cells)
    assert score.parts[part] == pytest.approx(value)
    assert 0 < (score.value or 0) < 1 and score.parts["strict"] == 0


def test_swapped_colours_are_not_right() -> None:
    scene = {"objects": [{"shape": "circle", "color": "red"}, {"shape": "square", "color": "blue"}]}
    score = verdict(scene, {(0, 0): ("circle", "blue"), (2, 2): ("square", "red")})
    assert score.parts["count"] == 1 and score.parts["color"] + score.parts["shape"] == 1
    assert score.value == pytest.approx(0.25)


def test_filling_the_grid_does_not_pay() -> None:
    everything = {cell: RED if cell[0] < 2 else BLUE for cell in CELLS}
    assert (verdict(TWO_OVER_ONE, everything).value or 0) < 0.2


@pytest.mark.parametrize(
    ("kind", "a", "b"),
    [
        ("above", (0, 2), (1, 2)),
        ("below", (3, 0), (1, 3)),
        ("left_of", (2, 0), (2, 1)),
        ("right_of", (0, 3), (3, 2)),
    ],
)
def test_relations(kind: str, a: tuple[int, int], b: tuple[int, int]) -> None:
    objects = [{"shape": "circle", "color": "red"}, {"shape": "triangle", "color": "blue"}]
    scene = {"objects": objects, "relation": {"kind": kind, "a": 0, "b": 1}}
    assert verdict(scene, {a: RED, b: ("triangle", "blue")}).value == 1
    assert verdict(scene, {b: RED, a: ("triangle", "blue")}).parts["relation"] == 0


def test_side_by_side_is_neither_above_nor_below() -> None:
    objects = [{"shape": "circle", "color": "red"}, {"shape": "triangle", "color": "blue"}]
    for kind in ("above", "below"):
        scene = {"objects": objects, "relation": {"kind": kind, "a": 0, "b": 1}}
        assert verdict(scene, {(1, 0): RED, (1, 2): ("triangle", "blue")}).parts["relation"] == 0


SOURCE: Drawn = {(0, 0): RED, (0, 2): RED, (2, 3): BLUE}
EDITS: dict[str, tuple[dict[str, Any], Drawn]] = {
    "recolor": (
        {"kind": "recolor", "shape": "circle", "color": "red", "to": "green"},
        {(0, 0): ("circle", "green"), (0, 2): ("circle", "green"), (2, 3): BLUE},
    ),
    "reshape": (
        {"kind": "reshape", "shape": "square", "color": "blue", "to": "triangle"},
        {(0, 0): RED, (0, 2): RED, (2, 3): ("triangle", "blue")},
    ),
    "remove": ({"kind": "remove", "shape": "circle", "color": "red"}, {(2, 3): BLUE}),
    "add": ({"kind": "add", "shape": "circle", "color": "red"}, {**SOURCE, (3, 0): RED}),
}


@pytest.mark.parametrize("kind", EDITS)
def test_an_edit_done_scores_1_and_a_copy_or_a_blank_scores_0(kind: str) -> None:
    edit, done = EDITS[kind]
    scene = {**spec_of(done), "edit": edit}
    assert verdict(scene, done, SOURCE).value == 1
    assert verdict(scene, SOURCE, SOURCE).value == 0
    assert verdict(scene, {}, SOURCE).value == 0


@pytest.mark.parametrize("kind", EDITS)
def test_an_edit_that_spoils_the_rest_scores_less(kind: str) -> None:
    edit, done = EDITS[kind]
    scene = {**spec_of(done), "edit": edit}
    extra = verdict(scene, {**done, (1, 1): ("square", "yellow")}, SOURCE)
    assert extra.value == 0.5 and extra.parts["preserved"] == 1
    (kept, what), *_ = [item for item in done.items() if SOURCE.get(item[0]) == item[1]]
    moved = {cell: item for cell, item in done.items() if cell != kept} | {(3, 3): what}
    score = verdict(scene, moved, SOURCE)
    assert score.parts["preserved"] < 1 and (score.value or 0) < 0.5


def test_half_an_edit_is_half_done() -> None:
    edit, done = EDITS["recolor"]
    half = {**SOURCE, (0, 0): done[0, 0]}
    score = verdict({**spec_of(done), "edit": edit}, half, SOURCE)
    assert score.parts["edit"] == 0.5 and score.value == 0.5


@pytest.mark.parametrize(
    ("scene", "source", "reason"),
    [
        (None, None, "no 'scene' column"),
        ({**spec_of(EDITS["remove"][1]), "edit": EDITS["remove"][0]}, None, "one source image, got 0"),
        (
            {**spec_of(RIGHT), "edit": {"kind": "remove", "shape": "circle", "color": "green"}},
            SOURCE,
            "no green circle",
        ),
        ({**spec_of(RIGHT), "edit": EDITS["add"][0]}, SOURCE, "the row's objects say"),
        ({"objects": [{"shape": "cirle", "color": "red"}]}, None, "Nearest: circle"),
        ({"objects": []}, None, "no objects"),
    ],
)
def test_a_row_that_cannot_be_verified_is_unavailable(scene: Any, source: Drawn | None, reason: str) -> None:
    score = verdict(scene, RIGHT, source)
    assert score.status == "unavailable" and reason in score.reason


def test_images_that_are_no_scene() -> None:
    small = verdict(TWO_OVER_ONE, Image.new("RGB", (32, 32)))
    assert small.status == "unavailable" and "48x48" in small.reason
    none = ScenesReward().score([Sample("s", "g", "", (), row={"scene": TWO_OVER_ONE})])[0]
    assert none.status == "invalid_output"


def test_a_specification_survives_its_plain_form() -> None:
    spec = SceneSpec(
        (ObjectGroup("circle", "red", 2), ObjectGroup("square", "blue")),
        Relation("left_of", 0, 1),
        Edit("recolor", "circle", "green", "red"),
    )
    assert SceneSpec.from_dict(spec.to_dict()) == spec
    bare = SceneSpec(spec.objects)
    assert SceneSpec.from_dict(bare.to_dict()) == bare == SceneSpec.from_dict({"objects": bare.to_dict()["objects"]})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"objects": "circle"}, "list"),
        ({"object": []}, "Nearest: objects"),
        ({"objects": [{"shape": "circle"}]}, "lacks color"),
        ({"objects": [{"shape": "circle", "color": "red", "count": 0}]}, "from 1 to 16"),
        ({"objects": [{"shape": "circle", "color": "red"}] * 2}, "once"),
        ({"relation": {"kind": "above", "a": 0, "b": 2}}, "relation needs"),
        ({"edit": {"kind": "recolor", "shape": "circle", "color": "red", "to": "red"}}, "changes nothing"),
        ({"edit": {"kind": "remove", "shape": "circle", "color": "red", "to": "blue"}}, "takes no 'to'"),
        ({"edit": {"kind": "recolor", "shape": "circle", "color": "red"}}, "recolor target"),
    ],
)
def test_specifications_that_make_no_sense_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SceneSpec.from_dict({**TWO_OVER_ONE, **change})


def test_the_gold_check_passes() -> None:
    reward = ScenesReward()
    assert gold_check_pairs(reward, reward.gold()).passed
