"""The evidence as a table and a plot."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from rlmm.evidence.results import difference


def write_pages(record: Mapping[str, Any], out: Path) -> None:
    """`<name>.md` and `<name>.png` beside the record's own file."""
    name = record["settings"]["name"]
    (out / f"{name}.md").write_text(markdown(record))
    wide = max(9.0, 4.5 + 0.9 * len(record["arms"]))
    figure, axes = plt.subplots(1, 2, figsize=(wide, 3.6), width_ratios=(3, 2), layout="constrained")
    _values(axes[0], record)
    _temperatures(axes[1], record)
    figure.savefig(out / f"{name}.png", dpi=140)
    plt.close(figure)


def markdown(record: Mapping[str, Any]) -> str:
    """Values a seed, differences with intervals, and what was chosen."""
    plan, arms = record["settings"], record["arms"]
    metric = f"{plan['judge']} {plan['metric']}"
    lines = [
        f"# {plan['name']}: {metric} on {plan['test']['prompts']} test prompts",
        "",
        f"![Values of every arm and seed, and each arm by temperature]({plan['name']}.png)",
        "",
        "| arm | " + " | ".join(f"seed {seed}" for seed in plan["seeds"]) + " | mean | seconds beyond the start |",
        "|---|" + "---|" * (len(plan["seeds"]) + 2),
    ]
    for arm, one in arms.items():
        seconds = record["compute"]["seconds"][arm]
        cells = [f"{value:.3f}" for value in [*one["values"], one["mean"]]]
        lines.append(f"| {arm} | " + " | ".join(cells) + f" | {sum(seconds) / len(seconds):.0f} |")
    lines += ["", "| difference | mean | 95 % t-interval over seeds |", "|---|---|---|"]
    lines += [
        f"| {row['arm']} - {row['baseline']} | {row['mean']:+.3f} | [{row['low']:+.3f}, {row['high']:+.3f}] |"
        for row in record["differences"]
    ]
    lines += _at_each_temperature(record)
    lines += _beside(record.get("beside", {}))
    lines += ["", "Chosen on the validation prompts with equal trials:", ""]
    lines += [
        f"- {arm}: {_short(plan, arm, one['chosen'])}, temperature {one['chosen']['temperature']:g} "
        f"(validation {one['chosen']['score']:.3f})"
        for arm, one in arms.items()
    ]
    return "\n".join([*lines, "", f"Commit {record['commit']}.", ""])


def _at_each_temperature(record: Mapping[str, Any]) -> list[str]:
    """Of arms that were scored at different temperatures, the difference at each: what a temperature gives is no gain
    of training. Nothing where all have the same."""
    arms = record["arms"]
    chosen = {arm: f"{one['chosen']['temperature']:g}" for arm, one in arms.items()}
    unequal = [(d["arm"], d["baseline"]) for d in record["differences"] if chosen[d["arm"]] != chosen[d["baseline"]]]
    if not unequal:
        return []
    shared = [
        t for t in next(iter(arms.values()))["by_temperature"] if all(t in a["by_temperature"] for a in arms.values())
    ]
    head = " | ".join(f"both at {t}" for t in shared)
    lines = ["", "Arms above whose temperatures differ, at one temperature each:", ""]
    lines += [f"| difference | {head} |", "|---|" + "---|" * len(shared)]
    for arm, baseline in unequal:
        found = [difference(arm, baseline, {a: arms[a]["by_temperature"][t] for a in (arm, baseline)}) for t in shared]
        cells = [f"{one.mean:+.3f} [{one.low:+.3f}, {one.high:+.3f}]" for one in found]
        lines.append(f"| {arm} - {baseline} | " + " | ".join(cells) + " |")
    return lines


def _beside(told: Mapping[str, Mapping[str, list[float]]]) -> list[str]:
    """A table of means over seeds, with the least and the greatest; nothing where nothing else was measured."""
    names = list(dict.fromkeys(name for columns in told.values() for name in columns))
    if not names:
        return []
    lines = ["", "Beside it, mean over seeds (least to greatest):", ""]
    lines += ["| arm | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
    for arm, columns in told.items():
        cells = [f"{sum(v) / len(v):.3f} ({min(v):.3f} to {max(v):.3f})" for v in (columns[name] for name in names)]
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return lines


def _short(plan: Mapping[str, Any], arm: str, chosen: Mapping[str, Any]) -> str:
    given = plan["start"] if arm not in plan["arms"] else plan["arms"][arm]
    return ", ".join(f"{key} {value}" for key, value in given["trials"][chosen["trial"]].items())


def _values(axis: Axes, record: Mapping[str, Any]) -> None:
    for place, one in enumerate(record["arms"].values()):
        axis.plot([place] * len(one["values"]), one["values"], "o", color="tab:blue", alpha=0.6)
        axis.plot([place - 0.25, place + 0.25], [one["mean"]] * 2, color="black")
    axis.set_xticks(range(len(record["arms"])), list(record["arms"]))
    if len(record["arms"]) > 5:
        plt.setp(axis.get_xticklabels(), rotation=25, ha="right", rotation_mode="anchor")
    axis.set_ylabel(f"{record['settings']['judge']} {record['settings']['metric']}")
    axis.set_title("Test prompts: each training seed, and the mean")


def _temperatures(axis: Axes, record: Mapping[str, Any]) -> None:
    for place, (arm, one) in enumerate(record["arms"].items()):
        points = sorted((float(t), sum(v) / len(v)) for t, v in one["by_temperature"].items())
        # Matplotlib has ten colours.
        axis.plot(*zip(*points, strict=True), "o-" if place < 10 else "s--", label=arm)
    axis.set_xlabel("sampling temperature")
    axis.set_title("Sharpening or learning")
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
