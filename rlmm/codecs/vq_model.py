"""aMUSEd's image tokenizer as diffusers keeps it, its class VQModel: settings, and names of weights, in terms of
`rlmm.codecs.vqgan`."""

import re
from collections.abc import Mapping
from typing import Any

BUILD: dict[str, Any] = {"vq_embed_dim": None, "norm_type": "group", "norm_num_groups": 32, "act_fn": "silu",
         "lookup_from_codebook": True, "mid_block_add_attention": False}  # fmt: skip
"""Of the settings of VQModel, what aMUSEd's are and the network here is built for."""
DEFAULTS: dict[str, Any] = BUILD | {"lookup_from_codebook": False, "mid_block_add_attention": True}
"""What diffusers takes where config.json says nothing."""
BLOCKS = {"DownEncoderBlock2D", "UpDecoderBlock2D"}
RENAMED = (
    (r"^(?:en|de)coder\.((?:post_)?quant_conv)", r"\1"),
    (r"\.down\.(\d+)\.block\.", r".down_blocks.\1.resnets."),
    (r"\.down\.(\d+)\.downsample\.", r".down_blocks.\1.downsamplers.0."),
    (r"(up_blocks\.\d+)\.block\.", r"\1.resnets."),
    (r"(up_blocks\.\d+)\.upsample\.", r"\1.upsamplers.0."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"\.norm_out\.", ".conv_norm_out."),
)


def vq_model_config(found: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The network of a VQModel, from its config.json. Raises ValueError where it is of another build."""
    stated = DEFAULTS | dict(found)
    channels, layers = list(stated["block_out_channels"]), stated["layers_per_block"]
    wrong = [f"{name}: {stated[name]!r}" for name, value in BUILD.items() if stated[name] != value]
    kinds = {*stated["down_block_types"], *stated["up_block_types"]} - BLOCKS
    wrong += [f"a block {kind}" for kind in sorted(kinds)] + [f"{c} channels" for c in channels if c % channels[0]]
    if wrong:
        raise ValueError(
            f"the image tokenizer of {source} has {wrong[0]}, and aMUSEd's, which alone can be read, has not; use "
            "diffusers' class to turn its images into codes"
        )
    multipliers = [count // channels[0] for count in channels]
    return {
        "channels": channels[0], "latent": stated["latent_channels"], "codes": stated["num_vq_embeddings"],
        "encoder_multipliers": multipliers, "encoder_blocks": [layers] * len(channels),
        "decoder_multipliers": multipliers, "decoder_blocks": [layers + 1] * len(channels), "attention": False,
    }  # fmt: skip


def vq_model_name(name: str, levels: int) -> str:
    """What VQModel calls a weight of `VqganNetwork`. It counts the decoder's levels from the smallest picture."""
    name = re.sub(r"\.up\.(\d+)\.", lambda match: f".up_blocks.{levels - 1 - int(match[1])}.", name)
    for ours, theirs in RENAMED:
        name = re.sub(ours, theirs, name)
    return name
