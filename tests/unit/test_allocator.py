"""Which allocator a process has, what is said of it beside a memory plan, and tensors that are padded."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import TrainerCallback

from rlmm import allocator, pipeline
from rlmm.allocator import check_allocator, leaves_holes
from rlmm.bench import scale_child, step_child
from rlmm.bench.step_problem import Side, StepProblem
from rlmm.config.recipe import read_recipe

GLIBC = ("glibc", "2.36")


@pytest.mark.parametrize(
    ("maps", "libc", "name"),
    [
        ("7f00-7f01 r-xp 00000000 00:00 1 /usr/lib/x86_64-linux-gnu/libjemalloc.so.2\n", GLIBC, "jemalloc"),
        ("7f00-7f01 r-xp 00000000 00:00 1 /usr/lib/libtcmalloc_minimal.so.4\n", GLIBC, "tcmalloc"),
        ("7f00-7f01 r-xp 00000000 00:00 1 /usr/lib/libc.so.6\n", GLIBC, "glibc 2.36"),
        ("7f00-7f01 r-xp 00000000 00:00 1 /home/me/.cache/rlmm/padded-0f.so\n", GLIBC, "glibc 2.36, tensors padded"),
        ("", ("", ""), ""),
    ],
)
def test_an_allocator_is_known_by_its_file_or_by_the_c_library(maps: str, libc: tuple[str, str], name: str) -> None:
    assert allocator.allocator(maps, libc) == name


@pytest.mark.parametrize(
    ("name", "leaves"),
    [
        ("glibc 2.36", True),
        ("glibc 2.4", True),
        ("glibc 2.36, tensors padded", False),
        ("glibc 2.39", False),
        ("jemalloc", False),
        ("", False),
    ],
)
def test_glibc_before_it_merged_the_pieces_leaves_holes(name: str, leaves: bool) -> None:
    assert leaves_holes(name) == leaves
    check = check_allocator(name, "no compiler")
    assert check.status == ("warn" if leaves else "ok")
    assert ("no compiler" in check.found, "LD_PRELOAD" in check.fix) == (leaves, leaves)


@pytest.mark.parametrize(("name", "pads"), [("glibc 2.36", True), ("glibc 2.39", True), ("jemalloc", False)])
def test_what_can_be_padded_is_glibcs(name: str, pads: bool) -> None:
    check = check_allocator(name, "")
    assert check.status == "ok" and ("pad" in check.found) == pads


@pytest.mark.parametrize(
    ("name", "why", "said"),
    [
        ("glibc 2.36", "no compiler", True),
        ("glibc 2.36", "", False),
        ("glibc 2.39", "no compiler", False),
        ("jemalloc", "", False),
    ],
)
def test_a_plan_is_told_of_holes(name: str, why: str, said: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocator, "here", lambda: name)
    monkeypatch.setattr(allocator, "pad_tensors", lambda: why)
    assert [name in line and why in line for line in allocator.prepare(gpu=False)] == [True] * said
    assert allocator.prepare(gpu=True) == []


@pytest.mark.parametrize(
    ("name", "seen"),
    [("jemalloc", True), ("glibc 2.36, tensors padded", True), ("glibc 2.39", False), ("", False)],
)
def test_what_was_not_measured_is_said_to_be_so(name: str, seen: bool) -> None:
    check = check_allocator(name, "no compiler")
    assert check.status == "ok" and ("not measured" in check.found) != seen


@pytest.mark.skipif(platform.system() != "Linux", reason="of Linux's files")
def test_this_process_has_one() -> None:
    assert allocator.here().startswith(("glibc", *allocator.OTHERS))


OWN = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"} | {"OMP_NUM_THREADS": "1"}
FREED = """
import ctypes
import torch
from rlmm.allocator import pad_tensors

def resident() -> int:
    return int(open("/proc/self/statm").read().split()[1]) * 4096

assert pad_tensors() == ""
large = torch.zeros(1 << 21)
del large  # from now on glibc maps no block below its size
beside = ctypes.CDLL(None).malloc
for _ in range(20_000):  # what lies free already, so that the next small blocks lie beside tensors
    beside(24)
freed, anew = [], []
start = resident()
for _ in range(100):
    freed.append(torch.zeros(1 << 18))
    for _ in range(10):
        beside(24)
for _ in range(100):  # the update after: what is freed makes room for its like
    freed.pop(0)
    anew.append(torch.zeros(1 << 18))
print((resident() - start) / (100 << 20))
"""
SEMANTICS = """
import ctypes
import torch
from torch.profiler import ProfilerActivity, profile
from accelerate.utils.memory import should_reduce_batch_size
from rlmm.allocator import here, pad_tensors

def padding(tensor: torch.Tensor) -> int:
    first = tensor.data_ptr()
    return first - ctypes.c_uint64.from_address(first - 8).value

before, other = torch.arange(1000.0), torch.rand(300, 300).to_mkldnn()
assert pad_tensors() == "" and here().endswith("tensors padded"), here()
assert pad_tensors() == "" and not 8 <= padding(before) <= 71
for size in (1, 15, 16, 17, 1000, 1 << 20):
    tensor = torch.arange(size, dtype=torch.float64)
    assert 8 <= padding(tensor) <= 71 and tensor.data_ptr() % 64 == 0
    assert tensor.sum() == size * (size - 1) / 2
assert torch.empty(0).sum() == 0
kept = before.clone()
before.resize_(100_000)[1000:] = 7.0
assert (before[:1000] == kept).all() and before.sum() == kept.sum() + 99_000 * 7
dense = other.to_dense()
del other, before  # older than padding
assert torch.rand(300, 300).to_mkldnn().to_dense().isfinite().all() and dense.isfinite().all()
array = torch.ones(50).numpy()
assert array.sum() == 50  # which outlives its tensor
assert torch.ones(40).share_memory_().is_shared()
with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
    torch.ones(1 << 20)
    try:
        torch.empty(1 << 60, dtype=torch.uint8)
    except RuntimeError as error:
        assert should_reduce_batch_size(error) and str(1 << 60) in str(error), error
    else:
        raise AssertionError("there is no such memory")
names = {event.key: event.self_cpu_memory_usage for event in seen.key_averages()}
assert max(names.values()) >= 4 << 20 and "[OutOfMemory]" in names, names
print("all true")
"""
LATE = """
import torch
from rlmm.allocator import pad_tensors
kept = torch.rand(300, 300).to_mkldnn()  # freed by the end of the process alone
assert pad_tensors() == ""
print("ends")
"""


def said(program: str, env: dict[str, str] | None = None) -> str:
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=OWN | (env or {}), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split("\n")[0]


needs_padding = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or bool(allocator.not_padded()), reason="glibc and a compiler pad tensors"
)


@needs_padding
def test_what_a_padded_tensor_frees_is_used_again() -> None:
    """Of torch's own blocks, beside small ones, 1.1 to 2.0 times as much was resident: how much depends on the heap."""
    assert float(said(FREED)) == pytest.approx(1.0, abs=0.05)


@needs_padding
def test_a_gpus_run_keeps_torchs_own() -> None:
    program = "from rlmm.allocator import here, prepare; print(prepare(gpu=True), here())"
    assert said(program) == f"[] {allocator.allocator('', platform.libc_ver())}"


@needs_padding
def test_padded_tensors_are_as_any() -> None:
    assert said(SEMANTICS) == "all true" and said(LATE) == "ends"


@needs_padding
@pytest.mark.parametrize(
    ("env", "why"),
    [
        ({"CXX": "/no/compiler"}, "the compiler /no/compiler cannot be run (No such file or directory)"),
        ({"CXX": "false -O9"}, "false cannot compile it (no message)"),
        ({"PATH": "/nowhere"}, "no C++ compiler (g++, clang++ or $CXX) was found"),
        ({"THP_MEM_ALLOC_ENABLE": "1"}, "THP_MEM_ALLOC_ENABLE asks for torch's own blocks"),
    ],
)
def test_a_process_that_cannot_pad_says_why(env: dict[str, str], why: str, tmp_path: Path) -> None:
    program = "from rlmm.allocator import pad_tensors; print(pad_tensors())"
    assert said(program, env={"XDG_CACHE_HOME": str(tmp_path), "CXX": ""} | env) == why


SIDE = Side("rlmm", lora=False, checkpointing=False)


class Prepared(Exception):
    """Tensors would have been padded now."""


@pytest.mark.parametrize(
    ("place", "start"),
    [
        (pipeline, lambda: pipeline.run_recipe(read_recipe(Path("quickstart")), print)),
        (scale_child, lambda: scale_child.main(Path("order.json"), Path("result.json"))),
        (
            step_child,
            lambda: step_child.run_side(SIDE, StepProblem("plan", 4096, 2048), 1, TrainerCallback()),
        ),
    ],
)
def test_a_run_and_what_measures_one_pad_their_tensors_first(
    place: ModuleType, start: Callable[[], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def prepare(gpu: bool) -> list[str]:
        raise Prepared

    monkeypatch.chdir(tmp_path)
    Path("order.json").write_text(json.dumps({"threads": torch.get_num_threads()}))
    monkeypatch.setattr(place, "prepare", prepare)
    with pytest.raises(Prepared):
        start()
    assert [file.name for file in tmp_path.iterdir()] == ["order.json"]
