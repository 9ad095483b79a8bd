"""SimpleAR (Wang et al. 2025, arXiv 2504.11455): Qwen2.5 with the codes of Cosmos' tokenizer after its vocabulary."""

import math
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from rlmm.codecs import NetworkCodec
from rlmm.codecs.cosmos import FACTOR, LEVELS, CosmosNetwork, cosmos_config, flattened, for_video
from rlmm.codecs.network_files import load_network, read_tensors
from rlmm.config.codec import PretrainedCodec
from rlmm.policies.causal import CausalPolicy
from rlmm.policies.families.base import Checkpoint, Family
from rlmm.policies.families.tiny import qwen_tokenizer
from rollouts.contract import Grid, Layout

CODES = math.prod(LEVELS)
DRAW, BEGIN = "<|t2i|>", "<|soi|>"
QWEN = {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645}
ADDED = (DRAW, "<|i2t|>", BEGIN, "<|vtokens|>", "<|t2v|>", "<|v2t|>", "<|sov|>")
FIRST_ADDED, FIRST_CODE = 151665, 151672
OWN_SIZE = (1024, 1024)
TEMPLATE = "A highly realistic image of {prompt}"
NEGATIVE = (
    "An image of aerial view, overexposed, low quality, deformation, a poor composition, bad hands, bad teeth, "
    "bad eyes, bad limbs, distortion"
)
"""The null prompt that the authors draw with. Their training leaves prompts out: an empty one."""
TOKENIZER = "cosmos.safetensors"
ARCHIVES = (("autoencoder.jit",), ("encoder.jit", "decoder.jit"))


def layout(checkpoint: Checkpoint) -> Layout:
    """`<|t2i|> prompt <|soi|>`, then rows x cols codes and no end."""
    height, width = checkpoint.size(OWN_SIZE, FACTOR)
    first, whole = 1 + max(checkpoint.vocabulary.values()), checkpoint.config.vocab_size
    if first + CODES > whole:
        raise ValueError(
            f"{checkpoint.source} has {whole} tokens, of which {first} are text: there is no room for {CODES} image "
            "codes; is it a SimpleAR checkpoint?"
        )
    null = NEGATIVE if checkpoint.options.null_prompt is None else checkpoint.options.null_prompt
    return Layout(
        vocab_size=whole,
        text=(0, first),
        image=(first, first + CODES),
        bos=checkpoint.token(DRAW),
        pad=checkpoint.token("<|endoftext|>"),
        boi=(checkpoint.token(BEGIN),),
        grid=Grid(height // FACTOR, width // FACTOR),
        null_prompt=checkpoint.text_ids(null),
        template=checkpoint.options.template or TEMPLATE,
        family=FAMILY.name,
    )


def codec(checkpoint: Checkpoint) -> NetworkCodec:
    """Cosmos' tokenizer, a release of its own: what `policy.decoder` names, or in the checkpoint's folder."""
    height, width = checkpoint.size(OWN_SIZE, FACTOR)
    published = _published(checkpoint)
    settings = PretrainedCodec(
        network="cosmos",
        config=cosmos_config(published),
        grid=(height // FACTOR, width // FACTOR),
        image_size=(height, width),
        num_codes=CODES,
    )
    made = NetworkCodec(settings)
    load_network(made.network, flattened(published), checkpoint.options.decoder or checkpoint.source)
    return made


def _published(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The tokenizer's weights: of a file, or of the archives in a folder."""
    place = Path(checkpoint.options.decoder or checkpoint.source)
    if place.suffix in (".jit", ".safetensors"):
        return read_tensors(place, "policy.decoder")
    for names in ((TOKENIZER,), *ARCHIVES):
        if all((place / name).is_file() for name in names):
            return {
                key: tensor for name in names for key, tensor in read_tensors(place / name, "policy.decoder").items()
            }
    raise ValueError(
        f"there is no image tokenizer in {place}: SimpleAR was published without one; name the folder of "
        "nvidia/Cosmos-1.0-Tokenizer-DV8x16x16 with its encoder.jit and decoder.jit in policy.decoder"
    )


def tiny(folder: Path, image_size: tuple[int, int]) -> None:
    """See `Family`. The published vocabulary and tokenizer's factor of 16; two layers of 64."""
    special = QWEN | {name: FIRST_ADDED + place for place, name in enumerate(ADDED)}
    tokenizer = qwen_tokenizer(special, eos="<|im_end|>", pad="<|endoftext|>")
    config = Qwen2Config(
        vocab_size=FIRST_CODE + CODES, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=QWEN["<|im_end|>"], pad_token_id=QWEN["<|endoftext|>"],
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Qwen2ForCausalLM(config)
        cosmos = CosmosNetwork({"channels": 8, "widths": [8, 16, 16], "blocks": 1, "z_channels": 8})
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    save_file(for_video(cosmos), folder / TOKENIZER)


FAMILY = Family(
    "simplear",
    ("Qwen2ForCausalLM",),
    policy=CausalPolicy,
    layout=layout,
    codec=codec,
    tiny=tiny,
    settings=frozenset({"image_size", "template", "null_prompt", "decoder"}),
    named=True,
)
