"""How LlamaGen (arXiv 2406.06525) reads a prompt, by trainer and engines."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.t5.modeling_t5 import T5Stack


class Conditions:
    """What LlamaGen's settings say of the ids in front of an image: a class, or the captions' positions."""

    @property
    def condition_tokens(self: Any) -> int:
        """Positions in front of the codes."""
        return 1 if self.caption_config is None else self.caption_tokens

    @property
    def first_code(self: Any) -> int:
        """The token id of code 0."""
        return self.num_classes + 1 if self.caption_config is None else self.caption_config.vocab_size


class Captions(nn.Module):
    """Text tokens [B, T] to embeddings [B, T, H]: T5's features, which nothing trains, and two layers. Of a prompt of n
    null tokens the last n of the learned unconditional features stand in, as published."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        own = config.caption_config
        self.pad, self.null, self.most = own.pad_token_id, config.first_code - 1, config.caption_tokens
        # The stack alone: T5EncoderModel has its table twice, and inside of another model they are not tied.
        self.text_encoder = T5Stack(own)
        self.fc1 = nn.Linear(own.d_model, config.hidden_size, bias=False)
        self.fc2 = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.uncond_embedding = nn.Parameter(torch.zeros(config.caption_tokens, own.d_model))

    def forward(self, ids_BT: Tensor, text_BT: Tensor) -> Tensor:
        """`text_BT`: which of `ids_BT` are text or null tokens; elsewhere the result means nothing."""
        null_BT = text_BT & (ids_BT == self.null)
        to_end_BT = null_BT.flip(1).cumsum(1).flip(1)
        features = self.uncond_embedding[(self.most - to_end_BT).clamp(0, self.most - 1)]
        worded_B = (text_BT & ~null_BT).any(1)
        if worded_B.any():
            encoded = self._encoded(ids_BT[worded_B].masked_fill(~text_BT[worded_B], self.pad))
            features = features.index_put((worded_B,), encoded.to(features.dtype))
        return self.fc2(nn.functional.gelu(self.fc1(features), approximate="tanh"))

    @torch.no_grad()
    def _encoded(self, ids_RT: Tensor) -> Tensor:
        """Each different prompt once, in evaluation mode: T5 has dropout."""
        different, which_R = ids_RT.unique(dim=0, return_inverse=True)
        seen = different != self.pad
        return self.text_encoder.eval()(input_ids=different, attention_mask=seen).last_hidden_state[which_R]
