"""GLM-Image's tokenizer and diffusion decoder (zai-org, 2026): transformers' encoder, diffusers' decoder.

Shapes: B images, C channels, H x W pixels, N codes: the preview's where there is one, then rows * cols.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GlmImageVisionConfig, GlmImageVisionModel, GlmImageVQVAE, GlmImageVQVAEConfig

SEED = 0
"""Of the noise that every image is drawn from: pixels are a function of codes alone."""


class GlmImageNetwork(nn.Module):
    """An image at half its size, a code a patch. The decoder (7 B weights in the published one) is read from where
    `config["decoder"]` says when it is first needed, and is not kept with the codec.

    `config`: `vision`, `vq` (transformers' configurations), `grids` (rows and columns of the preview, then of the
    image), `mean` and `std` of its pixels, `decoder`, `steps` and `guidance_scale` of the diffusion.
    """

    loads_decoder = True

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.config = config
        self.visual = GlmImageVisionModel(GlmImageVisionConfig(**config["vision"]))
        self.vqmodel = GlmImageVQVAE(GlmImageVQVAEConfig(**config["vq"]))
        self._pipeline: Any = None

    def encode(self, pixels_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Codes [B, N] and the latents before quantization; pixels in [-1, 1]."""
        found = [self._encoded(pixels_BCHW / 2 + 0.5, rows, cols) for rows, cols in self.config["grids"]]
        return torch.cat([codes for codes, _ in found], 1), torch.cat([latents.flatten() for _, latents in found])

    def decode(self, codes_BRC: Tensor) -> Tensor:
        """Pixels [B, 3, H, W] in [-1, 1] of codes [B, rows, cols], drawn without the prompt's glyphs."""
        twice = codes_BRC.repeat_interleave(2, -1).repeat_interleave(2, -2)
        side = 2 * int(self.visual.config.patch_size)  # pyrefly: ignore
        made = self.pipeline(codes_BRC.device)(
            prompt=[""] * len(codes_BRC),
            prior_token_ids=twice.flatten(1),
            height=codes_BRC.shape[1] * side,
            width=codes_BRC.shape[2] * side,
            num_inference_steps=self.config["steps"],
            guidance_scale=self.config["guidance_scale"],
            generator=[torch.Generator().manual_seed(SEED) for _ in codes_BRC],
            output_type="pt",
        )
        return made.images.to(codes_BRC.device).float() * 2 - 1

    def pipeline(self, device: torch.device) -> Any:
        """diffusers' pipeline without its first half. In bfloat16 on a GPU, as its authors run it.

        Raises:
            ValueError: the checkpoint has no decoder, or none that can be read.
            ImportError: diffusers is not installed.
        """
        source = self.config["decoder"]
        if source is None:
            raise ValueError(
                "GLM-Image's codes are drawn by a diffusion decoder, which lies in another folder of its release; name "
                "the whole release (zai-org/GLM-Image or a folder with its model_index.json) in policy.decoder"
            )
        if self._pipeline is None:
            try:
                from diffusers import GlmImagePipeline
            except ImportError as error:
                raise ImportError(
                    "GLM-Image's decoder needs diffusers, which is not installed; install the extra `diffusion`"
                ) from error
            dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
            rest = {"vision_language_encoder": None, "processor": None}
            try:
                pipeline: Any = GlmImagePipeline.from_pretrained(source, dtype=dtype, use_safetensors=True, **rest)
            except (OSError, ValueError) as error:
                raise ValueError(f"policy.decoder: {source} is no readable GLM-Image pipeline ({error})") from error
            pipeline.set_progress_bar_config(disable=True)
            self._pipeline = pipeline
        return self._pipeline.to(device)

    def _encoded(self, pixels_BCHW: Tensor, rows: int, cols: int) -> tuple[Tensor, Tensor]:
        """Codes [B, rows * cols] and latents [B, D, rows, cols] of images in [0, 1]."""
        side = int(self.visual.config.patch_size)  # pyrefly: ignore
        small = F.interpolate(pixels_BCHW, (rows * side, cols * side), mode="bicubic", antialias=True).clamp(0, 1)
        mean, std = (small.new_tensor(self.config[name]).view(-1, 1, 1) for name in ("mean", "std"))
        patches_BPN = F.unfold((small - mean) / std, side, stride=side)
        grids = torch.tensor([[1, rows, cols]] * len(small), device=small.device)
        seen_ND = self.visual(patches_BPN.transpose(1, 2).flatten(0, 1), grid_thw=grids).last_hidden_state
        latents = seen_ND.unflatten(0, (len(small), rows, cols)).movedim(-1, 1)
        codes_N = self.vqmodel.encode(latents).image_tokens
        return codes_N.view(len(small), -1), latents
