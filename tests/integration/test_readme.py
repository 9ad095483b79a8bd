"""Every command of the README runs: with a smoke budget here, whole with the marker `long`."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rlmm.cli import app

ROOT = Path(__file__).parents[2]
SMOKE = [
    "data.train_images=32",
    "stages.codec.steps=4",
    "stages.sft.steps=2",
    "stages.sft.batch_size=8",
    "stages.sft.micro_batch_size=8",
    "stages.sft_more.steps=2",
    "stages.sft_more.batch_size=8",
    "stages.sft_more.micro_batch_size=8",
    "stages.grpo.prompts_per_step=2",
    "stages.grpo.samples_per_prompt=4",
    "stages.grpo.micro_batch_size=4",
    "stages.evaluation.prompts=4",
    "stages.evaluation.sampling_seeds=1",
    "runtime.trackers=[]",
]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)


def commands() -> list[list[str]]:
    lines = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("rlmm ")]
    return [shlex.split(line, comments=True)[1:] for line in lines]


@pytest.mark.slow
def test_the_commands_run_with_a_smoke_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert [command[0] for command in commands()][:3] == ["run", "run", "check"]
    for command in commands():
        budget = [*SMOKE, "stages.grpo.steps=2"] if command[0] == "run" else []
        answer = CliRunner().invoke(app, [*command, *budget], catch_exceptions=False)
        assert answer.exit_code == 0, f"rlmm {shlex.join(command)}:\n{answer.output[-3000:]}"
    for name in ("runs/quickstart/report.html", "runs/short/report.html", "hello.png"):
        assert (tmp_path / name).is_file()
    (snippet,) = blocks("python")
    loaded = subprocess.run([sys.executable, "-c", snippet], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert loaded.returncode == 0, loaded.stderr[-3000:]


def test_make_runs_what_the_readme_says() -> None:
    for target, expected in (("quickstart", "rlmm run configs/quickstart.yaml"), ("test", "python -m pytest")):
        assert f"make {target}" in (ROOT / "README.md").read_text()
        answer = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=True)
        assert expected in answer.stdout


def test_files_the_readme_names_are_there() -> None:
    text = (ROOT / "README.md").read_text()
    names = [*re.findall(r"\((docs/[^)]+)\)", text), *re.findall(r"`(requirements/[^`]+)`", text)]
    assert len(names) > 4 and all((ROOT / name).exists() for name in names), names


@pytest.mark.long
def test_the_quickstart_runs_whole(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "rlmm.cli", "run", "quickstart"]
    answer = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=3600)
    assert answer.returncode == 0, answer.stderr[-3000:]
    assert "grpo minus sft" in answer.stdout
    assert (tmp_path / "runs" / "quickstart" / "adapter" / "adapter_model.safetensors").is_file()
