"""Yes/no questions about a sample, scored by how likely the judge's first word is to be yes."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from rewards.base import Sample, Score
from rewards.gold import GoldPair
from rewards.names import nearest
from rewards.verifier.client import Client
from rewards.verifier.combine import Combine, check_combine, combined
from rewards.verifier.errors import JudgeError
from rewards.verifier.gold import drawing_pair, edit_pair
from rewards.verifier.prompts import QUESTIONS, Question, digest, messages
from rewards.verifier.tokens import ask_yes_no, check_settings, yes_no_task
from rewards.verifier.views import View, judge

RESERVED = ("value", "mass")


class YesNoReward:
    """The probability of yes, 0 to 1.

    Several questions make one value by their weighted mean, geometric by default, so that one clear no is not made up
    for by the other questions: an edit that changes nothing preserves all and follows nothing. Without `questions`,
    an edit (a sample with source images) is asked `followed` and `preserved`, any other sample `faithful`. Parts: each
    question's probability by its name, and `mass`, the smallest probability that yes and no had together.

    Unavailable: no log-probabilities, a mass below `min_mass`, a question that does not suit the sample, and whatever
    the client raises.
    """

    def __init__(
        self,
        client: Client,
        *,
        questions: Sequence[Question] = (),
        combine: Combine = "geometric",
        min_mass: float = 0.5,
        top_logprobs: int = 20,
        name: str = "yes_no",
    ) -> None:
        check_settings(min_mass, top_logprobs)
        check_combine(combine)
        self.name = name
        self.client = client
        self.questions = tuple(questions)
        self.combine = combine
        self.min_mass = min_mass
        self.top_logprobs = top_logprobs

    def fingerprint(self) -> str:
        """The model and what it is asked, and how the answers make a value; not where it is served."""
        views = View("?", ("",)), View("?", ("",), ("",))
        asked = [messages(seen, yes_no_task(question.ask)) for seen in views for question in self._all_questions()]
        weights = [(question.name, question.weight) for question in self.questions]
        return (
            f"yes_no/1 {self.client.server.identity()} questions={weights} combine={self.combine} "
            f"min_mass={self.min_mass} top_logprobs={self.top_logprobs} prompts={digest(*asked)}"
        )

    def score(self, samples: Sequence[Sample]) -> list[Score]:
        """One Score a sample, in order; one request a sample and question, at once up to the server's concurrency."""
        return judge(samples, self.client.server.concurrency, self._calls, self._total)

    def gold(self) -> Sequence[GoldPair]:
        """A drawing against another thing's drawing, or an edit against none; nothing for questions of your own."""
        kinds = {question.edit for question in self.questions} or {False}
        return [drawing_pair()] if kinds == {False} else [edit_pair()] if kinds == {True} else []

    def _all_questions(self) -> Sequence[Question]:
        return self.questions or tuple(QUESTIONS.values())

    def _calls(self, view: View) -> list[Callable[[], tuple[Question, float, float]]]:
        asked = self.questions or [question for question in QUESTIONS.values() if question.edit == view.edit]
        for question in asked:
            if question.edit not in (None, view.edit):
                wants, has = ("an edit", "no source image") if question.edit else ("no edit", "a source image")
                raise JudgeError(f"the question {question.name!r} is about {wants}, and the sample has {has}")
        return [partial(self._ask, view, question) for question in asked]

    def _ask(self, view: View, question: Question) -> tuple[Question, float, float]:
        return question, *ask_yes_no(self.client, view, question.ask, self.top_logprobs, self.min_mass)

    def _total(self, answers: Sequence[tuple[Question, float, float]]) -> Score:
        value = combined([(question.weight, yes) for question, yes, _ in answers], self.combine)
        parts = {question.name: yes for question, yes, _ in answers}
        return Score.ok(value, **parts, mass=min(mass for _, _, mass in answers))


def read_questions(listed: Sequence[Mapping[str, Any]] | None) -> tuple[Question, ...]:
    """Questions as a recipe lists them: ``{name: faithful}`` for a built-in one, ``{name: hands, ask: "..."}`` for one
    of your own, each with an optional weight. Raises ValueError that names the entry.
    """
    questions = tuple(_question(entry) for entry in listed or ())
    names = [question.name for question in questions]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"two questions are called {twice[0]!r}; rename one of them")
    return questions


def _question(entry: Mapping[str, Any]) -> Question:
    known = ("name", "ask", "weight")
    if not isinstance(entry, Mapping) or not isinstance(entry.get("name"), str) or not entry["name"]:
        raise ValueError(f'a question is written {{name: hands, ask: "...", weight: 1}}, got {entry!r}')
    if unknown := [key for key in entry if key not in known]:
        raise ValueError(f"question {entry['name']!r} has no setting {unknown[0]!r}. {nearest(str(unknown[0]), known)}")
    name, ask, weight = entry["name"], entry.get("ask", ""), entry.get("weight", 1.0)
    if name in RESERVED:
        raise ValueError(f"a question cannot be called {name!r}, which is a part of every score; rename it")
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
        raise ValueError(f"question {name!r} needs a weight above 0, got {weight!r}")
    built_in = QUESTIONS.get(name)
    if built_in is not None and not ask:
        return Question(name, built_in.ask, float(weight), built_in.edit)
    if built_in is not None:
        raise ValueError(f"the question {name!r} is built in; leave out `ask`, or give yours another name")
    if not isinstance(ask, str) or not ask.strip():
        raise ValueError(f"question {name!r} is not built in and has no `ask`. {nearest(name, QUESTIONS)}")
    return Question(name, ask, float(weight))
