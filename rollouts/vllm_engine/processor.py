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
from typing import Any

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
    uniforms_S: Tensor
    drawn: Drawn


@dataclass
class _Row:
    """A row of vLLM's batch: the streams of a sample that it carries, side by side in its logits. `output` is vLLM's
    live list of its tokens so far."""

    sample: str
    streams: tuple[str, ...]
    output: list[int] = field(repr=False)


@dataclass(frozen=True)
class _Place:
    """Where a stream's logits lie: a row, and a block of its columns."""

    row: int
    block: int


class LawProcessor(LogitsProcessor):
    """See the module's text. Rows without `row_arguments` are left alone."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self.vocabulary: int = vllm_config.model_config.get_vocab_size()
        self.rows: dict[int, _Row] = {}
        self.samples: dict[str, _Sample] = {}

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: Any) -> None:
        process_dict_updates(self.rows, batch_update, self._row)

    def apply(self, logits: Tensor) -> Tensor:
        """[rows, streams a row x vocabulary] in, [rows, vocabulary] out."""
        found: dict[str, dict[str, tuple[_Place, int]]] = defaultdict(dict)
        for index, row in self.rows.items():
            for block, stream in enumerate(row.streams):
                found[row.sample][stream] = (_Place(index, block), len(row.output))
        ready: dict[Law, list[tuple[_Sample, int, list[_Place]]]] = defaultdict(list)
        for name, places in found.items():
            sample, drawn = self.samples[name], self.samples[name].drawn
            positions = {position for _, position in places.values()}
            if set(places) != set(sample.law.streams()) or len(positions) > 1:
                drawn.fault = drawn.fault or f"its streams parted: {sorted(places)} at positions {sorted(positions)}"
                continue
            position = positions.pop()
            order = [places[stream][0] for stream in sample.law.streams()]
            if position in sample.forced:
                _leave_one(logits, [place.row for place in order], [sample.forced[position]] * len(order))
                drawn.tokens_S[position] = sample.forced[position]
            else:
                ready[sample.law].append((sample, position, order))
        for law, group in ready.items():
            _decide(logits, self.vocabulary, law, group)
        return logits[:, : self.vocabulary]

    def collect(self, names: list[str]) -> list[Drawn]:
        """Hand over what was drawn for these samples, and forget all: whoever asks has its rows finished."""
        drawn = [self.samples[name].drawn for name in names]
        self.samples.clear()
        return drawn

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
                row_uniforms([int(wanted["seed"])], length)[0],
                Drawn(
                    np.full(length, -1, dtype=np.int64),
                    np.zeros(length),
                    np.zeros((length, -(-size // 8)), dtype=np.uint8) if law.truncated else None,
                ),
            )
        return _Row(name, tuple(wanted["streams"]), output)


def _decide(logits: Tensor, vocabulary: int, law: Law, group: list[tuple[_Sample, int, list[_Place]]]) -> None:
    """Draw the next token of every sample of one law, and leave it alone finite in all rows of the sample."""
    (low, high), by_stream = law.vocabulary, {}
    blocks = logits.view(len(logits), -1, vocabulary)
    for k, name in enumerate(law.streams()):
        rows_N = torch.tensor([order[k].row for _, _, order in group])
        blocks_N = torch.tensor([order[k].block for _, _, order in group])
        by_stream[name] = blocks[rows_N, blocks_N, low:high]
    logp_NV, support_NV = law_log_probs(law, by_stream)
    uniform_N = torch.stack([sample.uniforms_S[position] for sample, position, _ in group]).to(logits.device)
    code_N = draw(logp_NV, uniform_N)
    chosen = logp_NV.gather(-1, code_N.unsqueeze(-1)).squeeze(-1).tolist()
    packed = None if support_NV is None else pack_support(support_NV).numpy()
    tokens = (code_N + low).tolist()
    for n, (sample, position, _) in enumerate(group):
        drawn = sample.drawn
        drawn.tokens_S[position], drawn.logp_S[position] = tokens[n], chosen[n]
        if drawn.support is not None and packed is not None:
            drawn.support[position] = packed[n]
    rows = [place.row for _, _, order in group for place in order]
    _leave_one(logits, rows, [token for token, (_, _, order) in zip(tokens, group, strict=True) for _ in order])


def _leave_one(logits: Tensor, rows: list[int], tokens: list[int]) -> None:
    """In place: token n is all that row n can still be."""
    rows_N = torch.tensor(rows)
    logits[rows_N] = -torch.inf
    logits[rows_N, torch.tensor(tokens)] = 0.0


def on_processor(worker: Any, call: Callable[[LawProcessor], Any]) -> Any:
    """`call` on the processor inside a vLLM worker."""
    (found,) = [p for p in worker.model_runner.input_batch.logitsprocs.all if isinstance(p, LawProcessor)]
    return call(found)
