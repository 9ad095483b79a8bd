"""A Llama that carries the conditional and the unconditional stream of a guided sample in one request.

The unconditional stream's tokens are a function of the conditional ones (`Layout.unconditional`), so nothing that a
scheduler does (chunks, preemption, shared prefixes) can part the two. Each layer has a second attention with keys and
values of its own under the same block table; weights are shared. Logits come out side by side: [rows, 2 x vocabulary].
"""

from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.llama import LlamaAttention, LlamaDecoderLayer, LlamaForCausalLM, LlamaModel

from rollouts.vllm_engine.plugin import STREAMS


class TwoStreamAttention(LlamaAttention):
    """Tokens [2 N, H]: the conditional ones, then the unconditional ones."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.attn_uncond = Attention(
            self.num_heads,
            self.head_dim,
            self.scaling,
            num_kv_heads=self.num_kv_heads,
            cache_config=settings["cache_config"],
            quant_config=settings["quant_config"],
            prefix=f"{settings['prefix']}.attn_uncond",
        )

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        qkv, _ = self.qkv_proj(hidden_states)
        q, k, v = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        q, k = self.rotary_emb(positions, q, k)
        half = len(positions) // STREAMS
        cond = self.attn(q[:half], k[:half], v[:half])
        uncond = self.attn_uncond(q[half:], k[half:], v[half:])
        output, _ = self.o_proj(torch.cat([cond, uncond]))
        return output


class TwoStreamLayer(LlamaDecoderLayer):
    """A layer with that attention."""

    def __init__(self, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config, prefix, attn_layer_type=TwoStreamAttention)


class TwoStreamModel(LlamaModel):
    """Hidden states [N, 2 H], so that vLLM's picking of rows takes both streams along."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=TwoStreamLayer)
        null = self.config.rollouts_null
        table_V = torch.arange(self.config.vocab_size)
        table_V[slice(*null["text"])] = null["token"]
        table_V[null["given"]] = torch.tensor(null["given"])
        self.register_buffer("uncond_V", table_V, persistent=False)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any,
        inputs_embeds: Any = None,
        **_: Any,
    ) -> Tensor:
        if input_ids is None or intermediate_tensors is not None:
            raise NotImplementedError("the two-stream model takes token ids, and all its layers in one place")
        hidden = self.embed_input_ids(torch.cat([input_ids, self.uncond_V[input_ids]]))
        both, residual = positions.repeat(STREAMS), None
        for layer in self.layers:
            hidden, residual = layer(both, hidden, residual)
        hidden, _ = self.norm(hidden, residual)
        return torch.cat(hidden.chunk(STREAMS), dim=-1)


class TwoStreamLlama(LlamaForCausalLM):
    """`streams` tells the engine that one request carries two."""

    streams = STREAMS

    def _init_model(self, vllm_config: VllmConfig, prefix: str = "", layer_type: Any = None) -> TwoStreamModel:
        return TwoStreamModel(vllm_config=vllm_config, prefix=prefix)

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        rows = torch.cat(hidden_states.chunk(STREAMS, dim=-1))
        return torch.cat(self.logits_processor(self.lm_head, rows).chunk(STREAMS), dim=-1)
