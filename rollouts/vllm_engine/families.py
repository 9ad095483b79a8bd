"""Published image-token models as vLLM runs them: the language model alone, for token ids in and logits out.

This vLLM has none of them. Each is its Llama with what the family does otherwise; image tokenizers and encoders stay
outside. Names are the checkpoint's on the way in (`checkpoint_mapper`) and out (`checkpoint_name`).
"""

import copy
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.janus.modeling_janus import JanusVQVAEAlignerMLP, JanusVQVAEHead
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.models.llama import LlamaAttention, LlamaDecoderLayer, LlamaForCausalLM, LlamaModel
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper


class InnerLlama(LlamaForCausalLM):
    """A Llama that is a part of a checkpoint. `parts`: the checkpoint's name prefix -> the one here; None: no part of
    it. `saved`: other prefixes, by which transformers saves them."""

    parts: ClassVar[dict[str, str | None]] = {}
    saved: ClassVar[dict[str, str | None]] = {}

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", **settings: Any) -> None:
        inner = self.inner_config(vllm_config.model_config.hf_config)
        super().__init__(vllm_config=vllm_config.with_hf_config(inner), prefix=prefix, **settings)

    def inner_config(self, whole: Any) -> Any:
        """The language model's."""
        return whole.get_text_config()

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        loader = AutoWeightsLoader(self)
        return loader.load_weights(weights, mapper=WeightsMapper(orig_to_new_prefix=self.saved | self.parts))

    def checkpoint_name(self, name: str) -> str:
        """What the checkpoint calls a weight of this model."""
        there = {own: theirs for theirs, own in self.parts.items() if own is not None}
        prefix = max((own for own in there if name.startswith(own)), key=len, default=None)
        return name if prefix is None else there[prefix] + name.removeprefix(prefix)


class Emu3(InnerLlama):
    """Emu3 (arXiv 2409.18869)."""

    parts: ClassVar[dict[str, str | None]] = {"model.vqmodel.": None, "model.text_model.": "model."}
    saved: ClassVar[dict[str, str | None]] = {
        "vqmodel.": None, "text_model.model.": "model.", "text_model.lm_head.": "lm_head.",
    }  # fmt: skip


class HeadNorm(nn.Module):
    """Chameleon's layer norm of queries and keys: over a head, with weights of each head's own. [N, heads x D]."""

    def __init__(self, heads: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(heads, size))
        self.bias = nn.Parameter(torch.zeros(heads, size))

    def forward(self, x: Tensor) -> Tensor:
        heads_NHD = x.unflatten(-1, self.weight.shape)
        normed_NHD = F.layer_norm(heads_NHD, self.weight.shape[-1:], eps=1e-5)
        return (normed_NHD * self.weight + self.bias).flatten(-2)


class ChameleonAttention(LlamaAttention):
    """Llama's with normed queries and keys."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        if get_tensor_model_parallel_world_size() > 1:
            raise NotImplementedError("Chameleon's norms are of each head's own, not spread over devices; use one")
        self.q_norm, self.k_norm = HeadNorm(self.num_heads, self.head_dim), HeadNorm(self.num_kv_heads, self.head_dim)

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        qkv, _ = self.qkv_proj(hidden_states)
        q, k, v = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        q, k = self.rotary_emb(positions, self.q_norm(q), self.k_norm(k))
        output, _ = self.o_proj(self.attn(q, k, v))
        return output


class ChameleonLayer(LlamaDecoderLayer):
    """A layer with that attention."""

    def __init__(self, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config, prefix, attn_layer_type=ChameleonAttention)


class Chameleon(InnerLlama):
    """Chameleon (arXiv 2405.09818), every token allowed: the law says which may be drawn."""

    parts: ClassVar[dict[str, str | None]] = {"model.vqmodel.": None}

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        if vllm_config.model_config.hf_config.swin_norm:
            raise NotImplementedError("Chameleon-30B's order of norms (swin_norm) is not there; use engine.kind torch")
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=ChameleonLayer)


class JanusModel(LlamaModel):
    """Ids from `codes_from` on are image codes, with an embedding of their own."""

    codes_from: int
    generation_embeddings: nn.Embedding
    generation_aligner: nn.Module

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        text_NH = self.embed_tokens(input_ids.clamp_max(self.codes_from - 1))
        codes_NH = self.generation_aligner(self.generation_embeddings((input_ids - self.codes_from).clamp_min(0)))
        return torch.where((input_ids >= self.codes_from).unsqueeze(-1), codes_NH, text_NH)


class Janus(InnerLlama):
    """Janus and Janus-Pro (arXiv 2501.17811): logits of the text head, then those of the generation head."""

    parts: ClassVar[dict[str, str | None]] = {
        "model.vqmodel.": None,
        "model.vision_model.": None,
        "model.aligner.": None,
        "model.generation_embeddings.": "model.generation_embeddings.",
        "model.generation_aligner.": "model.generation_aligner.",
        "model.generation_head.": "generation_head.",
        "model.language_model.": "model.",
    }

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        vq = vllm_config.model_config.hf_config.vq_config
        self.model.codes_from = self.config.vocab_size
        self.model.generation_embeddings = nn.Embedding(vq.num_embeddings, vq.embed_dim)
        self.model.generation_aligner = JanusVQVAEAlignerMLP(vq)
        self.generation_head = JanusVQVAEHead(vq)

    def inner_config(self, whole: Any) -> Any:
        """vLLM is told of both vocabularies as one (`plugin.served_overrides`); the language model has its own."""
        text = copy.deepcopy(whole.get_text_config())
        text.vocab_size -= whole.vq_config.num_embeddings
        return text

    def _init_model(self, vllm_config: VllmConfig, prefix: str = "", layer_type: Any = LlamaDecoderLayer) -> JanusModel:
        return JanusModel(vllm_config=vllm_config, prefix=prefix, layer_type=layer_type)

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        text = self.logits_processor(self.lm_head, hidden_states)
        return torch.cat([text, self.generation_head(hidden_states).to(text.dtype)], dim=-1)
