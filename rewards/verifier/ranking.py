"""All pictures of a group ranked at once, in two orders, and the ranks made into scores."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import combinations
from typing import Any, Literal

from rewards.base import Sample, Score
from rewards.gold import GoldPair
from rewards.verifier.answers import read_ranking
from rewards.verifier.client import Client
from rewards.verifier.errors import JudgeError
from rewards.verifier.gold import drawing_pair
from rewards.verifier.groups import better, check_better, score_groups
from rewards.verifier.marks import ask_json
from rewards.verifier.prompts import REASKS, comparison, digest
from rewards.verifier.views import View

TASK = (
    "Rank all of them, the best first: the better of two is the one that {better}. Answer with one JSON object and "
    "nothing around it: first `reasoning`, a string of at most three sentences, then `ranking`, a list of the numbers "
    "1 to {count}, each once."
)


class RankingReward:
    """The share of its group that a sample is ranked above, 0 to 1, the mean of two rankings.

    The judge sees all pictures at once, in their order and in the reverse of it, and ranks them as JSON. Averaged over
    both orders a preference for early places cancels, and two samples whose order the rankings disagree about are tied.
    `position_bias` is that preference (share of pairs in which the one shown first is ranked above, less 1/2),
    `agreement` the share of pairs that both rankings order alike; a group below `min_agreement` is unavailable. An
    answer that is no ranking is asked for again, `reasks` (0 to 2) times; then the group is unavailable.
    """

    whole_groups: Literal[True] = True

    def __init__(
        self,
        client: Client,
        *,
        better: str = "overall",
        min_agreement: float = 0.5,
        max_tokens: int = 512,
        reasks: int = 2,
        name: str = "ranking",
    ) -> None:
        check_better(better)
        if not 0 <= min_agreement <= 1 or max_tokens < 1 or not 0 <= reasks <= len(REASKS):
            raise ValueError(
                f"a ranking needs min_agreement in [0, 1], max_tokens >= 1 and reasks 0 to {len(REASKS)}, got "
                f"{min_agreement}, {max_tokens} and {reasks}"
            )
        self.name, self.client, self.better = name, client, better
        self.min_agreement, self.max_tokens, self.reasks = min_agreement, max_tokens, reasks

    def fingerprint(self) -> str:
        """The model, what it is asked, and how the answers make a value; not where it is served."""
        asked = [self._asked([seen, seen]) for seen in (View("?", ("",)), View("?", ("",), ("",)))]
        return (
            f"ranking/1 {self.client.server.identity()} min_agreement={self.min_agreement} "
            f"max_tokens={self.max_tokens} prompts={digest(*asked)}"
        )

    def score(self, samples: Sequence[Sample]) -> list[Score]:
        """One Score a sample, in order; `samples` are whole groups."""
        return score_groups(samples, self.client.server.concurrency, self._calls, self._total)

    def gold(self) -> Sequence[GoldPair]:
        """A drawing against another thing's drawing, where what is asked is built in."""
        return [drawing_pair()] if self.better in ("overall", "faithful") else []

    def _asked(self, views: Sequence[View]) -> list[Any]:
        task = TASK.replace("{count}", str(len(views))).replace("{better}", better(self.better, views[0].edit))
        return [comparison(views, task + more) for more in ("", *REASKS[: self.reasks])]

    def _calls(self, views: Sequence[View]) -> list[Callable[[], tuple[int, ...]]]:
        there = list(range(len(views)))
        return [partial(self._ranks, views, there), partial(self._ranks, views, there[::-1])]

    def _ranks(self, views: Sequence[View], order: Sequence[int]) -> tuple[int, ...]:
        """Each member's rank, from 0 for the best, when they are shown in this order."""
        asked = self._asked([views[at] for at in order])
        found = ask_json(
            self.client, asked, form(len(views)), self.max_tokens, lambda answer: read_ranking(answer, len(views))
        )
        ranked = [order[number] for number in found]
        return tuple(ranked.index(member) for member in range(len(views)))

    def _total(self, views: Sequence[View], answers: Sequence[tuple[int, ...] | JudgeError]) -> list[Score]:
        there, back = answers
        if isinstance(there, JudgeError) or isinstance(back, JudgeError):
            why = there if isinstance(there, JudgeError) else back
            return [Score.unavailable(str(why))] * len(views)
        pairs = list(combinations(range(len(views)), 2))
        # In the reverse order the later member of a pair is the one shown first.
        early = sum(there[i] < there[j] for i, j in pairs) + sum(back[j] < back[i] for i, j in pairs)
        agreement = sum((there[i] < there[j]) == (back[i] < back[j]) for i, j in pairs) / len(pairs)
        if agreement < self.min_agreement:
            return [
                Score.unavailable(
                    f"the two orders agree about {agreement:.2f} of the pairs, below {self.min_agreement}"
                )
            ] * len(views)
        parts = {"agreement": agreement, "position_bias": early / (2 * len(pairs)) - 0.5}
        above = [(2 * (len(views) - 1) - a - b) / (2 * (len(views) - 1)) for a, b in zip(there, back, strict=True)]
        return [Score.ok(value, **parts) for value in above]


def form(count: int) -> dict[str, Any]:
    """The `response_format` of a ranking of `count` pictures."""
    number = {"type": "integer", "minimum": 1, "maximum": count}
    properties = {
        "reasoning": {"type": "string"},
        "ranking": {"type": "array", "items": number, "minItems": count, "maxItems": count},
    }
    answer = {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
    return {"type": "json_schema", "json_schema": {"name": "ranking", "strict": True, "schema": answer}}
