"""Janus and Janus-Pro (arXiv 2410.13848, 2501.17811): image codes have an embedding and a head of their own.

Here both live in one vocabulary: text tokens first, then the codes.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from transformers import (
    GenerationConfig,
    JanusConfig,
    JanusForConditionalGeneration,
    JanusImageProcessorPil,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rlmm.codecs import NetworkCodec
from rlmm.codecs.network_files import load_network
from rlmm.config.codec import PretrainedCodec
from rlmm.policies.causal import CausalPolicy
from rlmm.policies.families.base import Checkpoint, Family
from rlmm.policies.families.tiny import published_tokenizer
from rlmm.policies.head import OutputHead
from rlmm.policies.pictures import Features, Pictures, numbers_and_places
from rollouts.contract import SEEN, Grid, Layout, Seeing

BEGIN, END, PAD, USER, ASSISTANT = (
    "<begin_of_image>", "<end_of_image>", "<｜▁pad▁｜>", "<|User|>", "<|Assistant|>",
)  # fmt: skip
BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
SPECIAL = {
    BOS: 100000, EOS: 100001, PAD: 100015, BEGIN: 100016, END: 100593, "<image_placeholder>": 100594, USER: 100601,
    ASSISTANT: 100602,
}  # fmt: skip
VOCABULARY, CODES = 102400, 16384
SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
"""What the published processor puts before a question."""


class JanusPolicy(CausalPolicy):
    """A `JanusForConditionalGeneration` that draws, and sees images that it writes about."""

    frozen_parts = ("model.vision_model.", "model.aligner.", "model.vqmodel.")
    untrained_parts = ("lm_head.",)

    def __init__(self, model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, layout: Layout) -> None:
        super().__init__(model, tokenizer, layout)
        seeing = layout.seeing
        self.pictures, self._features = None if seeing is None else Pictures(seeing.length), Features()

    def embedded(self, ids_BT: Tensor) -> dict[str, Tensor]:
        """Text through the language model's embedding, codes through the generation embedding and its aligner, images
        that are seen through the vision encoder and its aligner, which nothing trains."""
        model: Any = self.base.model
        first, end = self.layout.image
        image_BT1 = (ids_BT >= first).unsqueeze(-1)
        text_BTH = model.get_input_embeddings()(ids_BT.clamp_max(first - 1))
        codes_BTD = model.generation_embeddings((ids_BT - first).clamp(0, end - first - 1))
        embedded_BTH = torch.where(image_BT1, model.generation_aligner(codes_BTD), text_BTH)
        # One token at a time is drawn, never given; and without memory (a memory plan) there is nothing to look at.
        without_values = ids_BT.is_meta or isinstance(ids_BT, FakeTensor)  # of a memory plan
        if ids_BT.shape[1] > 1 and not without_values and (seen_BT := ids_BT >= SEEN).any():
            seen_NH = self._seen(ids_BT[seen_BT]).to(embedded_BTH)
            embedded_BTH = embedded_BTH.masked_scatter(seen_BT.unsqueeze(-1), seen_NH)
        return {"inputs_embeds": embedded_BTH}

    @torch.no_grad()
    def _seen(self, ids_N: Tensor) -> Tensor:
        """[N, H]."""
        numbers_N, places_N = numbers_and_places(ids_N)
        different, which_N = numbers_N.unique(return_inverse=True)
        return torch.stack(self._features.of(different.tolist(), self._encoded))[which_N, places_N]

    def _encoded(self, numbers: list[int]) -> Tensor:
        """Aligned features [n, L, H] of pictures; ValueError where the checkpoint does not say how pixels are
        normed."""
        seeing, pictures = self.layout.seeing, self.pictures
        if seeing is None or pictures is None or seeing.mean is None or seeing.std is None:
            raise ValueError(
                "the checkpoint has no preprocessor_config.json, which says how the pixels of an image to be answered "
                "about are normed: put the release's beside the model"
            )
        model: Any = self.base.model
        side = model.config.vision_config.image_size
        processor: Any = JanusImageProcessorPil(
            size={"height": side, "width": side}, image_mean=list(seeing.mean), image_std=list(seeing.std)
        )
        pixels = processor([pictures.pixels(number) for number in numbers], return_tensors="pt").pixel_values
        return model.get_image_features(pixels.to(self.base.device, self.base.dtype)).pooler_output

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
        seeing=_seeing(checkpoint),
        family=FAMILY.name,
    )


def _seeing(checkpoint: Checkpoint) -> Seeing:
    """`<bos>` system prompt `<|User|>: <boi>` image `<eoi>` question `<|Assistant|>:`, as published."""
    vision = checkpoint.config.vision_config
    lead = (*checkpoint.text_ids(f"{SYSTEM}\n\n"), checkpoint.token(USER), *checkpoint.text_ids(": "))
    made = Seeing((vision.image_size // vision.patch_size) ** 2, lead, f"\n{{prompt}}\n\n{ASSISTANT}:")
    try:
        pixels: Any = JanusImageProcessorPil.from_pretrained(checkpoint.source)
    except (OSError, ValueError):  # only a question about an image needs it, and says so then
        return made
    return replace(made, mean=tuple(pixels.image_mean), std=tuple(pixels.image_std))


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
    half = [0.5, 0.5, 0.5]
    size = {"height": image_size[0], "width": image_size[1]}
    JanusImageProcessorPil(size=size, image_mean=half, image_std=half).save_pretrained(folder)


FAMILY = Family("janus", ("JanusForConditionalGeneration",), policy=JanusPolicy, layout=layout, codec=codec, tiny=tiny)
