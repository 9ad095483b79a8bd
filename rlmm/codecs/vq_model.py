"""aMUSEd's image tokenizer as diffusers keeps it (its class VQModel): settings and names of weights, and those of
`rlmm.codecs.vqgan` in their place. Checked against diffusers' own class: tests/fixtures/families/vq_model.json."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor


def vq_model_config(found: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The network of a diffusers VQModel, from its config.json. Raises ValueError where it is of another build."""
    fixed = {"vq_embed_dim": None, "norm_type": "group", "norm_num_groups": 32, "act_fn": "silu",
             "lookup_from_codebook": True, "mid_block_add_attention": False}  # fmt: skip
    kinds = {kind for key in ("down_block_types", "up_block_types") for kind in found[key]}
    wrong = [name for name, value in fixed.items() if found.get(name, value) != value]
    channels = list(found["block_out_channels"])
    if wrong or kinds - {"DownEncoderBlock2D", "UpDecoderBlock2D"} or any(c % channels[0] for c in channels):
        says = f"{wrong[0]}: {found[wrong[0]]!r}" if wrong else f"blocks {sorted(kinds)} of {channels} channels"
        raise ValueError(
            f"{source}: the image tokenizer has {says}, and aMUSEd's, which can be read, has not; convert its images "
            "to codes with the code that it came with"
        )
    multipliers, layers = [c // channels[0] for c in channels], found["layers_per_block"]
    return {
        "channels": channels[0], "latent": found["latent_channels"], "codes": found["num_vq_embeddings"],
        "encoder_multipliers": multipliers, "encoder_blocks": [layers] * len(channels),
        "decoder_multipliers": multipliers, "decoder_blocks": [layers + 1] * len(channels), "attention": False,
    }  # fmt: skip


def from_vq_model(weights: Mapping[str, Tensor], levels: int) -> dict[str, Tensor]:
    """A diffusers VQModel's weights under the names here."""
    return {_renamed(name, levels): tensor for name, tensor in weights.items()}


def to_vq_model(weights: Mapping[str, Tensor], levels: int) -> dict[str, Tensor]:
    """The way back, which a tiny checkpoint in the published format needs."""
    pairs = ((name.replace("encoder.quant_conv", "quant_conv"), tensor) for name, tensor in weights.items())
    made = {}
    for name, tensor in pairs:
        name = name.replace("decoder.post_quant_conv", "post_quant_conv")
        name = re.sub(r"\bdown\.(\d+)\.block\.", r"down_blocks.\1.resnets.", name)
        name = re.sub(r"\bup\.(\d+)\.", lambda m: f"up_blocks.{levels - 1 - int(m[1])}.", name)
        name = re.sub(r"(up_blocks\.\d+)\.block\.", r"\1.resnets.", name)
        name = re.sub(r"\bdown\.(\d+)\.downsample\.", r"down_blocks.\1.downsamplers.0.", name)
        name = re.sub(r"(up_blocks\.\d+)\.upsample\.", r"\1.upsamplers.0.", name)
        name = re.sub(r"\bmid\.block_(\d)", lambda m: f"mid_block.resnets.{int(m[1]) - 1}", name)
        made[name.replace("nin_shortcut", "conv_shortcut").replace("norm_out", "conv_norm_out")] = tensor
    return made


def _renamed(name: str, levels: int) -> str:
    name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    name = re.sub(r"^(post_)?quant_conv", lambda m: f"decoder.{m[0]}" if m[1] else f"encoder.{m[0]}", name)
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    name = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", name)
    name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d+)", lambda m: f"up.{levels - 1 - int(m[1])}", name)
    return name.replace(".resnets.", ".block.").replace("upsamplers.0", "upsample")
