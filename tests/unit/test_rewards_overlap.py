"""Scoring behind generation: order, failures, and how long it takes on a clock of its own."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from typing import Any

import pytest

from rewards.overlap import scored_behind


class Later(Future[Any]):
    """What a virtual worker has done by the time `ends`. Whoever waits for it is there then."""

    def __init__(self, clock: "Clock", ends: float, value: Any) -> None:
        super().__init__()
        self.clock, self.ends, self.value = clock, ends, value

    def done(self) -> bool:
        return self.ends <= self.clock.now

    def result(self, timeout: float | None = None) -> Any:
        self.clock.now = max(self.clock.now, self.ends)
        return self.value


class Clock(Executor):
    """A caller's time, and one worker who takes `latency_s` for a chunk and does one after the other."""

    def __init__(self, latency_s: float) -> None:
        self.now, self.free, self.latency_s = 0.0, 0.0, latency_s

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Later:
        self.free = max(self.free, self.now) + self.latency_s
        return Later(self, self.free, fn(*args, **kwargs))


@pytest.mark.parametrize("chunks", [1, 2, 4, 16])
@pytest.mark.parametrize(
    ("judge_s", "rollout_s"), [(8.0, 8.0), (8.0, 1.0), (1.0, 8.0), (0.0, 5.0), (5.0, 0.0), (3.0, 2.0)]
)
def test_a_step_takes_the_longer_of_both_and_a_chunk_of_each(judge_s: float, rollout_s: float, chunks: int) -> None:
    clock = Clock(judge_s / chunks)

    def drawn() -> Iterator[int]:
        for at in range(chunks):
            clock.now += rollout_s / chunks
            yield at

    assert scored_behind(drawn(), lambda at: -at, lambda: clock) == [(at, -at) for at in range(chunks)]
    assert clock.now <= 1.1 * max(judge_s, rollout_s) + (judge_s + rollout_s) / chunks
    assert clock.now >= max(judge_s, rollout_s)
    if chunks == 4:
        assert clock.now == pytest.approx(max(judge_s, rollout_s) + min(judge_s, rollout_s) / chunks)


def test_the_next_chunk_is_drawn_while_the_last_is_scored_and_never_two_are_scored() -> None:
    events: list[str] = []
    second_drawn, scoring = threading.Event(), threading.Lock()

    def drawn() -> Iterator[int]:
        for at in range(3):
            events.append(f"drawn {at}")
            if at == 1:
                second_drawn.set()
            yield at

    def score(at: int) -> int:
        assert threading.current_thread() is not threading.main_thread()
        assert scoring.acquire(blocking=False), "two chunks at once"
        # The first score does not come back before the second chunk has been drawn.
        assert second_drawn.wait(30)
        events.append(f"scored {at}")
        scoring.release()
        return 10 * at

    assert scored_behind(drawn(), score) == [(0, 0), (1, 10), (2, 20)]
    assert events.index("drawn 1") < events.index("scored 0") < events.index("scored 1") < events.index("scored 2")


def test_a_score_that_fails_stops_the_drawing_and_so_does_a_draw_that_fails() -> None:
    seen: list[int] = []
    failed = threading.Event()

    def drawn() -> Iterator[int]:
        for at in range(5):
            if at == 2:
                assert failed.wait(30)
            seen.append(at)
            yield at

    def score(at: int) -> int:
        if at == 1:
            failed.set()
            raise TypeError("no score")
        return at

    with pytest.raises(TypeError, match="no score"):
        scored_behind(drawn(), score)
    assert seen in ([0, 1, 2], [0, 1, 2, 3]), "the failure is seen at the next chunk, or the one after"

    def broken() -> Iterator[int]:
        yield 0
        raise OSError("no chunk")

    with pytest.raises(OSError, match="no chunk"):
        scored_behind(broken(), lambda at: at)


def test_a_run_that_is_stopped_does_not_wait_for_a_judge_that_hangs() -> None:
    release = threading.Event()

    def drawn() -> Iterator[int]:
        yield 0
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scored_behind(drawn(), lambda at: release.wait(30))
    release.set()
