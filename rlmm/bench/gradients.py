"""`rlmm bench gradients`: the policy gradient by every estimate of a masked policy's log-prob, on the same rollouts.

From the start of a run's GRPO stage a few sets of rollouts are drawn and scored once. On each set every estimate gives
the gradient of the stage's own loss, with the same advantages, under several noise plans. Two references:

    trajectory  the gradient of the exact log-prob of the sampled chains, all of their steps, the order's log-prob
                among them where confidence chose the order
    ELBO        the mean gradient under many other plans of stratified draws, which is that of the ELBO on average

Cosines `trajectory` and `elbo` are of an estimate's expected gradient on those rollouts: what noise adds to its length
and to a reference's is taken out (`gradient_sums`). `step` is of one plan's gradient, with all noise of rollouts and
plan, and of the gradient of the expected reward as the exact log-probs of many other rollouts give it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

from rich.console import Console
from rich.progress import track
from rich.table import Table

from rlmm.bench.gradient_plot import write_plot
from rlmm.bench.gradient_problem import Start, opened, plan_seeds, rolled
from rlmm.bench.gradient_sums import Against, Draws, dot
from rlmm.bench.machine import setting, timed, torch_threads, write_json
from rlmm.config.masked import EstimatorConfig
from rlmm.train.context import StageContext
from rlmm.train.experience import Experience

EXACT = EstimatorConfig()
BOUND = EstimatorConfig(kind="stratified", draws=8)
"""Of the reference for the ELBO, in each of its plans."""


@dataclass(frozen=True)
class GradientPlan:
    """sets: rollouts of the stage's size on which every estimate is differentiated, under `plans` plans each; forwards:
    a sample; bound_plans: of the reference for the ELBO; others: rollouts for the gradient of the expected reward."""

    sets: int
    plans: int
    forwards: int
    bound_plans: int
    others: int
    threads: int

    def __post_init__(self) -> None:
        if min(self.sets, self.forwards) < 1 or min(self.plans, self.bound_plans, self.others) < 2:
            raise ValueError(
                f"at least 1 set and 1 forward, and 2 plans, bound plans and others, are needed; got {self}"
            )


@dataclass(frozen=True)
class Row:
    """One estimate at one start. variance: over plans, E |g - E g|^2 / |E g|^2 on given rollouts; seconds: of forwards
    and backwards, a sample; cosines None where noise leaves no length to divide by."""

    run: str
    stage: str
    estimator: str
    kind: str
    forwards: int
    seconds: float
    variance: float | None
    trajectory: float | None
    elbo: float | None
    step: float | None


def bench_gradients(
    runs: Sequence[Path], stages: Sequence[str], plan: GradientPlan, json_file: Path | None, plot: Path | None
) -> None:
    """Print the table, of means over runs; write it and its picture where asked, and anew after each start."""
    contexts, rows = [opened(run, stage) for stage in stages for run in runs], list[Row]()
    for context in contexts:
        with torch_threads(plan.threads):
            rows += measure(context, plan)
        kept = {"setting": setting(plan.threads), "plan": asdict(plan), "rows": [asdict(row) for row in rows]}
        if json_file is not None:
            write_json(json_file, kept)
        if plot is not None:
            write_plot(kept["rows"], plot)
    console = Console()
    for stage in stages:
        console.print(_table(stage, [row for row in rows if row.stage == stage]))


def estimators(forwards: int, steps: int, confident: bool) -> dict[str, EstimatorConfig]:
    """What is compared at `forwards` a sample, or as near it as a scheme can be had; mean field and whole trajectories
    take what they take. `confident`: the order has a log-prob, which may be left out."""
    pairs, triples = max(1, forwards // 2), max(1, forwards // 3)
    found = {"trajectory, all steps": EXACT}
    if confident:
        found["trajectory, all steps, tokens alone"] = EstimatorConfig(order_term=False)
    if forwards < steps:
        found["trajectory, some steps"] = EstimatorConfig(steps=forwards)
        if confident:
            found["trajectory, some steps, tokens alone"] = EstimatorConfig(steps=forwards, order_term=False)
    upper = {"kind": "stratified", "draws": max(2, forwards), "upper": {}}
    return found | {
        "count": EstimatorConfig(kind="count", draws=forwards),
        "stratified": EstimatorConfig(kind="stratified", draws=forwards),
        "complement": EstimatorConfig(kind="complement", draws=2 * pairs),
        "quadrature": EstimatorConfig(kind="quadrature", draws=forwards),
        "bernoulli": EstimatorConfig(kind="bernoulli", draws=forwards),
        "sandwich (SPG)": EstimatorConfig.model_validate(upper),
        "truncated [.6, 1]": EstimatorConfig(kind="truncated", draws=forwards, ratios=(0.6, 1.0)),
        "coupled": EstimatorConfig(kind="coupled", draws=3 * triples),
        "mean field": EstimatorConfig(kind="mean_field"),
    }


def measure(context: StageContext, plan: GradientPlan) -> list[Row]:
    """A row an estimate."""
    start, rollouts = rolled(context, plan.sets + plan.others)
    made, ahead = [next(rollouts) for _ in range(plan.sets)], Draws()
    for one in track(rollouts, f"{context.run.path.name} {context.name}: reference", total=plan.others):
        ahead.add(start.gradient(one, EXACT, one.trajectory.seed))
    unmasking = context.config.sampling.unmasking.record()
    names = estimators(plan.forwards, unmasking.steps, not unmasking.policy_free)
    tallies = {name: _Tally(one) for name, one in names.items()}
    for one in track(made, f"{context.run.path.name} {context.name}: estimates"):
        add_set(start, one, tallies, plan, ahead)
    return [tally.row(context, name, unmasking.steps) for name, tally in tallies.items()]


def add_set(
    start: Start, made: Experience, tallies: Mapping[str, "_Tally"], plan: GradientPlan, ahead: Draws | None
) -> None:
    """One set's rollouts under every estimate."""
    exact, bound = Draws(), Draws()
    exact.add(start.gradient(made, EXACT, made.trajectory.seed))
    for number in range(plan.bound_plans):
        bound.add(start.gradient(made, BOUND, plan_seeds(made, f"bound {number}")))
    for tally in tallies.values():
        tally.add(start, made, plan.plans, {"trajectory": exact, "elbo": bound}, ahead)


class _Tally:
    """What an estimate came to over sets."""

    def __init__(self, estimator: EstimatorConfig) -> None:
        self.estimator, self.seconds = estimator, list[float]()
        self.cosines = {"trajectory": Against(), "elbo": Against(), "step": Against()}
        self.variance = self.squared_length = 0.0

    def add(
        self, start: Start, made: Experience, plans: int, references: Mapping[str, Draws], ahead: Draws | None
    ) -> None:
        found, one = Draws(), self.estimator
        still = one.kind == "mean_field" or (one.kind == "trajectory" and one.steps is None)
        for number in range(1 if still else plans):
            seeds = plan_seeds(made, number)
            spent = timed(lambda seeds=seeds: found.add(start.gradient(made, one, seeds)))
            self.seconds.append(spent.wall / max(1, int(made.kept_B.sum())))
        self.variance += found.variance
        self.squared_length += found.squared_length
        for name, reference in references.items():
            product = dot(found.mean_W, reference.mean_W)
            self.cosines[name].add(product, found.squared_length, reference.squared_length)
        if ahead is not None:
            product = dot(found.mean_W, ahead.mean_W)
            self.cosines["step"].add(product, found.squares / found.count, ahead.squared_length)

    def row(self, context: StageContext, name: str, steps: int) -> Row:
        one = self.estimator
        forwards = (one.steps or steps) if one.kind == "trajectory" else one.draws
        kind = "bounds mixed" if one.upper is not None else str(one.record().kind)
        variance = self.variance / self.squared_length if self.squared_length > 0 else None
        cosines = {reference: found.cosine for reference, found in self.cosines.items()}
        return Row(context.run.path.name, context.name, name, kind, forwards, fmean(self.seconds), variance, **cosines)


def _table(stage: str, rows: Sequence[Row]) -> Table:
    runs = list(dict.fromkeys(row.run for row in rows))
    table = Table(title=f"rollouts of stage {stage}, mean over {len(runs)} start(s)")
    columns = ("estimator", "what it is", "forwards", "ms a sample", "variance", "trajectory", "elbo", "step")
    for column in columns:
        table.add_column(column, justify="left" if column in columns[:2] else "right")
    for name in dict.fromkeys(row.estimator for row in rows):
        same = [row for row in rows if row.estimator == name]
        means = [_mean([getattr(row, column) for row in same]) for column in columns[4:]]
        spent = f"{1000 * fmean(row.seconds for row in same):.1f}"
        table.add_row(name, same[0].kind, str(same[0].forwards), spent, *means)
    return table


def _mean(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{fmean(known):.3f}" if len(known) == len(values) else ""
