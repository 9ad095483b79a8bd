"""Open files for the connections of a rollout: one a row, all at once, since a wave's rows are held until all came."""

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

SPARE = 64
"""Files that may be opened meanwhile for all else."""


class Connections:
    """Those of this process. Servers are sent their rows at the same time, so they are counted together."""

    def __init__(self) -> None:
        self.lock, self.held, self.others = Lock(), 0, 0

    @contextmanager
    def held_for(self, rows: int) -> Iterator[None]:
        """Raises OSError where this process may not open as many."""
        with self.lock:
            if not self.held:
                self.others = len(os.listdir("/dev/fd"))
            allow_files(self.others + SPARE + self.held + rows)
            self.held += rows
        try:
            yield
        finally:
            with self.lock:
                self.held -= rows


CONNECTIONS = Connections()


def allow_files(needed: int) -> None:
    """Raise this process's soft limit of open files to what is needed. Raises OSError where the hard one is lower."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or needed <= soft:
        return
    if hard != resource.RLIM_INFINITY and needed > hard:
        raise OSError(
            f"a rollout keeps a connection open for each row, which makes {needed} open files with all else, and this "
            f"process may have {hard} at most; raise the hard limit of open files (`ulimit -Hn`, or where the job is "
            "started), or draw fewer samples at once"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
