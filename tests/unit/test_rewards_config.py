"""The recipe's reward section, the composite built from it, the gold check, and the generated data it must
fit."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from pydantic import ValidationError

from rewards.base import Sample
from rewards.gold import GoldPair, gold_check, pair_from_row
from rewards.gold_images import word_image
from rewards.scenes import ScenesReward
from rewards.transforms import Affine, Sigmoid
from rlmm.config.data import ScenesData
from rlmm.config.rewards import Rewards
from rlmm.data.scenes import build as build_scenes
from rlmm.rewarding import build_composite, gold_results

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
EXAMPLE, TRL = EXAMPLES / "custom_reward.py", EXAMPLES / "trl_reward.py"


def rewards(**raw: Any) -> Rewards:
    return Rewards.model_validate(raw)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"terms": []}, "at least 1"),
        ({"terms": [{"name": "orc"}]}, "no reward 'orc'. Nearest: ocr"),
        ({"terms": [{"name": "ocr", "options": {"widht_scale": 1}}]}, "Nearest: width_scale"),
        ({"terms": [{"name": "ocr", "wieght": 1}]}, "unknown key 'wieght'. Nearest: weight"),
        ({"terms": [{}]}, "either a name"),
        ({"terms": [{"name": "ocr", "function": "a.py:f"}]}, "either a name"),
        ({"terms": [{"name": "function"}]}, "write `function:"),
        ({"terms": [{"name": "ocr"}, {"name": "ocr"}]}, "give one of them a label"),
        ({"terms": [{"name": "ocr", "weight": 0}]}, "weight 0"),
        ({"terms": [{"name": "ocr", "weight": float("nan")}]}, "finite"),
        ({"terms": [{"name": "ocr", "weight": -1}], "mode": "product"}, "negative weight"),
        ({"terms": [{"name": "ocr", "transform": {"lo": 1, "hi": 1}}]}, "both 1"),
        ({"terms": [{"name": "ocr"}], "gate": {"term": "orc", "threshold": 0.5}}, "Nearest: ocr"),
        ({"terms": [{"name": "ocr", "transform": {"centre": 1, "width": 0}}]}, "every score 0 or 1"),
        ({"terms": [{"name": "ocr", "transform": "zscore"}], "mode": "product"}, "use rank"),
        ({"terms": [{"name": "ocr"}], "mode": "min", "normalise": "terms"}, "mode is min"),
        ({"terms": [{"name": "ocr"}], "on_failure": "fail", "failed_share": 0.5}, "change nothing"),
        ({"terms": [{"name": "ocr"}], "deadline_s": 0}, "greater than 0"),
    ],
)
def test_sections_that_cannot_work_say_why(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        rewards(**raw)


def test_the_composite_is_what_the_section_says() -> None:
    function = {"function": f"{EXAMPLE}:ink", "weight": 0.5, "options": {"wanted": 0.3}}
    section = rewards(
        terms=[{"name": "scenes", "label": "shapes", "transform": {"lo": 0, "hi": 0.5}}, function],
        mode="min",
        gate={"term": "ink", "threshold": 0.1, "floor": -1},
        batch_size=7,
        deadline_s=3,
        retries=2,
        cache=9,
    )
    composite = build_composite(section)
    shapes, ink = composite.terms
    assert (shapes.name, shapes.transform, ink.name, ink.weight) == ("shapes", Affine(0, 0.5), "ink", 0.5)
    assert "0.3" in ink.runner.reward.fingerprint()
    runner = shapes.runner
    assert (runner.batch_size, runner.deadline_s, runner.retries, runner.cache.capacity) == (7, 3, 2, 9)
    assert not composite.normalise_terms and section.ceiling == 1
    assert composite.mode == "min" and [gate.floor for gate in composite.gates] == [-1]


def test_transforms_and_failure_policies_are_what_the_section_says() -> None:
    given: list[Any] = ["identity", "rank", "zscore", {"centre": 2, "width": -1}]
    terms = [{"name": "scenes", "label": str(at), "transform": transform} for at, transform in enumerate(given)]
    composite = build_composite(rewards(terms=terms, normalise="terms"))
    assert [term.in_group for term in composite.terms] == ["", "rank", "zscore", ""] and composite.normalise_terms
    assert composite.terms[3].transform == Sigmoid(2, -1)
    ceilings = [
        build_composite(rewards(terms=terms, **more)).failures.ceiling
        for more in ({}, {"failed_share": 0.2}, {"on_failure": "fail"})
    ]
    assert ceilings == [1, 0.2, 0]


@pytest.mark.parametrize(("gate", "count"), [(None, 0), ([], 0), ({"term": "scenes", "threshold": 0.1}, 1)])
def test_a_recipe_may_have_one_gate_or_several(gate: Any, count: int) -> None:
    section = rewards(terms=[{"name": "scenes"}], gate=gate)
    assert len(section.gate) == len(build_composite(section).gates) == count
    again = Rewards.model_validate(section.model_dump())
    assert again == section
    twice = rewards(terms=[{"name": "scenes"}], gate=[gate, gate]) if count else None
    assert twice is None or len(twice.gate) == 2


@pytest.mark.parametrize("variant", ["text_to_image", "edit"])
def test_generated_scenes_are_what_the_verifier_calls_right(variant: str) -> None:
    data = build_scenes(ScenesData.model_validate({"variant": variant, "train_images": 200}), "train", 5)
    chosen = [data[index] for index in range(len(data))]
    assert {one.row["scene"]["edit"] is not None for one in chosen} == {variant == "edit"}
    samples = [
        Sample(str(at), "g", one.prompt, (one.target,), source_images=tuple(one.sources), row=one.row)
        for at, one in enumerate(chosen)
        if one.target is not None
    ]
    assert samples
    scores = ScenesReward().score(samples)
    assert {score.value for score in scores} == {1.0}, [score for score in scores if score.value != 1][:3]
    if variant == "edit":
        copies = [replace(sample, images=sample.source_images) for sample in samples]
        assert {score.value for score in ScenesReward().score(copies)} == {0.0}


def test_the_gold_check_wants_the_good_sample_strictly_higher() -> None:
    reward = build_composite(rewards(terms=[{"function": f"{TRL}:redness"}])).terms[0].runner.reward
    red, white = (Sample(name, "g", "p", (Image.new("RGB", (4, 4), name),)) for name in ("red", "white"))
    assert gold_check(reward, [red], [white]).passed
    assert not gold_check(reward, [white], [red]).passed
    equal = gold_check(reward, [red], [red])
    assert not equal.passed and "is not above" in equal.lines[0]
    assert not gold_check(reward, [red, white], [white, red]).passed
    with pytest.raises(ValueError, match="no gold pair"):
        gold_check(reward, [], [])


def test_a_judge_that_fails_does_not_pass_its_gold_check(tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    path.write_text("def f(samples):\n    raise OSError('no judge')\n")
    section = rewards(terms=[{"function": f"{path}:f"}])
    sample = Sample("s", "g", "p", (Image.new("RGB", (4, 4)),))
    result = gold_results(section, GoldPair(sample, sample))["f"]
    assert result is not None and not result.passed and "no judge" in result.lines[0]


def test_built_in_rewards_bring_gold_and_a_function_may(tmp_path: Path) -> None:
    bare = tmp_path / "bare.py"
    bare.write_text("def f(samples):\n    return [0.0] * len(samples)\n")
    section = rewards(terms=[{"name": "scenes"}, {"function": f"{EXAMPLE}:ink"}, {"function": f"{bare}:f"}])
    results = gold_results(section)
    for name in ("scenes", "ink"):
        assert results[name] is not None and results[name].passed  # pyrefly: ignore
    assert results["f"] is None


@pytest.mark.parametrize("term", [{"weight": -1.0}, {"transform": {"lo": 1.0, "hi": 0.0}}])
def test_a_term_where_less_is_better_is_checked_the_other_way_round(term: dict[str, Any]) -> None:
    section = rewards(terms=[{"function": f"{TRL}:redness", **term}])
    red, white = (Sample(name, "g", "p", (Image.new("RGB", (4, 4), name),)) for name in ("red", "white"))
    result = gold_results(section, GoldPair(good=white, bad=red))["redness"]
    assert result is not None and result.passed


def test_a_pair_of_ones_own_comes_from_a_row(tmp_path: Path) -> None:
    word_image("LAMP").save(tmp_path / "good.png")
    word_image("TREE").save(tmp_path / "bad.png")
    row = {
        "prompt": 'write "LAMP"',
        "good_image": tmp_path / "good.png",
        "bad_image": word_image("TREE"),
        "n": 3,
    }
    pair = pair_from_row(row)
    assert pair.good.images[0].size == pair.bad.images[0].size and pair.good.row == {"n": 3}
    result = gold_results(rewards(terms=[{"name": "ocr"}]), pair)["ocr"]
    assert result is not None and result.passed
    with pytest.raises(ValueError, match="no image at .*nowhere.png"):
        pair_from_row({**row, "good_image": tmp_path / "nowhere.png"})
    with pytest.raises(ValueError, match="'prompt'"):
        pair_from_row({"promt": "x", "good_image": "a", "bad_image": "b"})
    (tmp_path / "torn.png").write_bytes(b"not an image")
    with pytest.raises(ValueError, match="torn.png cannot be read"):
        pair_from_row({**row, "good_image": tmp_path / "torn.png"})
