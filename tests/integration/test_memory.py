"""The memory plan follows what decides memory, and reads a checkpoint's size from its configuration."""

from pathlib import Path

import pytest

from rlmm.config.policy import CheckpointPolicy
from rlmm.config.recipe import read_recipe
from rlmm.memory import MemoryPlan, memory_plans
from rlmm.policies.tokenizer import character_tokenizer
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
    whole = plan("stages.grpo.lora=null", "stages.grpo.weight_decay=0.1")
    rows = plan("stages.grpo.lora=null")  # without decay the head's rows of text are not trained
    assert whole.gradients - rows.gradients == len(character_tokenizer(())) * 32 * 4
    assert rows.optimizer == 2 * rows.gradients and rows.weights == whole.weights
    assert whole.reference == whole.weights == whole.gradients and plain.reference == 0 < plain.gradients
    assert whole.optimizer == 2 * whole.gradients and plain.weights == whole.weights + plain.gradients
    halved = plan("stages.grpo.precision=bfloat16", "stages.grpo.engine={kind: vllm, kv_megabytes: 64}")
    assert halved.engine == plain.engine  # rounded in one's own process, or loaded in another's


def test_what_is_held_by_hand() -> None:
    grpo = plan()
    # Rows of 12 codes and 32 tokens of prompt, each with and without its prompt: 2 a micro-batch, 8 a rollout.
    assert grpo.logits == 3 * (2 * 2) * 44 * 64 * 4
    assert grpo.kv_cache == (8 * 2) * 44 * (2 * 2 * 32) * 4  # keys and values of 2 layers of width 32
    sft = memory_plans(read_recipe(TINY, []))[0]
    assert sft.stage == "sft" and sft.engine == sft.kv_cache == sft.reference == 0 < sft.gradients == sft.weights


def test_the_total_takes_the_larger_of_sampling_and_updating() -> None:
    held = {"weights": 1, "gradients": 20, "optimizer": 300, "reference": 4_000, "engine": 50_000}
    updating = {"activations": 100_000, "logits": 600_000}
    assert MemoryPlan("grpo", **held, **updating, kv_cache=699_999).total == 754_321
    assert MemoryPlan("grpo", **held, **updating, kv_cache=800_000).total == 854_321


def test_a_checkpoint_has_the_plan_of_the_policy_it_holds(tiny_run: TinyRun) -> None:
    folder = tiny_run.folder.stage("sft") / "model"
    same = tiny_run.recipe.model_copy(update={"policy": CheckpointPolicy(path=str(folder))})
    assert memory_plans(same) == memory_plans(tiny_run.recipe)


def test_a_checkpoint_that_is_not_there_is_named(tiny_run: TinyRun, tmp_path: Path) -> None:
    recipe = tiny_run.recipe.model_copy(update={"policy": CheckpointPolicy(path=str(tmp_path))})
    with pytest.raises(ValueError, match="layout.json"):
        memory_plans(recipe)
