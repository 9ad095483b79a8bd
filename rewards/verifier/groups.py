"""From the samples of a group to what a judge compares, and what a comparison is called."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from rewards.base import Sample, Score
from rewards.names import nearest
from rewards.verifier.errors import JudgeError
from rewards.verifier.views import View, view

A = TypeVar("A")
BETTER = {
    "overall": (
        "shows better what was asked for, and is the better picture where both show it alike",
        "follows the instruction better and leaves the rest as it was before the edit",
    ),
    "faithful": (
        "shows more exactly what the prompt describes, with the number, colour, place and relation of things",
        "carries the instruction out more completely and changes less of the rest",
    ),
    "looks": (
        "has fewer distortions, smears, seams and malformed parts, and holds together better",
        "has fewer distortions, smears, seams and malformed parts, and holds together better",
    ),
}
"""What makes a picture the better one, by name: of a drawing, and of an edit."""


def better(name: str, edit: bool) -> str:
    """The words for a name in BETTER; a text of one's own, which has a blank in it, stands for itself."""
    return BETTER[name][edit] if name in BETTER else name


def check_better(name: str) -> None:
    """Raises ValueError, naming the nearest, for what is neither a name in BETTER nor a text."""
    if name not in BETTER and " " not in name.strip():
        raise ValueError(f"`better` is neither a built-in comparison nor a text: {name!r}. {nearest(name, BETTER)}")


def score_groups(
    samples: Sequence[Sample],
    workers: int,
    calls: Callable[[Sequence[View]], Sequence[Callable[[], A]]],
    total: Callable[[Sequence[View], Sequence[A | JudgeError]], Sequence[Score]],
) -> list[Score]:
    """One Score a sample, in order: `total` of a group's members that can be judged and of what its `calls` answered,
    each an answer or the error of its judge. All calls run at once, `workers` of them at a time.

    Members whose picture is missing or broken are set aside (invalid output) and the others compared without them. A
    group with fewer than two members left, or of several prompts or sources, is unavailable.
    """
    scores: dict[int, Score] = {}
    with ThreadPoolExecutor(workers, thread_name_prefix="judge") as pool:
        views = list(pool.map(view, samples))
        pending: list[tuple[list[int], list[View], list[Future[A]]]] = []
        for rows in _rows(samples).values():
            shown = {row: seen for row in rows if isinstance(seen := views[row], View)}
            scores |= {row: seen for row in rows if isinstance(seen := views[row], Score)}
            if fault := _fault(list(shown.values())):
                scores |= dict.fromkeys(shown, Score.unavailable(fault))
                continue
            asked = [pool.submit(call) for call in calls(list(shown.values()))]
            pending.append((list(shown), list(shown.values()), asked))
        for rows, seen, asked in pending:
            scores |= dict(zip(rows, total(seen, [_answer(one) for one in asked]), strict=True))
    return [scores[row] for row in range(len(samples))]


def _rows(samples: Sequence[Sample]) -> Mapping[str, list[int]]:
    groups: dict[str, list[int]] = {}
    for row, sample in enumerate(samples):
        groups.setdefault(sample.group_id, []).append(row)
    return groups


def _fault(views: Sequence[View]) -> str:
    """Why these cannot be compared, '' where they can."""
    if len(views) < 2:
        return f"a comparison needs two pictures of a group, and {len(views)} can be judged"
    if len({(seen.prompt, seen.sources) for seen in views}) > 1:
        return (
            "the group's samples answer different prompts or edit different sources, so no rank of them means anything"
        )
    return ""


def _answer(future: Future[A]) -> A | JudgeError:
    try:
        return future.result()
    except JudgeError as error:
        return error
