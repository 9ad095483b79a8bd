"""Where figures are shown beside metrics.jsonl: opened by the first process alone, gone on with by a resumed run."""

import os
import uuid
from collections.abc import Sequence

from torch.utils.tensorboard import SummaryWriter
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback

from rlmm.train.context import StageContext
from rlmm.train.processes import world

WANDB_ID = "wandb-id"
"""The file of a run folder with the id of its run at Weights & Biases."""


def tensorboard(context: StageContext, step: int) -> list[TrainerCallback]:
    """The writer of a stage that goes on after `step`; what it wrote of later steps is marked as void."""
    if "tensorboard" not in context.recipe.runtime.trackers or world()[0] > 0:
        return []
    # Beside the metrics, not inside the checkpoints, which a finished stage drops.
    folder = str(context.folder / "tensorboard")
    return [TensorBoardCallback(SummaryWriter(folder, purge_step=step + 1))]


def others(context: StageContext) -> Sequence[str]:
    """The trackers that Trainer opens itself. Of wandb, a resumed run goes on with the run it began, by the variables
    that wandb reads (https://docs.wandb.ai/guides/track/environment-variables); what the user has set stands."""
    found = [tracker for tracker in context.recipe.runtime.trackers if tracker != "tensorboard"]
    if "wandb" in found and world()[0] == 0:
        path = context.run.path / WANDB_ID
        if not path.is_file():
            path.write_text(uuid.uuid4().hex[:16])
        os.environ.setdefault("WANDB_RUN_ID", path.read_text())
        os.environ.setdefault("WANDB_RESUME", "allow")
    return found
