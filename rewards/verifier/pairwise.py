"""Pairs of a group compared in both orders, and each sample's share of the comparisons it won.

A judge that prefers what it is shown first (or last) says so by changing its mind with the order. With p_ij the
probability that i is called better when it is shown first, the probability for i is (p_ij + 1 - p_ji) / 2, in which
such a preference cancels to first order, and (p_ij + p_ji) / 2 - 1/2 measures it. A win rate in the group is free of
the tiny gaps of a scalar judge that a division by the group's spread would blow up (Pref-GRPO, arXiv 2508.20751).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import Literal, get_args

from rewards.base import Sample, Score
from rewards.gold import GoldPair
from rewards.names import nearest
from rewards.verifier.client import Client
from rewards.verifier.errors import JudgeError
from rewards.verifier.gold import drawing_pair
from rewards.verifier.groups import better, check_better, score_groups
from rewards.verifier.prompts import comparison, digest
from rewards.verifier.tokens import check_settings, first_token, shares
from rewards.verifier.views import View

Disagreement = Literal["tie", "unavailable"]
TASK = "Which of the two is the one that {better}? Answer with the digit 1 or 2 and nothing else."


@dataclass(frozen=True)
class Pair:
    """Members `i` and `j`; the probabilities that the one shown first is better, with i first and with j first."""

    i: int
    j: int
    i_first: float
    j_first: float

    @property
    def for_i(self) -> float:
        """The probability that i is better, without the preference for a place."""
        return (self.i_first + 1 - self.j_first) / 2

    @property
    def bias(self) -> float:
        """The preference for the first place, -1/2 to 1/2."""
        return (self.i_first + self.j_first) / 2 - 0.5

    @property
    def agrees(self) -> bool:
        """Whether both orders name the same one."""
        return (self.i_first - 0.5) * (self.j_first - 0.5) < 0


class PairwiseReward:
    """The share of a sample's comparisons that it won, 0 to 1: a win counts 1, a tie 1/2.

    Each pair is asked about twice, in both orders, by the log-probabilities of one token. Where the orders name
    different winners the pair is a tie, or with `disagreement` unavailable it has no outcome. `opponents` (0 for all)
    is how many others of its group a sample meets at least, in a ring. A sample of whose pairs fewer than `min_share`
    have an outcome is unavailable. `better` is what makes the better picture: a name in `groups.BETTER` or your own
    words.

    Parts: `preference`, the mean probability of being better; `position_bias`, `disagreement` (share of pairs) and
    `compared` (number of outcomes) of the sample's pairs.
    """

    whole_groups: Literal[True] = True

    def __init__(
        self,
        client: Client,
        *,
        better: str = "overall",
        opponents: int = 0,
        disagreement: Disagreement = "tie",
        min_share: float = 0.5,
        min_mass: float = 0.5,
        top_logprobs: int = 20,
        name: str = "pairwise",
    ) -> None:
        check_settings(min_mass, top_logprobs)
        check_better(better)
        if disagreement not in (known := get_args(Disagreement)):
            raise ValueError(
                f"a disagreement is a tie or unavailable, got {disagreement!r}. {nearest(disagreement, known)}"
            )
        if opponents < 0 or not 0 < min_share <= 1:
            raise ValueError(f"pairwise needs opponents >= 0 and min_share in (0, 1], got {opponents} and {min_share}")
        self.name, self.client, self.better = name, client, better
        self.opponents, self.disagreement = opponents, disagreement
        self.min_share, self.min_mass, self.top_logprobs = min_share, min_mass, top_logprobs

    def fingerprint(self) -> str:
        """The model, what it is asked, and how the answers make a value; not where it is served."""
        asked = [comparison([seen, seen], self._task(seen)) for seen in (View("?", ("",)), View("?", ("",), ("",)))]
        return (
            f"pairwise/1 {self.client.server.identity()} opponents={self.opponents} disagreement={self.disagreement} "
            f"min_share={self.min_share} min_mass={self.min_mass} top_logprobs={self.top_logprobs} "
            f"prompts={digest(*asked)}"
        )

    def score(self, samples: Sequence[Sample]) -> list[Score]:
        """One Score a sample, in order; `samples` are whole groups."""
        return score_groups(samples, self.client.server.concurrency, self._calls, self._total)

    def gold(self) -> Sequence[GoldPair]:
        """A drawing against another thing's drawing, where what is asked is built in."""
        return [drawing_pair()] if self.better in ("overall", "faithful") else []

    def _task(self, view: View) -> str:
        return TASK.replace("{better}", better(self.better, view.edit))

    def _calls(self, views: Sequence[View]) -> list[Callable[[], Pair]]:
        return [partial(self._pair, views, i, j) for i, j in plan(len(views), self.opponents)]

    def _pair(self, views: Sequence[View], i: int, j: int) -> Pair:
        return Pair(i, j, self._first_is_better(views[i], views[j]), self._first_is_better(views[j], views[i]))

    def _first_is_better(self, one: View, other: View) -> float:
        asked = comparison([one, other], self._task(one))
        answer = self.client.chat(asked, 1, logprobs=True, top_logprobs=self.top_logprobs)
        share, _ = shares(first_token(answer), ("1", "2"), self.min_mass, "the digits 1 and 2")
        return share["1"]

    def _total(self, views: Sequence[View], answers: Sequence[Pair | JudgeError]) -> list[Score]:
        planned = plan(len(views), self.opponents)
        return [self._member(me, planned, answers) for me in range(len(views))]

    def _member(self, me: int, planned: Sequence[tuple[int, int]], answers: Sequence[Pair | JudgeError]) -> Score:
        mine = [answer for ends, answer in zip(planned, answers, strict=True) if me in ends]
        pairs = [answer for answer in mine if isinstance(answer, Pair)]
        met = [pair for pair in pairs if pair.agrees or self.disagreement == "tie"]
        if len(met) < self.min_share * len(mine):
            errors = [str(answer) for answer in mine if isinstance(answer, JudgeError)]
            why = errors[0] if errors else "the two orders disagree"
            return Score.unavailable(f"{len(met)} of {len(mine)} comparisons have an outcome; {why}")
        for_me = [pair.for_i if pair.i == me else 1 - pair.for_i for pair in met]
        outcomes = [float(p > 0.5) if pair.agrees else 0.5 for pair, p in zip(met, for_me, strict=True)]
        return Score.ok(
            sum(outcomes) / len(outcomes),
            preference=sum(for_me) / len(for_me),
            position_bias=sum(pair.bias for pair in pairs) / len(pairs),
            disagreement=sum(not pair.agrees for pair in pairs) / len(pairs),
            compared=float(len(met)),
        )


def plan(count: int, opponents: int) -> list[tuple[int, int]]:
    """The pairs (i, j) of `count` members that are compared: all, or a ring in which each meets the next ones and the
    ones before, so that everybody has the same number of opponents, at least `opponents`.
    """
    if not 0 < opponents < count - 1:
        return list(combinations(range(count), 2))
    steps = range(1, (opponents + 1) // 2 + 1)
    return sorted({(min(i, j), max(i, j)) for i in range(count) for step in steps for j in [(i + step) % count]})
