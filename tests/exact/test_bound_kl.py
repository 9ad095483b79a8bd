"""The KL of bounds known by draws: no bias, in value and in gradient, against every pair of masks."""

from itertools import product
from math import comb

import pytest
import torch
from torch import Tensor

from rlmm.objectives.estimators import Estimator
from rlmm.objectives.kl import bound_kl
from rlmm.objectives.noise import INDEPENDENT, noise_plan
from rollouts.unmasking import Unmasking
from tests.exact.masked_enumerable import LENGTH, elbos, law_named, make_policy, sample, table

MASKS = [mask for mask in product([0, 1], repeat=LENGTH) if any(mask)]
CHANCE_M = torch.tensor([1 / LENGTH / comb(LENGTH, sum(mask)) for mask in MASKS], dtype=torch.float64)
"""Of each mask, in a draw of scheme count."""
STEPWISE = Unmasking(LENGTH, order="random", schedule="linear")
LENGTH_1 = torch.tensor([LENGTH])


def expected(estimate_M: Tensor, reference_M: Tensor) -> Tensor:
    """The estimate's expectation over two independent masks; each mask's own estimates of the two bounds are given."""
    whole = estimate_M.new_zeros(())
    for one, two in product(range(len(MASKS)), repeat=2):
        pair = torch.tensor([one, two])
        kl_1 = bound_kl(estimate_M[pair][None], reference_M[pair][None], LENGTH_1)
        whole = whole + CHANCE_M[one] * CHANCE_M[two] * kl_1.sum()
    return whole


@pytest.mark.parametrize("seed", range(3))
def test_value_and_gradient_are_those_of_the_exact_difference(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    estimate_M = torch.randn(len(MASKS), dtype=torch.float64, generator=generator).requires_grad_()
    reference_M = torch.randn(len(MASKS), dtype=torch.float64, generator=generator)
    exact = ((CHANCE_M @ (estimate_M - reference_M)) / LENGTH) ** 2 / 2
    found = expected(estimate_M, reference_M)
    assert float(found.detach()) == pytest.approx(float(exact.detach()), abs=1e-12)
    gradients = [torch.autograd.grad(value, estimate_M)[0] for value in (exact, found)]
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=1e-12)
    # The square of the mean of two draws, as published, is larger by half its variance.
    spread = CHANCE_M @ (estimate_M - reference_M) ** 2 - (CHANCE_M @ (estimate_M - reference_M)) ** 2
    assert float(spread.detach()) / LENGTH**2 / 4 > 1e-3


def test_more_draws_are_all_pairs_of_them() -> None:
    draws_Bn = torch.randn(2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    length_B = torch.tensor([3, 5])
    pairs = [(n, m) for n in range(4) for m in range(4) if n != m]
    found_B = bound_kl(draws_Bn, torch.zeros_like(draws_Bn), length_B)
    by_hand_B = sum(draws_Bn[:, n] * draws_Bn[:, m] for n, m in pairs) / len(pairs) / length_B**2 / 2
    torch.testing.assert_close(found_B, by_hand_B)


def test_one_draw_has_no_square_without_bias() -> None:
    with pytest.raises(ValueError, match="two draws"):
        bound_kl(torch.zeros(1, 1), torch.zeros(1, 1), LENGTH_1)


@pytest.mark.parametrize("scheme", INDEPENDENT)
def test_draws_of_these_schemes_know_nothing_of_each_other(scheme: str) -> None:
    """The number of masked positions of one says nothing of the other's."""
    plan = noise_plan(scheme, torch.ones(4000, LENGTH, dtype=torch.bool), range(4000), 2)  # pyrefly: ignore
    masked_B2 = plan.masks_BnS.sum(-1).double()
    assert abs(float(torch.corrcoef(masked_B2.T)[0, 1])) < 0.05
    assert not (plan.masks_BnS[:, 0] == plan.masks_BnS[:, 1]).all()


def test_a_policys_draws_have_its_bound_as_their_mean() -> None:
    policy = make_policy()
    law = law_named("plain", policy)
    made = sample(policy, law, STEPWISE, 6)
    with torch.no_grad():
        found = policy.log_probs(made, estimator=Estimator("count", draws=3))
        many = policy.log_probs(made, estimator=Estimator("count", draws=3000))
        exact_N = elbos(table(policy, law))
    assert found.draws_Bn is not None and many.draws_Bn is not None and found.draws_Bn.shape == (6, 3)
    torch.testing.assert_close(found.draws_Bn.mean(1), found.logp_BS.sum(1))
    low = policy.layout.image[0]
    number_B = ((made.ids - low) * 4 ** torch.arange(LENGTH - 1, -1, -1)).sum(1)
    spread_B = many.draws_Bn.std(1) / 3000**0.5
    assert bool(((many.draws_Bn.mean(1) - exact_N[number_B]).abs() < 5 * spread_B).all())
