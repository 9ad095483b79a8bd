"""Disks that are full, read-only or small: named, with what to do; and what a killed process leaves is cleared."""

import errno
import os
import pkgutil
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from rlmm.config.recipe import read_recipe
from rlmm.policies.pictures import Pictures
from rlmm.run_folder import RunFolder
from rlmm.space import space_needed
from rlmm.train.faults import StorageError, check_space, probe, remove_partial, storing
from rlmm.train.metrics import MetricsFile
from rlmm.train.tokens import ImageTokens
from rollouts.store import read_trajectory, write_trajectory
from tests.integration.conftest import TINY
from tests.unit.test_store_and_checkpoint import trajectory
from tests.unit.test_supervised import make_codec


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


WRITERS: dict[str, Callable[[Path], None]] = {
    "torch": lambda path: torch.save({"moments": torch.zeros(100_000)}, path),
    "safetensors": lambda path: save_file({"weights": torch.zeros(100_000)}, path),
    "parquet": lambda path: write_trajectory(path, trajectory(), {"image": [os.urandom(100_000)] * 2}),
    "plain": lambda path: (path.write_bytes(bytes(100_000)), None)[1],
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_write_that_finds_no_room_is_named_whoever_makes_it(writer: str, tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    with pytest.raises(StorageError, match="the checkpoint of step 3: .*mend the disk and start the same command"):
        with files_of_at_most(20_000), storing("the checkpoint of step 3", path):
            WRITERS[writer](path)


def test_a_full_disk_is_called_full(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    metrics.path.symlink_to("/dev/full")
    with pytest.raises(StorageError, match=r"figures of step 4: .*metrics.jsonl.*the disk is full.*GiB free"):
        metrics.append(4, {"loss": 1.0})


def test_other_errors_pass() -> None:
    for error in (OSError(errno.ENOENT, "no such file"), RuntimeError("shapes differ"), ValueError("no")):
        with pytest.raises(type(error), match=str(error.args[-1])), storing("anything", Path("x")):
            raise error


def as_nobody(work: Callable[[], None]) -> str:
    """What `work` raises in a process without privileges; root may write anywhere."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            if os.geteuid() == 0:
                os.setgid(65534)
                os.setuid(65534)
            work()
            told = "nothing"
        except StorageError as error:
            told = str(error)
        finally:
            os.write(write, told.encode())
            os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    with os.fdopen(read) as pipe:
        return pipe.read()


def test_a_folder_that_cannot_be_written_is_found_at_the_start(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    probe(folder)
    assert folder.is_dir() and not list(folder.iterdir())
    for part in (tmp_path, *tmp_path.parents):
        if part.stat().st_uid == os.getuid() and part != Path("/tmp"):
            part.chmod(0o755)
    folder.chmod(0o555)
    told = as_nobody(lambda: probe(folder))
    assert told.startswith("the run folder: ") and "permission is denied" in told and str(folder) in told


def spelled(folder: Path) -> None:
    pictures = Pictures(9)
    pictures.folder = folder
    pictures.spell([Image.new("RGB", (8, 8), (9, 9, 9))])


def encoded(folder: Path) -> None:
    tokens = ImageTokens(make_codec(), folder)
    tokens.codes([Image.new("RGB", (24, 16), (9, 9, 9))])
    tokens.save()


@pytest.mark.parametrize(
    ("write", "moment"),
    [
        (probe, "rlmm.train.faults.os.fsync"),
        (spelled, "rlmm.policies.pictures.save_file"),
        (encoded, "rlmm.train.tokens.pq.write_table"),
    ],
)
def test_processes_of_one_number_do_not_meet_in_a_shared_folder(
    write: Callable[[Path], None], moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, _, name = moment.rpartition(".")
    began, whole = [], getattr(pkgutil.resolve_name(module), name)

    def meanwhile(*arguments: Any, **named: Any) -> None:
        whole(*arguments, **named)
        began.append(sorted(tmp_path.rglob("*.partial")))
        if len(began) == 1:
            write(tmp_path)  # the other process, from beginning to end

    monkeypatch.setattr(moment, meanwhile)
    write(tmp_path)
    assert [len(found) for found in began] == [1, 2] and not list(tmp_path.rglob("*.partial"))


def test_a_probe_that_another_run_has_cleared_is_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlmm.train.faults.os.fsync", lambda _: remove_partial(tmp_path))
    probe(tmp_path)


def test_a_run_that_would_not_fit_is_refused(tmp_path: Path) -> None:
    check_space(tmp_path, 0)
    with pytest.raises(StorageError, match=r"GiB free, and the checkpoints.*need 1e\+09 GiB.*checkpoints_kept"):
        check_space(tmp_path, 10**9 << 30)


def test_the_plan_counts_models_and_kept_checkpoints(tmp_path: Path) -> None:
    recipe = read_recipe(TINY)
    run = RunFolder(tmp_path, tuple(recipe.stages))
    whole = space_needed(recipe, run)
    model = 4 * 26_240  # parameters of the tiny policy, float32
    assert whole == pytest.approx(2 * model + 3 * 3 * model, rel=0.15)  # sft: weights and two moments, three times
    checkpoint = run.stage("sft") / "checkpoints" / "checkpoint-2"
    checkpoint.mkdir(parents=True)
    (checkpoint / "optimizer.pt").write_bytes(bytes(1000))
    assert space_needed(recipe, run) == whole - 1000
    run.mark("sft", "sft", "done")
    assert space_needed(recipe, run) < whole / 2


def test_half_written_files_are_cleared_and_whole_ones_kept(tmp_path: Path) -> None:
    (tmp_path / "stages" / "model.partial").mkdir(parents=True)
    for name in ("stages/model.partial/weights", "stages/step.partial", "stages/step.parquet", "partial.json"):
        (tmp_path / name).write_text("x")
    assert [path.name for path in remove_partial(tmp_path)] == ["model.partial", "step.partial"]
    left = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {"step.parquet", "partial.json"}


def test_a_flipped_bit_in_a_stored_rollout_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "step.parquet"
    noise = os.urandom(5000)
    write_trajectory(path, trajectory(), {"image": [noise, noise[::-1]]})
    data = bytearray(path.read_bytes())
    data[data.index(noise[:100]) + 50] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="not a readable rollout file.*goes back to the last checkpoint before it"):
        read_trajectory(path)


def test_of_a_copy_the_file_that_could_not_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "source").write_text("x")
    with pytest.raises(StorageError, match="a file: /dev/full could not be written or read: the disk is full"):
        with storing("a file", tmp_path):
            raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "source"), None, "/dev/full")
