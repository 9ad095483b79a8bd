"""A user's weights of tokens: what the function sees, what it may answer, and what they do to the loss."""

from pathlib import Path

import pytest
import torch

from examples.token_weighting import open_decisions
from rewards.functions import RewardLoadError
from rlmm.config.stages import GrpoStage
from rlmm.objectives.token_weighting import TokenView, checked_weights, load_token_weighting
from rlmm.train.grpo import grpo_loss
from rlmm.train.grpo_batch import GrpoBatch
from rlmm.train.metrics import Meter
from tests.exact.enumerable import LENGTH, draw_rows, law_named, make_policy

CONFIG = GrpoStage.model_validate({"steps": 1, "learning_rate": 1.0})


def batch(*, kept: bool = True) -> GrpoBatch:
    policy = make_policy()
    made = draw_rows(policy, law_named("guidance", policy), 2)
    rows = len(made)
    weight_BS = torch.rand(rows, LENGTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    advantage_B = torch.linspace(-1, 1, rows, dtype=torch.float64)
    return GrpoBatch(made, advantage_B, torch.full((rows,), kept), weight_BS, gate=True)


def gradient(weights: object) -> torch.Tensor:
    policy, given = make_policy(), batch()

    def weighting(view: TokenView) -> torch.Tensor:
        return checked_weights(weights, view.logp_BS, "mine")

    grpo_loss(policy, CONFIG, policy.model, given, Meter(), weighting).backward()
    found = policy.base.get_input_embeddings().weight.grad
    assert isinstance(found, torch.Tensor)
    return found


def test_the_gradient_is_linear_in_the_factors() -> None:
    rows = len(batch().trajectory)
    first, rest = torch.zeros(rows, LENGTH), torch.zeros(rows, LENGTH)
    first[:, 0], rest[:, 1:] = 2.0, 3.0
    both = gradient(first + rest)
    torch.testing.assert_close(both, gradient(first) + gradient(rest), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(
        gradient(torch.ones(rows, LENGTH)) * 3, gradient(rest + 3 * (first > 0)), atol=1e-12, rtol=1e-9
    )
    assert gradient(first).abs().max() > 1e-3 and not torch.allclose(gradient(first), both)


def test_the_function_sees_log_probs_entropies_and_advantages() -> None:
    policy, given, seen = make_policy(), batch(), []

    def look(view: TokenView) -> torch.Tensor:
        seen.append(view)
        return torch.ones_like(view.logp_BS)

    grpo_loss(policy, CONFIG, policy.model, given, Meter(), look)
    (view,) = seen
    torch.testing.assert_close(view.logp_BS, given.trajectory.sampler_logp, rtol=0, atol=1e-9)
    assert not view.logp_BS.requires_grad and view.entropy_BS.min() > 0
    assert torch.equal(view.advantage_B, given.advantage)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([1.0], "returned a list, not a tensor"),
        (torch.ones(4), r"shape \[4\]; return one factor >= 0 a token, shape \[2, 3\]"),
        (torch.full((2, 3), -1.0), "returned -1.0 for 6 tokens"),
        (torch.tensor([[1.0, float("nan"), 1.0]] * 2), "returned nan for 2 tokens"),
    ],
)
def test_an_answer_that_is_no_weights_is_refused(answer: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        checked_weights(answer, torch.zeros(2, 3), "mine")


def test_a_function_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(RewardLoadError, match="token weighting function 'nowhere' must be written"):
        load_token_weighting("nowhere")
    (tmp_path / "mine.py").write_text("def weigh(view): return view.logp_BS * 0 + 2\n")
    with pytest.raises(RewardLoadError, match="no function 'wiegh'. .*weigh"):
        load_token_weighting(f"{tmp_path / 'mine.py'}:wiegh")


def test_the_example_keeps_each_rows_most_open_decisions() -> None:
    policy = make_policy()
    made = draw_rows(policy, law_named("plain", policy), 1)
    entropy_BS = torch.tensor([[0.1, 0.9, 0.5], [0.7, 0.2, 0.3]])
    zeros = torch.zeros(2, LENGTH)
    kept = open_decisions(TokenView(made, zeros, zeros, entropy_BS, torch.zeros(2)))
    assert kept.tolist() == [[0, 1, 0], [1, 0, 0]]
