"""Show-o (Xie et al. 2024, arXiv 2408.12528): Phi-1.5 with one table for text and image codes, and omni-attention: text
is causal, an image's positions see all of it and the text before it.

Weights have the published names: `showo.model.layers.0.self_attn.q_proj.weight`. Shapes: B rows, T positions.
"""

from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PhiConfig, PhiForCausalLM, PhiModel, PreTrainedModel, PreTrainedTokenizerBase
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.phi.modeling_phi import PhiPreTrainedModel
from transformers.utils import SAFE_WEIGHTS_NAME, WEIGHTS_NAME
from transformers.utils.hub import cached_file


class ShowoConfig(PhiConfig):
    """Phi-1.5's sizes, and the table. A published config.json names the table alone.

    Raises ValueError for the variant that sees pictures through CLIP, whose projector nothing here has a use for.
    """

    model_type = "showo"
    added_tokens: ClassVar[tuple[str, ...]] = (
        "[PAD]", "<|soi|>", "<|eoi|>", "<|sov|>", "<|eov|>", "<|t2i|>", "<|mmu|>", "<|t2v|>", "<|v2v|>", "<|lvg|>",
    )  # fmt: skip
    """What the tokenizer of the language model is given in addition, in this order."""

    vocab_size: int = 58498
    llm_vocab_size: int = 50295
    llm_model_path: str = "microsoft/phi-1_5"
    codebook_size: int = 8192
    num_vq_tokens: int = 256
    mask_token_id: int = 58497
    w_clip_vit: bool = False
    bos_token_id: int | None = 50256
    eos_token_id: int | list[int] | None = 50256
    is_causal: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.w_clip_vit:
            raise ValueError("w_clip_vit: this Show-o reads pictures through CLIP; give the checkpoint without it")

    @property
    def begin_image(self) -> int:
        """The id of `<|soi|>`."""
        return self.llm_vocab_size + self.added_tokens.index("<|soi|>")

    @property
    def end_image(self) -> int:
        """The id of `<|eoi|>`."""
        return self.llm_vocab_size + self.added_tokens.index("<|eoi|>")

    @classmethod
    def published(cls, source: str, stated: dict[str, Any]) -> "ShowoConfig":
        """Of a checkpoint as its authors keep it: `stated` is its config.json, and whether queries and keys are normed,
        the weights' names say."""
        known = {name: value for name, value in stated.items() if not name.startswith("_")}
        normed = any("q_layernorm" in name for name in _weight_names(source))
        return cls.from_dict({"qk_layernorm": normed, "architectures": [Showo.__name__]} | known)

    def complete(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Give the language model's tokenizer the tokens that the checkpoint's table has."""
        tokenizer.add_special_tokens({"pad_token": self.added_tokens[0]})
        tokenizer.add_tokens(list(self.added_tokens[1:]), special_tokens=True)


class OmniPhiModel(PhiModel):
    """Phi's body under omni-attention."""

    def forward(  # pyrefly: ignore[bad-override]
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: None = None,
        inputs_embeds: None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """`attention_mask` [B, T]: False where padding is. ValueError where a cache is asked for, or embeddings are
        given, which do not say where an image is."""
        if past_key_values is not None or use_cache or inputs_embeds is not None:
            raise ValueError("omni-attention reads the whole sequence of tokens: no cache, no embeddings")
        embedded_BTH = self.embed_tokens(input_ids)
        mask = omni_mask(self.config, input_ids, attention_mask, embedded_BTH)
        return super().forward(
            inputs_embeds=embedded_BTH,  # pyrefly: ignore
            attention_mask=mask,
            position_ids=position_ids,  # pyrefly: ignore
            use_cache=False,
            **kwargs,
        )


class OmniPhiForCausalLM(PhiForCausalLM):
    """Phi with its head, under omni-attention."""

    def __init__(self, config: ShowoConfig) -> None:
        PhiPreTrainedModel.__init__(self, config)
        self.model = OmniPhiModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=True)
        self.post_init()


class Showo(PreTrainedModel):
    """Show-o without the CLIP encoder."""

    config_class = ShowoConfig
    base_model_prefix = "showo"
    supports_gradient_checkpointing = True
    _no_split_modules = ["PhiDecoderLayer"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_attention_backend = True

    def __init__(self, config: ShowoConfig) -> None:
        super().__init__(config)
        self.showo = OmniPhiForCausalLM(config)
        self.post_init()

    @property
    def base_model(self) -> nn.Module:
        """What gives hidden states."""
        return self.showo.model

    def get_input_embeddings(self) -> nn.Module:
        return self.showo.model.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        return self.showo.lm_head

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """As `PhiForCausalLM`; the logits of an image position are of its own token, of a text position the next's."""
        return self.showo(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, **kwargs)


def omni_mask(config: Any, ids_BT: Tensor, seen_BT: Tensor | None, embedded_BTH: Tensor) -> Any:
    """What each position sees, as the attention in use takes it: those before it, and from `<|soi|>` to `<|eoi|>` the
    whole sequence; padding in neither case."""
    begins_BT, ends_BT = ids_BT == config.begin_image, ids_BT == config.end_image
    image_BT = (begins_BT.cumsum(1) > ends_BT.cumsum(1)) | ends_BT

    def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) | image_BT[row, query]

    return create_bidirectional_mask(config, embedded_BTH, seen_BT, and_mask_function=sees)


def _weight_names(source: str) -> list[str]:
    """Of all weights, without reading them; none where there is no file of them."""
    for name in (SAFE_WEIGHTS_NAME, WEIGHTS_NAME):
        file = cached_file(source, name, _raise_exceptions_for_missing_entries=False)
        if file is not None and Path(file).suffix == ".safetensors":
            with safe_open(file, framework="pt") as opened:
                return list(opened.keys())
        if file is not None:
            return list(torch.load(file, map_location="cpu", weights_only=True, mmap=True))
    return []
