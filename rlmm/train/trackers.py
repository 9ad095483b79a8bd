"""Where figures are shown beside metrics.jsonl: opened by the first process alone, gone on with by a resumed run."""

import os
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version

from torch.utils.tensorboard import SummaryWriter
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback

from rlmm.train.context import StageContext
from rlmm.train.processes import Stopped, world

WANDB_ID = "wandb-id"
"""The file of a stage's folder with the id of its run at Weights & Biases."""


def check_trackers(names: Sequence[str]) -> None:
    """Raises ValueError for one that is not installed."""
    for name in names:
        try:
            version(name)
        except PackageNotFoundError as error:
            raise ValueError(
                f"runtime.trackers names {name}, which is not installed; install the extra `trackers`, or leave it "
                "out: every figure is in metrics.jsonl and the report all the same"
            ) from error


def tensorboard(context: StageContext, step: int) -> list[TrainerCallback]:
    """The writer of a stage that goes on after `step`; what it wrote of later steps is marked as void."""
    if "tensorboard" not in context.recipe.runtime.trackers or world()[0] > 0:
        return []
    # Beside the metrics, not inside the checkpoints, which a finished stage drops.
    folder = str(context.folder / "tensorboard")
    return [TensorBoardCallback(SummaryWriter(folder, purge_step=step + 1))]


def others(context: StageContext) -> list[str]:
    """The trackers that Trainer writes to itself."""
    return [tracker for tracker in context.recipe.runtime.trackers if tracker != "tensorboard"]


@contextmanager
def wandb_run(context: StageContext) -> Iterator[None]:
    """A run at Weights & Biases for as long as a stage trains: each stage counts its steps from one, so each has its
    own, in a group named as the recipe; a resumed stage goes on with its run. What the user has set in the variables
    that wandb reads (https://docs.wandb.ai/guides/track/environment-variables) stands."""
    if "wandb" not in context.recipe.runtime.trackers or world()[0] > 0:
        yield
        return
    import wandb

    if wandb.run is not None:  # the user's own, which Trainer then writes to
        yield
        return
    path = context.folder / WANDB_ID
    if not (path.is_file() and path.read_text()):  # a kill may have left it empty
        path.write_text(uuid.uuid4().hex[:16])
    run = wandb.init(
        project=_unless_set("WANDB_PROJECT", "rlmm"),
        group=_unless_set("WANDB_RUN_GROUP", context.recipe.name),
        name=_unless_set("WANDB_NAME", f"{context.recipe.name}-{context.name}"),
        id=_unless_set("WANDB_RUN_ID", path.read_text()),
        resume="allow" if "WANDB_RESUME" not in os.environ else None,
    )
    code = 1
    try:
        yield
        code = 0
    except Stopped:  # asked to, and goes on later
        code = 0
        raise
    finally:
        run.finish(exit_code=code)


def _unless_set(variable: str, value: str) -> str | None:
    return None if variable in os.environ else value
