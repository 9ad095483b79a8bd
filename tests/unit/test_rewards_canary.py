"""Frozen samples: what is frozen, what a drift is, and that no cache hides one."""

import json
from collections.abc import Sequence

import numpy as np
import pytest
from PIL import Image

from rewards.base import Sample, Score
from rewards.canary import Canaries, Drift, frozen, scores_of
from rewards.compose import Term
from rewards.runner import RewardRunner


def sample(name: str, group: str, **fields: object) -> Sample:
    return Sample(name, group, f"prompt {group}", (Image.new("RGB", (4, 4), (len(name), 0, 0)),), **fields)  # pyrefly: ignore


class Judge:
    """Scores by the picture, plus what it has drifted; a judge may be `out` for a sample."""

    name = "judge"

    def __init__(self) -> None:
        self.shift, self.calls, self.out = 0.0, 0, ""

    def fingerprint(self) -> str:
        return "the same all the time"

    def score(self, samples: Sequence[Sample]) -> list[Score]:
        self.calls += len(samples)
        return [
            Score.unavailable("out")
            if s.sample_id == self.out
            else Score.ok(float(np.asarray(s.images[0])[0, 0, 0]) + self.shift)
            for s in samples
        ]


def test_whole_groups_that_can_be_written_down_are_frozen() -> None:
    samples = [
        sample("a", "one"), sample("b", "two", row={"bad": object()}), sample("c", "three", row={"n": 1}),
        sample("dd", "three"), sample("e", "four"),
    ]  # fmt: skip
    assert [s.sample_id for s in frozen(samples, 2)] == ["a", "c", "dd"]
    assert [s.sample_id for s in frozen(samples, 9)] == ["a", "c", "dd", "e"]
    assert frozen([samples[1]], 1) == ()


def test_canaries_come_back_from_their_file_as_they_were() -> None:
    samples = frozen([sample("a", "g", row={"n": [1, 2]}, target_texts=("x",)), sample("bb", "g")], 1)
    back = Canaries.read(json.loads(json.dumps(Canaries(samples, {"judge": (1.0, None)}).record())))
    assert back.first == {"judge": (1.0, None)}
    assert [(s.sample_id, s.prompt, s.row, s.target_texts) for s in back.samples] == [
        (s.sample_id, s.prompt, s.row, s.target_texts) for s in samples
    ]
    assert [s.images[0].tobytes() for s in back.samples] == [s.images[0].tobytes() for s in samples]


@pytest.mark.parametrize(
    ("first", "now", "drift"),
    [
        ((1.0, 3.0), (1.0, 3.0), Drift(0, 0, 0)),
        ((1.0, 3.0), (1.0, 2.5), Drift(0.5, 0.5, 0)),  # spread 1
        ((100.0, 300.0), (50.0, 350.0), Drift(50, 0.5, 0)),
        ((2.0, 2.0), (2.0, 2.25), Drift(0.25, 0.25, 0)),  # all equal: the change as it is
        ((1.0, 3.0), (None, 3.0), Drift(0, 0, 0.5)),
        ((None, 3.0), (1.0, 3.0), Drift(0, 0, 0)),
        ((None, None), (1.0, 3.0), Drift(0, 0, 0)),
    ],
)
def test_a_drift_by_hand(first: tuple[float | None, ...], now: tuple[float | None, ...], drift: Drift) -> None:
    assert Canaries((), {"judge": first}).drift({"judge": now}) == {"judge": drift}


def test_a_cache_hides_no_drift() -> None:
    judge = Judge()
    term = Term("judge", RewardRunner(judge, cache=16))
    samples = [sample("a", "g"), sample("bb", "g")]
    term.runner.score(samples)
    canaries = Canaries(tuple(samples), scores_of([term], samples))
    judge.shift = 0.25
    assert canaries.drift(scores_of([term], samples))["judge"] == Drift(0.25, 0.5, 0)
    judge.out = "a"
    assert canaries.drift(scores_of([term], samples))["judge"] == Drift(0.25, 0.5, 0.5)
    assert term.runner.stats.samples == 2, "the run's own counts are of its rollouts alone"
