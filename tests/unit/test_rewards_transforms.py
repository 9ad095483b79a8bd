"""Transforms by hand, group maths against a NumPy oracle, and what a failure policy lets pass."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rewards.base import Sample, Score
from rewards.compose import CompositeReward, Gate, Term
from rewards.failures import FailurePolicy, RewardFailureError
from rewards.runner import RewardRunner
from rewards.transforms import Sigmoid, by_group, ranks, zscores
from rlmm.objectives.advantages import group_advantages
from rlmm.objectives.records import Baseline, Scale
from rlmm.train.experience import totals

SOURCES = {name: Image.new("RGB", (4, 4), name) for name in ("red", "blue", "green")}
# Uneven groups; `a` and `b` have one prompt and different sources; `flat` has equal rewards, `lone` one member,
# `down` no score at all.
GROUPS = ["a"] * 5 + ["b"] * 4 + ["flat"] * 3 + ["c"] * 6 + ["lone"] + ["down"] * 2
PROMPTS = {"a": "paint it red", "b": "paint it red"}
OWN_SOURCE = {"a": "red", "b": "blue"}


def batch(order: Sequence[int] | None = None) -> list[Sample]:
    samples = [
        Sample(
            f"{group}/{at}",
            group,
            PROMPTS.get(group, "a cat"),
            (Image.new("RGB", (4, 4), (at, 0, 0)),),
            source_images=(SOURCES[OWN_SOURCE.get(group, "green")],),
        )
        for at, group in enumerate(GROUPS)
    ]
    return samples if order is None else [samples[at] for at in order]


class Table:
    """A reward that says what a table says of a sample's place; None where it fails."""

    def __init__(self, name: str, values: dict[str, float | None]) -> None:
        self.name, self.values = name, values

    def fingerprint(self) -> str:
        return self.name

    def score(self, samples: Sequence[Sample]) -> list[Any]:
        return [self.values[sample.sample_id] for sample in samples]


def tables(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Two terms' raw values [2, B], NaN where they failed, and which group each is of."""
    chance = np.random.default_rng(seed)
    raw = chance.normal(size=(2, len(GROUPS))) * [[1.0], [50.0]]
    raw[chance.random(raw.shape) < 0.15] = np.nan
    groups = np.array(GROUPS)
    raw[:, groups == "flat"] = [[0.25], [7.0]]
    raw[:, groups == "down"] = np.nan
    return raw, groups


def composite(raw: np.ndarray, **options: Any) -> CompositeReward:
    ids = [sample.sample_id for sample in batch()]
    runners = [
        RewardRunner(Table(name, {i: None if np.isnan(v) else float(v) for i, v in zip(ids, row, strict=True)}))
        for name, row in zip("xy", raw, strict=True)
    ]
    transforms = options.pop("in_group", ("", ""))
    terms = [Term(r.reward.name, r, w, in_group=t) for r, w, t in zip(runners, (1.0, 0.5), transforms, strict=True)]
    return CompositeReward(terms, **options)


def test_a_sigmoid_by_hand_and_far_from_its_centre() -> None:
    assert Sigmoid(2.0, 0.5)(2.0) == 0.5
    assert Sigmoid(2.0, 0.5)(2.5) == pytest.approx(1 / (1 + np.exp(-1)))
    assert Sigmoid(2.0, -0.5)(2.5) == pytest.approx(1 / (1 + np.exp(1)))
    assert (Sigmoid(0, 1e-3)(1e9), Sigmoid(0, 1e-3)(-1e9)) == (1, 0)
    with pytest.raises(ValueError, match="no width 0"):
        Sigmoid(0, 0)


def test_ranks_and_z_scores_by_hand() -> None:
    assert ranks([3.0, 1.0, 2.0]) == [1, 0, 0.5]
    assert ranks([1.0, 5.0, 5.0, 9.0]) == pytest.approx([0, 0.5, 0.5, 1])
    assert ranks([4.0]) == [0.5] and ranks([2.0, 2.0]) == [0.5, 0.5] and ranks([]) == []
    assert zscores([1.0, 2.0, 3.0]) == [-1, 0, 1]
    assert zscores([0.1] * 3) == [0, 0, 0] and zscores([7.0]) == [0] and zscores([]) == []
    assert by_group(["g", "h", "g"], [1.0, 5.0, 2.0], ranks) == [0, 0.5, 1]


@pytest.mark.parametrize("scale", ["group_std", "batch_std", "none"])
@pytest.mark.parametrize("baseline", ["mean", "leave_one_out", "batch_mean"])
@pytest.mark.parametrize("seed", range(3))
def test_advantages_of_a_step_are_the_oracles(baseline: Baseline, scale: Scale, seed: int) -> None:
    """Failed members, uneven groups and equal rewards, and groups told apart by id where their prompts are the same."""
    if baseline == "batch_mean" and scale == "group_std":
        scale = "batch_std"  # the other is refused when a recipe is read
    raw, groups = tables(seed)
    order = np.random.default_rng(seed).permutation(len(GROUPS))
    scored = composite(raw).score(batch(order.tolist()))
    reward, valid = totals(scored, penalty=0.0)
    found = group_advantages(reward, valid, groups[order], baseline=baseline, scale=scale, flat_groups="drop")

    total = raw[0] + 0.5 * raw[1]
    members = {name: np.flatnonzero((groups == name) & ~np.isnan(total)) for name in dict.fromkeys(GROUPS)}
    judged = {name: rows for name, rows in members.items() if len(rows) > 1}
    every = total[np.concatenate(list(judged.values()))]
    wanted, kept = np.zeros(len(total)), np.zeros(len(total), bool)
    for rows in judged.values():
        own = total[rows]
        if baseline != "batch_mean" and own.std() < 1e-9:
            continue
        centre = {"mean": own.mean(), "batch_mean": every.mean()}.get(baseline, (own.sum() - own) / (len(own) - 1))
        divisor = {"group_std": own.std(ddof=1), "batch_std": every.std(ddof=1), "none": 1.0}[scale]
        wanted[rows], kept[rows] = (own - centre) / divisor, True
    np.testing.assert_allclose(found.advantage_B, wanted[order], rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(found.kept_B, kept[order])
    assert found.unavailable == np.isnan(total).sum()


@pytest.mark.parametrize("seed", range(3))
def test_terms_normalised_before_their_sum_are_the_oracles(seed: int) -> None:
    """GDPO: z-scores of each term over the group's judged members, weighed and summed; then the batch's scale."""
    raw, groups = tables(seed)
    scored = composite(raw, normalise_terms=True).score(batch())
    reward, valid = totals(scored, penalty=0.0)
    there = ~np.isnan(raw).any(0)
    wanted = np.zeros(len(GROUPS))
    for name in dict.fromkeys(GROUPS):
        rows = np.flatnonzero((groups == name) & there)
        for row, weight in zip(raw, (1.0, 0.5), strict=True):
            std = row[rows].std(ddof=1) if len(rows) > 1 else 0.0
            wanted[rows] += weight * (row[rows] - row[rows].mean()) / std if std > 1e-9 else 0.0
    np.testing.assert_array_equal(valid, there)
    np.testing.assert_allclose(reward, wanted, rtol=1e-12, atol=1e-12)
    found = group_advantages(reward, valid, groups, baseline="mean", scale="batch_std")
    judged = there & np.isin(groups, [g for g in dict.fromkeys(GROUPS) if (there & (groups == g)).sum() > 1])
    judged_std = wanted[judged].std(ddof=1)
    np.testing.assert_allclose(found.advantage_B[judged], wanted[judged] / judged_std, rtol=1e-9, atol=1e-12)


def test_without_normalising_a_wide_term_outweighs_a_narrow_one_and_with_it_weights_are_what_they_say() -> None:
    raw, groups = tables(0)
    raw = np.nan_to_num(raw)
    share = {}
    for terms in (False, True):
        reward = totals(composite(raw, normalise_terms=terms).score(batch()), 0.0)[0]
        rows = groups == "c"
        share[terms] = abs(np.corrcoef(reward[rows], raw[0, rows])[0, 1])
    assert share[False] < 0.5 < share[True]


def test_ranks_are_among_those_that_every_term_judged_and_no_gate_shut_out() -> None:
    raw = np.zeros((2, len(GROUPS)))
    raw[0, :5] = [5, 4, 3, 2, 1]
    raw[1, :5] = [1, np.nan, 1, -1, 1]  # the second has no score, the fourth is shut out
    gated = composite(raw, in_group=("rank", ""), gates=[Gate("y", 0.0, floor=-9.0)])
    scored = gated.score(batch())[:5]
    assert [one.total.value for one in scored] == [1.5, None, 1.0, -9, 0.5]
    assert [one.terms["x"].value for one in scored] == [5, 4, 3, 2, 1], "the log has the raw values"


@pytest.mark.parametrize(
    ("ceiling", "failed", "stops"), [(1, 4, False), (0, 0, False), (0, 1, True), (0.25, 1, False), (0.25, 2, True)]
)
def test_a_failure_policy_lets_a_share_pass(ceiling: float, failed: int, stops: bool) -> None:
    scores = [Score.unavailable("no mass")] * failed + [Score.invalid_output("torn")] * (4 - failed)
    if not stops:
        FailurePolicy(ceiling).check(scores)
        return
    with pytest.raises(RewardFailureError, match=rf"{failed} of 4 samples.*no mass \({failed} times\)"):
        FailurePolicy(ceiling).check(scores)


def test_a_composite_is_held_to_its_policy_where_a_rollout_is_scored_at_once() -> None:
    raw = tables(0)[0]
    judged = composite(raw).checked(batch())
    failed = sum(one.total.status == "unavailable" for one in judged)
    assert 0 < failed < len(judged)
    composite(raw, failures=FailurePolicy(failed / len(judged))).checked(batch())
    with pytest.raises(RewardFailureError, match=f"{failed} of {len(judged)} samples have no score"):
        composite(raw, failures=FailurePolicy((failed - 1) / len(judged))).checked(batch())
