"""What a memory plan takes rewards to hold: those that run in the training process, in the memory that is planned."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPModel

from rewards import REWARDS
from rlmm.config.recipe import Recipe, read_recipe
from rlmm.memory import memory_plans
from rlmm.planned_rewards import ENGINES, RewardPlan, reward_plan
from tests.integration.planned import RECIPES

OWN = '{function: "tests/recipes/rewards.py:darkness"}'
FIRST, MORE = ENGINES["tesseract"]


def recipe(terms: str, held_out: str = "") -> Recipe:
    judges = held_out or '{function: "tests/recipes/rewards.py:left_darkness"}'
    given = [f"rewards={{terms: [{terms}]}}", f"held_out={{terms: [{judges}]}}"]
    return read_recipe(RECIPES / "tiny.yaml", given)


@pytest.fixture(autouse=True)
def cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In two files, as large models are published."""
    folder = tmp_path_factory.mktemp("clip")
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(text_config=small | {"vocab_size": 50}, vision_config=small | {"image_size": 32})
    CLIPModel(config).save_pretrained(folder, max_shard_size="50KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


def numbers(folder: Path) -> int:
    return sum(weight.numel() for weight in CLIPModel.from_pretrained(folder).parameters())


def test_engines_count_once_and_their_copies_less() -> None:
    assert reward_plan(recipe(OWN)) == RewardPlan()
    assert reward_plan(recipe(OWN, "{name: tesseract}")).held == FIRST
    two = "{name: tesseract}, {name: tesseract, label: words, options: {level: words}}"
    assert reward_plan(recipe(two, "{name: ocr}")).held == FIRST + MORE + ENGINES["ocr"][0]
    assert set(ENGINES) <= set(REWARDS)


def test_what_is_served_is_elsewhere() -> None:
    assert reward_plan(recipe("{name: tesseract, serve: {}}")) == RewardPlan()


@pytest.mark.parametrize(("precision", "width"), [("float32", 4), ("bfloat16", 2)])
def test_a_model_counts_by_its_weights(precision: str, width: int, clip: Path) -> None:
    term = f"{{name: clip_score, options: {{model: {clip}, precision: {precision}}}}}"
    assert reward_plan(recipe(term)).held == numbers(clip) * width


def test_a_gpu_holds_what_is_on_it(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    here = f"{{name: clip_score, options: {{model: {clip}}}}}, {{name: tesseract}}"
    assert reward_plan(recipe(here)) == RewardPlan()
    there = f"{{name: clip_score, options: {{model: {clip}, device: 'cuda:0'}}}}"
    assert reward_plan(recipe(there)).held == numbers(clip) * 4


def test_a_detector_and_who_names_its_colours_count(clip: Path) -> None:
    term = f"{{name: objects, options: {{detector: owl, model: {clip}, colours: {clip}}}}}"
    assert reward_plan(recipe(term)).held == 2 * numbers(clip) * 4
    (named,) = reward_plan(recipe("{name: objects, options: {detector: owl}}")).uncounted
    assert "google/owlv2-base-patch16-ensemble" in named
    assert reward_plan(recipe("{name: objects, options: {detector: scenes}}")) == RewardPlan()


@pytest.mark.parametrize("given", ["fp16", "null"])
def test_a_precision_that_there_is_not_is_named(given: str) -> None:
    with pytest.raises(ValueError, match="reward clip_score: precision '.*' is none of float32, bfloat16, float16"):
        reward_plan(recipe(f"{{name: clip_score, options: {{precision: {given}}}}}"))


@pytest.mark.parametrize("broken", ["no folder", "a torn file", "a lost file"])
def test_a_model_that_is_not_here_is_said(broken: str, clip: Path, tmp_path: Path) -> None:
    if broken != "no folder":
        save_file({"a": torch.zeros(3)}, tmp_path / "model.safetensors")
    if broken == "a torn file":
        (tmp_path / "model.safetensors").write_bytes(b"torn")
    if broken == "a lost file":
        (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "other.safetensors"}}')
    source = "openai/none-such" if broken == "no folder" else tmp_path
    plan = reward_plan(recipe(f"{{name: clip_score, label: fits, options: {{model: {source}}}}}"))
    assert plan.held == 0
    assert plan.uncounted == (f"the model of reward fits ({source}) is not counted: it is not here, or not readable",)


def test_only_what_scores_holds_them() -> None:
    plans = {one.stage: one for one in memory_plans(recipe(OWN, "{name: tesseract}"))}
    assert (plans["sft"].rewards, plans["grpo"].rewards) == (0, FIRST)
    without = {one.stage: one for one in memory_plans(recipe(OWN))}
    assert plans["grpo"].total - without["grpo"].total == FIRST
