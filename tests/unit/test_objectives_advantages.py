"""Group advantages against numbers worked out by hand."""

from typing import Any

import numpy as np
import pytest

from rlmm.objectives.advantages import AdvantageResult, group_advantages
from rlmm.objectives.records import Baseline, Scale

NAN = float("nan")


def advantages(
    reward: list[float], group: list[Any], valid: list[bool] | None = None, **options: Any
) -> AdvantageResult:
    settings: dict[str, Any] = {"baseline": "mean", "scale": "none"} | options
    return group_advantages(reward, [True] * len(reward) if valid is None else valid, group, **settings)


@pytest.mark.parametrize(
    ("baseline", "scale", "expected"),
    [
        ("mean", "none", [-2, 0, 2, -3, 3]),
        ("leave_one_out", "none", [-3, 0, 3, -6, 6]),
        ("mean", "group_std", [-1, 0, 1, -(0.5**0.5), 0.5**0.5]),
        # rewards 1 3 5 10 16: mean 7, squared deviations 36 16 4 9 81, over 4
        ("mean", "batch_std", np.array([-2, 0, 2, -3, 3]) / (146 / 4) ** 0.5),
        ("batch_mean", "batch_std", np.array([-6, -4, -2, 3, 9]) / (146 / 4) ** 0.5),
        ("batch_mean", "none", [-6, -4, -2, 3, 9]),
    ],
)
def test_closed_forms(baseline: Baseline, scale: Scale, expected: Any) -> None:
    result = advantages([1, 3, 5, 10, 16], ["a", "a", "a", "b", "b"], baseline=baseline, scale=scale)
    np.testing.assert_allclose(result.advantage_B, np.asarray(expected, float), rtol=1e-14)
    assert result.kept_B.all() and result.groups == 2 and result.flat_share == 0


def test_under_a_batch_mean_a_group_without_spread_teaches_and_a_step_without_spread_does_not() -> None:
    result = advantages([1, 1, 3, 3], [0, 0, 1, 1], baseline="batch_mean", flat_groups="drop")
    np.testing.assert_array_equal(result.advantage_B, [-1, -1, 1, 1])
    assert result.kept_B.all() and result.flat_groups == 0
    flat = advantages([2, 2, 2, 2], [0, 0, 1, 1], baseline="batch_mean", scale="batch_std", flat_groups="drop")
    assert not flat.kept_B.any() and not flat.advantage_B.any() and flat.flat_groups == 2


def test_unavailable_rewards_leave_the_statistics() -> None:
    # The group is {1, 5} for its mean, its std and its leave-one-out baseline alike.
    reward, group, valid = [1, NAN, 5, 1e9], [0, 0, 0, 0], [True, False, True, False]
    result = advantages(reward, group, valid, baseline="leave_one_out")
    np.testing.assert_array_equal(result.advantage_B, [-4, 0, 4, 0])
    np.testing.assert_array_equal(result.kept_B, [True, False, True, False])
    assert result.unavailable == 2
    scaled = advantages(reward, group, valid, scale="group_std")
    np.testing.assert_allclose(scaled.advantage_B, [-(0.5**0.5), 0, 0.5**0.5, 0])


def test_group_with_one_available_reward_is_skipped() -> None:
    result = advantages([1, NAN, 2, 4, NAN], [0, 0, 1, 1, 2], [True, False, True, True, False], scale="batch_std")
    np.testing.assert_array_equal(result.kept_B, [False, False, True, True, False])
    assert (result.groups, result.small_groups, result.unavailable) == (1, 2, 2)
    np.testing.assert_allclose(result.advantage_B[2:4], [-(0.5**0.5), 0.5**0.5])  # the lone 1 is in no statistic


@pytest.mark.parametrize(("flat_groups", "kept"), [("drop", False), ("count", True)])
def test_flat_groups_give_no_gradient_and_are_counted(flat_groups: str, kept: bool) -> None:
    # 0.1 + 0.1 + 0.1 rounds to something else than 0.3: equality must not depend on it
    result = advantages(
        [0.1, 0.1, 0.1, 0, 1, 0],
        [7, 7, 7, 8, 8, 8],
        scale="group_std",
        std_floor=0.0,
        flat_groups=flat_groups,
    )
    np.testing.assert_array_equal(result.advantage_B[:3], 0)
    np.testing.assert_array_equal(result.kept_B, [kept] * 3 + [True] * 3)
    assert (result.flat_groups, result.flat_share) == (1, 0.5)


def test_std_floor_is_in_units_of_the_reward() -> None:
    reward, group = [0.50, 0.51, 0.0, 1.0], [0, 0, 1, 1]
    assert advantages(reward, group, scale="group_std").flat_groups == 0
    result = advantages(reward, group, scale="group_std", std_floor=0.05)
    assert result.flat_groups == 1
    np.testing.assert_array_equal(result.kept_B, [False, False, True, True])


@pytest.mark.parametrize("scale", ["group_std", "batch_std", "none"])
def test_row_order_does_not_matter_to_the_last_bit(scale: Scale) -> None:
    generator = np.random.default_rng(0)
    reward, group = generator.normal(size=120) * 10.0 ** generator.integers(-6, 6, 120), np.arange(120) % 9
    valid = generator.random(120) > 0.2
    whole = group_advantages(reward, valid, group, baseline="mean", scale=scale)
    for _ in range(5):
        order = generator.permutation(120)
        mixed = group_advantages(reward[order], valid[order], group[order], baseline="mean", scale=scale)
        np.testing.assert_array_equal(mixed.advantage_B, whole.advantage_B[order])
        np.testing.assert_array_equal(mixed.kept_B, whole.kept_B[order])


def test_clip_bounds_and_counts() -> None:
    result = advantages([0, 10, 4, 6], [0, 0, 1, 1], clip=2.0)
    np.testing.assert_array_equal(result.advantage_B, [-2, 2, -1, 1])
    assert result.clipped == 2


def test_nothing_available() -> None:
    result = advantages([NAN, NAN], [0, 0], [False, False])
    assert not result.kept_B.any() and result.groups == 0 and result.flat_share == 0
    assert len(advantages([], []).advantage_B) == 0


def test_a_number_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match=r"1 available rewards are not finite, first at rows \[1\]"):
        advantages([1.0, NAN], [0, 0])
    with pytest.raises(ValueError, match="equal length"):
        advantages([1.0, 2.0], [0])
