"""What all conversions share: sizes, and a folder that is written only where every weight has its place."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from rewards.checkpoints import misfits


def square_side(positions: int, patch: int, source: Path) -> int:
    """Side in pixels of the square that a vision transformer with so many positions, one of the class, looks at."""
    side = round((positions - 1) ** 0.5)
    if side * side != positions - 1:
        raise ValueError(f"{source} has {positions} positions of a picture, which are no square and one of the class")
    return side * patch


def layers(weights: Mapping[str, Tensor], prefix: str) -> int:
    """How many layers there are whose weights are called `prefix` and a number."""
    return 1 + max(int(name.removeprefix(prefix).split(".")[0]) for name in weights if name.startswith(prefix))


def write_folder(
    kind: type[PreTrainedModel], config: Any, weights: Mapping[str, Tensor], folder: Path, tokenizer: str, source: Path
) -> None:
    """config.json, model.safetensors, the tokenizer, and pictures prepared as CLIP's are: the short side to the
    model's, bicubic, the middle of the rest. Raises ValueError where the weights are not those of such a model."""
    with torch.device("meta"):
        model = kind(config)
    if faults := misfits(model, weights):
        raise ValueError(
            f"{source} is no checkpoint of the kind that was named: {len(faults)} weights do not fit, the first of "
            f"them {faults[0]!r}; give the published file"
        )
    side = config.vision_config.image_size
    made: Any = AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False)
    model.save_pretrained(folder, state_dict=dict(weights))
    made.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side}).save_pretrained(
        folder
    )
