"""LLaDA (Nie et al. 2025, arXiv 2502.09992), a Llama whose attention is bidirectional, in the two image-making forms:
MMaDA (arXiv 2505.15809) and Lumina-DiMOO (arXiv 2510.06308).

Weights have the published names, which are OLMo's: `model.transformer.blocks.0.attn_out.weight`. Shapes: B rows, T
positions, H hidden size, D head size.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb, eager_attention_forward

FIXED: dict[str, Any] = {
    "block_type": "llama", "layer_norm_type": "rms", "layer_norm_with_affine": True, "activation_type": "silu",
    "rope": True, "alibi": False, "attention_layer_norm": False, "include_bias": False, "include_qkv_bias": False,
    "input_emb_norm": False, "scale_logits": False, "weight_tying": False, "block_group_size": 1,
}  # fmt: skip
"""Of the switches that the published code has, the settings that the published checkpoints use: the only ones here."""


class LLaDAConfig(PretrainedConfig):
    """Sizes under their published names, of LLaDA-8B by default, and under transformers'.

    Raises ValueError where a checkpoint asks for a variant of the architecture that was never published.
    """

    model_type = "llada"
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "d_model",
        "num_attention_heads": "n_heads",
        "num_key_value_heads": "n_kv_heads",
        "num_hidden_layers": "n_layers",
        "intermediate_size": "mlp_hidden_size",
        "initializer_range": "init_std",
        "tie_word_embeddings": "weight_tying",
    }
    longest: ClassVar[int] = 1024 + 1 + (1 + 64 * 65 + 1) + 1
    """Lumina-DiMOO is trained on as much: an instruction of up to 1024 tokens, `<answer>`, an image of 1024x1024 pixels
    with a begin, row ends and an end, `</answer>`. RoPE knows no limit, and its configuration names LLaDA's."""

    vocab_size: int = 126464
    embedding_size: int | None = None
    d_model: int = 4096
    n_layers: int = 32
    n_heads: int = 32
    n_kv_heads: int | None = None
    mlp_hidden_size: int = 12288
    max_sequence_length: int = 4096
    rope_theta: float = 500000.0
    rms_norm_eps: float = 1e-5
    init_std: float = 0.02
    weight_tying: bool = False
    mask_token_id: int = 126336
    bos_token_id: int | None = 126080
    eos_token_id: int | None = 126081
    pad_token_id: int | None = 126081
    is_causal: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        self.n_kv_heads = self.n_heads if self.n_kv_heads is None else self.n_kv_heads
        super().__post_init__(**kwargs)
        for name, published in FIXED.items():
            given = getattr(self, name, published)
            if given != published:
                raise ValueError(
                    f"config.json says {name}: {given!r}, and every published checkpoint of this class says "
                    f"{published!r}: this is another architecture; use the code that it came with"
                )

    @property
    def max_position_embeddings(self) -> int:
        return max(self.max_sequence_length, self.longest)

    @property
    def rows(self) -> int:
        """Rows of the embedding and of the head, of which the last ones may stand for nothing."""
        return max(self.vocab_size, self.embedding_size or 0)


class MMadaConfig(LLaDAConfig):
    """MMaDA's; `num_vq_tokens` and `llm_vocab_size` are of its training scripts, and say nothing about the weights."""

    model_type = "mmada"
    longest: ClassVar[int] = 0
    vocab_size: int = 134656
    codebook_size: int = 8192


class LLaDALlamaBlock(GradientCheckpointingLayer):
    """Pre-norm attention and gated MLP, as in Llama."""

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__()
        self.config, width, heads = config, config.d_model, config.n_heads
        assert config.n_kv_heads is not None, "filled in by the configuration"
        self.head_dim = width // heads
        self.num_key_value_groups = heads // config.n_kv_heads
        self.is_causal, self.scaling = False, self.head_dim**-0.5
        kv_width = config.n_kv_heads * self.head_dim
        self.attn_norm = LlamaRMSNorm(width, eps=config.rms_norm_eps)
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, kv_width, bias=False)
        self.v_proj = nn.Linear(width, kv_width, bias=False)
        self.attn_out = nn.Linear(width, width, bias=False)
        self.ff_norm = LlamaRMSNorm(width, eps=config.rms_norm_eps)
        self.ff_proj = nn.Linear(width, config.mlp_hidden_size, bias=False)
        self.up_proj = nn.Linear(width, config.mlp_hidden_size, bias=False)
        self.ff_out = nn.Linear(config.mlp_hidden_size, width, bias=False)

    def forward(self, hidden_BTH: Tensor, mask: Any, rotary: tuple[Tensor, Tensor]) -> Tensor:
        hidden_BTH = hidden_BTH + self.attn_out(self._attended(self.attn_norm(hidden_BTH), mask, rotary))
        normed_BTH = self.ff_norm(hidden_BTH)
        return hidden_BTH + self.ff_out(F.silu(self.ff_proj(normed_BTH)) * self.up_proj(normed_BTH))

    def _attended(self, normed_BTH: Tensor, mask: Any, rotary: tuple[Tensor, Tensor]) -> Tensor:
        shape = (*normed_BTH.shape[:-1], -1, self.head_dim)
        query, key, value = (
            project(normed_BTH).view(shape).transpose(1, 2) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        # Rotated in the angles' own precision, float32 at least, whatever the weights are held in.
        rotated = apply_rotary_pos_emb(query.to(rotary[0].dtype), key.to(rotary[0].dtype), *rotary)
        query, key = (turned.to(value.dtype) for turned in rotated)
        attend: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(
            str(self.config._attn_implementation), eager_attention_forward
        )
        made, _ = attend(self, query, key, value, mask, scaling=self.scaling, dropout=0.0)
        return made.reshape(normed_BTH.shape).contiguous()


class LLaDAModel(nn.Module):
    """Embedding, blocks and final norm. The head lies among them, where the published weights have it."""

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.rows, config.d_model),
                "blocks": nn.ModuleList([LLaDALlamaBlock(config) for _ in range(config.n_layers)]),
                "ln_f": LlamaRMSNorm(config.d_model, eps=config.rms_norm_eps),
                "ff_out": nn.Linear(config.d_model, config.rows, bias=False),
            }
        )

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        past_key_values: None = None,
        use_cache: bool = False,
        output_hidden_states: bool = False,
    ) -> BaseModelOutput:
        """`attention_mask` [B, T]: False where padding is. ValueError where a cache is asked for: every position sees
        those that come later."""
        if past_key_values is not None or use_cache:
            raise ValueError("no cache is possible: a position's keys depend on what is decided after it")
        blocks: Any = self.transformer["blocks"]
        hidden_BTH = self.transformer["wte"](input_ids)
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        rotary = _angles(self.config, position_ids, hidden_BTH.dtype)
        mask = create_bidirectional_mask(self.config, hidden_BTH, attention_mask)
        states = [hidden_BTH]
        for block in blocks:
            hidden_BTH = block(hidden_BTH, mask, rotary)
            states.append(hidden_BTH)
        states[-1] = self.transformer["ln_f"](hidden_BTH)
        return BaseModelOutput(
            last_hidden_state=states[-1],  # pyrefly: ignore
            hidden_states=tuple(states) if output_hidden_states else None,  # pyrefly: ignore
        )


class LLaDAModelLM(PreTrainedModel):
    """LLaDA with its head."""

    config_class = LLaDAConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LLaDALlamaBlock"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_attention_backend = True

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__(config)
        self.model = LLaDAModel(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.transformer["wte"]

    def get_output_embeddings(self) -> nn.Module:
        return self.model.transformer["ff_out"]

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        past_key_values: None = None,
        use_cache: bool = False,
        output_hidden_states: bool = False,
        logits_to_keep: int = 0,
        **_: Any,
    ) -> CausalLMOutput:
        """Logits [B, T, V] of each position's own token; of the last `logits_to_keep` positions alone where not 0."""
        made = self.model(
            input_ids, attention_mask, position_ids, past_key_values=past_key_values, use_cache=use_cache,
            output_hidden_states=output_hidden_states,
        )  # fmt: skip
        kept_BTH = made.last_hidden_state[:, -logits_to_keep or None :]
        return CausalLMOutput(logits=self.model.transformer["ff_out"](kept_BTH), hidden_states=made.hidden_states)


class MMadaModelLM(LLaDAModelLM):
    """MMaDA: LLaDA-8B whose table goes on with image codes."""

    config_class = MMadaConfig


class LLaDAForMultiModalGeneration(LLaDAModelLM):
    """Lumina-DiMOO: LLaDA-8B whose table goes on with special tokens and image codes."""


def _angles(config: LLaDAConfig, position_BT: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines [B, T, D] of rotary position embeddings (RoFormer, arXiv 2104.09864), at least in float32."""
    dtype = torch.promote_types(dtype, torch.float32)
    size = config.d_model // config.n_heads
    power = torch.arange(0, size, 2, device=position_BT.device, dtype=torch.float32) / size
    angle_BTD = position_BT[..., None].to(dtype) * (1.0 / config.rope_theta**power).to(dtype)
    angle_BTD = torch.cat([angle_BTD, angle_BTD], -1)
    return angle_BTD.cos(), angle_BTD.sin()
