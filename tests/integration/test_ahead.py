"""Rollouts drawn a step ahead: by which weights, the same bits with a thread and without one, and after a kill."""

import json
import random
from collections.abc import Callable
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlmm.config.policy import CheckpointPolicy
from rlmm.config.recipe import Recipe
from rlmm.pipeline import run_recipe
from rlmm.policies.families.loading import load_policy
from rlmm.policies.still import Still
from rlmm.run_folder import RunFolder
from rlmm.train import ahead
from rlmm.train.gates import GateError
from rlmm.train.grpo_batch import GrpoBatch
from rlmm.train.grpo_source import GrpoSource
from rlmm.train.metrics import MetricsFile
from rollouts.store import read_trajectory

STALE = ("stages.grpo.max_staleness=1", "stages.grpo.objective.mismatch={kind: truncate}")
EVERY_STEP = ("stages.grpo.objective.updates_per_rollout=1", "stages.grpo.lora=null")


class AtOnce(Executor):
    """Draws when it is asked to, in the thread that asks, which must leave what is random as it is."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        before = (random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist())
        done: Future[Any] = Future()
        done.set_result(fn(*args, **kwargs))
        assert before == (random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist())
        return done


def left(folder: RunFolder) -> dict[str, Any]:
    """Weights, figures and stored rollouts of the stage."""
    stage = folder.stage("grpo")
    rows = MetricsFile(stage / "metrics.jsonl").read()
    found: dict[str, Any] = {f"figures {row['step']}": json.dumps(untimed(row), sort_keys=True) for row in rows}
    found |= {path.name: path.read_bytes() for path in (stage / "rollouts").glob("*.parquet")}
    return found | {"weights": (stage / "model" / "model.safetensors").read_bytes()}


def untimed(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if not name.startswith("time/")}


def quietly(recipe: Recipe) -> RunFolder:
    return run_recipe(recipe, lambda line: None)


@pytest.mark.parametrize(
    "settings",
    [EVERY_STEP, pytest.param((), marks=pytest.mark.long)],
    ids=["one update, all weights", "two updates, LoRA"],
)
def test_neither_a_thread_nor_a_kill_changes_a_bit(
    variant: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: tuple[str, ...]
) -> None:
    class Killed(Exception):
        pass

    def recipe(name: str) -> Recipe:
        return variant(*STALE, *settings, f"run_dir={tmp_path / name}")

    threaded = left(quietly(recipe("threaded")))
    with monkeypatch.context() as patch:
        patch.setattr(ahead, "in_thread", AtOnce)
        assert left(quietly(recipe("at once"))) == threaded
    made = GrpoSource.micro_batches

    def dies(self: GrpoSource, step: int) -> list[GrpoBatch]:
        found = made(self, step)
        if step == 5:  # the checkpoint is of step 3, and rollouts after it are finished
            raise Killed
        return found

    with monkeypatch.context() as patch:
        patch.setattr(GrpoSource, "micro_batches", dies)
        with pytest.raises(Killed):
            quietly(recipe("killed"))
    said: list[str] = []
    assert left(run_recipe(recipe("killed"), said.append)) == threaded
    assert any("resuming from step 3" in line for line in said)
    assert any("is read back: it was finished" in line for line in said)


def test_a_rollout_is_drawn_by_the_weights_of_a_step_ago(variant: Callable[..., Recipe]) -> None:
    recipe = variant(*STALE, *EVERY_STEP, "stages.grpo.steps=4")
    stage = quietly(recipe).stage("grpo")
    assert isinstance(recipe.policy, CheckpointPolicy)
    first = load_policy(recipe.policy.path)
    gaps, versions = [], []
    for rollout in range(4):
        made, _ = read_trajectory(stage / "rollouts" / f"step-{rollout:06d}.parquet")
        versions.append(made.weights_version)
        with torch.no_grad():
            gap = (first.log_probs(made).logp_BS - made.sampler_logp)[made.target_mask]
        gaps.append(float(gap.abs().max()))
    assert versions == [0, 0, 1, 2]
    assert max(gaps[:2]) < 1e-4 < min(gaps[2:]), gaps
    rows = MetricsFile(stage / "metrics.jsonl").read()
    assert [row["staleness"] for row in rows] == [0, 1, 1, 1]
    assert max(row["mismatch/max"] for row in rows) < 1e-3
    # Weights of 1 where nothing is stale, and of something else where it is.
    assert rows[0]["mismatch/weight"] == pytest.approx(1, abs=1e-5)
    assert all(abs(row["mismatch/weight"] - 1) > 1e-5 for row in rows[1:])


def test_the_gate_compares_under_the_weights_that_drew(
    variant: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy that is left behind is not the version that the engine has: no correction is for that."""
    monkeypatch.setattr(Still, "take", lambda self: None)
    with pytest.raises(GateError, match="not the sampler's"):
        quietly(variant(*STALE, *EVERY_STEP))
