"""Curves of a stage as figures: plots with their words."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rlmm.report.panel_table import HEALTH, LABELS, PANELS, Panel
from rlmm.report.plots import Line, Plot, ends, line_plot
from rlmm.report.records import Curve, Stage
from rlmm.report.svg import SMALL

GREY, BLUE, AMBER, TEAL, VIOLET = 0, 1, 2, 3, 4


@dataclass(frozen=True)
class Figure:
    """A plot with its words. `reading` is what its main curve did; `alarm` is set where a gate was passed."""

    title: str
    caption: str
    plot: Plot
    reading: str = ""
    alarm: str = ""


def panel_figures(
    stage: Stage, prefix: str, against: Mapping[str, tuple[str, float]] | None = None
) -> dict[str, Figure]:
    """The small plots of a stage by their panel's name, where something was logged.

    `prefix` keeps SVG ids apart. `against` has, for a key, a level to draw beside it and the level's name.
    """
    figures = {}
    for panel in PANELS.get(stage.kind, HEALTH):
        there = [key for key in panel.keys if key in stage.curves]
        if there:
            figures[panel.name] = _figure(panel, there, stage, prefix, against or {})
    return figures


def reward_figure(stage: Stage, prefix: str) -> Figure | None:
    """The trained reward with a band of one standard deviation."""
    reward = stage.curves.get("reward/mean")
    if reward is None:
        return None
    terms = [k for k in stage.curves if k.startswith("reward/") and k.endswith("/mean") and k != "reward/mean"]
    lines = [Line("reward", reward, BLUE, stage.curves.get("reward/std"))]
    if len(terms) > 1:
        names = [(key, key.removeprefix("reward/").removesuffix("/mean")) for key in terms]
        lines += [Line(name, stage.curves[key], AMBER + slot) for slot, (key, name) in enumerate(names)]
    plot = line_plot(f"{prefix}-reward", lines, y_label="reward")
    caption = (
        "Mean reward of each step's rollouts: thin as logged, thick smoothed, the band one standard "
        "deviation to either side. A rising line with a band that narrows from below means that the worst "
        "samples got better."
    )
    return Figure("Reward trained on", caption, plot, f"{ends(reward)} (first and last tenth)")


def judges_figure(stage: Stage, prefix: str) -> Figure | None:
    """The trained reward against each held-out judge."""
    reward = stage.curves.get("reward/mean")
    held = {k: c for k, c in stage.curves.items() if k.startswith("held_out/") and k.endswith("/mean")}
    if reward is None or not held:
        return None
    lines = [Line("trained reward", reward, BLUE)]
    for slot, (key, curve) in enumerate(held.items()):
        name = key.removeprefix("held_out/").removesuffix("/mean")
        lines.append(Line(f"{name} (held out)", curve, AMBER + slot))
    caption = (
        "The held-out judge scores the same rollouts and is never trained on. The two should rise "
        "together; where the trained reward rises and the held-out one falls, the policy is learning the "
        "judge's weaknesses."
    )
    plot = line_plot(f"{prefix}-judges", lines, size=SMALL)
    return Figure("Trained against held-out judge", caption, plot)


def _figure(
    panel: Panel, keys: Sequence[str], stage: Stage, prefix: str, against: Mapping[str, tuple[str, float]]
) -> Figure:
    lines = [
        Line(_label(key), stage.curves[key], BLUE + slot, ceiling=stage.gates.get(key)) for slot, key in enumerate(keys)
    ]
    levels = [(*against[key], stage.curves[key].steps) for key in keys if key in against]
    held = [Line(name, Curve(steps, (level,) * len(steps)), GREY) for name, level, steps in levels]
    plot = line_plot(f"{prefix}-{panel.name}", [*held, *lines], size=SMALL, log=panel.log)
    alarms = [_passed(line) for line in lines if line.ceiling is not None]
    return Figure(panel.title, panel.caption, plot, ends(lines[0].curve), " ".join(filter(None, alarms)))


def _passed(line: Line) -> str:
    points = zip(line.curve.steps, line.curve.values, strict=True)
    above = [step for step, value in points if line.ceiling is not None and value > line.ceiling]
    if not above:
        return ""
    return f"{line.label}: above the gate of {line.ceiling:g} at {len(above)} step(s), first {above[0]}."


def _label(key: str) -> str:
    if key in LABELS:
        return LABELS[key]
    first, _, rest = key.partition("/")
    return (rest or first).removesuffix("_share").replace("_", " ")
