"""The LAION aesthetic predictor: a linear stack on a CLIP's picture vector, blind to the prompt and soon gamed."""

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from rewards.base import Sample, Score
from rewards.images import load_or_invalid
from rewards.two_towers import TwoTowers


def load_head(path: str | Path, width: int | None = None) -> list[tuple[Tensor, Tensor]]:
    """Weights [out, in] and biases [out] of the head's linear layers, in order, float32, from a .safetensors file or a
    .pth (read as tensors alone, no code). Keys are ``layers.<number>.weight`` and ``.bias``, as published: linear
    layers with nothing but dropout between them. Raises ValueError for a file that holds anything else.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no aesthetic head at {path}")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        state = load_file(path)
    else:
        state = torch.load(path, map_location="cpu", weights_only=True)
    numbers = sorted({int(found[1]) for key in state if (found := re.fullmatch(r"layers\.(\d+)\.weight", key))})
    keys = {f"layers.{number}.{kind}" for number in numbers for kind in ("weight", "bias")}
    if not numbers or keys != set(state):
        raise ValueError(
            f"{path} is no stack of linear layers (layers.0.weight, ...); it holds {', '.join(state)[:200]}"
        )
    layers = [(state[f"layers.{n}.weight"].float(), state[f"layers.{n}.bias"].float()) for n in numbers]
    wide = [weight.shape[1] for weight, _ in layers]
    if [weight.shape[0] for weight, _ in layers] != [*wide[1:], 1] or (width is not None and wide[0] != width):
        raise ValueError(f"{path} goes from {wide[0]} inputs through {wide[1:]} to 1; the CLIP gives {width}")
    return layers


class AestheticReward:
    """The predictor's mark, about 1 to 10, averaged over the sample's images. No gold pair: what pleases is open."""

    name = "aesthetic"

    def __init__(self, model: TwoTowers, head: str | Path) -> None:
        self.model = model
        width = model.pictures([Image.new("RGB", (8, 8))]).shape[1]
        self._layers = load_head(head, width)
        content = b"".join(part.numpy().tobytes() for layer in self._layers for part in layer)
        self._fingerprint = f"aesthetic/1 {hashlib.sha256(content).hexdigest()[:16]} [{model.fingerprint()}]"

    def fingerprint(self) -> str:
        """The weights of both parts."""
        return self._fingerprint

    def score(self, samples: Sequence[Sample]) -> list[Score]:
        """One Score a sample, in order."""
        loaded = [load_or_invalid(sample) for sample in samples]
        images = [image for item in loaded if isinstance(item, list) for image in item]
        marks = iter(self._marks(images) if images else [])
        return [
            item if isinstance(item, Score) else Score.ok(sum(next(marks) for _ in item) / len(item)) for item in loaded
        ]

    def _marks(self, images: Sequence[Image.Image]) -> list[float]:
        hidden_BD = self.model.pictures(images)
        for weight, bias in self._layers:
            hidden_BD = torch.nn.functional.linear(hidden_BD, weight, bias)
        return hidden_BD[:, 0].tolist()
