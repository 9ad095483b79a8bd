"""The runner's failure policy, its deadline and its cache."""

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import pytest
from PIL import Image

from rewards.base import Sample, Score
from rewards.cache import ScoreCache, cache_key
from rewards.runner import RewardContractError, RewardRunner


class Judge:
    """A reward made from a function of a batch; notes the batches it was asked."""

    name = "judge"

    def __init__(self, answer: Callable[[Sequence[Sample]], Any], identity: str = "v1") -> None:
        self.answer = answer
        self.identity = identity
        self.asked: list[list[str]] = []

    def fingerprint(self) -> str:
        return self.identity

    def score(self, samples: Sequence[Sample]) -> Any:
        self.asked.append([sample.sample_id for sample in samples])
        return self.answer(samples)


def make(count: int) -> list[Sample]:
    return [Sample(f"s{index}", "g", f"prompt {index}") for index in range(count)]


def numbers(samples: Sequence[Sample]) -> list[float]:
    return [float(sample.prompt.split()[1]) for sample in samples]


def test_batches_keep_order_and_size() -> None:
    judge = Judge(numbers)
    scores = RewardRunner(judge, batch_size=3).score(make(7))
    assert [score.value for score in scores] == [0, 1, 2, 3, 4, 5, 6]
    assert [len(batch) for batch in judge.asked] == [3, 3, 1]


def test_no_samples_ask_nobody() -> None:
    judge = Judge(numbers)
    assert RewardRunner(judge, cache=4).score([]) == []
    assert judge.asked == []


def test_one_bad_sample_does_not_cost_its_neighbours_their_scores() -> None:
    def answer(samples: Sequence[Sample]) -> list[float]:
        if any(sample.sample_id == "s1" for sample in samples):
            raise KeyError("no such thing")
        return numbers(samples)

    runner = RewardRunner(Judge(answer), batch_size=3, retries=2)
    scores = runner.score(make(3))
    assert [score.value for score in scores] == [0, None, 2]
    assert scores[1].status == "unavailable"
    assert "KeyError" in scores[1].reason and "no such thing" in scores[1].reason
    assert runner.stats.unavailable == {"KeyError": 1}
    assert runner.stats.calls == 1 + 2 + 3


def test_a_retry_that_succeeds_leaves_no_trace_but_the_count() -> None:
    calls = []

    def answer(samples: Sequence[Sample]) -> list[float]:
        calls.append(1)
        if len(calls) < 3:
            raise ConnectionError("down")
        return numbers(samples)

    runner = RewardRunner(Judge(answer), retries=2)
    assert [score.value for score in runner.score(make(2))] == [0, 1]
    assert runner.stats.retries == 2 and not runner.stats.unavailable


@pytest.mark.parametrize("answers", [[1.0], [1.0, 2.0, 3.0], []])
def test_a_wrong_number_of_scores_stops_the_run_and_is_not_retried(answers: list[float]) -> None:
    judge = Judge(lambda samples: answers)
    with pytest.raises(RewardContractError, match=rf"'judge' answered {len(answers)} .* 2 samples; expected 2"):
        RewardRunner(judge, retries=3).score(make(2))
    assert len(judge.asked) == 1


@pytest.mark.parametrize("answer", [None, 3.0, "ab", {"a": 1, "b": 2}, ["high", "low"]])
def test_answers_that_are_no_scores_stop_the_run(answer: Any) -> None:
    with pytest.raises(RewardContractError, match="judge"):
        RewardRunner(Judge(lambda samples: answer)).score(make(2))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), Score("ok", float("nan"))])
def test_a_value_that_is_no_finite_number_is_unavailable(value: Any) -> None:
    runner = RewardRunner(Judge(lambda samples: [value, 0.5]))
    scores = runner.score(make(2))
    assert [score.status for score in scores] == ["unavailable", "ok"]
    assert "finite" in scores[0].reason
    assert runner.stats.unavailable == {"not a finite number": 1}


def test_none_is_not_applicable() -> None:
    scores = RewardRunner(Judge(lambda samples: [None, 1])).score(make(2))
    assert scores[0] == Score.unavailable("not applicable")
    assert scores[1].value == 1.0


def test_parts_and_reasons_of_a_score_come_through() -> None:
    given = Score("ok", 0.5, reason="read 'X'", parts={"exact": 0.0})
    assert RewardRunner(Judge(lambda samples: [given])).score(make(1)) == [given]


def test_a_late_batch_is_unavailable_and_the_next_one_is_scored() -> None:
    release = threading.Event()

    def answer(samples: Sequence[Sample]) -> list[float]:
        if samples[0].sample_id == "s0":
            release.wait(20)
        return numbers(samples)

    runner = RewardRunner(Judge(answer), batch_size=2, deadline_s=0.2, retries=3)
    started = time.monotonic()
    scores = runner.score(make(4))
    release.set()
    assert time.monotonic() - started < 5
    assert [score.status for score in scores] == ["unavailable", "unavailable", "ok", "ok"]
    assert "0.2 s" in scores[0].reason
    assert runner.stats.unavailable == {"deadline": 2}


def test_the_deadline_bounds_retries_too() -> None:
    def answer(samples: Sequence[Sample]) -> list[float]:
        time.sleep(0.1)
        raise ConnectionError("down")

    runner = RewardRunner(Judge(answer), batch_size=8, deadline_s=0.35, retries=100)
    started = time.monotonic()
    scores = runner.score(make(8))
    assert time.monotonic() - started < 2
    assert {score.status for score in scores} == {"unavailable"}


def test_the_deadline_bounds_the_search_for_the_bad_sample_too() -> None:
    def answer(samples: Sequence[Sample]) -> list[float]:
        time.sleep(0.1)
        raise ConnectionError("down")

    runner = RewardRunner(Judge(answer), batch_size=8, deadline_s=0.35, retries=0)
    assert {score.status for score in runner.score(make(8))} == {"unavailable"}
    assert runner.stats.unavailable["deadline"] >= 4


@pytest.mark.parametrize("deadline_s", [None, 5.0])
def test_an_interrupt_is_not_taken_for_a_failing_judge(deadline_s: float | None) -> None:
    def answer(samples: Sequence[Sample]) -> list[float]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        RewardRunner(Judge(answer), deadline_s=deadline_s).score(make(1))


def test_equal_samples_are_scored_once_within_a_call_and_across_calls() -> None:
    judge = Judge(numbers)
    runner = RewardRunner(judge, cache=8)
    twins = [Sample("a", "g", "prompt 4"), Sample("b", "h", "prompt 4")]
    assert [score.value for score in runner.score(twins)] == [4, 4]
    assert [score.value for score in runner.score(twins)] == [4, 4]
    assert judge.asked == [["a"]]
    assert runner.stats.cached == 3 and runner.stats.samples == 4


def test_without_a_cache_equal_samples_are_each_scored() -> None:
    judge = Judge(numbers)
    RewardRunner(judge).score([Sample("a", "g", "prompt 4"), Sample("b", "g", "prompt 4")])
    assert judge.asked == [["a", "b"]]


@pytest.mark.parametrize("failure", ["raise", "nan", "none", "unavailable"])
def test_a_failure_is_never_cached(failure: str) -> None:
    healthy = False

    def answer(samples: Sequence[Sample]) -> list[Any]:
        if healthy:
            return [0.7 for _ in samples]
        if failure == "raise":
            raise OSError("judge down")
        bad = {"nan": float("nan"), "none": None, "unavailable": Score.unavailable("busy")}[failure]
        return [bad for _ in samples]

    runner = RewardRunner(Judge(answer), cache=8, retries=0)
    assert runner.score(make(2))[0].status == "unavailable"
    healthy = True
    assert [score.value for score in runner.score(make(2))] == [0.7, 0.7]


def test_copies_of_a_failed_sample_all_count_as_unavailable() -> None:
    runner = RewardRunner(Judge(lambda samples: [None for _ in samples]), cache=8)
    runner.score([Sample("a", "g", "same"), Sample("b", "g", "same")])
    assert runner.stats.unavailable == {"not applicable": 2}


def test_the_cache_drops_the_least_recently_used_score() -> None:
    cache = ScoreCache(2)
    cache.put("a", Score.ok(1))
    cache.put("b", Score.ok(2))
    cache.get("a")
    cache.put("c", Score.ok(3))
    assert [cache.get(key) is not None for key in "abc"] == [True, False, True]


def sample(**changes: Any) -> Sample:
    picture = Image.new("RGB", (4, 6), "red")
    base: dict[str, Any] = {"images": (picture,), "text": "t", "row": {"n": 1}}
    return Sample("id", "group", "p", **{**base, **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {"images": (Image.new("RGB", (6, 4), "red"),)},
        {"images": (Image.new("RGB", (4, 6), "blue"),)},
        {"images": (Image.new("L", (4, 18), 0),)},
        {"images": (), "source_images": (Image.new("RGB", (4, 6), "red"),)},
        {"text": "u"},
        {"row": {"n": 2}},
        {"row": {"n": "1"}},
        {"row": {"m": 1}},
        {"row": {"n": 1, "extra": None}},
        {"row": {"n": [1]}},
    ],
)
def test_whatever_a_judge_may_look_at_changes_the_key(changes: dict[str, Any]) -> None:
    assert cache_key(sample(**changes), "v1") != cache_key(sample(), "v1")


def test_ids_do_not_change_the_key_and_the_judge_does() -> None:
    other = Sample("other", "other", "p", images=sample().images, text="t", row={"n": 1})
    assert cache_key(other, "v1") == cache_key(sample(), "v1")
    assert cache_key(sample(), "v2") != cache_key(sample(), "v1")


def test_a_row_that_cannot_be_hashed_is_scored_each_time() -> None:
    judge = Judge(lambda samples: [1.0 for _ in samples])
    runner = RewardRunner(judge, cache=8)
    for _ in range(2):
        assert runner.score([sample(row={"n": object()})])[0].value == 1.0
    assert len(judge.asked) == 2 and runner.stats.uncacheable == 2


def test_metrics_are_flat_numbers() -> None:
    runner = RewardRunner(Judge(lambda samples: [None, Score.invalid_output("torn"), 1.0]))
    runner.score(make(3))
    metrics = runner.stats.as_metrics()
    assert metrics["unavailable/not applicable"] == 1 and metrics["invalid_output"] == 1
    assert metrics["samples"] == 3 and metrics["latency_p95_s"] >= 0


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"retries": -1}, {"cache": -1}, {"deadline_s": 0.0}])
def test_settings_that_cannot_work_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        RewardRunner(Judge(numbers), **wrong)


class Ranks:
    """A reward that sees groups: the share of its group that a sample's number is above. `fails` names groups."""

    name = "ranks"
    whole_groups: Literal[True] = True

    def __init__(self, fails: Sequence[str] = ()) -> None:
        self.calls: list[list[str]] = []
        self.fails = fails

    def fingerprint(self) -> str:
        return "ranks"

    def score(self, samples: Sequence[Sample]) -> list[Score]:
        self.calls.append([sample.sample_id for sample in samples])
        if any(sample.group_id in self.fails for sample in samples):
            raise OSError("no judge")
        groups = {
            sample.group_id: [one.row["n"] for one in samples if one.group_id == sample.group_id] for sample in samples
        }
        return [Score.ok(float(sorted(groups[s.group_id]).index(s.row["n"]))) for s in samples]


def grouped(names: str) -> list[Sample]:
    """A sample a letter, its group; its number is its place."""
    return [Sample(f"{name}{at}", name, "p", row={"n": at}) for at, name in enumerate(names)]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 99])
def test_a_reward_that_sees_groups_gets_each_of_them_whole(batch_size: int) -> None:
    reward = Ranks()
    scores = RewardRunner(reward, batch_size=batch_size, cache=9).score(grouped("ababacb"))
    assert [score.value for score in scores] == [0, 0, 1, 1, 2, 0, 2]
    calls = {
        1: ["a0 a2 a4", "b1 b3 b6", "c5"],
        2: ["a0 a2 a4", "b1 b3 b6", "c5"],
        3: ["a0 a2 a4", "b1 b3 b6", "c5"],
        5: ["a0 a2 a4", "b1 b3 b6 c5"],
        99: ["a0 a2 a4 b1 b3 b6 c5"],
    }
    assert [" ".join(call) for call in reward.calls] == calls[batch_size]


def test_copies_in_a_group_are_not_scored_as_one_and_no_rank_is_cached() -> None:
    reward = Ranks()
    runner = RewardRunner(reward, cache=9)
    twice = [Sample(str(at), "g", "p", row={"n": 1}) for at in range(2)]
    assert len(runner.score(twice)) == 2 and len(reward.calls[0]) == 2
    runner.score(twice)
    assert len(reward.calls) == 2 and runner.stats.cached == 0


def test_a_group_that_fails_costs_the_others_nothing() -> None:
    reward = Ranks(fails="b")
    runner = RewardRunner(reward, retries=0)
    scores = runner.score(grouped("abab"))
    assert [score.status for score in scores] == ["ok", "unavailable", "ok", "unavailable"]
    assert [" ".join(call) for call in reward.calls] == ["a0 a2 b1 b3", "a0 a2", "b1 b3"]
    assert runner.stats.unavailable == {"OSError": 2}
