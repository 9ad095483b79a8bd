"""LlamaGen's published weights (two pickles: the transformer's, the image tokenizer's) as a folder that rlmm reads;
where the condition is text, with the T5 that reads it.

Of the pickles tensors alone are read. What else there is to know (heads, the grid) no file says: heads follow from the
published sizes, the grid from the images that the checkpoint draws.
"""

import argparse
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoTokenizer, PreTrainedTokenizerFast, T5EncoderModel

from rewards.checkpoints import load_model, misfits, read_tensors
from rlmm.policies.families.llamagen import class_tokenizer, text_tokenizer
from rlmm.policies.models.llamagen import LlamaGenConfig, LlamaGenForImageGeneration

SETTINGS = (argparse.Namespace,)
"""What the pickles hold beside tensors: the arguments of their training."""
HEADS = {768: 12, 1024: 16, 1280: 20, 1536: 24, 2048: 32, 2560: 40, 3200: 32, 4096: 32}
"""Hidden size -> attention heads of the published models B, L, XL, XXL, 1B, XXXL, 3B, 7B."""
LAYER = {
    "attention.wo": "self_attn.o_proj", "feed_forward.w1": "mlp.gate_proj", "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj", "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
}  # fmt: skip
OUTER = {
    "tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head",
    "cls_embedding.embedding_table": "model.class_embedding", "cls_embedding.cap_proj.fc1": "model.captions.fc1",
    "cls_embedding.cap_proj.fc2": "model.captions.fc2",
    "cls_embedding.uncond_embedding": "model.captions.uncond_embedding",
}  # fmt: skip
NETWORK = (
    (r"conv_blocks\.(\d+)\.res\.", r"LEVEL.\1.block."),
    (r"conv_blocks\.(\d+)\.", r"LEVEL.\1."),
    (r"mid\.0\.", "mid.block_1."),
    (r"mid\.1\.", "mid.attn_1."),
    (r"mid\.2\.", "mid.block_2."),
)


def convert(
    transformer: Path,
    tokenizer: Path,
    folder: Path,
    image_size: int,
    text_encoder: str | None = None,
    heads: int | None = None,
) -> None:
    """Write config.json, model.safetensors and the tokenizer of classes or text.

    Args:
        transformer: a published checkpoint, e.g. c2i_XL_384.pt or t2i_XL_stage2_512.pt.
        tokenizer: the published image tokenizer, e.g. vq_ds16_c2i.pt.
        image_size: side in pixels of the images that the checkpoint draws: the number in its name.
        text_encoder: folder or hub id of the T5 that a text-conditional checkpoint was trained on (flan-t5-xl).
        heads: attention heads, where the size is none of the published ones.

    Raises:
        ValueError: a file is no such checkpoint, or the two do not go together.
    """
    body, network = (read_tensors(file, SETTINGS) for file in (transformer, tokenizer))
    for name, where in (("tok_embeddings.weight", body), ("quantize.embedding.weight", network)):
        if name not in where:
            raise ValueError(
                f"{transformer if where is body else tokenizer}: there is no weight {name!r}; convert takes a "
                "transformer (c2i_*.pt, t2i_*.pt) and an image tokenizer (vq_*.pt), in this order"
            )
    worded = "cls_embedding.cap_proj.fc1.weight" in body
    if worded != (text_encoder is not None):
        what = "is text-conditional: name its T5 (flan-t5-xl) as" if worded else "is not text-conditional: leave out"
        raise ValueError(f"{transformer} {what} text_encoder")
    text = None if text_encoder is None else _text_encoder(text_encoder, body["tok_embeddings.weight"].dtype)
    config = _config(
        body, network, image_size, heads, transformer, None if text is None else text.config.to_diff_dict()
    )
    weights = dict(_transformer(body, config.num_attention_heads))
    if text is not None:
        stack = text.encoder.state_dict() | {"embed_tokens.weight": text.shared.weight}
        weights |= {f"model.captions.text_encoder.{name}": tensor for name, tensor in stack.items()}
    weights |= {f"vqmodel.{name}": tensor for name, tensor in _network(network)}
    with torch.device("meta"):
        model = LlamaGenForImageGeneration(config)
    if faults := misfits(model, weights):
        raise ValueError(
            f"{transformer} and {tokenizer} do not make a LlamaGen: {len(faults)} weights do not fit, the first of "
            f"them {faults[0]!r}; give a published checkpoint and the image tokenizer it was trained on"
        )
    model.save_pretrained(folder, state_dict=weights)
    if text_encoder is None:
        class_tokenizer().save_pretrained(folder)
    else:
        made = AutoTokenizer.from_pretrained(text_encoder, trust_remote_code=False)
        text_tokenizer(cast(PreTrainedTokenizerFast, made)).save_pretrained(folder)


def _text_encoder(source: str, dtype: torch.dtype) -> Any:
    try:
        return load_model(T5EncoderModel, source, dtype=dtype)
    except (OSError, ValueError) as error:
        raise ValueError(f"text_encoder: {source} is no readable T5 ({error}); give a folder or a hub id") from error


def _config(
    body: Mapping[str, Tensor],
    network: Mapping[str, Tensor],
    image_size: int,
    heads: int | None,
    source: Path,
    caption: dict[str, Any] | None,
) -> LlamaGenConfig:
    codes, width = body["tok_embeddings.weight"].shape
    if heads is None and width not in HEADS:
        raise ValueError(f"{source} has hidden size {width}, which no published model has; name its heads")
    vq = _network_shape(network)
    step = 2 ** (len(vq["channel_multiplier"]) - 1)
    if image_size % step:
        raise ValueError(f"image_size {image_size}: one code stands for {step}x{step} pixels; give a multiple of that")
    return LlamaGenConfig(
        vocab_size=codes,
        hidden_size=width,
        intermediate_size=body["layers.0.feed_forward.w1.weight"].shape[0],
        num_hidden_layers=1 + max(int(name.split(".")[1]) for name in body if name.startswith("layers.")),
        num_attention_heads=heads or HEADS[width],
        **_condition(body, caption),
        grid_size=image_size // step,
        dtype=body["tok_embeddings.weight"].dtype,
        vq_config=vq,
    )


def _condition(body: Mapping[str, Tensor], caption: dict[str, Any] | None) -> dict[str, Any]:
    if caption is None:
        return {"num_classes": body["cls_embedding.embedding_table.weight"].shape[0] - 1}
    return {"caption_config": caption, "caption_tokens": body["cls_embedding.uncond_embedding"].shape[0]}


def _network_shape(network: Mapping[str, Tensor]) -> dict[str, Any]:
    levels = 1 + max(int(name.split(".")[2]) for name in network if name.startswith("encoder.conv_blocks."))
    base = network["encoder.conv_in.weight"].shape[0]
    widths = [network[f"encoder.conv_blocks.{level}.res.0.conv1.weight"].shape[0] for level in range(levels)]
    blocks = {name.split(".")[4] for name in network if name.startswith("encoder.conv_blocks.0.res.")}
    codes, size = network["quantize.embedding.weight"].shape
    return {
        "base_channels": base,
        "channel_multiplier": [width // base for width in widths],
        "num_res_blocks": len(blocks),
        "num_embeddings": codes,
        "embed_dim": size,
        "latent_channels": network["encoder.conv_out.weight"].shape[0],
    }


def _transformer(body: Mapping[str, Tensor], heads: int) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in body.items():
        part, _, rest = name.removeprefix("layers.").partition(".")
        if name == "freqs_cis":  # rotary tables, which follow from the sizes
            continue
        if not name.startswith("layers."):
            outer = name.removesuffix(".weight")
            yield OUTER.get(outer, outer) + name.removeprefix(outer), tensor
        elif rest == "attention.wqkv.weight":
            query, key, value = tensor.chunk(3)  # as many heads of keys and values as of queries
            yield f"model.layers.{part}.self_attn.q_proj.weight", in_halves(query, heads)
            yield f"model.layers.{part}.self_attn.k_proj.weight", in_halves(key, heads)
            yield f"model.layers.{part}.self_attn.v_proj.weight", value.contiguous()
        else:
            inner = rest.removesuffix(".weight")
            yield f"model.layers.{part}.{LAYER.get(inner, inner)}.weight", tensor


def in_halves(weight_OI: Tensor, heads: int) -> Tensor:
    """A projection whose heads turn channels (2 i, 2 i + 1) together, as one that turns (i, i + half a head)."""
    pairs = weight_OI.unflatten(0, (heads, -1, 2))
    return pairs.transpose(1, 2).reshape(weight_OI.shape).contiguous()


def _network(network: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Weights of the image tokenizer by the names of transformers' class. Codes lie on the unit sphere, and are put
    there for good."""
    for name, tensor in network.items():
        if name == "quantize.codebook_used":  # a statistic of its training
            continue
        for old, new in NETWORK:
            name = re.sub(old, new.replace("LEVEL", "down" if name.startswith("encoder.") else "up"), name)
        yield name, F.normalize(tensor.float(), dim=-1) if name == "quantize.embedding.weight" else tensor
