"""LlamaGen (Sun et al. 2024, arXiv 2406.06525): one class, or a prompt's T5 features, in front of the image codes.

A class is asked for by its number, 0 to 999 (ImageNet's order). Published weights are pickles: `llamagen_convert` makes
a folder of them that this reads.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from rlmm.codecs import NetworkCodec
from rlmm.codecs.network_files import load_network
from rlmm.config.codec import PretrainedCodec
from rlmm.policies.causal import CausalPolicy
from rlmm.policies.families.base import Checkpoint, Family
from rlmm.policies.families.tiny import published_tokenizer
from rlmm.policies.head import OutputHead
from rlmm.policies.models.llamagen import CLASSES, LlamaGenConfig, LlamaGenForImageGeneration
from rollouts.contract import Grid, Layout

NULL, END = "<null>", "</s>"
T5_VOCABULARY = 32128
"""Rows of T5's table; its tokenizer gives the first 32100 alone, so the last one can stand for no text."""


class LlamaGenPolicy(CausalPolicy):
    """A `LlamaGenForImageGeneration`, whose head decides codes alone."""

    read_parts = ("model.captions.text_encoder.", "model.captions.uncond_embedding")
    frozen_parts = ("vqmodel.", *read_parts)

    def positions(self, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        model: Any = self.base.model
        return model.positions(ids_BT)

    def output_head(self, vocabulary: tuple[int, int]) -> OutputHead:
        head = super().output_head(vocabulary)
        return OutputHead(head.linear, self.layout.image[0])


def layout(checkpoint: Checkpoint) -> Layout:
    """The class, or the prompt's text tokens and T5's `</s>`, then rows x cols codes. The unconditional stream has as
    many null tokens as the other has of text."""
    config, step = checkpoint.config, _step(checkpoint)
    own = (config.grid_size * step,) * 2
    if checkpoint.options.image_size not in (None, own):
        raise ValueError(
            f"policy.image_size {checkpoint.options.image_size}: {checkpoint.source} draws {own[0]}x{own[1]} pixels; "
            "leave it out"
        )
    first, worded = config.first_code, config.caption_config is not None
    return Layout(
        vocab_size=first + config.vocab_size,
        text=(0, first),
        image=(first, first + config.vocab_size),
        bos=None,
        pad=config.caption_config.pad_token_id if worded else checkpoint.token(NULL),
        boi=(),
        grid=Grid(config.grid_size, config.grid_size),
        null_token=first - 1,
        template="{prompt}" + END if worded else "{prompt}",
        decides_text=False,
        takes_sources=False,
        family=(TEXT if worded else FAMILY).name,
    )


def codec(checkpoint: Checkpoint) -> NetworkCodec:
    """VQ-16 (or VQ-8) inside of the checkpoint: the network that Janus took over."""
    vq, side = checkpoint.config.vq_config, checkpoint.config.grid_size
    settings = PretrainedCodec(
        network="janus",
        config=vq.to_diff_dict(),
        grid=(side, side),
        image_size=(side * _step(checkpoint), side * _step(checkpoint)),
        num_codes=vq.num_embeddings,
    )
    made = NetworkCodec(settings)
    load_network(made.network.vq, dict(checkpoint.weights("vqmodel.")), checkpoint.source)
    return made


def class_tokenizer(names: Mapping[str, int] | None = None) -> PreTrainedTokenizerFast:
    """A whole prompt is one token: the class. What is no class is the null class, which no prompt may name.

    Args:
        names: other words for a class -> its number.
    """
    vocabulary = {**(names or {}), **{str(number): number for number in range(CLASSES)}, NULL: CLASSES}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=NULL))
    tokenizer.normalizer = normalizers.Strip()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=NULL, unk_token=NULL)


def text_tokenizer(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """T5's, in lower case, as the published models were trained. Of the plain class: T5's own is built from its
    vocabulary whenever it is loaded, and would forget that."""
    backend = tokenizer.backend_tokenizer
    steps = [normalizers.Lowercase(), *([] if backend.normalizer is None else [backend.normalizer])]
    backend.normalizer = normalizers.Sequence(steps)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=tokenizer.pad_token, eos_token=tokenizer.eos_token,
        unk_token=tokenizer.unk_token,
    )  # fmt: skip


def tiny(folder: Path, image_size: tuple[int, int]) -> None:
    """See `Family`. The published classes, codes and tokenizer's factor of 16; two layers of 64."""
    _tiny(folder, image_size)
    class_tokenizer().save_pretrained(folder)


def tiny_text(folder: Path, image_size: tuple[int, int]) -> None:
    """The same behind a T5 of one layer of 16, with the published vocabulary."""
    _tiny(
        folder, image_size,
        caption_config={"vocab_size": T5_VOCABULARY, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1,
                        "num_heads": 2, "feed_forward_proj": "gated-gelu"},
    )  # fmt: skip
    special = {"<pad>": 0, END: 1, "<unk>": 2}
    tokenizer = published_tokenizer(special, {}, bos=END, eos=END, pad="<pad>")
    text_tokenizer(tokenizer).save_pretrained(folder)


def _tiny(folder: Path, image_size: tuple[int, int], **condition: Any) -> None:
    config = LlamaGenConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, grid_size=image_size[0] // 16,
        vq_config={"base_channels": 32, "channel_multiplier": [1, 1, 1, 1, 1], "num_res_blocks": 1,
                   "latent_channels": 16},
        **condition,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaGenForImageGeneration(config)
        with torch.no_grad():
            book = model.vqmodel.quantize.embedding.weight
            book.copy_(nn.functional.normalize(torch.randn(book.shape), dim=-1))
        if condition:
            nn.init.normal_(model.model.captions.uncond_embedding)
    model.save_pretrained(folder)


def _step(checkpoint: Checkpoint) -> int:
    return 2 ** (len(checkpoint.config.vq_config.channel_multiplier) - 1)


FAMILY = Family(
    "llamagen",
    ("LlamaGenForImageGeneration",),
    policy=LlamaGenPolicy,
    layout=layout,
    codec=codec,
    tiny=tiny,
    settings=frozenset({"image_size"}),
)
TEXT = replace(FAMILY, name="llamagen_text", tiny=tiny_text)
"""Of the same class: the checkpoint says which of the two it is."""
