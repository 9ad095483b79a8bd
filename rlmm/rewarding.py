"""From a recipe's rewards to the objects that score, and the gold check that comes before they are
trusted.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rewards import build
from rewards.base import Reward
from rewards.compose import CompositeReward, Gate, Term
from rewards.failures import FailurePolicy
from rewards.gold import GoldPair, GoldResult, HasGold, gold_check_pairs, pair_from_row
from rewards.runner import RewardRunner
from rewards.transforms import Affine, GroupTransform, Sigmoid, Transform, identity
from rlmm.config.recipe import Recipe
from rlmm.config.rewards import AffineTransform, Rewards, RewardTerm, SigmoidTransform
from rlmm.train.heart import beat


def build_reward(term: RewardTerm) -> Reward:
    """The reward of one term. Raises ValueError or OSError that says what is missing."""
    if term.serve is not None:
        from rlmm.reward_process import served_reward

        return served_reward(term)
    if term.function:
        return build("function", **{**term.options, "target": term.function, "name": term.key})
    return build(term.name, **term.options)


def build_composite(config: Rewards) -> CompositeReward:
    """The composite that scores samples as the recipe says. Raises as `build_reward` does."""
    terms = [
        Term(
            term.key,
            RewardRunner(
                build_reward(term),
                batch_size=config.batch_size,
                deadline_s=config.deadline_s,
                retries=config.retries,
                cache=config.cache,
                after_batch=beat,
            ),
            term.weight,
            transform_of(term),
            term.parts,
            in_group_of(term),
            term.span,
            term.steps,
        )
        for term in config.terms
    ]
    gates = [Gate(gate.term, gate.threshold, gate.floor) for gate in config.gate]
    return CompositeReward(terms, config.mode, gates, config.normalise == "terms", FailurePolicy(config.ceiling))


def transform_of(term: RewardTerm) -> Transform:
    """What happens to each of a term's values by itself."""
    given = term.transform
    if isinstance(given, AffineTransform):
        return Affine(given.lo, given.hi)
    return Sigmoid(given.centre, given.width) if isinstance(given, SigmoidTransform) else identity


def in_group_of(term: RewardTerm) -> GroupTransform:
    """What happens to a term's values among those of their group."""
    return term.transform if term.transform in ("rank", "zscore") else ""


def gold_results(config: Rewards, pair: GoldPair | None = None) -> dict[str, GoldResult | None]:
    """Each term's gold check, on `pair` or else on the pairs that the reward brings; None where there are
    none.

    For a term that counts the other way round (a negative weight, an affine transform with hi below lo, a sigmoid of
    negative width), the good sample of `pair` is the one with the lower raw score.
    """
    results: dict[str, GoldResult | None] = {}
    for term in config.terms:
        reward = build_reward(term)
        own = list(reward.gold()) if isinstance(reward, HasGold) else []
        pairs = own if pair is None else [_oriented(pair, term)]
        results[term.key] = gold_check_pairs(reward, pairs) if pairs else None
    return results


def _oriented(pair: GoldPair, term: RewardTerm) -> GoldPair:
    given = term.transform
    flipped = (isinstance(given, AffineTransform) and given.hi < given.lo) or (
        isinstance(given, SigmoidTransform) and given.width < 0
    )
    return GoldPair(pair.bad, pair.good, pair.what) if (term.weight < 0) != flipped else pair


def check_rewards(
    recipe: Recipe,
    say: Callable[[str], Any],
    *,
    pair: tuple[Path, Path] | None = None,
    prompt: str = "",
    row: Mapping[str, Any] | None = None,
) -> bool:
    """Says how a recipe's rewards and held-out judges rank a known good sample and a known bad one.

    The samples are the rewards' own, or the image files (good, bad) of `pair`, with their prompt and the data
    row's other columns. True when something was checked and every check passed: a function of your own brings
    no samples, and says so.
    """
    given = None
    if pair is not None:
        given = pair_from_row({**(row or {}), "prompt": prompt, "good_image": pair[0], "bad_image": pair[1]})
    checked: list[bool] = []
    for part, config in (("rewards", recipe.rewards), ("held_out", recipe.held_out)):
        for key, result in gold_results(config, given).items():
            if result is None:
                say(f"{part}.{key}: not checked, it brings no gold pair; give --good, --bad and --prompt")
                continue
            checked.append(result.passed)
            for line in result.lines:
                say(f"{part}.{key}: {'' if result.passed else 'WRONG: '}{line}")
    return bool(checked) and all(checked)
