"""ImageReward: a BLIP whose text encoder looks at the picture, and a linear stack that was trained on people's choices.

arXiv 2304.05977. Its code: zai-org/ImageReward, ImageReward/ImageReward.py. Shapes: B pairs, S tokens.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoImageProcessor, AutoTokenizer, BlipConfig, BlipTextModel, BlipVisionModel
from transformers.models.blip.modeling_blip import BlipPreTrainedModel

from rewards.base import Sample, Score
from rewards.checkpoints import load_model
from rewards.clip import loaded_pictures, matching_pairs
from rewards.gold import GoldPair
from rewards.two_towers import Precision, check_device, weights_digest

MAX_TOKENS = 35
"""Of a prompt: ImageReward.py, score()."""


class ImageRewardConfig(BlipConfig):
    """BLIP's, the widths between the linear layers of the head, and the mean and standard deviation of raw marks that
    ImageReward.py subtracts and divides by."""

    model_type = "image_reward"
    head_widths: list[int] | tuple[int, ...] = (1024, 128, 64, 16)
    score_mean: float = 0.16717362830052426
    score_std: float = 1.0333394966054072


class ImageRewardModel(BlipPreTrainedModel):
    """The network. Between its linear layers there was dropout in training, and never anything else."""

    config_class = ImageRewardConfig

    def __init__(self, config: ImageRewardConfig) -> None:
        super().__init__(config)
        text: Any = config.text_config
        vision: Any = config.vision_config
        self.vision_model = BlipVisionModel(vision)
        self.text_encoder = BlipTextModel(text, add_pooling_layer=False)
        self.mean, self.std = config.score_mean, config.score_std
        widths = [text.hidden_size, *config.head_widths, 1]
        self.head = nn.ModuleList(nn.Linear(*pair) for pair in zip(widths, widths[1:], strict=False))
        self.post_init()

    def forward(self, input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor) -> Tensor:
        """Marks, float32 [B], of prompts [B, S] and pictures [B, 3, side, side]: about 0 in the mean and 1 wide."""
        seen = self.vision_model(pixel_values=pixel_values).last_hidden_state
        read = self.text_encoder(input_ids=input_ids, attention_mask=attention_mask, encoder_hidden_states=seen)
        mark = read.last_hidden_state[:, 0].float()
        for linear in self.head:
            weight, bias = linear.parameters()
            mark = nn.functional.linear(mark, weight.float(), bias.float())
        return (mark[:, 0] - self.mean) / self.std


class ImageReward:
    """The mark of picture and prompt, averaged over the sample's images. `model`: a folder or hub id that `rlmm reward
    convert image_reward` wrote, with tokenizer and image processor.

    Part `cut`: 1 where the prompt has more than 35 tokens, so that its end does not count. An empty prompt is
    unavailable; an image that does not decode is invalid output. Raises what transformers raises for a model that
    cannot be had, ValueError for one of another kind.
    """

    name = "image_reward"

    def __init__(
        self, model: str, *, device: str = "cpu", precision: Precision = "float32", batch_size: int = 16
    ) -> None:
        check_device(device, precision)
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        config: Any = ImageRewardConfig.get_config_dict(model)[0]
        if config.get("model_type") != ImageRewardConfig.model_type:
            raise ValueError(
                f"{model} holds a model of type {config.get('model_type')!r}, and none that `rlmm reward convert "
                "image_reward` wrote; the published ImageReward.pt is converted once"
            )
        loaded: Any = load_model(ImageRewardModel, model, dtype=getattr(torch, precision))
        self.batch_size, self.device = batch_size, torch.device(device)
        self._model = loaded.eval().requires_grad_(False).to(self.device)
        self._tokenizer: Any = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
        self._pixels: Any = AutoImageProcessor.from_pretrained(model, backend="pil", trust_remote_code=False)
        scale = f"{loaded.mean} {loaded.std}"
        pixels = hashlib.sha256(self._pixels.to_json_string().encode()).hexdigest()[:16]
        self._fingerprint = f"image_reward/1 {weights_digest(loaded)} {precision} {scale} pixels={pixels}"

    def fingerprint(self) -> str:
        """A hash of the weights, precision, scale, and how pictures are prepared."""
        return self._fingerprint

    def score(self, samples: Sequence[Sample]) -> list[Score]:
        """One Score a sample, in order."""
        loaded = [loaded_pictures(sample) for sample in samples]
        shown = zip(samples, loaded, strict=True)
        pairs = [(sample.prompt, image) for sample, item in shown if isinstance(item, list) for image in item]
        marks = iter(self._marks(pairs))
        scores: list[Score] = []
        for sample, item in zip(samples, loaded, strict=True):
            if isinstance(item, Score):
                scores.append(item)
                continue
            cut = len(self._tokenizer(sample.prompt, truncation=False).input_ids) > MAX_TOKENS
            scores.append(Score.ok(sum(next(marks) for _ in item) / len(item), cut=float(cut)))
        return scores

    def gold(self) -> Sequence[GoldPair]:
        """A red disc and a blue square, each against the other's prompt."""
        return matching_pairs()

    @torch.inference_mode()
    def _marks(self, pairs: Sequence[tuple[str, Image.Image]]) -> list[float]:
        marks: list[float] = []
        for start in range(0, len(pairs), self.batch_size):
            prompts, images = zip(*pairs[start : start + self.batch_size], strict=True)
            text = self._tokenizer(
                list(prompts), padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
            ).to(self.device)
            pixels = self._pixels(images=list(images), return_tensors="pt")["pixel_values"]
            given = pixels.to(self.device, self._model.dtype)
            marks += self._model(text.input_ids, text.attention_mask, given).tolist()
        return marks
