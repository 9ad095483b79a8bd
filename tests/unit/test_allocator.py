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
from rlmm.allocator import check_allocator, leaves_holes, plan_note
from rlmm.bench import scale_child, step_rlmm
from rlmm.bench.step_problem import Side, StepProblem
from rlmm.config.recipe import read_recipe
from rollouts.kernels.building import find_compiler

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
    assert check_allocator(name, None).status == ("warn" if leaves else "ok")
    assert ("LD_PRELOAD" in check_allocator(name, None).fix) == leaves
    assert ["no compiler" in line for line in plan_note(name, "no compiler")] == [True] * leaves


@pytest.mark.parametrize(("name", "pads"), [("glibc 2.36", True), ("glibc 2.39", True), ("jemalloc", False)])
def test_a_compiler_pads_what_is_glibcs(name: str, pads: bool) -> None:
    check = check_allocator(name, "g++")
    assert check.status == "ok" and ("pad" in check.found) == pads


@pytest.mark.parametrize(
    ("name", "seen"),
    [("jemalloc", True), ("glibc 2.36, tensors padded", True), ("glibc 2.39", False), ("", False)],
)
def test_what_was_not_measured_is_said_to_be_so(name: str, seen: bool) -> None:
    check = check_allocator(name, None)
    assert check.status == "ok" and ("not measured" in check.found) != seen


@pytest.mark.skipif(platform.system() != "Linux", reason="of Linux's files")
def test_this_process_has_one() -> None:
    assert allocator.here().startswith(("glibc", *allocator.OTHERS))


OWN = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"} | {"OMP_NUM_THREADS": "1"}
FREED = """
import torch
from rlmm.allocator import prepare

def resident() -> int:
    return int(open("/proc/self/statm").read().split()[1]) * 4096

notes, kept, freed, anew = prepare(gpu=False), [], [], []
start = resident()
for _ in range(100):
    freed.append(torch.zeros(1 << 18))
    kept.append(torch.zeros(1 << 9))
for _ in range(100):  # the update after: what is freed makes room for its like
    freed.pop(0)
    anew.append(torch.zeros(1 << 18))
print(len(notes), (resident() - start) / (100 << 20))
"""
SEMANTICS = """
import torch
from torch.profiler import ProfilerActivity, profile
from rlmm.allocator import here, pad_tensors

before = torch.arange(1000.0)
assert pad_tensors() == "" and here().endswith("tensors padded"), here()
assert pad_tensors() == ""
for size in (0, 1, 15, 16, 17, 1000, 1 << 20):
    tensor = torch.arange(size, dtype=torch.float64)
    assert tensor.data_ptr() % 64 == 0 and tensor.sum() == size * (size - 1) / 2
kept = before.clone()
before.resize_(100_000)[1000:] = 7.0  # of torch's own memory, from now on of ours
assert (before[:1000] == kept).all() and before.sum() == kept.sum() + 99_000 * 7
array = torch.ones(50).numpy()
assert array.sum() == 50  # which outlives its tensor
assert torch.ones(40).share_memory_().is_shared()
try:
    torch.empty(1 << 60, dtype=torch.uint8)
except RuntimeError as error:
    assert "can't allocate memory" in str(error) and str(1 << 60) in str(error), error
else:
    raise AssertionError("there is no such memory")
with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
    torch.ones(1 << 20)
assert max(event.self_cpu_memory_usage for event in seen.key_averages()) >= 4 << 20
print("all true")
"""


def said(program: str, env: dict[str, str] | None = None) -> str:
    done = subprocess.run([sys.executable, "-c", program], env=OWN | (env or {}), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split("\n")[0]


needs_padding = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or find_compiler() is None, reason="glibc and a compiler pad tensors"
)


@needs_padding
def test_what_a_padded_tensor_frees_is_used_again() -> None:
    notes, ratio = said(FREED).split()
    assert (int(notes), round(float(ratio), 1)) == (0, 1.0)


@needs_padding
def test_a_gpus_run_keeps_torchs_own() -> None:
    program = "from rlmm.allocator import here, prepare; print(prepare(gpu=True), here())"
    assert said(program) == f"[] {allocator.allocator('', platform.libc_ver())}"


@needs_padding
def test_padded_tensors_are_as_any() -> None:
    assert said(SEMANTICS) == "all true"


@needs_padding
def test_without_a_compiler_the_note_says_why(tmp_path: Path) -> None:
    program = "from rlmm.allocator import pad_tensors; print(pad_tensors())"
    assert "no/compiler" in said(program, env={"CXX": "/no/compiler", "XDG_CACHE_HOME": str(tmp_path)})
    assert "cannot compile" in said(program, env={"CXX": "false", "XDG_CACHE_HOME": str(tmp_path)})


SIDE = Side("rlmm", lora=False, checkpointing=False)


class Prepared(Exception):
    """Tensors would have been padded now."""


@pytest.mark.parametrize(
    ("place", "start"),
    [
        (pipeline, lambda: pipeline.run_recipe(read_recipe(Path("quickstart")), print)),
        (scale_child, lambda: scale_child.main(Path("order.json"), Path("result.json"))),
        (
            step_rlmm,
            lambda: step_rlmm.run_rlmm(SIDE, StepProblem("plan", 4096, 2048), 1, TrainerCallback(), Path()),
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
