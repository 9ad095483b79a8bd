"""The image tokenizers of published checkpoints, transformers' own classes where it has them, behind one pair of
methods.

Shapes: B images, C channels, H x W pixels, N = rows * cols tokens.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import ChameleonVQVAE, ChameleonVQVAEConfig, Emu3VQVAE, Emu3VQVAEConfig, JanusVQVAE, JanusVQVAEConfig
from transformers.models.janus.modeling_janus import JanusVQVAEDecoder

from rlmm.codecs.base import Codec
from rlmm.codecs.blip3o import Blip3oNetwork
from rlmm.codecs.cosmos import CosmosNetwork
from rlmm.codecs.glm_image import GlmImageNetwork
from rlmm.codecs.vqgan import VqganNetwork
from rlmm.config.base import nearest
from rlmm.config.codec import PretrainedCodec


class Emu3Network(nn.Module):
    """Emu3's video tokenizer, one frame at a time (Wang et al. 2024, arXiv 2409.18869)."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.vq = Emu3VQVAE(Emu3VQVAEConfig(**config))

    def encode(self, pixels_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Codes [B, N] and the latents before quantization."""
        sizes = [pixels_BCHW.shape[-2:]] * len(pixels_BCHW)
        # Numbers in place of a tensor of them, which could not be asked for any without values (`rlmm.planned_codec`).
        output = self.vq.encode(pixels_BCHW, cast(Tensor, sizes), return_dict=True)
        return torch.stack(output.image_tokens).flatten(1), output.last_hidden_state

    def decode(self, codes_BRC: Tensor) -> Tensor:
        """Pixels of codes [B, rows, cols]."""
        return self.vq.decode(codes_BRC)


class JanusNetwork(nn.Module):
    """Janus' generation tokenizer, LlamaGen's VQ-16 (Chen et al. 2025, arXiv 2501.17811)."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.vq = JanusVQVAE(JanusVQVAEConfig(**config))

    def encode(self, pixels_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        output = self.vq.encode(pixels_BCHW, return_dict=True)
        return output.image_tokens.view(len(pixels_BCHW), -1), output.last_hidden_state

    def decode(self, codes_BRC: Tensor) -> Tensor:
        return self.vq.decode(cast(torch.LongTensor, codes_BRC.flatten(1)))


class ChameleonNetwork(nn.Module):
    """Chameleon's tokenizer (arXiv 2405.09818). transformers has its encoder; the decoder is of the same build as
    Janus'. `order` leads from a policy's code to the codebook's: the checkpoint's vocabulary lists them in its own."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.vq = ChameleonVQVAE(ChameleonVQVAEConfig(**config))
        shapes = ("base_channels", "channel_multiplier", "num_res_blocks", "latent_channels", "dropout")
        own = self.vq.config
        like = {key: getattr(own, key) for key in shapes}
        self.decoder = JanusVQVAEDecoder(JanusVQVAEConfig(**like, out_channels=own.in_channels))
        if not own.attn_resolutions:
            for level in cast(Any, self.decoder).up:
                level.attn = nn.ModuleList()
        self.order: Tensor
        self.register_buffer("order", torch.arange(own.num_embeddings))

    def encode(self, pixels_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        output = self.vq.encode(pixels_BCHW, return_dict=True)
        place = torch.empty_like(self.order)
        place[self.order] = torch.arange(len(self.order), device=place.device)
        return place[output.image_tokens.view(len(pixels_BCHW), -1)], output.last_hidden_state

    def decode(self, codes_BRC: Tensor) -> Tensor:
        latents_BRCD = self.vq.quantize.embedding(self.order[codes_BRC])
        return self.decoder(self.vq.post_quant_conv(latents_BRCD.movedim(-1, 1)))


NETWORKS: dict[str, Callable[[dict[str, Any]], nn.Module]] = {
    "emu3": Emu3Network,
    "janus": JanusNetwork,
    "chameleon": ChameleonNetwork,
    "glm_image": GlmImageNetwork,
    "vqgan": VqganNetwork,
    "cosmos": CosmosNetwork,
    "blip3o": Blip3oNetwork,
}
"""Name in codec.json -> class with `encode` and `decode` of pixels that are shifted and scaled already; `decode` takes
codes or, where the class `reads_hidden`, the policy's hidden states."""


class NetworkCodec(Codec):
    """A published tokenizer as a codec."""

    def __init__(self, settings: PretrainedCodec) -> None:
        super().__init__(settings)
        if settings.network not in NETWORKS:
            near = nearest(settings.network, list(NETWORKS))
            raise ValueError(f"codec network {settings.network!r} is unknown.{near}")
        self.network: Any = NETWORKS[settings.network](settings.config)
        self.reads_hidden = getattr(self.network, "reads_hidden", False)
        self.loads_decoder = getattr(self.network, "loads_decoder", False)
        self.mean_C11: Tensor
        self.std_C11: Tensor
        self.register_buffer("mean_C11", torch.tensor(settings.mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std_C11", torch.tensor(settings.std).view(-1, 1, 1), persistent=False)
        self.requires_grad_(False)

    def _encoded(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        return self.network.encode((images_BCHW - self.mean_C11) / self.std_C11)

    def _drawn(self, ids_BN: Tensor, hidden_BMD: Tensor | None) -> Tensor:
        own = self.grid[0] * self.grid[1]  # a preview shows the same picture
        codes_BRC = ids_BN[:, -own:].unflatten(-1, self.grid)
        pixels_BCHW = self.network.decode(hidden_BMD if self.reads_hidden else codes_BRC)
        return pixels_BCHW * self.std_C11 + self.mean_C11
