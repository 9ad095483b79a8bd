"""Janus and Janus-Pro (arXiv 2410.13848, 2501.17811): image codes have an embedding and a head of their own.

Here both live in one vocabulary: text tokens first, then the codes.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, JanusConfig, JanusForConditionalGeneration

from rlmm.codecs import NetworkCodec
from rlmm.codecs.network_files import load_network
from rlmm.config.codec import PretrainedCodec
from rlmm.policies.causal import CausalPolicy
from rlmm.policies.families.base import Checkpoint, Family
from rlmm.policies.families.tiny import published_tokenizer
from rlmm.policies.head import OutputHead
from rollouts.contract import Grid, Layout

BEGIN, END, PAD, USER, ASSISTANT = (
    "<begin_of_image>", "<end_of_image>", "<｜▁pad▁｜>", "<|User|>", "<|Assistant|>",
)  # fmt: skip
BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
SPECIAL = {
    BOS: 100000, EOS: 100001, PAD: 100015, BEGIN: 100016, END: 100593, "<image_placeholder>": 100594, USER: 100601,
    ASSISTANT: 100602,
}  # fmt: skip
VOCABULARY, CODES = 102400, 16384


class JanusPolicy(CausalPolicy):
    """A `JanusForConditionalGeneration` that draws."""

    frozen_parts = ("model.vision_model.", "model.aligner.", "model.vqmodel.")
    untrained_parts = ("lm_head.",)

    def embedded(self, ids_BT: Tensor) -> dict[str, Tensor]:
        """Text through the language model's embedding, codes through the generation embedding and its aligner."""
        model: Any = self.base.model
        first = self.layout.image[0]
        image_BT1 = (ids_BT >= first).unsqueeze(-1)
        text_BTH = model.get_input_embeddings()(ids_BT.clamp_max(first - 1))
        codes_BTD = model.generation_embeddings((ids_BT - first).clamp_min(0))
        return {"inputs_embeds": torch.where(image_BT1, model.generation_aligner(codes_BTD), text_BTH)}

    def output_head(self, vocabulary: tuple[int, int]) -> OutputHead:
        """The generation head for codes: a layer and an activation, then the matrix that is sliced."""
        if vocabulary[0] < self.layout.image[0]:
            return super().output_head(vocabulary)
        head: Any = self.base.model.generation_head
        return OutputHead(head.vision_head, self.layout.image[0], lambda h: head.activation_fn(head.proj_out(h)))


def layout(checkpoint: Checkpoint) -> Layout:
    """`<bos> <|User|>: prompt <|Assistant|>: <boi>`, then rows x cols codes and no end. Unconditionally every token of
    the prompt is `<pad>`, which is attended to."""
    config = checkpoint.config
    text, vq = config.get_text_config().vocab_size, config.vq_config
    own = (config.vision_config.image_size,) * 2
    asked = checkpoint.options.image_size
    if asked not in (None, own):
        raise ValueError(f"policy.image_size {asked}: {checkpoint.source} draws {own[0]}x{own[1]} pixels; leave it out")
    return Layout(
        vocab_size=text + vq.num_embeddings,
        text=(0, text),
        image=(text, text + vq.num_embeddings),
        bos=checkpoint.token(str(checkpoint.tokenizer.bos_token)),
        pad=checkpoint.token(str(checkpoint.tokenizer.pad_token)),
        boi=(checkpoint.token(BEGIN),),
        grid=Grid(vq.num_patches, vq.num_patches),
        null_token=checkpoint.token(str(checkpoint.tokenizer.pad_token)),
        template=checkpoint.options.template or f"{USER}: {{prompt}}\n\n{ASSISTANT}:",
        after_source=(checkpoint.token(END),),
        family=FAMILY.name,
    )


def codec(checkpoint: Checkpoint) -> NetworkCodec:
    """The generation tokenizer inside of the checkpoint."""
    vq, size = checkpoint.config.vq_config, checkpoint.config.vision_config.image_size
    settings = PretrainedCodec(
        network=FAMILY.name,
        config=vq.to_diff_dict(),
        grid=(vq.num_patches, vq.num_patches),
        image_size=(size, size),
        num_codes=vq.num_embeddings,
    )
    made = NetworkCodec(settings)
    load_network(made.network.vq, dict(checkpoint.weights("vqmodel.")), checkpoint.source)
    return made


def tiny(folder: Path, image_size: tuple[int, int]) -> None:
    """See `Family`. The published vocabularies and tokenizer's factor of 16; two layers of 32."""
    tokenizer = published_tokenizer(SPECIAL, {}, bos=BOS, eos=EOS, pad=PAD)
    config = JanusConfig(
        text_config={
            "model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64,
            "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32,
            "max_position_embeddings": 512,
            "pad_token_id": SPECIAL[PAD], "bos_token_id": SPECIAL[BOS], "eos_token_id": SPECIAL[EOS],
        },
        vision_config={
            "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": image_size[0],
            "patch_size": 16, "projection_dim": 32, "num_image_tokens": (image_size[0] // 16) ** 2,
        },
        vq_config={
            "base_channels": 32, "channel_multiplier": [1, 1, 1, 1, 1], "num_res_blocks": 1, "latent_channels": 16,
            "num_embeddings": CODES, "projection_dim": 32, "image_token_embed_dim": 32,
        },
        image_token_id=SPECIAL["<image_placeholder>"],
        tie_word_embeddings=False,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = JanusForConditionalGeneration(config)
    # Read by the class's own `generate`.
    model.generation_config = GenerationConfig(generation_kwargs={"boi_token_id": SPECIAL[BEGIN]})
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


FAMILY = Family("janus", ("JanusForConditionalGeneration",), policy=JanusPolicy, layout=layout, codec=codec, tiny=tiny)
