"""Draws inside vLLM: a logits processor that applies the law, decides each token, and keeps what it did.

vLLM's own sampler scales, masks and draws in ways that differ between its versions and devices. Here the one law of
`rollouts.law` turns logits into log-probs, one uniform of the row's seed decides the token, and the row is left with
a single finite logit, so that whatever vLLM does next takes that token. A sample under guidance is one request a
stream, or one request of a model that carries both (`two_streams`); all its rows get the token drawn from their mix.

A step never raises: vLLM would keep the requests of a step that failed, and its next call would wait for them for
ever. What went wrong is kept with the sample and raised when the sample is collected.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from rollouts.law import Law, draw, law_log_probs, pack_support, row_uniforms
from rollouts.vllm_engine.drawn import KEY, Drawn


@dataclass
class _Sample:
    """A sample being drawn, and what its rows carried."""

    law: Law
    forced: dict[int, int]
    uniforms: list[float]
    drawn: Drawn


@dataclass
class _Row:
    """A row of vLLM's batch: the streams of a sample that it carries, side by side in its logits. `output` is vLLM's
    live list of its tokens so far."""

    sample: str
    streams: tuple[str, ...]
    output: list[int] = field(repr=False)


@dataclass
class _Group:
    """The samples of one law in vLLM's batch, for as long as the batch stays as it is; K streams, N samples.

    A stream's logits lie in a row and a block of its columns. `outputs` are vLLM's live lists."""

    law: Law
    samples: list[_Sample]
    row_KN: Tensor
    block_KN: Tensor
    outputs: list[list[list[int]]]

    def positions(self) -> list[int]:
        """[N] of the next token; -1 for a sample whose streams are apart, which is noted with it."""
        position_N, *others = [list(map(len, stream)) for stream in self.outputs]
        if all(other == position_N for other in others):
            return position_N
        for n, found in enumerate(zip(position_N, *others, strict=True)):
            if len(set(found)) > 1:
                _note(self.samples[n], f"at positions {sorted(set(found))}")
                position_N[n] = -1
        return position_N

    def of(self, kept: list[int]) -> "_Group":
        """Some of the samples; the group itself where that is all."""
        if len(kept) == len(self.samples):
            return self
        samples = [self.samples[n] for n in kept]
        outputs = [[stream[n] for n in kept] for stream in self.outputs]
        return _Group(self.law, samples, self.row_KN[:, kept], self.block_KN[:, kept], outputs)


class LawProcessor(LogitsProcessor):
    """See the module's text. Rows without `row_arguments` are left alone."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self.vocabulary: int = vllm_config.model_config.get_vocab_size()
        self.rows: dict[int, _Row] = {}
        self.samples: dict[str, _Sample] = {}
        self.groups: list[_Group] | None = None
        """Those of the batch as it is; None where it has changed since."""

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: Any) -> None:
        if batch_update is not None:
            process_dict_updates(self.rows, batch_update, self._row)
            self.groups = None

    def apply(self, logits: Tensor) -> Tensor:
        """[rows, streams a row x vocabulary] in, [rows, vocabulary] out."""
        if self.groups is None:
            self.groups = self._grouped()
        for group in self.groups:
            position_N = group.positions()
            free = [n for n, position in enumerate(position_N) if position >= 0]
            for n in [n for n in free if position_N[n] in group.samples[n].forced]:
                forced = group.samples[n].forced[position_N[n]]
                _leave_one(logits, group.row_KN[:, n], torch.tensor(forced))
                group.samples[n].drawn.tokens_S[position_N[n]] = forced
                free.remove(n)
            if free:
                _decide(logits, self.vocabulary, group.of(free), [position_N[n] for n in free])
        return logits[:, : self.vocabulary]

    def collect(self, names: list[str]) -> list[Drawn]:
        """Hand over what was drawn for these samples, and forget them, as whoever asks has its rows finished, and what
        was given up: all that has no rows. Raises RuntimeError for a sample that is not known."""
        if unknown := [name for name in names if name not in self.samples]:
            raise RuntimeError(
                f"nothing is known of {len(unknown)} of {len(names)} samples, among them {unknown[0]}: they never came "
                "or were forgotten; a vLLM serves one engine at a time, so give every training process its own"
            )
        drawn = [self.samples[name].drawn for name in names]
        kept = {row.sample for row in self.rows.values()} - set(names)
        self.samples = {name: sample for name, sample in self.samples.items() if name in kept}
        self.groups = None
        return drawn

    def _grouped(self) -> list[_Group]:
        found: dict[str, dict[str, tuple[int, int, list[int]]]] = defaultdict(dict)
        for index, row in self.rows.items():
            for block, stream in enumerate(row.streams):
                found[row.sample][stream] = (index, block, row.output)
        by_law: dict[Law, list[str]] = defaultdict(list)
        for name, places in found.items():
            sample = self.samples.get(name)
            if sample is None:  # it was collected, and its rows are still here
                continue
            if set(places) == set(sample.law.streams()):
                by_law[sample.law].append(name)
            else:
                _note(sample, f"{sorted(places)} alone")
        groups = []
        for law, names in by_law.items():
            places_KN = [[found[name][stream] for name in names] for stream in law.streams()]
            row_KN, block_KN, outputs = ([[place[i] for place in stream] for stream in places_KN] for i in range(3))
            samples = [self.samples[name] for name in names]
            groups.append(_Group(law, samples, torch.tensor(row_KN), torch.tensor(block_KN), cast(Any, outputs)))
        return groups

    def _row(self, params: SamplingParams, prompt: list[int] | None, output: list[int]) -> _Row | None:
        wanted = (params.extra_args or {}).get(KEY)
        if wanted is None:
            return None
        name, law = wanted["sample"], Law.from_dict(wanted["law"])
        if name not in self.samples:
            length, size = wanted["length"], law.vocabulary[1] - law.vocabulary[0]
            self.samples[name] = _Sample(
                law,
                {position: token for position, token in wanted["forced"]},
                row_uniforms([int(wanted["seed"])], length)[0].tolist(),
                Drawn(
                    np.full(length, -1, dtype=np.int64),
                    np.zeros(length),
                    np.zeros((length, -(-size // 8)), dtype=np.uint8) if law.truncated else None,
                ),
            )
        return _Row(name, tuple(wanted["streams"]), output)


def _note(sample: _Sample, what: str) -> None:
    """The first fault is kept."""
    sample.drawn.fault = sample.drawn.fault or f"its streams parted: {what}"


def _decide(logits: Tensor, vocabulary: int, group: _Group, positions: list[int]) -> None:
    """Draw the next token of every sample of one law, and leave it alone finite in all rows of the sample."""
    low, high = group.law.vocabulary
    blocks = logits.view(len(logits), -1, vocabulary)
    streams = zip(group.law.streams(), group.row_KN, group.block_KN, strict=True)
    by_stream = {name: blocks[row_N, block_N, low:high] for name, row_N, block_N in streams}
    logp_NV, support_NV = law_log_probs(group.law, by_stream)
    samples = list(zip(group.samples, positions, strict=True))
    uniforms = [sample.uniforms[position] for sample, position in samples]
    code_N = draw(logp_NV, torch.tensor(uniforms, dtype=torch.float64, device=logits.device))
    chosen = logp_NV.gather(-1, code_N.unsqueeze(-1)).squeeze(-1).tolist()
    packed = None if support_NV is None else pack_support(support_NV).numpy()
    token_N = code_N + low
    for n, (token, (sample, position)) in enumerate(zip(token_N.tolist(), samples, strict=True)):
        drawn = sample.drawn
        drawn.tokens_S[position], drawn.logp_S[position] = token, chosen[n]
        if drawn.support is not None and packed is not None:
            drawn.support[position] = packed[n]
    _leave_one(logits, group.row_KN, token_N.expand(group.row_KN.shape))


def _leave_one(logits: Tensor, rows: Tensor, tokens: Tensor) -> None:
    """In place: a token (of the shape of `rows`) is all that its row can still be."""
    logits[rows] = -torch.inf
    logits[rows, tokens] = 0.0


def on_processor(worker: Any, call: Callable[[LawProcessor], Any]) -> Any:
    """`call` on the processor inside a vLLM worker."""
    (found,) = [p for p in worker.model_runner.input_batch.logitsprocs.all if isinstance(p, LawProcessor)]
    return call(found)
