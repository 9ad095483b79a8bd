"""MMaDA (Yang et al. 2025, arXiv 2505.15809): LLaDA-8B that draws, masked diffusion over text and image codes."""

from pathlib import Path

import torch

from rlmm.codecs import NetworkCodec
from rlmm.policies.families.base import Checkpoint, Family
from rlmm.policies.families.tiny import published_tokenizer
from rlmm.policies.families.unified import SETTINGS, Marks, magvit_codec, unified_layout, write_tiny_magvit
from rlmm.policies.masked import MaskedPolicy
from rlmm.policies.models import MMadaConfig, MMadaModelLM
from rollouts.contract import Layout

MARKS = Marks(task=126088, begin=126084, end=126085, pad=126093)
"""`<|t2i|>`, `<|soi|>`, `<|eoi|>` and `[iPAD]` are what MMaDA calls four of LLaDA's reserved tokens: no tokenizer has
these names."""
OWN_SIDE = 512
BOS, EOS, MASK, LAST = "<|startoftext|>", "<|endoftext|>", "<|mdm_mask|>", "<|eot_id|>"
SPECIAL = {BOS: 126080, EOS: 126081, MASK: 126336, LAST: 126348}


class LLaDAPolicy(MaskedPolicy):
    """A LLaDA with image codes."""

    projections = {  # noqa: RUF012
        "o_proj": "attn_out", "gate_proj": "ff_proj", "down_proj": "ff_out",
    }  # fmt: skip


def layout(checkpoint: Checkpoint) -> Layout:
    """As Show-o's. The mask is one of LLaDA's own special tokens, below the last ones: text ends before it."""
    text = checkpoint.config.mask_token_id
    return unified_layout(checkpoint, MARKS, text=text, own=OWN_SIDE, family=FAMILY.name)


def codec(checkpoint: Checkpoint) -> NetworkCodec:
    return magvit_codec(checkpoint, layout(checkpoint))


def tiny(folder: Path, image_size: tuple[int, int]) -> None:
    """See `Family`. The published vocabulary; two layers of 32."""
    tokenizer = published_tokenizer(SPECIAL, {}, bos=BOS, eos=EOS, pad=EOS)
    config = MMadaConfig(d_model=32, n_layers=2, n_heads=2, mlp_hidden_size=64)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MMadaModelLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_tiny_magvit(folder)


FAMILY = Family(
    "mmada",
    ("MMadaModelLM",),
    policy=LLaDAPolicy,
    layout=layout,
    codec=codec,
    tiny=tiny,
    settings=SETTINGS,
    masked=True,
)
