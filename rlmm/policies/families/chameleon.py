"""Chameleon (arXiv 2405.09818) with image output allowed, which Anole (arXiv 2407.06135) trained; and Lumina-mGPT
(arXiv 2408.02657), the same class with the picture's size and row ends written as tokens.

transformers' forward forbids image tokens in the logits; a policy reads the hidden states and uses the head itself.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import ChameleonConfig, ChameleonForConditionalGeneration, PreTrainedModel

from rlmm.codecs import NetworkCodec
from rlmm.codecs.network_files import load_network, reversed_levels, safetensors_of, vqgan_decoder
from rlmm.config.codec import PretrainedCodec
from rlmm.policies.causal import CausalPolicy
from rlmm.policies.families.base import Checkpoint, Family
from rlmm.policies.families.tiny import published_tokenizer
from rollouts.contract import Grid, Layout

CODES, FIRST_CODE, VOCABULARY = 8192, 4, 65536
BEGIN, END, SEPARATOR = "<racm3:break>", "<eoss>", "<reserved08706>"
SPECIAL = {"<s>": 0, "<pad>": 1, "</s>": 2, END: 8196, BEGIN: 8197, SEPARATOR: 8710, "<reserved08707>": 8711}
LUMINA_SIZE = (768, 768)
"""Of Lumina-mGPT-7B-768. The others state nothing else but in their names."""
ROW_END, SIZE_TOKEN, SIZE_STEP = 8803, 8804, 32
"""Lumina-mGPT: a row's end, and the token of zero pixels; a side of n pixels is token SIZE_TOKEN + n / SIZE_STEP."""


class ChameleonPolicy(CausalPolicy):
    """A `ChameleonForConditionalGeneration`."""

    frozen_parts = ("model.vqmodel.",)


def layout(checkpoint: Checkpoint) -> Layout:
    """`<s> prompt <sep> <boi>`, 1024 codes, `<eoi>`; the unconditional stream is `<s> <boi>`."""
    step = _step(checkpoint)
    height, width = checkpoint.size(_own(checkpoint), step)
    first = min(_tokens(checkpoint))
    return Layout(
        vocab_size=checkpoint.config.get_text_config().vocab_size,
        text=(checkpoint.token(END), checkpoint.config.get_text_config().vocab_size),
        image=(first, first + len(_tokens(checkpoint))),
        bos=checkpoint.token("<s>"),  # the config's bos_token_id is that of <pad>
        pad=checkpoint.token("<pad>"),
        boi=(checkpoint.token(BEGIN),),
        grid=Grid(height // step, width // step, ending=(checkpoint.token(END),)),
        template=checkpoint.options.template or "{prompt}" + SEPARATOR,
        family=FAMILY.name,
        text_end=checkpoint.token(SEPARATOR),  # </s> lies below the image codes, outside the slice of text
    )


def lumina_layout(checkpoint: Checkpoint) -> Layout:
    """The same with two size tokens after `<boi>`, height first, and an end after each row."""
    plain = layout(checkpoint)
    height, width = checkpoint.size(LUMINA_SIZE, SIZE_STEP)
    asked = f"Generate an image of {width}x{height} according to the following prompt:\n{{prompt}}{SEPARATOR}"
    step = _step(checkpoint)
    return replace(
        plain,
        boi=(*plain.boi, SIZE_TOKEN + height // SIZE_STEP, SIZE_TOKEN + width // SIZE_STEP),
        grid=Grid(height // step, width // step, row_end=ROW_END, ending=plain.grid.ending),
        template=checkpoint.options.template or asked,
        family=LUMINA.name,
    )


@torch.no_grad()
def spread_norms(model: PreTrainedModel, checkpoint: Checkpoint, names: Sequence[str]) -> None:
    """Lumina-mGPT keeps the norms of queries and keys once a group of heads, transformers' class once a head.

    Raises ValueError for other weights of another shape.
    """
    kept = {name: weight for name, weight in safetensors_of(checkpoint.source, "_norm.") if name in names}
    for name in names:
        own, weight = model.get_parameter(name), kept.get(name)
        if weight is None or weight.ndim != 2 or weight.shape[1] != own.shape[1] or own.shape[0] % weight.shape[0]:
            raise ValueError(
                f"{checkpoint.source}: {name} has another shape than the model's, {list(own.shape)}; config.json is of "
                "another checkpoint"
            )
        own.copy_(weight.repeat_interleave(own.shape[0] // weight.shape[0], 0))


def codec(checkpoint: Checkpoint) -> NetworkCodec:
    """The tokenizer inside of the checkpoint. Its decoder is in few of them: `policy.decoder` names another file."""
    return _codec(checkpoint, _own(checkpoint))


def lumina_codec(checkpoint: Checkpoint) -> NetworkCodec:
    """The same, of pictures of another size."""
    return _codec(checkpoint, LUMINA_SIZE)


def _codec(checkpoint: Checkpoint, size: tuple[int, int]) -> NetworkCodec:
    step, (height, width) = _step(checkpoint), checkpoint.size(size, _step(checkpoint))
    vq = checkpoint.config.vq_config
    settings = PretrainedCodec(
        network=FAMILY.name,
        config=vq.to_diff_dict(),
        grid=(height // step, width // step),
        image_size=(height, width),
        num_codes=vq.num_embeddings,
    )
    made, found = NetworkCodec(settings), dict(checkpoint.weights("vqmodel."))
    weights = {f"vq.{name}": tensor for name, tensor in found.items() if not name.startswith("decoder.")}
    weights |= vqgan_decoder(found, checkpoint.options.decoder, len(vq.channel_multiplier), checkpoint.source)
    tokens = _tokens(checkpoint)
    weights["order"] = torch.tensor([tokens[token] for token in sorted(tokens)])
    load_network(made.network, weights, checkpoint.source)
    return made


def _own(checkpoint: Checkpoint) -> tuple[int, int]:
    return (checkpoint.config.vq_config.resolution,) * 2


def _step(checkpoint: Checkpoint) -> int:
    return 2 ** (len(checkpoint.config.vq_config.channel_multiplier) - 1)


def _tokens(checkpoint: Checkpoint) -> dict[int, int]:
    """Token id -> code of the codebook: a token's name spells the code in letters, A for 0 (IMGIMGBCZ is 12)."""
    digits = str.maketrans("ABCDEFGHIJ", "0123456789")
    names = checkpoint.config.vocabulary_map or checkpoint.vocabulary
    return {i: int(n[6:-1].translate(digits)) for n, i in names.items() if n.startswith("IMGIMG")}


def image_token(code: int) -> str:
    """The name of a code's token."""
    return f"IMGIMG{str(code).translate(str.maketrans('0123456789', 'ABCDEFGHIJ'))}Z"


def tiny(folder: Path, image_size: tuple[int, int]) -> None:
    """See `Family`. The published vocabulary and tokenizer's factor of 16; two layers of 64."""
    codes = {image_token(code): FIRST_CODE + code for code in range(CODES)}
    special = SPECIAL | {f"<reserved{i - 4:05d}>": i for i in range(ROW_END, SIZE_TOKEN + 41)}
    tokenizer = published_tokenizer(special, codes, bos="<s>", eos="</s>", pad="<pad>", first=20000)
    config = ChameleonConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=512, pad_token_id=1, bos_token_id=1,
        vq_config={"base_channels": 32, "channel_multiplier": [1, 1, 1, 1, 1], "num_res_blocks": 1,
                   "num_embeddings": CODES, "embed_dim": 16, "latent_channels": 16, "resolution": 64},
        vocabulary_map=special | codes,
    )  # fmt: skip
    vq: Any = config.vq_config
    settings = PretrainedCodec(
        network=FAMILY.name, config=vq.to_diff_dict(), grid=(3, 3), image_size=(48, 48), num_codes=CODES
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ChameleonForConditionalGeneration(config)
        decoder = NetworkCodec(settings).network.decoder.state_dict()
    # transformers' class has no decoder; Anole's conversion keeps one here, under the original's names.
    named = reversed_levels(decoder, len(vq.channel_multiplier))
    kept = model.state_dict() | {f"model.vqmodel.decoder.{name}": tensor for name, tensor in named.items()}
    model.save_pretrained(folder, state_dict=kept)
    tokenizer.save_pretrained(folder)


OPTIONS = frozenset({"image_size", "template", "decoder"})
ARCHITECTURES = ("ChameleonForConditionalGeneration",)
FAMILY = Family(
    "chameleon", ARCHITECTURES, policy=ChameleonPolicy, layout=layout, codec=codec, tiny=tiny, settings=OPTIONS
)
LUMINA = Family(
    "lumina_mgpt", ARCHITECTURES, policy=ChameleonPolicy, layout=lumina_layout, codec=lumina_codec, tiny=tiny,
    settings=OPTIONS, known_as={"ChameleonXLLMXForConditionalGeneration": ARCHITECTURES[0]}, mend=spread_norms,
)  # fmt: skip
"""Of the same class: the published files name one of the authors', others need policy.family: lumina_mgpt."""
