"""The whole pipeline on an accelerator: every part is where the samples are made."""

from pathlib import Path

import pytest
import torch

from rlmm.config.policy import CheckpointPolicy
from rlmm.config.recipe import read_recipe
from rlmm.config.sampling import Sampling
from rlmm.pipeline import run_recipe
from rlmm.sampling import draw_samples
from rlmm.train import experience as phases
from rlmm.train.metrics import MetricsFile
from tests.integration.conftest import TINY
from tests.integration.test_masked_run import TINY as MASKED

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


CONFIDENCE = ["stages.grpo.sampling.unmasking={steps: 3, order: confidence}", "stages.grpo.objective.kl.coefficient=0"]
ESTIMATE = ["stages.grpo.estimator={kind: stratified, draws: 2}", "stages.grpo.objective={name: gspo}"]


@pytest.mark.parametrize(("recipe", "overrides"), [(TINY, []), (MASKED, []), (MASKED, CONFIDENCE), (MASKED, ESTIMATE)])
def test_a_run_samples_trains_and_evaluates_on_the_device(
    recipe: Path, overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices: list[str] = []
    generate = phases.generate

    def watched(engine, span, requests, model):  # noqa: ANN001, ANN202 # pyrefly: ignore
        devices.append(model.device.type)
        return generate(engine, span, requests, model)

    monkeypatch.setattr(phases, "generate", watched)
    folder = run_recipe(read_recipe(recipe, [f"run_dir={tmp_path}", *overrides]), lambda line: None)
    draw_samples(CheckpointPolicy(path=str(tmp_path / "merged")), ["a"], 1, Sampling())
    assert set(devices) == {"cuda"} and len(devices) > 3
    rows = MetricsFile(folder.stage("grpo") / "metrics.jsonl").read()
    assert all(row["mismatch/mean"] < 1e-5 for row in rows if "mismatch/mean" in row)
