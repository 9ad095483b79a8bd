"""BLIP3o-NEXT (Chen et al. 2025, arXiv 2510.15857): Qwen3 with the codes of TA-Tok after its vocabulary. Its images are
drawn of what its last layer holds at the codes."""

import json
import math
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from rlmm.codecs import NetworkCodec
from rlmm.codecs.blip3o import TaTok, ta_tok_config
from rlmm.codecs.network_files import load_network
from rlmm.config.codec import PretrainedCodec
from rlmm.policies.causal import CausalPolicy
from rlmm.policies.families.base import Checkpoint, Family
from rlmm.policies.families.tiny import qwen_tokenizer
from rollouts.contract import Grid, Layout

CODES, SIDE = 65536, 27
BEGIN, END, SCALE = "<im_start>", "<im_end>", "<S0>"
QWEN = {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645}
ADDED = {BEGIN: 151669, END: 151670, SCALE: 151671, "<S1>": 151672, "<S2>": 151673}
FIRST_CODE = 151674
OWN_SIZE = (1024, 1024)
TEMPLATE = (
    "system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nPlease generate image based on the following "
    "caption: {prompt}<|im_end|>\n<|im_start|>assistant\n"
)
"""What follows the first `<|im_start|>`."""
TOWER, PLAIN, PATCH = "vision_tower.vision_tower.", "plain.safetensors", 16


def code_token(code: int) -> str:
    """The token of a code."""
    return f"<I{code}>"


def layout(checkpoint: Checkpoint) -> Layout:
    """`<|im_start|>` chat with the prompt, `<im_start><S0>`, then 27 x 27 codes and no end."""
    asked = checkpoint.options.image_size
    side, plain = _side(checkpoint), _plain(checkpoint) is not None
    own = (side * PATCH,) * 2 if plain else OWN_SIZE
    if asked not in (None, own):
        raise ValueError(f"policy.image_size {asked}: {checkpoint.source} draws {own[0]}x{own[1]} pixels; leave it out")
    first = checkpoint.token(code_token(0))
    null = checkpoint.options.null_prompt or ""
    without_null = Layout(
        vocab_size=checkpoint.config.vocab_size,
        text=(0, first),
        image=(first, checkpoint.token(code_token(CODES - 1)) + 1),
        bos=checkpoint.token("<|im_start|>"),
        pad=checkpoint.token("<|endoftext|>"),
        boi=(checkpoint.token(BEGIN), checkpoint.token(SCALE)),
        grid=Grid(side, side),
        template=checkpoint.options.template or TEMPLATE,
        family=FAMILY.name,
    )
    return replace(without_null, null_prompt=checkpoint.spelled(without_null, null))


def codec(checkpoint: Checkpoint) -> NetworkCodec:
    """TA-Tok's encoder, where the checkpoint has it, and the decoder: SANA, or a matrix where its folder has one."""
    tower, plain, side = dict(checkpoint.weights(TOWER)), _plain(checkpoint), _side(checkpoint)
    encoder = ta_tok_config(tower) if tower else None
    size = OWN_SIZE if plain is None else (side * PATCH,) * 2
    settings = PretrainedCodec(
        network="blip3o",
        config={
            "encoder": encoder,
            "checkpoint": checkpoint.source,
            "sana": checkpoint.options.decoder,
            "plain": None if plain is None else (plain["weight"].shape[1], PATCH),
        },
        grid=(side, side),
        image_size=size,
        num_codes=CODES,
    )
    made = NetworkCodec(settings)
    if made.network.encoder is not None:
        load_network(made.network.encoder, tower, checkpoint.source)
    if plain is not None:
        load_network(made.network.plain, plain, checkpoint.source)
    return made


def _side(checkpoint: Checkpoint) -> int:
    """Codes a side: one a patch of TA-Tok's own picture."""
    places = [len(tensor) for _, tensor in checkpoint.weights(TOWER + "encoder.embeddings.position_embedding.")]
    return math.isqrt(places[0]) if places else SIDE


def _plain(checkpoint: Checkpoint) -> dict[str, Tensor] | None:
    file = Path(checkpoint.source) / PLAIN
    return load_file(file) if file.is_file() else None


def tiny(folder: Path, image_size: tuple[int, int]) -> None:
    """See `Family`. The published vocabulary and kind of file; two layers of 64, a TA-Tok of 14-pixel patches, and in
    place of SANA a matrix that draws a 16-pixel patch of each code's hidden state."""
    special = QWEN | ADDED
    codes = {code_token(code): FIRST_CODE + code for code in range(CODES)}
    tokenizer = qwen_tokenizer(special, codes, eos="<|im_end|>", pad="<|endoftext|>")
    config = Qwen3Config(
        vocab_size=FIRST_CODE + CODES, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, max_position_embeddings=1024, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=QWEN["<|im_end|>"], pad_token_id=QWEN["<|endoftext|>"],
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, side = Qwen3ForCausalLM(config), image_size[0] // PATCH
        tower = TaTok(32, 14, side, layers=2, intermediate_size=48, codes=CODES, code_width=8)
        plain = nn.Linear(64, 3 * PATCH**2)
    kept = model.state_dict() | {f"model.{TOWER}{name}": weight for name, weight in tower.state_dict().items()}
    model.save_pretrained(folder, state_dict=kept)
    tokenizer.save_pretrained(folder)
    save_file(plain.state_dict(), folder / PLAIN)
    published = {"model_type": "blip3o_qwen", "architectures": ["blip3oQwenForInferenceLM"]}
    stated = json.loads((folder / "config.json").read_text()) | published
    (folder / "config.json").write_text(json.dumps(stated, indent=2))


FAMILY = Family(
    "blip3o_next",
    ("Qwen3ForCausalLM",),
    policy=CausalPolicy,
    layout=layout,
    codec=codec,
    tiny=tiny,
    settings=frozenset({"image_size", "template", "null_prompt", "decoder"}),
    named=True,
    reads_hidden=True,
)
