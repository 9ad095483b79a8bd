"""Two processes under DeepSpeed's ZeRO take the steps that one process takes alone."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rlmm.train.launch import check_deepspeed

ROOT = Path(__file__).parents[2]
PROGRAM = str(ROOT / "tests" / "integration" / "deepspeed_program.py")
ZERO2 = ROOT / "configs" / "deepspeed" / "zero2.json"
needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")


def run(*command: str) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    answer = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert answer.returncode == 0, (answer.stdout + answer.stderr)[-6000:]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The run of one process, and that of two which share its codec and SFT policy."""
    alone, both = tmp_path_factory.mktemp("alone"), tmp_path_factory.mktemp("both")
    run(PROGRAM, str(alone))
    for stage in ("01-codec", "02-sft"):
        shutil.copytree(alone / "stages" / stage, both / "stages" / stage)
    run("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", PROGRAM, str(both), str(ZERO2))
    return alone, both


@needs_deepspeed
@pytest.mark.long
def test_two_processes_really_ran_under_zero(folders: tuple[Path, Path]) -> None:
    alone, both = (json.loads((folder / "wrapped.json").read_text()) for folder in folders)
    assert both == {"kind": "DeepSpeedEngine", "zero": 2, "processes": 2}
    assert alone["processes"] == 1 and alone["zero"] is None


@needs_deepspeed
@pytest.mark.long
def test_the_steps_are_the_same(folders: tuple[Path, Path]) -> None:
    rows = [
        [json.loads(line) for line in (folder / "stages/03-grpo/metrics.jsonl").read_text().splitlines()]
        for folder in folders
    ]
    assert len(rows[0]) == len(rows[1]) == 3
    for one, two in zip(*rows, strict=True):
        wanted = {name: value for name, value in one.items() if not name.startswith("time/")}
        assert {name: two[name] for name in wanted} == pytest.approx(wanted, rel=1e-4, abs=1e-6)


@needs_deepspeed
@pytest.mark.long
def test_the_weights_are_the_same(folders: tuple[Path, Path]) -> None:
    one, two = (load_file(folder / "stages/03-grpo/model/model.safetensors") for folder in folders)
    start = load_file(folders[0] / "stages/02-sft/model/model.safetensors")
    assert max(float((one[name] - start[name]).abs().max()) for name in one) > 1e-4
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=1e-6)


@needs_deepspeed
@pytest.mark.long
def test_every_adapter_tensor_is_the_same(folders: tuple[Path, Path]) -> None:
    one, two = (load_file(folder / "stages/03-grpo/adapter/adapter_model.safetensors") for folder in folders)
    assert one.keys() == two.keys() and len(one) > 0
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"])
def test_the_shipped_files_are_accepted(name: str) -> None:
    check_deepspeed(ROOT / "configs" / "deepspeed" / f"{name}.json")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"zero_optimization": {"stage": 4}}', "ZeRO stage 4"),
        ('{"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}', "offloads to .*nvme"),
        ('{"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}}', "ratio 0.5"),
        ('{"zero_optimization": {"stage": 0}}', "no ZeRO stage"),
        ('{"scheduler": {"type": "WarmupLR"}, "zero_optimization": {"stage": 2}}', "section scheduler.*learning_rate"),
        ('{"optimizer": {}, "scheduler": {}, "zero_optimization": {"stage": 2}}', "optimizer and scheduler.*schedule"),
        ("{}", "no ZeRO stage"),
        ("{", "not a readable"),
        ("[]", "not a"),
    ],
)
def test_what_cannot_be_trained_with_is_refused(text: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "deepspeed.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=says):
        check_deepspeed(path)
    with pytest.raises(ValueError, match="not a readable"):
        check_deepspeed(tmp_path / "absent.json")
