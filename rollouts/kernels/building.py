"""C++ compiled for this processor on first use, and kept in the user's cache folder."""

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

COMPILERS = ("g++", "clang++", "c++")


class NoKernels(RuntimeError):
    """What is asked for cannot be compiled or loaded here; the text says why."""


def built(name: str, sources: Sequence[Path], flags: Sequence[str], libraries: Sequence[str] = ()) -> Path:
    """The shared library of `sources`, compiled if it is not in the cache. Headers among them are read alone.

    `flags` name whatever else it depends on, such as a version compiled against. Raises NoKernels.
    """
    compiler = _compiler()
    command = [*compiler, *flags, *(str(one) for one in sources if one.suffix == ".cpp"), *libraries]
    path = _folder() / f"{name}-{_key([one.read_text() for one in sources], [*compiler, *flags])}.so"
    try:
        if not path.is_file():
            _compile(command, path)
    except OSError as error:
        raise NoKernels(f"{path} cannot be written ({error})") from error
    return path


def _compiler() -> list[str]:
    """`$CXX` with its arguments, or the first C++ compiler on the path."""
    if named := shlex.split(os.environ.get("CXX", "")):
        return named
    for found in map(shutil.which, COMPILERS):
        if found is not None:
            return [found]
    raise NoKernels("no C++ compiler (g++, clang++ or $CXX) was found")


def _folder() -> Path:
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rlmm"
    except RuntimeError as error:  # a user of no name
        raise NoKernels(f"there is no folder to keep it in ({error}); set XDG_CACHE_HOME") from error


def _key(sources: Sequence[str], settings: Sequence[str]) -> str:
    """Of the sources, the flags and the processor: another machine on the same home folder compiles its own."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else [platform.processor(), platform.machine()]
    kind = [line for line in lines if line.startswith(("model name", "flags", "Features"))][:2] or lines[:2]
    return hashlib.sha256("\n".join([*sources, *settings, *kind]).encode()).hexdigest()[:16]


def _compile(command: Sequence[str], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder, path.name)
        try:
            done = subprocess.run([*command, "-o", str(made)], capture_output=True, text=True)
        except OSError as error:
            raise NoKernels(f"the compiler {command[0]} cannot be run ({error.strerror})") from error
        if done.returncode:
            said = (done.stderr.strip().splitlines() or ["no message"])[0]
            raise NoKernels(f"{command[0]} cannot compile it ({said})")
        made.replace(path)
