"""Where a training stage goes on: the newest checkpoint that is whole and that the stage's data can follow."""

import shutil
from collections.abc import Callable
from pathlib import Path

from rlmm.train.checkpoint import checkpoints, latest_checkpoint, step_of
from rlmm.train.processes import gather, in_first

Fault = Callable[[int], str | None]
"""step -> why this process cannot make what follows it, or None."""


def no_fault(step: int) -> None:
    """Of data that are a function of the step alone."""


def resume_point(folder: Path, say: Callable[[str], None], fault: Fault = no_fault) -> Path | None:
    """The checkpoint to go on from, the same in every process; None: from the start. Those passed over are named, and
    deleted: what follows the one that is used is made anew, and they would be of another run.
    """
    before: int | None = None
    while True:
        name = in_first(lambda at=before: _name(latest_checkpoint(folder, say, at)))
        chosen = None if name is None else folder / name
        if chosen is None:
            break
        problems = [told for told in gather(fault(step_of(chosen))) if told is not None]
        if not problems:
            break
        say(f"passing over {chosen.name}: {problems[0]}")
        before = step_of(chosen)
    step = 0 if chosen is None else step_of(chosen)
    in_first(lambda: _drop_after(folder, step))
    return chosen


def _name(path: Path | None) -> str | None:
    return None if path is None else path.name


def _drop_after(folder: Path, step: int) -> None:
    for one in checkpoints(folder):
        if step_of(one) > step:
            shutil.rmtree(one)
