"""Pairs in both orders and rankings in two: the arithmetic, a judge with a preference for a place, and failures."""

import json
import math
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rewards import build
from rewards.base import Sample, SeesGroups
from rewards.gold import HasGold, gold_check_pairs
from rewards.runner import RewardRunner
from rewards.verifier.answers import Answer, read_ranking
from rewards.verifier.errors import BadAnswerError
from rewards.verifier.pairwise import PairwiseReward, plan
from rewards.verifier.ranking import RankingReward
from tests.unit.test_verifier_stub import MODEL, Reply, pictures, says, serving, tokens, words


def member(level: int, group: str = "g", prompt: str = "a grey card", **fields: Any) -> Sample:
    """A picture whose grey level says how good it is."""
    return Sample(f"{group} {level}", group, prompt, (Image.new("RGB", (4, 4), (level,) * 3),), **fields)


def levels(body: dict[str, Any]) -> list[int]:
    return [int(np.asarray(one)[0, 0, 0]) for one in pictures(body)]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def prefers(bias: float) -> Any:
    """A judge of log-odds (difference of levels) / 40 + bias for the picture shown first."""

    def answer(body: dict[str, Any], number: int) -> Reply:
        first, second = levels(body)
        p = sigmoid((first - second) / 40 + bias)
        return tokens({"1": p, "2": 1 - p})

    return answer


def test_win_rates_are_those_of_an_unbiased_judge_however_it_prefers_the_first_place() -> None:
    group = [member(level) for level in (100, 200, 10, 150)]
    for bias in (0.0, 1.0, -1.0):
        with serving(prefers(bias)) as stub:
            scores = PairwiseReward(stub.client()).score(group)
        assert [score.value for score in scores] == pytest.approx([1 / 3, 1, 0, 2 / 3])
        assert len(stub.bodies) == 12, "six pairs, twice"
        for score in scores:
            assert np.sign(round(score.parts["position_bias"], 9)) == np.sign(bias) and score.parts["disagreement"] == 0


def test_parts_of_one_pair_by_hand() -> None:
    with serving(prefers(0.5)) as stub:
        better, worse = PairwiseReward(stub.client()).score([member(140), member(100)])
    first, second = sigmoid(1.5), sigmoid(-0.5)  # 140 shown first, then 100 shown first
    assert better.parts == pytest.approx(
        {
            "preference": (first + 1 - second) / 2,
            "position_bias": (first + second - 1) / 2,
            "disagreement": 0,
            "compared": 1,
        }
    )
    assert worse.parts["preference"] == pytest.approx(1 - better.parts["preference"])


def test_a_judge_that_looks_at_the_place_alone_makes_ties_or_nothing() -> None:
    group = [member(10), member(200)]
    with serving(prefers(20.0)) as stub:
        ties = PairwiseReward(stub.client()).score(group)
        none = PairwiseReward(stub.client(), disagreement="unavailable").score(group)
    assert [(score.value, score.parts["disagreement"]) for score in ties] == [(0.5, 1), (0.5, 1)]
    assert ties[0].parts["position_bias"] == pytest.approx(0.5, abs=0.01)
    assert {score.status for score in none} == {"unavailable"} and "the two orders disagree" in none[0].reason


@pytest.mark.parametrize(("count", "opponents"), [(8, 0), (8, 3), (8, 4), (8, 7), (5, 2), (2, 1), (4, 3), (4, 2)])
def test_a_ring_gives_everybody_the_same_number_of_opponents(count: int, opponents: int) -> None:
    pairs = plan(count, opponents)
    assert len(set(pairs)) == len(pairs) and all(i < j < count for i, j in pairs)
    met = [sum(me in pair for pair in pairs) for me in range(count)]
    assert len(set(met)) == 1 and (opponents or count - 1) <= met[0] <= (opponents + 1 if opponents else count - 1)


@pytest.mark.parametrize(("min_share", "scored"), [(0.3, 4), (0.5, 3), (0.6, 3), (0.7, 1)])
def test_failed_comparisons_leave_a_mean_over_the_others_while_enough_are_left(min_share: float, scored: int) -> None:
    def answer(body: dict[str, Any], number: int) -> Reply:
        # 10 fails against 100 and 150
        return says("?") if sorted(levels(body)) in ([10, 100], [10, 150]) else prefers(0)(body, number)

    group = [member(level) for level in (100, 200, 10, 150)]
    with serving(answer) as stub:
        scores = PairwiseReward(stub.client(), min_share=1 / 3).score(group)
        fewer = PairwiseReward(stub.client(), min_share=min_share).score(group)
    assert [score.value for score in scores] == pytest.approx([0, 1, 0, 0.5])
    assert [score.parts["compared"] for score in scores] == [2, 3, 1, 2]
    # of three comparisons 2, 3, 1 and 2 have an outcome
    assert sum(score.status == "ok" for score in fewer) == scored


JUDGES = ["pairwise", "ranking"]


def by_level(order: Any = None) -> Any:
    """A judge that ranks by level, or answers as `order` maps the levels shown."""

    def answer(body: dict[str, Any], number: int) -> Reply:
        shown = levels(body)
        if "response_format" not in body:
            return prefers(0)(body, number)
        ranks = sorted(range(len(shown)), key=lambda at: -shown[at]) if order is None else order(shown)
        return says(json.dumps({"reasoning": "seen", "ranking": [at + 1 for at in ranks]}))

    return answer


@pytest.mark.parametrize("name", JUDGES)
def test_groups_are_told_apart_and_scores_keep_the_samples_order(name: str) -> None:
    samples = [member(50, "a"), member(200, "b"), member(90, "a"), member(20, "b"), member(70, "a")]
    with serving(by_level()) as stub:
        reward = build(name, url=stub.url, model=MODEL)
        assert isinstance(reward, SeesGroups)
        alone = reward.score(samples)
        run = RewardRunner(reward, batch_size=1, cache=9).score(samples)
    assert [score.value for score in alone] == [0, 1, 1, 0, 0.5]
    assert [score.value for score in run] == [0, 1, 1, 0, 0.5]


@pytest.mark.parametrize("name", JUDGES)
def test_what_cannot_be_compared_is_unavailable_and_not_asked_about(name: str) -> None:
    source = (Image.new("RGB", (4, 4), "blue"),)
    broken = Sample("x", "d", "a grey card")
    samples = [
        member(9, "alone"),
        member(9, "prompts", "a"),
        member(8, "prompts", "b"),
        member(9, "sources", source_images=source),
        member(8, "sources"),
        broken,
        member(7, "d"),
        member(9, "d"),
    ]
    with serving(by_level()) as stub:
        scores = build(name, url=stub.url, model=MODEL).score(samples)
    assert [score.status for score in scores] == ["unavailable"] * 5 + ["invalid_output", "ok", "ok"]
    assert "and 1 can be judged" in scores[0].reason
    assert all("different prompts or edit different sources" in score.reason for score in scores[1:5])
    assert len(stub.bodies) == 2, "of the last group, the broken picture left out, in both orders"
    assert scores[7].value == 1


def test_a_ranking_shows_all_pictures_in_both_orders() -> None:
    group = [member(level) for level in (100, 200, 10)]
    with serving(by_level()) as stub:
        scores = RankingReward(stub.client()).score(group)
    assert sorted(levels(body) for body in stub.bodies) == [[10, 200, 100], [100, 200, 10]]
    assert [score.value for score in scores] == [0.5, 1, 0]
    assert scores[0].parts == {"agreement": 1, "position_bias": 0}
    schema = stub.bodies[0]["response_format"]["json_schema"]["schema"]["properties"]["ranking"]
    assert (schema["minItems"], schema["maxItems"], schema["items"]["maximum"]) == (3, 3, 3)
    assert "Picture 1:" in words(stub.bodies[0]) and "numbers 1 to 3" in words(stub.bodies[0])


def test_a_preference_for_early_places_is_measured_and_cancels() -> None:
    group = [member(level) for level in (100, 200, 10)]
    with serving(by_level(lambda shown: range(len(shown)))) as stub:
        none = RankingReward(stub.client()).score(group)
        ties = RankingReward(stub.client(), min_agreement=0).score(group)
    assert {score.status for score in none} == {"unavailable"} and "agree about 0.00 of the pairs" in none[0].reason
    assert [(score.value, score.parts["position_bias"]) for score in ties] == [(0.5, 0.5)] * 3


def test_two_that_the_orders_disagree_about_are_tied() -> None:
    # the best is always told; of the other two the one shown first is put above
    def order(shown: list[int]) -> list[int]:
        best = shown.index(200)
        return [best, *(at for at in range(3) if at != best)]

    with serving(by_level(order)) as stub:
        scores = RankingReward(stub.client()).score([member(level) for level in (100, 200, 10)])
    assert [score.value for score in scores] == [0.25, 1, 0.25]
    # 2 of 3 pairs agree; first-shown on top in 100-10 twice, in 100-200 once, in 200-10 once: 4 of 6
    assert scores[0].parts == pytest.approx({"agreement": 2 / 3, "position_bias": 4 / 6 - 0.5})


@pytest.mark.parametrize(
    "text",
    [
        '{"ranking": [1, 2]}',
        '{"ranking": [1, 2, 2]}',
        '{"ranking": [0, 1, 2]}',
        '{"ranking": [1, 2, 4]}',
        '{"ranking": [1, 2, 3, 3]}',
        '{"ranking": ["1", "2", "3"]}',
        '{"ranking": [1.0, 2.0, 3.0]}',
        '{"ranking": [true, 2, 3]}',
        '{"ranking": "123"}',
        '{"rank": [1, 2, 3]}',
        "[1, 2, 3]",
        "1 > 2 > 3",
        "",
    ],
)
def test_what_is_no_ranking_is_asked_for_again_and_then_unavailable(text: str) -> None:
    with pytest.raises(BadAnswerError):
        read_ranking(Answer(text, "stop"), 3)
    with serving(says(text)) as stub:
        scores = RankingReward(stub.client(), reasks=1).score([member(level) for level in (1, 2, 3)])
    assert {(score.status, score.value) for score in scores} == {("unavailable", None)}
    assert len(stub.bodies) == 4 and scores[0].reason.startswith("asked twice: ")


@pytest.mark.parametrize("name", JUDGES)
def test_a_dead_server_gives_no_numbers(name: str) -> None:
    with serving(Reply({}, status=500)) as stub:
        judge = build(name, url=stub.url, model=MODEL, check=False, retries=0)
        scores = judge.score([member(1), member(2)])
    assert {(score.status, score.value) for score in scores} == {("unavailable", None)}
    assert "500" in scores[0].reason


def looks(body: dict[str, Any], number: int) -> Reply:
    red = [one.getpixel((144, 144))[0] for one in pictures(body)]  # type: ignore[index]
    if "response_format" in body:
        ranks = sorted(range(len(red)), key=lambda at: -red[at])
        return says(json.dumps({"reasoning": "", "ranking": [at + 1 for at in ranks]}))
    return tokens({"1": 0.9, "2": 0.1} if red[0] > red[1] else {"1": 0.2, "2": 0.8})


@pytest.mark.parametrize("name", JUDGES)
def test_gold_pairs_tell_a_judge_that_looks_from_one_that_does_not(name: str) -> None:
    for answer, passes in ((looks, True), (by_level(lambda shown: range(len(shown))), False)):
        with serving(answer if passes or name == "ranking" else tokens({"1": 0.9, "2": 0.1})) as stub:
            judge = build(name, url=stub.url, model=MODEL)
            assert isinstance(judge, HasGold)
            assert gold_check_pairs(judge, judge.gold()).passed is passes


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("pairwise", {"better": "overal"}, "Nearest: overall"),
        ("ranking", {"better": "look"}, "Nearest: looks"),
        ("pairwise", {"disagreement": "ties"}, "Nearest: tie"),
        ("pairwise", {"min_share": 0}, r"min_share in \(0, 1\]"),
        ("ranking", {"min_agreement": 2}, r"min_agreement in \[0, 1\]"),
        ("ranking", {"reasks": 9}, "reasks 0 to 2"),
    ],
)
def test_options_that_cannot_work_say_why(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(name, url="http://127.0.0.1:9", model=MODEL, check=False, **options)


@pytest.mark.parametrize("name", JUDGES)
def test_own_words_for_better_reach_the_judge_and_the_fingerprint(name: str) -> None:
    with serving(by_level()) as stub:
        own = build(name, url=stub.url, model=MODEL, better="has {more} grey")
        own.score([member(1), member(2)])
        plain = build(name, url=stub.url, model=MODEL)
    assert "has {more} grey" in words(stub.bodies[0]) and own.fingerprint() != plain.fingerprint()
