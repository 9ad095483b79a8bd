"""Losses of preferences and their gradients against closed forms in float64."""

import math
from typing import Literal

import pytest
import torch
from torch import Tensor

from rlmm.objectives.dpo import Loss, dpo_loss, kto_loss, noise_bias

POLICY = torch.tensor([[-10.0, -31.5, -8.25], [-12.0, -30.0, -20.0]], dtype=torch.float64)  # chosen, rejected
REFERENCE = torch.tensor([[-11.0, -30.0, -9.0], [-11.5, -30.75, -9.5]], dtype=torch.float64)
LENGTHS = (torch.tensor([4, 8, 2]), torch.tensor([4, 8, 5]))
BETA = 0.3


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def closed(kind: Loss, gap: float) -> tuple[float, float]:
    """Loss and its derivative by the gap."""
    if kind == "sigmoid":
        return math.log(1 + math.exp(-BETA * gap)), -BETA * sigmoid(-BETA * gap)
    if kind == "ipo":
        return (gap - 1 / (2 * BETA)) ** 2, 2 * (gap - 1 / (2 * BETA))
    return max(0.0, 1 - BETA * gap), -BETA if BETA * gap < 1 else 0.0


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("kind", ["sigmoid", "ipo", "hinge"])
def test_loss_and_gradient_of_pairs(kind: Loss, smoothing: float, per_token: bool) -> None:
    policy = POLICY.clone().requires_grad_()
    lengths = LENGTHS if per_token else None
    found = dpo_loss(*policy, *REFERENCE, beta=BETA, kind=kind, label_smoothing=smoothing, lengths_P=lengths)
    (gradient,) = torch.autograd.grad(found.loss_P.sum(), policy)
    loss = found.loss_P.tolist()
    for pair in range(3):
        scale = [float(length[pair]) if per_token else 1.0 for length in LENGTHS]
        won, lost = (float(POLICY[side, pair] - REFERENCE[side, pair]) / scale[side] for side in (0, 1))
        (right, slope), (wrong, back) = closed(kind, won - lost), closed(kind, lost - won)
        assert loss[pair] == pytest.approx((1 - smoothing) * right + smoothing * wrong, rel=1e-12)
        wanted = (1 - smoothing) * slope - smoothing * back
        assert float(gradient[0, pair]) == pytest.approx(wanted / scale[0], rel=1e-12, abs=1e-15)
        assert float(gradient[1, pair]) == pytest.approx(-wanted / scale[1], rel=1e-12, abs=1e-15)
        assert float(found.figures["margin"][pair]) == pytest.approx(BETA * (won - lost), rel=1e-12)


@pytest.mark.parametrize("per_token", [False, True])
def test_loss_and_gradient_of_single_answers(per_token: bool) -> None:
    policy, reference = POLICY.flatten().clone().requires_grad_(), REFERENCE.flatten()
    desirable, point = torch.tensor([True, True, False, False, True, False]), 0.4
    lengths = torch.cat(LENGTHS) if per_token else None
    found = kto_loss(
        policy, reference, desirable, BETA, point, desirable_weight=1.5, undesirable_weight=0.7, lengths_B=lengths
    )
    (gradient,) = torch.autograd.grad(found.loss_P.sum(), policy)
    loss = found.loss_P.tolist()
    for row, wanted in enumerate(desirable.tolist()):
        scale = float(torch.cat(LENGTHS)[row]) if per_token else 1.0
        ratio = float(POLICY.flatten()[row] - reference[row]) / scale
        sign, weight = (1, 1.5) if wanted else (-1, 0.7)
        value = sigmoid(sign * BETA * (ratio - point))
        assert loss[row] == pytest.approx(weight * (1 - value), rel=1e-12)
        slope = -weight * sign * BETA * value * (1 - value) / scale
        assert float(gradient[row]) == pytest.approx(slope, rel=1e-12)
    assert found.figures["reward"].tolist() == pytest.approx(
        (BETA * (POLICY.flatten() - reference) / (torch.cat(LENGTHS) if per_token else 1)).tolist()
    )


@pytest.mark.parametrize("kind", ["sigmoid", "ipo", "hinge"])
def test_swapping_the_sides_is_the_loss_of_the_other_sign(kind: Loss) -> None:
    """With every label wrong: e loss(h) + (1 - e) loss(-h) at the swapped pair is what smoothing makes of it."""
    swapped = dpo_loss(*POLICY.flip(0), *REFERENCE.flip(0), beta=BETA, kind=kind)
    plain = dpo_loss(*POLICY, *REFERENCE, beta=BETA, kind=kind)
    mixed = dpo_loss(*POLICY, *REFERENCE, beta=BETA, kind=kind, label_smoothing=0.25)
    torch.testing.assert_close(mixed.loss_P, 0.75 * plain.loss_P + 0.25 * swapped.loss_P)
    torch.testing.assert_close(swapped.figures["margin"], -plain.figures["margin"])


@pytest.mark.parametrize("kind", ["sigmoid", "ipo", "hinge", "kto"])
def test_noise_biases_a_loss_by_no_more_than_the_bound(kind: Loss | Literal["kto"]) -> None:
    """Two-point noise of known variance, so the expectation is exact."""

    def loss(gap: Tensor) -> Tensor:
        if kind == "kto":
            return torch.sigmoid(-BETA * gap)
        return dpo_loss(gap, *torch.zeros(3, len(gap)).double(), beta=BETA, kind=kind).loss_P

    middle = torch.tensor([*range(-6, 7), 1 / BETA], dtype=torch.float64)  # with the hinge's kink
    for deviation in (0.1, 1.0, 3.0):
        mean = (loss(middle - deviation) + loss(middle + deviation)) / 2
        bias = (mean - loss(middle)).abs()
        bound = noise_bias(kind, BETA, torch.tensor([deviation**2], dtype=torch.float64))
        assert float(bias.max()) <= float(bound) * (1 + 1e-9)
        assert float(bias.max()) > float(bound) / 4  # and the bound says something


def test_a_reference_point_is_a_divergence() -> None:
    with pytest.raises(ValueError, match="a divergence, not negative"):
        kto_loss(POLICY[0], REFERENCE[0], torch.tensor([True] * 3), BETA, -0.1)
