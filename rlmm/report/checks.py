"""The checks of one stage: a figure of its curves, the rule it is judged by, and the plot it is read from."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rlmm.report import findings
from rlmm.report.panels import Figure
from rlmm.report.plots import tenths
from rlmm.report.records import Curve
from rlmm.report.rules import RULES, CheckName, Status, factor, worst

Curves = Mapping[str, Curve]
Limits = Mapping[str, float]

N_TO_CORRELATE = 9
"""Steps that both judges must have scored before their correlation is held to its rule."""


@dataclass(frozen=True)
class Table:
    """A small table of texts; `marked` are the (row, column) of cells that are past a rule, with their status."""

    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    marked: Mapping[tuple[int, int], Status]


@dataclass(frozen=True)
class Check:
    """A judged figure. `says` has the figure in words, `rule` what it is judged by."""

    name: CheckName
    status: Status
    says: str
    rule: str
    figure: Figure
    table: Table | None = None


@dataclass(frozen=True)
class Reading:
    """What a check measured: the value its rule judges, and the same in words."""

    value: float
    says: str


def last(curve: Curve) -> float:
    """The mean of the last tenth of a curve; NaN where it has no values."""
    found = tenths(curve)
    return found[1] if found else math.nan


def measured(name: CheckName, curves: Curves, limits: Limits) -> Reading | None:
    """What a check reads from a stage's curves; None where they do not have it."""
    return MEASURES[name](curves, limits) if name in MEASURES else None


def _shrinkage(key: str) -> Callable[[Curves, Limits], Reading | None]:
    def measure(curves: Curves, limits: Limits) -> Reading | None:
        found = tenths(curves[key]) if key in curves else None
        if found is None or not found[0]:
            return None
        share = found[1] / found[0]
        return Reading(share, f"{share:.2f} of what it was: {found[0]:.3g} to {found[1]:.3g}")

    return measure


def _level(words: str, *keys: str) -> Callable[[Curves, Limits], Reading | None]:
    def measure(curves: Curves, limits: Limits) -> Reading | None:
        there = [last(curves[key]) for key in keys if key in curves]
        return Reading(max(there), words.format(max(there))) if there else None

    return measure


def _mismatch(curves: Curves, limits: Limits) -> Reading | None:
    shares = {
        key: float(np.max(curves[key].values)) / limits[key]
        for key in ("mismatch/mean", "mismatch/max")
        if key in curves and limits.get(key)
    }
    if not shares:
        return None
    key = max(shares, key=lambda name: math.inf if math.isnan(shares[name]) else shares[name])
    figure = key.removeprefix("mismatch/").replace("max", "largest")
    return Reading(
        shares[key], f"the {figure} difference came to {shares[key]:.2g} times its tolerance {limits[key]:g}"
    )


def _excluded(curves: Curves, limits: Limits) -> Reading | None:
    keys = [key for key in ("sample/unavailable_share", "sample/invalid_share") if key in curves]
    if not keys:
        return None
    shares = {key: max(float(np.nanmean(curves[key].values)), last(curves[key])) for key in keys}
    told = ", ".join(f"{key.removeprefix('sample/').removesuffix('_share')} {shares[key]:.2%}" for key in keys)
    return Reading(max(shares.values()), told)


def _canary(curves: Curves, limits: Limits) -> Reading | None:
    if "canary/drift" not in curves:
        return None
    most = float(np.max(curves["canary/drift"].values))
    return Reading(most, f"scores of frozen samples moved by up to {most:.2g} of their spread")


def _lowest_ess(curves: Curves, limits: Limits) -> Reading | None:
    if "ess" not in curves:
        return None
    low = float(np.min(curves["ess"].values))
    return Reading(low, f"lowest {low:.2g}")


def _gradient(curves: Curves, limits: Limits) -> Reading | None:
    if "grad_norm" not in curves:
        return None
    values = np.array(curves["grad_norm"].values)
    if not np.isfinite(values).all():
        return Reading(math.inf, f"{int((~np.isfinite(values)).sum())} steps without a finite gradient")
    median = float(np.median(values))
    if median == 0:
        return Reading(math.inf, "0 at half of the steps or more: nothing is being learned")
    ratio = float(values.max()) / median
    return Reading(ratio, f"largest {ratio:.3g} times the median {median:.2g}")


MEASURES: Mapping[CheckName, Callable[[Curves, Limits], Reading | None]] = {
    "diversity": _shrinkage("diversity"),
    "entropy": _shrinkage("entropy"),
    "flat": _level("{:.1%} of the groups at the end", "group/flat_share"),
    "duplicates": _level("{:.0%} of those that could, at the end", "sample/duplicate_share", "guard/repeats"),
    "kl": _level("{:.3g} nats a token at the end", "kl", "approx_kl"),
    "clip": _level("{:.1%} of the tokens at the end", "clip_fraction"),
    "mismatch": _mismatch,
    "excluded": _excluded,
    "canary": _canary,
    "ess": _lowest_ess,
    "grad": _gradient,
}
"""The checks that need a stage's own curves alone."""

GUARD_KEYS: Mapping[CheckName, str] = {
    "blank": "guard/blank",
    "across": "guard/across",
    "edges": "guard/edges",
    "colours": "guard/colours",
}


def guarded(name: CheckName, value: float, reference: float) -> float:
    """What a guard's rule judges: the share beyond the reference's, or the factor between the two."""
    return factor(value, reference) if name in ("edges", "colours") else value - reference


def guard_reading(name: CheckName, value: float, reference: float, against: str) -> Reading:
    """A guard's figure in the last tenth of the steps, held against the reference called `against`."""
    judged = guarded(name, value, reference)
    if name in ("edges", "colours") and reference:
        return Reading(judged, f"{value:.3g} at the end, {value / reference:.2f} times the {against}' {reference:.3g}")
    return Reading(judged, f"{value:.3g} at the end, {reference:.3g} in the {against}")


def judged(name: CheckName, reading: Reading, figure: Figure, table: Table | None = None) -> Check:
    """The check of a reading by its rule; a gate that was passed, which the figure's alarm names, is bad."""
    status = RULES[name].status(reading.value)
    return Check(name, "bad" if figure.alarm else status, reading.says, RULES[name].text, figure, table)


def correlation(one: Curve, other: Curve) -> tuple[float, int]:
    """Pearson's r over the steps that both have, and how many these are; NaN where one of them does not vary."""
    theirs = dict(zip(other.steps, other.values, strict=True))
    pairs = [(v, theirs[s]) for s, v in zip(one.steps, one.values, strict=True) if s in theirs]
    values = np.array([pair for pair in pairs if not any(map(math.isnan, pair))])
    if len(values) < 2 or not values.std(axis=0).all():
        return math.nan, len(values)
    return float(np.corrcoef(values.T)[0, 1]), len(values)


def judges_check(trained: Curve, held_out: Mapping[str, Curve], figure: Figure) -> Check | None:
    """The trained reward against every held-out judge, the worst of them; None before they have enough steps."""
    told: list[str] = []
    statuses: list[Status] = []
    rose = findings.change(trained) > 0
    for name, curve in held_out.items():
        r, steps = correlation(trained, curve)
        if steps < N_TO_CORRELATE:
            continue
        parted = findings.divergence(trained, curve)
        told.append(
            f"{name}: r = {r:.2f} over {steps} steps".replace("= -", "= −")
            + (", and it fell while the reward rose" if parted else "")
        )
        statuses.append("bad" if parted else RULES["judges"].status(r) if rose and not math.isnan(r) else "ok")
    if not told:
        return None
    says = "; ".join(told) + ("" if rose else "; the trained reward did not rise")
    return Check("judges", worst(*statuses), says, RULES["judges"].text, figure)


def by_status(checks: Sequence[Check]) -> list[Check]:
    """Bad ones first, otherwise in the order they are in."""
    return sorted(checks, key=lambda check: ("bad", "look", "ok").index(check.status))
