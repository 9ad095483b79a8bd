"""`rlmm bench estimators`: bias, variance and gradient of every estimate of a masked policy's log-prob, by enumeration.

On random policies of 3 positions and 4 codes every image, order and mask can be summed over, so what an estimator gives
on average, and what it should give, are known. Untrained random weights: the figures show that a bias exists and its
sign, not how large it is in practice.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from rlmm.bench.estimator_paths import Figures, confident_rows, figures, sandwich_row, trajectory_rows
from rlmm.bench.estimator_problem import CODES, LENGTH, MASKS_MS, PLACES, Problem, Row, made_row
from rlmm.bench.machine import write_json
from rlmm.objectives.estimators import Estimator
from rlmm.objectives.noise import noise_plan
from rlmm.run_folder import environment

ESTIMATORS: dict[str, Estimator] = {
    "mean field (d1)": Estimator("mean_field"),
    "truncated [.8, 1]": Estimator("truncated", ratios=(0.8, 1.0)),
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


def bench_estimators(policies: int, plans: int, json_file: Path | None) -> None:
    """Print the table; write it where asked."""
    problems = [Problem(seed) for seed in range(policies)]
    rows, others = measure(problems, plans), figures(problems, plans)
    console = Console()
    console.print(_table(rows, f"{policies} random policies, {plans} plans each; log-probs in nats an image"))
    console.print(_said(others))
    if json_file is not None:
        plan = {"policies": policies, "plans": plans, "codes": CODES, "positions": LENGTH}
        record = {"setting": environment(), "plan": plan, "rows": [asdict(row) for row in rows]}
        write_json(json_file, {**record, "figures": asdict(others)})


def measure(problems: Sequence[Problem], plans: int) -> list[Row]:
    """The gap of the bound first, then every estimator, then trajectories."""
    bound = made_row("the ELBO itself, against log pi", "elbo", 0, problems, Problem.elbo_gap, _along_elbo)
    rows = [_noise_row(name, one, problems, plans) for name, one in ESTIMATORS.items()]
    paths = [*trajectory_rows(problems, plans), *confident_rows(problems)]
    return [bound, *rows, sandwich_row(problems, plans), *paths]


def _table(rows: Sequence[Row], title: str) -> Table:
    table = Table(title=title)
    names = ("estimator", "what it is", "forwards", "bias", "deviation", "gradient cosine", "least")
    for column in names:
        table.add_column(column, justify="left" if column in names[:2] else "right")
    for row in rows:
        values = (row.bias, row.deviation, row.cosine, row.least)
        table.add_row(row.estimator, row.kind, f"{row.forwards:g}", *("" if v is None else f"{v:.3f}" for v in values))
    return table


def _said(others: Figures) -> str:
    return (
        f"log pi less the ELBO: mean {others.gap:.2f}, most {others.most_gap:.2f} nats\n"
        "variance of the difference of two policies' estimates: "
        f"{others.shared:.3f} under one plan, {others.apart:.2f} under two\n"
        f"images whose upper estimate (SPG) lies below log pi: {others.violated:.0%}"
    )


def _along_elbo(problem: Problem) -> Tensor:
    return (problem.chance_N * problem.advantage_N * problem.elbo).sum()


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

    return made_row(name, str(estimator.kind), estimator.draws, problems, errors, surrogate)
