"""The best of many samples by a reward, what `rlmm sample --best-of` shows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from rewards import REWARDS
from rewards.base import Sample
from rlmm.config.base import nearest
from rlmm.config.recipe import read_recipe, recipes_dir
from rlmm.config.rewards import Rewards
from rlmm.evaluation.best_of import CurvePoint, curve, scores_of
from rlmm.rewarding import build_composite
from rlmm.sampling import Samples


@dataclass(frozen=True)
class Ranked:
    """The best samples of each prompt, the best one first, with their scores [prompts, kept] (NaN: the reward failed);
    `curve` is of all that were drawn."""

    samples: Samples
    scores: np.ndarray
    curve: list[CurvePoint]

    def lines(self, prompts: Sequence[str]) -> list[str]:
        """Scores and curve as sentences."""
        told = [
            f"{prompt}: " + ", ".join("no score" if np.isnan(score) else f"{score:.3f}" for score in row)
            for prompt, row in zip(prompts, self.scores, strict=True)
        ]
        return told + [
            f"best of {point.n}: {point.mean:.3f}"
            + ("" if np.isnan(point.low) else f" [{point.low:.3f}, {point.high:.3f}]")
            for point in self.curve
        ]


def rewards_named(name: str) -> Rewards:
    """The rewards of a recipe, a built-in reward, or a function (path/file.py:name). Raises ValueError for what is none
    of them."""
    if name in REWARDS:
        return Rewards.model_validate({"terms": [{"name": name}]})
    if ":" in name:
        return Rewards.model_validate({"terms": [{"function": name}]})
    shipped = [recipe.stem for recipe in recipes_dir().glob("*.yaml")]
    if Path(name).suffix or name in shipped:
        return read_recipe(Path(name)).rewards
    raise ValueError(f"there is no reward and no recipe {name!r}.{nearest(name, sorted({*REWARDS, *shipped}))}")


def check_kept(keep: int, count: int) -> None:
    """Raises ValueError where more samples are to be kept than are drawn."""
    if keep > count:
        raise ValueError(f"the {keep} best of {count} samples were asked for; draw more, or show fewer")


def rank(
    drawn: Samples,
    prompts: Sequence[str],
    rewards: Rewards,
    keep: int,
    *,
    row: Mapping[str, Any] | None = None,
    sources: Sequence[Image.Image] = (),
) -> Ranked:
    """Of each prompt's samples the `keep` best; samples without a score come last. `row`: columns that the rewards
    read, and `sources`: images that the prompts are about, the same for every prompt.

    Raises ValueError where more are to be kept than were drawn, or no sample has a score.
    """
    count = drawn.columns
    check_kept(keep, count)
    made = [
        Sample(
            sample_id=str(place),
            group_id=str(place // count),
            prompt=prompts[place // count],
            images=tuple(drawn.images[place : place + 1]),
            text=drawn.texts[place],
            source_images=tuple(sources),
            row=row or {},
        )
        for place in range(len(prompts) * count)
    ]
    scored = build_composite(rewards).checked(made)
    scores_PN = scores_of(scored, rewards.invalid_output_penalty).reshape(-1, count)
    if np.isnan(scores_PN).all():
        raise ValueError(
            f"none of the {len(made)} samples has a score, so none is the best: {scored[0].total.reason}. "
            "Columns that a reward reads are given with --row"
        )
    order_PN = np.argsort(-np.nan_to_num(scores_PN, nan=-np.inf), axis=1, kind="stable")[:, :keep]
    places = (order_PN + np.arange(len(prompts))[:, None] * count).flatten().tolist()
    images = [drawn.images[place] for place in places] if drawn.images else []
    kept = Samples(images, [drawn.texts[place] for place in places], keep)
    return Ranked(kept, np.take_along_axis(scores_PN, order_PN, 1), curve(scores_PN))
