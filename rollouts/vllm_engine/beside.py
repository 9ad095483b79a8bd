"""Calls that run beside each other."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from threading import Thread
from typing import TypeVar

T = TypeVar("T")


def begin(calls: Sequence[Callable[[], T]]) -> list[Future[T]]:
    """Each call in a thread of its own, which the process's end does not wait for, as it would for an executor's: who
    was interrupted, or has failed, is not kept by a server that does not answer."""
    futures = [Future[T]() for _ in calls]

    def run(future: Future[T], call: Callable[[], T]) -> None:
        try:
            future.set_result(call())
        except BaseException as error:  # handed over, to be raised by who waits
            future.set_exception(error)

    for future, call in zip(futures, calls, strict=True):
        Thread(target=run, args=(future, call), daemon=True).start()
    return futures
