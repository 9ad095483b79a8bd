"""Recipes: every shipped one is valid, and what is wrong in one is named with its place and its nearest neighbour."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rlmm import allocator
from rlmm.batch import batch_equations
from rlmm.cli import app
from rlmm.config.recipe import RecipeError, read_recipe, validate_recipe
from rlmm.installation import recipes_dir
from rlmm.memory import memory_plans, plan_lines
from rlmm.plan_table import plan_table

TINY = Path(__file__).parents[1] / "recipes" / "tiny.yaml"


@pytest.mark.parametrize("path", sorted(recipes_dir().glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_recipe_is_valid(path: Path) -> None:
    recipe = read_recipe(path)
    assert recipe.name == path.stem and recipe.description
    assert batch_equations(recipe)
    assert "make " in path.read_text() or f"rlmm run configs/{path.name}" in path.read_text()


def test_a_stage_that_is_done_is_not_shared_out_again() -> None:
    """A start may have been trained by fewer processes than what follows it."""
    recipe = read_recipe(TINY, ["stages.grpo.prompts_per_step=4"])
    with pytest.raises(ValueError, match="8 rows an update are no multiple of micro_batch_size 4 x 4"):
        batch_equations(recipe, 4)
    (line,) = batch_equations(recipe, 4, done=["codec", "sft"])
    assert line.startswith("grpo: ") and "4 process(es) x 1 micro-batch(es)" in line


@pytest.mark.parametrize("path", [TINY, *sorted(recipes_dir().glob("*.yaml"))], ids=lambda path: path.stem)
@pytest.mark.parametrize("data", ["", "data={kind: rows, path: a.jsonl}", "data={kind: rows, path: a/b, format: hub}"])
def test_a_run_s_own_config_reads_back_as_the_same_recipe(path: Path, data: str) -> None:
    recipe = read_recipe(path, [data] if data else [])
    assert validate_recipe(recipe.model_dump(mode="json"), "config.yaml") == recipe


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.grpo.learning_rat=1", r"stages\.grpo.*learning_rat.*Nearest: learning_rate"),
        ("sed=1", r"unknown key 'sed'\. Nearest: seed"),
        ("stages.grpo.objective.name=grop", r"unknown objective 'grop'\. Nearest: grpo"),
        ("stages.grpo.micro_batch_size=3", r"not a multiple of micro_batch_size = 3.*\[1, 2, 4\]"),
        ("stages.grpo.start_from=sftt", r"refers to 'sftt'.*Nearest: sft"),
        ("stages.grpo.sampling.temperature=0", r"temperature.*greater than 0"),
        ("stages.sft.image_weight=0 stages.sft.text_weight=0", "nothing would be trained"),
        ("data.kind=word", "words"),
        ("policy.hidden_size=abc", r"policy.*hidden_size.*given: 'abc'"),
        ("stages.evaluation.arms=[grpo, dpo]", r"refers to 'dpo'"),
        ("nonsense", "has no '='"),
        ("stages.grpo.sampling.guidance=none stages.grpo.sampling.guidance_scale=3", "guidance mode 'none'"),
        ("policy.num_heads=3", "not a multiple of num_heads"),
        ("stages.evaluation.temperatures=[]", "temperatures"),
        ("held_out.terms.0.label=darkness", "is in rewards and in held_out"),
        ("held_out.terms.0.transform=rank", "held_out has transform: rank, so its mean"),
        ("rewards.normalise=terms", "stage 'grpo' would do it with their sum again; set objective.advantage.scale"),
        ("stages.grpo.objective.updates_per_rollout=3", "samples_per_prompt = 4 is not a multiple"),
        ("stages.sft.schedule=constant stages.sft.warmup_steps=3", "constant_with_warmup"),
    ],
)
def test_what_is_wrong_is_named(override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        read_recipe(TINY, re.split(r" (?=stages)", override))


def test_a_missing_recipe_names_the_nearest() -> None:
    with pytest.raises(RecipeError, match="quickstart"):
        read_recipe(Path("quikstart"))
    assert read_recipe(Path("quickstart")).name == "quickstart"


def test_overrides_reach_the_recipe() -> None:
    recipe = read_recipe(TINY, ["stages.grpo.lora.rank=7", "name=other", "stages.sft.betas=[0.8, 0.9]"])
    assert recipe.stages["grpo"].lora.rank == 7  # pyrefly: ignore
    assert str(recipe.folder) == "runs/other"


def test_check_prints_the_config_the_batch_equation_and_a_memory_plan() -> None:
    answer = CliRunner().invoke(app, ["check", str(TINY), "stages.grpo.steps=8"])
    assert answer.exit_code == 0, answer.output
    assert "2 prompts x 4 samples = 8 rollouts" in answer.output
    assert "2 update(s) a rollout, each 1 process(es) x 2 micro-batch(es) x 2 rows" in answer.output
    assert "Memory plan" in answer.output and "run_dir" in answer.output


@pytest.mark.parametrize("holes", [[], ["glibc 2.36 may hold twice that"]])
def test_a_plan_is_followed_by_what_the_allocator_may_hold(holes: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocator, "prepare", lambda gpu: holes)
    answer = CliRunner().invoke(app, ["check", str(TINY)])
    assert answer.exit_code == 0 and "Memory plan" in answer.output
    assert ("may hold twice that" in answer.output) == bool(holes)


def test_a_run_says_its_plan() -> None:
    recipe = read_recipe(TINY, [])
    assert [line.split(":")[0] for line in plan_lines(recipe)] == [plan.stage for plan in memory_plans(recipe)]


def test_the_rows_of_a_plan_are_those_a_machine_has(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = memory_plans(read_recipe(TINY, []))[0]
    assert [*plan_table([plan], 1).columns[0].cells][-2:] == ["libraries", "total"]
    scores = replace(plan, rewards=1)
    assert [*plan_table([plan, scores], 1).columns[0].cells][-3:] == ["rewards", "libraries", "total"]
    bare = replace(plan, libraries=0, offloaded=1)
    assert [*plan_table([plan, bare], 1).columns[0].cells][-3:] == ["libraries", "total", "offloaded"]
    assert [*plan_table([bare], 2).columns[0].cells][-3:] == ["pictures", "total", "offloaded"]


def test_a_codecs_batch_that_processes_cannot_share_is_refused_before_anything_runs() -> None:
    recipe = read_recipe(TINY, ["stages.codec.batch_size=16"])
    assert batch_equations(recipe, 2)[0] == "codec: 2 process(es) x 8 images a step; 4 steps"
    with pytest.raises(ValueError, match="a codec's batch_size 16 is no multiple of 3 processes"):
        batch_equations(recipe, 3)


def test_reward_list_names_the_built_in_rewards() -> None:
    answer = CliRunner().invoke(app, ["reward", "list"])
    assert {"ocr", "scenes", "tesseract"} <= set(answer.output.split())
