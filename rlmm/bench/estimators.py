"""`rlmm bench estimators`: bias, variance and gradient of every estimate of a masked policy's log-prob, by enumeration.

On random policies of 3 positions and 4 codes every image, order and mask can be summed over, so what an estimator gives
on average, and what it should give, are known. Untrained random weights: the figures show that a bias exists and its
sign, not how large it is in practice.

Shapes: N = 64 images, M = 8 masks, S = 3 positions.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import permutations, product
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from rlmm.bench.machine import write_json
from rlmm.config.policy import NewPolicy
from rlmm.objectives.estimators import Estimator
from rlmm.objectives.noise import noise_plan
from rlmm.policies.families.llama import build
from rlmm.policies.masked import MaskedPolicy, States
from rlmm.run_folder import environment
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

ESTIMATORS: dict[str, Estimator] = {
    "mean field (d1)": Estimator("mean_field"),
    "truncated [.6, 1] (MaskGRPO)": Estimator("truncated", ratios=(0.6, 1.0)),
    "truncated [.1, .9] (dLLM-RL)": Estimator("truncated", ratios=(0.1, 0.9)),
    "mean over masked (UniGRPO)": Estimator("truncated", ratios=(0.0, 1.0)),
    "coupled (DiffuCoder)": Estimator("coupled", 3),
    "bernoulli, 1/t": Estimator("bernoulli"),
    "count": Estimator("count"),
    "count, 3 draws": Estimator("count", 3),
    "complementary pair (ESPO)": Estimator("complement", 2),
    "stratified, 3 draws": Estimator("stratified", 3),
    "quadrature, 3 nodes": Estimator("quadrature", 3),
}


@dataclass(frozen=True)
class Row:
    """Means over the policies. bias: the magnitude, against the ELBO, in nats an image; deviation: its standard one;
    cosine and least: of the policy gradient it gives with that of the expected reward, mean and least over policies."""

    estimator: str
    kind: str
    forwards: float
    bias: float
    deviation: float
    cosine: float
    least: float


def bench_estimators(policies: int, plans: int, json_file: Path | None) -> None:
    """Print the table; write it where asked."""
    rows = measure(policies, plans)
    table = Table(title=f"{policies} random policies, {plans} plans each; log-probs in nats an image")
    names = ("estimator", "what it is", "forwards", "bias", "deviation", "gradient cosine", "least")
    for column in names:
        table.add_column(column, justify="left" if column in names[:2] else "right")
    for row in rows:
        figures = (row.bias, row.deviation, row.cosine, row.least)
        table.add_row(row.estimator, row.kind, f"{row.forwards:g}", *(f"{figure:.3f}" for figure in figures))
    Console().print(table)
    if json_file is not None:
        plan = {"policies": policies, "plans": plans, "codes": CODES, "positions": LENGTH}
        write_json(json_file, {"setting": environment(), "plan": plan, "rows": [asdict(row) for row in rows]})


def measure(policies: int, plans: int) -> list[Row]:
    """The gap of the bound first, then every estimator, then trajectories."""
    problems = [Problem(seed) for seed in range(policies)]
    bound = _row("the ELBO itself, against log pi", "elbo", 0, problems, Problem.elbo_gap, _along_elbo)
    rows = [_noise_row(name, one, problems, plans) for name, one in ESTIMATORS.items()]
    exact = _row("trajectory, all steps", "trajectory", LENGTH, problems, lambda _: (0.0, 0.0), _along_paths)
    return [bound, *rows, exact]


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
        self.orders_ON = torch.stack([self._order(order) for order in permutations(range(LENGTH))])
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

    def _order(self, order: Sequence[int]) -> Tensor:
        """Log-probs [N] of all images, decided in this order."""
        masked, terms = [True] * LENGTH, []
        for at in order:
            terms.append(self.losses_NMS[:, _number(masked), at])
            masked[at] = False
        return torch.stack(terms).sum(0)


Surrogate = Callable[[Problem], Tensor]
"""The scalar whose gradient an estimator's policy gradient is on average: sum_x pi(x) (R(x) - E R) score(x)."""


def _along_elbo(problem: Problem) -> Tensor:
    return (problem.chance_N * problem.advantage_N * problem.elbo).sum()


def _along_paths(problem: Problem) -> Tensor:
    """Over images and orders, each with its own log-prob."""
    return (problem.chance_ON * problem.advantage_N * problem.orders_ON).sum()


def _cosine(problem: Problem, surrogate: Surrogate) -> float:
    exact = problem.gradient((problem.log_pi.exp() * problem.reward_N).sum())
    found = problem.gradient(surrogate(problem))
    return float(torch.nn.functional.cosine_similarity(_flat(found), _flat(exact), dim=0))


def _flat(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([part.flatten() for part in parts])


def _noise_row(name: str, estimator: Estimator, problems: Sequence[Problem], plans: int) -> Row:
    assert estimator.scheme != "trajectory", "noise schemes alone have plans"
    target = torch.ones(plans, LENGTH, dtype=torch.bool)
    plan = noise_plan(estimator.scheme, target, range(plans), estimator.draws, ratios=estimator.ratios)
    number_Pn = (plan.masks_BnS * PLACES).sum(-1)
    weight_PMS = torch.zeros(plans, len(MASKS_MS), LENGTH, dtype=torch.float64)
    weight_PMS.scatter_add_(1, number_Pn[..., None].expand_as(plan.weight_BnS), plan.weight_BnS)
    mean_MS = weight_PMS.mean(0)

    def errors(problem: Problem) -> tuple[float, float]:
        estimates_PN = torch.einsum("pms,nms->pn", weight_PMS, problem.losses_NMS.detach())
        bias_N = estimates_PN.mean(0) - problem.elbo.detach()
        return float(bias_N.abs().mean()), float(estimates_PN.std(0).mean())

    def surrogate(problem: Problem) -> Tensor:
        score_N = torch.einsum("ms,nms->n", mean_MS, problem.losses_NMS)
        return (problem.chance_N * problem.advantage_N * score_N).sum()

    return _row(name, str(estimator.kind), estimator.draws, problems, errors, surrogate)


def _row(
    name: str,
    kind: str,
    forwards: float,
    problems: Sequence[Problem],
    errors: Callable[[Problem], tuple[float, float]],
    surrogate: Surrogate,
) -> Row:
    cosines = [_cosine(problem, surrogate) for problem in problems]
    bias, deviation = (sum(column) / len(problems) for column in zip(*map(errors, problems), strict=True))
    return Row(name, kind, forwards, bias, deviation, sum(cosines) / len(cosines), min(cosines))


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
    request = Request("a", {COND: policy.layout.prefix(policy.encode_prompt("ab"))}, tuple(range(rows)), ("",) * rows)
    every = _trajectory(policy, request)
    row_R = torch.arange(rows).repeat_interleave(len(MASKS_MS))
    masked_RS = MASKS_MS.repeat(rows, 1)
    logp_RS, _ = policy.read(every, States(row_R, masked_RS, masked_RS))
    return logp_RS.double().unflatten(0, (rows, len(MASKS_MS)))


def _trajectory(policy: MaskedPolicy, request: Request) -> Trajectory:
    span = Span("image", Law(policy.layout.image), LENGTH, unmasking=Unmasking(1))
    return span_trajectory(
        policy.layout, span, [request], streams={COND: pad_left([request.streams[COND]] * len(IMAGES_NS), 0)},
        ids_BS=IMAGES_NS + policy.layout.image[0], logp_BS=torch.zeros(IMAGES_NS.shape, dtype=torch.float64),
        support=None, weights_version=0, step_BS=torch.zeros(IMAGES_NS.shape, dtype=torch.int32),
    )  # fmt: skip


def _number(masked: Sequence[bool]) -> int:
    return sum(int(place) for place, on in zip(PLACES, masked, strict=True) if on)
