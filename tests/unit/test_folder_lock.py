"""A run folder is one run's at a time, and is given back however that one ends."""

import multiprocessing
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from rlmm.config.recipe import read_recipe
from rlmm.pipeline import run_recipe
from rlmm.train import folder_lock
from rlmm.train.folder_lock import FolderInUse, FolderLock

TINY = Path(__file__).parents[1] / "recipes" / "tiny.yaml"


def hold(folder: Path, told: Connection) -> None:
    lock = FolderLock(folder, print)
    lock.take()
    told.send(os.getpid())
    signal.pause()


@contextmanager
def another_run(folder: Path) -> Iterator[int]:
    """A process that has the folder until it is killed."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=hold, args=(folder, theirs))
    process.start()
    assert ours.poll(60)
    yield ours.recv()
    process.kill()
    process.join()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_lock, "WAIT_SECONDS", 0.0)


def test_a_second_run_is_refused_and_touches_nothing(tmp_path: Path) -> None:
    (half := tmp_path / "model.partial").write_text("being written")
    recipe = read_recipe(TINY, [f"run_dir={tmp_path}"])
    with another_run(tmp_path) as pid, pytest.raises(FolderInUse, match=rf"in use by another run \(pid {pid} on "):
        run_recipe(recipe, lambda line: None)
    assert half.exists() and not (tmp_path / "config.yaml").exists()


def test_a_killed_run_gives_the_folder_back_and_so_does_one_that_ends(tmp_path: Path) -> None:
    with another_run(tmp_path):
        pass
    lock = FolderLock(tmp_path, print)
    lock.take()
    lock.release()
    with another_run(tmp_path), pytest.raises(FolderInUse):
        lock.take()
