"""GRPO under ZeRO-3 by an engine with weights of its own: the policy is never whole in a rollout, and what one process
alone comes to (a lost engine, a lost record, a flat group, an error) keeps none waiting."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.integration.parts_program import LOSSES, RUNS
from tests.integration.programs import ROOT

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    command = [sys.executable, "-m", "tests.integration.parts_program", str(folder), *RUNS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return folder


def statuses(runs: Path, name: str) -> list[int]:
    return json.loads((runs / f"{name}.status.json").read_text())


def weights(runs: Path, name: str) -> dict[str, torch.Tensor]:
    (stage,) = (runs / name / "stages").glob("*-whole")
    return load_file(stage / "model" / "model.safetensors")


def test_a_rollout_gathers_a_parameter_and_never_the_policy(runs: Path) -> None:
    found, largest = (
        json.loads((runs / "kept.json").read_text()),
        max(w.numel() for w in weights(runs, "kept").values()),
    )
    assert found["whole"] == 0 and found["most"]["save"] == found["all"]
    assert 0 < found["most"]["rollout"] < 1.2 * largest < found["all"] / 3  # with the adapter on it
    assert found["most"]["update"] < 2.2 * largest


@pytest.mark.parametrize("name", ["sync", "fingerprint", "generate", "torn"])
def test_what_one_process_loses_changes_nothing(name: str, runs: Path) -> None:
    log = (runs / f"{name}.log").read_text()
    assert statuses(runs, name) == [0, 0], log[-6000:]
    assert log.count("started again: gone in") == (name in LOSSES)
    kept, found = weights(runs, "kept"), weights(runs, name)
    assert all(torch.equal(kept[key], found[key]) for key in kept)


@pytest.mark.parametrize(
    ("name", "told"), [("twice", "lost twice with the same weights"), ("failing", "this process alone has failed")]
)
def test_what_one_process_cannot_get_over_ends_both(name: str, told: str, runs: Path) -> None:
    assert statuses(runs, name)[1] == 1 and statuses(runs, name)[0] != 0
    assert told in (runs / f"{name}.log").read_text()
    assert not list((runs / name / "stages").glob("*-whole/model"))
