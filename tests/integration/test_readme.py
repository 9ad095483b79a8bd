"""Every command of the README runs: with a smoke budget here, whole with the marker `long`."""

import os
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
    "stages.sft.images=32",
    "stages.sft.batch_size=8",
    "stages.sft.micro_batch_size=8",
    "stages.sft_more.steps=2",
    "stages.sft_more.images=32",
    "stages.sft_more.batch_size=8",
    "stages.sft_more.micro_batch_size=8",
    "stages.grpo.prompts_per_step=2",
    "stages.grpo.samples_per_prompt=4",
    "stages.grpo.micro_batch_size=4",
    "stages.evaluation.prompts=4",
    "stages.evaluation.sampling_seeds=1",
    "runtime.trackers=[]",
]


SMALL = {
    "bench rollout": "--sizes quickstart --samples 8 --tokens 4 --repeats 1".split(),
    "bench step": "--problems small --prompts 1 --tokens 16 --no-lora --no-checkpointed --steps 2 --repeats 1".split(),
}
"""What makes the commands small that take no overrides."""


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)


def commands() -> list[list[str]]:
    lines = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("rlmm ")]
    return [shlex.split(line, comments=True)[1:] for line in lines]


@pytest.mark.slow
def test_the_commands_run_with_a_smoke_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert [command[0] for command in commands()][:4] == ["run", "run", "run", "check"]
    for command in commands():
        budget = [*SMOKE, "stages.grpo.steps=2"] if command[0] == "run" else SMALL.get(" ".join(command[:2]), [])
        answer = CliRunner().invoke(app, [*command, *budget], catch_exceptions=False)
        assert answer.exit_code == 0, f"rlmm {shlex.join(command)}:\n{answer.output[-3000:]}"
    check_what_is_left(tmp_path)


def check_what_is_left(folder: Path) -> None:
    """The files that the README's commands promise, and its lines of Python, which load the adapter."""
    for name in ("runs/quickstart/report.html", "runs/short/report.html", "hello.png"):
        assert (folder / name).is_file()
    (snippet,) = blocks("python")
    loaded = subprocess.run([sys.executable, "-c", snippet], cwd=folder, capture_output=True, text=True, timeout=120)
    assert loaded.returncode == 0, loaded.stderr[-3000:]


def test_make_runs_what_the_readme_says() -> None:
    quick, plans = "rlmm run configs/quickstart.yaml", "rlmm evidence"
    for target, expected in (("quickstart", quick), ("test", "python -m pytest"), ("evidence", plans)):
        assert f"make {target}" in (ROOT / "README.md").read_text()
        answer = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=True)
        assert expected in answer.stdout


def test_files_the_readme_names_are_there() -> None:
    text = (ROOT / "README.md").read_text()
    names = [*re.findall(r"\((docs/[^)]+)\)", text), *re.findall(r"`(requirements/[^`]+)`", text)]
    assert len(names) > 4 and all((ROOT / name).exists() for name in names), names


@pytest.mark.long
def test_the_commands_run_whole(tmp_path: Path) -> None:
    for command in commands():
        line = [sys.executable, "-m", "rlmm.cli", *command]
        answer = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=3600)
        assert answer.returncode == 0, f"rlmm {shlex.join(command)}:\n{answer.stdout[-1000:]}{answer.stderr[-3000:]}"
        if command == ["run", "quickstart"]:
            assert "grpo minus sft" in answer.stdout
    check_what_is_left(tmp_path)


@pytest.mark.long
def test_the_installation_by_hand(tmp_path: Path) -> None:
    (block,) = [block for block in blocks("bash") if block.startswith("pip install")]
    clone, python = tmp_path / "clone", str(tmp_path / "env" / "bin" / "python")
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "env")], check=True)
    once = os.environ | {"PIP_RETRIES": "0"}  # an index out of reach costs one question a package, not six
    for line in block.splitlines():
        subprocess.run([python, "-m", *shlex.split(line)], cwd=clone, env=once, check=True, timeout=900)
    answer = subprocess.run([python, "-m", "rlmm.cli", "doctor"], cwd=tmp_path, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stdout + answer.stderr[-3000:]
