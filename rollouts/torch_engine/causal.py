"""The batched next-token sampler: the prompt is prefilled once a prompt, guidance is one more row in the batch.

Rows of the decode batch are stream-major: all samples of `cond`, then all of `uncond` (then `source`), so that one
forward a step serves every stream. Shapes: R requests, B samples, K streams, S response positions.
"""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from rollouts.assembly import one_span, refuse_given, request_stream, span_forced, span_length, span_trajectory
from rollouts.contract import CausalDecoder, Request
from rollouts.fingerprint import weights_fingerprint
from rollouts.law import Law, draw, law_log_probs, pack_support, row_uniforms
from rollouts.torch_engine.packed import PackedLlama
from rollouts.torch_engine.steps import ModelStepper, PackedStepper, join_prefixes
from rollouts.trajectory import Span, Stream, Trajectory, concatenate, pad_left


class TorchEngine:
    """Samples from a policy that lives in this process.

    Args:
        decoder: the policy; it is read at each call, never changed.
        num_layers: attention layers, each with a KV cache.
        max_rows: most decode rows (samples x streams) in one batch.
        use_cache: False recomputes the whole sequence at every step: slow, for parity tests.
        packed: samples from this decoder's own packed copy of the weights, as of the last `sync` (one is made here).
            None samples through the policy's own forward, and a sync then has nothing to copy.
    """

    dtype = torch.float32
    takes_adapters = False

    def __init__(
        self,
        decoder: CausalDecoder,
        *,
        num_layers: int,
        max_rows: int = 512,
        use_cache: bool = True,
        packed: PackedLlama | None = None,
    ) -> None:
        if packed is not None and not use_cache:
            raise ValueError("the packed decoder always has a cache; use_cache=False needs packed=None")
        self.decoder, self.num_layers, self.max_rows, self.use_cache = decoder, num_layers, max_rows, use_cache
        self.packed = packed
        self.weights_version = 0
        if packed is not None:
            packed.take(decoder.named_weights())

    @property
    def reads_policy(self) -> bool:
        """Without a packed decoder."""
        return self.packed is None

    @torch.no_grad()
    def generate(self, requests: Sequence[Request], spans: Sequence[Span]) -> Trajectory:
        """One span a row. Raises ValueError on several and on a request that lacks a stream of the law."""
        span = one_span(spans, "torch")
        if not requests:
            raise ValueError("no requests to generate from; pass at least one prompt")
        refuse_given(requests, "torch")
        parts = [self._generate_batch(batch, span) for batch in self._batches(requests, span.law)]
        return concatenate(parts, self.decoder.layout.pad)

    def sync(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Copy and pack the weights. Without a packed decoder the trainer's own module is sampled from, and only the
        version changes."""
        if self.packed is not None:
            self.packed.take(weights)
        self.weights_version = version

    def fingerprint(self) -> str:
        """Of the packed decoder's copy, read back from it; else of the policy itself."""
        return weights_fingerprint(self.decoder.named_weights() if self.packed is None else self.packed.named_weights())

    def close(self) -> None:
        """Nothing is held."""

    def _batches(self, requests: Sequence[Request], law: Law) -> Iterator[list[Request]]:
        streams, batch, rows = len(law.streams()), [], 0
        for request in requests:
            need = streams * len(request.seeds)
            if batch and rows + need > self.max_rows:
                yield batch
                batch, rows = [], 0
            batch.append(request)
            rows += need
        yield batch

    def _generate_batch(self, requests: list[Request], span: Span) -> Trajectory:
        layout, law = self.decoder.layout, span.law
        names = law.streams()
        prefixes = {name: pad_left([request_stream(r, name) for r in requests], layout.pad) for name in names}
        counts = torch.tensor([len(request.seeds) for request in requests])
        owner_B = torch.repeat_interleave(torch.arange(len(requests)), counts)
        seeds = [seed for request in requests for seed in request.seeds]
        ids_BS, logp_BS, support = self._decode(prefixes, owner_B, seeds, span)
        return span_trajectory(
            layout,
            span,
            requests,
            streams={name: stream.rows(owner_B) for name, stream in prefixes.items()},
            ids_BS=ids_BS,
            logp_BS=logp_BS,
            support=support,
            weights_version=self.weights_version,
        )

    def _decode(
        self, prefixes: dict[str, Stream], owner_B: Tensor, seeds: list[int], span: Span
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Ids [B,S], log-probs [B,S] and packed supports [B,S,bytes] (None where the law keeps everything). What a row
        draws after its stop token means nothing; drawing ends when every row has one."""
        layout, law, forced = self.decoder.layout, span.law, span_forced(self.decoder.layout, span)
        rows, length, names = len(seeds), span_length(layout, span), list(prefixes)
        stepper = self._stepper(prefixes, owner_B, length)
        hidden_NH = stepper.hidden(torch.empty(rows, 0, dtype=torch.long))
        device = hidden_NH.device  # nothing leaves it until the last token: a copy a step would wait for every kernel
        uniforms_BS = row_uniforms(seeds, length).to(device)
        ids_BS = torch.full((rows, length), layout.pad, dtype=torch.long, device=device)
        logp_BS = torch.zeros(rows, length, dtype=torch.float64, device=device)
        support = _room(rows, length, law) if law.truncated else None
        stop = torch.tensor(span.stop, dtype=torch.long, device=device)
        going_B = torch.ones(rows, dtype=torch.bool, device=device)
        for position in range(length):
            if span.stop and not going_B.any():
                break
            if position:
                hidden_NH = stepper.hidden(ids_BS[:, :position])
            if position in forced:
                ids_BS[:, position] = forced[position]
                continue
            logits = stepper.head(hidden_NH, law.vocabulary).unflatten(0, (len(names), rows))
            logp_BV, support_BV = law_log_probs(law, dict(zip(names, logits, strict=True)))
            code_B = draw(logp_BV, uniforms_BS[:, position])
            ids_BS[:, position] = code_B + law.vocabulary[0]
            logp_BS[:, position] = logp_BV.gather(-1, code_B.unsqueeze(-1)).squeeze(-1)
            going_B &= ~torch.isin(ids_BS[:, position], stop)
            if support is not None and support_BV is not None:
                support[:, position] = pack_support(support_BV)
        return ids_BS.cpu(), logp_BS.cpu(), support

    def _stepper(self, prefixes: dict[str, Stream], owner_B: Tensor, length: int) -> ModelStepper | PackedStepper:
        joined = join_prefixes(list(prefixes.values()), owner_B, self.decoder.layout.pad)
        if self.packed is not None:
            return PackedStepper(self.packed, joined, length)
        return ModelStepper(self.decoder, joined, length, self.num_layers if self.use_cache else None)


def _room(rows: int, length: int, law: Law) -> Tensor:
    """Packed supports [B, S, bytes] of positions that have none."""
    low, high = law.vocabulary
    return torch.zeros(rows, length, -(-(high - low) // 8), dtype=torch.uint8)
