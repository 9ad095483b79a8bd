"""The Health section: every check of the evaluation and of each stage that learns from rewards or preferences."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rlmm.report import comparison, findings, panels, sharpening
from rlmm.report.checks import (
    GUARD_KEYS,
    Check,
    Reading,
    Table,
    by_status,
    guard_reading,
    guarded,
    judged,
    judges_check,
    last,
    measured,
)
from rlmm.report.guards import ArmGuards, Reference, arm_guards, first_rollouts, reference_of, rollout_guards
from rlmm.report.panels import Figure
from rlmm.report.records import Curve, Evaluation, Run, Stage
from rlmm.report.rules import RULES, Status, worst


@dataclass(frozen=True)
class Part:
    """The checks of one stage, worst first, and its curves that no rule judges. `missing` names the checks that it has
    no figures for; `table` has the guards of an evaluation's arms beside the reference's.
    """

    name: str
    slug: str
    checks: tuple[Check, ...]
    others: tuple[Figure, ...]
    missing: tuple[str, ...]
    table: Table | None = None


@dataclass(frozen=True)
class Health:
    """What the section shows."""

    parts: tuple[Part, ...]

    @property
    def counts(self) -> Mapping[Status, int]:
        """How many checks have which status."""
        found = Counter(check.status for part in self.parts for check in part.checks)
        return {status: found[status] for status in ("bad", "look", "ok")}

    @property
    def bad(self) -> tuple[tuple[Part, Check], ...]:
        return tuple((part, check) for part in self.parts for check in part.checks if check.status == "bad")


def health(run: Run, learners: Sequence[Stage], evaluated: Stage | None) -> Health:
    """Every check that the run's figures allow. Reads the pictures of stored rollouts and held-out samples."""
    evaluation = evaluated.evaluation if evaluated else None
    reference = reference_of(run)
    arms = arm_guards(evaluated.samples, run.notes) if evaluated and evaluated.samples else []
    names = [stage.name for stage in run.stages if stage in learners or stage.kind == "dpo"]
    table = _arms_table(arms, reference) if arms else None
    parts = [_evaluation_part(run, evaluation, names, table)] if evaluation else []
    parts += [_stage_part(run, stage, reference, [arm for arm in arms if arm.arm == stage.name]) for stage in learners]
    return Health(tuple(parts))


def updates_per_rollout(config: Mapping[str, Any] | None, stage: str) -> int:
    """Of a resolved config; 1 where it does not say."""
    found: Any = config
    for key in ("stages", stage, "objective", "updates_per_rollout"):
        found = found.get(key) if isinstance(found, Mapping) else None
    return found if isinstance(found, int) and found > 0 else 1


def _evaluation_part(run: Run, evaluation: Evaluation, learners: Sequence[str], table: Table | None) -> Part:
    roles = findings.judge_roles(run.stages, run.config)
    found = [
        sharpening.check(evaluation, roles, learners, "health-eval"),
        _arm_diversity(evaluation, learners),
    ]
    missing = [
        title
        for title, check in zip(("sharpening or learning", "diversity of the arms"), found, strict=True)
        if check is None
    ]
    checks = by_status([check for check in found if check])
    return Part("held-out evaluation", "health-eval", tuple(checks), (), tuple(missing), table)


def _arm_diversity(evaluation: Evaluation, learners: Sequence[str]) -> Check | None:
    figure = comparison.diversity_figure(evaluation, "health-eval")
    arms = list(dict.fromkeys(d.arm for d in evaluation.diversity))
    if figure is None or len(arms) < 2:
        return None
    base = {d.temperature: d.value for d in evaluation.diversity if d.arm == arms[0]}
    chosen = {one.arm for one in evaluation.best_of}
    judged_arms = [arm for arm in arms[1:] if arm in learners] or [arm for arm in arms[1:] if arm not in chosen]
    ratios = [
        (d.value / base[d.temperature], d.arm, d.temperature)
        for d in evaluation.diversity
        if d.arm in judged_arms and base.get(d.temperature)
    ]
    if not ratios:
        return None
    ratio, arm, temperature = min(ratios)
    return judged(
        "arm_diversity", Reading(ratio, f"{arm} has {ratio:.2f} of {arms[0]}'s at T = {temperature:g}"), figure
    )


def _stage_part(run: Run, stage: Stage, reference: Reference | None, own: Sequence[ArmGuards]) -> Part:
    slug = "stage-" + comparison.slug(stage.folder.name)
    shown = rollout_guards(stage, updates_per_rollout(run.config, stage.name), run.notes)
    against = reference or first_rollouts(shown)
    level = {key: (against.name, value) for key, value in against.figures.items()} if against else {}
    full = replace(stage, curves={**stage.curves, **shown})
    figures = panels.panel_figures(full, slug, level)
    checks = [_judges(full, slug)]
    for name in RULES:
        if name in figures:
            key = GUARD_KEYS.get(name)
            if key is None:
                reading = measured(name, full.curves, full.gates)
                checks.append(judged(name, reading, figures[name]) if reading else None)
            elif against is not None and key in against.figures:
                checks.append(_guard(name, key, full.curves[key], against, own, figures[name]))
    made = [check for check in checks if check is not None]
    names = {check.name for check in made}
    others = tuple(figure for name, figure in figures.items() if name not in names)
    missing = tuple(MISSING[name] for name in MISSING if name not in names)
    return Part(stage.name, slug, tuple(by_status(made)), others, missing)


MISSING = {
    "judges": "trained against held-out judge",
    "mismatch": "mismatch",
    "flat": "flat groups",
    "excluded": "samples without a score",
    "diversity": "diversity",
    "blank": "blank pictures",
    "across": "one picture for many prompts",
    "edges": "edge density",
    "colours": "colour entropy",
}
"""The checks whose absence a stage's part names: without them less of the run is watched."""


def _judges(stage: Stage, prefix: str) -> Check | None:
    held = {
        key.removeprefix("held_out/").removesuffix("/mean"): curve
        for key, curve in stage.curves.items()
        if key.startswith("held_out/") and key.endswith("/mean")
    }
    trained = stage.curves.get("reward/mean")
    figure = panels.judges_figure(stage, prefix)
    return judges_check(trained, held, figure) if trained is not None and figure is not None else None


def _guard(name: Any, key: str, curve: Curve, against: Reference, own: Sequence[ArmGuards], figure: Figure) -> Check:
    level = against.figures[key]
    check = judged(name, guard_reading(name, last(curve), level, against.name), figure)
    arms = [(guarded(name, arm.figures[key], level), arm) for arm in own if key in arm.figures]
    if not arms:
        return check
    value, arm = max(arms, key=lambda pair: pair[0])
    status = RULES[check.name].status(value)
    if status == "ok":
        return check
    says = f"{check.says}; held-out samples at T = {arm.temperature:g}: {arm.figures[key]:.3g}"
    return replace(check, status=worst(check.status, status), says=says)


def _arms_table(arms: Sequence[ArmGuards], reference: Reference | None) -> Table:
    titles = {"blank": "blank", "across": "one picture for many", "edges": "edge density", "colours": "colour entropy"}
    rows, marked = [], {}
    for arm in arms:
        cells = []
        for name, key in GUARD_KEYS.items():
            value = arm.figures.get(key)
            cells.append("–" if value is None else f"{value:.3g}")
            if value is not None and reference is not None and key in reference.figures:
                status = RULES[name].status(guarded(name, value, reference.figures[key]))
                if status != "ok":
                    marked[len(rows), len(cells)] = status
        repeats = arm.figures.get("guard/repeats")
        rows.append((f"{arm.arm}, T = {arm.temperature:g}", *cells, "–" if repeats is None else f"{repeats:.3g}"))
    if reference is not None:
        cells = [f"{reference.figures[key]:.3g}" if key in reference.figures else "–" for key in GUARD_KEYS.values()]
        rows.append((reference.name, *cells, "–"))
    return Table(
        "Guards of the held-out samples: shares, and bits of colour.",
        ("pictures", *titles.values(), "same look in a group"),
        tuple(rows),
        marked,
    )
