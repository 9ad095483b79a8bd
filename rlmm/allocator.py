"""Which allocator hands out this process's main memory, and what that does to a memory plan.

glibc's `posix_memalign` asks a free block for the alignment besides the size, so what a tensor freed is too small for
the next of its own size where a small block lies beside it (glibc bug 14581). An update's activations then lie beside
the holes of those before them: up to 2.2 times their bytes were resident with glibc 2.36 (docs/scale.md). Tensors above
32 MiB are mapped and given back one by one.
"""

import os
import platform
from pathlib import Path

from rlmm.diagnosis import Check

OTHERS = ("jemalloc", "tcmalloc", "mimalloc")
SEEN = ("jemalloc", "tensors mapped")
"""Whose updates hold what is planned, by measurement; part of an allocator's name."""
MERGES = (2, 39)
"""The glibc that merges the pieces beside an aligned block (bug 30723); what it makes of an update was not measured."""
MAPPED = 1 << 18
"""A glibc that maps blocks from so many bytes on leaves no holes to speak of."""
PRELOAD = "start with LD_PRELOAD=libjemalloc.so.2 (the package libjemalloc2 of Debian and Ubuntu)"


def allocator(maps: str, libc: tuple[str, str], threshold: str = "") -> str:
    """Name of the allocator, by the files mapped into the process, its C library's name and version, and
    `MALLOC_MMAP_THRESHOLD_`: "glibc 2.36", "glibc 2.36, tensors mapped"; "" where it is not known."""
    for name in OTHERS:
        if f"/lib{name}" in maps:
            return name
    if libc[0] != "glibc":
        return ""
    return f"glibc {libc[1]}" + ", tensors mapped" * (threshold.isdecimal() and int(threshold) <= MAPPED)


def here() -> str:
    """`allocator` of this process."""
    maps = Path("/proc/self/maps")
    threshold = os.environ.get("MALLOC_MMAP_THRESHOLD_", "")
    return allocator(maps.read_text() if maps.exists() else "", platform.libc_ver(), threshold)


def leaves_holes(name: str) -> bool:
    """Whether an allocator of that name does not use again what aligned blocks free."""
    kind, _, version = name.partition(" ")
    return kind == "glibc" and "mapped" not in name and tuple(map(int, version.split(".")[:2])) < MERGES


def check_allocator(name: str) -> Check:
    """Whether an update on a CPU holds what the memory plan says, as far as that was measured."""
    if leaves_holes(name):
        found = f"{name}: an update on a CPU may hold twice its memory plan, in holes that freed tensors left"
        return Check("allocator", "warn", found, f"where memory is short, {PRELOAD}")
    seen = any(one in name for one in SEEN)
    return Check("allocator", "ok", name if seen else f"{name or 'unknown'}; what updates hold by it was not measured")


def plan_note(name: str, gpu: bool) -> list[str]:
    """A line beside the memory plan, where that is of main memory and the allocator may hold more."""
    if gpu or not leaves_holes(name):
        return []
    return [f"{name} may hold twice that and more, in holes that freed tensors left: {PRELOAD}"]
