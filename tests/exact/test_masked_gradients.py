"""Gradients of one set of rollouts by every estimate: over all equally likely plans they are what the estimate says."""

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import replace
from math import comb

import pytest
import torch
from torch import Tensor

from rlmm.bench.gradient_problem import Start
from rlmm.bench.gradient_sums import Against, Draws, dot
from rlmm.config.masked import EstimatorConfig
from rlmm.config.stages import GrpoStage
from rlmm.objectives.estimators import step_weights
from rlmm.objectives.noise import Scheme, noise_plan
from rlmm.policies.masked import MaskedPolicy
from rlmm.train.experience import Experience
from rollouts.trajectory import Trajectory
from rollouts.unmasking import Unmasking
from tests.exact.masked_enumerable import (
    LENGTH,
    confident_paths,
    elbos,
    law_named,
    make_policy,
    step_log_prob,
    table,
    trajectory_of,
)

ROWS = 9
STEPWISE = Unmasking(LENGTH, order="random", schedule="linear")
CONFIDENT = Unmasking(LENGTH, order="confidence", schedule="linear")
IMAGES_RS = torch.randint(0, 4, (ROWS, LENGTH), generator=torch.Generator().manual_seed(3))
STEP_RS = torch.stack([torch.randperm(LENGTH, generator=torch.Generator().manual_seed(row)) for row in range(ROWS)])
ADVANTAGE_R = torch.randn(ROWS, generator=torch.Generator().manual_seed(4))


@pytest.fixture(scope="module")
def start() -> Start:
    return Start(make_policy(), GrpoStage(steps=1, learning_rate=1e-3, micro_batch_size=4))


def experience(made: Trajectory) -> Experience:
    return Experience(made, ADVANTAGE_R[: len(made)], torch.ones(len(made), dtype=torch.bool))


@pytest.fixture(scope="module")
def made(start: Start) -> Experience:
    return experience(trajectory_of(start.policy, law_named("plain", start.policy), STEPWISE, IMAGES_RS, STEP_RS))


def wanted(policy: MaskedPolicy, score_R: Tensor) -> Tensor:
    """-grad of mean_r A_r score_r / L."""
    weights = list(policy.model.parameters())
    loss = -(ADVANTAGE_R[: len(score_R)].double() * score_R).mean() / LENGTH
    found = torch.autograd.grad(loss, weights, allow_unused=True, retain_graph=True)
    return torch.cat([(torch.zeros_like(w) if g is None else g).flatten() for w, g in zip(weights, found, strict=True)])


def seeds_of(outcome: Callable[[int], bytes], often: Callable[[bytes], int], outcomes: int) -> list[int]:
    """A seed for every outcome, `often` of them where it is more likely than another."""
    found: Mapping[bytes, list[int]] = defaultdict(list)
    for seed in range(4000):
        key = outcome(seed)
        if len(found[key]) < often(key):
            found[key].append(seed)
    every = [seed for seeds in found.values() for seed in seeds]
    assert len(found) == outcomes and all(len(seeds) == often(key) for key, seeds in found.items())
    return every


def masks(scheme: Scheme, draws: int) -> Callable[[int], bytes]:
    target = torch.ones(1, LENGTH, dtype=torch.bool)
    return lambda seed: bytes(noise_plan(scheme, target, [seed], draws).masks_BnS.flatten().byte().tolist())


def average(start: Start, made: Experience, estimator: EstimatorConfig, seeds: list[int]) -> Draws:
    """Over plans in which every row has the same of `seeds`."""
    found = Draws()
    for seed in seeds:
        found.add(start.gradient(made, estimator, [seed] * len(made.trajectory)))
    return found


def bound(start: Start) -> Tensor:
    every = elbos(table(start.policy, law_named("plain", start.policy)))
    return wanted(start.policy, every[IMAGES_RS @ torch.tensor([16, 4, 1])])


ONE_EACH = {
    # scheme: draws, outcomes, and of equally likely cases those of an outcome
    "count": (1, 7, lambda key: 3 // comb(3, sum(key))),
    "complement": (2, 8, lambda key: 3 // comb(3, sum(key[:3]))),
    "stratified": (3, 9, lambda key: 1),
}


@pytest.mark.parametrize("scheme", ONE_EACH)
def test_over_all_plans_the_gradient_is_that_of_the_bound(start: Start, made: Experience, scheme: Scheme) -> None:
    draws, outcomes, often = ONE_EACH[scheme]
    seeds = seeds_of(masks(scheme, draws), often, outcomes)
    found = average(start, made, EstimatorConfig(kind=scheme, draws=draws), seeds).mean_W
    torch.testing.assert_close(found, bound(start), rtol=0, atol=1e-8)
    assert cosine(found, bound(start)) == pytest.approx(1, abs=1e-9)


def test_along_trajectories_all_steps_and_every_choice_of_one_give_the_chains_own(
    start: Start, made: Experience
) -> None:
    chances = table(start.policy, law_named("plain", start.policy))
    rows = zip(IMAGES_RS.tolist(), STEP_RS.tolist(), strict=True)
    exact = wanted(start.policy, torch.stack([step_log_prob(chances, *row) for row in rows]))
    whole = start.gradient(made, EstimatorConfig(), made.trajectory.seed)
    torch.testing.assert_close(whole, exact, rtol=0, atol=1e-8)

    one = made.trajectory.rows([0])

    def step(seed: int) -> bytes:
        return bytes((step_weights(replace(one, seed=(seed,)), 1) > 0).byte().flatten().tolist())

    found = average(start, made, EstimatorConfig(steps=1), seeds_of(step, lambda key: 1, 3)).mean_W
    assert cosine(found, exact) == pytest.approx(1, abs=1e-9)
    assert cosine(bound(start), exact) < 0.99  # so the references are told apart


def test_without_the_order_term_a_confident_chain_has_another_gradient(start: Start) -> None:
    law = law_named("plain", start.policy)
    with torch.no_grad():
        found = confident_paths(table(start.policy, law), [2, 1, 0])[::20]
    paths = found[:ROWS]
    images, steps = (torch.tensor([getattr(path, name) for path in paths]) for name in ("image", "steps"))
    made = experience(trajectory_of(start.policy, law, CONFIDENT, images, steps))
    with_gradient = {
        (path.image, path.steps): path.chance for path in confident_paths(table(start.policy, law), [2, 1, 0])
    }
    exact = wanted(start.policy, torch.stack([with_gradient[path.image, path.steps].log() for path in paths]))
    whole, tokens = (
        start.gradient(made, EstimatorConfig(order_term=kept), made.trajectory.seed) for kept in (True, False)
    )
    assert cosine(whole, exact) == pytest.approx(1, abs=1e-9)
    assert cosine(tokens, exact) < 0.99


def test_noise_is_taken_out_of_lengths_variances_and_cosines() -> None:
    """4000 pairs of draws around known means, against the truth."""
    luck = torch.Generator().manual_seed(0)
    mean, other = torch.tensor([3.0, 0.0, 0.0]), torch.tensor([1.0, 2.0, 0.0])
    against, lengths, spreads = Against(), 0.0, 0.0
    for _ in range(4000):
        one, two = Draws(), Draws()
        for _ in range(2):
            one.add(mean + 2 * torch.randn(3, generator=luck))
            two.add(other + torch.randn(3, generator=luck))
        lengths, spreads = lengths + one.squared_length / 4000, spreads + one.variance / 4000
        against.add(dot(one.mean_W, two.mean_W), one.squared_length, two.squared_length)
    assert lengths == pytest.approx(9, rel=0.05) and spreads == pytest.approx(12, rel=0.05)
    assert against.cosine == pytest.approx(1 / 5**0.5, rel=0.05)
    alone = Draws()
    alone.add(mean)
    assert (alone.squared_length, alone.variance) == (9, 0) and Against().cosine is None


def cosine(one: Tensor, other: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(one, other, dim=0))
