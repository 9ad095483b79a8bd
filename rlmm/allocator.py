"""Which allocator hands out this process's main memory, and what that does to a memory plan.

glibc's `posix_memalign` asks a free block for the alignment besides the size, so what a tensor freed is too small for
the next of its own size where a small block lies beside it (glibc bug 14581). An update's activations then lie beside
the holes of those before them: up to 2.2 times their bytes were resident with glibc 2.36 (docs/scale.md). Tensors above
32 MiB are mapped and given back one by one.
"""

import platform
from pathlib import Path

from rlmm.diagnosis import Check

OTHERS = ("jemalloc", "tcmalloc", "mimalloc")
MERGES = (2, 39)
"""The glibc that merges the pieces beside an aligned block (bug 30723); what it makes of an update was not measured."""
PRELOAD = "start with LD_PRELOAD=libjemalloc.so.2 (the package libjemalloc2 of Debian and Ubuntu)"


def allocator(maps: str, libc: tuple[str, str]) -> str:
    """Name of the allocator, by the files mapped into the process and its C library's name and version, "glibc 2.36";
    "" where it is not known."""
    for name in OTHERS:
        if f"/lib{name}" in maps:
            return name
    return f"glibc {libc[1]}" if libc[0] == "glibc" else ""


def here() -> str:
    """`allocator` of this process."""
    maps = Path("/proc/self/maps")
    return allocator(maps.read_text() if maps.exists() else "", platform.libc_ver())


def leaves_holes(name: str) -> bool:
    """Whether an allocator of that name does not use again what aligned blocks free."""
    kind, _, version = name.partition(" ")
    return kind == "glibc" and tuple(map(int, version.split(".")[:2])) < MERGES


def check_allocator(name: str) -> Check:
    """Whether an update on a CPU holds what the memory plan says."""
    if leaves_holes(name):
        found = f"{name}: an update on a CPU may hold twice its memory plan, in holes that freed tensors left"
        return Check("allocator", "warn", found, f"where memory is short, {PRELOAD}")
    return Check("allocator", "ok", name or "not known")


def plan_note(name: str, gpu: bool) -> list[str]:
    """A line beside the memory plan, where that is of main memory and the allocator may hold more."""
    if gpu or not leaves_holes(name):
        return []
    return [f"{name} may hold up to twice that, in holes that freed tensors left: {PRELOAD}"]
