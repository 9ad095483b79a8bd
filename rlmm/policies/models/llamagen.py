"""LlamaGen (Sun et al. 2024, arXiv 2406.06525) as a transformers model: transformers has no class of it.

A Llama over image codes with a rotary embedding of rows and columns, behind a condition: one class, or the features
that a frozen T5 has of a prompt, through two layers. Published weights
rotate neighbouring pairs of channels, these the two halves of a head, as transformers' Llama does: `llamagen_convert`
reorders the rows of the projections.

Shapes: B rows, T positions, H hidden size, D head size.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    JanusVQVAE,
    JanusVQVAEConfig,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaModel

from rollouts.captions import Captions, Conditions

CLASSES = 1000


class LlamaGenConfig(Conditions, LlamaConfig):
    """`vocab_size` counts image codes. Token ids are conditions first (classes, or T5's text tokens), the last of which
    stands for none, then codes.

    Attributes:
        num_classes: classes beside the null class.
        caption_config: of the T5 encoder, where the condition is text; else None.
        caption_tokens: the most tokens of a prompt.
        grid_size: rows, and columns, of codes.
        vq_config: of the image tokenizer, whose network is Janus'.
    """

    model_type = "llamagen"
    sub_configs = {"vq_config": JanusVQVAEConfig, "caption_config": T5Config}  # noqa: RUF012 (transformers' own attribute)

    vocab_size: int = 16384
    rms_norm_eps: float = 1e-5
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    num_classes: int = CLASSES
    grid_size: int = 16
    vq_config: Any = None
    caption_config: Any = None
    caption_tokens: int = 120

    def __post_init__(self, **kwargs: Any) -> None:
        if not isinstance(self.vq_config, JanusVQVAEConfig):
            given: dict[str, Any] = {"num_patches": self.grid_size, **(self.vq_config or {})}
            self.vq_config = JanusVQVAEConfig(**given)
        if isinstance(self.caption_config, dict):
            alone: dict[str, Any] = {"is_encoder_decoder": False, "is_decoder": False, "use_cache": False}
            self.caption_config = T5Config(**{**self.caption_config, **alone})
        self.max_position_embeddings = self.condition_tokens + self.grid_size**2
        super().__post_init__(**kwargs)


class GridRotary(nn.Module):
    """Cosines and sines [B, T, D] of positions [B, T]: half of a head's channel pairs turn with the code's row, half
    with its column. Those of the condition are zero, as published: its queries and keys vanish, and every position
    attends to it with a score of 0."""

    def __init__(self, config: LlamaGenConfig) -> None:
        super().__init__()
        self.before, self.grid = config.condition_tokens, config.grid_size
        rope: Any = config.rope_parameters
        self.base = float(rope["rope_theta"])
        self.pairs = (config.head_dim or config.hidden_size // config.num_attention_heads) // 2

    def forward(self, like: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        quarter = torch.arange(self.pairs // 2, device=position_ids.device, dtype=torch.float32)
        frequency = self.base ** (-quarter / (self.pairs // 2))
        place_BT1 = (position_ids - self.before).unsqueeze(-1)
        angles = torch.cat([place_BT1 // self.grid * frequency, place_BT1 % self.grid * frequency], -1)
        turned = (place_BT1 >= 0).float()
        cos, sin = angles.cos() * turned, angles.sin() * turned
        return torch.cat([cos, cos], -1).to(like.dtype), torch.cat([sin, sin], -1).to(like.dtype)


class LlamaGenModel(LlamaModel):
    """The body. `embed_tokens` holds the codes, `class_embedding` the classes and the null class, or `captions` what
    makes embeddings of text."""

    config_class = LlamaGenConfig

    def __init__(self, config: LlamaGenConfig) -> None:
        super().__init__(config)
        if config.caption_config is None:
            self.class_embedding = nn.Embedding(config.num_classes + 1, config.hidden_size)
        else:
            self.captions = Captions(config)
        self.rotary_emb = GridRotary(config)  # pyrefly: ignore
        self.post_init()

    def embedded(self, ids_BT: Tensor) -> Tensor:
        """Embeddings [B, T, H] of conditions and codes."""
        first = self.config.first_code
        code_BT = ids_BT >= first
        codes_BTH = self.embed_tokens((ids_BT - first).clamp_min(0))
        if self.config.caption_config is None:
            conditions_BTH = self.class_embedding(ids_BT.clamp_max(first - 1))
        elif code_BT.all():
            return codes_BTH
        else:
            width = int((~code_BT).any(0).nonzero().max()) + 1  # conditions come first
            text_BW = ~code_BT[:, :width] & (ids_BT[:, :width] != self.captions.pad)
            captions_BWH = self.captions(ids_BT[:, :width], text_BW)
            conditions_BTH = nn.functional.pad(captions_BWH, (0, 0, 0, ids_BT.shape[1] - width))
        return torch.where(code_BT.unsqueeze(-1), codes_BTH, conditions_BTH)

    def positions(self, ids_BT: Tensor) -> Tensor:
        """[B, T], of whole sequences: codes are counted from where the longest condition ends; conditions have none."""
        code_BT = ids_BT >= self.config.first_code
        return (self.config.condition_tokens - 1 + code_BT.long().cumsum(-1)) * code_BT

    def forward(  # pyrefly: ignore
        self, input_ids: Tensor | None = None, *, inputs_embeds: Tensor | None = None, **settings: Any
    ) -> BaseModelOutputWithPast:
        if input_ids is not None:
            if settings.get("position_ids") is None and settings.get("past_key_values") is None:
                settings["position_ids"] = self.positions(input_ids)
            inputs_embeds = self.embedded(input_ids)
        return super().forward(inputs_embeds=inputs_embeds, **settings)


class LlamaGenForImageGeneration(LlamaForCausalLM):
    """The body, a head over codes, and the image tokenizer, which no forward uses."""

    config_class = LlamaGenConfig
    config: LlamaGenConfig  # pyrefly: ignore

    def __init__(self, config: LlamaGenConfig) -> None:
        super().__init__(config)
        self.model = LlamaGenModel(config)
        self.vqmodel = JanusVQVAE(config.vq_config)
        self.post_init()

    def generate(self, *inputs: Any, **settings: Any) -> Any:
        if self.config.caption_config is not None:
            raise NotImplementedError(
                "transformers counts positions from the first token, and a code's row and column do not depend on how "
                "long its prompt is; sample with rlmm"
            )
        return super().generate(*inputs, **settings)  # pyrefly: ignore

    def forward(self, *inputs: Any, labels: None = None, **settings: Any) -> CausalLMOutputWithPast:  # pyrefly: ignore
        """Logits of the whole vocabulary: those of conditions, which nothing draws, are the lowest number there is."""
        if labels is not None:
            raise ValueError("labels: a loss over image codes is the trainer's; take it from the logits")
        output = super().forward(*inputs, **settings)
        lowest = torch.finfo(output.logits.dtype).min
        output.logits = nn.functional.pad(output.logits, (self.config.first_code, 0), value=lowest)
        return output
