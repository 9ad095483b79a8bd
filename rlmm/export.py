"""Export: what a run made, in files that need nothing of this project to load."""

import shutil
from collections.abc import Callable
from pathlib import Path

import yaml

from rlmm.config.recipe import Recipe, validate_recipe
from rlmm.config.stages import ExportStage, GrpoStage, SftStage
from rlmm.export_card import card_of
from rlmm.run_folder import RunFolder
from rlmm.train.context import StageContext, policy_stage_before


def run_export(context: StageContext) -> None:
    """The export stage of a recipe."""
    config: ExportStage = context.config
    write_export(context.recipe, context.run, config.start_from, context.say)


def export_stage(run_dir: Path, stage: str, say: Callable[[str], None]) -> None:
    """Export a policy stage of a finished or unfinished run. Raises ValueError where there is no such result."""
    config = run_dir / "config.yaml"
    if not config.is_file():
        raise ValueError(f"{run_dir} is no run folder: it has no config.yaml; give a folder that `rlmm run` made")
    recipe = validate_recipe(yaml.safe_load(config.read_text()), str(config))
    write_export(recipe, RunFolder(run_dir, tuple(recipe.stages)), stage, say)


def write_export(recipe: Recipe, run: RunFolder, stage: str, say: Callable[[str], None]) -> None:
    """merged/: the stage's full model; adapter/ and base/: its adapter and the model that belongs under it."""
    if stage not in run.stages or not run.done(stage):
        raise ValueError(f"stage {stage!r} of {run.path} is not finished; its stages are {', '.join(run.stages)}")
    source = run.stage(stage)
    targets = {"merged": source / "model"}
    if (source / "adapter").is_dir():
        targets |= {"adapter": source / "adapter", "base": _base_folder(recipe, run, stage)}
    for name, folder in targets.items():
        _replace(folder, run.path / name)
    if "adapter" in targets:
        shutil.copytree(source / "model" / "codec", run.path / "adapter" / "codec", dirs_exist_ok=True)
    for name in {"merged", "adapter"} & set(targets):
        (run.path / name / "README.md").write_text(card_of(recipe, run, stage, adapter=name == "adapter"))
    say(f"exported {', '.join(sorted(targets))} to {run.path}")


def _base_folder(recipe: Recipe, run: RunFolder, stage: str) -> Path:
    config = recipe.stages[stage]
    context = StageContext(recipe, run, stage, config, lambda line: None)
    start = (config.start_from if isinstance(config, SftStage | GrpoStage) else None) or policy_stage_before(context)
    if start is not None:
        return run.stage(start) / "model"
    if recipe.policy.kind == "checkpoint":
        return Path(recipe.policy.path)
    raise ValueError(f"stage {stage!r} trained an adapter on a fresh random model, which nobody else has; train it whole")


def _replace(source: Path, target: Path) -> None:
    """Copy under another name, then rename: a half-copied export is never found under its own name."""
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial)
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
