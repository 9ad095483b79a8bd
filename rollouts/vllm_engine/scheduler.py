"""vLLM's scheduler, with waves: see `waves`. Named in vLLM's `scheduler_cls`."""

from collections.abc import Iterable
from typing import Any

from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request, RequestStatus

from rollouts.vllm_engine.drawn import KEY


class WaveScheduler(Scheduler):
    """Holds the requests of a wave until all have arrived and nothing else runs, then admits them in one step.

    Over HTTP requests arrive one by one, and an engine in a process of its own would start with the first. Requests
    without a wave are scheduled as ever.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.held: dict[str, list[Request]] = {}

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
        return super().schedule(throttle_prefills)

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

    def _next_wave(self) -> str | None:
        return next((name for name, found in self.held.items() if len(found) == _size(found[0])), None)


def _wave(request: Request) -> tuple[str, int] | None:
    """The wave's name and number of rows."""
    parameters = request.sampling_params
    arguments = ((parameters.extra_args if parameters else None) or {}).get(KEY)
    return tuple(arguments["wave"]) if arguments and arguments["wave"] else None


def _size(request: Request) -> int:
    wave = _wave(request)
    return 0 if wave is None else wave[1]
