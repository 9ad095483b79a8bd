"""Yes/no questions about a sample, scored by how likely the judge's first word is to be yes.

The probability is read from the log-probabilities of one token, so there is no text to parse and the score is
continuous (VQAScore, Lin et al. 2024, arXiv 2404.01291). Unlike there it is divided by what yes and no have together,
over all their spellings, and is refused where that is little: then the judge is not answering the question.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

from rewards.base import Sample, Score
from rewards.gold import GoldPair
from rewards.names import nearest
from rewards.verifier.client import Client
from rewards.verifier.errors import JudgeError, shown
from rewards.verifier.gold import drawing_pair, edit_pair
from rewards.verifier.prompts import QUESTIONS, YES_OR_NO, Question, digest, messages
from rewards.verifier.views import View, judge

SLACK = 1e-3
"""By how much rounding may lift a log-probability above 0 (nats), or a sum of probabilities above 1."""
SPACES = " \t\n\u2581\u0120"
"""Blanks before a word, and the characters that SentencePiece and byte-level tokenizers write for them."""
RESERVED = ("value", "mass")
Combine = Literal["geometric", "mean"]


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
        if not 0 < min_mass <= 1:
            raise ValueError(f"min_mass is a probability above 0 and at most 1, got {min_mass}")
        if not 2 <= top_logprobs <= 20:
            raise ValueError(f"top_logprobs must be 2 to 20, the format's own limit, got {top_logprobs}")
        if combine not in ("geometric", "mean"):
            raise ValueError(
                f"there is no way to combine called {combine!r}. {nearest(combine, ('geometric', 'mean'))}"
            )
        self.name = name
        self.client = client
        self.questions = tuple(questions)
        self.combine = combine
        self.min_mass = min_mass
        self.top_logprobs = top_logprobs

    def fingerprint(self) -> str:
        """The model and what it is asked, and how the answers make a value; not where it is served."""
        views = View("?", ("",)), View("?", ("",), ("",))
        asked = [messages(seen, _task(question)) for seen in views for question in self._all_questions()]
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
        answer = self.client.chat(messages(view, _task(question)), 1, logprobs=True, top_logprobs=self.top_logprobs)
        # An answer cut after its one token is as it should be.
        if answer.finish_reason not in ("stop", "length"):
            raise JudgeError(f"the answer ended with finish_reason {answer.finish_reason!r}: {shown(answer.text)}")
        return question, *yes_probability(answer.first_token, self.min_mass)

    def _total(self, answers: Sequence[tuple[Question, float, float]]) -> Score:
        weights = math.fsum(question.weight for question, _, _ in answers)
        shares = [(question.weight / weights, yes) for question, yes, _ in answers]
        if self.combine == "mean":
            value = math.fsum(share * yes for share, yes in shares)
        else:
            value = math.prod(yes**share for share, yes in shares)
        parts = {question.name: yes for question, yes, _ in answers}
        return Score.ok(min(value, 1.0), **parts, mass=min(mass for _, _, mass in answers))


def yes_probability(first_token: Sequence[tuple[str, float]], min_mass: float) -> tuple[float, float]:
    """(p, mass): mass is the probability of all spellings of yes and of no, p the share that yes has of it.

    `first_token` holds tokens and their log-probabilities (nats). Raises JudgeError where there are none, where they
    are no probabilities, and where the mass is below `min_mass`.
    """
    if not first_token:
        raise JudgeError("the server gave no log-probabilities of the first token, which yes_no reads")
    masses: dict[str, list[float]] = {"yes": [], "no": []}
    for token, logprob in dict.fromkeys(first_token):  # some servers list the sampled token twice
        if not logprob <= SLACK:
            raise JudgeError(f"the server gave {token!r} a log-probability of {logprob}")
        masses.get(token.lstrip(SPACES).casefold(), []).append(math.exp(logprob))
    yes, no = math.fsum(masses["yes"]), math.fsum(masses["no"])
    mass = yes + no
    if mass > 1 + SLACK:
        raise JudgeError(f"the server's probabilities of yes and no add up to {mass:.3f}, above 1")
    if mass < min_mass:
        likeliest = sorted(first_token, key=lambda pair: -pair[1])[:3]
        listed = ", ".join(f"{token!r} {math.exp(logprob):.3f}" for token, logprob in likeliest)
        raise JudgeError(
            f"yes and no have a probability of {mass:.3f} together, below min_mass {min_mass}; likeliest: {listed}. "
            "A judge that thinks first needs extra_body: {chat_template_kwargs: {enable_thinking: false}}"
        )
    return yes / mass, mass


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


def _task(question: Question) -> str:
    return f"{question.ask}\n{YES_OR_NO}"
