"""Emu3 (Wang et al. 2024, arXiv 2409.18869): text and image codes in one vocabulary, the size written as text."""

import json
import math
from dataclasses import replace
from pathlib import Path

import torch
from transformers import Emu3Config, Emu3ForConditionalGeneration

from rlmm.codecs import NetworkCodec
from rlmm.codecs.network_files import load_network, published_file
from rlmm.config.codec import PretrainedCodec
from rlmm.policies.causal import CausalPolicy
from rlmm.policies.families.base import Checkpoint, Family
from rlmm.policies.families.tiny import published_tokenizer
from rollouts.contract import Grid, Layout

CODES = 32768
SPECIAL = {
    "<|endoftext|>": 151643, "<|extra_200|>": 151846, "<|extra_201|>": 151847, "<|extra_203|>": 151849,
    "<|extra_204|>": 151850, "<|image token|>": 151851, "<|image start|>": 151852, "<|image end|>": 151853,
}  # fmt: skip
FIRST_CODE = 151854
GEN_AREA, STAGE1_AREA = 720 * 720, 512 * 512
NEGATIVE = (
    "lowres, bad anatomy, bad hands, text, error, missing fingers, extra digit, fewer digits, cropped, worst quality, "
    "low quality, normal quality, jpeg artifacts, signature, watermark, username, blurry."
)
"""The null prompt that the authors draw with, from Gen and Stage1 alike."""


class Emu3Policy(CausalPolicy):
    """The language model of an `Emu3ForConditionalGeneration`."""

    frozen_parts = ("model.vqmodel.",)


def layout(checkpoint: Checkpoint) -> Layout:
    """`<bos> prompt <image start> rows*cols <image token>`, then rows of codes, each with its end, and the image's."""
    token, vq = checkpoint.token, checkpoint.config.vq_config
    step = 2 ** (len(vq.channel_multiplier) - 1)
    height, width = checkpoint.size((own_side(checkpoint, step),) * 2, step)
    rows, cols, first = height // step, width // step, token(visual(0))
    announced = checkpoint.text_ids(f"{rows}*{cols}")
    without_null = Layout(
        vocab_size=checkpoint.config.get_text_config().vocab_size,
        text=(0, first),
        image=(first, first + vq.codebook_size),
        bos=checkpoint.config.get_text_config().bos_token_id,
        pad=checkpoint.config.get_text_config().pad_token_id,
        boi=(token("<|image start|>"), *announced, token("<|image token|>")),
        grid=Grid(rows, cols, row_end=token("<|extra_200|>"), ending=(token("<|extra_201|>"), token("<|image end|>"))),
        template=checkpoint.options.template or "{prompt}",
        family=FAMILY.name,
    )
    null = NEGATIVE if checkpoint.options.null_prompt is None else checkpoint.options.null_prompt
    return replace(without_null, null_prompt=checkpoint.spelled(without_null, null))


def own_side(checkpoint: Checkpoint, step: int) -> int:
    """Pixels of a side of the square with the area that the checkpoint states, in whole codes. Without one, as in what
    transformers' script converts: Gen's, or Stage1's where the model's positions are too few for Gen's."""
    config = checkpoint.config
    positions = getattr(config, "max_position_embeddings", config.get_text_config().max_position_embeddings)
    side = round(math.sqrt(GEN_AREA) / step)
    fitting = GEN_AREA if side * (side + 1) <= positions else STAGE1_AREA
    return round(math.sqrt(_stated_area(checkpoint) or fitting) / step) * step


def _stated_area(checkpoint: Checkpoint) -> int | None:
    if hasattr(checkpoint.config, "image_area"):
        return checkpoint.config.image_area
    file = published_file(checkpoint.source, "preprocessor_config.json")
    return None if file is None else json.loads(Path(file).read_text()).get("image_area")


def codec(checkpoint: Checkpoint) -> NetworkCodec:
    """The tokenizer inside of the checkpoint."""
    vq, grid = checkpoint.config.vq_config, layout(checkpoint).grid
    step = 2 ** (len(vq.channel_multiplier) - 1)
    settings = PretrainedCodec(
        network=FAMILY.name,
        config=vq.to_diff_dict(),
        grid=(grid.rows, grid.cols),
        image_size=(grid.rows * step, grid.cols * step),
        num_codes=vq.codebook_size,
    )
    made = NetworkCodec(settings)
    load_network(made.network.vq, dict(checkpoint.weights("vqmodel.")), checkpoint.source)
    return made


def visual(code: int) -> str:
    """The token of a code."""
    return f"<|visual token {code:06d}|>"


def tiny(folder: Path, image_size: tuple[int, int]) -> None:
    """See `Family`. The published vocabulary and tokenizer's factor of 8; two layers of 32."""
    codes = {visual(code): FIRST_CODE + code for code in range(CODES)}
    tokenizer = published_tokenizer(SPECIAL, codes, bos="<|extra_203|>", eos="<|extra_204|>", pad="<|endoftext|>")
    config = Emu3Config(
        text_config={
            "vocab_size": FIRST_CODE + CODES, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 512,
            "attention_dropout": 0.1,
        },
        vq_config={
            "base_channels": 32, "channel_multiplier": [1, 1, 1, 1], "num_res_blocks": 1, "attn_resolutions": [],
            "hidden_size": 32, "codebook_size": CODES,
        },
        vocabulary_map=SPECIAL | codes,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Emu3ForConditionalGeneration(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


FAMILY = Family(
    "emu3",
    ("Emu3ForConditionalGeneration",),
    policy=Emu3Policy,
    layout=layout,
    codec=codec,
    tiny=tiny,
    settings=frozenset({"image_size", "template", "null_prompt"}),
)
