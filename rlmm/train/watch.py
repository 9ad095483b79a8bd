"""Finds processes that hang or are gone, names them, and ends the run.

Every process writes what it is at to `processes/rank-00000.json` of the run folder and reads the others' files, both
from a thread. That a file changes says that its process lives, `moves` that its main thread comes further. Ages are
taken by the reader's own clock, from when it saw the file change: machines' clocks may differ.
"""

import faulthandler
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rlmm.train.heart import HEART, now
from rlmm.train.processes import EXIT_HUNG, Stopped, gather, world

FOLDER = "processes"

GRACE_SECONDS = 30.0
"""How long a process may outlive the failure of another: most come to the same error themselves."""

LONGEST_INTERVAL = 5.0


@dataclass(frozen=True)
class Beat:
    """What a process says of itself. `run` tells starts of a run apart; `failed`: why it ended, where it failed."""

    run: str
    rank: int
    host: str
    pid: int
    written: int = 0
    moves: int = 0
    phase: str = "start"
    step: int | None = None
    patient: bool = True
    waits: bool = False
    failed: str | None = None
    done: bool = False

    @property
    def place(self) -> str:
        where = f"phase {self.phase!r}" + (f" of step {self.step}" if self.step else "")
        return f"process {self.rank} ({self.host.split()[0]}, pid {self.pid}), last seen in {where}"


@dataclass(frozen=True)
class Seen:
    """A process as this one sees it: seconds since it last wrote, since it last moved, since it said it had failed."""

    beat: Beat
    silent: float
    still: float
    failed: float = 0.0
    gone: bool = False


def interval(limit: float) -> float:
    """Seconds between two signs of life."""
    return min(LONGEST_INTERVAL, limit / 8)


def verdict(seen: Sequence[Seen], limit: float) -> str | None:
    """Why the run cannot go on, or None. A process that waits for the others is not to blame, unless all do. An update
    waits inside its backward too, where nothing says so: nobody is blamed for standing still while another is unheard.
    """
    left = [one for one in seen if not one.beat.done]
    for one in left:
        if one.beat.failed is not None and one.failed > GRACE_SECONDS:
            return f"process {one.beat.rank} has failed: {one.beat.failed}"
    for one in left:
        if one.gone and one.silent > GRACE_SECONDS:
            return f"{one.beat.place}, is gone: it was killed, or ran out of memory"
    unheard = any(one.silent > 3 * interval(limit) for one in left)
    busy = [] if unheard else [one for one in left if not one.beat.patient and not one.beat.waits]
    for what, found in (
        ("has been silent", [(one.silent, one) for one in left]),
        ("has stood still", [(one.still, one) for one in busy]),
    ):
        late = sorted((item for item in found if item[0] > limit), key=lambda item: -item[0])
        if late:
            told = "; ".join(f"{one.beat.place}, {what} for {seconds:.0f} s" for seconds, one in late)
            return f"{told} (runtime.hang_seconds is {limit:g})"
    if left and all(one.beat.waits and one.still > limit for one in left):
        told = "; ".join(one.beat.place for one in left)
        return f"every process waits for another, for {min(one.still for one in left):.0f} s: {told}"
    return None


class Watch(threading.Thread):
    """Writes this process's file, reads the others', and ends the process where `verdict` says so."""

    def __init__(self, folder: Path, run: str, limit: float) -> None:
        super().__init__(name="rlmm watch", daemon=True)
        self.folder, self.limit = folder, limit
        self.interval = interval(limit)
        self.rank, self.processes = world()
        self.mine = Beat(run, self.rank, _host(), os.getpid())
        self.ended = threading.Event()
        self._written = threading.Lock()
        self._silenced = False
        self._seen: dict[int, tuple[Beat, float, float, float]] = {}

    def path(self, rank: int) -> Path:
        return self.folder / f"rank-{rank:05d}.json"

    def write(self, **ending: Any) -> None:
        """This process's file as of now. A disk that takes nothing makes the process silent, not wrong."""
        with self._written:
            phase = now()
            told: dict[str, Any] = {"moves": HEART.moves, "phase": phase.name, "step": HEART.step}
            told |= {"patient": phase.patient, "waits": phase.waits, "written": self.mine.written + 1}
            self.mine = replace(self.mine, **told, **ending)
            try:
                partial = self.path(self.rank).with_suffix(".partial")
                partial.write_text(json.dumps(asdict(self.mine), indent=2))
                partial.replace(self.path(self.rank))
            except OSError as error:
                if self._silenced:
                    return
                self._silenced = True
                print(f"rlmm watch: {self.path(self.rank)} cannot be written: {error}", file=sys.stderr, flush=True)

    def run(self) -> None:
        last = time.monotonic()
        while not self.ended.wait(self.interval):
            moment = time.monotonic()
            if moment - last > 3 * self.interval:
                # This process itself was stopped or starved: what it knows of the others is old.
                self._seen.clear()
            last = moment
            self.write()
            why = verdict([self._look(rank, moment) for rank in range(self.processes)], self.limit)
            if why is not None and not self.ended.is_set():
                self._end(why)

    def _look(self, rank: int, moment: float) -> Seen:
        beat = self.mine if rank == self.rank else _read(self.path(rank))
        known, silent, still, failed = self._seen.get(rank, (None, moment, moment, moment))
        if beat is None or beat.run != self.mine.run:
            beat = known or replace(self.mine, rank=rank, host="not heard of", pid=0, written=0, patient=True)
        if known is None or beat.written != known.written:
            silent = moment
        if known is None or beat.moves != known.moves:
            still = moment
        if known is None or beat.failed != known.failed:
            failed = moment
        self._seen[rank] = (beat, silent, still, failed)
        gone = rank != self.rank and beat.host == self.mine.host and not _lives(beat.pid)
        return Seen(beat, moment - silent, moment - still, moment - failed, gone)

    def _end(self, why: str) -> None:
        """Of a main thread that cannot be reached: what it has open is given up, as in a kill."""
        self.write(failed=why)
        print(f"\nrlmm: {why}. This process ends; where it was:", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(all_threads=True)
        print("Start the same command again to go on from the last checkpoint.", file=sys.stderr, flush=True)
        os._exit(EXIT_HUNG)

    def others_failure(self) -> str | None:
        """What another process says of how it failed."""
        beats = [_read(self.path(rank)) for rank in range(self.processes) if rank != self.rank]
        told = [f"process {b.rank}: {b.failed}" for b in beats if b and b.run == self.mine.run and b.failed]
        return "; ".join(told) or None

    def stop(self, failed: str | None) -> None:
        self.ended.set()
        self.join()
        self.write(failed=failed, done=failed is None)


@contextmanager
def watching(folder: Path, limit: float | None) -> Iterator[None]:
    """Watches this process and the others of the run whose folder it is. Every process must come here, and so does
    every one with its failure. `limit`: seconds; None: nothing is watched."""
    if limit is None:
        yield
        return
    (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    watch = Watch(folder / FOLDER, gather(uuid.uuid4().hex)[0], limit)
    watch.write()
    watch.start()
    failed: str | None = None
    try:
        yield
    except Stopped:
        raise
    except BaseException as error:
        failed = f"{type(error).__name__}: {error}"
        if (first := watch.others_failure()) is not None:
            error.add_note(f"before that, {first}")
        raise
    finally:
        watch.stop(failed)


def _read(path: Path) -> Beat | None:
    try:
        return Beat(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _host() -> str:
    """This machine and the process numbers that hold in it: containers of one name count apart."""
    try:
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{socket.gethostname()} {uuid.getnode()}"


def _lives(pid: int) -> bool:
    """Whether there is such a process; one that has ended and was not waited for counts as gone."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return not Path("/proc/self").exists()
    except OSError:
        return True
    return state not in ("Z", "X")
