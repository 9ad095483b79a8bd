"""Clipping, its metrics, token weights and DPO against numbers worked out by hand."""

from math import exp, log

import pytest
import torch
from torch import Tensor

from rlmm.objectives.dpo import dpo_loss
from rlmm.objectives.policy_gradient import (
    cispo_policy_loss,
    clipped_policy_loss,
    policy_metrics,
    summarise_policy_metrics,
)
from rlmm.objectives.weights import (
    ModalityTotals,
    Totals,
    count_modalities,
    count_totals,
    sft_token_weights,
    token_weights,
)

MASK = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]).bool()
KEPT = torch.tensor([True, True, False])


def ratios(*values: float) -> tuple[Tensor, Tensor]:
    """Log-probs with gradient, and old ones, with these ratios."""
    logp = torch.full((1, len(values)), -2.0, dtype=torch.float64, requires_grad=True)
    return logp, logp.detach() - torch.tensor([values], dtype=torch.float64).log()


@pytest.mark.parametrize(
    ("gain", "loss", "gradient", "clipped"),
    [
        # ratio 0.5, 1, 1.25, 2 with the ratio kept in [0.8, 1.28]
        (2.0, [-1.0, -2.0, -2.5, -2.56], [-1.0, -2.0, -2.5, 0.0], [False, False, False, True]),
        (-2.0, [1.6, 2.0, 2.5, 4.0], [0.0, 2.0, 2.5, 4.0], [True, False, False, False]),
        (0.0, [0.0] * 4, [0.0] * 4, [False] * 4),
    ],
)
def test_clip_is_one_sided(gain: float, loss: list[float], gradient: list[float], clipped: list[bool]) -> None:
    logp, old = ratios(0.5, 1.0, 1.25, 2.0)
    policy = clipped_policy_loss(logp, old, torch.tensor([gain]), clip_low=0.2, clip_high=0.28)
    torch.testing.assert_close(policy.loss_BS[0].detach(), torch.tensor(loss, dtype=torch.float64))
    assert policy.clipped_BS[0].tolist() == clipped
    found = torch.autograd.grad(policy.loss_BS.sum(), logp)[0][0]
    torch.testing.assert_close(found, torch.tensor(gradient, dtype=torch.float64))


def test_sequence_ratio_is_the_geometric_mean_over_targets() -> None:
    logp, old = ratios(2.0, 8.0, 1e6)
    mask = torch.tensor([[True, True, False]])
    policy = clipped_policy_loss(
        logp, old, torch.tensor([1.0]), clip_low=0.2, clip_high=9.0, level="sequence", target_mask_BS=mask
    )
    torch.testing.assert_close(policy.ratio_BS, torch.tensor([[4.0, 4.0, 1.0]], dtype=torch.float64))
    torch.testing.assert_close(policy.loss_BS.detach(), torch.tensor([[-4.0, -4.0, 0.0]], dtype=torch.float64))


@pytest.mark.parametrize("gain", [2.0, -2.0])
def test_cispo_bounds_the_weight_and_keeps_every_gradient(gain: float) -> None:
    # ratio 0.5, 1, 2 bounded to [0.8, 1.28]: the gradient is -weight x advantage, also where the weight is bounded
    logp, old = ratios(0.5, 1.0, 2.0)
    policy = cispo_policy_loss(logp, old, torch.tensor([gain]), clip_low=0.2, clip_high=0.28)
    found = torch.autograd.grad(policy.loss_BS.sum(), logp)[0][0]
    torch.testing.assert_close(found, -gain * torch.tensor([0.8, 1.0, 1.28], dtype=torch.float64))
    assert policy.clipped_BS[0].tolist() == [True, False, True]
    torch.testing.assert_close(policy.ratio_BS[0], torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64))


def test_cispo_is_blind_outside_the_mask() -> None:
    logp = torch.tensor([[-1.0, float("nan")]], requires_grad=True)
    mask = torch.tensor([[True, False]])
    old, gain = torch.full((1, 2), -1.0), torch.tensor([3.0])
    policy = cispo_policy_loss(logp, old, gain, clip_low=1.0, clip_high=4.0, target_mask_BS=mask)
    assert policy.loss_BS.tolist() == [[3.0, 0.0]]
    assert torch.autograd.grad(policy.loss_BS.sum(), logp)[0].tolist() == [[-3.0, 0.0]]


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_positions_outside_the_mask_cannot_poison_the_loss(level: str) -> None:
    logp = torch.tensor([[-1.0, float("-inf"), float("nan")]], requires_grad=True)
    policy = clipped_policy_loss(
        logp,
        torch.tensor([[-1.0, -2.0, -2.0]]),
        torch.tensor([3.0]),
        clip_low=0.2,
        clip_high=0.2,
        level="token" if level == "token" else "sequence",
        target_mask_BS=torch.tensor([[True, False, False]]),
    )
    assert policy.loss_BS.tolist() == [[-3.0, 0.0, 0.0]]
    assert torch.autograd.grad(policy.loss_BS.sum(), logp)[0].tolist() == [[-3.0, 0.0, 0.0]]


def test_metrics_of_parts_add_up_and_leave_out_rows_not_kept() -> None:
    old = torch.zeros(3, 2, dtype=torch.float64)
    logp = torch.tensor([[2.0, 0.5], [1.0, 1.0], [9.0, 9.0]], dtype=torch.float64).log()
    mask = torch.tensor([[True, True], [True, False], [True, True]])
    kept = torch.tensor([True, True, False])

    def sums(rows: slice) -> dict[str, float]:
        gain = torch.tensor([1.0, 1.0, 1.0])[rows]
        policy = clipped_policy_loss(logp[rows], old[rows], gain, clip_low=0.2, clip_high=0.2)
        return policy_metrics(policy, mask[rows], kept[rows])

    parts = [sums(slice(i, i + 1)) for i in range(3)]
    summary = summarise_policy_metrics({key: sum(part[key] for part in parts) for key in parts[0]})
    assert summary == pytest.approx(summarise_policy_metrics(sums(slice(0, 3))))
    # tokens with ratios 2, 1/2, 1; only the 2 is clipped (advantages are positive)
    assert summary == pytest.approx(
        {
            "clip_fraction": 1 / 3,
            "clip_fraction_low": 0,
            "clip_fraction_high": 1 / 3,
            "mean_ratio": 3.5 / 3,
            "ess": 3.5**2 / (3 * 5.25),
            "approx_kl": ((2 - 1 - log(2)) + (0.5 - 1 + log(2))) / 3,
        }
    )
    assert summarise_policy_metrics(parts[2]) == {}


@pytest.mark.parametrize(
    ("kind", "first", "second"),
    [
        ("grpo", 1 / 2 / 2, 1 / 2 / 4),  # 2 kept sequences of 2 and 4 tokens
        ("dapo", 1 / 6, 1 / 6),
        ("dr_grpo", 1 / 2 / 5, 1 / 2 / 5),
        ("rloo", 1 / 2, 1 / 2),
    ],
)
def test_weights(kind: str, first: float, second: float) -> None:
    totals = count_totals(MASK, KEPT)
    assert totals == Totals(sequences=2, tokens=6)
    weight = token_weights(kind, MASK, KEPT, totals=totals, max_length=5)
    torch.testing.assert_close(weight, torch.tensor([[first] * 2 + [0] * 2, [second] * 4, [0] * 4]))


def test_span_weights_scale_tokens_and_leave_denominators() -> None:
    span = torch.tensor([2.0, 1.0, 1.0, 0.0]).expand(3, 4)
    weight = token_weights("dapo", MASK, KEPT, totals=Totals(2, 6), advantage_weight_BS=span)
    torch.testing.assert_close(weight[1], torch.tensor([2.0, 1.0, 1.0, 0.0]) / 6)


def test_weights_of_nothing_are_zero_and_bad_input_is_refused() -> None:
    none = torch.zeros(3, dtype=torch.bool)
    assert (token_weights("grpo", MASK, none, totals=Totals(0, 0)) == 0).all()
    with pytest.raises(ValueError, match="unknown token weights 'drgrpo'. Nearest: dr_grpo"):
        token_weights("drgrpo", MASK, KEPT, totals=Totals(2, 6))
    with pytest.raises(ValueError, match="exceed the step's"):
        token_weights("grpo", MASK, KEPT, totals=Totals(2, 5))
    with pytest.raises(ValueError, match="pass max_length"):
        token_weights("dr_grpo", MASK, KEPT, totals=Totals(2, 6))
    with pytest.raises(ValueError, match="4 decided tokens, more than max_length 3"):
        token_weights("dr_grpo", MASK, KEPT, totals=Totals(2, 6), max_length=3)


def test_sft_weights_sum_to_one_over_the_step() -> None:
    modality = torch.tensor([[0, 1, 1, 9], [0, 0, 1, 1], [1, 0, 0, 0]])
    parts = [count_modalities(MASK[rows], modality[rows]) for rows in (slice(0, 2), slice(2, 3))]
    totals = parts[0] + parts[1]
    assert totals == ModalityTotals(text=3, image=4)
    weights = [
        sft_token_weights(MASK[rows], modality[rows], 0.5, 2.0, totals=totals, dtype=torch.float64)
        for rows in (slice(0, 2), slice(2, 3))
    ]
    assert sum(float(w.sum()) for w in weights) == pytest.approx(1, abs=1e-12)
    # 3 x 0.5 + 4 x 2 = 9.5
    torch.testing.assert_close(weights[0][0], torch.tensor([0.5, 2, 0, 0], dtype=torch.float64) / 9.5)


def test_sft_weights_refuse_what_teaches_nothing() -> None:
    mask, text = torch.ones(1, 2, dtype=torch.bool), torch.zeros(1, 2)
    with pytest.raises(ValueError, match="nothing would be learnt"):
        sft_token_weights(mask, text, 0.0, 1.0, totals=ModalityTotals(2, 0))
    with pytest.raises(ValueError, match="must not be negative"):
        sft_token_weights(mask, text, -1.0, 1.0, totals=ModalityTotals(2, 0))
    with pytest.raises(ValueError, match="exceed the step's"):
        sft_token_weights(mask, text, 1.0, 1.0, totals=ModalityTotals(1, 0))
    with pytest.raises(ValueError, match="modality 3"):
        count_modalities(mask, text + 3)


PAIR = [torch.tensor([value], dtype=torch.float64) for value in (-3.0, -5.0, -4.0, -4.0)]


def test_dpo_is_the_log_loss_of_the_margin() -> None:
    # chosen log-ratio 1, rejected -1: margin 2 beta
    chosen = PAIR[0].clone().requires_grad_()
    loss, figures = dpo_loss(chosen, *PAIR[1:], beta=0.5)
    assert loss.item() == pytest.approx(log(1 + exp(-1.0)))
    # d loss / d chosen = -beta * sigmoid(-margin)
    (gradient,) = torch.autograd.grad(loss.sum(), chosen)
    assert gradient.item() == pytest.approx(-0.5 / (1 + exp(1.0)))
    expected = {"correct": 1, "margin": 1.0, "chosen_reward": 0.5, "rejected_reward": -0.5}
    assert {name: value.item() for name, value in figures.items()} == pytest.approx(expected)


def test_dpo_label_smoothing_has_its_minimum_at_the_log_odds() -> None:
    chosen = torch.tensor([log(0.8 / 0.2)], dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(1, dtype=torch.float64)
    loss, _ = dpo_loss(chosen, zero, zero, zero, beta=1.0, label_smoothing=0.2)
    assert torch.autograd.grad(loss.sum(), chosen)[0].item() == pytest.approx(0, abs=1e-12)


def test_dpo_length_normalisation_uses_each_side_s_length() -> None:
    # log-ratios 1 and -3: 1 / 2 + 3 / 4
    longer = [PAIR[0], PAIR[1] - 2, *PAIR[2:]]
    loss, _ = dpo_loss(*longer, beta=1.0, lengths_P=(torch.tensor([2]), torch.tensor([4])))
    assert loss.item() == pytest.approx(log(1 + exp(-1.25)))
    with pytest.raises(ValueError, match="without decided tokens"):
        dpo_loss(*PAIR, beta=1.0, lengths_P=(torch.tensor([0]), torch.tensor([4])))


@pytest.mark.parametrize(("beta", "smoothing"), [(0.0, 0.0), (0.1, 0.5), (0.1, -0.1)])
def test_dpo_refuses_settings_without_a_minimum(beta: float, smoothing: float) -> None:
    with pytest.raises(ValueError, match="must be positive and label_smoothing"):
        dpo_loss(*PAIR, beta=beta, label_smoothing=smoothing)
