"""What Show-o and MMaDA have in common: Show-o's way to write a prompt and an image, and its MAGVIT-v2."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from rlmm.codecs import NetworkCodec
from rlmm.codecs.network_files import load_network, published_file, published_tensors
from rlmm.codecs.vqgan import MAGVITV2
from rlmm.config.codec import PretrainedCodec
from rlmm.policies.families.base import Checkpoint
from rollouts.contract import Grid, Layout

CODES, STEP = 8192, 16
TOKENIZER = "showlab/magvitv2"
BESIDE = "magvitv2/"
"""Where a tiny instance, or a checkpoint of yours, keeps the image tokenizer."""
SETTINGS = frozenset({"image_size", "template", "null_prompt", "image_tokenizer"})


@dataclass(frozen=True)
class Marks:
    """Ids of the tokens that a prompt and an image are written with."""

    task: int
    begin: int
    end: int
    pad: int


def unified_layout(checkpoint: Checkpoint, marks: Marks, *, text: int | None, own: int, family: str) -> Layout:
    """`<|t2i|> <bos> prompt <eos> <|soi|>`, codes, `<|eoi|>`; unconditionally the prompt is empty. The codes follow the
    tokenizer's last token.

    Args:
        text: where the tokens end that text is made of; None: where the codes begin.
        own: side in pixels of the images that the checkpoint was made for.
    """
    height, width = checkpoint.size((own, own), STEP)
    tokenizer, options, config = checkpoint.tokenizer, checkpoint.options, checkpoint.config
    first = max(checkpoint.vocabulary.values()) + 1
    if first + CODES > config.vocab_size:
        raise ValueError(
            f"{checkpoint.source}: its tokenizer ends at {first}, so {CODES} codes after it go beyond the "
            f"{config.vocab_size} rows of the table; the tokenizer is not the one that the model was trained with"
        )
    around = f"{tokenizer.bos_token}{{}}{tokenizer.eos_token}"
    plain = Layout(
        vocab_size=config.vocab_size,
        text=(0, first if text is None else text),
        image=(first, first + CODES),
        bos=marks.task,
        pad=marks.pad,
        boi=(marks.begin,),
        grid=Grid(height // STEP, width // STEP, ending=(marks.end,)),
        mask=config.mask_token_id,
        template=around.format("{prompt}"),
        takes_sources=False,
        family=family,
    )
    null = checkpoint.spelled(plain, options.null_prompt or "")
    return replace(plain, null_prompt=null, template=around.format(options.template or "{prompt}"))


def magvit_codec(checkpoint: Checkpoint, layout: Layout) -> NetworkCodec:
    """MAGVIT-v2: what `policy.image_tokenizer` names, else what lies beside the model, else the published one."""
    source, folder = checkpoint.options.image_tokenizer, ""
    if source is None:
        beside = published_file(checkpoint.source, BESIDE + "config.json") is not None
        source, folder = (checkpoint.source, BESIDE) if beside else (TOKENIZER, "")
    rows, cols = layout.grid.rows, layout.grid.cols
    made = NetworkCodec(
        PretrainedCodec(
            network="vqgan",
            config=dict(MAGVITV2) | _sizes(published_file(source, folder + "config.json")),
            grid=(rows, cols),
            image_size=(rows * STEP, cols * STEP),
            num_codes=CODES,
        )
    )
    load_network(made.network, published_tensors(source, folder), source)
    return made


def write_tiny_magvit(folder: Path) -> None:
    """A random one with the published codes and factor of 16 and the fewest blocks."""
    sizes = {"channels": 32, "encoder_multipliers": [1] * 5, "encoder_blocks": [1] * 5,
             "decoder_multipliers": [1] * 5, "decoder_blocks": [1] * 5}  # fmt: skip
    settings = PretrainedCodec(
        network="vqgan", config=dict(MAGVITV2) | sizes, grid=(1, 1), image_size=(STEP, STEP), num_codes=CODES
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        weights = NetworkCodec(settings).network.state_dict()
    (folder / BESIDE).mkdir()
    save_file(weights, folder / BESIDE / "model.safetensors")
    (folder / BESIDE / "config.json").write_text(json.dumps(sizes))


def _sizes(config: str | None) -> dict[str, Any]:
    """Those that a config.json states; the published one states none."""
    stated = {} if config is None else json.loads(Path(config).read_text())
    return {name: stated[name] for name in MAGVITV2 if name in stated}
