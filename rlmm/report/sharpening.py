"""Sharpening or learning: what is left of a gain once every arm is sampled at the temperature that suits it best.

A policy that only became more certain gains at T = 1 and nothing at its best temperature, since a colder temperature
gives the baseline the same for nothing. One that learned lies above the baseline at the same diversity.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from rlmm.report.checks import Check, Table
from rlmm.report.findings import JudgeRole, interval, leading, signed
from rlmm.report.panels import Figure
from rlmm.report.plots import FrontierPoint, frontier_plot
from rlmm.report.records import Contrast, EvalRow, Evaluation
from rlmm.report.rules import RULES, Status, worst
from rlmm.report.svg import WIDE

Verdict = Literal["learned", "sharpened", "no gain shown", "worse"]


@dataclass(frozen=True)
class Pair:
    """An arm against a baseline by one judge and metric: the contrast at each shared temperature, and at each one's
    best.

    `kept` is the share of the largest shown gain that is left at the best temperatures, None where no gain is shown;
    `cold_end` the baseline's rise over its last step to the coldest temperature as a share of the gain at best, None
    where its best is not the coldest.
    """

    arm: str
    baseline: str
    equal: Mapping[float, Contrast]
    best: Contrast
    kept: float | None
    cold_end: float | None

    @property
    def verdict(self) -> Verdict:
        shown = self.best.low is not None and self.best.low > 0
        if shown:
            return "learned"
        if self.best.high is not None and self.best.high < 0:
            return "worse"
        return "sharpened" if self.kept is not None else "no gain shown"

    @property
    def status(self) -> Status:
        if self.verdict == "worse":
            return "bad"
        if self.kept is None:
            return "ok" if self.verdict == "learned" else "look"
        cold = "ok" if self.cold_end is None else RULES["cold_end"].status(self.cold_end)
        return worst(RULES["sharpening"].status(self.kept), cold)


def pairs(evaluation: Evaluation, roles: Mapping[str, JudgeRole], learners: Sequence[str]) -> list[Pair]:
    """Every learner against every arm that is none, by the judge and metric of the headline; all arms against those
    before them where none is a learner. The best of an arm's samples is none of them.
    """
    first = leading(evaluation.contrasts, roles)
    if first is None:
        return []
    chosen = {one.arm for one in evaluation.best_of}
    judged = [c for c in evaluation.contrasts if (c.judge, c.metric) == (first.judge, first.metric)]
    judged = [c for c in judged if not {c.arm, c.baseline} & chosen]
    if any(c.arm in learners for c in judged):
        judged = [c for c in judged if c.arm in learners and c.baseline not in learners]
    rows = [row for row in evaluation.rows if (row.judge, row.metric) == (first.judge, first.metric)]
    names = dict.fromkeys((c.arm, c.baseline) for c in judged)
    found = [_pair(arm, [c for c in judged if (c.arm, c.baseline) == (arm, base)], rows) for arm, base in names]
    return [pair for pair in found if pair is not None]


def check(evaluation: Evaluation, roles: Mapping[str, JudgeRole], learners: Sequence[str], prefix: str) -> Check | None:
    """The verdict on every pair with the plot of score by diversity; None without a contrast at best temperatures."""
    found = pairs(evaluation, roles, learners)
    if not found:
        return None
    told = "; ".join(_told(pair) for pair in found)
    rule = f"{RULES['sharpening'].text} {RULES['cold_end'].text}"
    best = found[0].best
    return Check(
        "sharpening",
        worst(*(pair.status for pair in found)),
        told,
        rule,
        frontier(evaluation, best.judge, best.metric, prefix),
        _table(found),
    )


def frontier(evaluation: Evaluation, judge: str, metric: str, prefix: str) -> Figure:
    """Score by diversity, a line an arm through its temperatures; by temperature where diversity was not recorded."""
    spread = {(d.arm, d.temperature): d.value for d in evaluation.diversity}
    arms: dict[str, list[FrontierPoint]] = {}
    for row in evaluation.rows:
        if (row.judge, row.metric) == (judge, metric):
            x = spread.get((row.arm, row.temperature), math.nan) if spread else row.temperature
            if math.isfinite(x):
                arms.setdefault(row.arm, []).append(
                    FrontierPoint(x, row.mean, f"T={row.temperature:g}", row.low, row.high)
                )
    plot = frontier_plot(
        f"{prefix}-frontier",
        arms,
        x_label="diversity of the samples of one prompt" if spread else "temperature",
        y_label=f"{metric} by {judge}",
        size=WIDE,
    )
    caption = (
        "A line an arm through the temperatures it was sampled at. Moving left along a line is sharpening, which a "
        "colder temperature does for nothing; a line that lies above another was taught something."
    )
    return Figure("Sharpening or learning", caption, plot)


def _pair(arm: str, contrasts: Sequence[Contrast], rows: Sequence[EvalRow]) -> Pair | None:
    best = next((c for c in contrasts if c.at == "best"), None)
    if best is None:
        return None
    equal = {
        c.arm_temperature: c
        for c in contrasts
        if c.at != "best" and c.arm_temperature is not None and c.arm_temperature == c.baseline_temperature
    }
    gains = [c.difference for c in equal.values() if c.low is not None and c.low > 0]
    shown = best.low is not None and best.low > 0
    kept = (max(best.difference, 0.0) / max(gains) if shown else 0.0) if gains else None
    return Pair(arm, best.baseline, equal, best, kept, _cold_end(best, rows))


def _cold_end(best: Contrast, rows: Sequence[EvalRow]) -> float | None:
    means = sorted((row.temperature, row.mean) for row in rows if row.arm == best.baseline)
    if len(means) < 2 or best.baseline_temperature != means[0][0] or best.difference <= 0:
        return None
    return max(0.0, means[0][1] - means[1][1]) / best.difference


def _told(pair: Pair) -> str:
    words = f"{pair.arm} against {pair.baseline}: {pair.verdict}"
    if pair.kept is not None:
        words += f", {pair.kept:.2f} of the gain left at the best temperatures"
    if pair.cold_end is not None and RULES["cold_end"].status(pair.cold_end) != "ok":
        words += f"; {pair.baseline} was still rising at its coldest, so try a colder temperature"
    return words


def _table(found: Sequence[Pair]) -> Table:
    temperatures = sorted({t for pair in found for t in pair.equal}, reverse=True)
    head = ("arms", *(f"both at T = {t:g}" for t in temperatures), "each at its best", "verdict")
    rows = tuple(
        (
            f"{pair.arm} − {pair.baseline}",
            *(_gain(pair.equal.get(t)) for t in temperatures),
            f"{_gain(pair.best)}\nT = {_temperature(pair.best.arm_temperature)}"
            f" against {_temperature(pair.best.baseline_temperature)}",
            pair.verdict,
        )
        for pair in found
    )
    marked = {(number, len(head) - 1): pair.status for number, pair in enumerate(found)}
    best = found[0].best
    return Table(f"Gains in {best.metric} by {best.judge} on held-out prompts, with intervals.", head, rows, marked)


def _gain(contrast: Contrast | None) -> str:
    if contrast is None:
        return "–"
    return f"{signed(contrast.difference)}\n{interval(contrast.low, contrast.high, difference=True)}"


def _temperature(value: float | None) -> str:
    return "–" if value is None else f"{value:g}"
