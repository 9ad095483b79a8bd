"""Whole marks as JSON, with the judge's reasoning before them: asked for, read, and asked for again."""

from collections.abc import Sequence
from typing import Any

from rewards.verifier.answers import read_scores, reasoning
from rewards.verifier.client import Client
from rewards.verifier.errors import BadAnswerError, JudgeError
from rewards.verifier.prompts import REASKS, Criterion, messages, rubric, schema
from rewards.verifier.views import View

Marks = tuple[dict[str, int], str]
"""The integers of one call by part, and what the judge said about them."""


def asked_for_marks(view: View, criteria: Sequence[Criterion], reasks: int) -> list[Any]:
    """All that `ask_marks` may send about a sample: for a fingerprint. The criteria share what they show."""
    asked = [messages(view, rubric(criteria) + more, shows=criteria[0].shows) for more in ("", *REASKS[:reasks])]
    return [asked, schema(criteria)]


def ask_marks(client: Client, view: View, criteria: Sequence[Criterion], max_tokens: int, *, reasks: int = 1) -> Marks:
    """The judge's marks for criteria that share what they show. An answer that cannot be used is asked for again,
    `reasks` times. Raises JudgeError, then and for whatever the client raises.
    """
    asked, form = asked_for_marks(view, criteria, reasks)
    fault: BadAnswerError | None = None
    for attempt in asked:
        answer = client.chat(attempt, max_tokens, response_format=form)
        try:
            return read_scores(answer, criteria), reasoning(answer)
        except BadAnswerError as error:
            fault = error
    times = {1: "once", 2: "twice"}.get(len(asked), f"{len(asked)} times")
    raise JudgeError(f"asked {times}: {fault}") from fault
