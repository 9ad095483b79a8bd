"""Criteria scored by the expected value of one digit."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from rewards.base import Sample, Score
from rewards.gold import GoldPair
from rewards.verifier.client import Client
from rewards.verifier.combine import Combine, check_combine, combined
from rewards.verifier.criteria import DEFAULT, VIEWS, fitting, gold_pairs
from rewards.verifier.prompts import Criterion, digest, digit_task, messages
from rewards.verifier.tokens import check_settings, expected_digit
from rewards.verifier.views import View, judge


class ExpectedScoreReward:
    """The mean of a judge's digit for each criterion, under its own probabilities, scaled to [0, 1].

    With p(k) the probability of the digit k in `lowest`..`highest` at the first token, E = sum k p(k) / sum p(k) and
    a criterion's value is (E - lowest) / (highest - lowest): continuous, so that the samples of a group are seldom
    tied. One request a criterion; the values make one by their weighted mean, geometric by default. Parts: each
    criterion's value, and `mass`, the smallest sum of p(k). A mass below `min_mass` is unavailable, as is an answer of
    several digits.
    """

    def __init__(
        self,
        client: Client,
        *,
        criteria: Sequence[Criterion] = DEFAULT,
        lowest: int = 0,
        highest: int = 9,
        combine: Combine = "geometric",
        min_mass: float = 0.5,
        top_logprobs: int = 20,
        name: str = "expected_score",
    ) -> None:
        check_settings(min_mass, top_logprobs)
        check_combine(combine)
        if not 0 <= lowest < highest <= 9:
            raise ValueError(f"a single digit needs 0 <= lowest < highest <= 9, got {lowest} and {highest}")
        self.name, self.client, self.criteria = name, client, tuple(criteria)
        self.lowest, self.highest, self.combine = lowest, highest, combine
        self.min_mass, self.top_logprobs = min_mass, top_logprobs

    def fingerprint(self) -> str:
        """The model, what it is asked, and how the answers make a value; not where it is served."""
        asked = [self._asked(seen, item) for seen in VIEWS for item in self.criteria]
        weights = [(item.part, item.weight, item.edit) for item in self.criteria]
        return (
            f"expected_score/1 {self.client.server.identity()} criteria={weights} combine={self.combine} "
            f"digits={self.lowest}-{self.highest} min_mass={self.min_mass} top_logprobs={self.top_logprobs} "
            f"prompts={digest(*asked)}"
        )

    def score(self, samples: Sequence[Sample]) -> list[Score]:
        """One Score a sample, in order."""
        target = any(item.shows == "target" for item in self.criteria)
        return judge(samples, self.client.server.concurrency, self._calls, self._total, with_target=target)

    def gold(self) -> Sequence[GoldPair]:
        """Drawings against other things' drawings, for the built-in criteria alone."""
        return gold_pairs(self.criteria)

    def _asked(self, view: View, item: Criterion) -> list[dict[str, Any]]:
        return messages(view, digit_task(item, self.lowest, self.highest), shows=item.shows)

    def _calls(self, view: View) -> list[Callable[[], tuple[Criterion, float, float]]]:
        return [partial(self._ask, view, item) for item in fitting(self.criteria, view)]

    def _ask(self, view: View, item: Criterion) -> tuple[Criterion, float, float]:
        # Two tokens, so that the 1 of a 10 is seen for what it is.
        answer = self.client.chat(self._asked(view, item), 2, logprobs=True, top_logprobs=self.top_logprobs)
        mean, mass = expected_digit(answer, self.lowest, self.highest, self.min_mass)
        return item, (mean - self.lowest) / (self.highest - self.lowest), mass

    def _total(self, answers: Sequence[tuple[Criterion, float, float]]) -> Score:
        value = combined([(item.weight, mark) for item, mark, _ in answers], self.combine)
        parts = {item.part: mark for item, mark, _ in answers}
        return Score.ok(value, **parts, mass=min(mass for _, _, mass in answers))
