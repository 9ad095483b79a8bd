"""NVIDIA's Cosmos tokenizer DV8x16x16 (arXiv 2501.03575, section 4) on one frame: wavelets, convolutions, FSQ.

The published network is one for video, causal in time. Of a single frame, what stands before it is a copy of itself: a
convolution over time is the sum of its taps, attention over time passes its value on, and the wavelets' differences
over time are zero. So it is a network over the plane here, and `flattened` makes its weights of the published ones:
the same function but for rounding, in a third of the work.

Shapes: B images, C channels, H x W pixels, N = H/16 * W/16 codes.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rlmm.codecs.quantizers import Fsq
from rlmm.config.codec import FsqCodec

PATCH, FACTOR = 4, 16
"""Pixels a side of the wavelets' patch, and of what a code stands for."""
LEVELS = (8, 8, 8, 5, 5, 5)
"""Of the quantizer: 64,000 codes."""
WAVELETS, VIDEO_WAVELETS = 3 * 4**2, 3 * 8**2
"""Channels of a patch: two rounds, of which each makes four of one, or eight of one in a video."""


class CosmosNetwork(nn.Module):
    """Encoder, quantizer and decoder. `config`: what `cosmos_config` reads off the weights."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        latent, codes = config["z_channels"], len(LEVELS)
        self.encoder = _Encoder(config["channels"], config["widths"], config["blocks"], latent)
        self.quant_conv = nn.Conv2d(latent, codes, 1)
        self.post_quant_conv = nn.Conv2d(codes, latent, 1)
        self.decoder = _Decoder(config["widths"], config["blocks"], latent)
        self.quantizer = Fsq(FsqCodec(image_size=(FACTOR, FACTOR), levels=LEVELS))

    def encode(self, pixels_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Codes [B, N] and the latents before quantization."""
        latents_BND = self.quant_conv(self.encoder(pixels_BCHW)).flatten(2).transpose(1, 2)
        return self.quantizer(latents_BND)[1], latents_BND

    def decode(self, codes_BRC: Tensor) -> Tensor:
        """Pixels of codes [B, rows, cols]."""
        return self.decoder(self.post_quant_conv(self.quantizer.codes(codes_BRC).movedim(-1, 1)))


def haar(pixels_BCHW: Tensor) -> Tensor:
    """Two rounds of the Haar transform [B, 16 C, H/4, W/4]: means, then differences along rows, columns and both."""
    x = pixels_BCHW
    for _ in range(2):
        a, b, c, d = x[..., ::2, ::2], x[..., ::2, 1::2], x[..., 1::2, ::2], x[..., 1::2, 1::2]
        x = torch.cat([a + b + c + d, a - b + c - d, a + b - c - d, a - b - c + d], 1) / 4
    return x


def inverse_haar(patches: Tensor) -> Tensor:
    """Pixels [B, C, H, W] of [B, 16 C, H/4, W/4]."""
    x = patches
    for _ in range(2):
        mean, across, down, both = x.chunk(4, 1)
        parts = (mean + across + down + both, mean - across + down - both,
                 mean + across - down - both, mean - across - down + both)  # fmt: skip
        x = F.pixel_shuffle(torch.stack(parts, 2).flatten(1, 2), 2)
    return x


def cosmos_config(published: Mapping[str, Tensor]) -> dict[str, Any]:
    """The sizes of a network, from its published weights. Raises ValueError where they are not of this build."""
    names = ("encoder.conv_in.0.conv3d.weight", "quant_conv.conv3d.weight", "decoder.conv_in.0.conv3d.weight")
    missing = [name for name in names if name not in published]
    if missing:
        raise ValueError(
            f"there is no {missing[0]!r} among the {len(published)} tensors: these are no weights of Cosmos' tokenizer "
            "DV8x16x16; give its autoencoder.jit, or the folder that holds its encoder.jit and decoder.jit"
        )
    first = re.compile(r"encoder\.down\.(\d)\.block\.0\.conv2\.0\.conv3d\.weight")
    widths = {int(found[1]): len(tensor) for name, tensor in published.items() if (found := first.fullmatch(name))}
    if sorted(widths) != [0, 1, 2]:
        raise ValueError(f"an encoder of {len(widths)} resolutions; Cosmos' DV8x16x16 has three")
    return {
        "channels": len(published[names[0]]),
        "widths": [widths[level] for level in range(3)],
        "blocks": sum(bool(re.fullmatch(r"encoder\.down\.0\.block\.\d+\.norm1\.norm\.weight", n)) for n in published),
        "z_channels": published[names[1]].shape[1],
    }


def flattened(published: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of `CosmosNetwork` of those of the network for video, which may hold more."""
    made = {}
    for name, tensor in published.items():
        flat = tensor.float().sum(2) if tensor.ndim == 5 else tensor.float()
        if name == "encoder.conv_in.0.conv3d.weight":
            flat = flat.unflatten(1, (8, 8, 3))[:, :4, :4].flatten(1, 3)
        if name.startswith("decoder.conv_out.1.conv3d."):
            flat = _last_frame(flat)
        made[re.sub(r"(norm\w*)\.norm\.", r"\1.", name).replace(".conv3d.", ".")] = flat
    return made


def for_video(network: CosmosNetwork) -> dict[str, Tensor]:
    """Weights under the published names and in the published shapes, of which `flattened` makes the network's own."""
    made = {}
    for name, weight in network.state_dict().items():
        path, last = name.rsplit(".", 1)
        module = network.get_submodule(path)
        if last == "weight" and isinstance(module, nn.Conv2d):
            weight = F.pad(weight.unsqueeze(2), (0, 0, 0, 0, 2 * isinstance(module, _Time), 0))
        if name == "encoder.conv_in.0.weight":
            weight = _among_wavelets(weight.transpose(0, 1)).transpose(0, 1)
        if name.startswith("decoder.conv_out.1."):
            weight = _among_wavelets(weight)
        made[f"{path}.{'conv3d' if isinstance(module, nn.Conv2d) else 'norm'}.{last}"] = weight.contiguous()
    return made


def _among_wavelets(rows: Tensor) -> Tensor:
    """The rows of a still picture's wavelets among those of a video, which are zero elsewhere."""
    made = rows.new_zeros(8, 8, 3, *rows.shape[1:])
    made[:4, :4] = rows.unflatten(0, (4, 4, 3))
    return made.flatten(0, 2)


def _last_frame(rows: Tensor) -> Tensor:
    """Of the wavelets of four frames those of the last one, which in a video of one frame is that frame."""
    for axis in (0, 1):
        low, high = rows.unflatten(0, (8, 8, 3) if not axis else (4, 8, 3)).chunk(2, axis)
        rows = (low - high).flatten(0, 2)
    return rows


class _Time(nn.Conv2d):
    """What a convolution over three frames is of one."""

    def __init__(self, width: int, out: int | None = None) -> None:
        super().__init__(width, width if out is None else out, 1)


def _pair(width: int, out: int, last: int | None = None) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(width, out, 3, padding=1), _Time(out, last))


def _norm(width: int) -> nn.GroupNorm:
    return nn.GroupNorm(1, width, eps=1e-6)


class _Block(nn.Module):
    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = _norm(width), _pair(width, out)
        self.norm2, self.conv2 = _norm(out), _pair(out, out)
        self.nin_shortcut = nn.Conv2d(width, out, 1) if width != out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.nin_shortcut(x) + self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))


class _Attention(nn.Module):
    """One head over all places."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = _norm(width)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        q, k, v = (part(normed).flatten(2).transpose(1, 2).unsqueeze(1) for part in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v).squeeze(1).transpose(1, 2).reshape(x.shape)
        return x + self.proj_out(mixed)


class _TimeAttention(nn.Module):
    """Of one frame the weights are one, whatever query and key are."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.v, self.proj_out = _norm(width), nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.proj_out(self.v(self.norm(x)))


class _Middle(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.block_1, self.block_2 = _Block(width, width), _Block(width, width)
        self.attn_1 = nn.Sequential(_Attention(width), _TimeAttention(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class _Down(nn.Module):
    """Half as high and wide; `time`: in a video half as long too."""

    def __init__(self, width: int, time: bool) -> None:
        super().__init__()
        self.conv1, self.conv3 = nn.Conv2d(width, width, 3, stride=2), nn.Conv2d(width, width, 1)
        self.conv2 = _Time(width) if time else None

    def forward(self, x: Tensor) -> Tensor:
        padded = F.pad(x, (0, 1, 0, 1))
        x = self.conv1(padded) + F.avg_pool2d(padded, 2)
        return self.conv3(x if self.conv2 is None else self.conv2(x) + x)


class _Up(nn.Module):
    """Twice as high and wide; `time`: in a video twice as long too."""

    def __init__(self, width: int, time: bool) -> None:
        super().__init__()
        self.conv1 = _Time(width) if time else None
        self.conv2, self.conv3 = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.conv1 is None else self.conv1(x) + x
        x = x.repeat_interleave(2, -1).repeat_interleave(2, -2)
        return self.conv3(self.conv2(x) + x)


class _Level(nn.Module):
    """Blocks at one resolution, and the way to the next."""

    def __init__(
        self, width: int, out: int, blocks: int, *, down: nn.Module | None = None, up: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.block = nn.Sequential(*[_Block(out if i else width, out) for i in range(blocks)])
        self.downsample, self.upsample = down, up

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(x)
        x = x if self.downsample is None else self.downsample(x)
        return x if self.upsample is None else self.upsample(x)


class _Encoder(nn.Module):
    def __init__(self, channels: int, widths: list[int], blocks: int, latent: int) -> None:
        super().__init__()
        first, second, third = widths
        self.conv_in = _pair(WAVELETS, channels)
        self.down = nn.Sequential(
            _Level(channels, first, blocks, down=_Down(first, time=True)),
            _Level(first, second, blocks, down=_Down(second, time=False)),
            _Level(second, third, blocks),
        )
        self.mid, self.norm_out, self.conv_out = _Middle(third), _norm(third), _pair(third, latent)

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        return self.conv_out(F.silu(self.norm_out(self.mid(self.down(self.conv_in(haar(pixels_BCHW)))))))


class _Decoder(nn.Module):
    def __init__(self, widths: list[int], blocks: int, latent: int) -> None:
        super().__init__()
        first, second, third = widths
        self.conv_in, self.mid = _pair(latent, third), _Middle(third)
        self.up = nn.ModuleList(
            [
                _Level(second, first, blocks + 1),
                _Level(third, second, blocks + 1, up=_Up(second, time=True)),
                _Level(third, third, blocks + 1, up=_Up(third, time=False)),
            ]
        )
        self.norm_out, self.conv_out = _norm(first), _pair(first, VIDEO_WAVELETS, WAVELETS)

    def forward(self, latents: Tensor) -> Tensor:
        x = self.mid(self.conv_in(latents))
        for level in reversed(self.up):
            x = level(x)
        return inverse_haar(self.conv_out(F.silu(self.norm_out(x))))
