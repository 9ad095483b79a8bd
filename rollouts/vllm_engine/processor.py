"""Draws inside vLLM: a logits processor that applies the law, decides each token, and keeps what it did.

vLLM's own sampler scales, masks and draws in ways that differ between its versions and devices. Here the one law of
`rollouts.law` turns logits into log-probs, one uniform of the row's seed decides the token, and the row is left with
a single finite logit, so that whatever vLLM does next takes that token. A sample under guidance is one request a
stream; all of them get the token drawn from their mix.

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
    """A row of vLLM's batch: a stream of a sample. `output` is vLLM's live list of its tokens so far."""

    sample: str
    stream: str
    output: list[int] = field(repr=False)


class LawProcessor(LogitsProcessor):
    """See the module's text. Rows without `row_arguments` are left alone."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self.rows: dict[int, _Row] = {}
        self.samples: dict[str, _Sample] = {}

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: Any) -> None:
        process_dict_updates(self.rows, batch_update, self._row)

    def apply(self, logits: Tensor) -> Tensor:
        found: dict[str, dict[str, tuple[int, _Row]]] = defaultdict(dict)
        for index, row in self.rows.items():
            found[row.sample][row.stream] = (index, row)
        ready: dict[Law, list[tuple[_Sample, int, list[int]]]] = defaultdict(list)
        for name, rows in found.items():
            sample, drawn = self.samples[name], self.samples[name].drawn
            positions = {len(row.output) for _, row in rows.values()}
            if set(rows) != set(sample.law.streams()) or len(positions) > 1:
                drawn.fault = drawn.fault or f"its streams parted: {sorted(rows)} at positions {sorted(positions)}"
                continue
            position = positions.pop()
            if position in sample.forced:
                indices = [index for index, _ in rows.values()]
                _leave_one(logits, torch.tensor(indices), torch.tensor([sample.forced[position]]))
                drawn.tokens_S[position] = sample.forced[position]
            else:
                order = [rows[name][0] for name in sample.law.streams()]
                ready[sample.law].append((sample, position, order))
        for law, group in ready.items():
            _decide(logits, law, group)
        return logits

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
        return _Row(name, wanted["stream"], output)


def _decide(logits: Tensor, law: Law, group: list[tuple[_Sample, int, list[int]]]) -> None:
    """Draw the next token of every sample of one law, and leave it alone finite in all rows of the sample."""
    rows_NK = torch.tensor([rows for _, _, rows in group])
    low, high = law.vocabulary
    by_stream = {name: logits[rows_NK[:, k], low:high] for k, name in enumerate(law.streams())}
    logp_NV, support_NV = law_log_probs(law, by_stream)
    uniform_N = torch.stack([sample.uniforms_S[position] for sample, position, _ in group]).to(logits.device)
    code_N = draw(logp_NV, uniform_N)
    chosen = logp_NV.gather(-1, code_N.unsqueeze(-1)).squeeze(-1).tolist()
    packed = None if support_NV is None else pack_support(support_NV).numpy()
    token_N = code_N.cpu() + low
    for n, (sample, position, _) in enumerate(group):
        drawn = sample.drawn
        drawn.tokens_S[position], drawn.logp_S[position] = int(token_N[n]), chosen[n]
        if drawn.support is not None and packed is not None:
            drawn.support[position] = packed[n]
    _leave_one(logits, rows_NK.flatten(), token_N.repeat_interleave(rows_NK.shape[1]))


def _leave_one(logits: Tensor, rows_N: Tensor, tokens_N: Tensor) -> None:
    """In place: token n is all that row n can still be."""
    logits[rows_N] = -torch.inf
    logits[rows_N, tokens_N.expand(len(rows_N))] = 0.0


def on_processor(worker: Any, call: Callable[[LawProcessor], Any]) -> Any:
    """`call` on the processor inside a vLLM worker."""
    (found,) = [p for p in worker.model_runner.input_batch.logitsprocs.all if isinstance(p, LawProcessor)]
    return call(found)
