"""Scores that a judge has given, written down and taken back."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from rewards.base import Sample, Score
from rewards.cache import ScoreCache
from rewards.compose import CompositeReward, Term
from rewards.runner import RewardRunner
from rlmm.train.score_cache import KeepScores, Scores, scores_path

GIVEN = {
    "a": Score.ok(1 / 3, exact=0.1, never=math.inf),
    "b": Score.stepwise([0.1, 0.2, 0.7], [0.25, 0.5, 1.0]),
    "c": Score.invalid_output("torn"),
    "d": Score("ok", -2.0, "as read", {"x": 1e-300}, ((0.5, 3.0),)),
}


def filled(capacity: int = 8) -> ScoreCache:
    cache = ScoreCache(capacity)
    for key, score in GIVEN.items():
        cache.put(key, score)
    return cache


def test_scores_come_back_to_the_last_bit_and_in_order() -> None:
    first = filled()
    first.get("a")
    second = ScoreCache(3)
    second.restore(json.loads(json.dumps(first.record())))
    assert {key: second.get(key) for key in GIVEN} == {**GIVEN, "b": None}  # the least recently used one


def test_what_was_known_before_is_left_out() -> None:
    assert [item["key"] for item in filled().record(without={"a", "d", "e"})] == ["b", "c"]


@pytest.mark.parametrize(
    "record",
    [
        [{"key": "a"}],
        ["a"],
        [{"key": "a", "score": {"status": "ok"}}],
        [{"key": "a", "score": {"status": "invalid_output", "value": 1.0}}],
        [{"key": "a", "score": {"status": "good", "value": 1.0}}],
    ],
)
def test_what_is_no_record_of_scores_is_refused_whole(record: list[Any]) -> None:
    cache = ScoreCache(8)
    with pytest.raises(ValueError):
        cache.restore([*filled().record(), *record])
    assert not len(cache)


class Counting:
    """Counts what it is asked; its answers are that count."""

    name = "counting"

    def __init__(self, version: str = "v1") -> None:
        self.version, self.asked = version, 0

    def fingerprint(self) -> str:
        return self.version

    def score(self, samples: Sequence[Sample]) -> list[Score]:
        self.asked += len(samples)
        return [Score.ok(self.asked) for _ in samples]


SAMPLES = [Sample("a", "g", "one"), Sample("b", "g", "two")]


def kept(judge: Counting, said: list[str]) -> tuple[KeepScores, CompositeReward]:
    composite = CompositeReward([Term("count", RewardRunner(judge, batch_size=1, cache=8))])
    return KeepScores(Scores({"rewards": composite}, said.append)), composite


class At:
    """What Trainer tells a callback."""

    def __init__(self, folder: Path, step: int) -> None:
        self.output_dir, self.global_step = str(folder), step


def saved(folder: Path) -> Path:
    """The file of a checkpoint of step 3, in which SAMPLES have the scores 1 and 2."""
    (folder / "checkpoint-3").mkdir()
    keep, composite = kept(Counting(), [])
    composite.score(SAMPLES)
    at = At(folder, 3)
    keep.on_save(at, at, None)
    return scores_path(folder / "checkpoint-3")


def after(folder: Path, judge: Counting, said: list[str]) -> list[float | None]:
    """The scores of SAMPLES in a run that goes on from step 3."""
    keep, composite = kept(judge, said)
    at = At(folder, 3)
    keep.on_train_begin(at, at, None)
    return [one.total.value for one in composite.score(SAMPLES)]


def test_a_checkpoint_answers_for_the_judge(tmp_path: Path) -> None:
    saved(tmp_path)
    judge, said = Counting(), []
    assert after(tmp_path, judge, said) == [1, 2]
    assert judge.asked == 0 and not said


def test_another_judge_is_asked(tmp_path: Path) -> None:
    saved(tmp_path)
    judge, said = Counting("v2"), []
    assert after(tmp_path, judge, said) == [1, 2]
    assert judge.asked == 2 and "rewards.count" in said[0] and "another judge's" in said[0]


@pytest.mark.parametrize("text", [None, "", "[]", "{", '{"rewards": {}}', '{"rewards": {"count": 3}}'])
def test_a_file_that_cannot_be_used_is_named(tmp_path: Path, text: str | None) -> None:
    path = saved(tmp_path)
    path.unlink() if text is None else path.write_text(text)
    judge, said = Counting(), []
    assert after(tmp_path, judge, said) == [1, 2]
    assert judge.asked == 2 and str(path) in said[0]


def test_scores_that_are_none_are_not_taken(tmp_path: Path) -> None:
    path = saved(tmp_path)
    record = json.loads(path.read_text())
    record["rewards"]["count"]["scores"][1]["score"]["value"] = None
    path.write_text(json.dumps(record))
    judge, said = Counting(), []
    after(tmp_path, judge, said)
    assert judge.asked == 2 and "status ok has the value None" in said[0]
