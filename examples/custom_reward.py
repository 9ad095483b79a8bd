"""A reward of your own: a Python function named in the recipe, with nothing to register.

In the recipe::

    rewards:
      terms:
        - name: ocr
        - function: examples/custom_reward.py:ink
          weight: 0.2
          options: {wanted: 0.15}

Run this file to see it score three pictures: ``python examples/custom_reward.py``.
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from rewards.base import Sample, Score
from rewards.gold import GoldPair, with_gold


def picture(dark: int) -> Image.Image:
    """A white picture with a black square in it."""
    image = Image.new("RGB", (32, 32), "white")
    image.paste("black", (0, 0, dark, dark))
    return image


def pairs() -> list[GoldPair]:
    """What the reward must rank rightly before a run starts: good above bad."""
    good, bad = (Sample(name, "g", "a black square", (picture(side),)) for name, side in (("good", 12), ("bad", 0)))
    return [GoldPair(good, bad, "a square against an empty picture")]


@with_gold(pairs)
def ink(samples: Sequence[Sample], wanted: float = 0.15) -> list[Score]:
    """1 where the share of dark pixels is `wanted`, and less the further it is from that.

    Answer `ok`, `unavailable` when you could not judge (the sample is then left out of training), or `invalid_output`
    when the policy drew nothing that could be judged (a penalty). An exception is unavailable; it is never a zero.
    """
    scores: list[Score] = []
    for sample in samples:
        if not sample.images:
            scores.append(Score.invalid_output("no image"))
            continue
        dark = float((np.asarray(sample.images[0].convert("L")) < 128).mean())
        scores.append(Score.ok(1 - min(1.0, abs(dark - wanted) / wanted), dark=dark))
    return scores


if __name__ == "__main__":
    for score in ink([Sample(str(side), "g", "a black square", (picture(side),)) for side in (0, 12, 32)]):
        print(f"{score.value:.3f} with {score.parts['dark']:.3f} dark")
