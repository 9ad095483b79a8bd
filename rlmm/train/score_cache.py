"""The scores that a stage's judges have given, in every checkpoint: a resumed run asks about no sample again that a
rollout before it had, and a judge that answers at random gives no second answer.

JSON, a file a process, keyed as the cache is (`rewards.cache`), by the judge's fingerprint among other things.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from rewards.compose import CompositeReward
from rlmm.train.checkpoint import PREFIX, write_json_atomically
from rlmm.train.faults import storing
from rlmm.train.processes import world


def scores_path(folder: Path) -> Path:
    """This process's, in a checkpoint."""
    return folder / f"scores.rank{world()[0]}.json"


class KeepScores(TrainerCallback):
    """Puts the caches of `judges` into every checkpoint, before it is sealed, and takes those of the one that training
    goes on from."""

    def __init__(self, judges: Mapping[str, CompositeReward], say: Callable[[str], None]) -> None:
        self.judges, self.say = judges, say

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step:
            self.load(scores_path(Path(args.output_dir) / f"{PREFIX}{state.global_step}"))

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        path = scores_path(Path(args.output_dir) / f"{PREFIX}{state.global_step}")
        record = {part: {t.name: t.runner.cached() for t in judge.terms} for part, judge in self.judges.items()}
        with storing("the scores given so far", path):
            write_json_atomically(path, record)

    def load(self, path: Path) -> None:
        """Go on with the scores of the file. A term that it has none for, or another judge's, starts without any, and
        so do all terms where there is no file or it cannot be read, which is said."""
        try:
            record = json.loads(path.read_text())
        except (FileNotFoundError, ValueError) as error:
            why = "there is no such file" if isinstance(error, FileNotFoundError) else str(error)
            self.say(f"no scores are taken from {path}: {why}; samples that were scored before are scored again")
            return
        for part, judge in self.judges.items():
            for term in judge.terms:
                try:
                    ours = term.runner.remember(record[part][term.name])
                except (KeyError, TypeError, AttributeError, ValueError) as error:
                    ours, why = False, f"{type(error).__name__}: {error}"
                else:
                    why = "they are another judge's"
                if not ours:
                    self.say(f"no scores of {part}.{term.name} are taken from {path}: {why}; they are asked for again")
