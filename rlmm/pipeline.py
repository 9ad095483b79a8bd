"""Runs a recipe's stages in order. A second call goes on where the first one stopped."""

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from transformers.utils import logging as hf_logging

from rlmm.batch import batch_equations
from rlmm.config.recipe import Recipe
from rlmm.config.stages import GrpoStage
from rlmm.evaluation.evaluate import run_eval
from rlmm.export import run_export
from rlmm.report import write_report
from rlmm.reward_process import stop_served
from rlmm.run_folder import RunFolder
from rlmm.train.codec import run_codec_stage
from rlmm.train.context import StageContext
from rlmm.train.dpo import run_dpo
from rlmm.train.gates import ceilings
from rlmm.train.grpo import run_grpo
from rlmm.train.launch import deepspeed_digest
from rlmm.train.pairs import run_pairs
from rlmm.train.processes import wait, world
from rlmm.train.sft import run_sft

STAGES: dict[str, Callable[[StageContext], None]] = {
    "codec": run_codec_stage,
    "sft": run_sft,
    "grpo": run_grpo,
    "pairs": run_pairs,
    "dpo": run_dpo,
    "eval": run_eval,
    "export": run_export,
}

ALONE = ("eval", "export")
"""Stages the first process does while the others wait: nothing in them is shared out."""


def run_folder(recipe: Recipe) -> RunFolder:
    return RunFolder(recipe.folder, tuple(recipe.stages))


def run_recipe(recipe: Recipe, say: Callable[[str], None]) -> RunFolder:
    """Run every stage that is not done; the report is written after each. Rewards' processes end with it."""
    try:
        return _run_stages(recipe, say)
    finally:
        stop_served()


def _run_stages(recipe: Recipe, say: Callable[[str], None]) -> RunFolder:
    folder = run_folder(recipe)
    rank, processes = world()
    first = rank == 0
    torch.set_num_threads(recipe.runtime.threads)
    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity_error()
    if first:
        folder.bind_config(recipe.model_dump(mode="json"))
        folder.write_environment()
    # Asked once, before the first process marks anything, so that all of them skip the same stages.
    done = [name for name in recipe.stages if folder.done(name)]
    wait()
    for line in batch_equations(recipe, processes) if len(done) < len(recipe.stages) else []:
        say(line)
    for name, stage in recipe.stages.items():
        if name in done:
            say(f"{name}: done before")
            continue
        say(f"{name} ({stage.kind})")
        gates = ceilings(stage.gates, stage.precision) if isinstance(stage, GrpoStage) else None
        file = getattr(stage, "deepspeed", None)
        settings = deepspeed_digest(Path(file)) if file else None
        if first:
            folder.mark(name, stage.kind, "running", gates, 1 if stage.kind in ALONE else processes, settings)
        wait()
        if first or stage.kind not in ALONE:
            STAGES[stage.kind](StageContext(recipe, folder, name, stage, say))
        if first:
            folder.mark(name, stage.kind, "done", gates, 1 if stage.kind in ALONE else processes, settings)
            # Only now: until the stage counts as done, its checkpoints are what it would resume from.
            shutil.rmtree(folder.stage(name) / "checkpoints", ignore_errors=True)
            write_report(folder.path)
        wait()
    if first and not (folder.path / "report.html").is_file():
        write_report(folder.path)
    return folder
