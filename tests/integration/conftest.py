"""One whole run of the tiny recipe, shared by the tests that look at what a run leaves."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from rlmm.config.policy import CheckpointPolicy
from rlmm.config.recipe import Recipe, read_recipe
from rlmm.pipeline import run_recipe
from rlmm.run_folder import RunFolder

TINY = Path(__file__).parents[1] / "recipes" / "tiny.yaml"


@dataclass(frozen=True)
class TinyRun:
    recipe: Recipe
    folder: RunFolder
    said: list[str]


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """The tiny recipe, run whole."""
    recipe = read_recipe(TINY, [f"run_dir={tmp_path_factory.mktemp('tiny') / 'run'}"])
    said: list[str] = []
    return TinyRun(recipe, run_recipe(recipe, said.append), said)


@pytest.fixture
def variant(tiny_run: TinyRun, tmp_path: Path) -> Callable[..., Recipe]:
    """Recipes that start where the tiny run's SFT ended, so that only the stage under test runs."""

    def make(*overrides: str) -> Recipe:
        checkpoint = tiny_run.folder.stage("sft") / "model"
        recipe = read_recipe(TINY, [f"run_dir={tmp_path / 'run'}", *overrides])
        kept = {"grpo": recipe.stages["grpo"]}
        return recipe.model_copy(update={"policy": CheckpointPolicy(path=str(checkpoint)), "stages": kept})

    return make
