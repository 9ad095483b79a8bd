"""Weights that go to servers through a folder: whoever cannot read all of them says so. Needs no vLLM."""

import os
import stat
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import Tensor

from rlmm.train.sync import compare
from rollouts.contract import EngineLost
from rollouts.vllm_engine.server import ServerHost
from rollouts.vllm_engine.transfer import FolderTransfer, read_shards, write_shards

WEIGHTS = [(f"w{i}", torch.full((10,), float(i))) for i in range(3)]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight a file."""
    monkeypatch.setattr("rollouts.vllm_engine.transfer.SHARD_BYTES", 1)


class Reader:
    """A server that reads where it finds the trainer's folder."""

    def __init__(self, finds: Callable[[Path], Path] = lambda folder: folder) -> None:
        self.finds, self.taken = finds, list[tuple[str, Tensor]]()
        self.modes: set[int] = set()

    def call(self, method: str, folder: str, count: str, key: str) -> None:
        assert (method, key) == ("rollouts_load", "")
        here = Path(folder)
        self.modes = {stat.S_IMODE(path.stat().st_mode) for path in (here, *here.iterdir())}
        self.taken = list(read_shards(self.finds(here), int(count)))


def sent(folder: Path, *readers: Reader) -> None:
    FolderTransfer(cast(Sequence[ServerHost], readers), folder)(iter(WEIGHTS))


def test_every_server_takes_all_weights_and_nothing_is_left(tmp_path: Path) -> None:
    readers = Reader(), Reader()
    sent(tmp_path, *readers)
    assert all([name for name, _ in one.taken] == ["w0", "w1", "w2"] for one in readers)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_a_server_does_not_see_is_an_error_that_names_the_setting(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"of the 3 file\(s\).* can read 0; set engine.exchange"):
        sent(tmp_path, Reader(), Reader(lambda folder: Path("/nowhere", folder.name)))


@pytest.mark.parametrize("left", [0, 2])
def test_a_folder_that_holds_less_than_was_sent_is_an_error(left: int, tmp_path: Path) -> None:
    count = write_shards(WEIGHTS, tmp_path)
    for file in sorted(tmp_path.iterdir())[left:]:
        file.unlink()
    with pytest.raises(FileNotFoundError, match=rf"{tmp_path} this server can read {left}; "):
        read_shards(tmp_path, count)  # before vLLM asks for the first


def test_a_folder_of_the_users_is_open_to_servers_of_other_users(tmp_path: Path) -> None:
    reader, before = Reader(), os.umask(0o077)
    try:
        sent(tmp_path, reader)
    finally:
        os.umask(before)
    assert reader.modes == {0o755, 0o644}


def test_the_machines_temporary_folder_shows_weights_to_nobody_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    reader = Reader()
    sent(Path(tempfile.gettempdir()), reader)
    assert 0o700 in reader.modes and 0o755 not in reader.modes


def test_weights_of_another_run_are_named_as_the_likely_cause() -> None:
    with pytest.raises(RuntimeError, match=r"engine\.urls.*another run gives its weights.*servers of its own"):
        compare("mine", "theirs", 3)


def test_a_lost_server_is_told_of_before_what_another_one_cannot_read(tmp_path: Path) -> None:
    class Gone(Reader):
        def call(self, method: str, folder: str, count: str, key: str) -> None:
            raise EngineLost("gone")

    with pytest.raises(EngineLost, match="gone"):
        sent(tmp_path, Reader(lambda folder: Path("/nowhere", folder.name)), Gone())
