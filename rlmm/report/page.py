"""Puts the page together: `write_report` reads a run folder and writes one self-contained report.html."""

import base64
import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from rlmm.report import comparison, findings, galleries, panels, timing, understanding
from rlmm.report.best_of import best_of_figures
from rlmm.report.data import read_run
from rlmm.report.health import health
from rlmm.report.images import Picture, picture
from rlmm.report.panel_table import PANELS
from rlmm.report.records import Notes, Run, Stage

RL_KINDS = ("grpo",)


@dataclass(frozen=True)
class Words:
    """Of a stage's own picture."""

    title: str
    words: str
    alt: str


PREFERENCE_KINDS = ("pairs", "dpo")

PICTURES = {
    "reconstruction.png": Words(
        "Reconstructions",
        "Images as they went into the tokenizer and as they came out. What is lost here, no policy can draw.",
        "Rows of images as they went into the image tokenizer and as they came out again.",
    ),
    "margins.png": Words(
        "Pairs",
        "How far apart the scores of a pair are, and the scores of either side. Pairs of a small margin are often the "
        "judge's noise: raise margin to leave them out.",
        "Histograms of the margins of the pairs and of the scores of either side.",
    ),
}


@dataclass(frozen=True)
class RlStage:
    """What the page shows of a stage that learns from rewards."""

    stage: Stage
    reward: panels.Figure | None
    galleries: tuple[tuple[str, tuple[galleries.Group, ...]], ...]


@dataclass(frozen=True)
class PlainStage:
    """What the page shows of a stage of another kind."""

    stage: Stage
    figures: tuple[panels.Figure, ...]
    reconstruction: Picture | None
    picture: Words | None


def write_report(run_folder: Path) -> Path:
    """Writes `run_folder`/report.html and returns its path. May be called at any time, also while the run is
    going.

    The page makes no request: images are data URIs, plots inline SVG, style and script inline under a content
    security policy that forbids everything else. The file is replaced in one step, so a reader never sees
    half of it. FileNotFoundError where `run_folder` is no run folder; what cannot be read inside it is named
    on the page.
    """
    run = read_run(run_folder)
    page = _environment().get_template("template.html.jinja").render(_content(run))
    path = run_folder / "report.html"
    partial = path.with_suffix(".html.partial")
    partial.write_text(page, encoding="utf-8")
    os.replace(partial, path)
    return path


def batch_equations(config: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """(stage, equation) for every stage of a resolved config that says how many rollouts a step makes."""
    stages = (config or {}).get("stages")
    found = []
    for name, stage in stages.items() if isinstance(stages, dict) else ():
        prompts, samples = (
            (stage.get(key) for key in ("prompts_per_step", "samples_per_prompt"))
            if isinstance(stage, dict)
            else (None, None)
        )
        if not isinstance(prompts, int) or not isinstance(samples, int):
            continue
        objective = stage.get("objective")
        updates = objective.get("updates_per_rollout") if isinstance(objective, dict) else None
        text = f"{prompts} prompts × {samples} samples = {prompts * samples} rollouts a step"
        if isinstance(updates, int) and updates > 0:
            text += f" = {updates} update{'s' if updates > 1 else ''} × {prompts * samples // updates} rollouts"
        if isinstance(stage.get("micro_batch_size"), int):
            text += f", in micro-batches of {stage['micro_batch_size']}"
        found.append((str(name), text))
    return found


def _content(run: Run) -> dict[str, Any]:
    rl = [stage for stage in run.stages if stage.kind in RL_KINDS or "reward/mean" in stage.curves]
    plain = [stage for stage in run.stages if stage.kind in PANELS]
    evaluated = next((stage for stage in reversed(run.stages) if stage.evaluation), None)
    evaluation = evaluated.evaluation if evaluated else None
    sampled = next((stage.samples for stage in reversed(run.stages) if stage.samples), None)
    roles = findings.judge_roles(run.stages, run.config)
    return {
        "run": run,
        "recipe": str((run.config or {}).get("name") or run.folder.resolve().name),
        "made": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "headline": findings.headline(run, evaluation, rl),
        "health": health(run, rl, evaluated),
        "evaluation": evaluation,
        "scores": comparison.scores(evaluation, roles, "eval") if evaluation else [],
        "differences": comparison.differences(evaluation.contrasts) if evaluation else [],
        "best_of": best_of_figures(evaluation, roles, "best-of") if evaluation else [],
        "understood": understanding.understood(evaluated, run.notes),
        "samples": galleries.comparisons(sampled, run.notes) if sampled else {},
        "rl_stages": [_rl_stage(stage, run.notes) for stage in rl],
        "rl_awaited": bool(rl) or _awaits(run.config, RL_KINDS),
        "preference_stages": [_plain_stage(stage, run.notes) for stage in plain if stage.kind in PREFERENCE_KINDS],
        "plain_stages": [_plain_stage(stage, run.notes) for stage in plain if stage.kind not in PREFERENCE_KINDS],
        "bars": timing.bars(run.stages),
        "splits": [figure for stage in rl if (figure := timing.split_figure(stage, _prefix(stage)))],
        "kinds": timing.kinds,
        "slot": timing.slot,
        "duration": timing.duration,
        "equations": batch_equations(run.config),
        "style": Markup(_own_file("style.css")),
        "script": Markup(_own_file("page.js")),
        "script_hash": _hash(_own_file("page.js")),
    }


def _awaits(config: Mapping[str, Any] | None, kinds: Sequence[str]) -> bool:
    """Whether a stage of one of these kinds is to come, as far as the config tells."""
    stages = (config or {}).get("stages")
    if not isinstance(stages, Mapping):
        return True
    return any(isinstance(stage, Mapping) and stage.get("kind") in kinds for stage in stages.values())


def _rl_stage(stage: Stage, notes: Notes) -> RlStage:
    prefix = _prefix(stage)
    shown = []
    for label, path in galleries.first_middle_last(stage.rollouts):
        step, found = galleries.groups(path, notes)
        if found:
            shown.append((f"{label} (step {step})" if step is not None else label, tuple(found)))
    return RlStage(stage, panels.reward_figure(stage, prefix), tuple(shown))


def _plain_stage(stage: Stage, notes: Notes) -> PlainStage:
    grid = shown = None
    if stage.reconstruction:
        shown = PICTURES[stage.reconstruction.name]
        grid = picture(stage.reconstruction.read_bytes(), shown.alt, max_side=1600)
        if grid is None:
            notes.add(f"stages/{stage.folder.name}/{stage.reconstruction.name} cannot be read.")
    return PlainStage(stage, tuple(panels.panel_figures(stage, _prefix(stage)).values()), grid, shown)


def _prefix(stage: Stage) -> str:
    return "stage-" + comparison.slug(stage.folder.name)


def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # prompts, readings and configs are other people's text
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _own_file(name: str) -> str:
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


def _hash(script: str) -> str:
    digest = hashlib.sha256(script.encode("utf-8")).digest()
    return "sha256-" + base64.b64encode(digest).decode("ascii")
