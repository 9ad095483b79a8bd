"""The evaluation as tables and plots: arms by temperatures, one table and one plot a judge and metric."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from rlmm.report.findings import JudgeRole, interval, signed, tone
from rlmm.report.panels import Figure
from rlmm.report.plots import Point, interval_plot
from rlmm.report.records import Contrast, EvalRow, Evaluation
from rlmm.report.svg import SMALL


@dataclass(frozen=True)
class Cell:
    """One arm at one temperature; `best` marks the highest mean of its arm."""

    mean: str
    interval: str
    best: bool


@dataclass(frozen=True)
class Score:
    """A judge's metric: the plot, the table (one row an arm, one cell a temperature) and what it rests on."""

    judge: str
    metric: str
    role: JudgeRole
    figure: Figure
    temperatures: tuple[float, ...]
    table: tuple[tuple[str, tuple[Cell | None, ...]], ...]
    basis: str


@dataclass(frozen=True)
class Difference:
    """One contrast as a table row."""

    pair: str
    judged: str
    temperatures: str
    difference: str
    interval: str
    tone: str


def scores(evaluation: Evaluation, roles: dict[str, JudgeRole], prefix: str) -> list[Score]:
    """One `Score` a judge and metric, held-out judges first."""
    keys = list(dict.fromkeys((row.judge, row.metric) for row in evaluation.rows))
    keys.sort(key=lambda key: roles.get(key[0]) == "trained on")
    arms = list(dict.fromkeys(row.arm for row in evaluation.rows))
    return [
        _score(
            [row for row in evaluation.rows if (row.judge, row.metric) == key],
            arms,
            roles.get(key[0], ""),
            f"{prefix}-{slug(key[0])}-{slug(key[1])}-{number}",
        )
        for number, key in enumerate(keys)
    ]


def diversity_figure(evaluation: Evaluation, prefix: str) -> Figure | None:
    """Diversity by temperature, one line an arm."""
    if not evaluation.diversity:
        return None
    arms = list(dict.fromkeys([row.arm for row in evaluation.rows] + [d.arm for d in evaluation.diversity]))
    points = {arm: [Point(d.temperature, d.value) for d in evaluation.diversity if d.arm == arm] for arm in arms}
    plot = interval_plot(f"{prefix}-diversity", points, x_label="temperature", y_label="diversity", size=SMALL)
    caption = (
        "How much the samples for one prompt differ, by temperature. An arm that scores higher but lies "
        "far lower here may only have become more certain of what it already did."
    )
    return Figure("Diversity of the arms", caption, plot)


def differences(contrasts: Sequence[Contrast]) -> list[Difference]:
    """All contrasts in the order they were written."""
    return [
        Difference(
            f"{c.arm} − {c.baseline}",
            f"{c.metric} by {c.judge}",
            ("best: " if c.at == "best" else "")
            + " / ".join("–" if t is None else f"{t:g}" for t in (c.arm_temperature, c.baseline_temperature)),
            signed(c.difference),
            interval(c.low, c.high, difference=True),
            tone(c),
        )
        for c in contrasts
    ]


def slug(text: str) -> str:
    """Letters, digits and hyphens only, for element ids."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "x"


def _score(rows: Sequence[EvalRow], arms: Sequence[str], role: JudgeRole, key: str) -> Score:
    judge, metric = rows[0].judge, rows[0].metric
    by_arm = {arm: [row for row in rows if row.arm == arm] for arm in arms}
    points = {
        arm: [Point(row.temperature, row.mean, row.low, row.high) for row in found] for arm, found in by_arm.items()
    }
    plot = interval_plot(key, points, x_label="temperature", y_label=f"{metric} by {judge}")
    caption = (
        "Each dot is the mean over held-out prompts, each bar its interval over prompts. Read it across "
        "temperatures: an arm that wins at T=1 but not at its rival's best temperature has been sharpened,"
        " not taught."
    )
    temperatures = tuple(sorted({row.temperature for row in rows}, reverse=True))
    table = tuple((arm, _cells(found, temperatures)) for arm, found in by_arm.items() if found)
    return Score(
        judge,
        metric,
        role,
        Figure("Score across temperatures", caption, plot),
        temperatures,
        table,
        _basis(rows),
    )


def _cells(rows: Sequence[EvalRow], temperatures: Sequence[float]) -> tuple[Cell | None, ...]:
    by_temperature = {row.temperature: row for row in rows}
    best = max(row.mean for row in rows)
    return tuple(
        Cell(f"{row.mean:.3f}", interval(row.low, row.high), row.mean == best) if row else None
        for row in map(by_temperature.get, temperatures)
    )


def _basis(rows: Sequence[EvalRow]) -> str:
    prompts = sorted({row.n_prompts for row in rows if row.n_prompts is not None})
    seeds = sorted({row.n_seeds for row in rows if row.n_seeds is not None})
    excluded = sum(row.excluded for row in rows)
    parts = [f"{_range(prompts)} prompts"] if prompts else []
    parts += [f"{_range(seeds)} sampling seed{'s' if seeds != [1] else ''} each"] if seeds else []
    parts.append(f"{excluded} sample{'s' if excluded != 1 else ''} excluded")
    return ", ".join(parts) + "."


def _range(values: Sequence[int]) -> str:
    return str(values[0]) if len(values) == 1 else f"{values[0]} to {values[-1]}"
