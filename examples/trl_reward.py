"""A reward in TRL's signature, unchanged, and asynchronous: for one that waits for something, as a service.

In the recipe::

    rewards:
      terms:
        - function: examples/trl_reward.py:redness
          transform: {lo: -0.5, hi: 0.5}
"""

import asyncio
from typing import Any

import numpy as np
from PIL import Image

from rewards.base import Sample
from rewards.gold import GoldPair, with_gold


def pairs() -> list[GoldPair]:
    """What the reward must rank rightly before a run starts: good above bad."""
    good, bad = (Sample(name, "g", "", (Image.new("RGB", (8, 8), name),)) for name in ("red", "white"))
    return [GoldPair(good, bad, "red against white")]


async def red(image: Image.Image) -> float:
    """How much more red than green and blue there is, -1 to 1. Here your service would be asked."""
    await asyncio.sleep(0)
    share = np.asarray(image.convert("RGB"), dtype=float).mean(axis=(0, 1)) / 255
    return float(share[0] - share[1:].mean())


@with_gold(pairs)
async def redness(completions: list[Image.Image], **columns: list[Any]) -> list[float | None]:
    """`completions` are the images, the rest are the data's columns; a float a sample, or None where the reward does
    not apply. All are asked for at once, in a loop that is kept from call to call.
    """
    return list(await asyncio.gather(*(red(image) for image in completions)))
