"""Every shipped recipe with `model=tiny`, which ends in two minutes of one core, whoever else uses it."""

import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlmm.config.recipe import read_recipe
from rlmm.installation import recipes_dir
from rlmm.memory import memory_plans
from rlmm.pipeline import run_recipe

MOST_SECONDS = 120
FIRST, *REST = sorted(path.stem for path in recipes_dir().glob("*.yaml"))


KINDS = {"dpo_words", "t2i_r1"}
"""Of recipes that are not in the README, whose commands the suite runs; the others are long tests."""


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.long] * (n not in KINDS)) for n in REST])
def test_a_recipe_runs_in_small(name: str, tmp_path: Path) -> None:
    recipe = read_recipe(Path(name), ["model=tiny", f"run_dir={tmp_path / 'run'}"])
    assert memory_plans(recipe)  # what `rlmm check` prints
    start = time.process_time()
    run = run_recipe(recipe, lambda line: None)
    assert time.process_time() - start < MOST_SECONDS
    assert all(run.done(stage) for stage in recipe.stages)


@pytest.mark.long
def test_one_from_the_command_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "rlmm.cli", "run", FIRST, "model=tiny", f"run_dir={tmp_path / 'run'}"]
    start = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]) - start < MOST_SECONDS
    assert (tmp_path / "run" / "report.html").is_file() and not (tmp_path / "runs").exists()
