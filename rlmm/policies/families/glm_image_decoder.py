"""A decoder for the tiny GLM-Image: every class of the published pipeline, at a few thousand weights."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

from transformers import ByT5Tokenizer, T5Config, T5EncoderModel


def tiny_decoder(folder: Path, codes: int) -> None:
    """Write a random pipeline whose code stands for 8x8 pixels; nothing where diffusers is not installed."""
    if find_spec("diffusers") is None:
        return
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        GlmImagePipeline,
        GlmImageTransformer2DModel,
    )

    tokenizer = ByT5Tokenizer()
    glyphs = T5Config(vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    pipeline = cast(Any, GlmImagePipeline)(
        tokenizer=tokenizer,
        processor=None,
        text_encoder=T5EncoderModel(glyphs),
        vision_language_encoder=None,
        vae=AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(16, 16), norm_num_groups=8, latent_channels=4, latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
        ),
        transformer=GlmImageTransformer2DModel(
            in_channels=4, out_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2,
            text_embed_dim=16, time_embed_dim=16, condition_dim=8, prior_vq_quantizer_codebook_size=codes,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type="linear"),
    )  # fmt: skip
    pipeline.save_pretrained(folder)
