"""HPSv2's and ImageReward's checkpoints at a small size: the published names, and the arithmetic that they are of.

By open_clip's model.py and transformer.py, BLIP's vit.py and med.py, and ImageReward.py; see the facts in
tests/fixtures/preference.json.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

FACTS: dict[str, Any] = json.loads((Path(__file__).parents[1] / "fixtures" / "preference.json").read_text())
Weights = Mapping[str, Tensor]


def published_names(kind: str) -> dict[str, list[int]]:
    """Name -> shape of every weight of the published checkpoint."""
    found: dict[str, list[int]] = {}
    for entry in FACTS[kind]["weights"]:
        for number in range(entry.get("times", 1)):
            found |= {name.replace("{n}", str(number)): shape for name, shape in entry["names"].items()}
    return found


def random_weights(kind: str, sizes: Mapping[int, int], layers: int = 2, seed: int = 0) -> dict[str, Tensor]:
    """Weights with the published names and `layers` layers a tower; each size is what `sizes` has in its place."""
    generator, found = torch.Generator().manual_seed(seed), {}
    for entry in FACTS[kind]["weights"]:
        for number in range(min(layers, entry.get("times", 1))):
            for name, shape in entry["names"].items():
                made = torch.randn([sizes.get(one, one) for one in shape], generator=generator)
                norm = name.endswith(("norm1.weight", "norm2.weight", "norm.weight", "LayerNorm.weight", "ln_1.weight"))
                norm = norm or name.endswith(("ln_2.weight", "ln_pre.weight", "ln_post.weight", "ln_final.weight"))
                # Wide enough that different inputs get different answers.
                found[name.replace("{n}", str(number))] = 1 + 0.1 * made if norm else 0.2 * made
    return found


def attend(query_key_value: Iterable[Tensor], heads: int, hidden: Tensor | None = None) -> Tensor:
    """Of sequences [S, D]; what is `hidden` [S, S] is not seen."""
    split = [one.unflatten(-1, (heads, -1)).transpose(0, 1) for one in query_key_value]
    scores = split[0] @ split[1].transpose(1, 2) / split[0].shape[-1] ** 0.5
    if hidden is not None:
        scores = scores.masked_fill(hidden, -torch.inf)
    return (scores.softmax(-1) @ split[2]).transpose(0, 1).flatten(1)


def linear(weights: Weights, name: str, given: Tensor) -> Tensor:
    return F.linear(given, weights[f"{name}.weight"], weights[f"{name}.bias"])


def norm(weights: Weights, name: str, given: Tensor, eps: float) -> Tensor:
    return F.layer_norm(given, given.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], eps)


def patches(picture: Tensor, kernel: Tensor, bias: Tensor | None = None) -> Tensor:
    """[P, D] of a picture [3, side, side]."""
    return F.conv2d(picture[None], kernel, bias, stride=kernel.shape[-1])[0].flatten(1).T


def open_clip_blocks(weights: Weights, prefix: str, x: Tensor, heads: int, hidden: Tensor | None) -> Tensor:
    number = 0
    while f"{(block := f'{prefix}.resblocks.{number}')}.ln_1.weight" in weights:
        inner = norm(weights, f"{block}.ln_1", x, 1e-5)
        mixed = F.linear(inner, weights[f"{block}.attn.in_proj_weight"], weights[f"{block}.attn.in_proj_bias"])
        x = x + linear(weights, f"{block}.attn.out_proj", attend(mixed.chunk(3, -1), heads, hidden))
        wide = F.gelu(linear(weights, f"{block}.mlp.c_fc", norm(weights, f"{block}.ln_2", x, 1e-5)))
        x, number = x + linear(weights, f"{block}.mlp.c_proj", wide), number + 1
    return x


def hpsv2(weights: Weights, picture: Tensor, tokens: Tensor) -> float:
    """The cosine of a prepared picture [3, side, side] and tokens [S], the last of which ends the text."""
    x = patches(picture, weights["visual.conv1.weight"])
    x = torch.cat([weights["visual.class_embedding"][None], x]) + weights["visual.positional_embedding"]
    heads = x.shape[-1] // FACTS["hpsv2"]["head_width"]["vision"]
    x = open_clip_blocks(weights, "visual.transformer", norm(weights, "visual.ln_pre", x, 1e-5), heads, None)
    seen = norm(weights, "visual.ln_post", x[0], 1e-5) @ weights["visual.proj"]
    y = weights["token_embedding.weight"][tokens] + weights["positional_embedding"][: len(tokens)]
    later = torch.ones(len(tokens), len(tokens)).triu(1).bool()
    heads = y.shape[-1] // FACTS["hpsv2"]["head_width"]["text"]
    y = open_clip_blocks(weights, "transformer", y, heads, later)
    read = norm(weights, "ln_final", y, 1e-5)[-1] @ weights["text_projection"]
    return float(F.cosine_similarity(seen, read, dim=0))


def image_reward(weights: Weights, picture: Tensor, tokens: Tensor) -> float:
    """The mark of a prepared picture [3, side, side] and tokens [S]."""
    facts = FACTS["image_reward"]
    vision, text = "blip.visual_encoder", "blip.text_encoder"
    kernel, bias = (weights[f"{vision}.patch_embed.proj.{what}"] for what in ("weight", "bias"))
    x = torch.cat([weights[f"{vision}.cls_token"][0], patches(picture, kernel, bias)])
    x, number, eps = x + weights[f"{vision}.pos_embed"][0], 0, facts["eps"]["vision"]
    while f"{(block := f'{vision}.blocks.{number}')}.norm1.weight" in weights:
        mixed = linear(weights, f"{block}.attn.qkv", norm(weights, f"{block}.norm1", x, eps))
        heads = x.shape[-1] // facts["head_width"]
        x = x + linear(weights, f"{block}.attn.proj", attend(mixed.chunk(3, -1), heads))
        wide = F.gelu(linear(weights, f"{block}.mlp.fc1", norm(weights, f"{block}.norm2", x, eps)))
        x, number = x + linear(weights, f"{block}.mlp.fc2", wide), number + 1
    x = norm(weights, f"{vision}.norm", x, eps)
    places = weights[f"{text}.embeddings.position_embeddings.weight"][: len(tokens)]
    y = weights[f"{text}.embeddings.word_embeddings.weight"][tokens] + places
    y, number, eps = norm(weights, f"{text}.embeddings.LayerNorm", y, facts["eps"]["text"]), 0, facts["eps"]["text"]
    while f"{(layer := f'{text}.encoder.layer.{number}')}.output.dense.weight" in weights:
        heads = y.shape[-1] // facts["head_width"]
        for part, other in (("attention", y), ("crossattention", x)):
            given = {"query": y, "key": other, "value": other}
            found = attend([linear(weights, f"{layer}.{part}.self.{what}", one) for what, one in given.items()], heads)
            found = linear(weights, f"{layer}.{part}.output.dense", found)
            y = norm(weights, f"{layer}.{part}.output.LayerNorm", y + found, eps)
        wide = F.gelu(linear(weights, f"{layer}.intermediate.dense", y))
        y = norm(weights, f"{layer}.output.LayerNorm", y + linear(weights, f"{layer}.output.dense", wide), eps)
        number += 1
    mark = y[0]
    for at in facts["head_layers"]:
        mark = linear(weights, f"mlp.layers.{at}", mark)
    return (float(mark) - facts["mean"]) / facts["std"]
