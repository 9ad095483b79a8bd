"""Which allocator a process has, and what is said of it beside a memory plan."""

import platform

import pytest

from rlmm import allocator
from rlmm.allocator import check_allocator, leaves_holes, plan_note

GLIBC = ("glibc", "2.36")


@pytest.mark.parametrize(
    ("maps", "libc", "name"),
    [
        ("7f00-7f01 r-xp 00000000 00:00 1 /usr/lib/x86_64-linux-gnu/libjemalloc.so.2\n", GLIBC, "jemalloc"),
        ("7f00-7f01 r-xp 00000000 00:00 1 /usr/lib/libtcmalloc_minimal.so.4\n", GLIBC, "tcmalloc"),
        ("7f00-7f01 r-xp 00000000 00:00 1 /usr/lib/libc.so.6\n", GLIBC, "glibc 2.36"),
        ("", ("", ""), ""),
    ],
)
def test_an_allocator_is_known_by_its_file_or_by_the_c_library(maps: str, libc: tuple[str, str], name: str) -> None:
    assert allocator.allocator(maps, libc) == name


@pytest.mark.parametrize(
    ("name", "leaves"),
    [("glibc 2.36", True), ("glibc 2.4", True), ("glibc 2.39", False), ("jemalloc", False), ("", False)],
)
def test_glibc_before_it_merged_the_pieces_leaves_holes(name: str, leaves: bool) -> None:
    assert leaves_holes(name) == leaves
    assert check_allocator(name).status == ("warn" if leaves else "ok")
    assert ("LD_PRELOAD" in check_allocator(name).fix) == leaves
    assert len(plan_note(name, gpu=False)) == leaves and plan_note(name, gpu=True) == []


@pytest.mark.parametrize(("threshold", "mapped"), [("", False), ("1000000", False), ("x", False), ("65536", True)])
def test_a_glibc_that_maps_tensors_leaves_no_holes(threshold: str, mapped: bool) -> None:
    name = allocator.allocator("", GLIBC, threshold)
    assert name == "glibc 2.36" + ", tensors mapped" * mapped and leaves_holes(name) != mapped


@pytest.mark.parametrize(
    ("name", "seen"), [("jemalloc", True), ("glibc 2.36, tensors mapped", True), ("glibc 2.39", False), ("", False)]
)
def test_what_was_not_measured_is_said_to_be_so(name: str, seen: bool) -> None:
    check = check_allocator(name)
    assert check.status == "ok" and ("not measured" in check.found) != seen


@pytest.mark.skipif(platform.system() != "Linux", reason="of Linux's files")
def test_this_process_has_one() -> None:
    assert allocator.here().startswith(("glibc", *allocator.OTHERS))
