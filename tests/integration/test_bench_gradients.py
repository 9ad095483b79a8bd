"""`rlmm bench gradients` from the start of a tiny run: every estimate on the same rollouts, and what it refuses."""

import json
from pathlib import Path

import pytest
import yaml

from rlmm.bench.gradients import GradientPlan, bench_gradients
from rlmm.config.recipe import read_recipe
from rlmm.pipeline import run_recipe

TINY = Path(__file__).parents[1] / "recipes" / "tiny_masked.yaml"
PLAN = GradientPlan(sets=1, plans=2, forwards=2, bound_plans=2, others=2, threads=1)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A codec and an SFT, and GRPO stages that nobody has run."""
    folder = tmp_path_factory.mktemp("gradients") / "run"
    recipe = read_recipe(TINY, [f"run_dir={folder}"])
    first = {name: recipe.stages[name] for name in ("codec", "sft")}
    run_recipe(recipe.model_copy(update={"stages": first}), lambda _: None)
    kept = recipe.model_dump(mode="json")
    kept["stages"] = {name: kept["stages"][name] for name in ("codec", "sft", "grpo")}
    grpo = kept["stages"]["grpo"] | {"lora": None}
    surest = grpo | {"sampling": grpo["sampling"] | {"unmasking": {"steps": 3, "order": "confidence"}}}
    surest["objective"] = grpo["objective"] | {"kl": {"coefficient": 0}}
    kept["stages"] |= {"grpo": grpo | {"start_from": "sft"}, "surest": surest | {"start_from": "sft"}}
    kept["stages"]["cut"] = {**kept["stages"]["grpo"], "sampling": grpo["sampling"] | {"top_k": 3}}
    kept["stages"]["after"] = grpo | {"start_from": "grpo"}
    (folder / "config.yaml").write_text(yaml.safe_dump(kept, sort_keys=False))
    return folder


def test_every_estimate_is_measured_on_the_same_rollouts_and_written(run: Path, tmp_path: Path) -> None:
    bench_gradients([run], ["grpo", "surest"], PLAN, tmp_path / "gradients.json", tmp_path / "gradients.png")
    rows = json.loads((tmp_path / "gradients.json").read_text())["rows"]
    by_stage = {stage: {row["estimator"]: row for row in rows if row["stage"] == stage} for stage in ("grpo", "surest")}
    assert set(by_stage["surest"]) - set(by_stage["grpo"]) == {
        "trajectory, all steps, tokens alone",
        "trajectory, some steps, tokens alone",
    }
    for found in by_stage.values():
        whole = found["trajectory, all steps"]
        assert whole["trajectory"] == pytest.approx(1, abs=1e-6) and whole["variance"] == 0
        assert whole["forwards"] == 3 and found["count"]["forwards"] == 2 and found["mean field"]["variance"] == 0
        assert all(row["seconds"] > 0 for row in found.values())
    tokens = by_stage["surest"]["trajectory, all steps, tokens alone"]
    assert tokens["kind"] == "surrogate" and tokens["trajectory"] < 0.9999
    assert (tmp_path / "gradients.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ("gro", "has no GRPO stage 'gro'. Nearest: grpo"),
        ("cut", "supports are stored where a token was decided alone"),
        ("after", "stage 'grpo', from which 'after' starts, is not done"),
    ],
)
def test_what_cannot_be_compared_is_refused(run: Path, stage: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bench_gradients([run], [stage], PLAN, None, None)


def test_a_plan_needs_two_draws_to_take_noise_out() -> None:
    with pytest.raises(ValueError, match="2 plans"):
        GradientPlan(sets=1, plans=1, forwards=2, bound_plans=2, others=2, threads=1)
