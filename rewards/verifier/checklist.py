"""A checklist: the atomic yes/no questions of a data row, and the one score they make.

One question asks about one thing, so that a judge that errs on long prompts has short ones to answer, and one that
depends on another is not counted where that one fails (Davidsonian scene graph, Cho et al. 2023, arXiv 2310.18235). The
answers are probabilities (as in Soft-TIFA of GenEval 2), not words.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

from rewards.base import Sample, Score
from rewards.gold import GoldPair
from rewards.names import nearest
from rewards.verifier.client import Client
from rewards.verifier.combine import combined
from rewards.verifier.errors import JudgeError
from rewards.verifier.gold import drawing_pair
from rewards.verifier.prompts import digest, messages
from rewards.verifier.tokens import ask_yes_no, check_settings, yes_no_task
from rewards.verifier.views import View, judge

Aggregate = Literal["mean", "weighted", "all"]
HALF = 0.5
"""A question is passed where its answer's probability is at least this."""


@dataclass(frozen=True)
class Atom:
    """One question. `answer` is the good one; `needs` the numbers, from 0, of the questions to be passed first."""

    ask: str
    answer: Literal["yes", "no"] = "yes"
    weight: float = 1.0
    needs: tuple[int, ...] = ()


class ChecklistReward:
    """The questions in the row's column `column`, each answered by the probability of its good answer.

    A question whose `needs` are not all passed (probability below 0.5) counts 0. `aggregate`: ``mean`` of the
    probabilities; ``weighted``, by the questions' weights; ``all``, 1 where every question is passed and else 0. Parts:
    `mean`, `weighted`, `all`, `lowest`, and `mass`, the smallest that yes and no had together. The reason of a score
    lists the probabilities. A row without readable questions is unavailable, as is a sample of which any question is.
    """

    def __init__(
        self,
        client: Client,
        *,
        column: str = "questions",
        aggregate: Aggregate = "mean",
        min_mass: float = 0.5,
        top_logprobs: int = 20,
        name: str = "checklist",
    ) -> None:
        check_settings(min_mass, top_logprobs)
        if aggregate not in (known := get_args(Aggregate)):
            raise ValueError(f"a checklist has no aggregate {aggregate!r}. {nearest(aggregate, known)}")
        self.name, self.client = name, client
        self.column, self.aggregate = column, aggregate
        self.min_mass, self.top_logprobs = min_mass, top_logprobs

    def fingerprint(self) -> str:
        """The model, how a question is put, and how the answers make a value; not where it is served."""
        asked = [messages(seen, yes_no_task("?")) for seen in (View("?", ("",)), View("?", ("",), ("",)))]
        return (
            f"checklist/1 {self.client.server.identity()} column={self.column} aggregate={self.aggregate} "
            f"min_mass={self.min_mass} top_logprobs={self.top_logprobs} prompts={digest(*asked)}"
        )

    def score(self, samples: Sequence[Sample]) -> list[Score]:
        """One Score a sample, in order; one request a question, at once up to the server's concurrency."""
        return judge(samples, self.client.server.concurrency, self._calls, self._total)

    def gold(self) -> Sequence[GoldPair]:
        """A drawing against another thing's, with two questions about it."""
        return [drawing_pair({self.column: ["Is there a circle?", {"ask": "Is it red?", "needs": [0]}]})]

    def _calls(self, view: View) -> list[Callable[[], tuple[Atom, float, float]]]:
        try:
            atoms = read_atoms(view.row.get(self.column))
        except ValueError as error:
            raise JudgeError(f"column {self.column!r}: {error}") from error
        return [partial(self._ask, view, atom) for atom in atoms]

    def _ask(self, view: View, atom: Atom) -> tuple[Atom, float, float]:
        yes, mass = ask_yes_no(self.client, view, atom.ask, self.top_logprobs, self.min_mass)
        return atom, yes if atom.answer == "yes" else 1 - yes, mass

    def _total(self, answers: Sequence[tuple[Atom, float, float]]) -> Score:
        counted = gated([(atom, chance) for atom, chance, _ in answers])
        parts = {
            "mean": combined([(1.0, chance) for chance in counted], "mean"),
            "weighted": combined(
                [(a.weight, chance) for (a, _, _), chance in zip(answers, counted, strict=True)], "mean"
            ),
            "all": float(all(chance >= HALF for chance in counted)),
            "lowest": min(counted),
            "mass": min(mass for _, _, mass in answers),
        }
        listed = "; ".join(f"{a.ask} {chance:.3f}" for (a, _, _), chance in zip(answers, counted, strict=True))
        return Score("ok", parts[self.aggregate], reason=listed, parts=parts)


def gated(answers: Sequence[tuple[Atom, float]]) -> list[float]:
    """Each question's probability, 0 where a question that it needs, directly or through others, is not passed."""
    counted: list[float] = []
    for atom, chance in answers:
        counted.append(chance if all(counted[number] >= HALF for number in atom.needs) else 0.0)
    return counted


def read_atoms(listed: Any) -> list[Atom]:
    """Questions as a data row lists them: a text, or ``{ask, answer: yes | no, weight, needs: [numbers]}``, where a
    question needs earlier ones only. Raises ValueError that names the entry.
    """
    if isinstance(listed, str | Mapping) or not isinstance(listed, Sequence) or not listed:
        raise ValueError(f"expected a list of questions, got {listed!r}")
    return [_atom(entry, number) for number, entry in enumerate(listed)]


def _atom(entry: Any, number: int) -> Atom:
    given = {"ask": entry} if isinstance(entry, str) else entry
    known = ("ask", "answer", "weight", "needs")
    if not isinstance(given, Mapping) or not isinstance(given.get("ask"), str) or not given["ask"].strip():
        raise ValueError(f"question {number} is no text and has no `ask`: {entry!r}")
    if unknown := [key for key in given if key not in known]:
        raise ValueError(f"question {number} has no setting {unknown[0]!r}. {nearest(str(unknown[0]), known)}")
    # Parquet fills a column's missing fields with None.
    answer, weight, needs = (given.get(key) for key in known[1:])
    if answer not in (None, "yes", "no", True, False):  # YAML reads a bare yes as true
        raise ValueError(f"question {number} has the answer {answer!r}; it is yes or no")
    weight = 1.0 if weight is None else weight
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
        raise ValueError(f"question {number} needs a weight above 0, got {weight!r}")
    needs = [] if needs is None else needs
    earlier = isinstance(needs, list | tuple) and all(type(other) is int and 0 <= other < number for other in needs)
    if not earlier:
        raise ValueError(f"question {number} needs {needs!r}; expected numbers of earlier questions, from 0")
    return Atom(given["ask"], "no" if answer in ("no", False) else "yes", float(weight), tuple(needs))
