"""Orders of unmasking: counts, plans of policy-free orders, what is refused, and the annealed noise."""

import pytest
import torch
from pydantic import ValidationError

from rlmm.config.masked import NoiseConfig
from rollouts.law import Law
from rollouts.schedules import Schedule, masked_share
from rollouts.trajectory import Span
from rollouts.unmasking import (
    Unmasking,
    block_steps,
    keep_confident,
    masked_counts,
    noise_scale,
    order_log_probs,
    planned_steps,
)

SCHEDULES = ("linear", "cosine", "square", "1 - t**0.5", "1-t**3")


def everywhere(rows: int, length: int) -> torch.Tensor:
    return torch.ones(rows, length, dtype=torch.bool)


def test_a_row_with_given_tokens_takes_as_many_steps_as_it_can() -> None:
    masked = torch.tensor([[True] * 6, [False, True, False, False, True, False], [False] * 6])
    steps = planned_steps(Unmasking(4, schedule="linear"), masked, [1, 2, 3])
    assert sorted(steps[1, [1, 4]].tolist()) == [0, 1] and steps[2].tolist() == [0] * 6
    assert len(steps[0].unique()) == 4
    with pytest.raises(ValueError, match="at most 6"):
        planned_steps(Unmasking(7), masked, [1, 2, 3])


def test_given_tokens_leave_the_blocks_where_they_are() -> None:
    masked = torch.tensor([[True, False, True, True, True, True]])
    steps = planned_steps(Unmasking(4, "blocks", block=4, schedule="linear"), masked, [1])[0]
    assert steps[[0, 2, 3]].max() < steps[[4, 5]].min() and len(steps[masked[0]].unique()) == 4
    full = torch.tensor([[True, False, False, False, False, True]])
    assert planned_steps(Unmasking(4, "blocks", block=4), full, [1])[0].tolist() == [0, 0, 0, 0, 0, 1]


def test_what_is_as_likely_as_the_floor_is_worse_only_after_it() -> None:
    """Two positions that are all but certain, of which the first was kept: nothing had to happen at the other."""
    certain = torch.tensor([[0.0, -17.0], [-1e-7, -17.0]])
    how, rows = Unmasking(2, "confidence"), torch.zeros(2, dtype=torch.long)
    tokens = torch.zeros(2, dtype=torch.long)
    first = order_log_probs(how, certain, tokens, rows, torch.tensor([True, False]), 1)
    second = order_log_probs(how, certain, tokens, rows, torch.tensor([False, True]), 1)
    assert float(first) == pytest.approx(0, abs=1e-6) and float(second) == pytest.approx(-17, abs=1e-6)
    assert keep_confident(how, torch.tensor([[-1e-7, 0.0]]), everywhere(1, 2), 0, [1, 0]).tolist() == [[True, False]]


def test_a_schedule_is_a_name_or_a_formula() -> None:
    assert [masked_share("1 - t**3", t) for t in (0.0, 0.5, 1.0)] == [1, 0.875, 0]
    assert masked_share("1 - t**1", 0.3) == masked_share("linear", 0.3) != masked_share("1 - t**.5", 0.3)
    for schedule in ("sine", "1 - t**0", "1 - t**-2", "2 - t**2", "1 - t**x"):
        with pytest.raises(ValueError, match="no formula"):
            Unmasking(4, schedule=schedule)
        with pytest.raises(ValidationError, match="no formula"):
            NoiseConfig(schedule=schedule)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("steps", "length"), [(1, 1), (1, 24), (8, 24), (12, 256), (24, 24), (7, 9)])
def test_every_step_reveals_something_and_the_last_leaves_nothing(schedule: Schedule, steps: int, length: int) -> None:
    counts = [length, *masked_counts(schedule, steps, length)]
    assert len(counts) == steps + 1 and counts[-1] == 0
    assert all(after < before for before, after in zip(counts, counts[1:], strict=False))


def test_counts_follow_the_schedule() -> None:
    assert masked_counts("linear", 4, 24) == [18, 12, 6, 0]
    assert masked_counts("cosine", 4, 24) == [22, 17, 9, 0]  # 24 cos(pi/2 t) at t = 1/4, 1/2, 3/4, 1
    assert masked_counts("square", 2, 100) == [75, 0]
    with pytest.raises(ValueError, match="at most 3"):
        masked_counts("linear", 4, 3)


@pytest.mark.parametrize(
    "unmasking",
    [Unmasking(4), Unmasking(6, "blocks", block=5), Unmasking(5, "ancestral"), Unmasking(24, schedule="linear")],
)
def test_a_plan_is_a_function_of_the_rows_seed_and_decides_each_position_once(unmasking: Unmasking) -> None:
    decided = [i for i in range(26) if i % 13 != 12]
    masked = torch.zeros(3, 26, dtype=torch.bool)
    masked[:, decided] = True
    whole = planned_steps(unmasking, masked, [5, 1 << 62, 7], decided)
    assert whole[[1, 2]].equal(planned_steps(unmasking, masked[:2], [1 << 62, 7], decided))
    assert (whole[:, [12, 25]] == 0).all()
    assert whole.min() >= 0 and whole.max() < unmasking.steps
    assert not whole[0].equal(whole[2])
    if unmasking.order == "random":
        counts = masked_counts(unmasking.schedule, unmasking.steps, 24)
        for row in whole[:, decided]:
            assert [int((row > step).sum()) for step in range(unmasking.steps)] == counts


def test_blocks_come_one_after_the_other() -> None:
    steps = planned_steps(Unmasking(6, "blocks", block=4, schedule="linear"), everywhere(2, 12), [1, 2])
    assert steps.view(2, 3, 4).sort(-1).values.tolist() == [[[0, 0, 1, 1], [2, 2, 3, 3], [4, 4, 5, 5]]] * 2
    assert block_steps(7, [4, 4, 4]) == [3, 2, 2] and block_steps(5, [4, 2]) == [3, 2]
    assert block_steps(6, [4, 2]) == [4, 2] and block_steps(2, [4, 1]) == [1, 1]
    with pytest.raises(ValueError, match="between 3 and 12 steps"):
        block_steps(2, [4, 4, 4])


def test_the_ancestral_order_masks_each_position_with_the_schedules_chance() -> None:
    steps = planned_steps(Unmasking(4, "ancestral", schedule="cosine"), everywhere(400, 50), range(400))
    for step in range(3):
        wanted = masked_share("cosine", (step + 1) / 4)
        found = float((steps > step).double().mean())
        assert abs(found - wanted) < 4 * (wanted * (1 - wanted) / 20_000) ** 0.5


def test_orders_of_rows_are_uniform() -> None:
    steps = planned_steps(Unmasking(3, schedule="linear"), everywhere(6000, 3), range(6000))
    counts = torch.bincount((steps * torch.tensor([9, 3, 1])).sum(1))
    assert sorted(counts[counts > 0].tolist()) and len(counts[counts > 0]) == 6
    assert float((counts[counts > 0] - 1000).abs().max()) < 4 * (1000 * 5 / 6) ** 0.5


def test_noise_falls_linearly_to_zero_and_is_not_multiplied_up() -> None:
    unmasking = Unmasking(4, "noisy_confidence", noise=2.0)
    assert [noise_scale(unmasking, step, 4) for step in range(4)] == pytest.approx([2.0, 4 / 3, 2 / 3, 0.0])
    assert noise_scale(unmasking, 0, 1) == 0


def test_the_surest_are_kept_and_ties_go_to_the_first() -> None:
    sure = torch.tensor([[-1.0, -0.2, -0.2, -3.0]]).double()
    masked = torch.tensor([[True, True, True, True]])
    assert keep_confident(Unmasking(2, "confidence"), sure, masked, 0, [3, 0]).tolist() == [[False, True, False, False]]
    assert keep_confident(Unmasking(2, "confidence"), sure, masked, 1, [3, 0]).all()
    bold = Unmasking(3, "threshold", threshold=0.3)
    assert keep_confident(bold, sure, masked, 0, [3, 2, 0]).tolist() == [[True, True, True, False]]
    assert keep_confident(bold, sure - 3, masked, 0, [3, 2, 0]).tolist() == [[False, True, False, False]]
    assert keep_confident(bold, sure - 3, masked, 2, [3, 2, 0]).all()
    rest = torch.tensor([[True, False, False, True]])
    assert keep_confident(bold, sure, rest, 0, [3, 2, 0]).tolist() == [[True, False, False, False]]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"steps": 0}, "at least 1"),
        ({"steps": 2, "order": "blocks"}, "needs block"),
        ({"steps": 2, "block": 3}, "no use for block"),
        ({"steps": 2, "order": "threshold"}, "needs threshold"),
        ({"steps": 2, "order": "threshold", "threshold": 1.5}, "probability"),
        ({"steps": 2, "order": "noisy_confidence"}, "needs noise"),
        ({"steps": 2, "order": "threshold", "threshold": 0.5, "schedule": "linear"}, "whatever the schedule"),
        ({"steps": 2, "order": "blocks", "block": 0}, "at least 1"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Unmasking(**settings)  # pyrefly: ignore


def test_a_span_carries_its_unmasking_to_disk_and_back() -> None:
    span = Span("image", Law((3, 9), guidance_scale=2.0), 24, unmasking=Unmasking(6, "blocks", block=12))
    assert Span.from_dict(span.to_dict()) == span
    plain = Span("image", Law((3, 9)), 24)
    record = plain.to_dict()
    del record["unmasking"]  # as files of next-token policies have it
    assert Span.from_dict(record) == plain
