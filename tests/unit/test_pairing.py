"""Which samples of a prompt make a pair."""

from collections import Counter

import pytest

from rlmm.config.pairs import PairsStage
from rlmm.config.settings import read_settings
from rlmm.train.drawn import NAMED, Drawn
from rlmm.train.pairing import CLOSE, DUPLICATE, FEW, UNENDED, UNSCORED, Candidate, LeftOut, choose_pairs, distance
from rlmm.train.pairs import pair_groups


def test_a_setting_that_there_is_not_is_told_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="^the settings do not fit: unknown key 'margn'. Nearest: margin"):
        read_settings(PairsStage, ["margn=0.1"], "margin=0.1")
    with pytest.raises(ValueError, match=r"do not fit: margin: .* greater than or equal to 0 \(given: -1\)"):
        read_settings(PairsStage, ["margin=-1"], "margin=0.1")


def candidates(*scores: float | None) -> list[Candidate]:
    return [Candidate(score, [number] * 4) for number, score in enumerate(scores)]


def choose(
    given: list[Candidate], count: int = 1, margin: float = 0.0, duplicate_distance: float = 0.0
) -> tuple[list[tuple[int, int]], Counter[str]]:
    pairs, left_out = choose_pairs(given, count=count, margin=margin, duplicate_distance=duplicate_distance)
    return pairs, Counter(one.reason for one in left_out)


def test_the_best_stands_against_the_worst_and_no_sample_twice() -> None:
    given = candidates(0.3, 0.9, 0.1, 0.6, 0.5)
    assert choose(given) == ([(1, 2)], {})
    assert choose(given, count=2) == ([(1, 2), (3, 0)], {})
    assert choose(given, count=9) == ([(1, 2), (3, 0)], {})  # the middle one has nobody left


def test_of_equal_scores_the_earlier_is_the_better_and_makes_no_pair_with_its_equal() -> None:
    assert choose(candidates(0.5, 0.9, 0.9, 0.5))[0] == [(1, 3)]
    assert choose(candidates(0.5, 0.5)) == ([], {CLOSE: 1})


def test_a_margin_must_be_passed() -> None:
    given = candidates(1.0, 0.5, 0.25, 0.0)
    assert choose(given, count=2, margin=0.25) == ([(0, 3)], {CLOSE: 1})
    assert choose(given, count=2, margin=0.24)[0] == [(0, 3), (1, 2)]


def test_samples_without_a_score_take_no_part() -> None:
    assert choose(candidates(None, 0.4, None, 0.2)) == ([(1, 3)], {UNSCORED: 2})
    assert choose(candidates(None, 0.4)) == ([], {UNSCORED: 1, FEW: 1})


def test_near_duplicates_are_left_out() -> None:
    given = [
        Candidate(0.9, [1, 2, 3, 4]),
        Candidate(0.1, [1, 2, 3, 5]),  # a quarter away from the first
        Candidate(0.5, [6, 7, 8, 9]),
        Candidate(0.7, [6, 7, 8, 9]),  # the same as another one
    ]
    assert choose(given) == ([(0, 1)], {DUPLICATE: 1})
    assert choose(given, duplicate_distance=0.25) == ([(0, 2)], {DUPLICATE: 2})


def test_texts_that_were_cut_are_left_out() -> None:
    given = [Candidate(0.9, [1], ended=False), Candidate(0.5, [2]), Candidate(0.1, [3])]
    assert choose(given) == ([(1, 2)], {UNENDED: 1})


def test_what_is_left_out_says_which() -> None:
    given = [*candidates(None, 0.5, 0.5), Candidate(0.7, [1] * 4)]
    _, left_out = choose_pairs(given, count=1, margin=0.0, duplicate_distance=0.0)
    assert left_out == [LeftOut(UNSCORED, (0,)), LeftOut(DUPLICATE, (3,)), LeftOut(CLOSE, (1, 2))]
    _, left_out = choose_pairs(candidates(0.5), count=1, margin=0.0, duplicate_distance=0.0)
    assert left_out == [LeftOut(FEW)]


def drawn(group: int, candidates: list[Candidate]) -> list[Drawn]:
    return [
        Drawn(
            f"{group}/{i}",
            str(group),
            f"word {group}",
            image=None,
            codes=None,
            text=None,
            candidate=one,
            sources=(),
            weights_version=0,
            law="",
            file="",
        )
        for i, one in enumerate(candidates)
    ]


def test_the_first_that_are_left_out_are_named_by_sample_and_prompt() -> None:
    groups = [drawn(group, candidates(None, 0.5, 0.25)) for group in range(NAMED + 2)]
    found = pair_groups(iter([*groups, drawn(99, candidates(0.5))]), PairsStage(margin=0.25))
    assert found.left_out == {UNSCORED: NAMED + 2, CLOSE: NAMED + 2, FEW: 1} and found.without == NAMED + 3
    assert found.named[:2] == [f"0/0: {UNSCORED}; prompt 'word 0'", f"0/1 and 0/2: {CLOSE} (0.25); prompt 'word 0'"]
    assert found.named[-1] == f"99: {FEW}; prompt 'word 99'" and len(found.named) == 2 * NAMED + 1


def test_distance_counts_what_only_the_longer_one_has() -> None:
    assert distance([1, 2, 3], [1, 2, 3]) == 0
    assert distance([1, 2], [1, 2, 3, 4]) == 0.5
    assert distance([1, 2, 3, 4], [4, 3, 2, 1]) == 1
