"""Logits of a vocabulary slice, and log-probs of chosen tokens, without ever holding [B, S, V].

Shapes: K streams, N decisions, H hidden size, V vocabulary slice, D inner size of a factor (H, or a LoRA rank).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from rollouts.law import Law, law_log_probs, mix_streams, unpack_support

LOGIT_BYTES = 64 << 20
"""Most bytes of logits held at once (a few copies of them exist); where there are more, the backward recomputes them."""


def sliced_head(head: nn.Module, hidden_NH: Tensor, vocabulary: tuple[int, int]) -> Tensor:
    """Logits [N, V] of rows `vocabulary` of an output head: nn.Linear, or the same under LoRA."""
    inputs, weights, bias_V = _factors(head, hidden_NH, slice(*vocabulary))
    return _logits(inputs, weights, bias_V)


def decision_log_probs(
    head: nn.Module,
    law: Law,
    names: Sequence[str],
    hidden_KNH: Tensor,
    tokens_N: Tensor,
    support_NC: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies [N] of chosen tokens under the law; the log-probs alone have a gradient.

    Args:
        names: the stream each of the K leading entries of `hidden_KNH` belongs to.
        tokens_N: token ids inside `law.vocabulary`.
        support_NC: the packed support stored at sampling, where the law keeps one.
    """
    inputs, weights, bias_V = _factors(head, hidden_KNH, slice(*law.vocabulary))
    replay = _Replay(law, tuple(names), tokens_N - law.vocabulary[0], support_NC)
    return cast(tuple[Tensor, Tensor], _Chosen.apply(replay, torch.is_grad_enabled(), bias_V, *inputs, *weights))


def _factors(head: nn.Module, hidden: Tensor, rows: slice) -> tuple[list[Tensor], list[Tensor], Tensor | None]:
    """Inputs [..., D] and weights [V, D] whose products add up to the logits, and a bias [V]: the head's own, then one
    pair an active adapter."""
    base = cast(nn.Module, head.base_layer) if isinstance(head, LoraLinear) else head
    if not isinstance(base, nn.Linear):
        raise TypeError(
            f"the output head is a {type(head).__name__}, and only nn.Linear and LoRA on it can be sliced; "
            "give the policy family a `head` of its own"
        )
    inputs, weights = [hidden], [base.weight[rows]]
    if isinstance(head, LoraLinear) and not head.disable_adapters:
        for name in head.active_adapters:
            if name in head.lora_A:
                inputs.append(head.scaling[name] * head.lora_A[name](head.lora_dropout[name](hidden)))
                weights.append(cast(nn.Linear, head.lora_B[name]).weight[rows])
    return inputs, weights, None if base.bias is None else base.bias[rows]


def _logits(inputs: Sequence[Tensor], weights: Sequence[Tensor], bias_V: Tensor | None) -> Tensor:
    logits = F.linear(inputs[0], weights[0], bias_V)
    for low, weight_VD in zip(inputs[1:], weights[1:], strict=True):
        logits = logits + F.linear(low, weight_VD)
    return logits


@dataclass(frozen=True)
class _Replay:
    """What was decided and under which law; `tokens_N` count from the slice's start."""

    law: Law
    names: tuple[str, ...]
    tokens_N: Tensor
    support_NC: Tensor | None

    def chunks(self, itemsize: int) -> list[slice]:
        """Runs of decisions whose logits, of all streams, fit in LOGIT_BYTES."""
        width = self.law.vocabulary[1] - self.law.vocabulary[0]
        size = max(1, LOGIT_BYTES // (width * len(self.names) * itemsize))
        return [slice(start, start + size) for start in range(0, len(self.tokens_N), size)]

    def log_probs(
        self, at: slice, inputs: Sequence[Tensor], weights: Sequence[Tensor], bias_V: Tensor | None
    ) -> Tensor:
        """Log-probs [n, V] of the decisions `at`, by the one function samplers use too."""
        logits_KNV = _logits([x_KND[:, at] for x_KND in inputs], weights, bias_V)
        by_stream = dict(zip(self.names, logits_KNV, strict=True))
        support = None if self.support_NC is None else unpack_support(self.support_NC[at], weights[0].shape[0])
        return law_log_probs(self.law, by_stream, support_NV=support, replay=True)[0]

    def slope(self, at: slice, logp_NV: Tensor) -> Tensor:
        """d log p(token) / d mixed logits [n, V] = (1[token] - p) / temperature. Destroys `logp_NV`."""
        slope_NV = logp_NV.exp_().neg_()
        token_N1 = self.tokens_N[at].unsqueeze(-1)
        slope_NV.scatter_add_(-1, token_N1, torch.ones_like(token_N1, dtype=slope_NV.dtype))
        return slope_NV.div_(self.law.temperature) if self.law.temperature != 1.0 else slope_NV

    def coefficients(self, like: Tensor) -> Tensor:
        """The factor [K] each stream's logits are mixed with: the mix is linear, so it is read off unit vectors."""
        unit_KK = torch.eye(len(self.names), dtype=like.dtype, device=like.device)
        return mix_streams(self.law, dict(zip(self.names, unit_KK, strict=True)), replay=True)


class _Chosen(torch.autograd.Function):
    """Chosen log-probs and entropies [N] from the factors of the logits.

    A log-prob's gradient by its hidden state does not depend on what comes after but for one factor, so the forward
    leaves it behind, [N, D], while it holds the logits. The weights' gradient does depend on it: where a weight is
    trained, the backward makes the logits again, unless they all fitted in one chunk.
    """

    @staticmethod
    def forward(
        ctx: Any, replay: _Replay, trains: bool, bias_V: Tensor | None, *factors: Tensor
    ) -> tuple[Tensor, Tensor]:
        inputs, weights = factors[: len(factors) // 2], factors[len(factors) // 2 :]
        needs = ctx.needs_input_grad[2:]
        ctx.weighs = needs[0] or any(needs[1 + len(inputs) :])
        parts = replay.chunks(weights[0].element_size())
        made: list[tuple[Tensor, ...]] = []
        kept = None
        for at in parts:
            logp_NV = replay.log_probs(at, inputs, weights, bias_V)
            made.append((_pick(logp_NV, replay.tokens_N[at]), _entropy(logp_NV, replay.support_NC is not None)))
            if trains:
                kept = replay.slope(at, logp_NV).to(weights[0].dtype)
                made[-1] += tuple(kept @ weight_VD for weight_VD in weights)
            del logp_NV
        chosen_N, entropy_N, *slopes = (torch.cat(column) for column in zip(*made, strict=True))
        ctx.replay, ctx.parts, ctx.count = replay, parts, len(inputs)
        ctx.save_for_backward(kept if len(parts) == 1 and ctx.weighs else None, bias_V, *factors, *slopes)
        ctx.mark_non_differentiable(entropy_N)
        return chosen_N, entropy_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        kept, bias_V, *rest = ctx.saved_tensors
        inputs, weights, slopes = (rest[i * ctx.count : (i + 1) * ctx.count] for i in range(3))
        grad_N1 = grad_N.to(slopes[0].dtype).unsqueeze(-1)
        mix_K11 = ctx.replay.coefficients(slopes[0])[:, None, None]
        by_input = [mix_K11 * (grad_N1 * slope_ND) for slope_ND in slopes]
        if not ctx.weighs:
            return (None, None, None, *by_input, *[None] * ctx.count)
        # The weights see only the mixed input: sum_k G_k' x_k = G' (sum_k a_k x_k).
        mixed = [(mix_K11 * x_KND).sum(0) for x_KND in inputs]
        by_weight = [torch.zeros_like(weight_VD) for weight_VD in weights]
        by_bias = None if bias_V is None else torch.zeros_like(bias_V)
        for at in ctx.parts:
            if kept is None:
                logp_NV = ctx.replay.log_probs(at, inputs, weights, bias_V)
                slope_NV = ctx.replay.slope(at, logp_NV).to(weights[0].dtype)
            else:
                slope_NV = kept
            for total_VD, x_ND in zip(by_weight, mixed, strict=True):
                total_VD.addmm_(slope_NV.T, grad_N1[at] * x_ND[at])
            if by_bias is not None:
                by_bias.addmv_(slope_NV.T, grad_N1[at, 0] * mix_K11.sum())
        return (None, None, by_bias, *by_input, *by_weight)


def _pick(logp_NV: Tensor, tokens_N: Tensor) -> Tensor:
    return logp_NV.gather(-1, tokens_N.unsqueeze(-1)).squeeze(-1)


def _entropy(logp_NV: Tensor, cut: bool) -> Tensor:
    """- sum p log p [N], in nats; 0 log 0 is 0, which only a cut support has."""
    probs_NV = logp_NV.exp()
    return -(probs_NV.mul_(logp_NV.masked_fill(probs_NV == 0, 0.0) if cut else logp_NV)).sum(-1)
