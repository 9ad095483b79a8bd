"""Prompts that cannot be used are left out and counted before a stage starts: unspellable, too long, trained on."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image

from rlmm.config.data import Data, RowsData, ScenesData, Split, WordsData
from rlmm.config.policy import NewPolicy
from rlmm.config.recipe import read_recipe
from rlmm.data import build_dataset, scenes, words
from rlmm.data.base import Outline
from rlmm.data.images import ImageReader
from rlmm.data.rows import is_held_out
from rlmm.data.words import render
from rlmm.pipeline import run_recipe
from rlmm.policies.families import llama
from rlmm.policies.spelling import TOO_LONG, UNKNOWN, UnusablePrompt
from rlmm.policies.transformer import TransformerPolicy
from rlmm.run_folder import RunFolder
from rlmm.train.prompts import usable_rows
from tests.integration.conftest import TINY

datasets.disable_progress_bars()

GRID = (2, 6)
POSITIONS = 64
WORDS = [f"word {i}" for i in range(12)]
LONGEST = POSITIONS - GRID[0] * GRID[1] - 2  # beside bos, begin-of-image and the image


def policy(**changes: Any) -> TransformerPolicy:
    sizes = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "intermediate_size": 16, "max_positions": POSITIONS}
    return llama.build(NewPolicy.model_validate(sizes | changes), num_codes=64, grid=GRID, seed=0)


def rows(path: Path, prompts: list[Any], *, image: bool = False) -> str:
    render("CAT").save(path.parent / "cat.png")
    picture = {"image": "cat.png"} if image else {}
    path.write_text("".join(json.dumps({"prompt": prompt} | picture) + "\n" for prompt in prompts))
    return str(path)


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., RowsData]:
    def make(prompts: list[Any], **settings: Any) -> RowsData:
        own: dict[str, Any] = {"cache_dir": str(tmp_path / "cache"), "held_out_share": 0.0} | settings
        return RowsData(path=rows(tmp_path / "rows.jsonl", prompts), **own)

    return make


def test_a_prompt_that_cannot_be_spelled_is_named_with_its_reason() -> None:
    with pytest.raises(UnusablePrompt, match="'a café' has characters .* rewrite it, or use a checkpoint") as caught:
        policy().encode_prompt("a café")
    assert caught.value.reason == UNKNOWN


@pytest.mark.parametrize("sources", [0, 1, 2])
def test_the_longest_prompt_that_fits_leaves_room_for_its_images(sources: int) -> None:
    spelling, longest = policy().spelling, LONGEST - sources * (1 + GRID[0] * GRID[1])
    assert spelling.fault("x" * longest, sources) is None
    fault = spelling.fault("x" * (longest + 1), sources)
    assert fault is not None and fault.reason == TOO_LONG
    assert f"makes {POSITIONS + 1} tokens" in str(fault) and "policy.max_positions" in str(fault)


def test_such_rows_are_left_out_in_place_and_counted(config: Callable[..., RowsData]) -> None:
    prompts = ["one", "café", "two", "", "x" * LONGEST, "x" * (LONGEST + 1), "naïve", "three"]
    settings = config(prompts, max_excluded_share=0.5)
    data = build_dataset(settings, "train", 0)
    kept = usable_rows(data, [policy().spelling], settings)
    assert [item.prompt for item in kept] == ["one", "two", "x" * LONGEST, "three"]
    assert [kept.outline(i).prompt for i in range(-1, 3)] == ["three", "one", "two", "x" * LONGEST]
    assert kept.excluded == {"empty prompt": 1, UNKNOWN: 2, TOO_LONG: 1}
    assert data.excluded == {"empty prompt": 1} and kept.rows_read == len(prompts)
    with pytest.raises(IndexError):
        kept[4]


def test_a_row_goes_where_any_of_several_policies_cannot_take_it(config: Callable[..., RowsData]) -> None:
    settings = config(["one", "x" * 30, "é"], max_excluded_share=0.7)
    short, long = policy(max_positions=40).spelling, policy().spelling
    kept = usable_rows(build_dataset(settings, "train", 0), [long, short], settings)
    assert [item.prompt for item in kept] == ["one"] and kept.excluded == {UNKNOWN: 1, TOO_LONG: 1}


def test_past_the_ceiling_the_first_such_prompt_is_named(config: Callable[..., RowsData]) -> None:
    settings = config(["one", "", "café", "naïve", "two"], max_excluded_share=0.5)
    data = build_dataset(settings, "train", 0)
    expected = r"3 of 5 .*1 empty prompt.*first .*'café' .*rewrite it.* data.max_excluded_share 0.5: mend .* or raise"
    with pytest.raises(ValueError, match=expected):
        usable_rows(data, [policy().spelling], settings)
    raised = settings.model_copy(update={"max_excluded_share": 0.6})
    assert len(usable_rows(data, [policy().spelling], raised)) == 2


def test_generated_data_have_a_ceiling_too() -> None:
    settings = WordsData(train_images=40)
    with pytest.raises(ValueError, match=r"of 40 rows excluded .*a share of 0.05: mend the rows$"):
        usable_rows(build_dataset(settings, "train", 0), [policy(max_positions=26).spelling], settings)


def test_no_row_left_is_an_error_whatever_the_ceiling(config: Callable[..., RowsData]) -> None:
    settings = config(["é", "è"], max_excluded_share=1.0)
    with pytest.raises(ValueError, match=r"'é' .* No row is left: mend the rows$"):
        usable_rows(build_dataset(settings, "train", 0), [policy().spelling], settings)


def test_one_odd_prompt_does_not_condemn_a_small_held_out_side(config: Callable[..., RowsData]) -> None:
    """Its side may be smaller than 1 / share; the ceiling is of the rows read, as for every other reason."""
    odd = next(prompt for i in range(999) if is_held_out(prompt := f"café {i}", 0.1))
    settings = config([*(f"prompt {i}" for i in range(99)), odd], held_out_share=0.1)
    held_out = build_dataset(settings, "held_out", 0)
    assert 1 > 0.05 * len(held_out)
    assert len(usable_rows(held_out, [policy().spelling], settings)) == len(held_out) - 1


@pytest.mark.parametrize("settings", [WordsData(train_images=30), ScenesData(train_images=30)])
@pytest.mark.parametrize("split", ["train", "prompts", "held_out"])
def test_data_without_such_prompts_are_handed_on_as_they_are(settings: Data, split: Split) -> None:
    data = build_dataset(settings, split, 3)
    assert usable_rows(data, [policy(max_positions=128).spelling], settings) is data


@pytest.mark.parametrize(
    "settings",
    [
        WordsData(train_images=30),
        WordsData(train_images=30, font_in_prompt=True),
        ScenesData(train_images=30),
        ScenesData(train_images=30, variant="edit"),
    ],
)
def test_an_outline_is_what_the_row_says_without_its_images(settings: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    data = build_dataset(settings, "train", 3)
    expected = [Outline(item.prompt, len(item.sources)) for item in data]
    for module in (words, scenes):
        monkeypatch.setattr(module, "render", None)
    assert [data.outline(i) for i in range(len(data))] == expected
    with pytest.raises(IndexError):
        data.outline(len(data))


def test_an_outline_of_own_rows_decodes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("L", (4, 4)).save(tmp_path / "a.png")
    given = [{"prompt": "none", "from": []}, {"prompt": ""}, {"prompt": "two", "from": ["a.png", "a.png"]}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in given))
    settings = RowsData(
        path=str(tmp_path / "rows.jsonl"),
        sources_column="from",
        max_excluded_share=0.5,
        held_out_share=0,
        cache_dir=str(tmp_path / "cache"),
    )
    data = build_dataset(settings, "train", 0)
    monkeypatch.setattr(ImageReader, "read", None)
    assert [data.outline(i) for i in range(2)] == [Outline("none", 0), Outline("two", 2)]


@pytest.mark.parametrize("streaming", [False, True])
def test_held_out_prompts_that_are_trained_on_are_left_out(
    config: Callable[..., RowsData], tmp_path: Path, streaming: bool
) -> None:
    message = [{"role": "user", "content": "told "}]
    other = rows(tmp_path / "other.jsonl", ["new", " seen\n", "Seen", "told", "also new"])
    own = {"held_out_path": other, "max_excluded_share": 0.4, "streaming": streaming, "limit": 9}
    settings = config(["seen", "unread"], **own)
    held_out = build_dataset(settings, "held_out", 0)
    assert [item.prompt for item in held_out] == ["new", "Seen", "told", "also new"]
    assert held_out.excluded == {"prompt also in training": 1} and not build_dataset(settings, "train", 0).excluded
    settings = config([message, [{"role": "assistant", "content": "?"}]], **own)
    assert [item.prompt for item in build_dataset(settings, "held_out", 0)] == ["new", " seen\n", "Seen", "also new"]


def test_too_many_of_them_are_an_error_that_names_one(config: Callable[..., RowsData], tmp_path: Path) -> None:
    other = rows(tmp_path / "other.jsonl", [""] * 5 + ["new", "seen", "new too", "newer"])
    settings = config(["seen", "other"], held_out_path=other, max_excluded_share=0.6)
    with pytest.raises(ValueError, match=r"row 6: prompt also in training: 'seen'.*take such prompts out of the held-"):
        build_dataset(settings, "held_out", 0)
    same = config(["seen", "other"], held_out_path=settings.path, max_excluded_share=1.0)
    with pytest.raises(ValueError, match=r"no rows for the held_out split \(2 of 2 excluded: prompt also in training"):
        build_dataset(same, "held_out", 0)


def run(tmp_path: Path, prompts: list[str], held_out: list[str], ceiling: float) -> tuple[RunFolder, list[str]]:
    """The tiny recipe on own rows, without its export."""
    source = rows(tmp_path / "train.jsonl", prompts, image=True)
    data = f"kind: rows, path: {source}, target_column: image, image_size: [96, 32], image_mode: L"
    own = rows(tmp_path / "held_out.jsonl", held_out, image=True)
    ends = f"held_out_path: {own}, max_excluded_share: {ceiling}, cache_dir: {tmp_path / 'cache'}"
    recipe = read_recipe(TINY, [f"run_dir={tmp_path / 'run'}", f"data={{{data}, {ends}}}"])
    stages = {name: stage for name, stage in recipe.stages.items() if name != "export"}
    said: list[str] = []
    return run_recipe(recipe.model_copy(update={"stages": stages}), said.append), said


def test_a_run_goes_on_without_the_odd_prompts(tmp_path: Path) -> None:
    """Every stage passes over all of its rows at least once: an odd one that stayed would stop it."""
    held_out = ["naïve", "red", *WORDS]
    folder, said = run(tmp_path, ["red", "café", "blue", "x" * 60, "green", "grey"], held_out, 0.4)
    assert all(folder.done(name) for name in ("sft", "grpo", "evaluation"))
    left_out = [line for line in said if "excluded" in line]
    counts = f"4 rows, 2 excluded (1 {UNKNOWN}, 1 {TOO_LONG})"
    assert f"train data: {counts}" in left_out and f"prompts data: {counts}" in left_out
    assert f"held_out data: 12 rows, 2 excluded (1 prompt also in training, 1 {UNKNOWN})" in left_out
    assert Counter(line.split()[0] for line in left_out) == {"train": 1, "prompts": 1, "held_out": 2}


def test_a_run_on_mostly_odd_prompts_stops_before_its_first_step(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"2 of 6 rows excluded .*'café' .*data.max_excluded_share 0.3: mend"):
        run(tmp_path, ["red", "café", "blue", "x" * 60, "green", "grey"], WORDS, 0.3)
    assert not (tmp_path / "run" / "stages" / "02-sft" / "metrics.jsonl").exists()
