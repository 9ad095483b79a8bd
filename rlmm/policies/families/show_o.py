"""Show-o (Xie et al. 2024, arXiv 2408.12528): Phi-1.5 that draws, masked diffusion of image codes after causal text."""

from dataclasses import replace
from math import isqrt
from pathlib import Path

import torch
from torch import Tensor, nn

from rlmm.codecs import NetworkCodec
from rlmm.policies.base import SequenceBatch
from rlmm.policies.families.base import Checkpoint, Family
from rlmm.policies.families.tiny import published_tokenizer
from rlmm.policies.families.unified import SETTINGS, STEP, Marks, magvit_codec, unified_layout, write_tiny_magvit
from rlmm.policies.masked import MaskedPolicy
from rlmm.policies.models import Showo, ShowoConfig
from rollouts.contract import Layout
from rollouts.trajectory import TEXT

EOS, PAD, BEGIN, END, TASK = "<|endoftext|>", "[PAD]", "<|soi|>", "<|eoi|>", "<|t2i|>"
SPECIAL = {EOS: 50256} | {token: 50295 + i for i, token in enumerate(ShowoConfig.added_tokens)}


class ShowoPolicy(MaskedPolicy):
    """A `Showo` that draws. Its text is causal."""

    projections = {  # noqa: RUF012
        "o_proj": "dense", "gate_proj": "fc1", "up_proj": "fc1", "down_proj": "fc2",
    }  # fmt: skip

    def sequence_log_probs(self, batch: SequenceBatch, *, model: nn.Module | None = None) -> Tensor:
        """See `MaskedPolicy`. Raises ValueError where text is masked: Show-o reads it causally, and never so."""
        if batch.noised_BT is not None and (batch.noised_BT & (batch.modality_BT == TEXT)).any():
            raise ValueError("Show-o's text is causal, and cannot be learned under masks; set text_weight: 0")
        return super().sequence_log_probs(batch, model=model)


def layout(checkpoint: Checkpoint) -> Layout:
    """The mask comes after the codes, the last row of the table. Text is read causally, and has no masked form."""
    token = checkpoint.token
    found = unified_layout(
        checkpoint,
        Marks(task=token(TASK), begin=token(BEGIN), end=token(END), pad=token(PAD)),
        text=None,
        own=STEP * isqrt(checkpoint.config.num_vq_tokens),
        family=FAMILY.name,
    )
    return replace(found, decides_text=False)


def codec(checkpoint: Checkpoint) -> NetworkCodec:
    return magvit_codec(checkpoint, layout(checkpoint))


def tiny(folder: Path, image_size: tuple[int, int]) -> None:
    """See `Family`. The published vocabulary; two layers of 32."""
    tokenizer = published_tokenizer(SPECIAL, {}, bos=EOS, eos=EOS, pad=PAD)
    config = ShowoConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, qk_layernorm=True
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Showo(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_tiny_magvit(folder)


FAMILY = Family(
    "show_o", ("Showo",), policy=ShowoPolicy, layout=layout, codec=codec, tiny=tiny, settings=SETTINGS, masked=True
)
