"""Logits of a vocabulary slice, and log-probs of chosen tokens, without ever holding [B, S, V].

Shapes: K streams, N decisions, H hidden size, V vocabulary slice, D inner size of a factor (H, or a LoRA rank).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from rlmm.policies.head_rows import rows_weight
from rlmm.policies.parts import readable
from rollouts.law import Law, law_log_probs, mix_streams, unpack_support

LOGIT_BYTES = 64 << 20
"""Most bytes of logits held at once (a few copies of them); where there are more, the backward makes them again."""


@dataclass(frozen=True)
class OutputHead:
    """Where the logits of a vocabulary slice come from. `linear`: nn.Linear, or the same under LoRA; its row 0 is token
    `first`. `body`: what hidden states go through before."""

    linear: nn.Module
    first: int = 0
    body: Callable[[Tensor], Tensor] | None = None

    def factors(self, hidden: Tensor, vocabulary: tuple[int, int]) -> tuple[list[Tensor], list[Tensor], Tensor | None]:
        """Inputs and weights whose products add up to the slice's logits, and a bias: see `_factors`."""
        rows = slice(vocabulary[0] - self.first, vocabulary[1] - self.first)
        return _factors(self.linear, hidden if self.body is None else self.body(hidden), rows)


def sliced_head(head: OutputHead, hidden_NH: Tensor, vocabulary: tuple[int, int]) -> Tensor:
    """Logits [N, V] of the tokens `vocabulary`."""
    inputs, weights, bias_V = head.factors(hidden_NH, vocabulary)
    return _logits(inputs, weights, bias_V)


def decision_log_probs(
    head: OutputHead,
    law: Law,
    hidden_KNH: Tensor,
    tokens_N: Tensor,
    support_NC: Tensor | None = None,
    *,
    entropy_gradient: bool = False,
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies [N] of chosen tokens under the law.

    Args:
        hidden_KNH: of the streams that the law's replay needs, in its order.
        tokens_N: token ids inside `law.vocabulary`.
        support_NC: the packed support stored at sampling, where the law keeps one.
        entropy_gradient: whether the entropies have a gradient too; it costs a second product a chunk.
    """
    inputs, weights, bias_V = head.factors(hidden_KNH, law.vocabulary)
    replay = _Replay(law, law.streams(replay=True), tokens_N - law.vocabulary[0], support_NC, entropy_gradient)
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
    inputs, weights = [hidden], [rows_weight(base, rows)]
    if isinstance(head, LoraLinear) and not head.disable_adapters:
        for name in head.active_adapters:
            if name in head.lora_A:
                low_rank = cast(nn.Linear, head.lora_A[name])
                given = head.lora_dropout[name](hidden.to(low_rank.weight.dtype))
                low = F.linear(given, readable(low_rank.weight))
                inputs.append((head.scaling[name] * low).to(hidden.dtype))
                weights.append(readable(cast(nn.Linear, head.lora_B[name]).weight)[rows].to(hidden.dtype))
    return inputs, weights, None if base.bias is None else readable(base.bias)[rows]


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
    entropy_gradient: bool

    def chunks(self, itemsize: int) -> list[slice]:
        """Runs of decisions whose logits, of all streams, fit in LOGIT_BYTES."""
        width = self.law.vocabulary[1] - self.law.vocabulary[0]
        size = max(1, LOGIT_BYTES // (width * len(self.names) * itemsize))
        return [slice(start, start + size) for start in range(0, max(1, len(self.tokens_N)), size)]

    def log_probs(
        self, at: slice, inputs: Sequence[Tensor], weights: Sequence[Tensor], bias_V: Tensor | None
    ) -> Tensor:
        """Log-probs [n, V] of the decisions `at`, by the one function samplers use too."""
        logits_KNV = _logits([x_KND[:, at] for x_KND in inputs], weights, bias_V)
        by_stream = dict(zip(self.names, logits_KNV, strict=True))
        support = None if self.support_NC is None else unpack_support(self.support_NC[at], weights[0].shape[0])
        return law_log_probs(self.law, by_stream, support_NV=support, replay=True)[0]

    def entropy(self, logp_NV: Tensor) -> Tensor:
        """- sum p log p [n], in nats."""
        return -(logp_NV.exp().mul_(self._finite(logp_NV))).sum(-1)

    def slopes(self, at: slice, logp_NV: Tensor) -> list[Tensor]:
        """Derivatives [n, V] by the mixed logits, times the temperature: of log p(token), 1[token] - p; and, where it
        is asked for, of the entropy h, -p (log p + h). Destroys `logp_NV`."""
        slopes = []
        if self.entropy_gradient:
            finite_NV = self._finite(logp_NV)
            slopes = [-logp_NV.exp() * (finite_NV + self.entropy(logp_NV).unsqueeze(-1))]
        chosen_NV = logp_NV.exp_().neg_()
        token_N1 = self.tokens_N[at].unsqueeze(-1)
        return [chosen_NV.scatter_add_(-1, token_N1, torch.ones_like(token_N1, dtype=chosen_NV.dtype)), *slopes]

    def coefficients(self, like: Tensor) -> Tensor:
        """d scaled logits / d each stream's logits [K, 1, 1]: the mix is linear, so it is read off unit vectors."""
        unit_KK = torch.eye(len(self.names), dtype=like.dtype, device=like.device)
        mix_K = mix_streams(self.law, dict(zip(self.names, unit_KK, strict=True)), replay=True)
        return (mix_K / self.law.temperature)[:, None, None]

    def _finite(self, logp_NV: Tensor) -> Tensor:
        """Outside a cut support log p is -inf, and 0 log 0 is 0."""
        return logp_NV if self.support_NC is None else logp_NV.clamp_min(torch.finfo(logp_NV.dtype).min)


class _Chosen(torch.autograd.Function):
    """Chosen log-probs and entropies [N] from the factors of the logits.

    How a decision's log-prob moves with its hidden state does not depend on what comes after but for one factor, so
    the forward leaves that direction behind, [N, D], while it holds the logits. The weights' gradient sums over
    decisions, each times its factor: where a weight is trained, the backward makes the logits again, unless they all
    fitted in one chunk.
    """

    @staticmethod
    def forward(
        ctx: Any, replay: _Replay, trains: bool, bias_V: Tensor | None, *factors: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.inputs = len(factors) // 2
        inputs, weights = factors[: ctx.inputs], factors[ctx.inputs :]
        ctx.replay = replay
        ctx.trained = ctx.needs_input_grad[3 + ctx.inputs :]
        ctx.weighs = ctx.needs_input_grad[2] or any(ctx.trained)
        ctx.parts = replay.chunks(weights[0].element_size())
        made: list[tuple[Tensor, ...]] = []
        slopes: list[Tensor] = []
        for at in ctx.parts:
            logp_NV = replay.log_probs(at, inputs, weights, bias_V)
            token_N1 = replay.tokens_N[at].unsqueeze(-1)
            results = (logp_NV.gather(-1, token_N1).squeeze(-1), replay.entropy(logp_NV))
            if trains:
                slopes = [slope_NV.to(weights[0].dtype) for slope_NV in replay.slopes(at, logp_NV)]
                results += tuple(slope_NV @ weight_VD for slope_NV in slopes for weight_VD in weights)
            made.append(results)
            del logp_NV
        chosen_N, entropy_N, *directions = (torch.cat(column) for column in zip(*made, strict=True))
        ctx.kept = slopes if len(ctx.parts) == 1 and ctx.weighs else None
        ctx.save_for_backward(bias_V, *factors, *directions)
        if not replay.entropy_gradient:
            ctx.mark_non_differentiable(entropy_N)
        return chosen_N, entropy_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        bias_V, *rest = ctx.saved_tensors
        inputs, weights, directions = rest[: ctx.inputs], rest[ctx.inputs : 2 * ctx.inputs], rest[2 * ctx.inputs :]
        outputs = len(directions) // ctx.inputs
        grads_N1 = [grad_N.to(weights[0].dtype).unsqueeze(-1) for grad_N in grad_outputs[:outputs]]
        mix_K11 = ctx.replay.coefficients(weights[0])
        by_input = [
            mix_K11 * sum(g * d for g, d in zip(grads_N1, directions[i :: ctx.inputs], strict=True))
            for i in range(ctx.inputs)
        ]
        if not ctx.weighs:
            return (None, None, None, *by_input, *[None] * ctx.inputs)
        by_weight = [torch.zeros_like(w) if trained else None for w, trained in zip(weights, ctx.trained, strict=True)]
        by_bias = torch.zeros_like(bias_V) if ctx.needs_input_grad[2] else None
        # A weight sees only the mixed input: sum_k G_k' x_k = G' (sum_k a_k x_k).
        mixed = [(mix_K11 * x_KND).sum(0) for x_KND in inputs]
        for at in ctx.parts:
            slopes = ctx.kept
            if slopes is None:
                logp_NV = ctx.replay.log_probs(at, inputs, weights, bias_V)
                slopes = [slope_NV.to(weights[0].dtype) for slope_NV in ctx.replay.slopes(at, logp_NV)]
                del logp_NV
            for slope_NV, grad_N1 in zip(slopes, grads_N1, strict=True):
                for total_VD, x_ND in zip(by_weight, mixed, strict=True):
                    if total_VD is not None:
                        total_VD.addmm_(slope_NV.T, grad_N1[at] * x_ND[at])
                if by_bias is not None:
                    by_bias.addmv_(slope_NV.T, grad_N1[at, 0] * mix_K11.sum())
        return (None, None, by_bias, *by_input, *by_weight)
