"""Bootstrap intervals and diversity figures."""

from math import isnan

import numpy as np
import pytest

from rlmm.evaluation.statistics import (
    bootstrap_mean,
    distinct_share,
    diversity,
    duplicate_share,
    paired_difference,
)

NAN = float("nan")


def test_mean_gives_every_prompt_the_same_weight_and_counts_what_is_missing() -> None:
    interval = bootstrap_mean([[1.0, NAN, NAN], [0.0, 0.0, 0.0], [NAN, NAN, NAN]])
    assert (interval.mean, interval.prompts, interval.excluded) == (0.5, 2, 5)


def test_interval_matches_the_normal_one_for_many_prompts() -> None:
    values = np.random.default_rng(0).normal(3, 2, size=(400, 1))
    interval = bootstrap_mean(values, n=4000)
    half = 1.96 * values.std(ddof=1) / 20
    assert interval.low == pytest.approx(values.mean() - half, abs=0.05 * half * 2)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.05 * half * 2)
    narrow = bootstrap_mean(values, n=4000, confidence=0.5)
    assert (narrow.high - narrow.low) / (interval.high - interval.low) == pytest.approx(0.6745 / 1.96, abs=0.04)


def test_interval_covers_at_its_rate_when_the_seeds_of_a_prompt_agree() -> None:
    """Prompts differ, their seeds hardly do: resampling values instead of prompts would cover far below
    95%."""
    covered = 0
    for trial in range(200):
        generator = np.random.default_rng(trial)
        values = generator.normal(size=(40, 1)) + generator.normal(size=(40, 8)) * 0.1
        interval = bootstrap_mean(values, n=300, seed=trial)
        covered += interval.low <= 0 <= interval.high
    assert 0.88 <= covered / 200 <= 0.99


def test_seed_fixes_the_interval_and_prompt_order_only_its_noise() -> None:
    values = np.random.default_rng(1).random((30, 2))
    assert bootstrap_mean(values, seed=4) == bootstrap_mean(values, seed=4)
    assert bootstrap_mean(values, seed=4).low != bootstrap_mean(values, seed=5).low


def test_paired_difference_removes_what_prompts_share() -> None:
    generator = np.random.default_rng(2)
    prompt = generator.normal(size=(50, 1)) * 10
    a, b = prompt + generator.normal(size=(50, 3)) + 1, prompt + generator.normal(size=(50, 3))
    interval = paired_difference(a, b)
    assert interval.mean == pytest.approx(1, abs=0.5) and interval.low > 0
    assert interval.high - interval.low < (bootstrap_mean(a).high - bootstrap_mean(a).low) / 5
    swapped = paired_difference(b, a)
    assert swapped.mean == pytest.approx(-interval.mean)


def test_paired_difference_leaves_out_cells_missing_in_either() -> None:
    interval = paired_difference([[1.0, 9.0], [2.0, 2.0]], [[0.0, NAN], [NAN, 1.0]])
    assert (interval.mean, interval.excluded) == (1.0, 2)
    with pytest.raises(ValueError, match="cannot be paired"):
        paired_difference([[1.0]], [[1.0, 2.0]])


def test_one_prompt_has_a_mean_and_no_interval() -> None:
    interval = bootstrap_mean([[1.0, 2.0]])
    assert interval.mean == 1.5 and isnan(interval.low) and isnan(interval.high)


@pytest.mark.parametrize(
    ("values", "message"),
    [([[NAN]], "no value is available"), ([[float("inf")]], "finite"), ([[[1.0]]], "shape")],
)
def test_bad_values_are_refused(values: list[object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bootstrap_mean(values)


def test_distinct_share() -> None:
    assert distinct_share(["a", "b", "a", "a"]) == 0.5
    with pytest.raises(ValueError, match="no items"):
        distinct_share([])


IDS = np.array([[1, 2, 3, 4], [1, 2, 9, 9], [1, 2, 3, 4], [1, 2, 3, 4], [5, 6, 7, 8]])
ALL = np.ones(IDS.shape, bool)


def test_duplicates_count_within_their_group_only() -> None:
    assert duplicate_share(IDS, ALL, ["a", "a", "a", "b", "b"]) == 1 / 3
    assert duplicate_share(IDS, ALL, [0] * 5) == 2 / 4
    # rows that differ only where nothing was decided are duplicates
    decided = ALL & (np.arange(4) < 2)
    assert duplicate_share(IDS, decided, ["a", "a", "a", "b", "b"]) == 2 / 3
    assert duplicate_share([[1, 2]] * 6, [[True, True]] * 6, [0, 0, 0, 1, 1, 2]) == 1


def test_diversity_is_the_mean_pairwise_share_of_differing_tokens() -> None:
    # group a: pairs differ in 2, 0, 2 of 4; group b: in 4 of 4
    assert diversity(IDS, ALL, ["a", "a", "a", "b", "b"]) == pytest.approx((1 / 3 + 1) / 2)
    assert isnan(diversity(IDS[:1], ALL[:1], [0]))


def test_diversity_counts_a_length_difference_and_leaves_out_padding() -> None:
    ids, decided = np.array([[1, 2, 0, 0], [1, 0, 0, 0]]), np.array([[1, 1, 0, 0], [1, 0, 0, 0]]).astype(bool)
    assert diversity(ids, decided, [0, 0]) == 0.5
    assert diversity(ids, np.zeros((2, 4), bool), [0, 0]) == 0
    with pytest.raises(ValueError, match="do not fit"):
        diversity(ids, decided, [0])
