"""HPSv2's published weights (a pickle of open_clip's ViT-H-14) as a CLIPModel of transformers.

Names and sizes: mlfoundations/open_clip, src/open_clip/model.py and transformer.py, model_configs/ViT-H-14.json.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from rewards.checkpoints import read_tensors
from rewards.conversions.folders import layers, square_side, write_folder

TEXT_HEAD, VISION_HEAD = 64, 80
"""Widths of an attention head in ViT-H-14's two towers."""
OUTER = {
    "logit_scale": "logit_scale",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final": "text_model.final_layer_norm",
    "text_projection": "text_projection.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1": "vision_model.embeddings.patch_embedding",
    "visual.ln_pre": "vision_model.pre_layrnorm",
    "visual.ln_post": "vision_model.post_layernorm",
    "visual.proj": "visual_projection.weight",
}
LAYER = {
    "ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj", "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}  # fmt: skip
BLOCK = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+?)[._](weight|bias)")


def convert(file: Path, folder: Path, tokenizer: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K") -> None:
    """Write a published file (HPS_v2_compressed.pt, HPS_v2.1_compressed.pt) as a folder for `model` of an hpsv2 term.

    `tokenizer`: folder or hub id of CLIP's tokenizer. Raises ValueError for a file that is no such checkpoint.
    """
    found = read_tensors(file)
    if "visual.conv1.weight" not in found or "text_projection" not in found:
        raise ValueError(
            f"{file} has no weights of open_clip's CLIP; give HPS_v2_compressed.pt or HPS_v2.1_compressed.pt"
        )
    weights = {name: tensor.contiguous() for name, tensor in _renamed(found)}
    write_folder(CLIPModel, _config(found, file), weights, folder, tokenizer, file)


def _config(found: Mapping[str, Tensor], file: Path) -> CLIPConfig:
    vocabulary, text = found["token_embedding.weight"].shape
    vision, _, patch, _ = found["visual.conv1.weight"].shape
    shared = {"hidden_act": "gelu", "projection_dim": found["text_projection"].shape[1]}
    return CLIPConfig(
        projection_dim=found["text_projection"].shape[1],
        text_config={
            "vocab_size": vocabulary, "hidden_size": text, "num_attention_heads": text // TEXT_HEAD,
            "intermediate_size": found["transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
            "num_hidden_layers": layers(found, "transformer.resblocks."),
            "max_position_embeddings": found["positional_embedding"].shape[0],
            # CLIP's vocabulary ends with the start and the end of a text.
            "bos_token_id": vocabulary - 2, "eos_token_id": vocabulary - 1, "pad_token_id": vocabulary - 1, **shared,
        },
        vision_config={
            "hidden_size": vision, "num_attention_heads": vision // VISION_HEAD, "patch_size": patch,
            "intermediate_size": found["visual.transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
            "num_hidden_layers": layers(found, "visual.transformer.resblocks."),
            "image_size": square_side(found["visual.positional_embedding"].shape[0], patch, file), **shared,
        },
        dtype=found["text_projection"].dtype,
    )  # fmt: skip


def _renamed(found: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in found.items():
        block = BLOCK.fullmatch(name)
        if block is None:
            outer = name if name in OUTER else name.rpartition(".")[0]
            turned = tensor.T if name in ("text_projection", "visual.proj") else tensor
            yield OUTER.get(outer, outer) + name.removeprefix(outer), turned
            continue
        tower, number, part, what = block.groups()
        place = f"{'vision' if tower else 'text'}_model.encoder.layers.{number}."
        if part == "attn.in_proj":
            for short, third in zip("qkv", tensor.chunk(3), strict=True):
                yield f"{place}self_attn.{short}_proj.{what}", third
        else:
            yield f"{place}{LAYER.get(part, part)}.{what}", tensor
