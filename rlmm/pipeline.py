"""Runs a recipe's stages in order. A second call goes on where the first one stopped."""

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from transformers.utils import logging as hf_logging

from rlmm.allocator import prepare
from rlmm.batch import batch_equations
from rlmm.config.preference import DpoStage
from rlmm.config.recipe import Recipe
from rlmm.config.stages import GrpoStage
from rlmm.evaluation.evaluate import run_eval
from rlmm.export import run_export
from rlmm.preflight import check_stages
from rlmm.report import write_report
from rlmm.reward_process import stop_served
from rlmm.run_folder import RunFolder
from rlmm.space import space_needed
from rlmm.train.codec import run_codec_stage
from rlmm.train.context import StageContext
from rlmm.train.dpo import run_dpo
from rlmm.train.faults import check_space, probe, remove_partial, storing
from rlmm.train.folder_lock import FolderLock
from rlmm.train.gates import ceilings
from rlmm.train.grpo import run_grpo
from rlmm.train.heart import settle
from rlmm.train.launch import deepspeed_digest
from rlmm.train.pairs import run_pairs
from rlmm.train.preference_rows import check_data
from rlmm.train.processes import Stopped, everywhere, in_first, world
from rlmm.train.sft import run_sft
from rlmm.train.signals import leaving, stop_if_asked
from rlmm.train.watch import watching

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
    """Run every stage that is not done; the report is written after each. Rewards' processes end with it.

    Raises Stopped where the run was asked to stop (`rlmm.train.signals`), FolderInUse where another run has its folder.
    """
    for line in prepare(torch.cuda.is_available()):
        if os.environ.get("LOCAL_RANK", "0") == "0":  # of each machine
            say(line)
    folder = run_folder(recipe)
    lock = FolderLock(folder.path, say)
    try:
        everywhere(lambda: probe(folder.path))
        in_first(lock.take)
        done = in_first(lambda: _open(folder, recipe, world()[1], say))
        with watching(folder.path, recipe.runtime.hang_seconds), storing("the run", folder.path):
            _run_stages(folder, recipe, done, say)
    finally:
        settle("end", patient=True)
        stop_served()
        lock.release()
    return folder


def _open(folder: RunFolder, recipe: Recipe, processes: int, say: Callable[[str], None]) -> list[str]:
    """Make the folder this run's, or find that it is. Returns the stages that are done."""
    for name, stage in recipe.stages.items():
        if isinstance(stage, DpoStage) and stage.data is not None and not folder.done(name):
            check_data(stage.data)  # before hours of other stages, and while the recipe may still be mended
    if not all(folder.done(name) for name in recipe.stages):
        check_stages(recipe, processes)
    folder.bind_config(recipe.model_dump(mode="json"))
    if partial := remove_partial(folder.path):
        say(f"removed {len(partial)} half-written file(s) of a process that was ended")
    done = [name for name in recipe.stages if folder.done(name)]
    if len(done) < len(recipe.stages):
        check_space(folder.path, space_needed(recipe, folder))
    folder.write_environment()
    return done


def _run_stages(folder: RunFolder, recipe: Recipe, done: Sequence[str], say: Callable[[str], None]) -> None:
    torch.set_num_threads(recipe.runtime.threads)
    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity_error()
    for line in batch_equations(recipe, world()[1], done):
        say(line)
    for name, stage in recipe.stages.items():
        if name in done:
            say(f"{name}: done before")
            continue
        try:
            stop_if_asked()
        except Stopped:
            if world()[0] == 0:  # who started the processes reads there that they have stopped
                folder.mark_stopped(name, stage.kind)
            raise
        say(f"{name} ({stage.kind})")
        settle(name, patient=True)
        _run_stage(StageContext(recipe, folder, name, stage, say))
    if not (folder.path / "report.html").is_file():
        in_first(lambda: str(write_report(folder.path)))


def _run_stage(context: StageContext) -> None:
    stage, folder, name = context.config, context.run, context.name
    gates = ceilings(stage.gates, stage.precision) if isinstance(stage, GrpoStage) else None
    lone, file = stage.kind in ALONE, getattr(stage, "deepspeed", None)
    settings = deepspeed_digest(Path(file)) if file else None

    def mark(status: str) -> None:
        folder.mark(name, stage.kind, status, gates, 1 if lone else world()[1], settings)

    def finish() -> None:
        mark("done")
        # Only now: until the stage counts as done, its checkpoints are what it would resume from.
        shutil.rmtree(folder.stage(name) / "checkpoints", ignore_errors=True)
        write_report(folder.path)

    def work() -> None:
        # What no other process waits for in a collective can be left wherever it is.
        with leaving(at_once=lone or world()[1] == 1):
            STAGES[stage.kind](context)

    in_first(lambda: mark("running"))
    try:
        in_first(work) if lone else work()
    except Stopped:
        if world()[0] == 0:
            mark("stopped")
        raise
    settle(f"the end of {name}", patient=True)
    in_first(finish)
