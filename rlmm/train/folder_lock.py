"""One run a folder: two at once would delete and overwrite each other's checkpoints, metrics and half-written files."""

import errno
import fcntl
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from rlmm.train.watch import FOLDER

FILE = "lock"
WAIT_SECONDS = 10.0
"""How long a start waits for a run that is just ending."""


class FolderInUse(ValueError):
    """Another run has the folder; the text says which."""


class FolderLock:
    """A POSIX lock on processes/lock of the run folder: the kernel gives it back however the process ends, and forked
    children do not have it."""

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        self.folder, self.say = folder, say
        self._held: TextIO | None = None

    def take(self) -> None:
        """Raises FolderInUse. A file system without locks is said."""
        path = self.folder / FOLDER / FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, until = path.open("a+"), time.monotonic() + WAIT_SECONDS
        while (fault := _locked(handle)) in (errno.EACCES, errno.EAGAIN) and time.monotonic() < until:
            time.sleep(0.2)
        if fault in (errno.EACCES, errno.EAGAIN):
            owner = path.read_text().strip() or "a process that has not said its name"
            handle.close()
            raise FolderInUse(
                f"{self.folder} is in use by another run ({owner}), and two in one folder would overwrite each other's "
                "files. Wait for it or end it, or give this run a folder of its own (run_dir=...). Of several tasks "
                "that srun or mpirun started each would be a run by itself: see examples/slurm.sbatch"
            )
        if fault is not None:
            self.say(f"{path} cannot be locked ({os.strerror(fault)}): see that no second run is given this folder")
        handle.truncate(0)
        handle.write(f"pid {os.getpid()} on {socket.gethostname()}\n")
        handle.flush()
        self._held = handle

    def release(self) -> None:
        """Does nothing where it is not held."""
        if self._held is not None:
            self._held.close()
            self._held = None


def _locked(handle: TextIO) -> int | None:
    """None once it is ours; else the system's error number."""
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno
    return None
