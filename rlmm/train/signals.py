"""A run that is asked to stop finishes its step, keeps what it has, and ends with a code that means "again".

SIGTERM, SIGINT and SIGUSR1 (what Slurm is told to send ahead of the end) ask. What is under way decides when: a step of
training is finished and checkpointed, a batch of pairs is finished, and work of which no part is kept is left at once.
"""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

from transformers import TrainerCallback

from rlmm.train.processes import Stopped, largest

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

EXIT_STOPPED = 75
"""EX_TEMPFAIL of BSD's sysexits.h: a failure that passes, try again. 143 would not tell a run that was asked to stop
and has kept its work from one that the signal ended where it stood."""

ECHO_SECONDS = 2.0
"""A launcher passes on a signal that the terminal has sent to its processes too; that is no second request."""


@dataclass
class _Request:
    """`by`: the signal's name, once one came. `leave`: whether the handler may raise where it finds the program."""

    by: str | None = None
    at: float = 0.0
    leave: bool = False


_REQUEST = _Request()


@contextmanager
def listening() -> Iterator[None]:
    """Within it the signals ask to stop. A second Ctrl-C ends the program at once."""
    before = {number: signal.signal(number, _handle) for number in SIGNALS}
    _REQUEST.__init__()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _REQUEST.__init__()


def _handle(number: int, frame: FrameType | None) -> None:
    now = time.monotonic()
    if number == signal.SIGINT and _REQUEST.by is not None and now - _REQUEST.at > ECHO_SECONDS:
        raise KeyboardInterrupt
    if _REQUEST.by is None:
        _REQUEST.by, _REQUEST.at = signal.Signals(number).name, now
    if _REQUEST.leave:
        raise Stopped(_told())


def _told() -> str:
    return f"stopped by {_REQUEST.by or 'a signal to another process'}"


@contextmanager
def leaving(at_once: bool) -> Iterator[None]:
    """Whether, within it, a request raises Stopped wherever the program is. Only where no other process waits for this
    one to come to a collective."""
    before, _REQUEST.leave = _REQUEST.leave, at_once
    try:
        if at_once and _REQUEST.by is not None:
            raise Stopped(_told())
        yield
    finally:
        _REQUEST.leave = before


def asked() -> bool:
    """Whether this process was asked to stop."""
    return _REQUEST.by is not None


def asked_anywhere() -> bool:
    """Whether any process was asked to stop; every process must come here."""
    return bool(largest(int(asked())))


def stop_if_asked() -> None:
    """Raises Stopped in every process where any was asked to; every process must come here."""
    if asked_anywhere():
        raise Stopped(_told())


class StopWhenAsked(TrainerCallback):
    """Ends training after the step in which any process was asked to stop, with a checkpoint of it."""

    def __init__(self) -> None:
        self.stopped = False

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if asked_anywhere():
            self.stopped = control.should_save = control.should_training_stop = True

    def check(self) -> None:
        """Raises Stopped where training has ended for it. To be called when the checkpoint is sealed."""
        if self.stopped:
            raise Stopped(_told())
