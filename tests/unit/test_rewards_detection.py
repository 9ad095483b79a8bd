"""Detected objects against GenEval's metadata: the rule by hand, the known defects of others, and real detectors."""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, GroundingDinoForObjectDetection, Owlv2ForObjectDetection

from rewards import build
from rewards.base import Sample, Score
from rewards.detection import Detection, ObjectsReward, judge_objects, overlap, relations
from rewards.detectors import ClipColours, GroundingDinoDetector, OwlDetector
from rewards.gold import GoldPair, gold_check_pairs
from rewards.gold_images import scene_image
from rewards.object_spec import COLORS, RELATIONS, read_spec
from rewards.scenes_detector import SceneDetector
from rewards.two_towers import TwoTowers
from tests.unit.tiny_detectors import write_grounding_dino, write_owl
from tests.unit.tiny_towers import write_clip

ROOT = Path(__file__).resolve().parents[2]
ROWS = [json.loads(line) for line in (ROOT / "tests/fixtures/geneval/metadata.jsonl").read_text().splitlines()]
BLANK = Image.new("RGB", (64, 64), "white")


def thing(
    name: str, x: float, y: float, color: str | None = None, confidence: float = 0.9, size: float = 10
) -> Detection:
    """An object of size x size pixels around (x, y)."""
    return Detection(name, confidence, (x - size / 2, y - size / 2, x + size / 2, y + size / 2), color)


def wanted(*include: Any, exclude: Sequence[Any] = (), tag: str = "") -> Any:
    return read_spec({"tag": tag, "include": list(include), "exclude": list(exclude)})


def entry(name: str, count: int = 1, **more: Any) -> dict[str, Any]:
    return {"class": name, "count": count, **more}


def judged(found: Sequence[Detection], *include: Any, exact: bool = False, **more: Any) -> tuple[float, float]:
    parts = judge_objects(found, wanted(*include, **more), exact=exact)
    return parts["strict"], round(parts["graded"], 6)


def test_geneval_rows_are_read() -> None:
    specs = [read_spec(row) for row in ROWS]
    assert {row["tag"] for row in ROWS} == {
        "single_object", "two_object", "counting", "colors", "position", "color_attr"
    }  # fmt: skip
    assert {item.relation for spec in specs for item in spec.include} == {None, *RELATIONS}
    assert [spec.counting for spec in specs] == [row["tag"] == "counting" for row in ROWS]
    assert read_spec(json.dumps(ROWS[0])) == specs[0]
    # as a parquet table has them: every field in every row, and lists of one type
    full = {"color": None, "position": None, "exclude": None}
    filled = [
        {**full, **item, "position": item.get("position") and [*map(str, item["position"])]}
        for item in ROWS[-1]["include"]
    ]
    assert (
        read_spec(
            {**ROWS[-1], "include": [{k: v for k, v in f.items() if k != "exclude"} for f in filled], "exclude": None}
        )
        == specs[-1]
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "no list `include`"),
        ({"include": []}, "no list `include`"),
        ({"include": [{"class": "", "count": 1}]}, "has no `class`"),
        ({"include": [{"class": "cat"}]}, "count of at least 1, got None"),
        ({"include": [{"class": "cat", "count": 0}]}, "at least 1"),
        ({"include": [{"class": "cat", "count": True}]}, "at least 1"),
        ({"include": [{"class": "cat", "count": 1, "colour": "red"}]}, "unknown key 'colour'. Nearest: color"),
        ({"include": [{"class": "cat", "count": 1, "color": "gren"}]}, "Nearest: green"),
        ({"include": [entry("a"), entry("b", position=["on top of", 0])]}, "unknown relation 'on top of'"),
        ({"include": [entry("a", position=["above", 0])]}, "none of the 0 before it"),
        ({"include": [entry("a"), entry("b", position=["above", 1])]}, "none of the 1 before it"),
        ({"include": [entry("a"), entry("b", position="above")]}, "expected \\[relation"),
        ({"include": [entry("a", 3)], "exclude": [entry("a", 3)]}, "3 are one too many"),
        ({"include": [entry("a")], "exclude": "b"}, "`exclude` is no list"),
        ("{", "no JSON"),
    ],
)
def test_metadata_that_cannot_be_judged_is_an_error_and_no_zero(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_spec(given)
    sample = Sample("s", "g", "", (BLANK,), row={"meta": given})
    score = ObjectsReward(SceneDetector(), column="meta").score([sample])[0]
    assert score.status == "unavailable"


def test_relations_by_hand() -> None:
    middle = thing("a", 50, 50)
    assert relations(thing("b", 80, 50), middle) == {"right of"}
    assert relations(thing("b", 20, 50), middle) == {"left of"}
    assert relations(thing("b", 50, 20), middle) == {"above"}
    assert relations(thing("b", 50, 80), middle) == {"below"}
    assert relations(thing("b", 80, 80), middle) == {"right of", "below"}
    assert relations(middle, middle) == set()
    # 10 + 10 wide: an offset of 2 is the margin of 0.1 * 20, one of 4 leaves 2 of 4, which is not more than half
    assert relations(thing("b", 52, 50), middle) == set()
    assert relations(thing("b", 54, 50), middle) == set()
    assert relations(thing("b", 54.1, 50), middle) == {"right of"}


@pytest.mark.parametrize("found", range(8))
def test_too_many_objects_stay_in_range_and_fewer_is_worse_than_right(found: int) -> None:
    things = [thing("cat", 10 * at, 10) for at in range(found)]
    # at least two: more are as good
    assert judged(things, entry("cat", 2)) == (float(found >= 2), round(min(found, 2) / 2, 6))
    # two and no third, by an exclusion or by `exact`
    graded = found / 2 if found <= 2 else 2 / found
    for result in (
        judged(things, entry("cat", 2), exclude=[entry("cat", 3)]),
        judged(things, entry("cat", 2), exact=True),
    ):
        assert result == (float(found == 2), pytest.approx(graded, abs=1e-6))


@pytest.mark.parametrize("relation", RELATIONS)
def test_every_relation_can_be_right_and_a_wrong_one_earns_no_credit_of_its_own(relation: str) -> None:
    places = {"left of": (10, 50), "right of": (90, 50), "above": (50, 10), "below": (50, 90)}
    include = (entry("cat"), entry("dog", position=[relation, 0]))
    for where, place in places.items():
        result = judged([thing("cat", 50, 50), thing("dog", *place)], *include)
        assert result == ((1, 1) if where == relation else (0, round(2 / 3, 6)))
    # nearer to nothing without one of them, and nothing at all for none
    assert judged([thing("dog", 10, 50)], *include) == (0, round(1 / 3, 6))
    assert judged([], *include) == (0, 0)


def test_a_blank_picture_earns_nothing_for_what_it_does_not_show() -> None:
    for row in ROWS:
        parts = judge_objects([], read_spec(row))
        assert parts["graded"] == parts["strict"] == 0


def test_colours_count_among_the_most_confident() -> None:
    cats = [thing("cat", 10, 10, "red", 0.9), thing("cat", 30, 10, "blue", 0.8), thing("cat", 50, 10, "red", 0.7)]
    assert judged(cats, entry("cat", 2, color="red")) == (0, 0.75)
    assert judged(cats[::2], entry("cat", 2, color="red")) == (1, 1)
    assert judged(cats[:1], entry("cat", 2, color="red")) == (0, 0.5)
    assert judged(cats, entry("cat", 2, color="green")) == (0, 0.5)


def test_an_excluded_class_scales_the_rest() -> None:
    found = [thing("cat", 10, 10), thing("dog", 30, 10), thing("dog", 50, 10)]
    assert judged(found, entry("cat"), exclude=[entry("dog", 1)]) == (0, 0)
    assert judged(found, entry("cat"), exclude=[entry("dog", 2)]) == (0, 0.5)
    assert judged(found, entry("cat"), exclude=[entry("dog", 3)]) == (1, 1)


def test_graded_is_within_0_and_1_and_1_exactly_where_strict_is() -> None:
    chance = np.random.default_rng(0)
    both = set()
    for _ in range(400):
        found = [
            thing(
                str(chance.choice(["cat", "dog"])),
                chance.uniform(0, 100),
                chance.uniform(0, 100),
                str(chance.choice(["red", "blue"])),
            )
            for _ in range(chance.integers(0, 5))
        ]
        include = [entry("cat", int(chance.integers(1, 3)), color="red" if chance.random() < 0.5 else None)]
        if chance.random() < 0.5:
            include.append(entry("dog", 1, position=[str(chance.choice(RELATIONS)), 0]))
        parts = judge_objects(found, wanted(*include), exact=bool(chance.random() < 0.5))
        assert 0 <= parts["graded"] <= 1 and (parts["graded"] == 1) == (parts["strict"] == 1)
        both.add(parts["strict"])
    assert both == {0, 1}


class Fixed:
    """A detector that finds what it is told; it knows no unicorn."""

    tells_colours = False

    def __init__(self, *found: Detection) -> None:
        self.found = found

    def detect(self, images: Sequence[Image.Image], names: Sequence[Sequence[str]]) -> list[list[Detection]]:
        if any("unicorn" in each for each in names):
            raise ValueError("no unicorn")
        return [[one for one in self.found if one.name in each] for each in names]

    def gold(self) -> Sequence[GoldPair]:
        return []

    def fingerprint(self) -> str:
        return "fixed"


def sample(*include: Any, tag: str = "", images: int = 1) -> Sample:
    return Sample("s", "g", "p", (BLANK,) * images, row={"tag": tag, "include": list(include), "exclude": None})


def value(reward: ObjectsReward, one: Sample) -> float | None:
    return reward.score([one])[0].value


def test_thresholds_the_most_of_a_class_and_overlaps() -> None:
    found = Fixed(
        thing("cat", 10, 10, confidence=0.5),
        thing("cat", 10.5, 10, confidence=0.4),
        thing("cat", 40, 10, confidence=0.2),
    )
    two, three, counted = sample(entry("cat", 2)), sample(entry("cat", 3)), sample(entry("cat", 2), tag="counting")
    assert (value(ObjectsReward(found), two), value(ObjectsReward(found), three)) == (1, pytest.approx(2 / 3))
    assert value(ObjectsReward(found, threshold=0.1), three) == 1
    assert value(ObjectsReward(found, threshold=0.4), two) == 0.5, "above the threshold, not at it"
    assert value(ObjectsReward(found, counting_threshold=0.45), counted) == 0.5
    assert value(ObjectsReward(found, counting_threshold=0.45), two) == 1
    assert value(ObjectsReward(found, threshold=0.1, max_objects=2), three) == pytest.approx(2 / 3)
    assert value(ObjectsReward(found, max_overlap=0.8), two) == 0.5
    assert value(ObjectsReward(found, form="strict"), three) == 0
    assert overlap((0, 0, 2, 2), (1, 0, 3, 2)) == pytest.approx(1 / 3) and overlap((0, 0, 1, 1), (2, 2, 3, 3)) == 0


def test_what_cannot_be_judged_costs_no_other_sample_its_score() -> None:
    samples = [
        sample(entry("unicorn")),
        sample(entry("cat")),
        sample(entry("cat"), images=2),
        sample(entry("cat"), images=0),
        sample(entry("cat", color="red")),
        replace(sample(entry("cat")), row={}),
    ]
    scores = ObjectsReward(Fixed(thing("cat", 1, 1))).score(samples)
    assert [score.status for score in scores] == [
        "unavailable",
        "ok",
        "unavailable",
        "invalid_output",
        "unavailable",
        "unavailable",
    ]
    assert "no unicorn" in scores[0].reason and "set the option `colours`" in scores[4].reason
    assert scores[1] == Score("ok", 1.0, "found cat 0.90", {"strict": 1, "graded": 1, "count": 1})


def test_the_scene_detector_tells_places_and_colours() -> None:
    reward = build("objects", detector="scenes", exact=True)
    assert gold_check_pairs(reward, reward.gold()).passed  # type: ignore[attr-defined]
    row = {"include": [entry("circle", 2, color="purple"), entry("triangle", color="yellow", position=["left of", 0])]}
    cells = {(0, 2): ("circle", "purple"), (1, 3): ("circle", "purple"), (1, 0): ("triangle", "yellow")}
    more = {**cells, (3, 3): ("circle", "purple")}
    scores = reward.score([Sample("s", "g", "", (scene_image(each),), row=row) for each in (cells, more)])
    assert scores[0].value == 1 and scores[1].parts["strict"] == 0
    wrong = [Sample("s", "g", "", (image,), row=row) for image in (BLANK,)]
    wrong.append(Sample("s", "g", "", (scene_image(cells),), row={"include": [entry("circel")]}))
    reasons = [score.reason for score in reward.score(wrong)]
    assert "48x48" in reasons[0] and "Nearest: circle" in reasons[1]
    nested = build("objects", detector="scenes", column="geneval")
    assert gold_check_pairs(nested, nested.gold()).passed  # type: ignore[attr-defined]


def test_scenes_need_no_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; import rewards; rewards.build('objects', detector='scenes')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


NOISE = [
    Image.fromarray(np.random.default_rng(at).integers(0, 256, (30, 40 + at, 3), dtype=np.uint8)) for at in range(3)
]


@torch.inference_mode()
@pytest.mark.parametrize("batch_size", [1, 8])
def test_owl_finds_what_transformers_finds(batch_size: int, tmp_path: Path) -> None:
    folder = write_owl(tmp_path)
    names = [("cat", "wine glass"), ("dog",), ("cat", "wine glass")]
    found = OwlDetector(folder, batch_size=batch_size).detect(NOISE, names)
    model: Any = Owlv2ForObjectDetection.from_pretrained(folder)
    processor: Any = AutoProcessor.from_pretrained(folder)
    for image, asked, boxes in zip(NOISE, names, found, strict=True):
        inputs = processor(text=[[f"a photo of a {name}" for name in asked]], images=image, return_tensors="pt")
        logits, classes = model(**inputs).logits[0].max(dim=-1)
        assert [one.name for one in boxes] == [asked[number] for number in classes.tolist()]
        assert [one.confidence for one in boxes] == pytest.approx(logits.sigmoid().tolist(), abs=1e-5)
        assert all(
            0 <= b.box[0] <= b.box[2] <= image.width and 0 <= b.box[1] <= b.box[3] <= image.height for b in boxes
        )
    assert {one.name for one in found[0]} == {"cat", "wine glass"}


@torch.inference_mode()
@pytest.mark.parametrize("batch_size", [1, 4])
def test_grounding_dino_finds_what_transformers_finds(batch_size: int, tmp_path: Path) -> None:
    folder = write_grounding_dino(tmp_path)
    names = [("cat", "wine glass"), ("dog",)]
    found = GroundingDinoDetector(folder, batch_size=batch_size).detect(NOISE[:1] * 2, names)
    model: Any = GroundingDinoForObjectDetection.from_pretrained(folder)
    processor: Any = AutoProcessor.from_pretrained(folder)
    for asked, boxes in zip(names, found, strict=True):
        assert [one.name for one in boxes] == [name for name in asked for _ in range(6)]
        for name in asked:
            outputs = model(**processor(text=f"{name}.", images=NOISE[0], return_tensors="pt"))
            scores = outputs.logits[0].sigmoid().max(dim=-1).values
            own = [one.confidence for one in boxes if one.name == name]
            assert own == pytest.approx(scores.tolist(), abs=1e-3)


def test_clip_colours_are_the_best_fitting_ones(tmp_path: Path) -> None:
    towers = TwoTowers(write_clip(tmp_path))
    objects = [
        Detection("cat", 1, (0, 0, 20, 20)),
        Detection("dog", 1, (10, 5, 40, 30)),
        Detection("cat", 1, (7, 7, 7, 7)),
    ]
    named = ClipColours(towers).name_colours(NOISE[0], objects)
    for one, color in zip(objects[:2], named, strict=False):
        crop = NOISE[0].crop(one.box)
        asks = ["a photo of a {} {}", "a photo of a {}-colored {}", "a photo of a {} object"]
        texts = torch.stack([towers.texts([ask.format(c, one.name) for ask in asks]).mean(0) for c in COLORS])
        fit = texts @ towers.pictures([crop])[0] / texts.norm(dim=-1)
        assert COLORS[int(fit.argmax())] == color
    assert len(named) == 3


def test_a_checkpoint_of_another_kind_and_wrong_options_say_why(tmp_path: Path) -> None:
    folder = write_clip(tmp_path)
    for name in ("owl", "grounding_dino"):
        with pytest.raises(ValueError, match="type 'clip'"):
            build("objects", detector=name, model=folder)
    for options, message in (
        ({"detector": "owls"}, "Nearest: owl"),
        ({"detector": "scenes", "colours": "x"}, "leave out model and colours"),
        ({"detector": "scenes", "form": "strickt"}, "Nearest: strict"),
        ({"detector": "scenes", "threshold": 1.0}, r"thresholds in \[0, 1\)"),
    ):
        with pytest.raises(ValueError, match=message):
            build("objects", **options)
