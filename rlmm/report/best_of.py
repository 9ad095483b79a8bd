"""Best of n: what choosing among samples brings, against how many are drawn."""

import math
from collections.abc import Mapping, Sequence

from rlmm.report.findings import JudgeRole, leading
from rlmm.report.panels import Figure
from rlmm.report.plots import Plot, Point, interval_plot
from rlmm.report.records import BestOf, Contrast, Evaluation
from rlmm.report.svg import SMALL


def best_of_figures(evaluation: Evaluation, roles: Mapping[str, JudgeRole], prefix: str) -> list[Figure]:
    """Score against samples drawn, a line an arm and temperature: by the reward that chooses, and by the headline's
    judge where no reward is it. Empty where the evaluation has no best-of arm."""
    drawn = [one for one in evaluation.best_of if one.curve]
    if not drawn:
        return []
    by_reward = {_name(one): [Point(math.log2(p.n), p.mean, p.low, p.high) for p in one.curve] for one in drawn}
    caption = (
        "The expected best reward of n samples, over all choices of n among those that were drawn. It rises by itself: "
        "the reward chooses, and is what is shown."
    )
    figures = [Figure("Best of n by the trained reward", caption, _plot(f"{prefix}-reward", by_reward, "reward"))]
    first = leading(evaluation.contrasts, roles)
    if first is None or roles.get(first.judge) == "trained on":
        return figures
    shown = {_name(one): points for one in drawn if (points := _judged(evaluation, one, first))}
    if shown:
        caption = (
            f"What {first.judge}, which chose nothing, says of one sample and of the one that the reward chose of n. "
            "Training must beat the right end at its cost: n samples for each picture."
        )
        title = f"Best of n by {first.judge} (held out)"
        figures.append(Figure(title, caption, _plot(f"{prefix}-held-out", shown, f"{first.metric} by {first.judge}")))
    return figures


def _name(one: BestOf) -> str:
    return f"{one.of} at T = {one.temperature:g}"


def _judged(evaluation: Evaluation, one: BestOf, first: Contrast) -> list[Point]:
    """The arm itself, and what was chosen among its samples: both, or nothing."""
    rows = {
        row.arm: row
        for row in evaluation.rows
        if (row.judge, row.metric, row.temperature) == (first.judge, first.metric, one.temperature)
    }
    found = [(n, rows[arm]) for n, arm in ((1, one.of), (one.n, one.arm)) if arm in rows]
    return [Point(math.log2(n), row.mean, row.low, row.high) for n, row in found] if len(found) == 2 else []


def _plot(key: str, arms: Mapping[str, Sequence[Point]], what: str) -> Plot:
    # Doublings stand at equal distances.
    return interval_plot(
        key, arms, x_label="samples drawn", y_label=what, size=SMALL, told_as=lambda doublings: f"{2**doublings:g}"
    )
