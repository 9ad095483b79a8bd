"""Cheap rewards for tests of the machinery."""

from typing import Any

import numpy as np
from PIL import Image

from rewards.base import Sample, Score


def darkness(prompts: list[str], completions: list[Image.Image], **columns: Any) -> list[float]:
    """Mean darkness of the picture, in [0, 1]."""
    return [1.0 - float(np.asarray(image, dtype=np.float64).mean()) / 255 for image in completions]


def left_darkness(prompts: list[str], completions: list[Image.Image], **columns: Any) -> list[float]:
    """Mean darkness of the left half."""
    return [1.0 - float(np.asarray(i, dtype=np.float64)[:, : i.width // 2].mean()) / 255 for i in completions]


def letters(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """How often a text has the letter t, at most 1."""
    return [min(1.0, text.count("t") / 4) for text in completions]


def picky(prompts: list[str], completions: list[Image.Image], **columns: Any) -> list[float]:
    """`darkness`, but the same for every picture of a prompt whose length is even."""
    dark = darkness(prompts, completions)
    return [0.0 if len(prompt) % 2 == 0 else value for prompt, value in zip(prompts, dark, strict=True)]


def brevity(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """Shorter texts score higher."""
    return [1 / (1 + len(text)) for text in completions]


def halves(samples: list[Sample]) -> list[Score]:
    """Mean darkness of the upper half of a picture, then of the lower, which is drawn after it."""
    pictures = [np.asarray(sample.images[0], dtype=np.float64) for sample in samples]
    return [Score.stepwise([1.0 - float(half.mean()) / 255 for half in np.split(one, 2)]) for one in pictures]


def thought_length(samples: list[Sample]) -> list[float]:
    """Characters of the text."""
    return [float(len(sample.text)) for sample in samples]
