"""A reward of your own: a Python function named in the recipe, with nothing to register.

In the recipe::

    rewards:
      terms:
        - name: ocr
        - function: examples/custom_reward.py:ink
          weight: 0.2
          options: {wanted: 0.15}

Run this file to see both functions score two pictures: ``python examples/custom_reward.py``.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from rewards.base import Sample, Score


def ink(samples: Sequence[Sample], wanted: float = 0.15) -> list[Score]:
    """1 where the share of dark pixels is `wanted`, and less the further it is from that.

    Answer a `Score` a sample: `ok`, `unavailable` when you could not judge (the sample is then left out of
    training), or `invalid_output` when the policy drew nothing that could be judged (a penalty). An exception
    makes the samples unavailable; it is never a zero.
    """
    scores: list[Score] = []
    for sample in samples:
        if not sample.images:
            scores.append(Score.invalid_output("no image"))
            continue
        dark = float((np.asarray(sample.images[0].convert("L")) < 128).mean())
        scores.append(Score.ok(1 - min(1.0, abs(dark - wanted) / wanted), dark=dark))
    return scores


async def redness(completions: list[Image.Image], **columns: list[Any]) -> list[float | None]:
    """The same in TRL's signature, and async: `completions` are the images, the rest are data columns.

    None means that the reward does not apply to the sample.
    """
    answers: list[float | None] = []
    for image in completions:
        red, green, blue = np.asarray(image.convert("RGB"), dtype=float).mean(axis=(0, 1)) / 255
        answers.append(float(red - (green + blue) / 2))
    return answers


def main() -> None:
    """Scores a blank, a red and a dotted picture with both functions, as a run would."""
    from rewards import build
    from rewards.runner import RewardRunner

    pictures = {name: Image.new("RGB", (32, 32), name) for name in ("white", "red")}
    pictures["dotted"] = Image.new("RGB", (32, 32), "white")
    pictures["dotted"].paste("black", (10, 10, 22, 22))
    samples = [Sample(name, "g", "a red square", (image,)) for name, image in pictures.items()]
    for function in ("ink", "redness"):
        runner = RewardRunner(build("function", target=f"{__file__}:{function}"))
        for sample, score in zip(samples, runner.score(samples), strict=True):
            print(f"{function}({sample.sample_id}) = {score.value:.3f}")


if __name__ == "__main__":
    main()
