"""VIEScore: a judge's integers for what was asked and for how it looks (Ku et al. 2023, arXiv 2312.14867).

SC = min(success, over_edit), for text-to-image success alone; PQ = min(naturalness, artefacts); value =
sqrt(SC * PQ) / 10. Unlike the paper's code, an answer that cannot be read is never replaced by a number.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

from rewards.base import Sample, Score
from rewards.gold import GoldPair
from rewards.verifier.client import Client
from rewards.verifier.gold import drawing_pair
from rewards.verifier.marks import Marks, ask_marks, asked_for_marks
from rewards.verifier.prompts import HIGHEST, PERCEPTUAL, digest, semantic
from rewards.verifier.views import View, judge


class VieScoreReward:
    """sqrt(SC * PQ) / 10, from 0 to 1, by two requests a sample: one with the prompt and all images, one with the
    generated images alone.

    Parts, integers 0 to 10 of which 10 is good: success; over_edit (edits alone, 10 for nothing changed but what was
    asked); naturalness; artefacts (10 for none). The reason of a score holds the judge's reasoning. An answer that
    cannot be used is asked for once more; then the sample is unavailable. `max_tokens` bounds one answer.
    """

    def __init__(self, client: Client, *, max_tokens: int = 512, name: str = "viescore") -> None:
        if max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
        self.name = name
        self.client = client
        self.max_tokens = max_tokens

    def fingerprint(self) -> str:
        """The model and what it is asked; not where it is served."""
        views = View("?", ("",)), View("?", ("",), ("",))
        asked = [asked_for_marks(seen, items, reasks=1) for seen in views for items in (semantic(seen), PERCEPTUAL)]
        return f"viescore/1 {self.client.server.identity()} max_tokens={self.max_tokens} prompts={digest(*asked)}"

    def score(self, samples: Sequence[Sample]) -> list[Score]:
        """One Score a sample, in order."""
        return judge(samples, self.client.server.concurrency, self._calls, _total)

    def gold(self) -> Sequence[GoldPair]:
        """A drawing against another thing's drawing."""
        return [drawing_pair()]

    def _calls(self, view: View) -> list[Callable[[], Marks]]:
        return [partial(ask_marks, self.client, view, items, self.max_tokens) for items in (semantic(view), PERCEPTUAL)]


def _total(answers: Sequence[Marks]) -> Score:
    (semantic_marks, semantic_words), (perceptual_marks, perceptual_words) = answers
    product = min(semantic_marks.values()) * min(perceptual_marks.values())
    parts = {name: float(mark) for marks, _ in answers for name, mark in marks.items()}
    reason = f"semantic: {semantic_words}; perceptual: {perceptual_words}"
    return Score("ok", math.sqrt(product) / HIGHEST, reason=reason, parts=parts)
