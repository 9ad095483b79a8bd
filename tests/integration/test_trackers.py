"""What wandb is told by a run that is killed and started again, read from the files that it keeps offline."""

import json
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest

from rlmm.config.recipe import read_recipe
from rlmm.preflight import check_stages
from rlmm.train import trackers
from rlmm.train.processes import Stopped

RECIPE = Path(__file__).parents[1] / "recipes" / "tiny.yaml"
STEPS = 20


def records(path: Path) -> Iterator[bytes]:
    """Of a log in LevelDB's format, after wandb's own header of 7 bytes; a record may be in parts."""
    data, place, part = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        _, size, kind = struct.unpack("<IHB", data[place : place + 7])
        chunk, place = data[place + 7 : place + 7 + size], place + 7 + size
        part = chunk if kind in (1, 2) else part + chunk
        if kind in (1, 4):
            yield part


def told(folder: Path) -> dict[str, Any]:
    """A run's name, group, project, and the values of each logged step."""
    wandb_internal_pb2 = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    found: dict[str, Any] = {"id": folder.name.rsplit("-", 1)[1], "rows": {}}
    for raw in records(next(folder.glob("*.wandb"))):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(raw)
        if record.WhichOneof("record_type") == "run":
            found |= {"name": record.run.display_name, "group": record.run.run_group, "project": record.run.project}
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            row = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}
            if "train/loss" in row:
                found["rows"][row["train/global_step"]] = row
    return found


def start(out: Path) -> "subprocess.Popen[bytes]":
    given = [str(RECIPE), f"run_dir={out / 'run'}", f"stages.grpo.steps={STEPS}", "runtime.trackers=[wandb]"]
    around = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    around |= {"WANDB_MODE": "offline", "WANDB_DIR": str(out), "WANDB_SILENT": "true"}
    command = [sys.executable, "-m", "rlmm.cli", "run", *given]
    return subprocess.Popen(command, env=around, cwd=RECIPE.parents[2], stdout=subprocess.DEVNULL)


@pytest.mark.long
def test_a_resumed_stage_goes_on_with_its_run_and_each_stage_has_its_own(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    first, metrics = start(tmp_path), tmp_path / "run" / "stages" / "03-grpo" / "metrics.jsonl"
    while not metrics.is_file() or len(metrics.read_text().splitlines()) < STEPS // 2:
        assert first.poll() is None, "it ended before it was killed"
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert start(tmp_path).wait() == 0
    runs = [told(folder) for folder in sorted((tmp_path / "wandb").glob("offline-run-*"))]
    codec, sft, killed, resumed = runs  # of a killed run wandb may not have written more than the id
    ended = [codec, sft, resumed]
    assert [run["name"] for run in ended] == ["tiny-codec", "tiny-sft", "tiny-grpo"]
    assert {(run["group"], run["project"]) for run in ended} == {("tiny", "rlmm")}
    assert killed["id"] == resumed["id"] and len({codec["id"], sft["id"], killed["id"]}) == 3
    assert set(sft["rows"]) == set(range(1, 5))
    rewards = {step: row["train/reward/mean"] for step, row in resumed["rows"].items() if "train/reward/mean" in row}
    kept = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert rewards and max(resumed["rows"]) == STEPS and min(resumed["rows"]) > 1
    assert rewards == {row["step"]: row["reward/mean"] for row in kept if row["step"] in rewards}


def test_a_tracker_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name == "trackio":
            raise PackageNotFoundError(name)
        return "1"

    monkeypatch.setattr(trackers, "version", version)
    trackers.check_trackers(["tensorboard", "wandb"])
    with pytest.raises(ValueError, match="names trackio, which is not installed; install the extra `trackers`"):
        trackers.check_trackers(["tensorboard", "trackio"])


def test_it_is_said_before_the_first_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(trackers, "version", version)
    with pytest.raises(ValueError, match="runtime.trackers names trackio"):
        check_stages(read_recipe(RECIPE, ["runtime.trackers=[trackio]"]))


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> MagicMock:
    made = MagicMock(run=None)
    monkeypatch.setitem(sys.modules, "wandb", made)
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    return made


def stage(folder: Path) -> Any:
    recipe = SimpleNamespace(name="mine", runtime=SimpleNamespace(trackers=("wandb",)))
    return SimpleNamespace(recipe=recipe, name="grpo", folder=folder)


@pytest.mark.parametrize(("error", "code"), [(None, 0), (Stopped("asked"), 0), (RuntimeError("broken"), 1)])
def test_a_run_that_broke_has_failed_and_one_that_was_stopped_has_not(
    wandb: MagicMock, tmp_path: Path, error: BaseException | None, code: int
) -> None:
    with suppress(Stopped, RuntimeError), trackers.wandb_run(stage(tmp_path)):
        if error is not None:
            raise error
    wandb.init.return_value.finish.assert_called_once_with(exit_code=code)


def test_what_the_user_has_set_stands_and_an_id_that_was_not_written_whole_is_made_anew(
    wandb: MagicMock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / trackers.WANDB_ID).write_text("")
    monkeypatch.setenv("WANDB_PROJECT", "theirs")
    with trackers.wandb_run(stage(tmp_path)):
        pass
    given = wandb.init.call_args.kwargs
    assert given["project"] is None and given["group"] == "mine" and given["name"] == "mine-grpo"
    assert given["id"] and given["id"] == (tmp_path / trackers.WANDB_ID).read_text() and given["resume"] == "allow"


def test_a_run_of_the_users_own_is_neither_replaced_nor_ended(wandb: MagicMock, tmp_path: Path) -> None:
    wandb.run = own = MagicMock()
    with trackers.wandb_run(stage(tmp_path)):
        pass
    wandb.init.assert_not_called()
    own.finish.assert_not_called()
