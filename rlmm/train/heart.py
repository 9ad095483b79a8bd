"""What this process is at, in memory: a counter that moves as its main thread does, and the phase it is in.

`rlmm.train.watch` reads it from another thread. Nothing here writes, waits or costs.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Phase:
    """`patient`: no deadline but the collectives' own, since it may take long (an evaluation, a model that is loaded).
    `waits`: for other processes, so that they are to be asked first."""

    name: str
    patient: bool = False
    waits: bool = False


@dataclass
class Heart:
    """The main thread's phases, the outermost first, the step it is at (from 1) and how often it has moved."""

    phases: list[Phase]
    step: int | None = None
    moves: int = 0


HEART = Heart([Phase("start", patient=True)])


def beat() -> None:
    """The main thread has come further."""
    HEART.moves += 1


def settle(name: str, step: int | None = None, *, patient: bool = False) -> None:
    """What follows belongs to the phase `name`, until the next call; phases within it come and go above it."""
    if threading.current_thread() is threading.main_thread():
        HEART.phases[0], HEART.step = Phase(name, patient), step
        beat()


@contextmanager
def phase(name: str, *, patient: bool = False, waits: bool = False) -> Iterator[None]:
    """A part of the phase around it. In other threads than the main one it is not followed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    HEART.phases.append(Phase(name, patient, waits))
    beat()
    try:
        yield
    finally:
        HEART.phases.pop()
        beat()


def now() -> Phase:
    """The innermost phase."""
    return HEART.phases[-1]
