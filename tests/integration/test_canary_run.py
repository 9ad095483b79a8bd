"""The live alarm in a run: a judge that changes under it is logged, reported, and can stop it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from rlmm.config.recipe import Recipe, RecipeError
from rlmm.pipeline import run_folder, run_recipe
from rlmm.train.gates import GateError
from rlmm.train.metrics import MetricsFile

DRIFTS = """
import os
from tests.recipes.rewards import darkness

def drifting(prompts, completions, **columns):
    with open(os.environ["TEST_DRIFT"]) as file:
        moved = float(file.read())
    return [value + moved for value in darkness(prompts, completions)]
"""


@pytest.fixture
def drifting(variant: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Recipe]:
    """A run whose judge adds what a file says; its fingerprint stays what it was."""
    (tmp_path / "drift.py").write_text(DRIFTS)
    (tmp_path / "moved").write_text("0")
    monkeypatch.setenv("TEST_DRIFT", str(tmp_path / "moved"))

    def make(*overrides: str) -> Recipe:
        terms = f"rewards={{terms: [{{function: '{tmp_path}/drift.py:drifting'}}]}}"
        same = ("stages.grpo.objective={name: grpo}", "stages.grpo.checkpoint_every=1", "stages.grpo.canary_every=2")
        return variant(terms, *same, "stages.grpo.canary_prompts=1", *overrides)

    return make


def test_a_drift_is_logged_reported_and_stops_the_run(drifting: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = drifting("stages.grpo.steps=7", "stages.grpo.gates.canary_drift=0.5")
    stage = run_folder(recipe).stage("grpo")
    real = MetricsFile.append

    def watched(self: MetricsFile, step: int, figures: dict[str, float]) -> None:
        real(self, step, figures)
        if self.path.parent == stage and step == 4:  # the judge is looked at in rollouts 0, 2, 4
            (tmp_path / "moved").write_text("0.25")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MetricsFile, "append", watched)
        with pytest.raises(GateError, match=r"have moved by .* of their spread \(limit 0.5\): drifting by up to 0.25"):
            run_recipe(recipe, lambda line: None)
    rows = MetricsFile(stage / "metrics.jsonl").read()
    assert [row.get("canary/drift") for row in rows] == [0, None, 0, None]
    kept = json.loads((stage / "canaries.json").read_text())
    assert len(kept["samples"]) == 4 and set(kept["first"]) == {"drifting", "left_darkness"}

    # With the gate moved the same folder goes on, measures the drift against the first scores, and reports it.
    more = drifting("stages.grpo.steps=7", "stages.grpo.gates.canary_drift=null")
    folder = run_recipe(more, lambda line: None)
    rows = MetricsFile(stage / "metrics.jsonl").read()
    assert [round(row["canary/drifting/change"], 6) for row in rows if "canary/drift" in row] == [0, 0, 0.25, 0.25]
    assert all(row["canary/left_darkness/change"] == 0 for row in rows if "canary/drift" in row)
    page = (folder.path / "report.html").read_text()
    assert "Drift of the judges" in page and "scores of frozen samples moved by up to" in page


def test_a_gate_without_canaries_is_refused(variant: Callable[..., Recipe]) -> None:
    with pytest.raises(RecipeError, match="canary_every: 0 never looks at"):
        variant("stages.grpo.gates.canary_drift=0.5")
