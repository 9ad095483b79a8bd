"""Evidence plans: what is a fair comparison, what is chosen, and the intervals over seeds."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from scipy import stats

from rlmm.config.recipe import OWN_POLICY, RecipeError, validate_recipe
from rlmm.config.stages import EvalStage
from rlmm.evidence.plan import AblationPlan, EvidencePlan, read_plan
from rlmm.evidence.recipes import ablation_run, arm_trials, seed_run, start_trials
from rlmm.evidence.results import Chosen, choose, difference, differences, extra_seconds, scores

TINY = Path(__file__).parents[1] / "recipes" / "tiny_evidence.yaml"
ABLATIONS = sorted((Path(__file__).parents[2] / "configs" / "ablations").glob("*.yaml"))
SHIPPED = sorted((Path(__file__).parents[2] / "configs" / "evidence").glob("*.yaml"))


def plan(**changes: Any) -> EvidencePlan:
    return EvidencePlan.model_validate(yaml.safe_load(TINY.read_text()) | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tuning_seed": 2}, "tuning_seed 2 is one of the seeds"),
        ({"seeds": [1, 1]}, "repeat one"),
        ({"validation": {"skip": 3, "prompts": 4}}, "1 prompts are in validation and in test"),
        ({"start": {"stage": {"kind": "sft"}, "trials": [{"steps": 1}]}}, "unequal numbers of trials"),
        ({"arms": {"sft": {"stage": {}, "trials": [{}, {}]}}}, "'sft' is the start's own name"),
        ({"metrics": "exact"}, "unknown key 'metrics'"),
    ],
)
def test_an_unfair_plan_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(**changes)


def test_a_plan_file_that_cannot_be_read_says_why(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no plan at"):
        read_plan(tmp_path / "none.yaml", EvidencePlan)
    (tmp_path / "bad.yaml").write_text(TINY.read_text().replace("seeds: [1, 2]", "seeds: [1]"))
    with pytest.raises(ValueError, match=r"seeds: .*at least 2"):
        read_plan(tmp_path / "bad.yaml", EvidencePlan)


def test_every_trial_of_the_start_begins_with_the_recipes_policy_and_every_arm_with_the_start() -> None:
    first = start_trials(plan(), Path("runs"))
    assert list(first.stages) == ["codec", "sft-0", "sft-1", "evaluation"]
    assert [getattr(first.stages[f"sft-{i}"], "start_from", None) for i in (0, 1)] == [OWN_POLICY] * 2
    assert (first.seed, first.folder) == (0, Path("runs/tune-start"))
    trials = arm_trials(plan(), Path("runs"), start=1)
    names = [f"{arm}-{i}" for arm in ("sft_more", "sft_fresh", "grpo") for i in (0, 1)]
    assert list(trials.stages) == ["codec", "sft", *names, "evaluation"]
    assert all(getattr(trials.stages[name], "start_from", None) == "sft" for name in names)
    assert getattr(trials.stages["sft"], "steps", None) == 2
    assert getattr(trials.stages["grpo-1"], "learning_rate", None) == 1e-2


def test_choices_see_the_validation_prompts_and_results_the_test_prompts() -> None:
    def read(recipe: Any) -> range:
        stage = recipe.stages["evaluation"]
        assert isinstance(stage, EvalStage)
        return range(stage.skip, stage.skip + stage.prompts)

    picked = dict.fromkeys(("sft", "sft_more", "sft_fresh", "grpo"), 1)
    final = [seed_run(plan(), Path("runs"), seed, picked) for seed in (1, 2)]
    assert [recipe.seed for recipe in final] == [1, 2]
    tuning = {*read(start_trials(plan(), Path("runs"))), *read(arm_trials(plan(), Path("runs"), 0))}
    assert not tuning & set(read(final[0])) and read(final[0]) == range(4)
    assert getattr(final[0].stages["grpo"], "learning_rate", None) == 1e-2


def test_the_name_of_the_recipes_policy_is_no_stage_name() -> None:
    raw = start_trials(plan(), Path("runs")).model_dump(mode="json")
    raw["stages"] = {"policy" if name == "sft-0" else name: stage for name, stage in raw["stages"].items()}
    with pytest.raises(RecipeError, match="call the stage otherwise"):
        validate_recipe(raw, "here")


def test_the_best_of_all_trials_and_temperatures_is_chosen() -> None:
    table = {("a-0", 1.0): 0.5, ("a-0", 0.5): 0.7, ("a-1", 1.0): 0.6, ("a-1", 0.5): 0.7, ("b-0", 1.0): 0.9}
    assert choose(table, "a", 2, (1.0, 0.5)) == Chosen(0, 0.5, 0.7)
    assert choose(table, "a", 2, (1.0,)) == Chosen(1, 1.0, 0.6)


def test_the_interval_over_seeds_is_the_paired_t_interval() -> None:
    values = {"base": [0.50, 0.61, 0.55, 0.48, 0.58], "arm": [0.60, 0.66, 0.70, 0.55, 0.59]}
    found = difference("arm", "base", values)
    expected = stats.ttest_rel(values["arm"], values["base"]).confidence_interval(0.95)
    assert (found.low, found.high) == (pytest.approx(expected.low), pytest.approx(expected.high))
    assert found.mean == pytest.approx(0.076)
    pairs = [(one.arm, one.baseline) for one in differences(["x", "y", "z"], {n: [1.0, 2.0] for n in "xyz"})]
    assert pairs == [("z", "x"), ("z", "y"), ("y", "x")]


def test_the_plans_judge_and_metric_are_read_and_a_missing_one_is_named() -> None:
    rows = [
        {"arm": "sft", "temperature": 1.0, "judge": judge, "metric": metric, "mean": mean}
        for judge, metric, mean in (
            ("left_darkness", "value", 0.4),
            ("left_darkness", "exact", 0.1),
            ("d", "value", 0.9),
        )
    ]
    assert scores({"rows": rows}, plan()) == {("sft", 1.0): 0.4}
    with pytest.raises(ValueError, match=r"no evaluation by 'left_darkness' has the metric 'strict'"):
        scores({"rows": rows}, plan(metric="strict"))


def test_compute_is_counted_from_the_start_on() -> None:
    spent = {"compute": [{"arm": "sft", "seconds": 10.0}, {"arm": "grpo", "seconds": 35.5}]}
    assert extra_seconds(spent, "sft") == {"sft": 10.0, "grpo": 25.5}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_the_shipped_plans_make_valid_recipes(path: Path) -> None:
    shipped = read_plan(path, EvidencePlan)
    start_trials(shipped, Path("runs"))
    arm_trials(shipped, Path("runs"), 0)
    for seed in shipped.seeds:
        seed_run(shipped, Path("runs"), seed, dict.fromkeys(shipped.all_arms, 0))
    assert {"sft_more", "sft_fresh", "grpo", "grpo_lora"} <= set(shipped.arms) and len(shipped.seeds) >= 5


ABLATION = {
    "name": "tiny",
    "recipe": "tests/recipes/tiny.yaml",
    "overrides": ["stages.codec.steps=1"],
    "temperatures": [1.0, 0.5],
    "judge": "left_darkness",
    "metric": "value",
    "validation": {"prompts": 4},
    "seed": 0,
    "start": {"kind": "sft", "steps": 1, "batch_size": 8, "micro_batch_size": 8, "learning_rate": 1.0e-3},
    "base": {
        "kind": "grpo", "steps": 2, "prompts_per_step": 2, "samples_per_prompt": 4, "micro_batch_size": 8,
        "learning_rate": 1.0e-3, "held_out_every": 0, "objective": {"name": "grpo", "kl": {"kind": "k2"}},
    },
    "factors": {
        "objective": {"grpo": {}, "dapo": {"objective": {"name": "dapo"}}},
        "KL": {"0": {}, "0.1": {"objective": {"kl": {"coefficient": 0.1}}}},
    },
}  # fmt: skip


def test_a_variant_changes_its_setting_alone_and_the_base_is_trained_once() -> None:
    ablation = AblationPlan.model_validate(ABLATION)
    assert list(ablation.variants) == ["grpo", "objective-dapo", "KL-0_1"]
    assert ablation.variants["KL-0_1"]["objective"] == {"name": "grpo", "kl": {"kind": "k2", "coefficient": 0.1}}
    assert ablation.variants["objective-dapo"]["objective"] == {"name": "dapo", "kl": {"kind": "k2"}}
    assert (ablation.stage("objective", "grpo"), ablation.stage("KL", "0.1")) == ("grpo", "KL-0_1")
    with pytest.raises(ValueError, match=r"factor 'KL' has 1 setting\(s\)"):
        AblationPlan.model_validate(ABLATION | {"factors": {"KL": {"0": {}}}})


@pytest.mark.parametrize("path", ABLATIONS, ids=lambda path: path.stem)
def test_the_shipped_ablations_make_valid_recipes(path: Path) -> None:
    shipped = read_plan(path, AblationPlan)
    recipe = ablation_run(shipped, Path("runs"))
    every = {shipped.stage(factor, label) for factor, settings in shipped.factors.items() for label in settings}
    assert every == set(shipped.variants) <= set(recipe.stages)
    assert all("grpo" in {shipped.stage(f, label) for label in s} for f, s in shipped.factors.items())
