"""Gold pairs that any judge worth training on ranks rightly, drawn large enough for a vision encoder's patches."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from PIL import Image

from rewards.base import Sample
from rewards.gold import GoldPair
from rewards.gold_images import scene_image

SCALE = 8


def _shape(shape: str, color: str) -> Image.Image:
    small = scene_image({(1, 1): (shape, color)})
    return small.resize((small.width * SCALE, small.height * SCALE), Image.Resampling.NEAREST)


def drawing_pair(row: Mapping[str, Any] | None = None) -> GoldPair:
    """A drawing as the prompt has it, against one of another thing; `row` are the data row's columns."""
    prompt = "a simple flat drawing of one red circle on a white background"
    good, bad = _shape("circle", "red"), _shape("square", "blue")
    return GoldPair(
        Sample("gold good", "gold", prompt, (good,), row=row or {}),
        Sample("gold bad", "gold", prompt, (bad,), row=row or {}),
        "a red circle against a blue square",
    )


def edit_pair() -> GoldPair:
    """An edit as the instruction has it, against the source unchanged."""
    source, prompt = _shape("circle", "red"), "change the colour of the circle from red to blue"
    return GoldPair(
        Sample("gold good", "gold", prompt, (_shape("circle", "blue"),), source_images=(source,)),
        Sample("gold bad", "gold", prompt, (source,), source_images=(source,)),
        "a recoloured circle against the circle unchanged",
    )


def target_pair() -> GoldPair:
    """A drawing like the target, against one of another thing."""
    pair, target = drawing_pair(), (_shape("circle", "red"),)
    return GoldPair(
        replace(pair.good, target_images=target),
        replace(pair.bad, target_images=target),
        "a drawing like its target against another",
    )
