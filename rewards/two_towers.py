"""CLIP, SigLIP and what was fine-tuned from them, through transformers: pictures and texts to unit vectors.

Shapes: B pictures or texts, D the common width.
"""

import hashlib
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from PIL import Image
from torch import Tensor

from rewards.checkpoints import load_model
from rewards.names import nearest

Precision = Literal["float32", "bfloat16", "float16"]


def check_device(device: str, precision: str) -> None:
    """Raises ValueError for a device or precision that this torch has not got."""
    if precision not in (known := get_args(Precision)):
        raise ValueError(f"precision {precision!r} is unknown. {nearest(precision, known)}")
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise ValueError(f"device {device!r} is none that torch knows, such as cpu, cuda or cuda:1") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device {device!r}: torch sees no CUDA device here; set device: cpu, or serve the reward elsewhere"
        )


def weights_digest(model: torch.nn.Module) -> str:
    """A hash of every parameter and buffer, by name: the model itself, wherever it was loaded from."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
        digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def fitted(image: Image.Image, side: int) -> Image.Image:
    """The whole picture in a black square, its longer side as long as the square's, as HPSv2 prepares it."""
    longest = max(image.size)
    width, height = (round(length * side / longest) for length in image.size)
    square = Image.new("RGB", (side, side))
    resized = image.convert("RGB").resize((max(1, width), max(1, height)), Image.Resampling.BICUBIC)
    square.paste(resized, ((side - width) // 2, (side - height) // 2))
    return square


class TwoTowers:
    """A model with a picture and a text tower. `model` is a folder or hub id with a CLIPModel, SiglipModel or
    Siglip2Model; `processor` is one with its tokenizer and image processor, the model's own by default. `whole`:
    pictures are fitted into the model's square, where the image processor alone may crop them. Raises what
    transformers raises for a model that cannot be had, and ValueError for one that has no two towers.
    """

    def __init__(
        self,
        model: str,
        *,
        processor: str = "",
        device: str = "cpu",
        precision: Precision = "float32",
        batch_size: int = 32,
        whole: bool = False,
    ) -> None:
        check_device(device, precision)
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

        loaded: Any = load_model(AutoModel, model, dtype=getattr(torch, precision))
        if not hasattr(loaded, "get_image_features") or not hasattr(loaded, "logit_scale"):
            raise ValueError(f"{model} holds a {type(loaded).__name__}, and no CLIP or SigLIP model with two towers")
        self.batch_size = batch_size
        self.device = torch.device(device)
        self._model = loaded.eval().requires_grad_(False).to(self.device)
        self._tokenizer: Any = AutoTokenizer.from_pretrained(processor or model, trust_remote_code=False)
        self._pixels: Any = AutoImageProcessor.from_pretrained(
            processor or model, backend="pil", trust_remote_code=False
        )
        config = loaded.config.text_config
        # SigLIP was trained on texts filled up to its full length, and sees the filling; CLIP masks it.
        self._filled = config.model_type.startswith("siglip")
        self.max_tokens: int = config.max_position_embeddings
        self._side: int | None = loaded.config.vision_config.image_size if whole else None
        self._fingerprint = (
            f"{type(loaded).__name__} {weights_digest(loaded)} {precision} tokens={self.max_tokens} "
            f"pixels={hashlib.sha256(self._pixels.to_json_string().encode()).hexdigest()[:16]}{' whole' * whole}"
        )

    def fingerprint(self) -> str:
        """The class, a hash of the weights, precision, and how pictures are prepared."""
        return self._fingerprint

    @property
    def scale(self) -> float:
        """exp(logit_scale): what a cosine is multiplied by."""
        return float(self._model.logit_scale.detach().float().exp())

    @property
    def bias(self) -> float:
        """SigLIP's logit_bias, 0 for a CLIP."""
        return float(self._model.logit_bias.detach().float()) if hasattr(self._model, "logit_bias") else 0.0

    def pictures(self, images: Sequence[Image.Image]) -> Tensor:
        """float32 [B, D] on the CPU, of length 1, of RGB images."""
        rows = []
        for start in range(0, len(images), self.batch_size):
            batch = images[start : start + self.batch_size]
            shown = [image if self._side is None else fitted(image, self._side) for image in batch]
            pixels = self._pixels(images=shown, return_tensors="pt")
            given = pixels.to(self.device)  # Siglip2 has a mask and shapes beside the pixels
            given["pixel_values"] = given["pixel_values"].to(self._model.dtype)
            with torch.inference_mode():
                rows.append(_unit(self._model.get_image_features(**given)))
        return torch.cat(rows)

    def texts(self, texts: Sequence[str]) -> Tensor:
        """float32 [B, D] on the CPU, of length 1. A text of more than `max_tokens` tokens is cut (`is_cut`)."""
        rows = []
        for start in range(0, len(texts), self.batch_size):
            given = self._tokenizer(
                list(texts[start : start + self.batch_size]),
                padding="max_length" if self._filled else True,
                truncation=True,
                max_length=self.max_tokens,
                return_attention_mask=not self._filled,
                return_tensors="pt",
            ).to(self.device)
            with torch.inference_mode():
                rows.append(_unit(self._model.get_text_features(**given)))
        return torch.cat(rows)

    def is_cut(self, text: str) -> bool:
        """Whether the text is longer than the text tower reads."""
        return len(self._tokenizer(text, truncation=False).input_ids) > self.max_tokens


def _unit(features: Any) -> Tensor:
    return torch.nn.functional.normalize(features.pooler_output.float(), dim=-1).cpu()
