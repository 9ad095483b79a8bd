"""Several decode steps of vLLM for one turn of its scheduler, on a CPU.

A turn of vLLM's scheduler and runner costs tens of microseconds a request, which a small model on a CPU decodes in.
While every running request does nothing but take its next token, the turns differ in the token and the position alone:
`WaveScheduler` (`scheduler`) reserves the slots of several tokens and says how many steps to add, and the runner here
adds them, in the same batch and by the same model, sampler and logits processors. vLLM then sees a step that returned
several tokens a request, as it does from speculative decoding.
"""

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.config import get_layers_from_vllm_config
from vllm.forward_context import ForwardContext, get_forward_context, override_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker

from rollouts.kernels.building import NoKernels
from rollouts.kernels.native import load_kernels
from rollouts.vllm_engine.cpu_kernels import KernelImpl
from rollouts.vllm_engine.flat import FlatLlama, is_flat


@dataclass
class StepsOutput(SchedulerOutput):
    """vLLM's plan of a step in which every running request takes one token, and how many such steps to add."""

    further: int = 0


class StepsRunner(CPUModelRunner):
    """vLLM's, with the steps that a plan adds, attention called directly, and its cache on large pages."""

    around: ForwardContext | None = None
    flat: FlatLlama | None = None
    """The model of this turn's further steps, where it is one that can be called more directly."""

    def initialize_kv_cache(self, *args: Any, **kwargs: Any) -> None:
        super().initialize_kv_cache(*args, **kwargs)
        if self.vllm_config.model_config.enforce_eager:
            # An operation that hides attention from a compiler costs tens of microseconds a call, and nobody compiles.
            for layer in get_layers_from_vllm_config(self.vllm_config, Attention).values():
                layer.use_direct_call = True
        with suppress(NoKernels):
            for memory in {cache.data_ptr(): cache.untyped_storage() for cache in self.kv_caches}.values():
                load_kernels().zeros_anew(memory)

    @torch.inference_mode()
    def sample_tokens(self, grammar_output: Any) -> Any:  # pyrefly: ignore  (the base's has a decorator without types)
        planned = None if self.execute_model_state is None else self.execute_model_state.scheduler_output
        output = super().sample_tokens(grammar_output)
        if isinstance(planned, StepsOutput) and self._decodes_by_kernels():
            token_B1 = torch.tensor(output.sampled_token_ids)
            # The lists of tokens so far that logits processors see.
            seen = [self.requests[name].output_token_ids for name in self.input_batch.req_ids]
            eager = self.vllm_config.model_config.enforce_eager
            self.flat = FlatLlama(self.model) if planned.further and eager and is_flat(self.model) else None
            for _ in range(planned.further):
                token_B1 = self._sample(self._logits(planned, token_B1), None).sampled_token_ids
                for row, token in enumerate(token_B1.flatten().tolist()):
                    output.sampled_token_ids[row].append(token)
                    seen[row].append(token)
            self._keep(output.sampled_token_ids)
        return output

    def _model_forward(self, *args: Any, **kwargs: Any) -> Any:
        self.around = get_forward_context()
        return super()._model_forward(*args, **kwargs)

    def _decodes_by_kernels(self) -> bool:
        """Whether every layer's last step was one of `attend_paged`, which finds its place from lengths and pages
        alone; vLLM's kernels would read plans of the step's work, too, that are made once a turn."""
        layers = get_layers_from_vllm_config(self.vllm_config, Attention).values()
        return all(isinstance(layer.impl, KernelImpl) and layer.impl.by_kernel for layer in layers)

    def _logits(self, planned: StepsOutput, token_B1: Tensor) -> Tensor:
        """After these tokens, each a position on from its row's last. Inputs are views of vLLM's buffers."""
        rows = len(token_B1)
        self.input_ids.gpu[:rows] = token_B1.flatten()
        self.positions[:rows].add_(1)
        self.seq_lens[:rows].add_(1)
        input_ids, embeds, positions, between, more, _ = self._preprocess(planned, rows)
        with override_forward_context(self.around):
            if self.flat is not None and input_ids is not None:
                hidden = self.flat(input_ids, positions)
            else:
                hidden = super()._model_forward(input_ids, positions, between, embeds, **more)
        model: Any = self.model
        return model.compute_logits(hidden[:rows])

    def _keep(self, taken_BK: list[list[int]]) -> None:
        """All but the first of a turn's tokens, which vLLM has kept, where it reads them from in its next turn."""
        batch = self.input_batch
        for row, (_, *more) in enumerate(taken_BK):
            start = batch.num_tokens_no_spec[row]
            end = start + len(more)
            batch.token_ids_cpu[row, start:end] = more
            batch.is_token_ids[row, start:end] = True
            batch.num_tokens_no_spec[row] = end


class StepsWorker(CPUWorker):
    """vLLM's, with that runner: its `worker_cls`."""

    def init_device(self) -> None:
        super().init_device()
        self.model_runner = StepsRunner(self.vllm_config, torch.device("cpu"))
