"""LlamaGen (arXiv 2406.06525) as vLLM runs it: a Llama whose positions are rows and columns, behind one class."""

import copy
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from vllm.config import VllmConfig
from vllm.model_executor.models.llama import LlamaAttention, LlamaDecoderLayer, LlamaModel

from rollouts.vllm_engine.families import InnerLlama

CONDITION = 1
"""Positions before the codes."""


class GridRotary(nn.Module):
    """Turns queries and keys [N, heads x D] by the row and column of their code; those of the class become zero."""

    def __init__(self, grid: int, head_size: int, base: float) -> None:
        super().__init__()
        place = torch.arange(grid * grid).unsqueeze(-1)
        frequency = base ** (-torch.arange(head_size // 4) / (head_size // 4))
        angle_PD = torch.cat([place // grid * frequency, place % grid * frequency], -1).repeat(1, 2)
        self.cos_PD: Tensor
        self.sin_PD: Tensor
        self.register_buffer("cos_PD", F.pad(angle_PD.cos(), (0, 0, CONDITION, 0)), persistent=False)
        self.register_buffer("sin_PD", F.pad(angle_PD.sin(), (0, 0, CONDITION, 0)), persistent=False)
        self.head_size = head_size

    def forward(self, positions: Tensor, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        cos_N1D, sin_N1D = self.cos_PD[positions].unsqueeze(1), self.sin_PD[positions].unsqueeze(1)
        return self._turned(query, cos_N1D, sin_N1D), self._turned(key, cos_N1D, sin_N1D)

    def _turned(self, flat: Tensor, cos_N1D: Tensor, sin_N1D: Tensor) -> Tensor:
        heads_NHD = flat.unflatten(-1, (-1, self.head_size)).float()
        first, second = heads_NHD.chunk(2, -1)
        return (heads_NHD * cos_N1D + torch.cat([-second, first], -1) * sin_N1D).flatten(-2).to(flat.dtype)


class LlamaGenAttention(LlamaAttention):
    """Llama's with that rotary embedding."""

    def _init_rotary_emb(self, config: Any, quant_config: Any) -> None:
        base = float(config.rope_parameters["rope_theta"])
        self.rotary_emb = GridRotary(config.grid_size, self.head_dim, base)  # pyrefly: ignore


class LlamaGenLayer(LlamaDecoderLayer):
    """A layer with that attention."""

    def __init__(self, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config, prefix, attn_layer_type=LlamaGenAttention)


class LlamaGenModel(LlamaModel):
    """Ids up to `classes` are classes, with an embedding of their own; then come codes."""

    class_embedding: nn.Embedding

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        first = self.class_embedding.num_embeddings
        classes_NH = self.class_embedding(input_ids.clamp_max(first - 1))
        codes_NH = self.embed_tokens((input_ids - first).clamp_min(0))
        return torch.where((input_ids >= first).unsqueeze(-1), codes_NH, classes_NH)


class LlamaGen(InnerLlama):
    """Logits of classes, which nothing draws, are the lowest number there is."""

    parts: ClassVar[dict[str, str | None]] = {"vqmodel.": None}

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=LlamaGenLayer)
        self.model.class_embedding = nn.Embedding(_first_code(self.config), self.config.hidden_size)

    def inner_config(self, whole: Any) -> Any:
        """vLLM is told of classes and codes as one vocabulary; the checkpoint's counts codes."""
        own = copy.deepcopy(whole)
        own.vocab_size -= _first_code(whole)
        return own

    def _init_model(
        self, vllm_config: VllmConfig, prefix: str = "", layer_type: Any = LlamaDecoderLayer
    ) -> LlamaGenModel:
        return LlamaGenModel(vllm_config=vllm_config, prefix=prefix, layer_type=layer_type)

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        codes = self.logits_processor(self.lm_head, hidden_states)
        return F.pad(codes, (_first_code(self.config), 0), value=torch.finfo(codes.dtype).min)


def _first_code(config: Any) -> int:
    return config.num_classes + 1
