"""The perceptual loss: two images are near where a frozen vision network's features of them are.

Shapes: B images, C channels, H x W pixels, h x w or N positions of D features.
"""

from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, PreTrainedModel
from transformers.models.auto.image_processing_auto import get_image_processor_config

from rewards.checkpoints import load_model
from rlmm.config.codec import Perceptual

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

TINY_SQUARE = 1e-8
"""Added to a feature vector's squared length, so that the gradient stays finite where all its features are zero."""


class PerceptualLoss(nn.Module):
    """Squared distance of unit feature vectors, as a mean over positions and layers: 0 (equal) to 4.

    Eq. 1 of Zhang et al. 2018 (arXiv 1801.03924) with unit weights and the mean of the layers for their sum; the idea
    is that of Johnson et al. 2016 (arXiv 1603.08155). The network is frozen and stays in evaluation mode.
    """

    mean_C11: Tensor
    std_C11: Tensor

    def __init__(self, settings: Perceptual) -> None:
        super().__init__()
        self.settings = settings
        self.network, processor = _load(settings.model)
        self.image_size = _fixed_size(self.network)
        for name, default in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)):
            value = torch.tensor(processor.get(f"image_{name}") or default, dtype=torch.float32).reshape(-1, 1, 1)
            self.register_buffer(f"{name}_C11", value)
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "PerceptualLoss":
        """Stays in evaluation mode: batch statistics and dropout would make the distance depend on the batch."""
        return super().train(False)

    def forward(self, reconstruction_BCHW: Tensor, images_BCHW: Tensor) -> Tensor:
        """The distance [] of two batches of images in [0, 1], grey or RGB; the gradient goes to the first alone."""
        with torch.no_grad():
            wanted = self._features(images_BCHW)
        found = self._features(reconstruction_BCHW)
        layers = [(a - b).square().sum(-1).mean() for a, b in zip(found, wanted, strict=True)]
        return torch.stack(layers).mean()

    def _features(self, images_BCHW: Tensor) -> list[Tensor]:
        """Unit vectors [B, N, D] of each chosen layer."""
        pixels = images_BCHW.expand(-1, 3, -1, -1)
        if self.image_size is not None:
            pixels = F.interpolate(pixels, self.image_size, mode="bilinear", antialias=True)
        pixels = (pixels - self.mean_C11) / self.std_C11
        states = self.network(pixel_values=pixels, output_hidden_states=True).hidden_states
        return [_unit_vectors(state) for state in self._chosen(states)]

    def _chosen(self, states: tuple[Tensor, ...] | None) -> list[Tensor]:
        if states is None:
            raise ValueError(f"perceptual.model {self.settings.model!r} gives no hidden_states; choose another model")
        layers = self.settings.layers
        wrong = [index for index in layers or () if not -len(states) <= index < len(states)]
        if wrong:
            raise ValueError(
                f"perceptual.layers names {wrong}, and {self.settings.model!r} has {len(states)} hidden_states; "
                f"choose from 0 to {len(states) - 1}"
            )
        return [states[index] for index in layers] if layers is not None else list(states)


def _load(name: str) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The vision network in float32, and its image processor's settings ({} where it has none).

    Raises ValueError naming the model where it cannot be read or takes no images.
    """
    try:
        # Weights that a checkpoint lacks (a pooler) are drawn: not from the run's generator, and always the same.
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = load_model(AutoModel, name, dtype=torch.float32)
        processor = get_image_processor_config(name)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(
            f"perceptual.model {name!r} cannot be read ({error}); give a folder or a hub id of a transformers model"
        ) from error
    network = getattr(model, "vision_model", model)  # of CLIP's two towers, the one for images
    if network.main_input_name != "pixel_values":
        raise ValueError(
            f"perceptual.model {name!r} takes {network.main_input_name}, not images; give a vision model, "
            "e.g. a ResNet, a ConvNeXt, a CLIP vision tower or a DINOv2"
        )
    return cast(PreTrainedModel, network), processor


def _fixed_size(network: PreTrainedModel) -> tuple[int, int] | None:
    """(height, width) that a network with learned position embeddings takes; None where any size will do."""
    if not any("position_embedding" in name for name, _ in network.named_parameters()):
        return None
    size = network.config.image_size
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _unit_vectors(features: Tensor) -> Tensor:
    """Features [B, D, h, w] or [B, N, D] as vectors [B, N, D] float32 of length 1; all-zero ones stay zero."""
    vectors_BND = (features.flatten(2).transpose(1, 2) if features.ndim == 4 else features).float()
    return vectors_BND * (vectors_BND.square().sum(-1, keepdim=True) + TINY_SQUARE).rsqrt()
