"""Rounds of a recipe: written once, read as plain stages."""

from typing import Any

import pytest
import yaml

from rlmm.config.recipe import RecipeError, read_recipe, validate_recipe
from rlmm.config.rounds import with_rounds
from rlmm.config.stages import DpoStage, EvalStage, ExportStage
from rlmm.installation import recipes_dir
from tests.unit.test_recipes import TINY

STAGES: dict[str, Any] = {
    "sft": {"kind": "sft"},
    "rounds": {
        "kind": "rounds",
        "n": 3,
        "stages": {
            "pairs": {"kind": "pairs", "start_from": None},
            "dpo": {"kind": "dpo", "pairs": "pairs", "reference": "sft"},
        },
    },
    "again": {"kind": "sft", "start_from": "dpo"},
    "evaluation": {"kind": "eval", "arms": ["sft", "dpo", "again"], "best_of": {"dpo": 4}},
}


def test_a_round_is_its_stages_under_numbers_and_later_names_mean_the_last_one() -> None:
    found = with_rounds(STAGES)
    assert list(found) == ["sft", "pairs_1", "dpo_1", "pairs_2", "dpo_2", "pairs_3", "dpo_3", "again", "evaluation"]
    assert [found[f"dpo_{i}"]["pairs"] for i in (1, 2, 3)] == ["pairs_1", "pairs_2", "pairs_3"]
    assert all(found[f"dpo_{i}"]["reference"] == "sft" and found[f"pairs_{i}"]["start_from"] is None for i in (1, 2, 3))
    assert found["again"]["start_from"] == "dpo_3"
    assert found["evaluation"]["arms"] == ["sft", "dpo_1", "dpo_2", "dpo_3", "again"]
    assert found["evaluation"]["best_of"] == {"dpo_3": 4}


def test_stages_without_rounds_stay_as_they_are() -> None:
    plain = {name: stage for name, stage in STAGES.items() if name != "rounds"}
    assert with_rounds(plain) == plain


def rounds(**changes: Any) -> dict[str, Any]:
    return {**STAGES, "rounds": {**STAGES["rounds"], **changes}}


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        (rounds(n=0), r"stages\.rounds\.n: .*greater than or equal to 1"),
        (rounds(m=2), r"stages\.rounds: unknown key 'm'"),
        (rounds(stages={}), r"stages\.rounds\.stages: .*at least 1"),
        (rounds(stages={"sft": {"kind": "sft"}}), r"stages\.rounds\.stages\.sft: there is another stage of this name"),
        (rounds(stages={"codec": {"kind": "codec"}}), r"a stage of kind 'codec' is not repeated"),
        (rounds(stages={"inner": STAGES["rounds"]}), r"a stage of kind 'rounds' is not repeated"),
        ({**STAGES, "dpo_2": {"kind": "sft"}}, r"stages\.dpo_2: a round's stage has this name"),
    ],
)
def test_rounds_that_do_not_fit_are_refused_with_their_place(stages: dict[str, Any], message: str) -> None:
    raw = yaml.safe_load(TINY.read_text()) | {"stages": stages}
    with pytest.raises(RecipeError, match=message):
        validate_recipe(raw, "here")


def test_the_shipped_recipe_takes_the_number_of_its_rounds_from_one_setting() -> None:
    recipe = read_recipe(recipes_dir() / "dpo_words.yaml", ["stages.rounds.n=3", "stages.rounds.stages.dpo.steps=7"])
    dpo, evaluation, export = recipe.stages["dpo_3"], recipe.stages["evaluation"], recipe.stages["export"]
    assert isinstance(dpo, DpoStage) and (dpo.steps, dpo.pairs, dpo.reference) == (7, "pairs_3", None)
    assert isinstance(evaluation, EvalStage) and evaluation.arms == ("sft", "dpo_1", "dpo_2", "dpo_3")
    assert isinstance(export, ExportStage) and export.start_from == "dpo_3"
    assert validate_recipe(recipe.model_dump(mode="json"), "config.yaml") == recipe
