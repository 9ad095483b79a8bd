"""VQGAN-like image tokenizers whose classes transformers lacks, of its own blocks: MAGVIT-v2 with lookup-free
quantization (Yu et al. 2023, arXiv 2310.05737) as Show-o and MMaDA use it, and aMUSEd's VQ-GAN (Patil et al. 2024,
arXiv 2401.01808) as Lumina-DiMOO uses it, with diffusers' names translated.

Names of weights are those of Show-o's MAGVITv2. Shapes: B images, C channels, H x W pixels or codes, N = H * W codes.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import JanusVQVAEConfig
from transformers.models.janus.modeling_janus import (
    JanusVQVAEAttnBlock,
    JanusVQVAEConvDownsample,
    JanusVQVAEConvUpsample,
    JanusVQVAEResnetBlock,
)

MAGVITV2: Mapping[str, Any] = {
    "channels": 128, "latent": 13,
    "encoder_multipliers": [1, 2, 2, 4, 4], "encoder_blocks": [4, 3, 4, 3, 4],
    "decoder_multipliers": [1, 1, 2, 2, 4], "decoder_blocks": [4, 4, 3, 4, 3],
}  # fmt: skip
"""Of showlab/magvitv2, whose config.json says nothing: they are defaults of the published class."""


class _Level(nn.Module):
    """Residual blocks at one resolution, and the way to the next."""

    def __init__(self, widths: Sequence[int], **resample: nn.Module) -> None:
        super().__init__()
        pairs = zip(widths, widths[1:], strict=False)
        self.block = nn.ModuleList([_residual(before, after) for before, after in pairs])
        for name, module in resample.items():
            self.add_module(name, module)
        self.resample = next(iter(resample), None)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        return x if self.resample is None else self.get_submodule(self.resample)(x)


class _Middle(nn.Module):
    """Two residual blocks, with attention over all places between them where the tokenizer has it."""

    def __init__(self, width: int, attention: bool) -> None:
        super().__init__()
        self.block_1, self.block_2 = _residual(width, width), _residual(width, width)
        self.attn_1 = JanusVQVAEAttnBlock(width) if attention else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class _Encoder(nn.Module):
    def __init__(self, channels: int, multipliers: Sequence[int], blocks: Sequence[int], latent: int, attention: bool):
        super().__init__()
        widths, last = [channels * multiplier for multiplier in multipliers], len(multipliers) - 1
        self.conv_in = nn.Conv2d(3, channels, 3, padding=1)
        self.down = nn.ModuleList(
            _Level([before, *[width] * count], **({} if i == last else {"downsample": JanusVQVAEConvDownsample(width)}))
            for i, (before, width, count) in enumerate(zip([channels, *widths], widths, blocks, strict=False))
        )
        self.mid = _Middle(widths[-1], attention)
        self.norm_out = nn.GroupNorm(32, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], latent, 3, padding=1)
        self.quant_conv = nn.Conv2d(latent, latent, 1)

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        x = self.conv_in(pixels_BCHW)
        for level in self.down:
            x = level(x)
        return self.quant_conv(self.conv_out(F.silu(self.norm_out(self.mid(x)))))


class _Decoder(nn.Module):
    def __init__(self, channels: int, multipliers: Sequence[int], blocks: Sequence[int], latent: int, attention: bool):
        super().__init__()
        widths = [channels * multiplier for multiplier in multipliers]
        self.post_quant_conv = nn.Conv2d(latent, latent, 1)
        self.conv_in = nn.Conv2d(latent, widths[-1], 3, padding=1)
        self.mid = _Middle(widths[-1], attention)
        self.up = nn.ModuleList(  # up.0 is the widest picture, which comes last
            _Level([before, *[width] * count], **({} if i == 0 else {"upsample": JanusVQVAEConvUpsample(width)}))
            for i, (before, width, count) in enumerate(zip([*widths[1:], widths[-1]], widths, blocks, strict=True))
        )
        self.norm_out = nn.GroupNorm(32, widths[0], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, latents_BCHW: Tensor) -> Tensor:
        x = self.mid(self.conv_in(self.post_quant_conv(latents_BCHW)))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class _Signs(nn.Module):
    """Lookup-free: a code is the signs of its channels, the first one the highest bit."""

    def __init__(self, latent: int) -> None:
        super().__init__()
        self.place_C: Tensor
        self.register_buffer("place_C", 2 ** torch.arange(latent - 1, -1, -1), persistent=False)

    def codes(self, latents_BCHW: Tensor) -> Tensor:
        """[B, N] int64."""
        return ((latents_BCHW > 0) * self.place_C[:, None, None]).sum(1).flatten(1)

    def latents(self, codes_BHW: Tensor) -> Tensor:
        """[B, C, H, W], each 1 or -1."""
        bits_BCHW = (codes_BHW.unsqueeze(1) // self.place_C[:, None, None]) % 2
        return bits_BCHW.to(torch.get_default_dtype()) * 2 - 1


class _Book(nn.Module):
    """A code is the nearest of the book's vectors."""

    def __init__(self, codes: int, latent: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(codes, latent)

    def codes(self, latents_BCHW: Tensor) -> Tensor:
        """[B, N] int64."""
        flat_BNC = latents_BCHW.flatten(2).transpose(1, 2)
        return torch.cdist(flat_BNC, self.embedding.weight.expand(len(flat_BNC), -1, -1)).argmin(-1)

    def latents(self, codes_BHW: Tensor) -> Tensor:
        """[B, C, H, W]."""
        return self.embedding(codes_BHW).movedim(-1, 1)


class VqganNetwork(nn.Module):
    """See the module. `config`: as `MAGVITV2`; with `codes` in it, codes are a book's, and without it signs."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        channels, latent, attention = config["channels"], config["latent"], config.get("attention", True)
        self.encoder = _Encoder(channels, config["encoder_multipliers"], config["encoder_blocks"], latent, attention)
        self.decoder = _Decoder(channels, config["decoder_multipliers"], config["decoder_blocks"], latent, attention)
        self.quantize: _Signs | _Book = _Book(config["codes"], latent) if "codes" in config else _Signs(latent)

    def encode(self, pixels_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        latents_BCHW = self.encoder(pixels_BCHW)
        return self.quantize.codes(latents_BCHW), latents_BCHW

    def decode(self, codes_BRC: Tensor) -> Tensor:
        return self.decoder(self.quantize.latents(codes_BRC))


def _residual(before: int, after: int) -> nn.Module:
    return JanusVQVAEResnetBlock(JanusVQVAEConfig(dropout=0.0), before, after)
