"""Random masked policies small enough to sum over: what `rlmm bench estimators` measures on.

Shapes: N = 64 images, O = 6 orders, M = 8 masks, S = 3 positions.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import permutations, product

import torch
from torch import Tensor

from rlmm.config.policy import NewPolicy
from rlmm.policies.families.llama import build
from rlmm.policies.masked import MaskedPolicy, States
from rollouts.assembly import span_trajectory
from rollouts.contract import Request
from rollouts.law import COND, Law
from rollouts.trajectory import Span, Trajectory, pad_left
from rollouts.unmasking import Unmasking

CODES, LENGTH = 4, 3
IMAGES_NS = torch.tensor(list(product(range(CODES), repeat=LENGTH)))
MASKS_MS = torch.tensor(list(product([False, True], repeat=LENGTH)))
PLACES = torch.tensor([4, 2, 1])
"""Of a mask's bits in its number."""


@dataclass(frozen=True)
class Row:
    """Means over the policies. bias: the magnitude, in nats an image, against what `kind` says it estimates; None where
    that has none; deviation: its standard one; cosine and least: of the policy gradient it gives with that of the
    expected reward, mean and least over policies."""

    estimator: str
    kind: str
    forwards: float
    bias: float | None
    deviation: float | None
    cosine: float
    least: float


class Problem:
    """One random policy, its rewards, and everything about it that a sum over images, orders and masks gives."""

    def __init__(self, seed: int) -> None:
        self.policy = random_policy(seed)
        generator = torch.Generator().manual_seed(1000 + seed)
        self.reward_N = torch.rand(len(IMAGES_NS), generator=generator, dtype=torch.float64)
        self.look()

    def look(self) -> None:
        """Sum over everything with the present weights."""
        self.losses_NMS = masked_log_probs(self.policy)
        self.terms_ONS = torch.stack([self._order(order) for order in permutations(range(LENGTH))])
        self.orders_ON = self.terms_ONS.sum(-1)
        self.chance_ON = (self.orders_ON.exp() / len(self.orders_ON)).detach()
        self.log_pi = self.orders_ON.logsumexp(0) - torch.tensor(float(len(self.orders_ON))).log()
        self.elbo = self.orders_ON.mean(0)
        self.chance_N = self.log_pi.detach().exp()
        self.expected = float((self.chance_N * self.reward_N).sum())
        self.advantage_N = self.reward_N - self.expected

    def elbo_gap(self) -> tuple[float, float]:
        return float((self.elbo - self.log_pi).detach().abs().mean()), 0.0

    def gradient(self, value: Tensor) -> list[Tensor]:
        """By every weight; zeros where one has no part in it."""
        found = torch.autograd.grad(value, self.weights, retain_graph=True, allow_unused=True)
        return [torch.zeros_like(w) if g is None else g for w, g in zip(self.weights, found, strict=True)]

    @property
    def weights(self) -> list[Tensor]:
        return list(self.policy.model.parameters())

    def moved(self, share: float) -> Tensor:
        """Log-probs [N, M, S] of a policy whose weights each differ by a normal draw of this share of their size."""
        other, luck = copy.deepcopy(self.policy), torch.Generator().manual_seed(7)
        with torch.no_grad():
            for weight in other.model.parameters():
                weight += share * weight.abs() * torch.randn(weight.shape, generator=luck, dtype=weight.dtype)
            return masked_log_probs(other)

    def _order(self, order: Sequence[int]) -> Tensor:
        """Log-probs [N, S] of all images' tokens, decided in this order."""
        masked, terms = [True] * LENGTH, {}
        for at in order:
            terms[at] = self.losses_NMS[:, _number(masked), at]
            masked[at] = False
        return torch.stack([terms[at] for at in range(LENGTH)], -1)


Surrogate = Callable[[Problem], Tensor]
"""The scalar whose gradient an estimator's policy gradient is on average: sum_x pi(x) (R(x) - E R) score(x)."""

Errors = Callable[[Problem], tuple[float, float]]
"""Bias and deviation."""


def made_row(
    name: str,
    kind: str,
    forwards: float,
    problems: Sequence[Problem],
    errors: Errors | None,
    surrogate: Surrogate,
) -> Row:
    cosines = [_cosine(problem, surrogate) for problem in problems]
    bias = deviation = None
    if errors is not None:
        bias, deviation = (sum(column) / len(problems) for column in zip(*map(errors, problems), strict=True))
    return Row(name, kind, forwards, bias, deviation, sum(cosines) / len(cosines), min(cosines))


def _cosine(problem: Problem, surrogate: Surrogate) -> float:
    exact = problem.gradient((problem.log_pi.exp() * problem.reward_N).sum())
    return similarity(exact, problem.gradient(surrogate(problem)))


def similarity(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """Cosine of two gradients."""
    flat = [torch.cat([part.flatten() for part in parts]) for parts in (one, other)]
    return float(torch.nn.functional.cosine_similarity(*flat, dim=0))


def random_policy(seed: int) -> MaskedPolicy:
    """Its next-code laws are far from uniform."""
    config = NewPolicy(
        family="masked", hidden_size=16, num_layers=2, num_heads=2, intermediate_size=24, max_positions=64
    )
    policy = build(config, num_codes=CODES, grid=(1, LENGTH), seed=seed)
    assert isinstance(policy, MaskedPolicy)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in policy.model.named_parameters():
        if "norm" not in name:
            parameter.data.normal_(std=0.35, generator=generator)
    policy.model.double().eval()
    return policy


def masked_log_probs(policy: MaskedPolicy) -> Tensor:
    """log p(x_i | x with the mask) [N, M, S] of every image and mask, with gradient; 0 where not masked."""
    rows = len(IMAGES_NS)
    every = path_trajectory(policy, IMAGES_NS, torch.zeros_like(IMAGES_NS), Unmasking(1))
    row_R = torch.arange(rows).repeat_interleave(len(MASKS_MS))
    masked_RS = MASKS_MS.repeat(rows, 1)
    logp_RS, _ = policy.read(every, States(row_R, masked_RS, masked_RS))
    return logp_RS.double().unflatten(0, (rows, len(MASKS_MS)))


def path_trajectory(policy: MaskedPolicy, images_RS: Tensor, step_RS: Tensor, unmasking: Unmasking) -> Trajectory:
    """These images, each position decided at its step; row r has the seed r."""
    rows = len(images_RS)
    prefix = policy.layout.prefix(policy.encode_prompt("ab"))
    return span_trajectory(
        policy.layout, Span("image", Law(policy.layout.image), LENGTH, unmasking=unmasking),
        [Request("a", {COND: prefix}, tuple(range(rows)), ("",) * rows)], streams={COND: pad_left([prefix] * rows, 0)},
        ids_BS=images_RS + policy.layout.image[0], logp_BS=torch.zeros(images_RS.shape, dtype=torch.float64),
        support=None, weights_version=0, step_BS=step_RS.int(),
    )  # fmt: skip


def _number(masked: Sequence[bool]) -> int:
    return sum(int(place) for place, on in zip(PLACES, masked, strict=True) if on)
