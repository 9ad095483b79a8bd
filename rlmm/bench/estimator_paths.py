"""The rows of `rlmm bench estimators` that are no expectation over noise plans: trajectories of which a few steps are
read, confident orders with and without the order's log-prob, SPG's sandwich; and what else enumeration tells.

Shapes: N = 64 images, O = 6 orders, W = N x O ways, M = 8 masks, S = 3 positions, D = draws.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

import torch
from torch import Tensor

from rlmm.bench.estimator_problem import (
    IMAGES_NS,
    LENGTH,
    MASKS_MS,
    Problem,
    Row,
    made_row,
    path_trajectory,
    similarity,
)
from rlmm.objectives.estimators import Estimator, Upper, sandwiched, step_weights, upper_log_probs
from rlmm.objectives.noise import noise_plan
from rollouts.unmasking import Unmasking

STEPWISE = Unmasking(LENGTH, order="random", schedule="linear")
CONFIDENT = Unmasking(LENGTH, order="confidence", schedule="linear")
STEP_OS = torch.tensor([[order.index(at) for at in range(LENGTH)] for order in permutations(range(LENGTH))])
"""The step of each position in each order."""

UPPER = Upper()


def trajectory_rows(problems: Sequence[Problem], plans: int) -> list[Row]:
    """All steps, and one of three. The bias is against the log-prob of the same chain."""
    return [_trajectory_row(f"trajectory, {name}", steps, problems, plans) for name, steps in
            (("all steps", None), ("1 of 3 steps", 1))]  # fmt: skip


def _trajectory_row(name: str, steps: int | None, problems: Sequence[Problem], plans: int) -> Row:
    rows = max(1, plans // len(STEP_OS))
    step_RS = STEP_OS.repeat_interleave(rows, 0)
    some = path_trajectory(problems[0].policy, torch.zeros_like(step_RS), step_RS, STEPWISE)
    weight_OPS = step_weights(some, steps).view(len(STEP_OS), rows, LENGTH)

    def errors(problem: Problem) -> tuple[float, float]:
        estimate_PON = torch.einsum("ops,ons->pon", weight_OPS, problem.terms_ONS.detach())
        bias_ON = estimate_PON.mean(0) - problem.orders_ON.detach()
        deviation_ON = estimate_PON.std(0) if rows > 1 else torch.zeros_like(bias_ON)
        return float(bias_ON.abs().mean()), float(deviation_ON.mean())

    def surrogate(problem: Problem) -> Tensor:
        """Over images and orders, each with its own estimate."""
        score_ON = torch.einsum("os,ons->on", weight_OPS.mean(1), problem.terms_ONS)
        return (problem.chance_ON * problem.advantage_N * score_ON).sum()

    return made_row(name, "trajectory", steps or LENGTH, problems, errors, surrogate)


def confident_rows(problems: Sequence[Problem]) -> list[Row]:
    """Images revealed by the policy's own confidence, one position a step. Cosines are with the gradient of what such
    images earn on average; the bias is against the log-prob of the whole transition."""
    every = [_Ways(problem) for problem in problems]
    return [
        _confident_row("confident order, all of it", "trajectory", LENGTH, every, "logp_W"),
        _confident_row("confident order, tokens alone (dLLM-RL)", "surrogate", LENGTH, every, "tokens_W"),
        _confident_row("confident order, the ELBO", "elbo", LENGTH, every, "elbo_W"),
        _confident_row("confident order, mean field", "mean_field", 1, every, "mean_field_W"),
    ]


class _Ways:
    """Every image and order that confident decoding can take, and what log-probs would be differentiated there."""

    def __init__(self, problem: Problem) -> None:
        images_WS, step_WS = IMAGES_NS.repeat_interleave(len(STEP_OS), 0), STEP_OS.repeat(len(IMAGES_NS), 1)
        with torch.no_grad():
            whole = path_trajectory(problem.policy, images_WS, step_WS, CONFIDENT)
            possible_W = problem.policy.log_probs(whole).logp_BS.sum(1).isfinite()
        self.problem, image_W = problem, torch.arange(len(IMAGES_NS)).repeat_interleave(len(STEP_OS))[possible_W]
        ways = path_trajectory(problem.policy, images_WS[possible_W], step_WS[possible_W], CONFIDENT)
        self.logp_W, self.tokens_W = (
            problem.policy.log_probs(ways, estimator=Estimator(order_term=term)).logp_BS.sum(1)
            for term in (True, False)
        )
        self.elbo_W, self.mean_field_W = problem.elbo[image_W], problem.losses_NMS[image_W, -1].sum(1)
        self.reward_W, self.chance_W = problem.reward_N[image_W], self.logp_W.detach().exp()
        self.advantage_W = self.reward_W - (self.chance_W * self.reward_W).sum()

    def cosine(self, score_W: Tensor) -> float:
        exact = self.problem.gradient((self.logp_W.exp() * self.reward_W).sum())
        return similarity(exact, self.problem.gradient((self.chance_W * self.advantage_W * score_W).sum()))


def _confident_row(name: str, kind: str, forwards: float, every: Sequence[_Ways], score: str) -> Row:
    cosines = [ways.cosine(getattr(ways, score)) for ways in every]
    biases = [float((getattr(w, score) - w.logp_W).detach().abs() @ w.chance_W) for w in every]
    return Row(name, kind, forwards, sum(biases) / len(every), None, sum(cosines) / len(every), min(cosines))


def sandwich_row(problems: Sequence[Problem], plans: int, draws: int = 3) -> Row:
    """SPG's mixture by a sum over the plans that were drawn; its upper part drops a constant, so it has no bias in
    nats to state."""
    number_PD, weight_PDS = _count_plans(plans, draws)
    combos_CD, share_C = torch.unique(number_PD, dim=0, return_counts=True)
    first_C = torch.stack([(number_PD == combo).all(1).nonzero()[0, 0] for combo in combos_CD])
    weight_CDS, share_C = weight_PDS[first_C], share_C.double() / plans

    def surrogate(problem: Problem) -> Tensor:
        logp_NCDS = problem.losses_NMS[:, combos_CD]
        flat, weights = logp_NCDS.flatten(0, 1), weight_CDS.repeat(len(IMAGES_NS), 1, 1)
        lower_RS, upper_RS = (weights * flat).sum(1), upper_log_probs(flat, weights, UPPER.beta)
        advantage_R = problem.advantage_N.repeat_interleave(len(combos_CD))
        score_NC = sandwiched(lower_RS, upper_RS, advantage_R, UPPER.share).sum(1).view(len(IMAGES_NS), -1)
        return (problem.chance_N * problem.advantage_N * (score_NC @ share_C)).sum()

    return made_row(f"sandwich (SPG), {draws} draws", "bounds mixed", draws, problems, None, surrogate)


def _count_plans(plans: int, draws: int) -> tuple[Tensor, Tensor]:
    plan = noise_plan("count", torch.ones(plans, LENGTH, dtype=torch.bool), range(plans), draws)
    return (plan.masks_BnS * torch.tensor([4, 2, 1])).sum(-1), plan.weight_BnS


@dataclass(frozen=True)
class Figures:
    """Means over the policies. gap, most_gap: log pi less the ELBO, the second its largest, nats. shared, apart:
    variance of the difference of two policies' estimates (one mask each), under one plan and under two. violated: share
    of images whose upper estimate, constant and all and of endless draws, lies below log pi."""

    gap: float
    most_gap: float
    shared: float
    apart: float
    violated: float


def figures(problems: Sequence[Problem], plans: int, noise: float = 0.05) -> Figures:
    """`noise`: by which share of its own size every weight of the other policy differs."""
    gaps_N = [(problem.log_pi - problem.elbo).detach() for problem in problems]
    pairs = [_difference(problem, plans, noise) for problem in problems]
    violated = [_violated(problem) for problem in problems]
    return Figures(
        gap=float(torch.cat(gaps_N).mean()),
        most_gap=float(torch.cat(gaps_N).max()),
        shared=sum(one for one, _ in pairs) / len(pairs),
        apart=sum(two for _, two in pairs) / len(pairs),
        violated=sum(violated) / len(violated),
    )


def _violated(problem: Problem) -> float:
    """The mean over counts, and over the masks of a count, is 1/(C(S, k) S) a mask; its weight S/k."""
    count_M = MASKS_MS.sum(1)
    of_count = {k: int((count_M == k).sum()) for k in range(1, LENGTH + 1)}
    weight_M = torch.tensor([1 / of_count[k] / k if k else 0.0 for k in count_M.tolist()], dtype=torch.float64)
    weight_NMS = (weight_M[:, None] * MASKS_MS).expand(len(IMAGES_NS), -1, -1)
    upper_N = upper_log_probs(problem.losses_NMS.detach(), weight_NMS, UPPER.beta).sum(1)
    return float((upper_N < problem.log_pi.detach()).double().mean())


def _difference(problem: Problem, plans: int, noise: float) -> tuple[float, float]:
    other = problem.moved(noise)
    number_P1, weight_P1S = _count_plans(plans, 1)

    def estimates(losses_NMS: Tensor) -> Tensor:
        return (losses_NMS.detach()[:, number_P1[:, 0]] * weight_P1S[:, 0]).sum(-1)

    mine_NP, theirs_NP = estimates(problem.losses_NMS), estimates(other)
    return float((mine_NP - theirs_NP).var(1).mean()), float((mine_NP - theirs_NP.roll(1, 1)).var(1).mean())
