"""ImageReward's published weights (a pickle of a BLIP and a linear stack) as an ImageRewardModel.

Names and sizes: zai-org/ImageReward, ImageReward/ImageReward.py, and of the BLIP salesforce/BLIP, models/vit.py,
models/med.py and configs/med_config.json.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from rewards.checkpoints import read_tensors
from rewards.conversions.folders import layers, square_side, write_folder
from rewards.image_reward import ImageRewardConfig, ImageRewardModel

HEAD = 64
"""Width of an attention head in both towers: 16 of ViT-L's 1024, 12 of BERT's 768."""
VISION_EPS, TEXT_EPS = 1e-6, 1e-12
"""What their layer norms add to a variance."""
VISION = (
    (r"cls_token", "embeddings.class_embedding"),
    (r"pos_embed", "embeddings.position_embedding"),
    (r"patch_embed\.proj", "embeddings.patch_embedding"),
    (r"blocks\.", "encoder.layers."),
    (r"\.norm([12])\.", r".layer_norm\1."),
    (r"\.attn\.proj\.", ".self_attn.projection."),
    (r"\.attn\.", ".self_attn."),
    (r"^norm\.", "post_layernorm."),
)
UNUSED = ("blip.vision_proj.", "blip.text_proj.", "blip.text_encoder.embeddings.position_ids")
"""Of BLIP's pre-training, and a count."""


def convert(file: Path, folder: Path, tokenizer: str = "google-bert/bert-base-uncased") -> None:
    """Write the published file (ImageReward.pt) as a folder for `model` of an image_reward term.

    `tokenizer`: folder or hub id of BERT's tokenizer. Raises ValueError for a file that is no such checkpoint.
    """
    found = read_tensors(file)
    if "mlp.layers.0.weight" not in found or "blip.visual_encoder.cls_token" not in found:
        raise ValueError(f"{file} has no weights of a BLIP and a stack that marks it; give ImageReward.pt")
    write_folder(ImageRewardModel, _config(found, file), dict(_renamed(found)), folder, tokenizer, file)


def _config(found: Mapping[str, Tensor], file: Path) -> ImageRewardConfig:
    vision, _, patch, _ = found["blip.visual_encoder.patch_embed.proj.weight"].shape
    vocabulary, text = found["blip.text_encoder.embeddings.word_embeddings.weight"].shape
    return ImageRewardConfig(
        head_widths=[found[f"mlp.layers.{number}.weight"].shape[0] for number in _linear(found)[:-1]],
        text_config={
            "vocab_size": vocabulary, "hidden_size": text, "num_attention_heads": text // HEAD,
            "intermediate_size": found["blip.text_encoder.encoder.layer.0.intermediate.dense.weight"].shape[0],
            "num_hidden_layers": layers(found, "blip.text_encoder.encoder.layer."), "layer_norm_eps": TEXT_EPS,
            "max_position_embeddings": found["blip.text_encoder.embeddings.position_embeddings.weight"].shape[0],
        },
        vision_config={
            "hidden_size": vision, "num_attention_heads": vision // HEAD, "patch_size": patch,
            "intermediate_size": found["blip.visual_encoder.blocks.0.mlp.fc1.weight"].shape[0],
            "num_hidden_layers": layers(found, "blip.visual_encoder.blocks."), "layer_norm_eps": VISION_EPS,
            "image_size": square_side(found["blip.visual_encoder.pos_embed"].shape[1], patch, file),
        },
        dtype=found["mlp.layers.0.weight"].dtype,
    )  # fmt: skip


def _linear(found: Mapping[str, Tensor]) -> list[int]:
    """Numbers of the stack's linear layers; between them, without weights, is dropout."""
    return sorted({int(name.split(".")[2]) for name in found if name.startswith("mlp.layers.")})


def _renamed(found: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    places = {number: place for place, number in enumerate(_linear(found))}
    for name, tensor in found.items():
        if name.startswith(UNUSED):
            continue
        if name.startswith("mlp.layers."):
            number, what = name.removeprefix("mlp.layers.").split(".")
            yield f"head.{places[int(number)]}.{what}", tensor
        elif name.startswith("blip.visual_encoder."):
            inner = name.removeprefix("blip.visual_encoder.")
            for old, new in VISION:
                inner = re.sub(old, new, inner)
            yield f"vision_model.{inner}", tensor
        else:
            yield name.removeprefix("blip."), tensor  # transformers took the text encoder's names from BLIP
