"""Rollouts by stock vLLM: the torch engine's contract, and for the same seeds its tokens."""

import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from functools import partial

import numpy as np
import torch
from torch import Tensor

from rollouts.assembly import one_span, refuse_given, request_stream, span_forced, span_length, span_trajectory
from rollouts.contract import SEEN, Layout, Request
from rollouts.law import Law
from rollouts.trajectory import Span, Trajectory, pad_left
from rollouts.vllm_engine.arguments import row_arguments
from rollouts.vllm_engine.beside import begin
from rollouts.vllm_engine.drawn import Drawn
from rollouts.vllm_engine.host import ABANDON_SECONDS, AGAIN_SECONDS, Host, Load, Row
from rollouts.vllm_engine.transfer import AdapterTransfer
from rollouts.vllm_engine.waves import Sample, check_room, plan_waves

Embed = Callable[[tuple[int, ...]], Tensor]
"""Embeddings [P, H] of a prefix."""


class VllmEngine:
    """Samples from copies of the policy that vLLM holds, one a host; each host draws an equal part of the samples.

    Law, draws and supports are the torch engine's (`processor.LawProcessor`). Under guidance a sample's streams are
    separate requests that must take every step together; they are handed over in waves that fit the scheduler, and a
    sample whose streams parted nevertheless is an error. `embed`: what the policy makes of a prefix about images that
    it sees through an encoder of its own; vLLM has its language model alone, and gets the embeddings.
    """

    def __init__(self, layout: Layout, hosts: Sequence[Host], load: Load, embed: Embed | None = None) -> None:
        if not hosts:
            raise ValueError("a vllm engine without a vLLM; give it at least one host")
        if len(dtypes := {host.room.dtype for host in hosts}) > 1:
            raise ValueError(
                f"the vLLM servers hold their weights as {' and '.join(sorted(dtypes))}, and can only be compared with "
                "the trainer's in one; start them with the same dtype"
            )
        self.layout, self.hosts, self.load, self.weights_version = layout, list(hosts), load, 0
        self.embed = embed
        self._name, self._next = uuid.uuid4().hex[:12], 0  # a server may still know samples of an engine before

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.hosts[0].room.dtype)

    @property
    def reads_policy(self) -> bool:
        """Where the policy embeds prefixes for it."""
        return self.embed is not None

    @torch.no_grad()
    def generate(self, requests: Sequence[Request], spans: Sequence[Span]) -> Trajectory:
        """One span a row.

        Raises:
            ValueError: several spans, a stream the law needs and a request lacks, or a sample too large for the engine.
            RuntimeError: vLLM took other tokens than were drawn, or parted the streams of a guided sample.
            EngineLost: a vLLM is gone.
        """
        span = one_span(spans, "vllm")
        if not requests:
            raise ValueError("no requests to generate from; pass at least one prompt")
        refuse_given(requests, "vllm")
        if span.law.vocabulary[1] > self.layout.vocab_size:
            raise ValueError(
                f"the law's slice {span.law.vocabulary} ends past the vocabulary, {self.layout.vocab_size}"
            )
        if self.embed is None and any(max(ids) >= SEEN for one in requests for ids in one.streams.values()):
            raise ValueError(
                "prompts are about images that the policy sees through an encoder of its own, and vLLM servers have "
                "its language model alone; set engine.kind: vllm or torch"
            )
        samples = self._samples(requests, span.law)
        drawn = self._draw(samples, span)
        supports = [one.support for one in drawn if one.support is not None]
        names = span.law.streams()
        return span_trajectory(
            self.layout,
            span,
            requests,
            streams={name: pad_left([s.prefixes[k] for s in samples], self.layout.pad) for k, name in enumerate(names)},
            ids_BS=torch.from_numpy(np.stack([one.tokens_S for one in drawn])),
            logp_BS=torch.from_numpy(np.stack([one.logp_S for one in drawn])),
            support=torch.from_numpy(np.stack(supports)) if supports else None,
            weights_version=self.weights_version,
        )

    @property
    def takes_adapters(self) -> bool:
        """Where its servers fold them."""
        return isinstance(self.load, AdapterTransfer)

    def sync(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Load the weights and forget every key and value the old ones made."""
        self.load(weights)
        for host in self.hosts:
            host.forget()
        self.weights_version = version

    def fingerprint(self) -> str:
        """Of the weights read back through vLLM's own kernels, so a sync that did not reach them shows."""
        digests = sorted({host.fingerprint() for host in self.hosts})
        return "+".join(digests)

    def close(self) -> None:
        for host in self.hosts:
            host.close()

    def _samples(self, requests: Sequence[Request], law: Law) -> list[Sample]:
        samples = []
        for request in requests:
            prefixes = tuple(request_stream(request, name) for name in law.streams())
            for seed, sample_id in zip(request.seeds, request.sample_ids, strict=True):
                name = f"{self._name}-{self._next}"
                samples.append(Sample(name, request.group_id, sample_id, prefixes, seed))
                self._next += 1
        return samples

    def _draw(self, samples: Sequence[Sample], span: Span) -> list[Drawn]:
        """Neighbours go to one host, where they share their prompt's prefix."""
        share = -(-len(samples) // len(self.hosts))
        parts = [samples[at : at + share] for at in range(0, len(samples), share)]
        if len(parts) == 1:
            return self._draw_on(self.hosts[0], parts[0], span)
        hosts = self.hosts[: len(parts)]
        calls = [partial(self._draw_on, host, part, span) for host, part in zip(hosts, parts, strict=True)]
        return [one for part in _beside(hosts, calls) for one in part]

    def _draw_on(self, host: Host, samples: Sequence[Sample], span: Span) -> list[Drawn]:
        carried = self._carried(host, samples, span.law)
        rows = self._rows(host, samples, span, carried)
        taken, drawn = host.run(rows, [sample.name for sample in samples])
        for k, one in enumerate(drawn):
            _check(samples[k], span, one, taken[k * len(carried) : (k + 1) * len(carried)])
        return drawn

    def _carried(self, host: Host, samples: Sequence[Sample], law: Law) -> list[tuple[str, ...]]:
        """The streams that each request of a sample carries: all in one where model and prompts allow it."""
        names = law.streams()
        together = host.room.streams == len(names) > 1 and all(
            sample.prefixes[1] == self.layout.unconditional(sample.prefixes[0]) for sample in samples
        )
        return [names] if together else [(name,) for name in names]

    def _rows(self, host: Host, samples: Sequence[Sample], span: Span, carried: Sequence[tuple[str, ...]]) -> list[Row]:
        """A sample in one request may start and wait as vLLM pleases; requests that must keep step go in waves."""
        law, room, length = span.law, host.room, span_length(self.layout, span)
        streams = law.streams()
        alone = len(carried) == 1
        if alone:
            for sample in samples:
                check_room(sample.prefixes[0], room, length)
        forced, rows = span_forced(self.layout, span), []
        embeds = self._embedded(samples)
        for wave in [samples] if alone else plan_waves(samples, room, length):
            around = None if alone else (wave[0].name, len(wave) * len(carried))
            for sample in wave:
                for names in carried:
                    arguments = row_arguments(sample.name, names, law, forced, sample.seed, length, around)
                    prefix = sample.prefixes[streams.index(names[0])]
                    rows.append(Row(prefix, arguments, length, span.stop, embeds.get(prefix)))
        return rows

    def _embedded(self, samples: Sequence[Sample]) -> dict[tuple[int, ...], Tensor]:
        """Embeddings of the prefixes that have some, each once."""
        if self.embed is None:
            return {}
        about = {prefix for sample in samples for prefix in sample.prefixes if max(prefix) >= SEEN}
        return {prefix: self.embed(prefix) for prefix in about}


def _beside(hosts: Sequence[Host], calls: Sequence[Callable[[], list[Drawn]]]) -> list[list[Drawn]]:
    """What the hosts' calls return that run beside each other. Where one fails, or this thread is interrupted, the
    others give up their rows: nobody will ask for them, and the hosts are to be free for who comes next."""
    futures = begin(calls)
    try:
        wait(futures, return_when=FIRST_EXCEPTION)
        for future in futures:
            if future.done():
                future.result()
        return [future.result() for future in futures]
    except BaseException as error:
        _abandon(hosts, futures, error)
        raise


def _abandon(hosts: Sequence[Host], futures: Sequence[Future[list[Drawn]]], first: BaseException) -> None:
    """Returns when all have ended, or are late. Told again and again, since a host may not have begun when told. What
    then goes wrong stands below what went wrong first."""
    end = time.monotonic() + ABANDON_SECONDS
    while (late := [k for k, future in enumerate(futures) if not future.done()]) and time.monotonic() < end:
        for k in late:
            hosts[k].abandon()
        wait([futures[k] for k in late], AGAIN_SECONDS)
    if late:
        first.add_note(f"and {len(late)} of {len(hosts)} vLLMs did not end their rollouts in {ABANDON_SECONDS} s")
    others = [future.exception() for future in futures if future.done()]
    for note in [note for other in others if other is not first for note in getattr(other, "__notes__", ())]:
        first.add_note(note)


def _check(sample: Sample, span: Span, drawn: Drawn, taken: list[list[int]]) -> None:
    """What was drawn must be what vLLM took, in every stream, to its end or to a stop token."""
    tokens = drawn.tokens_S.tolist()
    ends = next((i + 1 for i, token in enumerate(tokens) if token in span.stop), len(tokens))
    if drawn.fault is not None or any(row != tokens[:ends] for row in taken):
        raise RuntimeError(
            f"vLLM did not follow the draws of sample {sample.sample_id!r} of group {sample.group_id!r}, seed "
            f"{sample.seed} ({drawn.fault or 'its tokens are others'}), so its log-probs would be wrong; lower "
            "max_rows or raise kv_megabytes, and report it if that does not help"
        )
