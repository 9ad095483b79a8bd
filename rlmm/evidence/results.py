"""From the evaluations of a plan's runs to choices, values a seed, and intervals over seeds."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import nan, sqrt
from statistics import fmean, stdev
from typing import Any

from scipy.stats import t as student

from rlmm.evidence.plan import EvidencePlan, Plan
from rlmm.evidence.recipes import EVALUATION, trial_name
from rlmm.run_folder import RunFolder


@dataclass(frozen=True)
class Chosen:
    """An arm's trial and temperature, by the mean of the metric on the validation prompts."""

    trial: int
    temperature: float
    score: float


@dataclass(frozen=True)
class Difference:
    """Mean over seeds of arm - baseline, each seed's pair from the same start, with a two-sided t-interval."""

    arm: str
    baseline: str
    values: tuple[float, ...]
    mean: float
    low: float
    high: float


def evaluation(run: RunFolder) -> dict[str, Any]:
    """The record of a run's evaluation stage."""
    return json.loads((run.stage(EVALUATION) / "eval.json").read_text())


def scores(record: Mapping[str, Any], plan: Plan, metric: str | None = None) -> dict[tuple[str, float], float]:
    """(arm, temperature) -> mean of a metric, the plan's if None, by its judge. ValueError where the judge did not give
    it."""
    wanted = metric or plan.metric
    found = {
        (row["arm"], row["temperature"]): row["mean"]
        for row in record["rows"]
        if row["judge"] == plan.judge and row["metric"] == wanted
    }
    if not found:
        known = sorted({f"{row['judge']} {row['metric']}" for row in record["rows"]})
        raise ValueError(f"no evaluation by {plan.judge!r} has the metric {wanted!r}; there are {known}")
    return found


def beside(
    plan: EvidencePlan, chosen: Mapping[str, Chosen], runs: Sequence[Mapping[str, Any]]
) -> dict[str, dict[str, list[float]]]:
    """What else is told of each arm, a value a seed: the plan's other metrics at the chosen temperature, and what the
    arm understands where that was asked."""
    told: dict[str, dict[str, list[float]]] = {arm: {} for arm in chosen}
    for metric in plan.also:
        for record in runs:
            table = scores(record, plan, metric)
            for arm, columns in told.items():
                columns.setdefault(metric, []).append(table[arm, chosen[arm].temperature])
    for record in runs:
        for row in record.get("understanding", []):
            told[row["arm"]].setdefault(f"understanding: {row['metric']}", []).append(row["mean"])
    return told


def choose(table: Mapping[tuple[str, float], float], arm: str, trials: int, temperatures: Sequence[float]) -> Chosen:
    """The best of all trials and temperatures; of equal ones the first."""
    options = [
        Chosen(trial, temperature, table[trial_name(arm, trial), temperature])
        for trial in range(trials)
        for temperature in temperatures
    ]
    return max(options, key=lambda option: option.score)


def difference(arm: str, baseline: str, values: Mapping[str, Sequence[float]], confidence: float = 0.95) -> Difference:
    """Paired over seeds; the bounds are NaN with fewer than two seeds."""
    gaps = [a - b for a, b in zip(values[arm], values[baseline], strict=True)]
    mean = fmean(gaps)
    if len(gaps) < 2:
        return Difference(arm, baseline, tuple(gaps), mean, nan, nan)
    half = float(student.ppf((1 + confidence) / 2, len(gaps) - 1)) * stdev(gaps) / sqrt(len(gaps))
    return Difference(arm, baseline, tuple(gaps), mean, mean - half, mean + half)


def differences(arms: Sequence[str], values: Mapping[str, Sequence[float]]) -> list[Difference]:
    """Every later arm against every earlier one, the last arm first."""
    return [difference(arm, other, values) for i, arm in reversed(list(enumerate(arms))) for other in arms[:i]]


def extra_seconds(record: Mapping[str, Any], start: str) -> dict[str, float]:
    """Arm -> seconds of training beyond the start; the start's own for the start."""
    spent = {row["arm"]: row["seconds"] for row in record["compute"]}
    return {arm: round(s if arm == start else s - spent[start], 1) for arm, s in spent.items()}


def choose_best_of(table: Mapping[tuple[str, float], float], plan: EvidencePlan, start: Chosen) -> dict[str, Chosen]:
    """The temperature of the best-of-n arm, which has no trials of its own; nothing where the plan has no such arm."""
    name = plan.best_of_arm
    if name is None:
        return {}
    options = [Chosen(start.trial, temperature, table[name, temperature]) for temperature in plan.temperatures]
    return {name: max(options, key=lambda option: option.score)}


def _settings(plan: EvidencePlan, arm: str, trial: int) -> dict[str, Any]:
    if arm in plan.all_arms:
        return plan.all_arms[arm].settings(trial)
    return {**plan.start.settings(trial), "best_of": plan.best_of}


def result_record(
    plan: EvidencePlan,
    chosen: Mapping[str, Chosen],
    tuning: Mapping[tuple[str, float], float],
    runs: Sequence[Mapping[str, Any]],
    environment: Mapping[str, Any],
) -> dict[str, Any]:
    """The evidence file's content; `runs`: the evaluation records of the plan's seeds, in order."""
    tables = [scores(record, plan) for record in runs]
    arms = [*plan.all_arms, *([plan.best_of_arm] if plan.best_of_arm else [])]
    values = {arm: [table[arm, chosen[arm].temperature] for table in tables] for arm in arms}
    start = arms[0]
    return {
        "arms": {
            arm: {
                "values": values[arm],
                "mean": fmean(values[arm]),
                "by_temperature": {f"{t:g}": [table[arm, t] for table in tables] for t in plan.temperatures},
                "chosen": asdict(chosen[arm]) | {"settings": _settings(plan, arm, chosen[arm].trial)},
            }
            for arm in arms
        },
        "beside": beside(plan, chosen, runs),
        "differences": [asdict(one) for one in differences(arms, values)],
        "compute": {
            "unit": f"seconds of training beyond {start}, rollouts and rewards included; {start}'s own for {start}",
            "seconds": {arm: [extra_seconds(record, start)[arm] for record in runs] for arm in arms},
        },
        "tuning": [{"trial": trial, "temperature": t, "score": score} for (trial, t), score in tuning.items()],
        "settings": plan.model_dump(mode="json"),
        "environment": {key: environment[key] for key in ("python", "platform", "processor", "packages")},
        "commit": environment["commit"],
    }
