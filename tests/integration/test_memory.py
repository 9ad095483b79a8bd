"""The memory plan follows what decides memory, and reads a checkpoint's size from its configuration."""

from pathlib import Path

import pytest

from rlmm.config.policy import CheckpointPolicy
from rlmm.config.recipe import read_recipe
from rlmm.memory import MemoryPlan, memory_plans
from tests.integration.conftest import TINY, TinyRun


def plan(*overrides: str) -> MemoryPlan:
    return memory_plans(read_recipe(TINY, list(overrides)))[-1]


def test_each_setting_moves_its_own_figure() -> None:
    plain = plan()
    assert plan("stages.grpo.gradient_checkpointing=true").activations < plain.activations
    three = plan("stages.grpo.sampling.source_scale=2.0")
    assert (three.kv_cache, three.activations) == (plain.kv_cache * 3 // 2, plain.activations * 3 // 2)
    vllm = plan("stages.grpo.engine={kind: vllm, kv_megabytes: 64}")
    assert vllm.kv_cache == 64 << 20 and vllm.engine == plain.engine == plan("stages.grpo.lora=null").weights
    assert plan("stages.grpo.precision=bfloat16").engine == plain.engine * 3 // 2
    whole = plan("stages.grpo.lora=null")
    assert whole.reference == whole.weights == whole.gradients and plain.reference == 0 < plain.gradients


def test_a_checkpoint_has_the_plan_of_the_policy_it_holds(tiny_run: TinyRun) -> None:
    folder = tiny_run.folder.stage("sft") / "model"
    same = tiny_run.recipe.model_copy(update={"policy": CheckpointPolicy(path=str(folder))})
    assert memory_plans(same) == memory_plans(tiny_run.recipe)


def test_a_checkpoint_that_is_not_there_is_named(tiny_run: TinyRun, tmp_path: Path) -> None:
    recipe = tiny_run.recipe.model_copy(update={"policy": CheckpointPolicy(path=str(tmp_path))})
    with pytest.raises(ValueError, match="layout.json"):
        memory_plans(recipe)
