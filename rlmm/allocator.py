"""Which allocator hands out main memory for tensors, so that a CPU holds what the memory plan says.

torch asks glibc's `posix_memalign` for each. That asks a free block for the alignment besides the size, so what a
tensor freed is too small for the next of its own size where a small block lies beside it (glibc bug 14581). An update's
activations then lie beside the holes of those before them: up to 2.2 times their bytes were resident with glibc 2.36
(docs/scale.md). A run on a CPU therefore pads its tensors (`padded.cpp`): `malloc` uses a freed block again.
"""

import ctypes
import functools
import platform
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


@functools.cache
def pad_tensors() -> str:
    """From now on this process's tensors in main memory are padded, where they are glibc's. Returns why they are not.

    Compiled on first use, in a second or two; without a compiler torch's own stays."""
    if not is_plain(here()):
        return ""
    try:
        path = built(SOURCE.stem, [SOURCE], *_against_torch())
        ctypes.CDLL(str(path)).rlmm_pad()
    except (NoKernels, OSError) as error:
        return str(error)
    return ""


def _against_torch() -> tuple[list[str], list[str]]:
    """Flags and libraries. Another torch has another allocator's interface, and its own build of the library."""
    import torch

    package = Path(torch.__file__).parent
    flags = ["-O2", "-std=c++20", "-shared", "-fPIC", f"-I{package / 'include'}", f"-DRLMM_TORCH={torch.__version__}"]
    return flags, [f"-L{package / 'lib'}", "-lc10"]


def check_allocator(name: str, compiler: str | None) -> Check:
    """Whether a run on a CPU holds what the memory plan says, as far as that was measured."""
    if is_plain(name) and compiler is not None:
        return Check("allocator", "ok", f"{name}; runs on a CPU pad their tensors, so that freed ones leave no holes")
    if leaves_holes(name):
        found = f"{name}: an update on a CPU may hold twice its memory plan, in holes that freed tensors left"
        return Check("allocator", "warn", found, f"install a C++ compiler, or start with {PRELOAD}")
    seen = any(one in name for one in SEEN)
    return Check("allocator", "ok", name if seen else f"{name or 'unknown'}; what updates hold by it was not measured")


def plan_note(name: str, why: str) -> list[str]:
    """A line beside a memory plan of main memory, where the allocator may hold more. `why` tensors are not padded."""
    if not leaves_holes(name):
        return []
    return [f"{name} may hold twice that, in holes that freed tensors left: {why}; mend it, or start with {PRELOAD}"]


def prepare(gpu: bool) -> list[str]:
    """Pads this process's tensors where it trains in main memory. Returns the note for its memory plan."""
    if gpu:
        return []
    why = pad_tensors()
    return plan_note(here(), why)
