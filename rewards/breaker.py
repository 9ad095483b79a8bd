"""A circuit breaker: a server that fails over and over is left alone for a while, then asked once."""

import threading
import time
from collections.abc import Callable


class Breaker:
    """After `failures` requests in a row that failed it is open for `cooldown_s` seconds; then one request may try, and
    closes it by succeeding or opens it for as long again. 0 failures: never open. `clock` tells seconds. Threads may
    share one.
    """

    def __init__(self, failures: int, cooldown_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.failures, self.cooldown_s = failures, cooldown_s
        self._clock = clock
        self._lock = threading.Lock()
        self._row, self._last, self._until, self._trying = 0, "", 0.0, False

    def refusal(self) -> str:
        """Why a request may not go out now, '' where it may; then its outcome must be told by `note`."""
        with self._lock:
            if not self.failures or self._row < self.failures:
                return ""
            wait = self._until - self._clock()
            if wait <= 0 and not self._trying:
                self._trying = True
                return ""
            when = f"for another {wait:.0f} s" if wait > 0 else "until one request has come back"
            return f"not asked {when}, after {self._row} failures in a row; the last: {self._last}"

    def note(self, failure: str) -> None:
        """The outcome of a request: why it failed, '' where it was answered."""
        with self._lock:
            self._trying = False
            self._row = self._row + 1 if failure else 0
            if failure:
                self._last, self._until = failure, self._clock() + self.cooldown_s
