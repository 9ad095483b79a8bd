"""`rlmm bench estimators`: bias, variance and gradient of every estimate of a masked policy's log-prob, by enumeration.

On random policies of 3 positions and 4 codes every image, order and mask can be summed over, so what an estimator gives
on average, and what it should give, are known. Untrained random weights: the figures show that a bias exists and its
sign, not how large it is in practice.

Shapes: N = 64 images, M = 8 masks, S = 3 positions.
"""

from collections.abc import Sequence
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
from rollouts.assembly import image_trajectory
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
    cosine and least: of its policy gradient with that of the expected reward, mean and least over policies."""

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
    for column in ("estimator", "what it is", "forwards", "bias", "deviation", "gradient cosine", "least"):
        table.add_column(column, justify="left" if column in ("estimator", "what it is") else "right")
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
    rows = [_noise_row(name, estimator, problems, plans) for name, estimator in ESTIMATORS.items()]
    bound = [(problem.elbo_gap(), problem.cosine(problem.elbo)) for problem in problems]
    sampled = [((0.0, 0.0), problem.trajectory_cosine()) for problem in problems]
    first = _row("the ELBO itself, against log pi", "elbo", 0, bound)
    return [first, *rows, _row("trajectory, all steps", "trajectory", LENGTH, sampled)]


class Problem:
    """One random policy, its rewards, and everything about it that a sum over images, orders and masks gives."""

    def __init__(self, seed: int) -> None:
        self.policy = random_policy(seed)
        generator = torch.Generator().manual_seed(1000 + seed)
        self.reward_N = torch.rand(len(IMAGES_NS), generator=generator, dtype=torch.float64)
        self.losses_NMS = masked_log_probs(self.policy)
        orders = torch.stack([self._order(order) for order in permutations(range(LENGTH))])
        self.orders_ON = orders
        self.log_pi = orders.logsumexp(0) - torch.tensor(float(len(orders))).log()
        self.elbo = orders.mean(0)
        self.exact = self._gradient((self.log_pi.exp() * self.reward_N).sum())

    def elbo_gap(self) -> tuple[float, float]:
        return float((self.elbo - self.log_pi).detach().abs().mean()), 0.0

    def cosine(self, score_N: Tensor) -> float:
        """Of sum_x pi(x) R(x) grad score(x), the policy gradient with `score` in the log-prob's place, and the exact
        one."""
        return self._compare((self.log_pi.detach().exp() * self.reward_N * score_N).sum())

    def trajectory_cosine(self) -> float:
        """The same over images and orders, each with its own log-prob."""
        chance_ON = self.orders_ON.detach().exp() / len(self.orders_ON)
        return self._compare((chance_ON * self.reward_N * self.orders_ON).sum())

    def _compare(self, surrogate: Tensor) -> float:
        return float(torch.nn.functional.cosine_similarity(self._gradient(surrogate), self.exact, dim=0))

    def _gradient(self, value: Tensor) -> Tensor:
        parameters = [p for p in self.policy.model.parameters() if p.requires_grad]
        found = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
        return torch.cat([g.flatten() for g in found if g is not None])

    def _order(self, order: Sequence[int]) -> Tensor:
        """Log-probs [N] of all images, decided in this order."""
        masked, terms = [True] * LENGTH, []
        for at in order:
            terms.append(self.losses_NMS[:, _number(masked), at])
            masked[at] = False
        return torch.stack(terms).sum(0)


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

    def score(problem: Problem) -> Tensor:
        return torch.einsum("ms,nms->n", mean_MS, problem.losses_NMS)

    found = [(errors(problem), problem.cosine(score(problem))) for problem in problems]
    return _row(name, str(estimator.kind), estimator.draws, found)


def _row(name: str, kind: str, forwards: float, found: Sequence[tuple[tuple[float, float], float]]) -> Row:
    """`found`: of each policy ((bias, deviation), cosine)."""
    cosines = [cosine for _, cosine in found]
    bias, deviation = (sum(column) / len(found) for column in zip(*[errors for errors, _ in found], strict=True))
    return Row(name, kind, forwards, bias, deviation, sum(cosines) / len(cosines), min(cosines))


def random_policy(seed: int) -> MaskedPolicy:
    """Far from uniform."""
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
    return image_trajectory(
        policy.layout, span, [request], streams={COND: pad_left([request.streams[COND]] * len(IMAGES_NS), 0)},
        ids_BS=IMAGES_NS + policy.layout.image[0], logp_BS=torch.zeros(IMAGES_NS.shape, dtype=torch.float64),
        support=None, weights_version=0, step_BS=torch.zeros(IMAGES_NS.shape, dtype=torch.int32),
    )  # fmt: skip


def _number(masked: Sequence[bool]) -> int:
    return sum(int(place) for place, on in zip(PLACES, masked, strict=True) if on)
