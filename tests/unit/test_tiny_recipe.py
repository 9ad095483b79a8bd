"""`model=tiny`: every shipped recipe in small, and what of a recipe stays."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from rlmm.config.policy import CheckpointPolicy
from rlmm.config.recipe import RecipeError, read_recipe
from rlmm.config.stages import EvalStage, GrpoStage, SftStage
from rlmm.config.tiny import tiny_recipe
from rlmm.installation import recipes_dir
from rlmm.pipeline import run_recipe
from rlmm.preflight import check_stages

RECIPES = sorted(recipes_dir().glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_is_valid_whole_and_in_small(path: Path) -> None:
    whole, small = read_recipe(path), read_recipe(path, ["model=tiny"])
    assert list(small.stages) == list(whole.stages) and small.folder != whole.folder
    for name, stage in small.stages.items():
        before = whole.stages[name]
        assert type(stage) is type(before)
        if isinstance(stage, SftStage | GrpoStage):
            assert isinstance(before, SftStage | GrpoStage)
            assert stage.steps == 2 and (stage.lora is None) == (before.lora is None)
        if isinstance(stage, GrpoStage):
            assert isinstance(before, GrpoStage)
            short = {"thought", "answer"}  # only how much is written
            assert stage.sampling.model_dump(exclude=short) == before.sampling.model_dump(exclude=short)
            assert (stage.sampling.written is None) == (before.sampling.written is None)
            assert stage.objective == before.objective
        if isinstance(stage, EvalStage):
            assert stage.prompts == 4


def test_other_overrides_come_on_top_of_the_small_recipe(tmp_path: Path) -> None:
    recipe = read_recipe(Path("quickstart"), [f"run_dir={tmp_path}", "stages.grpo.steps=3", "model=tiny"])
    grpo = recipe.stages["grpo"]
    assert isinstance(grpo, GrpoStage) and grpo.steps == 3 and recipe.folder == tmp_path


def rows(**policy: Any) -> dict[str, Any]:
    return {
        "name": "mine",
        "data": {"kind": "rows", "path": "nowhere.parquet", "sources_column": "before"},
        "policy": {"kind": "checkpoint", "path": "someone/emu3", **policy},
        "rewards": {"terms": [{"name": "ocr"}]},
        "held_out": {"terms": [{"name": "tesseract"}]},
        "stages": {
            "grpo": {"kind": "grpo", "steps": 9, "learning_rate": 1e-6, "objective": {"updates_per_rollout": 4}}
        },
    }  # fmt: skip


def test_rows_of_ones_own_become_scenes_of_the_same_task() -> None:
    small = tiny_recipe(rows(family="emu3"))
    assert small["data"] == {"kind": "scenes", "variant": "edit", "train_images": 16, "held_out": 16}
    assert small["rewards"] == {"terms": [{"name": "scenes"}]}
    assert CheckpointPolicy.model_validate(small["policy"]).tiny
    assert (small["stages"]["grpo"]["samples_per_prompt"], small["stages"]["grpo"]["micro_batch_size"]) == (4, 2)


def test_a_tiny_policy_of_no_family_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(rows()))
    with pytest.raises(RecipeError, match=r"tiny needs policy\.family"):
        read_recipe(path, ["model=tiny"])


@pytest.mark.parametrize(
    "order", ["{order: random}", "{order: blocks, block: 2}", "{order: threshold, threshold: 0.9}"]
)
def test_a_masked_checkpoints_tiny_image_has_a_position_for_every_step(tmp_path: Path, order: str) -> None:
    unmasking = {"steps": 15, **yaml.safe_load(order)}
    raw = rows(family="mmada") | {"run_dir": str(tmp_path)}
    raw["stages"] = {
        "grpo": raw["stages"]["grpo"] | {"sampling": {"unmasking": unmasking}, "estimator": {"steps": 6}},
        "evaluation": {"kind": "eval", "arms": ["grpo"], "unmasking": unmasking},
    }
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(raw, sort_keys=False))
    small = read_recipe(path, ["model=tiny"])
    check_stages(small)
    grpo = small.stages["grpo"]
    assert isinstance(grpo, GrpoStage) and grpo.estimator is not None and grpo.estimator.steps == 3


def test_steps_that_a_checkpoints_grid_has_not_are_refused_before_the_first_stage(tmp_path: Path) -> None:
    raw = rows(family="mmada") | {"run_dir": str(tmp_path / "run")}
    raw["stages"] = {
        "sft": {"kind": "sft", "steps": 2, "learning_rate": 1e-3},
        "evaluation": {"kind": "eval", "arms": ["sft"], "unmasking": {"steps": 4}},
    }
    (path := tmp_path / "mine.yaml").write_text(yaml.safe_dump(raw, sort_keys=False))
    recipe = read_recipe(path, ["model=tiny", "stages.evaluation.unmasking={steps: 15}"])
    with pytest.raises(ValueError, match="stage 'evaluation': .*15 steps for 9 positions"):
        run_recipe(recipe, lambda line: None)
    assert not (tmp_path / "run" / "config.yaml").exists()
