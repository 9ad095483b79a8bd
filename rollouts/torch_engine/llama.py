"""Which models the packed decoder takes, and what it needs to know of one beside its weights."""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

STATIC_ROPES = ("default", "linear", "llama3")
"""Rotary kinds whose frequencies do not change with the length of the sequence."""


class Unsupported(ValueError):
    """A model that the packed decoder does not take; the text says what about it."""


@dataclass(frozen=True)
class LlamaShape:
    """The sizes of a Llama, and cosines and sines [positions, head size] of its rotary embedding (float32)."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    intermediate: int
    eps: float
    tied: bool
    attention_bias: bool
    mlp_bias: bool
    cos_PD: Tensor
    sin_PD: Tensor


def llama_shape(model: nn.Module) -> LlamaShape:
    """The shape of a model that the packed decoder computes exactly, LoRA layers inside it or not.

    It takes `LlamaForCausalLM` itself (no subclass) in float32, with grouped-query attention, biases, a tied head and
    any rotary kind of `STATIC_ROPES`. Raises Unsupported, which names what does not fit.
    """
    if type(model) is not LlamaForCausalLM:
        raise Unsupported(f"the model is a {type(model).__name__} and no LlamaForCausalLM")
    config, rotary = cast(Any, model.config), cast(Any, model.model.rotary_emb)
    norms = {type(module).__name__ for name, module in model.named_modules() if name.endswith("norm")}
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    faults = {
        f"its weights are {model.dtype}, not float32": model.dtype != torch.float32,
        f"its rotary embedding is of kind {rotary.rope_type!r}": rotary.rope_type not in STATIC_ROPES,
        f"its activation is {config.hidden_act!r}, not 'silu'": config.hidden_act != "silu",
        f"its norms are {sorted(norms)}": norms != {LlamaRMSNorm.__name__},
    }
    for fault, holds in faults.items():
        if holds:
            raise Unsupported(fault)
    cos_PD, sin_PD = _rotary_tables(rotary, config.max_position_embeddings)
    return LlamaShape(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_size=head_size,
        intermediate=config.intermediate_size,
        eps=config.rms_norm_eps,
        tied=config.tie_word_embeddings,
        attention_bias=config.attention_bias,
        mlp_bias=config.mlp_bias,
        cos_PD=cos_PD,
        sin_PD=sin_PD,
    )


def _rotary_tables(rotary: nn.Module, positions: int) -> tuple[Tensor, Tensor]:
    """From the module itself, so that the tables are those of the model for every rotary kind."""
    device = cast(Tensor, rotary.inv_freq).device
    cos_1PD, sin_1PD = rotary(torch.empty(0, device=device), torch.arange(positions, device=device).unsqueeze(0))
    return cos_1PD[0].contiguous(), sin_1PD[0].contiguous()
