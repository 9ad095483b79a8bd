"""GRPO with a judge that fails: what failed teaches nothing, what did not teaches what it would have taught alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rewards.failures import RewardFailureError
from rlmm.config.recipe import Recipe
from rlmm.pipeline import run_folder, run_recipe
from rlmm.policies.base import LogProbs
from rlmm.policies.causal import CausalPolicy
from rlmm.run_folder import RunFolder
from rlmm.seeds import derive
from rlmm.train.gates import GateError
from rlmm.train.metrics import MetricsFile
from rollouts.store import read_trajectory
from tests.unit.test_verifier_stub import MODEL, Reply, pictures, serving, tokens

PER_ROLLOUT, ROLLOUTS = 32, 16
LONGER = (
    f"stages.grpo.steps={ROLLOUTS}",
    "stages.grpo.prompts_per_step=4",
    "stages.grpo.samples_per_prompt=8",
    "stages.grpo.micro_batch_size=32",
    "stages.grpo.learning_rate=0.01",
    "stages.grpo.lora=null",
    "stages.grpo.schedule=constant",
    "stages.grpo.held_out_every=0",
    "stages.grpo.objective={name: grpo}",
)
FAILING = """
import math
from rewards.base import Score
from tests.integration.test_failing_judge import failure_of
from tests.recipes.rewards import darkness

def sometimes(samples):
    kinds = [failure_of(sample.sample_id) for sample in samples]
    if "raise" in kinds:
        raise RuntimeError("the judge is out")
    values = darkness([], [sample.images[0] for sample in samples])
    made = {"none": None, "nan": math.nan, "unavailable": Score.unavailable("low mass")}
    return [made.get(kind, value) for kind, value in zip(kinds, values)]
"""


def failure_of(sample_id: str) -> str:
    """How the judge fails on a sample, '' for not at all: one in ten, the same whenever it is asked."""
    drawn = derive(0, "failure", sample_id) % 40
    return {0: "none", 1: "nan", 2: "unavailable", 3: "raise"}.get(drawn, "")


def ran(recipe: Recipe) -> tuple[RunFolder, list[dict[str, Any]]]:
    folder = run_recipe(recipe, lambda line: None)
    return folder, MetricsFile(folder.stage("grpo") / "metrics.jsonl").read()


def last_rewards(rows: list[dict[str, Any]]) -> float:
    return float(np.mean([row["reward/mean"] for row in rows[-4:]]))


@pytest.fixture
def gradients(monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """sample -> the gradient of a run's losses with respect to its log-probs, as backward passes them."""
    seen: dict[str, torch.Tensor] = {}
    given = CausalPolicy.log_probs

    def watched(self: CausalPolicy, trajectory: Any, **options: Any) -> LogProbs:
        found = given(self, trajectory, **options)
        if found.logp_BS.requires_grad:
            found.logp_BS.register_hook(lambda grad_BS: seen.update(zip(trajectory.sample_id, grad_BS, strict=True)))
        return found

    monkeypatch.setattr(CausalPolicy, "log_probs", watched)
    return seen


@pytest.mark.slow
def test_one_failure_in_ten(variant: Callable[..., Recipe], tmp_path: Path, gradients: dict[str, torch.Tensor]) -> None:
    clean = []
    for seed in (1, 2, 3):
        rows = ran(variant(*LONGER, f"seed={seed}", f"run_dir={tmp_path / str(seed)}"))[1]
        clean.append(last_rewards(rows))
        assert clean[-1] > rows[0]["reward/mean"] + 0.001, "the clean run learns"
    gradients.clear()
    path = tmp_path / "failing.py"
    path.write_text(FAILING)
    failing = f"rewards={{terms: [{{function: '{path}:sometimes'}}]}}"
    folder, rows = ran(variant(*LONGER, failing, "seed=4", f"run_dir={tmp_path / 'failing'}"))
    assert len(rows) == ROLLOUTS and max(clean) - min(clean) > 0
    assert min(clean) <= last_rewards(rows) <= max(clean)

    failed: set[str] = set()
    for at, row in enumerate(rows):
        made, columns = read_trajectory(folder.stage("grpo") / "rollouts" / f"step-{at:06d}.parquet")
        injected = np.array([bool(failure_of(name)) for name in made.sample_id])
        failed |= {name for name, out in zip(made.sample_id, injected, strict=True) if out}
        assert row["sample/unavailable_share"] == injected.mean()
        assert [status == "unavailable" for status in columns["reward_status"]] == injected.tolist()
        assert all(columns["reward"][i] is None for i in np.flatnonzero(injected))
        expected = survivors_advantages(np.array(columns["reward"], float), ~injected, np.array(made.group_id))
        np.testing.assert_allclose(columns["advantage"], expected, rtol=0, atol=1e-6)
    assert 0.07 < len(failed) / (PER_ROLLOUT * ROLLOUTS) < 0.13
    kinds = {failure_of(name) for name in failed}
    assert kinds == {"none", "nan", "unavailable", "raise"}
    # A failed sample is not run through the model at all, but where it stands in for one, with weight 0.
    assert len(failed - gradients.keys()) > 0.9 * len(failed)
    assert all(bool((gradients[name] == 0).all()) for name in failed & gradients.keys())
    others = [grad for name, grad in gradients.items() if name not in failed]
    assert len(others) > 0.8 * PER_ROLLOUT * ROLLOUTS and sum(bool(grad.any()) for grad in others) > 0.95 * len(others)


@pytest.mark.slow
def test_a_ceiling_stops_at_the_first_rollout_with_more_failures(
    variant: Callable[..., Recipe], tmp_path: Path
) -> None:
    path = tmp_path / "failing.py"
    path.write_text(FAILING)
    for policy in ("on_failure: fail", "failed_share: 0.01"):
        terms = f"rewards={{terms: [{{function: '{path}:sometimes'}}], {policy}}}"
        recipe = variant(*LONGER, terms, f"run_dir={tmp_path / policy[:4]}")
        with pytest.raises(RewardFailureError, match="of 32 samples have no score.*times"):
            run_recipe(recipe, lambda line: None)
        stage = run_folder(recipe).stage("grpo")
        assert (stage / "rollouts" / "step-000000.parquet").is_file(), "who failed, and why, can be looked up"
        assert not MetricsFile(stage / "metrics.jsonl").read(), "no step was made"


def test_a_judge_that_hangs_stops_the_run_within_its_deadlines(variant: Callable[..., Recipe], tmp_path: Path) -> None:
    patience, deadline_s = 2, 0.5
    path = tmp_path / "hangs.py"
    path.write_text("import time\ndef hangs(samples):\n    time.sleep(600)\n")
    terms = f"rewards={{terms: [{{function: '{path}:hangs'}}], batch_size: 4, deadline_s: {deadline_s}}}"
    gates = f"stages.grpo.gates={{patience: {patience}, unavailable_share: 0.9}}"
    recipe = variant(terms, gates, "stages.grpo.steps=40", "stages.grpo.objective={name: grpo}")
    recipe = recipe.model_copy(update={"run_dir": str(tmp_path / "hangs")})
    with pytest.raises(GateError, match="sample/unavailable_share was above 0.9 for 2 rollouts.*the reward fails"):
        run_recipe(recipe, lambda line: None)
    stage = run_folder(recipe).stage("grpo")
    (row,) = MetricsFile(stage / "metrics.jsonl").read()
    batches = 2  # 8 samples a rollout
    assert batches * deadline_s <= row["time/score"] < batches * deadline_s + 2
    _, columns = read_trajectory(stage / "rollouts" / "step-000001.parquet")
    assert all("did not answer within 0.5 s" in reason for reason in columns["reward_reason"])


def test_a_judge_that_dies_and_returns(variant: Callable[..., Recipe], tmp_path: Path) -> None:
    """Over a socket: rollouts 1 and 2 of 5 get no answer, and all others do."""
    a_rollout, down = 8, range(8, 24)
    asked: list[bool] = []

    def answer(body: dict[str, Any], number: int) -> Reply:
        out = len(asked) in down
        asked.append(out)
        value = float(np.asarray(pictures(body)[0].convert("L"), float)[:, :40].mean()) / 255
        return Reply({}, status=503) if out else tokens({"Yes": 0.9 * value, "No": 0.9 * (1 - value)})

    with serving(answer) as stub:
        question = "questions: [{name: light, ask: 'Is it light?'}]"
        options = f"{{url: '{stub.url}', model: {MODEL}, retries: 0, failures: 0, {question}}}"
        terms = f"rewards={{terms: [{{name: yes_no, options: {options}}}], retries: 0, cache: 0}}"
        same = ("stages.grpo.steps=5", "stages.grpo.objective={name: grpo}", "stages.grpo.schedule=constant")
        folder, rows = ran(variant(terms, *same, f"run_dir={tmp_path / 'returns'}"))
    assert [row["sample/unavailable_share"] for row in rows] == [0, 1, 1, 0, 0]
    assert [row["grad_norm"] > 0 for row in rows] == [True, False, False, True, True]
    assert len(asked) == 5 * a_rollout
    _, columns = read_trajectory(folder.stage("grpo") / "rollouts" / "step-000002.parquet")
    assert all("503" in reason for reason in columns["reward_reason"])


def survivors_advantages(reward_B: np.ndarray, there_B: np.ndarray, group_B: np.ndarray) -> np.ndarray:
    """(r - mean) / std of what is left of each group when the failed members are taken out of it."""
    made_B = np.zeros(len(reward_B))
    for name in set(group_B):
        left = there_B & (group_B == name)
        made_B[left] = (reward_B[left] - reward_B[left].mean()) / reward_B[left].std(ddof=1)
    return made_B
