"""Where the time went: sums by stage and by kind of work, and the split over steps."""

from collections.abc import Sequence
from dataclasses import dataclass

from rlmm.report.panels import Figure
from rlmm.report.plots import stacked_plot
from rlmm.report.records import Curve, Stage
from rlmm.report.svg import N_COLOURS

ORDER = ("rollout", "score", "update", "save", "replay", "held_out", "other", "eval", "step")
"""Fixed, so that a kind of work has the same colour in every bar; kinds not named here come last."""


@dataclass(frozen=True)
class Segment:
    """Part of a bar: what it is, its seconds, its share of the longest bar, and its colour slot."""

    kind: str
    seconds: float
    share: float
    colour: int


@dataclass(frozen=True)
class Bar:
    """One stage's time."""

    stage: str
    seconds: float
    segments: tuple[Segment, ...]


def bars(stages: Sequence[Stage]) -> list[Bar]:
    """One bar a stage with any time known. 'other' is wall time (start to finish) that no time/* metric
    explains.
    """
    sums = [(stage.name, _sums(stage)) for stage in stages]
    longest = max((sum(parts.values()) for _, parts in sums), default=0.0)
    found = []
    for name, parts in sums:
        total = sum(parts.values())
        if total > 0:
            segments = [
                Segment(k, parts[k], parts[k] / longest, slot(k)) for k in sorted(parts, key=_rank) if parts[k] > 0
            ]
            found.append(Bar(name, total, tuple(segments)))
    return found


def split_figure(stage: Stage, prefix: str) -> Figure | None:
    """The seconds of each step by kind of work; None unless at least two kinds were logged."""
    parts = {k: curve for k, curve in _times(stage).items() if any(v > 0 for v in curve.values)}
    if len(parts) < 2:
        return None
    ordered = {kind: parts[kind] for kind in sorted(parts, key=_rank)}
    plot = stacked_plot(f"{prefix}-time", ordered, [slot(kind) for kind in ordered], y_label="seconds a step")
    caption = "Seconds of each step by kind of work. The thickest layer is the one worth making faster."
    return Figure(f"{stage.name}: time of a step", caption, plot)


def kinds(found: Sequence[Bar]) -> list[str]:
    """The kinds of work that occur in any bar, in the bars' order."""
    return sorted({segment.kind for bar in found for segment in bar.segments}, key=_rank)


def slot(kind: str) -> int:
    """The colour slot of a kind of work."""
    return _rank(kind)[0] % N_COLOURS


def duration(seconds: float) -> str:
    """'42 s', '3 min 20 s', '2 h 5 min'."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _times(stage: Stage) -> dict[str, Curve]:
    return {key.removeprefix("time/"): curve for key, curve in stage.curves.items() if key.startswith("time/")}


def _sums(stage: Stage) -> dict[str, float]:
    sums = {kind: sum(v for v in curve.values if v > 0) for kind, curve in _times(stage).items()}
    if stage.started and stage.finished:
        wall = (stage.finished - stage.started).total_seconds()
        sums["other"] = max(0.0, wall - sum(sums.values()))
    return sums


def _rank(kind: str) -> tuple[int, str]:
    return (ORDER.index(kind) if kind in ORDER else len(ORDER), kind)
