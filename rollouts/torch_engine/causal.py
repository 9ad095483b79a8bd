"""The batched next-token sampler: the prompt is prefilled once a prompt, guidance is one more row in the batch.

Rows of the decode batch are stream-major: all samples of `cond`, then all of `uncond` (then `source`), so that one
forward a step serves every stream. Shapes: R requests, B samples, K streams, S response positions.
"""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from rollouts.assembly import image_trajectory, one_image_span, request_stream
from rollouts.contract import CausalDecoder, Request
from rollouts.fingerprint import weights_fingerprint
from rollouts.law import Law, draw, law_log_probs, pack_support, row_uniforms
from rollouts.torch_engine.cache import preallocated_cache, widen
from rollouts.trajectory import Span, Stream, Trajectory, concatenate, pad_left


class TorchEngine:
    """Samples from a policy that lives in this process, so a weight sync has nothing to copy.

    Args:
        decoder: the policy; it is read at each call, never changed.
        num_layers: attention layers, each with a KV cache.
        max_rows: most decode rows (samples x streams) in one batch.
        use_cache: False recomputes the whole sequence at every step: slow, for parity tests.
    """

    def __init__(self, decoder: CausalDecoder, *, num_layers: int, max_rows: int = 512, use_cache: bool = True) -> None:
        self.decoder, self.num_layers, self.max_rows, self.use_cache = decoder, num_layers, max_rows, use_cache
        self.weights_version = 0

    @torch.no_grad()
    def generate(self, requests: Sequence[Request], spans: Sequence[Span]) -> Trajectory:
        """One image span a row. Raises ValueError on anything else and on a request that lacks a stream of the law."""
        span = one_image_span(spans, "torch")
        if not requests:
            raise ValueError("no requests to generate from; pass at least one prompt")
        parts = [self._generate_batch(batch, span) for batch in self._batches(requests, span.law)]
        return concatenate(parts, self.decoder.layout.pad)

    def sync(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """The decoder is the trainer's own module: only the version changes."""
        self.weights_version = version

    def fingerprint(self) -> str:
        return weights_fingerprint(self.decoder.named_weights())

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
        ids_BS, logp_BS, support = self._decode(prefixes, owner_B, seeds, law)
        return image_trajectory(
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
        self, prefixes: dict[str, Stream], owner_B: Tensor, seeds: list[int], law: Law
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Ids [B,S], log-probs [B,S] and packed supports [B,S,bytes] (None where the law keeps everything)."""
        layout, forced = self.decoder.layout, self.decoder.layout.grid.forced()
        rows, length, names = len(seeds), layout.grid.length, list(prefixes)
        uniforms_BS = row_uniforms(seeds, length)
        ids_BS = torch.full((rows, length), layout.pad, dtype=torch.long)
        logp_BS = torch.zeros(rows, length, dtype=torch.float64)
        supports: list[Tensor] = []
        stepper = _Stepper(self, prefixes, owner_B, length)
        for position in range(length):
            hidden_KBH = stepper.hidden(ids_BS[:, :position])
            if position in forced:
                ids_BS[:, position] = forced[position]
                supports.append(torch.zeros(rows, law.vocabulary[1] - law.vocabulary[0], dtype=torch.bool))
                continue
            logits = self.decoder.head(hidden_KBH.flatten(0, 1), law.vocabulary).unflatten(0, (len(names), rows))
            logp_BV, support_BV = law_log_probs(law, dict(zip(names, logits, strict=True)))
            code_B = draw(logp_BV, uniforms_BS[:, position].to(logp_BV.device))
            ids_BS[:, position] = code_B.cpu() + law.vocabulary[0]
            logp_BS[:, position] = logp_BV.gather(-1, code_B.unsqueeze(-1)).squeeze(-1).cpu()
            if support_BV is not None:
                supports.append(support_BV.cpu())
        return ids_BS, logp_BS, pack_support(torch.stack(supports, 1)) if law.truncated else None


class _Stepper:
    """Feeds the model a position at a time and answers the last hidden state of every row, [K, B, H]."""

    def __init__(self, engine: TorchEngine, prefixes: dict[str, Stream], owner_B: Tensor, length: int) -> None:
        pad = engine.decoder.layout.pad
        width = max(stream.ids_BP.shape[1] for stream in prefixes.values())
        self.engine, self.streams, self.owner_B = engine, len(prefixes), owner_B
        self.ids_QP = torch.cat([_widen_prefix(s.ids_BP, width, pad) for s in prefixes.values()])
        self.mask_QP = torch.cat([_widen_prefix(s.mask_BP, width, False) for s in prefixes.values()])
        requests = self.ids_QP.shape[0] // self.streams
        # Row of the prefill batch (stream-major over requests) that each decode row continues.
        self.rows_N = torch.cat([owner_B + k * requests for k in range(self.streams)])
        self.mask_NP = self.mask_QP[self.rows_N]
        self.cache = preallocated_cache(engine.num_layers, width + length) if engine.use_cache else None

    def hidden(self, ids_BT: Tensor) -> Tensor:
        decoder, position = self.engine.decoder, ids_BT.shape[1]
        if self.cache is None:
            full = torch.cat([self.ids_QP[self.rows_N], ids_BT.repeat(self.streams, 1)], 1)
            last_NH = decoder.hidden(full, self._mask(position))[:, -1]
        elif position == 0:
            last_NH = decoder.hidden(self.ids_QP, self.mask_QP, cache=self.cache)[:, -1][self.rows_N]
            self.cache = widen(self.cache, self.rows_N.to(last_NH.device))
        else:
            step_N1 = ids_BT[:, -1:].repeat(self.streams, 1)
            last_NH = decoder.hidden(step_N1, self._mask(position), cache=self.cache)[:, -1]
        return last_NH.unflatten(0, (self.streams, len(self.owner_B)))

    def _mask(self, position: int) -> Tensor:
        return torch.nn.functional.pad(self.mask_NP, (0, position), value=True)


def _widen_prefix(values_BP: Tensor, width: int, fill: int | bool) -> Tensor:
    return torch.nn.functional.pad(values_BP, (width - values_BP.shape[1], 0), value=fill)
