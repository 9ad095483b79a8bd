"""Runs an ablation plan, and writes its record, its table and one plot a factor."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from rlmm.evidence.plan import START, AblationPlan
from rlmm.evidence.recipes import ablation_run
from rlmm.evidence.results import evaluation, extra_seconds, scores
from rlmm.pipeline import run_recipe
from rlmm.run_folder import RunFolder, environment
from rlmm.train.checkpoint import write_json_atomically
from rlmm.train.metrics import MetricsFile

WINDOW = 10
"""Rollouts a point of a drawn reward curve is the mean of."""


def run_ablation(plan: AblationPlan, folder: Path, out: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Run what is not done yet in `folder`; write `<name>.json`, `.md` and `.png` to `out`."""
    run = run_recipe(ablation_run(plan, folder), say)
    record = ablation_record(plan, run, environment())
    out.mkdir(parents=True, exist_ok=True)
    write_json_atomically(out / f"{plan.name}.json", record)
    (out / f"{plan.name}.md").write_text(markdown(record))
    draw(record, out / f"{plan.name}.png")
    return record


def ablation_record(plan: AblationPlan, run: RunFolder, environment: Mapping[str, Any]) -> dict[str, Any]:
    """Held-out scores and the reward curve of the start and every setting."""
    judged = evaluation(run)
    table, seconds = scores(judged, plan), extra_seconds(judged, START)

    def one(stage: str) -> dict[str, Any]:
        rows = MetricsFile(run.stage(stage) / "metrics.jsonl").read()
        return {
            "by_temperature": {f"{t:g}": table[stage, t] for t in plan.temperatures},
            "best": max(table[stage, t] for t in plan.temperatures),
            "seconds": seconds[stage],
            "reward": [row["reward/mean"] for row in rows if row.get("reward/mean") is not None],
        }

    return {
        "start": one(START),
        "factors": {
            factor: {label: one(plan.stage(factor, label)) for label in settings}
            for factor, settings in plan.factors.items()
        },
        "settings": plan.model_dump(mode="json"),
        "environment": {key: environment[key] for key in ("python", "platform", "processor", "packages")},
        "commit": environment["commit"],
    }


def markdown(record: Mapping[str, Any]) -> str:
    """A table: every setting at its best temperature, the base in bold."""
    plan = record["settings"]
    metric = f"{plan['judge']} {plan['metric']}"
    lines = [
        f"# {plan['name']}: one setting of GRPO changed at a time",
        "",
        f"One training seed, {plan['validation']['prompts']} validation prompts, {metric} at the best of the "
        f"temperatures {plan['temperatures']}; the start (SFT) has {record['start']['best']:.3f}. In bold: the base.",
        "",
        f"![Reward while training, one plot a factor]({plan['name']}.png)",
        "",
        "| factor | setting | " + metric + " | last reward | seconds |",
        "|---|---|---|---|---|",
    ]
    for factor, settings in record["factors"].items():
        for label, one in settings.items():
            name = label if plan["factors"][factor][label] else f"**{label}**"
            last = fmean(one["reward"][-WINDOW:])
            lines.append(f"| {factor} | {name} | {one['best']:.3f} | {last:.3f} | {one['seconds']:.0f} |")
    return "\n".join([*lines, "", f"Commit {record['commit']}.", ""])


def draw(record: Mapping[str, Any], path: Path) -> None:
    """One plot a factor: the trained reward over rollouts, each setting with its held-out score in the legend."""
    factors = record["factors"]
    columns = min(3, len(factors))
    rows = -(-len(factors) // columns)
    size = (11 if columns == 3 else 5.5 * columns, 2.9 * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axis, (factor, settings) in zip(axes.flat, factors.items(), strict=False):
        _curves(axis, factor, settings)
    for axis in axes.flat[len(factors) :]:
        axis.set_visible(False)
    figure.savefig(path, dpi=140)
    plt.close(figure)


def _curves(axis: Axes, factor: str, settings: Mapping[str, Any]) -> None:
    for label, one in settings.items():
        curve = smooth(one["reward"], WINDOW)
        axis.plot(range(1, len(curve) + 1), curve, label=f"{label}: {one['best']:.3f}")
    axis.set_title(factor)
    axis.set_xlabel("rollout")
    axis.set_ylabel("reward")
    axis.legend(title="held-out score", fontsize=7, title_fontsize=7)


def smooth(values: Sequence[float], window: int) -> list[float]:
    """The mean of each value and the `window` - 1 before it, of fewer at the start."""
    return [fmean(values[max(0, i + 1 - window) : i + 1]) for i in range(len(values))]
