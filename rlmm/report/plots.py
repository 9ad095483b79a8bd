"""The plots of the page, each with its legend and alternative text."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, NullLocator

from rlmm.report.records import Curve
from rlmm.report.svg import N_COLOURS, PAPER, STYLE, TICKS, WIDE, inline_svg, new_figure, stand_in


@dataclass(frozen=True)
class Line:
    """One curve of a plot. `spread` (same steps) draws a band of plus and minus that much; `colour` is a
    slot.
    """

    label: str
    curve: Curve
    colour: int
    spread: Curve | None = None
    ceiling: float | None = None


@dataclass(frozen=True)
class Point:
    """A mean with its interval at one position of the x axis."""

    x: float
    mean: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class FrontierPoint:
    """A mean with its interval at a measured x, and what the point is called."""

    x: float
    mean: float
    name: str
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Plot:
    """A drawn plot: the SVG, its legend (label, colour slot) and its alternative text."""

    svg: Markup
    legend: tuple[tuple[str, int], ...]
    alt: str


def smoothed(curve: Curve, span: int) -> Curve:
    """Local linear regression, triangular weights over `span` points to either side (Cleveland 1979).

    It has no lag and follows a straight line exactly, at the ends too. NaN values are left out of every fit.
    """
    steps, values = np.array(curve.steps, np.float64), np.array(curve.values, np.float64)
    known = np.isfinite(values)
    x, y = steps[known], values[known]
    if not len(x):
        return curve
    reach = span * max(1.0, float(np.median(np.diff(x))) if len(x) > 1 else 1.0)
    out = []
    for step in steps:
        weight = np.clip(1 - np.abs(x - step) / reach, 0, None)
        if not weight.any():
            out.append(math.nan)
            continue
        mean_x, mean_y = np.average(x, weights=weight), np.average(y, weights=weight)
        spread = float(weight @ (x - mean_x) ** 2)
        slope = float(weight @ ((x - mean_x) * (y - mean_y))) / spread if spread > 0 else 0.0
        out.append(float(mean_y + slope * (step - mean_x)))
    return Curve(curve.steps, tuple(out))


def smoothing_span(curve: Curve) -> int:
    """How many points to either side a smoothed value rests on: an eighth of the curve, at least 3."""
    return max(3, round(len(curve.steps) / 8))


def line_plot(
    key: str,
    lines: Sequence[Line],
    *,
    size: tuple[float, float] = WIDE,
    y_label: str = "",
    log: bool = False,
) -> Plot:
    """Curves over steps: raw thin, smoothed thick where there are at least 12 points. `log` needs positive
    values.
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(size)
        for line in lines:
            _draw_line(axes, line)
        values = [v for line in lines for v in line.curve.values if not math.isnan(v)]
        if log and values and min(values) > 0:
            axes.set_yscale("log")
            axes.yaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_formatter(TICKS)
        axes.set_xlabel("step", loc="right")
        axes.set_title(y_label)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8 if size == WIDE else 5, integer=True))
        told = "; ".join(f"{line.label}: {ends(line.curve)}" for line in lines)
        legend = tuple((line.label, line.colour) for line in lines)
        return Plot(inline_svg(figure, key, f"Over steps. {told}."), legend, f"Over steps. {told}.")


def interval_plot(
    key: str,
    arms: Mapping[str, Sequence[Point]],
    *,
    x_label: str,
    y_label: str,
    size: tuple[float, float] = WIDE,
    told_as: Callable[[float], str] = "{:g}".format,
) -> Plot:
    """One dot with an interval for each arm and x, joined by a line; arms stand side by side. `told_as`: how an x is
    written."""
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(size)
        ticks = sorted({point.x for points in arms.values() for point in points})
        gap = min((b - a for a, b in zip(ticks, ticks[1:], strict=False)), default=1.0)
        for slot, points in enumerate(arms.values()):
            shift = gap * 0.06 * (slot - (len(arms) - 1) / 2)
            _draw_points(axes, sorted(points, key=lambda p: p.x), shift, stand_in(slot))
        axes.set_xticks(ticks, [told_as(tick) for tick in ticks])
        axes.set_xlim(ticks[0] - gap / 2, ticks[-1] + gap / 2)
        axes.set_xlabel(x_label, loc="right")
        if size == WIDE:
            axes.set_title(y_label)
        told = "; ".join(
            f"{arm}: " + ", ".join(f"{p.mean:.2f} at {told_as(p.x)}" for p in points) for arm, points in arms.items()
        )
        alt = f"{y_label} by {x_label}. {told}."
        legend = tuple((arm, slot % N_COLOURS) for slot, arm in enumerate(arms))
        return Plot(inline_svg(figure, key, alt), legend, alt)


def frontier_plot(
    key: str,
    arms: Mapping[str, Sequence[FrontierPoint]],
    *,
    x_label: str,
    y_label: str,
    size: tuple[float, float] = WIDE,
) -> Plot:
    """One line an arm through its named points, each with its interval, in the order of x."""
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(size)
        for slot, points in enumerate(arms.values()):
            ordered = sorted(points, key=lambda point: point.x)
            _draw_points(axes, [Point(p.x, p.mean, p.low, p.high) for p in ordered], 0.0, stand_in(slot))
            for point in ordered:
                axes.annotate(
                    point.name, (point.x, point.mean), (6, 5), textcoords="offset points", color=stand_in(slot), size=8
                )
        axes.margins(x=0.06)
        axes.set_xlabel(x_label, loc="right")
        axes.set_title(y_label)
        told = "; ".join(
            f"{arm}: " + ", ".join(f"{p.mean:.2f} at {p.x:.2f} ({p.name})" for p in points)
            for arm, points in arms.items()
        )
        alt = f"{y_label} by {x_label}. {told}."
        legend = tuple((arm, slot % N_COLOURS) for slot, arm in enumerate(arms))
        return Plot(inline_svg(figure, key, alt), legend, alt)


def stacked_plot(key: str, parts: Mapping[str, Curve], slots: Sequence[int], *, y_label: str) -> Plot:
    """Curves over the same steps stacked as areas; a step that a part lacks counts as zero for it."""
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(WIDE)
        steps = sorted({step for curve in parts.values() for step in curve.steps})
        by_step = {name: dict(zip(c.steps, c.values, strict=True)) for name, c in parts.items()}
        heights = [[_finite(by_step[name].get(step, 0.0)) for step in steps] for name in parts]
        colours = [stand_in(slot) for slot in slots]
        axes.stackplot(steps, heights, colors=colours, step="mid", alpha=0.82, linewidth=0)
        axes.margins(x=0)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("step", loc="right")
        axes.set_title(y_label)
        told = ", ".join(f"{name} {sum(height):.0f}" for name, height in zip(parts, heights, strict=True))
        alt = f"Stacked areas over steps, in seconds. Sums: {told}."
        legend = tuple(zip(parts, slots, strict=True))
        return Plot(inline_svg(figure, key, alt), legend, alt)


def tenths(curve: Curve) -> tuple[float, float] | None:
    """Means of the first and the last tenth of a curve's finite values (at least one value each)."""
    values = [value for value in curve.values if not math.isnan(value)]
    if not values:
        return None
    n = max(1, len(values) // 10)
    return sum(values[:n]) / n, sum(values[-n:]) / n


def ends(curve: Curve) -> str:
    """'0.604 to 0.843', the means of the first and the last tenth; or the only value; or 'no values'."""
    found = tenths(curve)
    if found is None:
        return "no values"
    return f"{found[0]:.3g}" if len(curve.steps) == 1 else f"{found[0]:.3g} to {found[1]:.3g}"


def _draw_line(axes: Axes, line: Line) -> None:
    steps, colour = line.curve.steps, stand_in(line.colour)
    if line.ceiling is not None:
        axes.axhline(line.ceiling, color=colour, linewidth=1.1, linestyle=(0, (4, 3)))
    if line.spread is not None:
        spread = dict(zip(line.spread.steps, line.spread.values, strict=True))
        width = [spread.get(step, math.nan) for step in steps]
        low = [v - w for v, w in zip(line.curve.values, width, strict=True)]
        high = [v + w for v, w in zip(line.curve.values, width, strict=True)]
        axes.fill_between(steps, low, high, color=colour, alpha=0.13, linewidth=0)
    thick: dict[str, Any] = {"color": colour, "linewidth": 2.0}
    if len(steps) < 12:
        axes.plot(steps, line.curve.values, marker="o", markersize=4, **thick)
        return
    axes.plot(steps, line.curve.values, color=colour, alpha=0.38, linewidth=0.9)
    axes.plot(steps, smoothed(line.curve, smoothing_span(line.curve)).values, **thick)


def _draw_points(axes: Axes, points: Sequence[Point], shift: float, colour: str) -> None:
    xs = [point.x + shift for point in points]
    axes.plot(xs, [point.mean for point in points], color=colour, linewidth=1.4, alpha=0.55)
    for x, point in zip(xs, points, strict=True):
        if point.low is not None and point.high is not None:
            axes.plot([x, x], [point.low, point.high], color=colour, linewidth=2.2, alpha=0.75)
    axes.plot(xs, [p.mean for p in points], "o", color=colour, markersize=7, markeredgecolor=PAPER)


def _finite(value: float) -> float:
    return value if math.isfinite(value) else 0.0
