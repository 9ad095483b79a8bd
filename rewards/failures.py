"""What a run does about samples without a score: leave them out, up to a share of them, or stop."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from rewards.base import Score

REASONS_SHOWN = 3


class RewardFailureError(RuntimeError):
    """More samples without a score than the failure policy lets pass; the text says how many and why."""


@dataclass(frozen=True)
class FailurePolicy:
    """Of samples that are scored together, as those of a rollout, the share `ceiling` may be unavailable, and is then
    left out of the statistics and of the gradient; 0 lets none fail, 1 all.
    """

    ceiling: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.ceiling <= 1:
            raise ValueError(f"the ceiling of failed samples is a share from 0 to 1, got {self.ceiling}")

    def check(self, scores: Sequence[Score]) -> None:
        """Raises RewardFailureError, with the most frequent reasons, where too many scores are unavailable."""
        failed = [score.reason for score in scores if score.status == "unavailable"]
        if len(failed) <= self.ceiling * len(scores):
            return
        listed = "; ".join(f"{reason} ({count} times)" for reason, count in Counter(failed).most_common(REASONS_SHOWN))
        raise RewardFailureError(
            f"{len(failed)} of {len(scores)} samples have no score, above the share {self.ceiling:g} that "
            f"may fail: {listed}. Mend the judge and go on with the same command, or let more samples be left out"
        )
