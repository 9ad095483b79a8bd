"""GLM-Image (zai-org, 2026): an autoregressive prior over semantic codes, and a diffusion decoder that draws them.

The policy is the prior. Text to image decides a small picture first (the preview), then the picture; an edit has its
source images in front and decides the picture alone. Both are of one class, so an edit's recipe names its family.
"""

import math
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from transformers import GlmImageConfig, GlmImageForConditionalGeneration, GlmImageImageProcessorPil

from rlmm.codecs import NetworkCodec
from rlmm.codecs.network_files import load_network
from rlmm.config.codec import PretrainedCodec
from rlmm.policies.causal import CausalPolicy
from rlmm.policies.families.base import Checkpoint, Family
from rlmm.policies.families.glm_image_decoder import tiny_decoder
from rlmm.policies.families.tiny import published_tokenizer
from rollouts.contract import Grid, Layout
from rollouts.grid_positions import grid_positions

CODES, VOCABULARY, HEAD_ROWS = 16384, 168064, 16512
BEGIN, END, GRID_BEGIN, GRID_END = "<|dit_token_16384|>", "<|dit_token_16385|>", "<sop>", "<eop>"
SPECIAL = {
    BEGIN: 16384, END: 16385, "<|endoftext|>": 167841, GRID_BEGIN: 167845, GRID_END: 167846, "<|image|>": 167855,
}  # fmt: skip
OWN_SIZE = (1024, 1024)
DECODER = "decoder"
"""The folder beside a model that holds its decoder, where policy.decoder names none."""
STEPS, GUIDANCE = 50, 1.5
"""Of the decoder, as published."""


class GlmImagePolicy(CausalPolicy):
    """The language model of a `GlmImageForConditionalGeneration`, whose head decides codes and the image's end."""

    frozen_parts = ("model.visual.", "model.vqmodel.")
    projections = MappingProxyType({"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj"})

    def positions(self, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """[3, B, T]: see `grid_positions`."""
        return grid_positions(self.layout.grid, self.layout.image, ids_BT, mask_BT)


def layout(checkpoint: Checkpoint) -> Layout:
    """`prompt <sop>rows cols<eop><sop>rows cols<eop><boi>`, the preview's codes, the image's, `<eoi>`."""
    step = _step(checkpoint)
    height, width = checkpoint.size(OWN_SIZE, step)
    rows, cols = height // step, width // step
    preview = preview_grid(rows, cols, step)
    bare = Layout(
        vocab_size=checkpoint.config.get_text_config().vocab_size,
        text=(checkpoint.token(BEGIN), checkpoint.config.get_text_config().vocab_size),
        image=(0, checkpoint.config.vq_config.num_embeddings),
        bos=None,
        pad=checkpoint.config.get_text_config().pad_token_id,
        boi=(*_size(checkpoint, rows, cols), *_size(checkpoint, *preview), checkpoint.token(BEGIN)),
        grid=Grid(rows, cols, ending=(checkpoint.token(END),), preview=preview),
        template=checkpoint.options.template or "{prompt}",
        decides_text=False,
        takes_sources=False,
        family=FAMILY.name,
    )
    return replace(bare, null_prompt=checkpoint.spelled(bare, checkpoint.options.null_prompt or ""))


def edit_layout(checkpoint: Checkpoint) -> Layout:
    """`<boi>` source `<eoi> prompt <sop>rows cols<eop><boi>`, the image's codes, `<eoi>`."""
    made, begin = layout(checkpoint), checkpoint.token(BEGIN)
    return replace(
        made,
        boi=(*_size(checkpoint, made.grid.rows, made.grid.cols), begin),
        grid=replace(made.grid, preview=None),
        before_source=(begin,),
        takes_sources=True,
        family=EDIT.name,
    )


def preview_grid(rows: int, cols: int, step: int) -> tuple[int, int]:
    """Of about (step / 2) ** 2 codes, 256 in the published model, of the image's proportions."""
    return int(math.sqrt(rows / cols) * (step // 2)), int(math.sqrt(cols / rows) * (step // 2))


def codec(checkpoint: Checkpoint) -> NetworkCodec:
    """The tokenizer inside of the checkpoint, and the decoder that policy.decoder names or that lies beside it."""
    grid = (edit_layout if checkpoint.options.family == EDIT.name else layout)(checkpoint).grid
    pixels = _pixels(checkpoint)
    step, vq = _step(checkpoint), checkpoint.config.vq_config
    grids = [list(one) for one in (grid.preview, (grid.rows, grid.cols)) if one is not None]
    settings = PretrainedCodec(
        network=FAMILY.name,
        config={
            "vision": checkpoint.config.vision_config.to_diff_dict(), "vq": vq.to_diff_dict(), "grids": grids,
            "mean": list(pixels.image_mean), "std": list(pixels.image_std), "decoder": _decoder(checkpoint),
            "steps": STEPS, "guidance_scale": GUIDANCE,
        },
        grid=(grid.rows, grid.cols),
        preview=grid.preview,
        image_size=(grid.rows * step, grid.cols * step),
        num_codes=vq.num_embeddings,
    )  # fmt: skip
    made = NetworkCodec(settings)
    weights = {f"{part}{n}": w for part in ("visual.", "vqmodel.") for n, w in checkpoint.weights(part)}
    load_network(made.network, weights, checkpoint.source)
    return made


def _decoder(checkpoint: Checkpoint) -> str | None:
    """A folder, whole, or a hub id."""
    named, beside = checkpoint.options.decoder, Path(checkpoint.source) / DECODER
    found = Path(named) if named is not None else beside
    return str(found.resolve()) if found.is_dir() else named


def _pixels(checkpoint: Checkpoint) -> Any:
    """How pixels are scaled: the checkpoint's preprocessor_config.json."""
    try:
        return GlmImageImageProcessorPil.from_pretrained(checkpoint.source)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{checkpoint.source} has no preprocessor_config.json ({error}); put the files of the release's processor/ "
            "beside the model"
        ) from error


def _size(checkpoint: Checkpoint, rows: int, cols: int) -> tuple[int, ...]:
    return (checkpoint.token(GRID_BEGIN), *checkpoint.text_ids(f"{rows} {cols}"), checkpoint.token(GRID_END))


def _step(checkpoint: Checkpoint) -> int:
    """Pixels of a code's side: two patches, since the encoder sees the image at half its size."""
    return 2 * checkpoint.config.vision_config.patch_size


def tiny(folder: Path, image_size: tuple[int, int]) -> None:
    """See `Family`. The published vocabulary; patches of 4 pixels, two layers of 32, and where diffusers is installed a
    decoder of one layer."""
    codes = {f"<|dit_token_{code}|>": code for code in range(CODES)}
    tokenizer = published_tokenizer(SPECIAL, codes, bos=BEGIN, eos=END, pad="<|endoftext|>", first=20000)
    config = GlmImageConfig(
        text_config={
            "vocab_size": VOCABULARY, "vision_vocab_size": HEAD_ROWS, "hidden_size": 32, "intermediate_size": 64,
            "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32,
            "max_position_embeddings": 512,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5,
                                "mrope_section": [2, 2, 4]},
        },
        vision_config={"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": 4,
                       "image_size": 64},
        vq_config={"embed_dim": 16, "latent_channels": 32, "num_embeddings": CODES},
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GlmImageForConditionalGeneration(config)
        tiny_decoder(folder / DECODER, codes=CODES)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    GlmImageImageProcessorPil(patch_size=4, merge_size=1, temporal_patch_size=1).save_pretrained(folder)


OPTIONS = frozenset({"image_size", "template", "null_prompt", "decoder"})
ARCHITECTURES = ("GlmImageForConditionalGeneration",)
FAMILY = Family(
    "glm_image", ARCHITECTURES, policy=GlmImagePolicy, layout=layout, codec=codec, tiny=tiny, settings=OPTIONS
)
EDIT = Family(
    "glm_image_edit", ARCHITECTURES, policy=GlmImagePolicy, layout=edit_layout, codec=codec, tiny=tiny, settings=OPTIONS
)
"""Of the same class, so a recipe names it: policy.family: glm_image_edit."""
