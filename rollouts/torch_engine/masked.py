"""The batched unmasking sampler: every step is one forward of the whole span, guidance is one more row.

Rows of a forward are stream-major, as in the next-token sampler. Shapes: B samples, K streams, S response positions,
T steps, N decisions, V vocabulary slice.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rollouts.assembly import one_image_span, request_stream, span_trajectory
from rollouts.contract import MaskedDecoder, Request
from rollouts.fingerprint import weights_fingerprint
from rollouts.law import Law, draw, law_log_probs, pack_support, row_uniforms
from rollouts.torch_engine.revealing import AfterPrompts, Revealing, WithPrompts, read_prompts
from rollouts.torch_engine.steps import join_prefixes
from rollouts.trajectory import Span, Stream, Trajectory, concatenate, pad_left
from rollouts.unmasking import Unmasking, keep_confident, masked_counts, noise_scale, order_log_probs, planned_steps


class MaskedTorchEngine:
    """Samples from a masked policy that lives in this process, by its own forward.

    Args:
        decoder: the policy; it is read at each call, never changed.
        max_rows: most rows (samples x streams) in one forward.
        cache_prompts: read a prompt once for all its samples and steps, which is exact where prompts see themselves
            alone (`Layout.causal_prompt`), and the default there. False reads it again at every step.

    Raises ValueError for `cache_prompts` where prompts see the image.
    """

    dtype = torch.float32
    reads_policy = True
    takes_adapters = False

    def __init__(self, decoder: MaskedDecoder, *, max_rows: int = 512, cache_prompts: bool | None = None) -> None:
        self.decoder, self.max_rows, self.weights_version = decoder, max_rows, 0
        if cache_prompts and not decoder.layout.causal_prompt:
            raise ValueError(
                "cache_prompts keeps a prompt's keys and values over the steps, and this policy's prompts see the "
                "image, which changes: that would be another function; leave it out, or train a policy with "
                "prompt_attention: causal"
            )
        self.cache_prompts = decoder.layout.causal_prompt if cache_prompts is None else cache_prompts

    @torch.no_grad()
    def generate(self, requests: Sequence[Request], spans: Sequence[Span]) -> Trajectory:
        """One image span a row. Raises ValueError on anything else, on a span without `unmasking`, and on a request
        that lacks a stream of the law."""
        span = one_image_span(spans, "masked torch")
        if span.unmasking is None or self.decoder.layout.mask is None:
            raise ValueError(
                "a masked policy reveals a span by its `unmasking`, and the span has none (or the layout no mask "
                "token); set sampling.unmasking, or sample a next-token policy with the torch engine"
            )
        if not requests:
            raise ValueError("no requests to generate from; pass at least one prompt")
        layout, names = self.decoder.layout, span.law.streams()
        streams = {name: pad_left([request_stream(r, name) for r in requests], layout.pad) for name in names}
        each = [(one, place) for place, request in enumerate(requests) for one in _each_seed(request)]
        owner_B = torch.tensor([place for _, place in each])
        prefixes = join_prefixes(list(streams.values()), owner_B, layout.pad)
        prompts = read_prompts(self.decoder, prefixes, self.max_rows) if self.cache_prompts else None
        size, parts = max(1, self.max_rows // len(names)), []
        for at in range(0, len(each), size):
            rows_B = owner_B[at : at + size]
            part = join_prefixes(list(streams.values()), rows_B, layout.pad)
            forward = WithPrompts(self.decoder, part) if prompts is None else AfterPrompts(self.decoder, part, prompts)
            given = {name: stream.rows(rows_B) for name, stream in streams.items()}
            parts.append(self._batch([one for one, _ in each[at : at + size]], span, given, forward))
        return concatenate(parts, layout.pad)

    def sync(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """The trainer's own module is sampled from: only the version changes."""
        self.weights_version = version

    def fingerprint(self) -> str:
        return weights_fingerprint(self.decoder.named_weights())

    def close(self) -> None:
        """Nothing is held."""

    def _batch(self, requests: list[Request], span: Span, streams: dict[str, Stream], forward: Revealing) -> Trajectory:
        layout, law, unmasking = self.decoder.layout, span.law, span.unmasking
        assert unmasking is not None, "checked in `generate`"
        seeds = [request.seeds[0] for request in requests]
        made = _Reveal(self.decoder, law, forward, seeds, unmasking)
        made.give([request.given for request in requests])
        if unmasking.policy_free:
            made.planned(planned_steps(unmasking, made.masked_BS, seeds, layout.grid.decided()))
        else:
            made.confident()
        return span_trajectory(
            layout,
            span,
            requests,
            streams=streams,
            ids_BS=made.ids_BS,
            logp_BS=made.logp_BS,
            support=None if made.support_BSV is None else pack_support(made.support_BSV),
            weights_version=self.weights_version,
            step_BS=made.step_BS,
            order_logp=made.order_BT if not unmasking.policy_free and unmasking.exact else None,
        )


def _each_seed(request: Request) -> list[Request]:
    return [
        Request(request.group_id, request.streams, (seed,), (name,), request.sources, request.given)
        for seed, name in zip(request.seeds, request.sample_ids, strict=True)
    ]


@dataclass(frozen=True)
class _Proposals:
    """Of N masked positions: row and position, law log-probs [N, V], drawn token (index in the slice)."""

    row_N: Tensor
    at_N: Tensor
    logp_NV: Tensor
    token_N: Tensor
    support_NV: Tensor | None

    @property
    def chosen_N(self) -> Tensor:
        return self.logp_NV.gather(1, self.token_N[:, None]).squeeze(1)


class _Reveal:
    """A batch on its way from all masked to all decided."""

    def __init__(
        self, decoder: MaskedDecoder, law: Law, forward: Revealing, seeds: list[int], unmasking: Unmasking
    ) -> None:
        grid, rows = decoder.layout.grid, len(seeds)
        assert decoder.layout.mask is not None, "checked in `generate`"
        self.decoder, self.law, self.forward, self.seeds, self.unmasking = decoder, law, forward, seeds, unmasking
        self.ids_BS = torch.full((rows, grid.length), decoder.layout.mask, dtype=torch.long)
        for position, token in grid.forced().items():
            self.ids_BS[:, position] = token
        self.masked_BS = torch.zeros(rows, grid.length, dtype=torch.bool)
        self.masked_BS[:, grid.decided()] = True
        self.step_BS = torch.zeros(rows, grid.length, dtype=torch.int32)
        self.logp_BS = torch.zeros(rows, grid.length, dtype=torch.float64)
        self.order_BT = torch.zeros(rows, unmasking.steps, dtype=torch.float64)
        width = law.vocabulary[1] - law.vocabulary[0]
        self.support_BSV = torch.zeros(rows, grid.length, width, dtype=torch.bool) if law.truncated else None

    def give(self, given: Sequence[tuple[tuple[int, int], ...]]) -> None:
        """Tokens that are there from the start. Raises ValueError for a position or token that is no image code's."""
        low, high = self.decoder.layout.image
        for row, pairs in enumerate(given):
            for position, token in pairs:
                if not (0 <= position < self.ids_BS.shape[1] and self.masked_BS[row, position] and low <= token < high):
                    raise ValueError(
                        f"given token {token} at position {position}: positions are decided ones of the grid, each at "
                        f"most once, and tokens image codes in [{low}, {high}); mend Request.given"
                    )
                self.ids_BS[row, position], self.masked_BS[row, position] = token, False

    def planned(self, step_BS: Tensor) -> None:
        """Reveal in an order that was made beforehand; one uniform a position."""
        uniform_BS = row_uniforms(self.seeds, self.ids_BS.shape[1])
        for step in range(int(step_BS.max()) + 1):
            now_BS = self.masked_BS & (step_BS == step)
            if now_BS.any():
                self._take(self._propose(now_BS, uniform_BS), step)

    def confident(self) -> None:
        """Reveal what the policy is surest of; one uniform a position and step, and one more for the noise."""
        rows, length = self.ids_BS.shape
        unmasking = self.unmasking
        counts = masked_counts(unmasking.schedule, unmasking.steps, len(self.decoder.layout.grid.decided()))
        uniforms = row_uniforms(self.seeds, 2 * unmasking.steps * length).view(rows, 2, unmasking.steps, length)
        for step in range(unmasking.steps):
            if not self.masked_BS.any():
                break
            made = self._propose(self.masked_BS, uniforms[:, 0, step])
            sure_BS = torch.full((rows, length), -torch.inf, dtype=torch.float64)
            sure_BS[made.row_N, made.at_N] = made.chosen_N.double().cpu()
            scale = noise_scale(unmasking, step, unmasking.steps)
            gumbel_BS = -(-uniforms[:, 1, step].clamp_min(1e-300).log()).log()
            kept_BS = keep_confident(unmasking, sure_BS + scale * gumbel_BS, self.masked_BS, step, counts)
            self._keep(made, kept_BS[made.row_N, made.at_N], step)
            del made  # or its proposals would be there beside the next step's

    def _propose(self, where_BS: Tensor, uniform_BS: Tensor) -> _Proposals:
        """Draw at the positions `where_BS` of the present state."""
        names, (row_N, at_N) = self.law.streams(), where_BS.nonzero(as_tuple=True)
        hidden = self.forward.hidden(self.ids_BS)
        logits_KNV = self.decoder.head(hidden[:, row_N.to(hidden.device), at_N.to(hidden.device)], self.law.vocabulary)
        logp_NV, support_NV = law_log_probs(self.law, dict(zip(names, logits_KNV, strict=True)))
        token_N = draw(logp_NV, uniform_BS[row_N, at_N].to(logp_NV.device))
        return _Proposals(row_N, at_N, logp_NV, token_N, support_NV)

    def _keep(self, made: _Proposals, kept_N: Tensor, step: int) -> None:
        """Take the kept proposals; their order's log-prob goes to them in equal parts."""
        row_N, at_N = made.row_N, made.at_N
        self._take(made, step, kept_N)
        if self.unmasking.exact:
            device = made.logp_NV.device
            order_B = order_log_probs(
                self.unmasking, made.logp_NV, made.token_N, row_N.to(device), kept_N.to(device), len(self.seeds)
            )
            self.order_BT[:, step] = order_B.double().cpu()
            kept_B = torch.zeros(len(self.seeds), dtype=torch.float64).index_add(0, row_N, kept_N.double())
            share_B = self.order_BT[:, step] / kept_B.clamp_min(1)
            self.logp_BS[row_N[kept_N], at_N[kept_N]] += share_B[row_N[kept_N]]

    def _take(self, made: _Proposals, step: int, kept_N: Tensor | None = None) -> None:
        kept_N = torch.ones_like(made.row_N, dtype=torch.bool) if kept_N is None else kept_N
        at = (made.row_N[kept_N], made.at_N[kept_N])
        self.ids_BS[at] = made.token_N.cpu()[kept_N] + self.law.vocabulary[0]
        self.logp_BS[at] = made.chosen_N.double().cpu()[kept_N]
        self.step_BS[at] = step
        self.masked_BS[at] = False
        if self.support_BSV is not None and made.support_NV is not None:
            self.support_BSV[at] = made.support_NV.cpu()[kept_N]
