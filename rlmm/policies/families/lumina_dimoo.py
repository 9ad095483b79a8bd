"""Lumina-DiMOO (Xin et al. 2025, arXiv 2510.06308): LLaDA-8B that draws pictures of any shape, with aMUSEd's tokenizer
(arXiv 2401.01808)."""

import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from rlmm.codecs import NetworkCodec
from rlmm.codecs.network_files import load_network, published_file, published_tensors
from rlmm.codecs.vq_model import DEFAULTS, vq_model_config, vq_model_name
from rlmm.codecs.vqgan import VqganNetwork
from rlmm.config.codec import PretrainedCodec
from rlmm.policies.families.base import Checkpoint, Family
from rlmm.policies.families.mmada import BOS, EOS, MASK, LLaDAPolicy
from rlmm.policies.families.tiny import published_tokenizer
from rlmm.policies.models import LLaDAConfig, LLaDAForMultiModalGeneration
from rollouts.contract import Grid, Layout

CODES, FIRST_CODE, STEP, OWN_SIZE = 8192, 126356, 16, (1024, 1024)
ROW_END, BEGIN, END, ANSWER, ANSWER_END = 126084, 126349, 126350, 126354, 126355
SYSTEM, UNCONDITION = "<system>", "<uncondition>"
TEMPLATE = SYSTEM + "Generate an image according to the text prompt.</system><user>{prompt}</user>"
TOKENIZER = "vqvae/"
"""Where a checkpoint keeps the image tokenizer."""


def layout(checkpoint: Checkpoint) -> Layout:
    """`<system>` what to do `</system><user>` prompt `</user><answer><boi>`, rows of codes, each with its end,
    `<eoi></answer>`; unconditionally the prompt is `<uncondition>`."""
    options, config, tokenizer = checkpoint.options, checkpoint.config, checkpoint.tokenizer
    height, width = checkpoint.size(OWN_SIZE, STEP)
    template = options.template or TEMPLATE
    lead = tokenizer("").input_ids
    if not lead:  # no bos: the template's first token is the sequence's
        if not template.startswith(SYSTEM):
            raise ValueError(
                f"policy.template {template!r} must start with {SYSTEM}, as every prompt of the family does"
            )
        lead = [checkpoint.token(SYSTEM)]
        template = template.removeprefix(SYSTEM)
    plain = Layout(
        vocab_size=config.rows,
        text=(0, config.mask_token_id),  # the mask is one of LLaDA's own special tokens, below the last ones
        image=(FIRST_CODE, FIRST_CODE + CODES),
        bos=lead[0],
        pad=checkpoint.token(str(tokenizer.pad_token or tokenizer.eos_token)),
        boi=(ANSWER, BEGIN),
        grid=Grid(height // STEP, width // STEP, row_end=ROW_END, ending=(END, ANSWER_END)),
        mask=config.mask_token_id,
        template=template,
        takes_sources=False,
        family=FAMILY.name,
    )
    if plain.image[1] > config.rows:
        raise ValueError(
            f"{checkpoint.source} has a table of {config.rows} rows, and image codes go up to {plain.image[1]}: it is "
            "a LLaDA that does not draw, or not a Lumina-DiMOO"
        )
    if options.null_prompt is not None:
        return replace(plain, null_prompt=checkpoint.spelled(plain, options.null_prompt))
    checkpoint.token(UNCONDITION)  # a template's special tokens are obeyed, where there are such
    return replace(
        plain, null_prompt=checkpoint.spelled(replace(plain, template=template.replace("{prompt}", UNCONDITION)), "")
    )


def codec(checkpoint: Checkpoint) -> NetworkCodec:
    """The tokenizer inside of the checkpoint, which takes and gives pixels in [0, 1]."""
    file = published_file(checkpoint.source, TOKENIZER + "config.json")
    if file is None:
        raise ValueError(f"{checkpoint.source} has no {TOKENIZER}config.json: give the complete checkpoint")
    grid, config = layout(checkpoint).grid, vq_model_config(json.loads(Path(file).read_text()), checkpoint.source)
    made = NetworkCodec(
        PretrainedCodec(
            network="vqgan",
            config=config,
            grid=(grid.rows, grid.cols),
            image_size=(grid.rows * STEP, grid.cols * STEP),
            num_codes=config["codes"],
            mean=(0.0, 0.0, 0.0),
            std=(1.0, 1.0, 1.0),
        )
    )
    found, levels = published_tensors(checkpoint.source, TOKENIZER), len(config["encoder_blocks"])
    names = {name: vq_model_name(name, levels) for name in made.network.state_dict()}
    load_network(made.network, {name: found[n] for name, n in names.items() if n in found}, checkpoint.source)
    return made


def tiny(folder: Path, image_size: tuple[int, int]) -> None:
    """See `Family`. The published vocabulary, but for the ids of four tokens that no source gives; two layers of 32."""
    unknown = {SYSTEM: 126344, "</system>": 126345, "<user>": 126352, "</user>": 126353}
    special = {BOS: 126080, EOS: 126081, MASK: 126336, UNCONDITION: 126351, **unknown}
    tokenizer = published_tokenizer(special, {}, bos=BOS, eos=EOS, pad=EOS)
    config = LLaDAConfig(vocab_size=FIRST_CODE + CODES, d_model=32, n_layers=2, n_heads=2, mlp_hidden_size=64)
    vq = DEFAULTS | {
        "block_out_channels": [32] * 5, "layers_per_block": 1, "latent_channels": 16, "num_vq_embeddings": CODES,
        "down_block_types": ["DownEncoderBlock2D"] * 5, "up_block_types": ["UpDecoderBlock2D"] * 5,
        "lookup_from_codebook": True, "mid_block_add_attention": False,
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LLaDAForMultiModalGeneration(config)
        weights = VqganNetwork(vq_model_config(vq, str(folder))).state_dict()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / TOKENIZER).mkdir()
    named = {vq_model_name(name, 5): weight for name, weight in weights.items()}
    save_file(named, folder / TOKENIZER / "diffusion_pytorch_model.safetensors")
    (folder / TOKENIZER / "config.json").write_text(json.dumps(vq))


FAMILY = Family(
    "lumina_dimoo",
    ("LLaDAForMultiModalGeneration", "LLaDAModelLM"),
    policy=LLaDAPolicy,
    layout=layout,
    codec=codec,
    tiny=tiny,
    settings=frozenset({"image_size", "template", "null_prompt"}),
    masked=True,
)
