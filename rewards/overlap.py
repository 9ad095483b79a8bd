"""Scoring behind generation: while one chunk is scored, the next is made."""

from collections.abc import Callable, Iterable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
S = TypeVar("S")


def scored_behind(
    chunks: Iterable[T], score: Callable[[T], S], worker: Callable[[], Executor] | None = None
) -> list[tuple[T, S]]:
    """Every chunk with its score, in order. `chunks` is drawn from in this thread and `score` called in one other
    thread, chunk after chunk, so that it needs no lock of its own. What either raises is raised here, and no chunk is
    drawn after a score that has failed. `worker` makes what runs the scores, by default one thread.
    """
    made: list[T] = []
    under_way: list[Future[S]] = []
    runs = worker() if worker else ThreadPoolExecutor(1, "reward scores")
    try:
        for chunk in chunks:
            made.append(chunk)
            under_way.append(runs.submit(score, chunk))
            for done in (one for one in under_way if one.done()):
                done.result()
        return [(chunk, future.result()) for chunk, future in zip(made, under_way, strict=True)]
    finally:
        # A judge that hangs is not waited for by a run that is stopped.
        runs.shutdown(wait=False, cancel_futures=True)
