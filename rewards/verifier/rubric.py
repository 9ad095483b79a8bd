"""Criteria scored by whole marks with reasons, as JSON."""

from collections.abc import Callable, Sequence
from functools import partial

from rewards.base import Sample, Score
from rewards.gold import GoldPair
from rewards.verifier.client import Client
from rewards.verifier.combine import Combine, check_combine, combined
from rewards.verifier.criteria import DEFAULT, VIEWS, fitting, gold_pairs
from rewards.verifier.marks import Marks, ask_marks, asked_for_marks
from rewards.verifier.prompts import HIGHEST, REASKS, Criterion, digest
from rewards.verifier.views import View, judge


class RubricReward:
    """A judge's whole marks, 0 to 10, with its reasons written first, as JSON by a schema; scaled to [0, 1].

    One request for the criteria that share what they show; the marks make one value by their weighted mean, geometric
    by default. Parts: each criterion's mark / 10. The reason of a score holds what the judge said. An answer that
    cannot be used is asked for again, `reasks` (0 to 2) times; then the sample is unavailable.
    """

    def __init__(
        self,
        client: Client,
        *,
        criteria: Sequence[Criterion] = DEFAULT,
        combine: Combine = "geometric",
        max_tokens: int = 512,
        reasks: int = 2,
        name: str = "rubric",
    ) -> None:
        check_combine(combine)
        if max_tokens < 1 or not 0 <= reasks <= len(REASKS):
            raise ValueError(
                f"a rubric needs max_tokens >= 1 and reasks 0 to {len(REASKS)}, got {max_tokens}, {reasks}"
            )
        self.name, self.client, self.criteria = name, client, tuple(criteria)
        self.combine, self.max_tokens, self.reasks = combine, max_tokens, reasks

    def fingerprint(self) -> str:
        """The model, what it is asked, and how the answers make a value; not where it is served."""
        asked = [asked_for_marks(seen, [item], self.reasks) for seen in VIEWS for item in self.criteria]
        weights = [(item.part, item.weight, item.edit) for item in self.criteria]
        return (
            f"rubric/1 {self.client.server.identity()} criteria={weights} combine={self.combine} "
            f"max_tokens={self.max_tokens} prompts={digest(*asked)}"
        )

    def score(self, samples: Sequence[Sample]) -> list[Score]:
        """One Score a sample, in order."""
        target = any(item.shows == "target" for item in self.criteria)
        return judge(samples, self.client.server.concurrency, self._calls, self._total, with_target=target)

    def gold(self) -> Sequence[GoldPair]:
        """Drawings against other things' drawings, for the built-in criteria alone."""
        return gold_pairs(self.criteria)

    def _calls(self, view: View) -> list[Callable[[], Marks]]:
        chosen = fitting(self.criteria, view)
        alike = [[item for item in chosen if item.shows == shows] for shows in ("prompt", "result", "target")]
        return [
            partial(ask_marks, self.client, view, items, self.max_tokens, reasks=self.reasks)
            for items in alike
            if items
        ]

    def _total(self, answers: Sequence[Marks]) -> Score:
        parts = {part: mark / HIGHEST for marks, _ in answers for part, mark in marks.items()}
        weights = {item.part: item.weight for item in self.criteria}
        value = combined([(weights[part], mark) for part, mark in parts.items()], self.combine)
        return Score("ok", value, reason="; ".join(words for _, words in answers if words), parts=parts)
