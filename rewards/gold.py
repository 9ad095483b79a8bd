"""Does a reward rank a known good sample above a known bad one? Asked before a run spends its budget on
it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

from PIL import Image

from rewards.base import Reward, Sample, Score
from rewards.names import nearest
from rewards.runner import RewardRunner

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class GoldPair:
    """Two samples of which `good` must score higher."""

    good: Sample
    bad: Sample
    what: str = "gold pair"


@runtime_checkable
class HasGold(Protocol):
    """A reward that brings gold pairs of its own."""

    def gold(self) -> Sequence[GoldPair]: ...


def with_gold(pairs: Callable[[], Sequence[GoldPair]]) -> Callable[[Function], Function]:
    """A decorator that gives a reward function gold pairs of its own; `pairs` is called when they are asked for."""

    def give(function: Function) -> Function:
        vars(function)["gold"] = pairs
        return function

    return give


@dataclass(frozen=True)
class GoldResult:
    """The outcome of a gold check. `lines` has a sentence for every pair; `passed` is true when all are in
    order.
    """

    reward: str
    passed: bool
    lines: tuple[str, ...]


def gold_check(reward: Reward, good: Sequence[Sample], bad: Sequence[Sample]) -> GoldResult:
    """Scores good[i] and bad[i]; passes when every good sample scores strictly higher than its bad one.

    A good sample that gets no score fails the check. A bad one may be invalid output, which is a penalty; one
    that is unavailable fails. Raises ValueError for lists of different or no length, RewardContractError as
    the runner does.
    """
    return gold_check_pairs(reward, [GoldPair(g, b) for g, b in zip(good, bad, strict=True)])


def gold_check_pairs(reward: Reward, pairs: Sequence[GoldPair]) -> GoldResult:
    """`gold_check` on pairs that say what they are."""
    if not pairs:
        raise ValueError(f"no gold pair to check reward {reward.name!r} with")
    runner = RewardRunner(reward, retries=0)
    scores = runner.score([sample for pair in pairs for sample in (pair.good, pair.bad)])
    outcomes = [_outcome(pair.what, scores[2 * at], scores[2 * at + 1]) for at, pair in enumerate(pairs)]
    return GoldResult(reward.name, all(passed for passed, _ in outcomes), tuple(line for _, line in outcomes))


def _outcome(what: str, good: Score, bad: Score) -> tuple[bool, str]:
    if good.value is None:
        return False, f"{what}: the good sample has no score ({good.status}: {good.reason})"
    if bad.value is None:
        passed = bad.status == "invalid_output"
        return passed, f"{what}: good {good.value:.3f}, bad {bad.status} ({bad.reason})"
    passed = good.value > bad.value
    return passed, f"{what}: good {good.value:.3f} {'>' if passed else 'is not above'} bad {bad.value:.3f}"


def pair_from_row(
    row: Mapping[str, Any],
    *,
    good: str = "good_image",
    bad: str = "bad_image",
    source: str = "source_image",
    prompt: str = "prompt",
) -> GoldPair:
    """A user's own pair from a data row: the columns of the good and the bad image, of the prompt and, if the
    row has it, of the source image; every other column reaches the reward. An image is a PIL image or a path.
    """
    for column in (good, bad, prompt):
        if row.get(column) is None:
            raise ValueError(f"a gold pair needs column {column!r}, and the row has none. {nearest(column, row)}")
    rest = {key: value for key, value in row.items() if key not in (good, bad, source, prompt)}
    sources = (_image(row[source]),) if row.get(source) is not None else ()
    first = Sample("gold good", "gold", str(row[prompt]), (_image(row[good]),), source_images=sources, row=rest)
    return GoldPair(first, replace(first, sample_id="gold bad", images=(_image(row[bad]),)), "your pair")


def _image(value: Any) -> Image.Image:
    if isinstance(value, Image.Image):
        return value
    path = Path(value)
    if not path.is_file():
        raise ValueError(f"there is no image at {path}")
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except OSError as error:
        raise ValueError(f"{path} cannot be read as an image: {error}") from error
