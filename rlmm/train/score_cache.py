"""The scores that a stage's judges have given, in every checkpoint and beside every finished rollout: a resumed run
asks about no sample again that a rollout before had, and a judge that answers at random gives no second answer.

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

Known = Mapping[str, Mapping[str, frozenset[str]]]
"""By part and term, the keys of scores."""


def scores_path(folder: Path) -> Path:
    """This process's, in a checkpoint."""
    return folder / f"scores.rank{world()[0]}.json"


class Scores:
    """What `judges` have said in this process. `say`: where what cannot be taken back is named."""

    def __init__(self, judges: Mapping[str, CompositeReward], say: Callable[[str], None]) -> None:
        self.judges, self.say = judges, say

    def known(self) -> Known:
        """The keys there are."""
        return {part: {t.name: t.runner.cache.keys() for t in judge.terms} for part, judge in self.judges.items()}

    def record(self, without: Known | None = None) -> dict[str, Any]:
        """As JSON has it; `without` what was known before."""
        old = without or {part: {} for part in self.judges}
        return {
            part: {t.name: t.runner.cached(old[part].get(t.name, ())) for t in judge.terms}
            for part, judge in self.judges.items()
        }

    def remember(self, record: Any, path: Path) -> None:
        """Go on with what `record` gave, which `path` holds. A term that it has no scores of, or another judge's, takes
        none, which is said."""
        for part, judge in self.judges.items():
            for term in judge.terms:
                try:
                    ours, why = term.runner.remember(record[part][term.name]), "they are another judge's"
                except (KeyError, TypeError, AttributeError, ValueError) as error:
                    ours, why = False, f"{type(error).__name__}: {error}"
                if not ours:
                    self.say(f"no scores of {part}.{term.name} are taken from {path}: {why}; they are asked for again")


class KeepScores(TrainerCallback):
    """Puts `scores` into every checkpoint, before it is sealed, and takes those that training goes on from."""

    def __init__(self, scores: Scores) -> None:
        self.scores = scores

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step:
            self.load(scores_path(Path(args.output_dir) / f"{PREFIX}{state.global_step}"))

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        path = scores_path(Path(args.output_dir) / f"{PREFIX}{state.global_step}")
        with storing("the scores given so far", path):
            write_json_atomically(path, self.scores.record())

    def load(self, path: Path) -> None:
        """Go on with the scores of the file; without any where there is none or it cannot be read, which is said."""
        try:
            record = json.loads(path.read_text())
        except (FileNotFoundError, ValueError) as error:
            why = "there is no such file" if isinstance(error, FileNotFoundError) else str(error)
            self.scores.say(f"no scores are taken from {path}: {why}; samples that were scored before are scored again")
            return
        self.scores.remember(record, path)
