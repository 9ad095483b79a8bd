"""A disk that is full, read-only or gone: found when a run starts, and named where it happens later."""

import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

ERRORS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota of the disk is used up",
    errno.EFBIG: "the file is larger than this process may write",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission is denied",
    errno.EPERM: "the operation is not permitted",
    errno.EIO: "the disk has an input/output error",
    errno.ESTALE: "the network file system has lost the file",
}
"""What goes wrong with a disk, by the system's error number."""

TORCH_WRITER = ("PytorchStreamWriter failed", "file write failed", "unexpected pos")
"""What torch.save says where a write fails; the system's error number is not in it."""

PARTIAL = "*.partial"


class StorageError(OSError):
    """Something cannot be written or read; the text says what, where, why and what to do."""


@contextmanager
def storing(what: str, path: Path) -> Iterator[None]:
    """Turns a failure of the disk within it into a StorageError about `what`, at `path`; other errors pass."""
    try:
        yield
    except StorageError:
        raise
    except (OSError, SafetensorError, RuntimeError) as error:
        why = reason(error)
        if why is None:
            raise
        # Of a copy the second is what could not be written.
        at = getattr(error, "filename2", None) or getattr(error, "filename", None) or path
        raise StorageError(
            f"{what}: {at} could not be written or read: {why} ({_told(error)}; {free_space(path)}). What was whole "
            "before is still there: mend the disk and start the same command again"
        ) from error


def reason(error: Exception) -> str | None:
    """What is wrong with the disk, in words; None where the error is of another kind."""
    if isinstance(error, OSError) and error.errno in ERRORS:
        return ERRORS[error.errno]
    told = str(error)
    if isinstance(error, SafetensorError | OSError):
        # Libraries in other languages give the system's text, and pyarrow now and then no number.
        return next((words for number, words in ERRORS.items() if os.strerror(number) in told), None)
    return "a write failed" if any(words in told for words in TORCH_WRITER) else None


def _told(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def free_space(path: Path) -> str:
    """`3.2 GiB free`, of the disk that holds the nearest folder there is."""
    there = next((folder for folder in (path, *path.parents) if folder.is_dir()), Path("/"))
    return f"{shutil.disk_usage(there).free / 2**30:.3g} GiB free"


def probe(folder: Path) -> None:
    """Make the folder, and write, flush and delete a small file there. Raises StorageError."""
    # Processes of two machines or containers may have the same number.
    path = folder / f"probe-{uuid.uuid4().hex}.partial"
    with storing("the run folder", folder):
        folder.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as handle:
            handle.write(bytes(4096))
            handle.flush()
            os.fsync(handle.fileno())
        path.unlink(missing_ok=True)  # a run that begins there clears such files


def check_space(folder: Path, needed: int) -> None:
    """Raises StorageError where the folder's disk has not so many bytes left."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise StorageError(
            f"{folder} has {free / 2**30:.3g} GiB free, and the checkpoints and models that this run has yet to write "
            f"need {needed / 2**30:.3g} GiB; free space, give the run a larger disk (run_dir=...), or keep fewer "
            "(checkpoints_kept)"
        )


def remove_partial(folder: Path) -> list[Path]:
    """Delete what a process that was ended left half written; whole files are renamed in and never have such names."""
    found = sorted(folder.rglob(PARTIAL))
    for path in found:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    return found
