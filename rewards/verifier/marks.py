"""JSON answers with the judge's reasoning before them: asked for, read, and asked for again."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from rewards.verifier.answers import Answer, read_scores, reasoning
from rewards.verifier.client import Client
from rewards.verifier.errors import BadAnswerError, JudgeError
from rewards.verifier.prompts import REASKS, Criterion, messages, rubric, schema
from rewards.verifier.views import View

T = TypeVar("T")
Marks = tuple[dict[str, int], str]
"""The integers of one call by part, and what the judge said about them."""


def ask_json(
    client: Client,
    attempts: Sequence[Sequence[Mapping[str, Any]]],
    form: Mapping[str, Any],
    max_tokens: int,
    read: Callable[[Answer], T],
) -> T:
    """What `read` makes of the answer to the first of `attempts`, or to the next where it raises BadAnswerError.
    Raises JudgeError after the last, and for whatever the client raises.
    """
    fault: BadAnswerError | None = None
    for attempt in attempts:
        answer = client.chat(attempt, max_tokens, response_format=form)
        try:
            return read(answer)
        except BadAnswerError as error:
            fault = error
    times = {1: "once", 2: "twice"}.get(len(attempts), f"{len(attempts)} times")
    raise JudgeError(f"asked {times}: {fault}") from fault


def asked_for_marks(view: View, criteria: Sequence[Criterion], reasks: int) -> tuple[list[Any], dict[str, Any]]:
    """The messages of each attempt to get marks, and the answer's form. The criteria share what they show."""
    asked = [messages(view, rubric(criteria) + more, shows=criteria[0].shows) for more in ("", *REASKS[:reasks])]
    return asked, schema(criteria)


def ask_marks(client: Client, view: View, criteria: Sequence[Criterion], max_tokens: int, *, reasks: int = 1) -> Marks:
    """The judge's marks for criteria that share what they show. An answer that cannot be used is asked for again,
    `reasks` times. Raises JudgeError.
    """
    asked, form = asked_for_marks(view, criteria, reasks)
    return ask_json(client, asked, form, max_tokens, lambda answer: (read_scores(answer, criteria), reasoning(answer)))
