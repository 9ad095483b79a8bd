"""A codec: pixels to codes and codes to pixels. One token a patch, row-major.

Shapes: B images, C channels, H x W pixels, N tokens: rows * cols, and before them a preview's where there is one; M
hidden states of width D.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from rlmm.codecs.quantizers import Fsq, Lfq, Quantizer, Vq
from rlmm.config.codec import FsqCodec, LfqCodec, StoredCodec, VqCodec

PIXELS_AT_ONCE = 1 << 19
"""Of the images that are encoded or decoded at a time: a published decoder holds hundreds or thousands of floats a
pixel, Emu3's 20 GiB for one image of 720 x 720."""
QUANTIZERS = {"fsq": Fsq, "vq": Vq, "lfq": Lfq}


@dataclass(frozen=True)
class CodecOutput:
    """reconstruction [B,C,H,W] float32 (not clamped), ids [B,N] int64, auxiliary: the quantizer's own loss."""

    reconstruction: Tensor
    ids: Tensor
    auxiliary: Tensor


class _Block(nn.Module):
    """A residual block; group norm, so that an image's result does not depend on its batch."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.GroupNorm(width // 8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1),
            nn.GroupNorm(width // 8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class _PatchBlock(nn.Module):
    """A residual block that sees one patch alone: norm over the channels, no convolution over patches."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x.movedim(1, -1)).movedim(-1, 1)


class Codec(nn.Module, ABC):
    """What every codec is: its settings, and both ways between pixels and codes."""

    reads_hidden = False
    """Whether pixels are drawn of what the policy's last layer holds at the codes, and not of the codes alone."""

    loads_decoder = False
    """Whether a model of its own is loaded with the first picture that is drawn."""

    def __init__(self, settings: StoredCodec) -> None:
        super().__init__()
        self.settings = settings
        self.grid, self.tokens, self.num_codes = settings.grid, settings.tokens, settings.num_codes
        self.image_size, self.channels = settings.image_size, settings.channels

    @property
    def at_once(self) -> int:
        """Images that are encoded or decoded at a time."""
        return max(1, PIXELS_AT_ONCE // (self.image_size[0] * self.image_size[1]))

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def encode(self, images_BCHW: Tensor) -> Tensor:
        """Codes [B, N] int64 of images in [0, 1]; ValueError on another size, or where NaN or infinity turns up."""
        self._check(images_BCHW)
        return torch.cat([self._checked(part_BCHW) for part_BCHW in images_BCHW.split(self.at_once)])

    def _checked(self, images_BCHW: Tensor) -> Tensor:
        codes_BN, latents = self.codes(images_BCHW)
        if not latents.isfinite().all():
            whose = "the images" if not images_BCHW.isfinite().all() else "the weights: the codec's training diverged"
            raise ValueError(f"no codes: NaN or infinity in {whose}")
        return codes_BN

    def codes(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Codes of images that are made of them all at once, and the latents that they were made of, unchecked."""
        return self._encoded(images_BCHW.to(self.device))

    def decode(self, ids_BN: Tensor, hidden_BMD: Tensor | None = None) -> Tensor:
        """Images [B, C, H, W] float32 in [0, 1]; ValueError on codes outside [0, num_codes) or another count.
        `hidden_BMD`: `CausalPolicy.image_hidden`, for a codec that reads it."""
        if self.reads_hidden and hidden_BMD is None:
            raise ValueError(
                "this codec draws what the policy's last layer holds at the codes: it needs the policy too"
            )
        if ids_BN.shape[-1] != self.tokens:
            grid = f"grid is {self.grid[0]}x{self.grid[1]}, {self.tokens} codes"
            raise ValueError(f"{ids_BN.shape[-1]} codes an image; this codec's {grid}")
        if ids_BN.numel() and (int(ids_BN.min()) < 0 or int(ids_BN.max()) >= self.num_codes):
            raise ValueError(
                f"codes from {int(ids_BN.min())} to {int(ids_BN.max())} are outside [0, {self.num_codes}): they are no "
                "image codes of this codec; check the layout's image slice"
            )
        return self.draw(ids_BN, hidden_BMD)

    def draw(self, ids_BN: Tensor, hidden_BMD: Tensor | None = None) -> Tensor:
        """As `decode`, of codes that are known to be the codec's."""
        parts = ids_BN.split(self.at_once)
        hidden: Sequence[Tensor | None] = [None] * len(parts) if hidden_BMD is None else hidden_BMD.split(self.at_once)
        return torch.cat([self._pictures(*part) for part in zip(parts, hidden, strict=True)])

    def _pictures(self, ids_BN: Tensor, hidden_BMD: Tensor | None) -> Tensor:
        hidden = None if hidden_BMD is None else hidden_BMD.to(self.device)
        return self._drawn(ids_BN.to(self.device), hidden).clamp(0, 1).float()

    @abstractmethod
    def _encoded(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Codes [B, N] of images in [0, 1], and the latents that they were made of."""

    @abstractmethod
    def _drawn(self, ids_BN: Tensor, hidden_BMD: Tensor | None) -> Tensor:
        """Images [B, C, H, W] of codes, in [0, 1] but for overshoot."""

    def _check(self, images: Tensor) -> None:
        expected = (self.channels, *self.image_size)
        if tuple(images.shape[1:]) != expected:
            raise ValueError(f"images of shape {tuple(images.shape[1:])}; this codec takes (C, H, W) = {expected}")


class PatchCodec(Codec):
    """Patchify convolution, residual blocks, quantizer, residual blocks, un-patchify."""

    def __init__(self, config: FsqCodec | VqCodec | LfqCodec) -> None:
        super().__init__(config)
        self.edge_weight = config.edge_weight
        self.quantizer: Quantizer = QUANTIZERS[config.kind](config)  # pyrefly: ignore
        self.width = width = config.width
        latent = self.quantizer.latent_dim
        encoder_block = _Block if config.context == "both" else _PatchBlock
        decoder_block, reach = (_PatchBlock, 0) if config.context == "none" else (_Block, 1)
        self.encoder = nn.Sequential(
            nn.Conv2d(config.channels, width, config.patch, stride=config.patch),
            *[encoder_block(width) for _ in range(config.blocks)],
            nn.Conv2d(width, latent, 1),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(latent, width, 2 * reach + 1, padding=reach),
            *[decoder_block(width) for _ in range(config.blocks)],
            nn.ConvTranspose2d(width, config.channels, config.patch, stride=config.patch),
        )

    @property
    def config(self) -> PreTrainedConfig:
        """As a transformers model has one: by its width, settings of DeepSpeed that say `auto` are set."""
        return PreTrainedConfig.from_dict({"hidden_size": self.width})

    def forward(self, images_BCHW: Tensor) -> CodecOutput:
        self._check(images_BCHW)
        quantized, ids, auxiliary = self.quantizer(self._latents(images_BCHW))
        return CodecOutput(self._pixels(quantized).float(), ids, auxiliary)

    def _latents(self, images_BCHW: Tensor) -> Tensor:
        return self.encoder(images_BCHW * 2 - 1).float().flatten(2).transpose(1, 2)

    def _encoded(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        latents_BND = self._latents(images_BCHW)
        return self.quantizer(latents_BND)[1], latents_BND

    def _drawn(self, ids_BN: Tensor, hidden_BMD: Tensor | None) -> Tensor:
        return self._pixels(self.quantizer.codes(ids_BN))

    def _pixels(self, latents_BND: Tensor) -> Tensor:
        square = latents_BND.transpose(1, 2).unflatten(2, self.grid)
        return (self.decoder(square) + 1) / 2


def build_codec(config: FsqCodec | VqCodec | LfqCodec) -> PatchCodec:
    """A codec with fresh weights, drawn from torch's present generator."""
    return PatchCodec(config)
