"""Every shipped recipe, run with `model=tiny` from the command line."""

import subprocess
import sys
from pathlib import Path

import pytest

from rlmm.installation import recipes_dir


@pytest.mark.parametrize("name", sorted(path.stem for path in recipes_dir().glob("*.yaml")))
def test_a_recipe_runs_in_small(name: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "rlmm.cli", "run", name, "model=tiny", f"run_dir={tmp_path / 'run'}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "run" / "report.html").is_file() and not (tmp_path / "runs").exists()
