"""The expected gradient of each objective, by summing over every sequence of a small next-token policy.

Three positions, four codes, float64. With an end code the 40 sequences have lengths 1, 2 and 3; without, all
64 have length 3. Groups of two: every pair of sequences, weighted by its exact probability.
"""

from dataclasses import dataclass, replace
from itertools import product

import pytest
import torch
from torch import Tensor

from rlmm.objectives import OBJECTIVES, Objective
from rlmm.objectives.advantages import group_advantages
from rlmm.objectives.policy_gradient import POLICY_LOSSES, cispo_policy_loss, clipped_policy_loss
from rlmm.objectives.weights import Totals, count_totals, token_weights

SEQUENCE_COUNT = {None: 64, 3: 40}


@dataclass
class Chain:
    """A shared-parameter next-token policy and all its sequences, with a reward each."""

    ids_NS: Tensor
    mask_NS: Tensor
    reward_N: Tensor
    codes: int
    parameters: list[Tensor]

    def logp(self) -> Tensor:
        """Log-prob of each decided token [N, S], 0 elsewhere."""
        embed_CE, mix_SEH, head_HC = self.parameters
        count, length = self.ids_NS.shape
        previous_NSE = embed_CE[torch.cat([torch.full((count, 1), self.codes), self.ids_NS[:, :-1]], 1)]
        state_NSE = previous_NSE.cumsum(1) + torch.arange(length)[:, None]
        logits_NSC = torch.tanh(torch.einsum("nse,seh->nsh", state_NSE, mix_SEH)) @ head_HC
        logp_NS = logits_NSC.log_softmax(-1).gather(-1, self.ids_NS[..., None])[..., 0]
        return torch.where(self.mask_NS, logp_NS, 0.0)

    def gradient(self, value: Tensor) -> Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(value, self.parameters)])


def make_chain(*, positions: int = 3, codes: int = 4, end: int | None = None, seed: int = 0) -> Chain:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def stop(sequence: tuple[int, ...]) -> tuple[int, ...]:
        return sequence[: sequence.index(end) + 1] if end in sequence else sequence

    sequences = sorted({stop(s) for s in product(range(codes), repeat=positions)})
    ids = torch.tensor([[*s, *[0] * (positions - len(s))] for s in sequences])
    mask = torch.tensor([[t < len(s) for t in range(positions)] for s in sequences])
    parameters = [normal(codes + 1, 5), normal(positions, 5, 6) / 2, normal(6, codes)]
    for parameter in parameters:
        parameter.requires_grad_()
    return Chain(ids, mask, normal(len(sequences)), codes, parameters)


def step_loss(
    objective: Objective,
    logp_BS: Tensor,
    reward_B: Tensor,
    mask_BS: Tensor,
    group_B: list[int],
    *,
    old: Tensor,
) -> Tensor:
    """One optimiser step's loss, as the parts are meant to be put together."""
    result = group_advantages(
        reward_B,
        torch.ones(len(reward_B), dtype=torch.bool),
        group_B,
        baseline=objective.baseline,
        scale=objective.scale,
        flat_groups=objective.flat_groups,
    )
    kept_B = torch.from_numpy(result.kept_B)
    weight_BS = token_weights(
        objective.weights,
        mask_BS,
        kept_B,
        totals=count_totals(mask_BS, kept_B),
        max_length=mask_BS.shape[1],
        dtype=torch.float64,
    )
    policy = POLICY_LOSSES[objective.surrogate](
        logp_BS,
        old,
        torch.from_numpy(result.advantage_B),
        clip_low=objective.clip_low,
        clip_high=objective.clip_high,
        level=objective.level,
        target_mask_BS=mask_BS,
    )
    return (weight_BS * policy.loss_BS).sum()


def expected_gradient(chain: Chain, objective: Objective, groups: tuple[int, ...] = (2,)) -> Tensor:
    """sum over all draws of the step of P(draw) * gradient of the step's loss, at the sampling policy."""
    logp_NS = chain.logp()
    probability_N = logp_NS.detach().sum(1).exp()
    group_B = [name for name, size in enumerate(groups) for _ in range(size)]
    total = torch.zeros((), dtype=torch.float64)
    leaf_NS = logp_NS.detach().requires_grad_()
    for draw in product(range(len(chain.ids_NS)), repeat=sum(groups)):
        rows = list(draw)
        logp_BS = leaf_NS[rows]
        loss = step_loss(
            objective,
            logp_BS,
            chain.reward_N[rows],
            chain.mask_NS[rows],
            group_B,
            old=logp_NS.detach()[rows],
        )
        total = total + probability_N[rows].prod() * loss
    (pull_NS,) = torch.autograd.grad(total, leaf_NS)
    return chain.gradient((pull_NS * logp_NS).sum())


def expected_reward(chain: Chain) -> Tensor:
    return (chain.logp().sum(1).exp() * chain.reward_N).sum()


@pytest.mark.parametrize("end", [None, 3])
def test_chain_is_a_distribution(end: int | None) -> None:
    chain = make_chain(end=end)
    assert len(chain.ids_NS) == SEQUENCE_COUNT[end]
    assert chain.logp().sum(1).exp().sum().item() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("end", [None, 3])
def test_rloo_is_unbiased(end: int | None) -> None:
    chain = make_chain(end=end)
    torch.testing.assert_close(
        expected_gradient(chain, OBJECTIVES["rloo"]),
        -chain.gradient(expected_reward(chain)),
        rtol=0,
        atol=1e-12,
    )


def test_rloo_is_unbiased_for_larger_groups_and_tied_rewards() -> None:
    chain = make_chain(positions=2, codes=3, end=2, seed=1)
    chain.reward_N = (chain.reward_N > 0).double()
    exact = -chain.gradient(expected_reward(chain))
    torch.testing.assert_close(expected_gradient(chain, OBJECTIVES["rloo"], (3,)), exact, rtol=0, atol=1e-12)


def test_dr_grpo_is_the_exact_gradient_times_a_constant() -> None:
    # The mean includes the sample itself: a factor (G - 1) / G. The length constant is 3.
    chain = make_chain(end=3)
    exact = -chain.gradient(expected_reward(chain))
    torch.testing.assert_close(expected_gradient(chain, OBJECTIVES["dr_grpo"]), exact * (1 / 2) / 3, rtol=0, atol=1e-12)


@pytest.mark.parametrize("end", [None, 3])
def test_grpo_in_pairs_follows_the_win_rate_not_the_reward(end: int | None) -> None:
    """(r - mean) / std of a pair is sign(r - r') / sqrt(2), whatever the margin.

    So the expected gradient is that of sum_y pi(y) / |y| * E_{y' ~ stop-gradient pi}[sign(r - r')] / sqrt(2):
    blind to how much better a sample is, and, through 1 / |y|, weighing short sequences more.
    """
    chain = make_chain(end=end)
    probability_N = chain.logp().sum(1).exp()
    sign_NN = (chain.reward_N[:, None] - chain.reward_N[None, :]).sign()
    win_N = sign_NN @ probability_N.detach() / 2**0.5
    # pi grad log pi / |y| per token: 1 / |y| is constant in a row
    surrogate = (probability_N * win_N / chain.mask_NS.sum(1)).sum()
    found = expected_gradient(chain, OBJECTIVES["grpo"])
    torch.testing.assert_close(found, -chain.gradient(surrogate), rtol=0, atol=1e-12)

    exact = -chain.gradient(expected_reward(chain))
    assert torch.cosine_similarity(found, exact, dim=0) < 0.99


def test_grpo_in_pairs_cannot_see_an_increasing_function_of_the_reward() -> None:
    chain = make_chain(positions=2, end=3)
    found = expected_gradient(chain, OBJECTIVES["grpo"])
    chain.reward_N = chain.reward_N.exp() * 50
    torch.testing.assert_close(expected_gradient(chain, OBJECTIVES["grpo"]), found, rtol=0, atol=1e-12)


def test_dapo_in_pairs_divides_by_the_tokens_of_the_pair() -> None:
    chain = make_chain(end=3)
    logp_N, length_N = chain.logp().sum(1), chain.mask_NS.sum(1)
    probability_N = logp_N.detach().exp()
    sign_NN = (chain.reward_N[:, None] - chain.reward_N[None, :]).sign() / 2**0.5
    pair_NN = probability_N[:, None] * probability_N[None, :] * sign_NN / (length_N[:, None] + length_N[None, :])
    exact = -chain.gradient(2 * (pair_NN.sum(1) * logp_N).sum())
    torch.testing.assert_close(expected_gradient(chain, OBJECTIVES["dapo"]), exact, rtol=0, atol=1e-12)


def test_dropping_flat_groups_scales_the_gradient() -> None:
    """Two groups of a prompt whose pairs differ with probability q: dropped from the mean, flat groups
    multiply the expected gradient by 2 - q (the other group then has the mean for itself); counted, they
    leave it exact."""
    chain = make_chain(positions=1, codes=4, seed=2)
    chain.reward_N = torch.tensor([0.0, 0.0, 1.0, 1.0], dtype=torch.float64)
    exact = -chain.gradient(expected_reward(chain))
    one = expected_reward(chain).item()
    differ = 2 * one * (1 - one)
    rloo = OBJECTIVES["rloo"]
    torch.testing.assert_close(expected_gradient(chain, rloo, (2, 2)), exact, rtol=0, atol=1e-12)
    dropped = expected_gradient(chain, replace(rloo, flat_groups="drop"), (2, 2))
    torch.testing.assert_close(dropped, exact * (2 - differ), rtol=0, atol=1e-12)


def test_sequence_level_has_the_same_gradient_at_the_sampling_policy() -> None:
    chain = make_chain(positions=2, codes=3, end=2, seed=3)
    for objective in OBJECTIVES.values():
        token = expected_gradient(chain, objective)
        sequence = expected_gradient(chain, replace(objective, level="sequence"))
        torch.testing.assert_close(token, sequence, rtol=0, atol=1e-12)


def test_ratio_corrects_a_stale_policy_where_nothing_is_clipped() -> None:
    # One position: E_old[rho A] = E_new[A], so the gradient is that of the new policy's expected reward.
    chain, stale = make_chain(positions=1, seed=4), make_chain(positions=1, seed=5)
    old_NS = stale.logp().detach()
    policy = clipped_policy_loss(chain.logp(), old_NS, chain.reward_N, clip_low=1.0, clip_high=float("inf"))
    found = chain.gradient((old_NS.exp() * policy.loss_BS).sum())
    torch.testing.assert_close(found, -chain.gradient(expected_reward(chain)), rtol=0, atol=1e-12)
    assert not policy.clipped_BS.any()


@pytest.mark.parametrize(
    ("name", "relative"), [("bnpo", "dapo"), ("cispo", "dapo"), ("gspo", "grpo"), ("reinforce++", "grpo")]
)
def test_relatives_agree_where_the_ratio_is_one_and_the_step_one_group(name: str, relative: str) -> None:
    chain = make_chain(end=3)
    found, expected = (expected_gradient(chain, OBJECTIVES[one]) for one in (name, relative))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_cispo_is_the_gradient_of_the_gain_under_bounded_weights() -> None:
    """One position: E_old[min(rho, c) A grad logp], summed by hand; past the bound `clipped` has no gradient at all."""
    chain, stale = make_chain(positions=1, seed=4), make_chain(positions=1, seed=5)
    old_NS, logp_NS = stale.logp().detach(), chain.logp()
    bounded_N = (logp_NS - old_NS).detach().exp()[:, 0].clamp(max=1.1)
    assert (bounded_N == 1.1).any() and (bounded_N < 1.1).any()
    expected = -chain.gradient((old_NS.exp()[:, 0] * bounded_N * chain.reward_N * logp_NS[:, 0]).sum())
    policy = cispo_policy_loss(chain.logp(), old_NS, chain.reward_N, clip_low=1.0, clip_high=0.1)
    found = chain.gradient((old_NS.exp() * policy.loss_BS).sum())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", list(OBJECTIVES))
@pytest.mark.parametrize("parts", [(8,), (1, 3, 4), (1,) * 8])
def test_step_does_not_depend_on_the_micro_batches(name: str, parts: tuple[int, ...]) -> None:
    """Rows split any way, in any order, with the step's totals: the same loss and gradient as all at once."""
    objective, chain = OBJECTIVES[name], make_chain(end=3)
    rows = torch.tensor([0, 17, 5, 39, 28, 11, 2, 33])
    old_NS = make_chain(end=3, seed=6).logp().detach()  # far enough for the clip to act
    advantage_B = torch.linspace(-1, 1.5, 8, dtype=torch.float64)
    kept_B = torch.tensor([True, True, False, True, True, True, False, True])

    def loss(index: Tensor, totals: Totals) -> Tensor:
        mask_BS = chain.mask_NS[rows[index]]
        weight_BS = token_weights(
            objective.weights, mask_BS, kept_B[index], totals=totals, max_length=3, dtype=torch.float64
        )
        policy = POLICY_LOSSES[objective.surrogate](
            chain.logp()[rows[index]],
            old_NS[rows[index]],
            advantage_B[index],
            clip_low=objective.clip_low,
            clip_high=objective.clip_high,
            level=objective.level,
            target_mask_BS=mask_BS,
        )
        return (weight_BS * policy.loss_BS).sum()

    everything = torch.arange(8)
    whole = loss(everything, count_totals(chain.mask_NS[rows], kept_B))
    pieces = torch.randperm(8, generator=torch.Generator().manual_seed(0)).split(list(parts))
    totals = sum((count_totals(chain.mask_NS[rows[p]], kept_B[p]) for p in pieces), Totals(0, 0))
    split = sum((loss(piece, totals) for piece in pieces), torch.zeros((), dtype=torch.float64))
    torch.testing.assert_close(split, whole, rtol=0, atol=1e-12)
    torch.testing.assert_close(chain.gradient(split), chain.gradient(whole), rtol=0, atol=1e-12)
