"""vLLM's scheduler, with waves (`waves`) and several steps a turn (`steps`). Named in vLLM's `scheduler_cls`."""

from bisect import bisect_right
from collections.abc import Iterable
from typing import Any

from vllm.platforms import current_platform
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from rollouts.vllm_engine.drawn import KEY

FURTHER = 31
"""Decode steps added to one at most: so long a request that arrives meanwhile waits."""


class WaveScheduler(Scheduler):
    """Holds the requests of a wave until all have arrived and nothing else runs, then admits them in one step.

    Over HTTP requests arrive one by one, and an engine in a process of its own would start with the first. Requests
    without a wave are scheduled as ever.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.held: dict[str, list[Request]] = {}
        stock = self.num_lookahead_tokens == 0 and self.connector is None and not self.use_pp
        self.goes_on = current_platform.is_cpu() and stock and not self.model_uses_mrope

    def add_request(self, request: Request) -> None:
        wave = _wave(request)
        if wave is None:
            super().add_request(request)
        else:
            self.held.setdefault(wave[0], []).append(request)

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        if self.get_request_counts() == (0, 0) and (name := self._next_wave()) is not None:
            for request in self.held.pop(name):
                super().add_request(request)
        further, running = 0, len(self.running)
        if self.goes_on:
            further = self.num_lookahead_tokens = self._further()
        planned = super().schedule(throttle_prefills)
        if further and len(planned.num_scheduled_tokens) == running == planned.total_num_scheduled_tokens:
            return _going_on(planned, further)
        return planned

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        """Of a plan that added steps: tokens after the first were computed by steps that were not planned one by one.

        Where the runner added none (its attention is not the kernels'), none are reserved from then on."""
        if getattr(scheduler_output, "further", 0):
            taken_BK = model_runner_output.sampled_token_ids
            for name, taken in zip(model_runner_output.req_ids, taken_BK, strict=True):
                if (request := self.requests.get(name)) is not None:
                    request.num_computed_tokens += len(taken) - 1
            if all(len(taken) == 1 for taken in taken_BK):
                self.goes_on, self.num_lookahead_tokens = False, 0
        return super().update_from_output(scheduler_output, model_runner_output)

    def get_num_unfinished_requests(self) -> int:
        """With the waves that could start: without them the engine would go to sleep before the last ones."""
        waiting = self._next_wave() if self.pause_state == PauseState.UNPAUSED else None
        return super().get_num_unfinished_requests() + (0 if waiting is None else len(self.held[waiting]))

    def finish_requests(self, request_ids: str | Iterable[str] | None, finished_status: RequestStatus) -> list[Request]:
        """A held request that is given up takes its whole wave along: the rest could never start."""
        given = [request_ids] if isinstance(request_ids, str) else request_ids
        names = None if given is None else set(given)
        dropped = []
        for name, requests in list(self.held.items()):
            if names is None or any(request.request_id in names for request in requests):
                dropped += self.held.pop(name)
        for request in dropped:
            request.status = finished_status
        return [*dropped, *super().finish_requests(names, finished_status)]

    def reset_prefix_cache(self, *args: Any, **kwargs: Any) -> bool:
        """With nothing cached, free blocks are handed out in the order they lie in again, not in that in which requests
        gave them back: neighbouring pages of memory are read faster."""
        done = super().reset_prefix_cache(*args, **kwargs)
        if done:
            queue = self.kv_cache_manager.block_pool.free_block_queue
            queue.append_n(sorted(queue.popleft_n(queue.num_free_blocks), key=lambda block: block.block_id))
        return done

    def _further(self) -> int:
        """Steps that can follow the next one without a look at the queues: as long as all that run are samples with
        tokens to go, in decode, that no token can end, nothing that waits could join them, and the free blocks hold
        what they take: for steps that are only reserved, nobody is evicted."""
        joins = len(self.waiting) > 0 and len(self.running) < self.max_num_running_reqs
        if not self.running or joins or not all(_steady(request) for request in self.running):
            return 0
        most = min([FURTHER, *(one.max_tokens - one.num_output_tokens - 1 for one in self.running)])
        free = self.kv_cache_manager.block_pool.get_num_free_blocks()
        return most if self._blocks(most) <= free else bisect_right(range(1, most + 1), free, key=self._blocks)

    def _blocks(self, further: int) -> int:
        """New blocks that the next step and so many further ones take."""
        kinds = self.kv_cache_manager.coordinator.single_type_managers
        rows = [(one.request_id, one.num_computed_tokens + 1 + further) for one in self.running]
        return sum(
            max(0, -(-end // kind.block_size) - len(kind.req_to_blocks[name])) for kind in kinds for name, end in rows
        )

    def _next_wave(self) -> str | None:
        return next((name for name, found in self.held.items() if len(found) == _size(found[0])), None)


def _going_on(planned: SchedulerOutput, further: int) -> SchedulerOutput:
    from rollouts.vllm_engine.steps import StepsOutput  # vLLM's worker on a CPU, which elsewhere cannot be imported

    return StepsOutput(**vars(planned), further=further)


def _steady(request: Request) -> bool:
    """Whether it is a sample of a law, its prompt read, that ends with its length alone."""
    parameters = request.sampling_params
    ours = parameters is not None and KEY in (parameters.extra_args or {}) and not parameters.stop_token_ids
    return ours and request.num_tokens - request.num_computed_tokens == 1


def _wave(request: Request) -> tuple[str, int] | None:
    """The wave's name and number of rows."""
    parameters = request.sampling_params
    arguments = ((parameters.extra_args if parameters else None) or {}).get(KEY)
    return tuple(arguments["wave"]) if arguments and arguments["wave"] else None


def _size(request: Request) -> int:
    wave = _wave(request)
    return 0 if wave is None else wave[1]
