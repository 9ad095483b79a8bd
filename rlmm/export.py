"""Export: what a run made, in files that need nothing of this project to load."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from rlmm.codecs import load_codec
from rlmm.config.families import family_of
from rlmm.config.policy import CheckpointPolicy
from rlmm.config.recipe import Recipe, recipe_of
from rlmm.config.stages import DpoStage, EvalStage, ExportStage, GrpoStage, PairsStage, Stage
from rlmm.export_card import CardInfo, HeldOut, model_card
from rlmm.policies.families.loading import model_class, tiny_folder
from rlmm.run_folder import RunFolder, environment
from rlmm.train.context import StageContext, parent, published_base


def run_export(context: StageContext) -> None:
    """The export stage of a recipe."""
    config: ExportStage = context.config
    write_export(context.recipe, context.run, config.start_from, context.say)


def export_stage(run_dir: Path, stage: str, say: Callable[[str], None]) -> None:
    """Export a policy stage of a finished or unfinished run. Raises ValueError where there is no such result."""
    recipe = recipe_of(run_dir)
    write_export(recipe, RunFolder(run_dir, tuple(recipe.stages)), stage, say)


BIDIRECTIONAL = (
    "It is a masked-diffusion policy: every position sees every other. transformers takes that from `is_causal` in the "
    "config; a version that does not know the key runs the model causally, without a word."
)


def write_export(recipe: Recipe, run: RunFolder, stage: str, say: Callable[[str], None]) -> None:
    """merged/: the stage's full model; adapter/ and base/: its adapter and the model that belongs under it, unless that
    is a published one, which the adapter names."""
    if stage not in run.stages or not run.done(stage):
        raise ValueError(f"stage {stage!r} of {run.path} is not finished; its stages are {', '.join(run.stages)}")
    source = run.stage(stage)
    targets = {"merged": source / "model"}
    if (source / "adapter").is_dir():
        targets |= {"adapter": source / "adapter"}
        if published_base(_context(recipe, run, stage)) is None:
            targets |= {"base": _base_folder(recipe, run, stage)}
    for name, folder in targets.items():
        _replace(folder, run.path / name)
    if "adapter" in targets:
        shutil.copytree(source / "model" / "codec", run.path / "adapter" / "codec", dirs_exist_ok=True)
    for name in {"merged", "adapter"} & set(targets):
        card = _card(recipe, run, stage, adapter=name == "adapter")
        (run.path / name / "README.md").write_text(model_card(card))
    say(f"exported {', '.join(sorted(targets))} to {run.path}")


def _base_folder(recipe: Recipe, run: RunFolder, stage: str) -> Path:
    start = parent(_context(recipe, run, stage))
    if start is not None:
        return run.stage(start) / "model"
    if recipe.policy.kind == "checkpoint":
        return tiny_folder(recipe.policy) if recipe.policy.tiny else Path(recipe.policy.path)
    raise ValueError(f"stage {stage!r} trained an adapter on a fresh random model that nobody else has; train it whole")


def _origin(recipe: Recipe) -> str:
    return recipe.policy.path if isinstance(recipe.policy, CheckpointPolicy) else recipe.policy.kind


def _context(recipe: Recipe, run: RunFolder, stage: str) -> StageContext:
    return StageContext(recipe, run, stage, recipe.stages[stage], lambda line: None)


def _card(recipe: Recipe, run: RunFolder, stage: str, *, adapter: bool) -> CardInfo:
    names = run.stages[: run.stages.index(stage) + 1]
    trained = [n for n in names if not isinstance(recipe.stages[n], EvalStage | ExportStage | PairsStage)]
    config, codec = recipe.stages[stage], load_codec(run.stage(stage) / "model" / "codec").settings
    rows, columns = codec.grid
    model = model_class(run.stage(stage) / "model")
    return CardInfo(
        name=f"{recipe.name}-{stage}",
        kind="adapter" if adapter else "merged",
        base=(published_base(_context(recipe, run, stage)) or "../base") if adapter else _origin(recipe),
        model_class=model,
        recipe=recipe.name,
        stages=[(n, f"{recipe.stages[n].kind}, {getattr(recipe.stages[n], 'steps', 0)} steps") for n in trained],
        objective=_objective(config),
        data=recipe.description or f"{recipe.data.kind} data",
        reward=", ".join(term.key for term in recipe.rewards.terms),
        codec=f"{codec.kind}, {codec.num_codes} codes, {rows}x{columns} tokens",
        codec_path="codec",
        held_out=_held_out(run, stage),
        versions={name: version for name, version in environment()["packages"].items() if version},
        seed=recipe.seed,
        limitations=(BIDIRECTIONAL,) if model[0] == "transformers" and family_of(recipe.policy) == "masked" else (),
    )


def _objective(stage: Stage) -> str:
    if isinstance(stage, DpoStage):
        return f"dpo, {stage.loss} loss, beta {stage.beta:g}"
    return stage.objective.name if isinstance(stage, GrpoStage) else "cross-entropy"


def _held_out(run: RunFolder, stage: str) -> list[HeldOut]:
    """The stage's figures in every evaluation that has been done."""
    figures = []
    for path in sorted(run.path.glob("stages/*/eval.json")):
        for row in json.loads(path.read_text())["rows"]:
            if row["arm"] == stage:
                wanted = ("judge", "metric", "arm", "temperature", "mean", "low", "high", "n_prompts")
                figures.append(HeldOut(**{key: row[key] for key in wanted}))
    return figures


def _replace(source: Path, target: Path) -> None:
    """Copy under another name, then rename: a half-copied export is never found under its own name."""
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial)
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
