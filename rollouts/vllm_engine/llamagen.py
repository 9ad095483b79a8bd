"""LlamaGen (arXiv 2406.06525) as vLLM runs it: a Llama whose positions are rows and columns, behind a condition."""

import copy
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from vllm.config import VllmConfig
from vllm.model_executor.models.llama import LlamaAttention, LlamaDecoderLayer, LlamaModel

from rollouts.captions import Captions
from rollouts.vllm_engine.families import InnerLlama


class GridRotary(nn.Module):
    """Turns queries and keys [N, heads x D] by the row and column of their code; those of the condition become zero.

    `before`: positions of the condition. Positions [N], or [3, N] from vLLM's M-RoPE, then three times the same.
    """

    def __init__(self, before: int, grid: int, head_size: int, base: float) -> None:
        super().__init__()
        place = torch.arange(grid * grid).unsqueeze(-1)
        frequency = base ** (-torch.arange(head_size // 4) / (head_size // 4))
        angle_PD = torch.cat([place // grid * frequency, place % grid * frequency], -1).repeat(1, 2)
        self.cos_PD: Tensor
        self.sin_PD: Tensor
        self.register_buffer("cos_PD", F.pad(angle_PD.cos(), (0, 0, before, 0)), persistent=False)
        self.register_buffer("sin_PD", F.pad(angle_PD.sin(), (0, 0, before, 0)), persistent=False)
        self.head_size = head_size

    def forward(self, positions: Tensor, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        positions = positions if positions.ndim == 1 else positions[0]
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
        self.rotary_emb = GridRotary(  # pyrefly: ignore
            config.condition_tokens, config.grid_size, self.head_dim, base
        )


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
    """Logits of conditions, which nothing draws, are the lowest number there is."""

    parts: ClassVar[dict[str, str | None]] = {"vqmodel.": None}
    body: ClassVar[type[LlamaModel]] = LlamaGenModel

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=LlamaGenLayer)
        self.add_condition()

    def add_condition(self) -> None:
        """Give the model what embeds its condition."""
        self.model.class_embedding = nn.Embedding(self.config.first_code, self.config.hidden_size)

    def inner_config(self, whole: Any) -> Any:
        """vLLM is told of conditions and codes as one vocabulary; the checkpoint's counts codes."""
        own = copy.deepcopy(whole)
        own.vocab_size -= whole.first_code
        return own

    def _init_model(self, vllm_config: VllmConfig, prefix: str = "", layer_type: Any = LlamaDecoderLayer) -> LlamaModel:
        return self.body(vllm_config=vllm_config, prefix=prefix, layer_type=layer_type)

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        codes = self.logits_processor(self.lm_head, hidden_states)
        return F.pad(codes, (self.config.first_code, 0), value=torch.finfo(codes.dtype).min)


class LlamaGenTextModel(LlamaModel):
    """Ids before the codes are text. Its features depend on the whole prompt, which comes in one step."""

    captions: Captions

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any,
        inputs_embeds: Any = None,
        **_: Any,
    ) -> Any:
        if input_ids is None:
            raise NotImplementedError("prompts of LlamaGen are token ids")
        embedded = self.embedded(input_ids, positions[0])
        return super().forward(None, positions, intermediate_tensors, embedded)

    def embedded(self, ids_N: Tensor, place_N: Tensor) -> Tensor:
        """[N, H] of the tokens of several requests, one after the other. `place_N`: positions."""
        first = self.captions.null + 1
        condition_N = ids_N < first
        embedded_NH = self.embed_tokens((ids_N - first).clamp_min(0))
        if not condition_N.any():
            return embedded_NH
        ids_K, place_K = ids_N[condition_N], place_N[condition_N]
        row_K = (place_K == 0).cumsum(0) - 1
        if row_K[0] < 0:
            raise RuntimeError("vLLM read a prompt from its middle on, and LlamaGen needs it whole: skip its cache")
        ids_RW = ids_K.new_full((int(row_K[-1]) + 1, int(place_K.max()) + 1), self.captions.pad)
        ids_RW[row_K, place_K] = ids_K
        embedded_NH[condition_N] = self.captions(ids_RW, ids_RW != self.captions.pad)[row_K, place_K]
        return embedded_NH


class LlamaGenText(LlamaGen):
    """Behind text. Codes have the positions that they have behind the longest prompt: vLLM's M-RoPE lets a model say
    where its tokens' count goes on after a prompt."""

    supports_mrope: ClassVar[Literal[True]] = True
    whole_prompts = True
    body: ClassVar[type[LlamaModel]] = LlamaGenTextModel
    kept: ClassVar[tuple[str, ...]] = ("model.captions.text_encoder.", "model.captions.uncond_embedding")

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        if vllm_config.scheduler_config.enable_chunked_prefill:
            raise NotImplementedError("LlamaGen's text is read whole: chunked prefill is not possible")
        if not vllm_config.model_config.enforce_eager:
            raise NotImplementedError(
                "how LlamaGen's text is embedded depends on the prompts, which cannot be compiled; leave "
                "engine.enforce_eager true"
            )
        super().__init__(vllm_config=vllm_config, prefix=prefix)

    def add_condition(self) -> None:
        self.model.captions = Captions(self.config)

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list[Any]) -> tuple[Tensor, int]:
        """Positions [3, P] of a prompt, and what is added to the index of a token after it."""
        length = len(input_tokens)
        return torch.arange(length).expand(3, -1), self.config.condition_tokens - length
