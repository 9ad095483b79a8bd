"""GLM-Image's prior as vLLM runs it: a Llama with four norms a layer and positions of rows and columns.

vLLM counts on from a prompt by one a token, the same in each of M-RoPE's three channels; a code's row and column follow
from how many codes were drawn. So what it is told to count on from is the prompt's end and, far below it, nothing: both
are read out of the one number again.
"""

import copy
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaModel
from vllm.sequence import IntermediateTensors

from rollouts.contract import Grid
from rollouts.grid_positions import grid_positions
from rollouts.vllm_engine.families import InnerLlama

FOLD = 1 << 20
"""More than positions in a sequence. A drawn token n behind a prompt that ends at position e is at (e + 1) FOLD + n."""


class GlmImageLayer(LlamaDecoderLayer):
    """A layer that norms what attention and MLP give, too."""

    def __init__(self, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config, prefix)
        config = vllm_config.model_config.hf_config
        self.post_self_attn_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_mlp_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, positions: Tensor, hidden_states: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        if residual is None:
            hidden, residual = self.input_layernorm(hidden_states), hidden_states
        else:
            hidden, residual = self.input_layernorm(hidden_states, residual)
        hidden = self.post_self_attn_layernorm(self.self_attn(positions=positions, hidden_states=hidden))
        hidden, residual = self.post_attention_layernorm(hidden, residual)
        return self.post_mlp_layernorm(self.mlp(hidden)), residual


# Positions are [3, N], and a Llama's [N]: compiled, it must know along which dimension steps differ.
@support_torch_compile(
    dynamic_arg_dims={"input_ids": 0, "positions": -1, "intermediate_tensors": 0, "inputs_embeds": 0}
)
class GlmImageModel(LlamaModel):
    """Takes positions as vLLM counts them."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", layer_type: Any = GlmImageLayer) -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=layer_type)
        told = self.config.rollouts_grid
        self.image: tuple[int, int] = tuple(told["image"])
        self.grid = Grid(told["rows"], told["cols"], preview=told["preview"] and tuple(told["preview"]))
        self.drawn_3L: Tensor
        self.register_buffer("drawn_3L", self.places([self.image[0]] * self.grid.length), persistent=False)

    def places(self, ids: Sequence[int]) -> Tensor:
        """Positions [3, T] of the first tokens of a sequence."""
        ids_BT = torch.tensor(ids).unsqueeze(0)
        return grid_positions(self.grid, self.image, ids_BT, torch.ones_like(ids_BT, dtype=torch.bool))[:, 0]

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None,
        inputs_embeds: Tensor | None = None,
        **named: Any,
    ) -> Any:
        nth_N, end_N = positions[0] % FOLD, positions[0] // FOLD - 1
        drawn_3N = end_N + self.drawn_3L[:, nth_N.clamp_max(self.grid.length - 1)]
        counted_3N = torch.where(end_N >= 0, drawn_3N, positions)
        return super().forward(input_ids, counted_3N, intermediate_tensors, inputs_embeds, **named)


class GlmImage(InnerLlama):
    """The head decides codes and the image's end; logits of text, which nothing draws, are the lowest number there
    is."""

    supports_mrope: ClassVar[Literal[True]] = True
    packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}  # noqa: RUF012 (vLLM's own attribute)
    parts: ClassVar[dict[str, str | None]] = {
        "model.visual.": None, "model.vqmodel.": None, "model.language_model.": "model.",
    }  # fmt: skip

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        if get_tensor_model_parallel_world_size() > 1:
            raise NotImplementedError("GLM-Image's joined gate and up matrix is not spread over devices; use one")
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=GlmImageLayer)

    def inner_config(self, whole: Any) -> Any:
        """As a Llama: the head's vocabulary, and biases of queries, keys and values alone."""
        text = copy.deepcopy(whole.get_text_config())
        text.qkv_bias, text.attention_bias = text.attention_bias, False
        text.embedded_size, text.vocab_size = text.vocab_size, text.vision_vocab_size
        text.rollouts_grid, text.tie_word_embeddings = whole.rollouts_grid, whole.tie_word_embeddings
        return text

    def _init_model(self, vllm_config: VllmConfig, prefix: str = "", layer_type: Any = GlmImageLayer) -> GlmImageModel:
        own = copy.deepcopy(vllm_config.model_config.hf_config)
        own.vocab_size = own.embedded_size
        return GlmImageModel(vllm_config=vllm_config.with_hf_config(own), prefix=prefix, layer_type=layer_type)

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list[Any]) -> tuple[Tensor, int]:
        """Positions [3, P] of a prompt, and what is added to the index of a token after it."""
        model, length = cast(GlmImageModel, self.model), len(input_tokens)
        places_3T = model.places([*input_tokens, model.image[0]])
        return places_3T[:, :length], (int(places_3T[0, length]) + 1) * FOLD - length

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        codes = self.logits_processor(self.lm_head, hidden_states)
        more = self.config.embedded_size - codes.shape[-1]
        return F.pad(codes, (0, more), value=torch.finfo(codes.dtype).min)
