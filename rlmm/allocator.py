"""Which allocator hands out main memory for tensors, so that a CPU holds what the memory plan says.

torch asks glibc's `posix_memalign` for each. That asks a free block for the alignment besides the size, so what a
tensor freed is too small for the next of its own size where a small block lies beside it (glibc bug 14581). An update's
activations then lie beside the holes of those before them: up to 2.2 times their bytes were resident with glibc 2.36
(docs/scale.md). A run on a CPU therefore pads its tensors (`padded.cpp`): `malloc` uses a freed block again.
"""

import ctypes
import functools
import importlib.util
import os
import platform
from importlib.metadata import version
from pathlib import Path

from rlmm.diagnosis import Check
from rollouts.kernels.building import NoKernels, built

OTHERS = ("jemalloc", "tcmalloc", "mimalloc")
SEEN = ("jemalloc", "tensors padded")
"""Whose updates hold what is planned, by measurement; part of an allocator's name."""
MERGES = (2, 39)
"""The glibc that merges the pieces beside an aligned block (bug 30723); what it makes of an update was not measured."""
PRELOAD = "LD_PRELOAD=libjemalloc.so.2 (the package libjemalloc2 of Debian and Ubuntu)"
SOURCE = Path(__file__).with_name("padded.cpp")


def allocator(maps: str, libc: tuple[str, str]) -> str:
    """Name of the allocator, by the files mapped into the process and its C library's name and version: "glibc 2.36",
    "glibc 2.36, tensors padded"; "" where it is not known."""
    for name in OTHERS:
        if f"/lib{name}" in maps:
            return name
    if libc[0] != "glibc":
        return ""
    return f"glibc {libc[1]}" + ", tensors padded" * (f"/{SOURCE.stem}-" in maps)


def here() -> str:
    """`allocator` of this process."""
    maps = Path("/proc/self/maps")
    return allocator(maps.read_text() if maps.exists() else "", platform.libc_ver())


def is_plain(name: str) -> bool:
    """Whether torch has glibc's own blocks, by an allocator's name."""
    return name.startswith("glibc") and "," not in name


def leaves_holes(name: str) -> bool:
    """Whether an allocator of that name does not use again what aligned blocks free."""
    return is_plain(name) and tuple(map(int, name.split()[1].split(".")[:2])) < MERGES


def not_padded() -> str:
    """Why tensors that are glibc's cannot be padded here; "" where they can. Compiles on first use, in a second."""
    if os.environ.get("THP_MEM_ALLOC_ENABLE", "0") != "0":
        return "THP_MEM_ALLOC_ENABLE asks for torch's own blocks"
    try:
        _library()
    except NoKernels as error:
        return str(error)
    return ""


@functools.cache
def pad_tensors() -> str:
    """From now on this process's tensors in main memory are padded, where they are glibc's. Returns why they are not:
    torch's own stay then."""
    if not is_plain(here()) or (why := not_padded()):
        return why
    import torch  # noqa: F401 (whose library is asked for the allocator's place)

    try:
        ctypes.CDLL(str(_library())).rlmm_pad()
    except OSError as error:
        return f"{_library()} cannot be loaded ({error})"
    return ""


def _library() -> Path:
    """Another torch has another allocator's interface, and its own build. torch is not imported: doctor asks, too."""
    if (found := importlib.util.find_spec("torch")) is None or found.origin is None:
        raise NoKernels("torch is not installed")
    package = Path(found.origin).parent
    flags = ["-O2", "-std=c++20", "-shared", "-fPIC", f"-I{package / 'include'}"]
    return built(SOURCE.stem, [SOURCE], [*flags, f"-DRLMM_TORCH={version('torch')}"], [f"-L{package / 'lib'}", "-lc10"])


def check_allocator(name: str, why: str) -> Check:
    """Whether a run on a CPU holds what the memory plan says, as far as that was measured. `why` glibc's tensors cannot
    be padded."""
    if is_plain(name) and not why:
        return Check("allocator", "ok", f"{name}; runs on a CPU pad their tensors, so that freed ones leave no holes")
    if leaves_holes(name):
        found = f"{name}: an update on a CPU may hold twice its memory plan, in holes that freed tensors left ({why})"
        return Check("allocator", "warn", found, f"mend that, or start with {PRELOAD}")
    seen = any(one in name for one in SEEN)
    return Check("allocator", "ok", name if seen else f"{name or 'unknown'}; what updates hold by it was not measured")


def prepare(gpu: bool) -> list[str]:
    """Pads this process's tensors where it trains in main memory. Returns a line for beside its memory plan, where the
    allocator may hold more."""
    if gpu or not (why := pad_tensors()) or not leaves_holes(name := here()):
        return []
    return [f"{name} may hold twice that, in holes that freed tensors left: {why}; mend it, or start with {PRELOAD}"]
