"""Bad input to a run: a clear error, or a counted exclusion."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rewards.runner import RewardContractError
from rlmm.config.recipe import Recipe, RecipeError, read_recipe
from rlmm.pipeline import run_folder, run_recipe
from rlmm.policies.families.loading import load_policy
from rlmm.train.gates import GateError
from rlmm.train.metrics import MetricsFile
from rollouts.store import read_trajectory
from rollouts.torch_engine.causal import TorchEngine
from rollouts.trajectory import Trajectory
from tests.integration.conftest import TINY, TinyRun

REWARDS = """
import math

def raises_on_every_other(samples):
    scores = []
    for sample in samples:
        if int(sample.sample_id.rsplit("/", 1)[1]) % 2:
            raise RuntimeError("the judge is out")
        scores.append(0.25 * int(sample.sample_id.rsplit("/", 1)[1]))
    return scores

def always_raises(samples):
    raise RuntimeError("the judge is out")

def too_short(samples):
    return [1.0] * (len(samples) - 1)

calls = 0

def fails_after_the_first_rollout(samples):
    global calls
    calls += len(samples)
    if calls > 8:
        raise RuntimeError("the judge is out")
    return [float(i) for i, _ in enumerate(samples)]

def nan_for_the_first(samples):
    return [math.nan if s.sample_id.endswith("/0") else float(i) for i, s in enumerate(samples)]
"""


@pytest.fixture
def with_reward(variant: Callable[..., Recipe], tmp_path: Path) -> Callable[..., Recipe]:
    path = tmp_path / "my_rewards.py"
    path.write_text(REWARDS)

    def make(function: str, *overrides: str) -> Recipe:
        terms = f"rewards={{terms: [{{function: '{path}:{function}'}}]}}"
        return variant(terms, "stages.grpo.steps=2", *overrides)

    return make


def run(recipe: Recipe) -> tuple[dict, Path]:
    folder = run_recipe(recipe, lambda line: None)
    return MetricsFile(folder.stage("grpo") / "metrics.jsonl").read()[0], folder.stage("grpo")


def test_a_reward_that_raises_excludes_its_samples(with_reward: Callable[..., Recipe]) -> None:
    row, stage = run(with_reward("raises_on_every_other"))
    assert row["sample/unavailable_share"] == 0.5
    _, columns = read_trajectory(stage / "rollouts" / "step-000000.parquet")
    failed = [i for i, status in enumerate(columns["reward_status"]) if status == "unavailable"]
    assert len(failed) == 4
    for i in failed:
        assert columns["reward"][i] is None and columns["advantage"][i] == 0 and not columns["kept"][i]
        assert "the judge is out" in columns["reward_reason"][i]


def test_a_judge_that_is_down_changes_no_weight_and_then_stops_the_run(with_reward: Callable[..., Recipe]) -> None:
    recipe = with_reward("always_raises", "stages.grpo.gates.patience=3")
    before = dict(load_policy(Path(recipe.policy.path)).named_weights())  # pyrefly: ignore
    row, stage = run(recipe)
    assert row["sample/unavailable_share"] == 1.0 and row["grad_norm"] == 0.0 and "reward/mean" not in row
    after = dict(load_policy(stage / "model").named_weights())
    assert all(torch.equal(before[name], after[name]) for name in before)
    with pytest.raises(GateError, match="the reward fails on most samples"):
        run(with_reward("always_raises", "stages.grpo.gates.patience=1", f"run_dir={stage.parent.parent}-2"))


def test_a_judge_that_goes_down_stops_the_weights_at_once(with_reward: Callable[..., Recipe]) -> None:
    names = ("stages.grpo.objective.updates_per_rollout=1", "stages.grpo.checkpoint_every=1", "rewards.retries=0")
    one = with_reward("fails_after_the_first_rollout", "stages.grpo.steps=1", *names)
    stopped = run(one)[1]
    moved = dict(load_policy(stopped / "model").named_weights())
    three = with_reward("fails_after_the_first_rollout", *names, "stages.grpo.steps=3", "stages.grpo.schedule=constant")
    three = three.model_copy(update={"run_dir": f"{stopped.parent.parent}-3"})
    row, stage = run(three)
    assert row["sample/unavailable_share"] == 0
    assert MetricsFile(stage / "metrics.jsonl").read()[2]["sample/unavailable_share"] == 1
    after = dict(load_policy(stage / "model").named_weights())
    assert all(torch.equal(moved[name], after[name]) for name in moved)


def test_a_loss_that_is_no_number_stops_sft(tiny_run: TinyRun, tmp_path: Path) -> None:
    budget = [f"run_dir={tmp_path}", "stages.sft.learning_rate=1e30", "stages.sft.max_grad_norm=0"]
    recipe = read_recipe(TINY, budget)
    with pytest.raises(GateError, match="no update was made"):
        run_recipe(recipe, lambda line: None)
    assert not run_folder(recipe).done("sft")


def test_a_gate_may_be_moved_in_the_same_folder(with_reward: Callable[..., Recipe]) -> None:
    with pytest.raises(GateError):
        run_recipe(with_reward("always_raises", "stages.grpo.gates.patience=1"), lambda line: None)
    run_recipe(with_reward("always_raises", "stages.grpo.gates.patience=9"), lambda line: None)


def test_a_reward_of_the_wrong_length_stops_the_run(with_reward: Callable[..., Recipe]) -> None:
    with pytest.raises(RewardContractError, match="too_short.*7.*8"):
        run(with_reward("too_short"))


def test_nan_is_the_judges_failure(with_reward: Callable[..., Recipe]) -> None:
    row, _ = run(with_reward("nan_for_the_first"))
    assert row["sample/unavailable_share"] == 0.25


@pytest.mark.parametrize("mode", ["conditional_only", "rescaled"])
def test_training_another_law_than_was_sampled_is_stopped(variant: Callable[..., Recipe], mode: str) -> None:
    law = (f"stages.grpo.sampling.guidance={mode}", "stages.grpo.sampling.guidance_scale=3", "stages.grpo.steps=2")
    with pytest.raises(RecipeError, match=r"guidance: guided or none, or set gates\.off_policy: allow"):
        variant(*law)
    with pytest.raises(GateError, match="another law"):
        run_recipe(variant(*law, "stages.grpo.gates.mismatch_mean=1.0e-5"), lambda line: None)


def test_off_policy_training_is_allowed_by_name_and_still_measured(variant: Callable[..., Recipe]) -> None:
    recipe = variant(
        "stages.grpo.sampling.guidance=conditional_only",
        "stages.grpo.sampling.guidance_scale=3",
        "stages.grpo.gates.off_policy=allow",
        "stages.grpo.steps=2",
    )
    row, _ = run(recipe)
    assert row["mismatch/mean"] > 1e-3


@pytest.mark.parametrize("kind", ["truncate", "reject"])
def test_a_mismatch_may_be_corrected_instead(
    variant: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """The sampler rounds as bfloat16 does, and the gate asks for float32's agreement."""
    sampler = TorchEngine.generate

    def rounding(self: TorchEngine, *arguments: Any) -> Trajectory:
        made = sampler(self, *arguments)
        return replace(made, sampler_logp=made.sampler_logp.bfloat16().double())

    monkeypatch.setattr(TorchEngine, "generate", rounding)
    with pytest.raises(GateError, match="correct for it with objective.mismatch"):
        run_recipe(variant("stages.grpo.steps=2"), lambda line: None)
    mismatch = f"stages.grpo.objective.mismatch={{kind: {kind}, low: 0.99999, high: 1.00001}}"
    row, _ = run(variant("stages.grpo.steps=2", mismatch, f"run_dir={tmp_path / 'corrected'}"))
    assert row["mismatch/mean"] > 1e-4 and row["mismatch/weight"] < 1
    assert (row["mismatch/left_out"] > 0) == (kind == "reject")


def test_importance_weights_do_not_excuse_another_law(variant: Callable[..., Recipe]) -> None:
    law = ("stages.grpo.sampling.guidance=conditional_only", "stages.grpo.sampling.guidance_scale=3")
    limit = "stages.grpo.gates.mismatch_mean=1.0e-5"
    with pytest.raises(GateError, match="another law"):
        run_recipe(variant(*law, limit, "stages.grpo.objective.mismatch={kind: truncate}"), lambda line: None)


def test_an_unreadable_checkpoint_is_named(tmp_path: Path, variant: Callable[..., Recipe]) -> None:
    with pytest.raises(ValueError, match="layout.json"):
        load_policy(tmp_path)
    source = Path(variant().policy.path)  # pyrefly: ignore
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in source.iterdir():
        if path.is_file():
            (broken / path.name).write_bytes(path.read_bytes()[: -50 if path.suffix == ".safetensors" else None])
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        load_policy(broken)


def test_the_run_folder_of_a_stopped_run_keeps_its_rollout(with_reward: Callable[..., Recipe]) -> None:
    recipe = with_reward("always_raises", "stages.grpo.gates.patience=1")
    with pytest.raises(GateError):
        run_recipe(recipe, lambda line: None)
    assert (run_folder(recipe).stage("grpo") / "rollouts" / "step-000000.parquet").is_file()


def test_a_judge_may_not_change_within_a_stage(with_reward: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = with_reward("always_raises", "stages.grpo.gates.patience=1")
    with pytest.raises(GateError):
        run_recipe(recipe, lambda line: None)
    path = tmp_path / "my_rewards.py"
    path.write_text(path.read_text().replace("the judge is out", "the judge is away"))
    with pytest.raises(ValueError, match="another judge"):
        run_recipe(recipe, lambda line: None)
