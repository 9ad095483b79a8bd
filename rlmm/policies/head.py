"""Logits of a vocabulary slice, and log-probs of chosen tokens, without ever holding [B, S, V]."""

from collections.abc import Sequence
from typing import cast

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from rollouts.law import Law, law_log_probs, unpack_support

CHUNK = 4096
"""Decisions whose logits are held at once; beyond it the backward recomputes them chunk by chunk."""


def sliced_head(head: nn.Module, hidden_NH: Tensor, vocabulary: tuple[int, int]) -> Tensor:
    """Logits [N, V] of rows `vocabulary` of an output head: nn.Linear, or the same under LoRA."""
    rows = slice(*vocabulary)
    if isinstance(head, LoraLinear):
        return _lora_head(head, hidden_NH, rows)
    if not isinstance(head, nn.Linear):
        raise TypeError(
            f"the output head is a {type(head).__name__}, and only nn.Linear and LoRA on it can be sliced; "
            "give the policy family a `head` of its own"
        )
    return F.linear(hidden_NH, head.weight[rows], None if head.bias is None else head.bias[rows])


def _lora_head(head: LoraLinear, hidden_NH: Tensor, rows: slice) -> Tensor:
    base = cast(nn.Linear, head.base_layer)
    logits = F.linear(hidden_NH, base.weight[rows], None if base.bias is None else base.bias[rows])
    if head.disable_adapters:
        return logits
    for name in head.active_adapters:
        if name in head.lora_A:
            low = head.lora_A[name](head.lora_dropout[name](hidden_NH))
            logits = logits + head.scaling[name] * F.linear(low, cast(nn.Linear, head.lora_B[name]).weight[rows])
    return logits


def decision_log_probs(
    head: nn.Module,
    law: Law,
    names: Sequence[str],
    hidden_KNH: Tensor,
    tokens_N: Tensor,
    support_NC: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies [N] of chosen tokens under the law, computed in chunks.

    Args:
        names: the stream each of the K leading entries of `hidden_KNH` belongs to.
        tokens_N: token ids inside `law.vocabulary`.
        support_NC: the packed support stored at sampling, where the law keeps one.
    """

    def chunk(hidden: Tensor, tokens: Tensor, packed: Tensor | None) -> tuple[Tensor, Tensor]:
        size = law.vocabulary[1] - law.vocabulary[0]
        logits = sliced_head(head, hidden.flatten(0, 1), law.vocabulary).unflatten(0, hidden.shape[:2])
        support = None if packed is None else unpack_support(packed, size)
        by_stream = dict(zip(names, logits, strict=True))
        logp_NV, _ = law_log_probs(law, by_stream, support_NV=support, replay=True)
        chosen = logp_NV.gather(-1, (tokens - law.vocabulary[0]).unsqueeze(-1)).squeeze(-1)
        with torch.no_grad():
            entropy = torch.special.entr(logp_NV.exp()).sum(-1)
        return chosen, entropy

    if len(tokens_N) <= CHUNK:
        return chunk(hidden_KNH, tokens_N, support_NC)
    parts = []
    for start in range(0, len(tokens_N), CHUNK):
        at = slice(start, start + CHUNK)
        packed = None if support_NC is None else support_NC[at]
        parts.append(checkpoint(chunk, hidden_KNH[:, at], tokens_N[at], packed, use_reentrant=False))
    chosen, entropy = zip(*parts, strict=True)
    return torch.cat(chosen), torch.cat(entropy)
