"""vLLM inside this process."""

import gc
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rollouts.vllm_engine.drawn import KEY, Drawn
from rollouts.vllm_engine.faults import NOT_INSTALLED, memory_advice
from rollouts.vllm_engine.host import BLOCK, MEMORY_SHARE, SURROUNDINGS, Room, Row, room_of_model


class LocalHost:
    """Synchronous. What it changes of the process stays: environment variables (`SURROUNDINGS`), and vLLM's registries,
    in which this project's models and kernels stand from then on.

    `overrides` lay over the checkpoint's config.json (`plugin.two_stream_overrides`). With `chunked_prefill` long
    prompts are read in parts; requests that must keep step cannot be. With `sleep` (GPUs only) a rollout ends by giving
    the device's memory back: weights go to this machine's memory, keys and values are dropped. With `embeds` a prompt
    may be embeddings.

    Raises:
        ImportError: vLLM is not installed.
        ValueError: the cache cannot hold one sample or is more than there is, or `sleep` where there is none.
        RuntimeError: the process is one of several of a distributed run.
    """

    def __init__(
        self,
        folder: Path,
        *,
        max_length: int,
        dtype: str,
        max_rows: int,
        max_prompt_tokens: int,
        kv_bytes: int,
        enforce_eager: bool = True,
        overrides: Mapping[str, Any] | None = None,
        chunked_prefill: bool = False,
        sleep: bool = False,
        embeds: bool = False,
    ) -> None:
        _refuse_several_processes()
        self._owns_group = not torch.distributed.is_initialized()
        # Without chunks vLLM wants to be able to prefill the longest request at once.
        budget = max_prompt_tokens if chunked_prefill else max(max_prompt_tokens, max_length)
        self.llm = _start(
            model=str(folder), dtype=dtype, max_model_len=max_length, max_num_seqs=max_rows,
            max_num_batched_tokens=budget, kv_cache_memory_bytes=kv_bytes, block_size=BLOCK,
            hf_overrides=dict(overrides or {}), enable_chunked_prefill=chunked_prefill,
            enable_sleep_mode=sleep, enable_prompt_embeds=embeds, enforce_eager=enforce_eager,
            gpu_memory_utilization=MEMORY_SHARE,
        )  # fmt: skip
        # Block 0 stands for "none".
        blocks = self.llm.llm_engine.vllm_config.cache_config.num_gpu_blocks - 1
        (of_model,) = self.llm.apply_model(room_of_model)
        self.room = Room(max_rows, max_prompt_tokens, blocks, max_length, dtype=dtype, **of_model)
        self.sleep, self._asleep = sleep, False

    def run(self, rows: Sequence[Row], samples: Sequence[str]) -> tuple[list[list[int]], list[Drawn]]:
        from vllm import SamplingParams

        from rollouts.vllm_engine.processor import on_processor

        prompts = [
            {"prompt_token_ids": list(row.prefix)} if row.embeds is None else {"prompt_embeds": row.embeds}
            for row in rows
        ]
        parameters = [
            # Greedy: the processor leaves one token to take.
            SamplingParams(
                temperature=0.0, max_tokens=row.length, ignore_eos=True, detokenize=False,
                stop_token_ids=list(row.stop), extra_args={KEY: row.arguments},
                skip_reading_prefix_cache=self.room.whole_prompts,
            )
            for row in rows
        ]  # fmt: skip
        with _memory_named(self.room.length):
            self._wake()
            try:
                outputs = self.llm.generate(prompts, parameters, use_tqdm=False)
            finally:
                self._abort_unfinished()
        names = list(samples)
        (drawn,) = self.llm.collective_rpc(on_processor, args=(lambda processor: processor.collect(names),))
        if self.sleep:
            self.llm.sleep(level=1)
            self._asleep = True
        return [list(output.outputs[0].token_ids) for output in outputs], drawn

    def abandon(self) -> None:
        """Nothing: vLLM runs in the thread that calls it, and an interrupt there ends it."""

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """`host.Load`: the tensors are handed over as they are."""
        from rollouts.vllm_engine.weights import refresh_tied_head, reload_all

        self._wake()
        reload_all(lambda **given: self.llm.collective_rpc("reload_weights", kwargs=given), weights)
        self.llm.apply_model(refresh_tied_head)

    def forget(self) -> None:
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM kept keys and values of the old weights: requests are still running; finish them")

    def fingerprint(self) -> str:
        from rollouts.vllm_engine.weights import running_fingerprint

        self._wake()
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

    def _wake(self) -> None:
        if self._asleep:
            self.llm.wake_up()
            self._asleep = False

    def _abort_unfinished(self) -> None:
        """After a failed or interrupted call; vLLM would otherwise go on waiting for these rows in the next one."""
        engine = self.llm.llm_engine
        if engine.has_unfinished_requests():
            engine.abort_request(list(engine.output_processor.request_states), internal=True)


def _start(**settings: Any) -> Any:
    # Read when vLLM builds its engine. In this process a sync hands tensors over as they are, and the processor's
    # records can be fetched.
    os.environ.update(SURROUNDINGS | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"})
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # it warns at length of what is chosen here
    try:
        from vllm import LLM
    except ImportError as error:
        raise ImportError(NOT_INSTALLED) from error
    from rollouts.vllm_engine import plugin
    from rollouts.vllm_engine.cpu_kernels import use_kernels
    from rollouts.vllm_engine.processor import LawProcessor
    from rollouts.vllm_engine.scheduler import WaveScheduler

    plugin.register()  # a checkout that was never installed has no entry points
    use_kernels()
    set_num_threads = torch.set_num_threads
    try:
        with _memory_named(settings["max_model_len"]):
            return LLM(
                skip_tokenizer_init=True, async_scheduling=False,
                enable_prefix_caching=True, logits_processors=[LawProcessor], scheduler_cls=WaveScheduler,
                disable_log_stats=True, worker_cls=plugin.WORKER, **settings,
            )  # fmt: skip
    finally:
        torch.set_num_threads = set_num_threads  # vLLM puts a no-op there


@contextmanager
def _memory_named(length: int) -> Iterator[None]:
    """Raises ValueError with the settings to change, in place of what torch or vLLM say of memory. `length` is the
    longest request's."""
    try:
        yield
    except (ValueError, RuntimeError) as error:  # the latter also where memory is out
        if (advice := memory_advice(f"{type(error).__name__}: {error}", length)) is None:
            raise
        raise ValueError(f"{advice}. vLLM: {error}") from error


def _refuse_several_processes() -> None:
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size > 1:
        raise RuntimeError(
            f"the vllm engine runs inside a single process and this run has {size}; set engine.kind: vllm_server or "
            "torch, or start one process"
        )
