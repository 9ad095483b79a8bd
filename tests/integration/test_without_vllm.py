"""An installation without vLLM: runs on the torch engine, and what is missing is said."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.integration.conftest import TINY
from tests.integration.programs import ROOT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That of an environment with all packages of this one but vLLM's."""
    folder, (here, packages) = tmp_path_factory.mktemp("bare"), map(Path, map(sysconfig.get_path, ("data", "purelib")))
    real = Path(sys.executable).resolve()
    (folder / "pyvenv.cfg").write_text(f"home = {real.parent}\ninclude-system-site-packages = false\n")
    (folder / "bin").mkdir()
    (folder / "bin" / "python").symlink_to(real)
    inside = folder / packages.relative_to(here)
    inside.mkdir(parents=True)
    for package in packages.iterdir():
        if not package.name.startswith("vllm"):
            (inside / package.name).symlink_to(package)
    return folder / "bin" / "python"


def rlmm(python: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    around = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [python, "-m", "rlmm.cli", *arguments]
    return subprocess.run(command, cwd=ROOT, env=around, capture_output=True, text=True, timeout=300)


def test_a_recipe_runs_to_its_end(python: Path, tmp_path: Path) -> None:
    done = rlmm(python, "run", str(TINY), f"run_dir={tmp_path}")
    assert done.returncode == 0, done.stderr[-4000:]
    assert (tmp_path / "report.html").is_file()


def test_a_recipe_that_names_it_is_an_error_before_its_first_stage(python: Path, tmp_path: Path) -> None:
    done = rlmm(python, "run", str(TINY), f"run_dir={tmp_path}", "stages.grpo.engine.kind=vllm")
    said = " ".join((done.stdout + done.stderr).split())
    assert done.returncode and "stage 'grpo': the vllm engine needs vLLM, which is not installed; install" in said
    assert not list(tmp_path.glob("stages/*"))


def test_doctor_says_what_is_missing(python: Path) -> None:
    done = rlmm(python, "doctor")
    rows = [[part.strip() for part in line.split("│")[1:4]] for line in done.stdout.splitlines()]
    assert ["warn", "vllm", "missing"] in rows, done.stdout
