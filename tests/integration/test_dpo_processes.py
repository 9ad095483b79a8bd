"""Two processes draw the pairs that one draws, and take the steps that one takes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
PROGRAM = str(ROOT / "tests" / "integration" / "dpo_program.py")
STAGES = {"tiny_dpo.yaml": ("04-dpo", "06-dpo2", "07-kto"), "tiny_masked_dpo.yaml": ("04-dpo", "05-kto")}
EVERY = [(recipe, stage) for recipe, stages in STAGES.items() for stage in stages]
Folders = dict[str, tuple[Path, Path]]


def run(*command: str) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    answer = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert answer.returncode == 0, (answer.stdout + answer.stderr)[-6000:]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Of each recipe the run of one process, and that of two which share its codec and SFT policy."""
    found = {}
    for recipe in STAGES:
        alone, both = tmp_path_factory.mktemp("alone"), tmp_path_factory.mktemp("both")
        run(PROGRAM, str(alone), recipe)
        for stage in ("01-codec", "02-sft"):
            shutil.copytree(alone / "stages" / stage, both / "stages" / stage)
        run("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", PROGRAM, str(both), recipe)
        assert [json.loads((folder / "processes.json").read_text()) for folder in (alone, both)] == [1, 2]
        found[recipe] = (alone, both)
    return found


@pytest.mark.long
@pytest.mark.parametrize("recipe", STAGES)
def test_the_pairs_are_the_same(folders: Folders, recipe: str) -> None:
    one, two = (pq.read_table(folder / "stages/03-pairs/pairs.parquet").to_pylist() for folder in folders[recipe])
    assert one == two and len(one) == 14


@pytest.mark.long
@pytest.mark.parametrize(("recipe", "stage"), EVERY)
def test_the_steps_are_the_same(folders: Folders, recipe: str, stage: str) -> None:
    rows = [
        [json.loads(line) for line in (folder / f"stages/{stage}/metrics.jsonl").read_text().splitlines()]
        for folder in folders[recipe]
    ]
    assert len(rows[0]) == len(rows[1]) > 1
    for one, two in zip(*rows, strict=True):
        wanted = {name: value for name, value in one.items() if not name.startswith("time/")}
        assert {name: two[name] for name in wanted} == pytest.approx(wanted, rel=2e-4, abs=2e-6)


@pytest.mark.long
@pytest.mark.parametrize(("recipe", "stage"), EVERY)
def test_the_weights_are_the_same(folders: Folders, recipe: str, stage: str) -> None:
    one, two = (load_file(folder / f"stages/{stage}/model/model.safetensors") for folder in folders[recipe])
    start = load_file(folders[recipe][0] / "stages/02-sft/model/model.safetensors")
    assert max(float((one[name] - start[name]).abs().max()) for name in one) > 1e-5
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=2e-6)
