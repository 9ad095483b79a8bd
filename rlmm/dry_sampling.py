"""What the torch engines hold while they sample, on tensors that have shapes and no memory (`rlmm.dry_run`).

Shapes: Q prefixes (prompts x streams), N rows (B samples x K streams), T positions of one, S of them drawn, D decisions
at once, V vocabulary slice, H hidden size.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rlmm.dry_run import Live, bare, body_hidden, inputs_of
from rlmm.policies.transformer import TransformerPolicy
from rollouts.law import Law, draw, law_log_probs
from rollouts.torch_engine.cache import PreallocatedLayer, preallocated_cache, widen
from rollouts.torch_engine.llama import LlamaShape, Unsupported, llama_shape
from rollouts.torch_engine.revealing import AfterPrompts, read_prompts
from rollouts.torch_engine.steps import Prefixes
from rollouts.unmasking import Unmasking, order_log_probs


@dataclass(frozen=True)
class Drawing:
    """A sampler's widest batch. prefixes: of `prefix` positions each, of all streams; rows: sequences that continue
    them, of all streams, by `span` positions. drawn: tokens drawn at once, of a masked policy; order: how it chooses
    which to keep."""

    streams: int
    prefixes: int
    prefix: int
    rows: int
    span: int
    drawn: int
    precision: str
    order: Unmasking | None = None

    @property
    def samples(self) -> int:
        return self.rows // self.streams

    @property
    def length(self) -> int:
        return self.prefix + self.span


def sampled(make: Callable[[], TransformerPolicy], law: Law, drawing: Drawing) -> int:
    """The most bytes that sampling holds beside the weights. `make` as in `dry_run`."""
    with bare(make, drawing.precision) as policy, torch.no_grad(), Live() as live:
        if policy.layout.mask is not None:
            _revealed(policy, law, drawing)
        elif (shape := packed_shape(policy)) is not None:
            _packed(policy, law, drawing, shape)
        else:
            _decoded(policy, law, drawing)
    return live.peak


def packed_shape(policy: TransformerPolicy) -> LlamaShape | None:
    """Of the packed decoder, where the torch engine samples from one: a copy of the weights."""
    if policy.layout.mask is not None:
        return None
    try:
        return llama_shape(policy.base)
    except Unsupported:
        return None


def _revealed(policy: TransformerPolicy, law: Law, drawing: Drawing) -> None:
    """A step of `MaskedTorchEngine`, and the supports that it keeps until the end."""
    kept = torch.zeros(drawing.samples, drawing.span, _codes(law), dtype=torch.bool) if law.truncated else None
    if policy.layout.causal_prompt:
        hidden_KBSH = _after_prompts(policy, drawing)
    else:
        inputs = inputs_of(policy, drawing.rows, drawing.length)
        hidden_NTH = body_hidden(policy, inputs)
        hidden_KBSH = hidden_NTH[:, drawing.prefix :].unflatten(0, (drawing.streams, -1))
        del inputs, hidden_NTH
    row_D, at_D = torch.zeros(2, drawing.drawn, dtype=torch.long)
    logp_DV, token_D = _drawn(policy, law, hidden_KBSH[:, row_D, at_D])
    del hidden_KBSH
    if drawing.order is not None and drawing.order.exact:
        kept_D = torch.ones_like(row_D, dtype=torch.bool)
        order_log_probs(drawing.order, logp_DV, token_D, row_D, kept_D, drawing.samples)
    del kept


def _after_prompts(policy: TransformerPolicy, drawing: Drawing) -> Tensor:
    """Hidden states [K, B, S, H] of the spans, their prompts' keys and values kept."""
    ids_QP = torch.zeros(drawing.prefixes, drawing.prefix, dtype=torch.long)
    rows_N = torch.arange(drawing.rows) % drawing.prefixes
    prefixes = Prefixes(ids_QP, torch.ones_like(ids_QP, dtype=torch.bool), rows_N, drawing.streams)
    prompts = read_prompts(policy, prefixes, drawing.rows)
    return AfterPrompts(policy, prefixes, prompts).hidden(torch.zeros(drawing.samples, drawing.span, dtype=torch.long))


def _decoded(policy: TransformerPolicy, law: Law, drawing: Drawing) -> None:
    """The first and the last step of `TorchEngine` through the model's own forward (`ModelStepper`)."""
    cache = preallocated_cache(policy.sizes.num_hidden_layers, drawing.length)
    body_hidden(policy, inputs_of(policy, drawing.prefixes, drawing.prefix), cache)
    cache = widen(cache, torch.arange(drawing.rows) % drawing.prefixes)
    for layer in cache.layers:
        assert isinstance(layer, PreallocatedLayer), "made above"
        layer.filled = drawing.length - 1
    last_NH = body_hidden(policy, inputs_of(policy, drawing.rows, drawing.length, drawing.length - 1), cache)[:, -1]
    _drawn(policy, law, last_NH.unflatten(0, (drawing.streams, -1)))


def _packed(policy: TransformerPolicy, law: Law, drawing: Drawing, shape: LlamaShape) -> None:
    """The same through the packed decoder, which keeps a cache of its own dtype (`PackedLlama.widen`)."""
    dtype = torch.bfloat16 if drawing.precision == "bfloat16" else torch.float32
    made = (2 * shape.layers, drawing.prefixes, shape.kv_heads, drawing.prefix, shape.head_size)
    prefix = torch.zeros(made, dtype=dtype)
    cache = torch.zeros(made[0], drawing.rows, made[2], drawing.length, made[4], dtype=dtype)
    cache[0, :, :, : drawing.prefix] = prefix[0, torch.arange(drawing.rows) % drawing.prefixes]
    del prefix
    _drawn(policy, law, torch.zeros(drawing.streams, drawing.samples, shape.hidden))
    del cache


def _drawn(policy: TransformerPolicy, law: Law, hidden_KDH: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probs [D, V] and tokens [D] of decisions, as both engines draw them."""
    logits_KDV = policy.head(hidden_KDH, law.vocabulary)
    logp_DV, _support_DV = law_log_probs(law, dict(zip(law.streams(), logits_KDV, strict=True)))
    return logp_DV, draw(logp_DV, torch.zeros(hidden_KDH.shape[1], dtype=torch.float64))


def _codes(law: Law) -> int:
    return law.vocabulary[1] - law.vocabulary[0]
