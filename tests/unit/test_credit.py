"""Rewards that some tokens earn and others do not: what composites say of them, and the advantages that come of it."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from rewards.base import Sample, Score
from rewards.compose import CompositeReward, Credit, Gate, Scored, Term
from rewards.runner import RewardContractError, RewardRunner
from rewards.transforms import Affine
from rewards.wire import WireError, WireScore, read_score, send_score
from rlmm.config.stages import GrpoStage
from rlmm.objectives.credit import earned, normalised_steps
from rlmm.objectives.policy_gradient import clipped_policy_loss
from rlmm.train.credit import advantages
from rollouts.law import Law
from rollouts.trajectory import IMAGE, TEXT, Span, Trajectory

SAMPLES = [Sample(str(at), "g", "p") for at in range(2)]


class Says:
    """Answers these, one a sample."""

    name = "says"

    def __init__(self, *answers: Score) -> None:
        self.answers = answers

    def fingerprint(self) -> str:
        return repr(self.answers)

    def score(self, samples: Sequence[Sample]) -> list[Score]:
        return [self.answers[int(sample.sample_id)] for sample in samples]


def runner(*values: float | Score) -> RewardRunner:
    return RewardRunner(Says(*(one if isinstance(one, Score) else Score.ok(one) for one in values)))


def test_steps_end_at_rising_shares_and_have_their_mean_as_value() -> None:
    assert Score.stepwise([1.0, 2.0, 6.0]).steps == ((1 / 3, 1.0), (2 / 3, 2.0), (1.0, 6.0))
    assert Score.stepwise([1.0, 2.0, 6.0]).value == 3.0
    assert Score.stepwise([1.0, 2.0], [0.25, 0.5]).steps == ((0.25, 1.0), (0.5, 2.0))
    assert Score.stepwise([1.0, float("nan")]).status == "unavailable"
    for values, ends in (([], None), ([1.0], [0.0]), ([1.0, 2.0], [0.5, 0.5]), ([1.0], [1.1]), ([1.0, 2.0], [1.0])):
        with pytest.raises(ValueError, match="rising, above 0 and at most 1"):
            Score.stepwise(values, ends)


def test_steps_travel() -> None:
    score = Score.stepwise([1.0, 4.0], [0.5, 0.75])
    assert read_score(WireScore.model_validate_json(send_score(score).model_dump_json())) == score
    with pytest.raises(WireError, match="rising"):
        read_score(WireScore(status="ok", value=1.0, steps=[(0.5, 1.0), (0.2, 1.0)]))


def test_credits_add_up_to_the_total_a_span_and_a_stepwise_term_each() -> None:
    steps = Score.stepwise([0.0, 30.0]), Score.stepwise([10.0, 10.0])
    terms = [
        Term("all", runner(1.0, 2.0), 2.0),
        Term("text", runner(0.5, 0.25), span="text"),
        Term("more text", runner(1.0, 0.0), -1.0, span="text"),
        Term("steps", runner(*steps), 0.5, transform=Affine(0.0, 20.0), span="image", steps=True),
        Term("watched", runner(7.0, 7.0), 0.0, span="image"),
    ]
    composite = CompositeReward(terms)
    assert composite.channels == (("all", ""), ("text", ""), ("image", "steps"))
    one, other = composite.score(SAMPLES)
    assert one.credits == (Credit("all", 2.0), Credit("text", -0.5), Credit("image", 0.25, ((0.5, 0.0), (1.0, 0.5))))
    assert one.total.value == pytest.approx(sum(credit.value for credit in one.credits))
    assert other.total.value == pytest.approx(4.0 + 0.25 + 0.25)


def test_a_total_that_no_term_made_has_no_credits() -> None:
    terms = [Term("a", runner(0.0, Score.unavailable("gone")), span="text"), Term("b", runner(1.0, 1.0))]
    shut, gone = CompositeReward(terms, gates=[Gate("a", 0.5, floor=-1.0)]).score(SAMPLES)
    assert (shut.total.value, shut.credits) == (-1.0, ()) and (gone.total.status, gone.credits) == ("unavailable", ())


def test_a_reward_without_steps_cannot_be_earned_by_them() -> None:
    with pytest.raises(RewardContractError, match=r"'a' is earned step by step.*Score.stepwise"):
        CompositeReward([Term("a", runner(0.0, 1.0), steps=True)]).score(SAMPLES)
    with pytest.raises(ValueError, match="leave these out"):
        CompositeReward([Term("a", runner(0.0, 1.0), steps=True, in_group="rank")])
    with pytest.raises(ValueError, match="use weighted_sum"):
        CompositeReward([Term("a", runner(0.0, 1.0), span="text")], mode="min")


def test_what_is_earned_everywhere_has_no_channels() -> None:
    composite = CompositeReward([Term("a", runner(0.0, 1.0)), Term("b", runner(0.0, 1.0), 0.0, span="text")])
    assert composite.channels == () and composite.score(SAMPLES)[1].credits == ()


def test_steps_are_held_against_all_steps_of_their_group() -> None:
    steps = [[(0.5, 1.0), (1.0, 3.0)], [(1.0, 8.0)], [(1.0, 100.0)], [(1.0, 5.0)], [(1.0, 2.0)], [(1.0, 2.0)]]
    valid, group = [True, True, False, True, True, True], list("aaabcc")
    made, kept = normalised_steps(steps, valid, group, scaled=True)
    oracle = (np.array([1.0, 3.0, 8.0]) - 4.0) / np.std([1.0, 3.0, 8.0], ddof=1)
    assert [value for row in made[:2] for _, value in row] == pytest.approx(oracle.tolist())
    assert kept.tolist() == [True, True, False, False, False, False]
    assert [row for row in made[2:]] == [[(1.0, 0.0)]] * 4
    plain, counted = normalised_steps(steps, valid, group, scaled=False, keep_flat=True)
    assert plain[0] == [(0.5, -3.0), (1.0, -1.0)] and counted.tolist() == [True, True, False, False, True, True]


def test_a_decision_earns_the_steps_that_end_no_earlier() -> None:
    decided = torch.tensor([[True, True, False, True, True, False]])
    order = torch.tensor([[0, 1, 2, 3, 4, 5]])
    steps = [[(0.25, 1.0), (0.6, 10.0), (1.0, 100.0)]]
    assert earned(steps, decided, order).tolist() == [[111.0, 110.0, 0.0, 100.0, 100.0, 0.0]]
    at_once = torch.tensor([[1, 0, 0, 0, 1, 0]])  # the second and fourth position are revealed first, together
    assert earned([[(0.5, 1.0), (1.0, 10.0)]], decided, at_once).tolist() == [[10.0, 11.0, 0.0, 11.0, 10.0, 0.0]]


def written(rows: int) -> Trajectory:
    """Texts of two or one tokens, then images of three."""
    modality = torch.tensor([[TEXT, TEXT, IMAGE, IMAGE, IMAGE]], dtype=torch.int8).expand(rows, -1)
    target = torch.ones(rows, 5, dtype=torch.bool)
    target[1, 1] = False
    spans = (Span("text", Law((0, 4)), 2, stop=(0,)), Span("image", Law((4, 8)), 3))
    return Trajectory(
        ids=torch.full((rows, 5), 4),
        attention_mask=target,
        target_mask=target,
        modality=modality,
        step=torch.arange(5, dtype=torch.int32).expand(rows, -1),
        span=(modality == IMAGE).to(torch.int8),
        spans=spans,
        streams={},
        sampler_logp=torch.zeros(rows, 5, dtype=torch.float64),
        seed=tuple(range(rows)),
        group_id=("a",) * rows,
        sample_id=tuple(map(str, range(rows))),
        weights_version=0,
    )


def test_each_span_has_the_advantage_of_its_own_terms() -> None:
    made = written(3)
    terms = [Term("t", runner(), span="text"), Term("i", runner(), span="image", steps=True), Term("a", runner())]
    given = [(0.0, (1.0, 5.0), 2.0), (4.0, (3.0, 3.0), 2.0), (2.0, (3.0, 3.0), 2.0)]
    scored = [
        Scored(
            Score.ok(t + a + sum(i) / 2),
            {},
            (Credit("text", t), Credit("image", sum(i) / 2, ((2 / 3, i[0]), (1.0, i[1]))), Credit("all", a)),
        )
        for t, i, a in given
    ]
    reward_B = np.array([one.total.value for one in scored])
    config = GrpoStage.model_validate(
        {"steps": 1, "learning_rate": 1.0, "samples_per_prompt": 3, "micro_batch_size": 3}
    )
    result, advantage, kept_B = advantages(scored, reward_B, np.ones(3, bool), made, CompositeReward(terms), config)
    text = (np.array([0.0, 4.0, 2.0]) - 2.0) / 2.0
    first, last = (np.array(one) / np.std([1, 5, 3, 3, 3, 3], ddof=1) for one in ([-2.0, 0, 0], [2.0, 0, 0]))
    wanted = np.stack([text, text, first + last, first + last, last], 1) * made.target_mask.numpy()
    np.testing.assert_allclose(advantage.numpy(), wanted, rtol=1e-6, atol=1e-6)
    assert kept_B.all() and result.flat_groups == 0 and advantage.dtype == torch.float32
    # The row that no term made has its number in every channel.
    shut = [Scored(Score.ok(-7.0), {}), *scored[1:]]
    _, moved, _ = advantages(
        shut, np.array([-7.0, *reward_B[1:]]), np.ones(3, bool), made, CompositeReward(terms), config
    )
    assert (moved[0] < -0.5).all()


def test_a_group_that_is_flat_in_one_channel_learns_from_the_other() -> None:
    made, terms = written(2), [Term("t", runner(), span="text"), Term("i", runner(), span="image")]
    config = GrpoStage.model_validate({"steps": 1, "learning_rate": 1.0, "objective": {"name": "grpo"}})

    def found(*pairs: tuple[float, float]) -> tuple[int, torch.Tensor, list[bool]]:
        scored = [Scored(Score.ok(t + i), {}, (Credit("text", t), Credit("image", i))) for t, i in pairs]
        reward_B = np.array([t + i for t, i in pairs])
        result, advantage, kept_B = advantages(scored, reward_B, np.ones(2, bool), made, CompositeReward(terms), config)
        return result.flat_groups, advantage, kept_B.tolist()

    flat, advantage, kept = found((1.0, 0.0), (0.0, 1.0))  # equal totals
    assert flat == 0 and kept == [True, True] and (advantage[0, :2] > 0).all() and (advantage[0, 2:] < 0).all()
    flat, advantage, kept = found((1.0, 3.0), (0.0, 3.0))
    assert flat == 0 and kept == [True, True] and not advantage[:, 2:].any()
    flat, advantage, kept = found((1.0, 3.0), (1.0, 3.0))
    assert flat == 1 and kept == [False, False] and not advantage.any()


def test_a_tokens_own_advantage_moves_it_alone() -> None:
    logp = torch.randn(2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    advantage = torch.tensor([[1.0, 1.0, 0.0, 0.0, -2.0], [0.0, 0.0, 3.0, 3.0, 3.0]])
    loss = clipped_policy_loss(logp, logp.detach(), advantage, clip_low=0.2, clip_high=0.2)
    (moved,) = torch.autograd.grad(loss.loss_BS.sum(), logp)
    torch.testing.assert_close(moved, -advantage.double())
