"""The longest sequence of a stage, and what of it is decided, counted by hand."""

from dataclasses import replace

import pytest

from rlmm.config.masked import NoiseConfig
from rlmm.config.recipe import read_recipe
from rlmm.config.stages import SftStage
from rlmm.planned_data import ASSUMED, Read, Shown
from rlmm.planned_rows import Row, Rows, rows_of
from rlmm.planned_update import update_of
from rlmm.policies.layout_io import Supervised
from rlmm.policies.spelling import Spelling
from rlmm.policies.tokenizer import character_tokenizer
from rlmm.train.sft import SftSource
from rollouts.contract import Grid, Layout
from tests.integration.planned import RECIPES

LAYOUT = Layout(vocab_size=200, text=(0, 100), image=(100, 200), bos=1, pad=0, boi=(4, 5), grid=Grid(2, 2))
SPELLING = Spelling(character_tokenizer(), LAYOUT, positions=64)
THOUGHT = "stages.grpo.sampling={thought: {length_limit: 7, template: 'on {prompt}'}}"
TAKEN = "prompts are taken to be 32 positions"
ANSWER = "stages.grpo.sampling={answer: {length_limit: 7}}"


def longest(read: Read, *overrides: str, stage: str = "sft") -> Rows:
    recipe = read_recipe(RECIPES / "tiny.yaml", list(overrides))
    made = recipe.stages[stage]
    return rows_of(recipe, made, SPELLING, read)  # pyrefly: ignore[bad-argument-type]


def test_what_stands_around_the_longest_counts() -> None:
    read = Read([Shown("a dog"), Shown("a cat in a box"), Shown("fox")])
    assert longest(read) == longest(read, stage="grpo") == Rows(Row(1 + 14 + 2 + 4, 14))


def test_source_images_count_each() -> None:
    assert longest(Read([Shown("a dog", sources=2)])).own == Row(1 + 2 * (2 + 4) + 5 + 2 + 4, 5)


def test_what_is_taught_counts_with_what_ends_it_and_has_no_image_after_it_unless_there_is_one() -> None:
    taught = Read([Shown("a dog", text="a red one", image=False)])
    assert longest(taught).own == Row(1 + 5 + 9 + 1, 5, 10, image=False)
    drawn = Read([Shown("a dog", text="a red one")])
    asked = "stages.sft.writing={template: 'what of {prompt}'}"
    assert longest(drawn, asked).own == Row(1 + 13 + 9 + 1 + 2 + 4, 13, 10)
    assert longest(drawn, stage="grpo").own == Row(1 + 5 + 2 + 4, 5)  # whose texts are right answers


def test_what_is_written_counts_at_its_longest() -> None:
    read = Read([Shown("a dog")])
    assert longest(read, THOUGHT, stage="grpo").own == Row(1 + 8 + 7 + 2 + 4, 8, 7)
    assert longest(read, ANSWER, stage="grpo").own == Row(1 + 5 + 7, 5, 7, image=False)


def test_what_a_run_leaves_out_does_not_count() -> None:
    usable = [Shown("a dog"), Shown("a long prompt in 中文"), Shown("x" * 60)]
    assert longest(Read(usable)).own == Row(12, 5)
    bare = [*usable, Shown("a cat and a dog", image=False)]  # which leads to nothing
    assert longest(Read(bare)).own == Row(12, 5)
    found = longest(Read(usable[1:]))
    assert found == Rows(Row(ASSUMED + 4, ASSUMED), assumed=f"{TAKEN}: the policy can take none of the first ones")


def test_texts_do_not_count_where_none_are_learnt() -> None:
    taught = [Shown("a dog"), Shown("a dog", text="a red one", image=False)]
    mute = replace(SPELLING, layout=replace(LAYOUT, decides_text=False))
    recipe = read_recipe(RECIPES / "tiny.yaml", [])
    assert rows_of(recipe, recipe.stages["sft"], mute, Read(taught)).own == Row(12, 5)  # pyrefly: ignore[bad-argument-type]


def test_what_is_assumed_counts_as_what_it_is() -> None:
    read = Read((), 1, "it is away")
    assert longest(read) == Rows(Row(ASSUMED + 2 * 4, ASSUMED), assumed=f"{TAKEN}: it is away")
    assert longest(read, ANSWER, stage="grpo").own == Row(ASSUMED + 7 + 4, ASSUMED, 7, image=False)


@pytest.mark.parametrize(("length", "drawn", "text"), [(30, 1, 3 * 9 + 5), (10, 4, 4 * 5)])
def test_a_widest_micro_batch_has_the_longer_kind(length: int, drawn: int, text: int) -> None:
    """Of 12 rows of a step 3 are answers, and 4 are read at once."""
    recipe = read_recipe(RECIPES / "tiny_thought.yaml", ["stages.sft.batch_size=12"])
    stage = recipe.stages["sft"]
    assert isinstance(stage, SftStage) and stage.understanding_share == 0.25 and stage.micro_batch_size == 4
    update = update_of(stage, LAYOUT, Rows(Row(20, prompt=5), Row(length, 6, text=9, image=False)), 1)
    assert (update.rows, update.length, update.decided) == (4, max(length, 20), 4)
    assert (update.drawn, update.text) == (drawn, text)


def test_under_complementary_noise_as_many_answers_are_planned_as_are_drawn() -> None:
    recipe = read_recipe(RECIPES / "tiny_thought.yaml", ["stages.sft.batch_size=12"])
    made = recipe.stages["sft"]
    assert isinstance(made, SftStage)
    stage = made.model_copy(update={"noise": NoiseConfig(complementary=True), "text_weight": 0.0})
    source = SftSource(LAYOUT, [Supervised((5,))] * 20, stage, 0, [Supervised((6,))] * 20)
    drawn = sum(number >= 20 for number in source._picked(0))
    assert drawn == stage.rows_beside * stage.rows_each == 4  # pairs of a mask and its complement, 2 of 6
    update = update_of(stage, LAYOUT, Rows(Row(20, 5), Row(30, 6, text=9, image=False)), 1)
    assert (update.rows, update.drawn) == (4, 0)
