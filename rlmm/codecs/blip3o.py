"""BLIP3o-NEXT (arXiv 2510.15857): the codes of TA-Tok (arXiv 2506.18898), and images drawn of what the policy's last
layer holds at them, by the diffusion model SANA-1.5 (arXiv 2501.18427).

Shapes: B images, H x W pixels, N = rows * cols codes, M = 1 + N hidden states of width D.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import SiglipVisionConfig, SiglipVisionModel

from rlmm.codecs.network_files import load_network, safetensors_of

HEADS = 16
"""Of SigLIP2 so400m, which its weights do not tell."""
STEPS, GUIDANCE, SEED = 30, 2.0, 0
"""Of the diffusion in the authors' training; every image starts from the same noise."""


class Blip3oNetwork(nn.Module):
    """`config`: `encoder`, what `ta_tok_config` reads off the weights, or None; `checkpoint` and `sana`, where the
    diffusion model's weights and its release lie; or, in place of these two, `plain`, (D, pixels a side of a patch):
    a matrix from each code's hidden state to its patch.

    The diffusion model (1.6 B weights) is read when it is first needed, and is not kept with the codec.
    """

    reads_hidden = loads_decoder = True

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.config = config
        self.encoder = None if config["encoder"] is None else TaTok(**config["encoder"])
        width, patch = config["plain"] or (0, 0)
        self.plain = nn.Linear(width, 3 * patch**2) if patch else None
        self._sana: _Sana | None = None

    def encode(self, pixels_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Codes [B, N] and the latents before quantization; pixels in [-1, 1]."""
        if self.encoder is None:
            raise ValueError(
                f"{self.config['checkpoint']} has no weights of TA-Tok (vision_tower.vision_tower.*), so it can draw "
                "images and not read them: no SFT on images and no sources from it"
            )
        return self.encoder(pixels_BCHW)

    def decode(self, hidden_BMD: Tensor) -> Tensor:
        """Pixels in [-1, 1]."""
        if self.plain is not None:
            patches_BNP = self.plain(hidden_BMD[:, 1:].float()).transpose(1, 2)
            side = math.isqrt(patches_BNP.shape[-1])
            return F.pixel_shuffle(patches_BNP.unflatten(-1, (side, side)), math.isqrt(patches_BNP.shape[1] // 3))
        if self._sana is None:
            self._sana = _Sana(self.config["checkpoint"], self.config["sana"])
        return self._sana.draw(hidden_BMD)


def ta_tok_config(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """The sizes of a TA-Tok from its weights."""
    patch, layers = weights["encoder.embeddings.patch_embedding.weight"], "encoder.encoder.layers."
    codes, width = weights["bottleneck.regularizer.embedding.weight"].shape
    return {
        "hidden_size": patch.shape[0],
        "patch_size": patch.shape[-1],
        "side": math.isqrt(len(weights["encoder.embeddings.position_embedding.weight"])),
        "layers": 1 + max(int(name.removeprefix(layers).split(".")[0]) for name in weights if name.startswith(layers)),
        "intermediate_size": len(weights[layers + "0.mlp.fc1.weight"]),
        "codes": codes,
        "code_width": width,
    }


class TaTok(nn.Module):
    """Features of SigLIP2's last layer but one, each named by the nearest code (by cosine) of a projected codebook."""

    def __init__(
        self,
        hidden_size: int,
        patch_size: int,
        side: int,
        layers: int,
        intermediate_size: int,
        codes: int,
        code_width: int,
    ) -> None:
        super().__init__()
        self.size = side * patch_size
        self.encoder = SiglipVisionModel(
            SiglipVisionConfig(
                hidden_size=hidden_size, intermediate_size=intermediate_size, num_hidden_layers=layers,
                num_attention_heads=HEADS, image_size=self.size, patch_size=patch_size,
            )
        )  # fmt: skip
        self.encode_task_layer = nn.Sequential(nn.Linear(hidden_size, hidden_size), nn.Tanh())
        self.bottleneck = nn.ModuleDict(
            {
                "in_linear": nn.Linear(hidden_size, code_width),
                "regularizer": nn.ModuleDict(
                    {"embedding": nn.Embedding(codes, code_width), "embedding_proj": nn.Linear(code_width, code_width)}
                ),
            }
        )

    def forward(self, pixels_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Codes [B, N] and features [B, N, code_width]."""
        tower: Any = self.encoder
        small = F.interpolate(pixels_BCHW, (self.size, self.size), mode="bicubic", antialias=True).clamp(-1, 1)
        x = tower.embeddings(small)
        for layer in tower.encoder.layers[:-1]:
            x = layer(x, None)
        latents = self.bottleneck["in_linear"](self.encode_task_layer(x))
        book: Any = self.bottleneck["regularizer"]
        codes_CD = F.normalize(book["embedding_proj"](book["embedding"].weight), dim=-1)
        return (F.normalize(latents, dim=-1) @ codes_CD.T).argmax(-1), latents


class _Sana:
    """The diffusion model: its sizes from its release, its weights and the connector's from the checkpoint."""

    def __init__(self, checkpoint: str, release: str | None) -> None:
        if release is None:
            raise ValueError(
                "BLIP3o-NEXT's images are drawn by SANA-1.5, whose sizes and schedule are not in the checkpoint; name "
                "its release (Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers or such a folder) in policy.decoder"
            )
        try:
            from diffusers import (  # pyrefly: ignore[missing-import]
                AutoencoderDC,
                FlowMatchEulerDiscreteScheduler,
                SanaTransformer2DModel,
            )
        except ImportError as error:
            raise ImportError(
                "BLIP3o-NEXT's decoder needs diffusers, which is not installed; install the extra `diffusion`"
            ) from error
        try:
            self.transformer = cast(
                Any, SanaTransformer2DModel.from_config(_sizes(SanaTransformer2DModel, release, "transformer"))
            )
            self.vae = cast(Any, AutoencoderDC.from_config(_sizes(AutoencoderDC, release, "vae")))
            self.scheduler = cast(Any, FlowMatchEulerDiscreteScheduler.from_pretrained(release, subfolder="scheduler"))
        except (OSError, ValueError) as error:
            raise ValueError(f"policy.decoder: {release} is no readable release of SANA ({error})") from error
        load_network(self.transformer, dict(_part(checkpoint, ".sana.")), checkpoint)
        load_network(self.vae, dict(_part(checkpoint, ".sana_vae.")), checkpoint)
        self.connector = _connector(dict(_part(checkpoint, ".diffusion_connector.")), checkpoint)
        for part in (self.transformer, self.vae, self.connector):
            part.eval().requires_grad_(False)

    def draw(self, hidden_BMD: Tensor) -> Tensor:
        """Pixels [B, 3, H, W] in [-1, 1]: guided away from no hidden state at all."""
        device = hidden_BMD.device
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        for part in (self.transformer, self.vae, self.connector):
            part.to(device, dtype)
        seen = self.connector(torch.cat([torch.zeros_like(hidden_BMD), hidden_BMD]).to(dtype))
        own = self.transformer.config
        noise = torch.randn(own.in_channels, own.sample_size, own.sample_size, generator=_seeded())
        latents = noise.expand(len(hidden_BMD), -1, -1, -1).to(device)
        self.scheduler.set_timesteps(STEPS, sigmas=torch.linspace(1, 1 / STEPS, STEPS).tolist())
        for time in self.scheduler.timesteps:
            both = torch.cat([latents, latents]).to(dtype)
            times = time.expand(len(both)).to(device)
            without, with_it = (
                self.transformer(both, encoder_hidden_states=seen, timestep=times).sample.float().chunk(2)
            )
            latents = self.scheduler.step(without + GUIDANCE * (with_it - without), time, latents).prev_sample
        return self.vae.decode((latents / self.vae.config.scaling_factor).to(dtype)).sample.float()


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(SEED)


def _sizes(kind: Any, release: str, folder: str) -> dict[str, Any]:
    return kind.load_config(release, subfolder=folder)


def _part(checkpoint: str, part: str) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in safetensors_of(checkpoint, part):
        yield name.split(part, 1)[1], tensor


def _connector(weights: Mapping[str, Tensor], checkpoint: str) -> nn.Module:
    """From hidden states to what SANA attends to."""
    if "0.weight" not in weights:
        raise ValueError(f"{checkpoint} has no weights named diffusion_connector.*; is it a BLIP3o-NEXT checkpoint?")
    out, width = weights["0.weight"].shape
    layers = (nn.Linear(width, out), nn.GELU(approximate="tanh"), nn.Linear(out, out), nn.RMSNorm(out, eps=1e-5))
    made = nn.Sequential(*layers)
    load_network(made, weights, checkpoint)
    return made
