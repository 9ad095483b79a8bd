"""Which samples of a prompt make a pair: pure choices over scored samples."""

from collections.abc import Sequence
from dataclasses import dataclass

UNSCORED = "sample without a score"
DUPLICATE = "sample that is all but another one"
UNENDED = "text that did not end"
FEW = "prompt with fewer than two different samples"
UNANSWERED = "pair of pictures without a pair of answers"
CLOSE = "pair with too small a margin"


@dataclass(frozen=True)
class Candidate:
    """A sample: `score` None where the reward failed, `tokens` what the policy decided, `ended` False for a text that
    was cut at its limit."""

    score: float | None
    tokens: Sequence[int]
    ended: bool = True


@dataclass(frozen=True)
class LeftOut:
    """Why, and the numbers of the candidates: one sample, the two of a pair, or none where it is the prompt itself."""

    reason: str
    candidates: tuple[int, ...] = ()


def choose_pairs(
    candidates: Sequence[Candidate], *, count: int, margin: float, duplicate_distance: float
) -> tuple[list[tuple[int, int]], list[LeftOut]]:
    """At most `count` (chosen, rejected) numbers of a prompt's candidates, no candidate twice: the best against the
    worst, then the second best against the second worst, as long as scores differ by more than `margin`. Of equal
    scores the earlier candidate counts as the better one. Beside them, what was left out.

    Of two candidates that differ in no more than a share `duplicate_distance` of their tokens the later is left out.
    """
    left_out: list[LeftOut] = []
    kept: list[int] = []
    for number, one in enumerate(candidates):
        if one.score is None:
            left_out.append(LeftOut(UNSCORED, (number,)))
        elif not one.ended:
            left_out.append(LeftOut(UNENDED, (number,)))
        elif any(distance(one.tokens, candidates[k].tokens) <= duplicate_distance for k in kept):
            left_out.append(LeftOut(DUPLICATE, (number,)))
        else:
            kept.append(number)
    if len(kept) < 2:
        left_out.append(LeftOut(FEW))
    ranked = sorted(kept, key=lambda number: (-_score(candidates[number]), number))
    pairs = []
    for place in range(min(count, len(ranked) // 2)):
        best, worst = ranked[place], ranked[-1 - place]
        if _score(candidates[best]) - _score(candidates[worst]) > margin:
            pairs.append((best, worst))
        else:
            left_out.append(LeftOut(CLOSE, (best, worst)))
    return pairs, left_out


def distance(one: Sequence[int], other: Sequence[int]) -> float:
    """Share of positions at which two token sequences differ; one that only the longer has counts as a difference."""
    longest = max(len(one), len(other))
    same = sum(a == b for a, b in zip(one, other, strict=False))
    return (longest - same) / max(1, longest)


def _score(candidate: Candidate) -> float:
    assert candidate.score is not None, "only scored candidates are ranked"
    return candidate.score
