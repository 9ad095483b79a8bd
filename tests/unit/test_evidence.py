"""Evidence plans: what is a fair comparison, what is chosen, and the intervals over seeds."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from scipy import stats

from rlmm.config.recipe import OWN_POLICY, RecipeError, validate_recipe
from rlmm.config.stages import EvalStage
from rlmm.evidence import ablation, pages
from rlmm.evidence.plan import AblationPlan, Arm, EvidencePlan, read_plan
from rlmm.evidence.recipes import ablation_run, arm_trials, seed_run, start_trials
from rlmm.evidence.results import Chosen, choose, difference, differences, extra_seconds, result_record, scores
from rlmm.run_folder import RunFolder

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
        ({"test": {"skip": 6, "prompts": 4}}, "2 prompts are in validation and in test"),
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
    (tmp_path / "bad.yaml").write_text("seeds: [1, 2")
    with pytest.raises(ValueError, match=r"bad\.yaml is no YAML"):
        read_plan(tmp_path / "bad.yaml", EvidencePlan)


def test_every_fault_of_a_plan_file_is_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text(TINY.read_text().replace("seed: 0", "seed: x").replace("skip: 4", "skip: -1"))
    with pytest.raises(ValueError, match=r"  validation\.skip: .*\n  tuning_seed: "):
        read_plan(tmp_path / "bad.yaml", EvidencePlan)


def test_a_trials_settings_replace_the_stages() -> None:
    arm = Arm.model_validate({"stage": {"steps": 9, "lora": None}, "trials": [{}, {"steps": 3}]})
    assert arm.settings(0) == {"steps": 9, "lora": None} and arm.settings(1) == {"steps": 3, "lora": None}


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


def test_an_arm_may_be_a_chain_of_stages_each_from_the_one_before() -> None:
    pairs, dpo = {"kind": "pairs"}, {"kind": "dpo", "steps": 1, "learning_rate": 1e-3}
    rounds = {"before": [pairs, dpo, {**pairs, "prompts": 8}], "stage": {**dpo, "reference": "sft"}, "trials": [{}, {}]}
    whole = plan(arms={"rounds": rounds}, best_of=4)
    final = seed_run(whole, Path("runs"), 1, {"sft": 0, "rounds": 1})
    assert list(final.stages) == ["codec", "sft", "rounds_1", "rounds_2", "rounds_3", "rounds", "evaluation"]
    started = {name: getattr(stage, "start_from", None) for name, stage in final.stages.items()}
    assert [started[f"rounds{part}"] for part in ("_1", "_2", "_3", "")] == ["sft", "sft", "rounds_2", "rounds_2"]
    assert [getattr(final.stages[name], "pairs", None) for name in ("rounds_2", "rounds")] == ["rounds_1", "rounds_3"]
    evaluation = final.stages["evaluation"]
    assert isinstance(evaluation, EvalStage) and evaluation.every_arm == ("sft", "sft best of 4", "rounds")
    tuned = arm_trials(whole, Path("runs"), 0)
    assert getattr(tuned.stages["evaluation"], "arms", None) == ("sft", "rounds-0", "rounds-1")
    assert getattr(tuned.stages["rounds-1"], "pairs", None) == "rounds-1_3"


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


def test_two_seeds_have_an_interval_and_one_has_none() -> None:
    two = difference("arm", "base", {"base": [0.5, 0.5], "arm": [0.6, 0.8]})
    assert (two.mean, two.high - two.mean) == (pytest.approx(0.2), pytest.approx(12.7062 * 0.1, rel=1e-5))
    one = difference("arm", "base", {"base": [0.5], "arm": [0.6]})
    assert one.mean == pytest.approx(0.1) and math.isnan(one.low) and math.isnan(one.high)


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


ENVIRONMENT = {"python": "3", "platform": "p", "processor": "c", "packages": {}, "commit": "abc123", "host": "h"}
SEEDS = (
    {"sft": (0.1, 0.4), "sft_more": (0.3, 0.2), "sft_fresh": (0.2, 0.3), "grpo": (0.6, 0.5)},
    {"sft": (0.2, 0.6), "sft_more": (0.4, 0.9), "sft_fresh": (0.1, 0.5), "grpo": (0.9, 0.7)},
)
"""A seed's test values of every arm, at temperatures 1 and 0.5."""
SECONDS = (
    {"sft": 10.0, "sft_more": 15.0, "sft_fresh": 16.0, "grpo": 30.0},
    {"sft": 12.0, "sft_more": 18.0, "sft_fresh": 19.0, "grpo": 42.0},
)


def judged(values: Mapping[str, tuple[float, float]], seconds: Mapping[str, float]) -> dict[str, Any]:
    """The record of an evaluation at temperatures 1 and 0.5."""
    by = {"judge": "left_darkness", "metric": "value"}
    rows = [
        {"arm": arm, "temperature": temperature, "mean": mean} | by
        for arm, (warm, cold) in values.items()
        for temperature, mean in ((1.0, warm), (0.5, cold))
    ]
    return {"rows": rows, "compute": [{"arm": arm, "seconds": spent} for arm, spent in seconds.items()]}


def two_seeds() -> dict[str, Any]:
    """The evidence of the tiny plan, from made-up evaluations."""
    chosen = {
        "sft": Chosen(1, 0.5, 0.55),
        "sft_more": Chosen(0, 1.0, 0.45),
        "sft_fresh": Chosen(0, 0.5, 0.35),
        "grpo": Chosen(1, 1.0, 0.71),
    }
    runs = [judged(values, spent) for values, spent in zip(SEEDS, SECONDS, strict=True)]
    return result_record(plan(), chosen, {("grpo-1", 1.0): 0.71}, runs, ENVIRONMENT)


def test_an_arms_figures_are_those_of_the_temperature_and_trial_that_were_chosen() -> None:
    record = two_seeds()
    assert {arm: one["values"] for arm, one in record["arms"].items()} == {
        "sft": [0.4, 0.6],
        "sft_more": [0.3, 0.4],
        "sft_fresh": [0.3, 0.5],
        "grpo": [0.6, 0.9],
    }
    grpo = record["arms"]["grpo"]
    assert grpo["mean"] == pytest.approx(0.75)
    assert grpo["by_temperature"] == {"1": [0.6, 0.9], "0.5": [0.5, 0.7]}
    assert (grpo["chosen"]["trial"], grpo["chosen"]["settings"]["learning_rate"]) == (1, 1e-2)
    assert record["compute"]["seconds"]["grpo"] == [20.0, 30.0] and record["compute"]["seconds"]["sft"] == [10.0, 12.0]
    assert record["tuning"] == [{"trial": "grpo-1", "temperature": 1.0, "score": 0.71}]
    assert record["commit"] == "abc123" and "host" not in record["environment"]


def test_what_stands_beside_is_of_the_chosen_temperature_and_what_each_seed_understood() -> None:
    runs = [judged(values, spent) for values, spent in zip(SEEDS, SECONDS, strict=True)]
    for seed, run in enumerate(runs):
        run["rows"] += [row | {"metric": "kept", "mean": row["mean"] + 10} for row in run["rows"]]
        run["understanding"] = [{"arm": "grpo", "metric": "exact_match", "mean": 0.25 * (seed + 1)}]
    chosen = {arm: Chosen(0, 0.5 if arm == "sft" else 1.0, 0.5) for arm in plan().all_arms}
    found = result_record(plan(also=["kept"]), chosen, {}, runs, ENVIRONMENT)
    assert found["beside"]["sft"] == {"kept": [10.4, 10.6]}
    assert found["beside"]["grpo"] == {"kept": [10.6, 10.9], "understanding: exact_match": [0.25, 0.5]}
    with pytest.raises(ValueError, match="has the metric 'lost'"):
        result_record(plan(also=["lost"]), chosen, {}, runs, ENVIRONMENT)


def test_the_page_shows_what_stands_beside() -> None:
    told = {arm: {"kept": [0.5, 0.7]} for arm in plan().all_arms}
    page = pages.markdown(two_seeds() | {"beside": told})
    assert "| arm | kept |" in page and "| grpo | 0.600 (0.500 to 0.700) |" in page
    assert "Beside it" not in pages.markdown(two_seeds())


def test_the_page_has_the_records_figures() -> None:
    page = pages.markdown(two_seeds()).splitlines()
    assert page[0] == "# tiny: left_darkness value on 4 test prompts"
    assert "| arm | seed 1 | seed 2 | mean | seconds beyond the start |" in page
    assert "| sft | 0.400 | 0.600 | 0.500 | 11 |" in page and "| grpo | 0.600 | 0.900 | 0.750 | 25 |" in page
    # Gaps 0.2 and 0.3, so 0.25 and a standard error of 0.05; t of one degree of freedom is 12.706.
    assert "| grpo - sft | +0.250 | [-0.385, +0.885] |" in page
    assert "| sft_more - sft | -0.150 | [-0.785, +0.485] |" in page
    # sft was scored at 0.5, grpo at 1: the gaps at 1 are 0.5 and 0.7.
    assert "| difference | both at 1 | both at 0.5 |" in page
    assert "| grpo - sft | +0.600 [-0.671, +1.871] | +0.100 [+0.100, +0.100] |" in page
    assert not any(line.startswith("| grpo - sft_more |") and line.count("[") == 2 for line in page), (
        "both at 1 already"
    )
    assert "- sft: steps 2, temperature 0.5 (validation 0.550)" in page
    assert "- grpo: learning_rate 0.01, temperature 1 (validation 0.710)" in page
    prompts = plan(test={"skip": 8, "prompts": 3}).model_dump(mode="json")
    assert "on 3 test prompts" in pages.markdown(two_seeds() | {"settings": prompts})


def across_and_up(line: Line2D) -> tuple[list[float], list[float]]:
    """The points of a drawn line, as x and y."""
    return np.asarray(line.get_xdata()).tolist(), np.asarray(line.get_ydata()).tolist()


def drawn_by(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Figures that are saved from now on, unsaved."""
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    return figures


def test_the_plot_has_every_seed_each_mean_and_the_means_by_temperature(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = drawn_by(monkeypatch)
    pages.write_pages(two_seeds(), tmp_path)
    values, temperatures = figures[0].axes
    assert [label.get_text() for label in values.get_xticklabels()] == ["sft", "sft_more", "sft_fresh", "grpo"]
    seeds, mean = values.lines[-2:]
    assert across_and_up(seeds) == ([3, 3], [0.6, 0.9])
    assert across_and_up(mean)[1] == pytest.approx([0.75, 0.75])
    last = temperatures.lines[-1]
    assert (last.get_label(), across_and_up(last)[0]) == ("grpo", [0.5, 1.0])
    assert across_and_up(last)[1] == pytest.approx([0.6, 0.75])


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_the_shipped_plans_make_valid_recipes(path: Path) -> None:
    shipped = read_plan(path, EvidencePlan)
    start_trials(shipped, Path("runs"))
    arm_trials(shipped, Path("runs"), 0)
    for seed in shipped.seeds:
        seed_run(shipped, Path("runs"), seed, dict.fromkeys(shipped.all_arms, 0))
    assert {"sft_more"} < set(shipped.arms) and len(shipped.seeds) >= 3


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


ABLATED = {"sft": (0.30, 0.35), "grpo": (0.50, 0.45), "objective-dapo": (0.40, 0.60), "KL-0_1": (0.20, 0.10)}
TOOK = {"sft": 100.0, "grpo": 130.0, "objective-dapo": 145.0, "KL-0_1": 160.0}
REWARDS = {"grpo": 0.1, "objective-dapo": 0.05, "KL-0_1": 0.01}
"""What the reward of a stage rises by in every rollout, from 0 on."""


@pytest.fixture
def ablated(tmp_path: Path) -> dict[str, Any]:
    """The record of an ablation of 12 rollouts a setting, every other step an update without a rollout."""
    run = RunFolder(tmp_path, (*ABLATED, "evaluation"))
    for name in run.stages:
        run.stage(name).mkdir(parents=True)
    for name, rise in REWARDS.items():
        rows = [{"step": i, "reward/mean": None if i % 2 else rise * i / 2, "reward/std": 9.0} for i in range(24)]
        (run.stage(name) / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run.stage("evaluation") / "eval.json").write_text(json.dumps(judged(ABLATED, TOOK)))
    return ablation.ablation_record(AblationPlan.model_validate(ABLATION), run, ENVIRONMENT)


def test_a_settings_figures_are_those_of_its_own_stage(ablated: dict[str, Any]) -> None:
    start, base, dapo = ablated["start"], ablated["factors"]["KL"]["0"], ablated["factors"]["objective"]["dapo"]
    assert (start["by_temperature"], start["best"]) == ({"1": 0.3, "0.5": 0.35}, 0.35)
    assert (start["seconds"], start["reward"]) == (100.0, [])
    assert (base["by_temperature"], base["best"], base["seconds"]) == ({"1": 0.5, "0.5": 0.45}, 0.5, 30.0)
    assert (dapo["by_temperature"], dapo["best"], dapo["seconds"]) == ({"1": 0.4, "0.5": 0.6}, 0.6, 45.0)
    assert dapo["reward"] == pytest.approx([0.05 * i for i in range(12)])
    assert ablated["factors"]["KL"]["0.1"]["best"] == 0.2 and ablated["commit"] == "abc123"


def test_the_ablations_table_has_the_base_in_bold_and_the_mean_of_the_last_rewards(ablated: dict[str, Any]) -> None:
    page = ablation.markdown(ablated)
    assert "4 validation prompts" in page and "the start (SFT) has 0.350." in page
    # The last ten of 0, 1, ... 11 have the mean 6.5.
    assert "| objective | **grpo** | 0.500 | 0.650 | 30 |\n| objective | dapo | 0.600 | 0.325 | 45 |" in page
    assert "| KL | **0** | 0.500 | 0.650 | 30 |\n| KL | 0.1 | 0.200 | 0.065 | 60 |" in page


def test_every_factor_has_a_plot_of_smoothed_rewards(
    ablated: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = drawn_by(monkeypatch)
    ablation.draw(ablated, tmp_path / "tiny.png")
    assert [axis.get_title() for axis in figures[0].axes if axis.get_visible()] == ["objective", "KL"]
    base, dapo = figures[0].axes[0].lines
    assert [base.get_label(), dapo.get_label()] == ["grpo: 0.500", "dapo: 0.600"]
    assert across_and_up(base)[0] == list(range(1, 13))
    # Means of 0 to 0, 0 to 1, ... 0 to 9, then of the last ten.
    assert across_and_up(base)[1] == pytest.approx([0.05 * i for i in range(10)] + [0.55, 0.65])


def test_a_smoothed_value_is_the_mean_of_it_and_those_before_it() -> None:
    assert ablation.smooth([1.0, 2.0, 6.0, 4.0], 2) == [1.0, 1.5, 4.0, 5.0]
    assert ablation.smooth([1.0, 2.0, 6.0], 9) == [1.0, 1.5, 3.0]
