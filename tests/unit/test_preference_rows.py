"""Rows of preferences as they are found, and what is wrong with some of them."""

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlmm.codecs import codec_hash
from rlmm.config.policy import NewPolicy
from rlmm.config.preference import PreferenceData
from rlmm.config.recipe import read_recipe
from rlmm.config.sampling import Writing
from rlmm.data.loading import load_raw
from rlmm.data.preferences import IDENTICAL, NO_MARGIN, UNLIKE
from rlmm.pipeline import run_recipe
from rlmm.policies.families.llama import build
from rlmm.policies.spelling import Spelling
from rlmm.train.preference_rows import (
    FOREIGN,
    SHORT,
    UNSPELLED,
    UNWRITTEN,
    Read,
    Speller,
    apart,
    check_data,
    read_preferences,
)
from rlmm.train.tokens import ImageTokens
from tests.unit.test_supervised import make_codec, make_policy, picture

CODEC, POLICY = make_codec(), make_policy()
RECIPE = Path(__file__).parents[1] / "recipes" / "tiny_dpo.yaml"


def png(value: int) -> dict[str, Any]:
    buffer = io.BytesIO()
    picture(value).save(buffer, format="PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def read(folder: Path, rows: list[dict[str, Any]], *, spelling: Spelling = POLICY.spelling, **settings: Any) -> Read:
    folder.mkdir(exist_ok=True)
    path = folder / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    config = PreferenceData.model_validate({"path": str(path), "cache_dir": str(folder / "cache"), **settings})
    speller = Speller(ImageTokens(CODEC), spelling, Writing())
    return read_preferences(load_raw(config.rows(), config.path, config.split), config, speller)


def codes_of(value: int) -> list[int]:
    return ImageTokens(CODEC).codes([picture(value)])[0].tolist()


def test_trls_columns_with_images_are_read_as_they_are(tmp_path: Path) -> None:
    found = read(tmp_path, [{"prompt": "hello", "chosen": png(2), "rejected": png(3)}])
    ((one,),) = found.items
    assert [list(side.image or []) for side in one.sides] == [codes_of(2), codes_of(3)]
    assert all(side.prompt == POLICY.encode_prompt("hello") for side in one.sides)
    assert not found.excluded and codes_of(2) != codes_of(3)


def test_columns_may_have_other_names_and_prompts_source_images(tmp_path: Path) -> None:
    row = {"caption": "hello", "win": [png(2)], "lose": [png(3)], "images": [png(5)]}
    names = {"prompt_column": "caption", "chosen_column": "win", "rejected_column": "lose", "sources_column": "images"}
    ((one,),) = read(tmp_path, [row], **names).items
    assert len(one.sides[0].sources) == 1 and len(one.sides[0].sources[0]) == 6
    with pytest.raises(ValueError, match=r"no column 'chosen' \(data.chosen_column\)"):
        read(tmp_path, [row], prompt_column="caption")


def test_unpaired_rows_have_a_label(tmp_path: Path) -> None:
    rows = [
        {"prompt": "hello", "completion": png(2), "label": True},
        {"prompt": "you", "completion": png(3), "label": False},
    ]
    found = read(tmp_path, rows, completion_column="completion")
    assert [one.desirable for (one,) in found.items] == [True, False]
    assert apart(found.items) == found.items


def test_an_unpaired_row_may_be_a_text_or_messages(tmp_path: Path) -> None:
    for completion in ("a cat", said("a cat")):
        row = {"prompt": "what", "images": [png(5)], "completion": completion, "label": False}
        ((one,),) = read(tmp_path, [row], completion_column="completion").items
        assert list(one.sides[0].text) == [*POLICY.encode_prompt("a cat"), POLICY.tokenizer.eos_token_id]
        assert one.desirable is False and len(one.sides[0].sources) == 1


def test_codes_are_read_in_place_of_images(tmp_path: Path) -> None:
    row = {"prompt": "hello", "chosen": png(2), "rejected": png(3), "chosen_codes": [1] * 6, "rejected_codes": [2] * 6}
    ((one,),) = read(tmp_path, [row]).items
    assert [list(side.image or []) for side in one.sides] == [[1] * 6, [2] * 6]


def test_codes_may_be_a_list_a_row_of_the_grid(tmp_path: Path) -> None:
    row = {"prompt": "hello", "chosen_codes": [[1, 2, 3], [4, 5, 6]], "rejected_codes": [[2] * 3] * 2}
    ((one,),) = read(tmp_path, [row]).items
    assert [list(side.image or []) for side in one.sides] == [[1, 2, 3, 4, 5, 6], [2] * 6]


def test_codes_that_are_none_are_a_bad_pair(tmp_path: Path) -> None:
    rows = [{"prompt": "hello", "chosen_codes": ["1"] * 6, "rejected_codes": ["2"] * 6}]
    assert read(tmp_path, rows).excluded == {"codes that are no list of whole numbers": 1}


def test_files_without_rows_or_a_prompt_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match="empty.jsonl is empty"):
        check_data(PreferenceData(path=str(tmp_path / "empty.jsonl"), cache_dir=str(tmp_path / "cache")))
    with pytest.raises(ValueError, match="no column 'prompt' .* Set apart the prompts that conversations begin with"):
        read(tmp_path, [{"chosen": said("yes"), "rejected": said("no")}])


def test_preferences_are_looked_at_before_anything_is_trained(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "a", "choosen": "b", "rejected": "c"}))
    data = f"stages.dpo.data={{path: {path}, cache_dir: {tmp_path / 'cache'}}}"
    recipe = read_recipe(RECIPE, [f"run_dir={tmp_path / 'run'}", "stages.dpo.pairs=null", data])
    with pytest.raises(ValueError, match=r"no column 'chosen' \(data.chosen_column\). Nearest: choosen."):
        run_recipe(recipe, print)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["processes"]  # where the lock of the folder is


def test_bad_pairs_are_counted_named_and_left_out(tmp_path: Path) -> None:
    good = {
        "prompt": "hello", "chosen": png(2), "rejected": png(3), "chosen_codes": None, "rejected_codes": None,
        "margin": 0.5, "codec": None,
    }  # fmt: skip
    codes = {"chosen_codes": [1] * 6, "rejected_codes": [2] * 6}
    bad = [
        ({"rejected": png(2)}, IDENTICAL),
        ({"rejected": None}, "missing image"),
        ({"chosen": {"bytes": b"no picture", "path": None}}, "corrupt image"),
        ({"margin": float("nan")}, NO_MARGIN),
        ({"margin": float("inf")}, NO_MARGIN),
        ({**codes, "chosen_codes": [1] * 5}, SHORT),
        ({**codes, "rejected_codes": [2] * 5 + [64]}, FOREIGN),
        ({**codes, "codec": "another"}, FOREIGN),
        ({**codes, "rejected_codes": [1] * 6}, IDENTICAL),
        ({"prompt": " "}, "empty prompt"),
        ({"prompt": "hello \u4f60"}, "prompt that the tokenizer cannot spell"),
    ]
    rows = [good, *({**good, **change} for change, _ in bad), {**good, **codes, "codec": codec_hash(CODEC)}]
    found = read(tmp_path, rows)
    assert len(found.items) == 2
    for reason in {reason for _, reason in bad}:
        assert found.excluded[reason] == sum(other == reason for _, other in bad), reason
    for number, (_, reason) in enumerate(bad, start=1):
        assert any(line.startswith(f"row {number}: ") and reason in line for line in found.named), (number, reason)


def test_images_that_have_the_same_codes_are_the_same_to_the_policy(tmp_path: Path) -> None:
    near = picture(2)
    near.putpixel((0, 0), near.getpixel((0, 0)) + 1)  # pyrefly: ignore
    buffer = io.BytesIO()
    near.save(buffer, format="PNG")
    rows = [
        {"prompt": "hello", "chosen": png(2), "rejected": {"bytes": buffer.getvalue(), "path": None}},
        {"prompt": "hello", "chosen": png(2), "rejected": png(3)},
    ]
    found = read(tmp_path, rows)
    assert found.excluded == {IDENTICAL: 1} and "their codes are" in found.named[0] and len(found.items) == 1


def test_texts_are_answers_too(tmp_path: Path) -> None:
    row = {"prompt": "what", "chosen": None, "rejected": None, "chosen_text": "yes", "rejected_text": "no"}
    ((one,),) = read(tmp_path, [row]).items
    end = POLICY.tokenizer.eos_token_id
    assert one.understanding and list(one.sides[0].text) == [*POLICY.encode_prompt("yes"), end]


def said(text: str) -> list[dict[str, Any]]:
    """An answer as TRL's conversational sets have it."""
    return [{"role": "assistant", "content": [{"type": "text", "text": text}]}]


def asked(text: str) -> list[dict[str, Any]]:
    """A question about an image that is kept in another column."""
    return [{"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": text}]}]


@pytest.mark.parametrize("column", ["sources", "images", "image"])
def test_a_column_of_source_images_is_used_without_being_named(tmp_path: Path, column: str) -> None:
    row = {"prompt": "hello", "chosen": png(2), "rejected": png(3), column: png(5) if column == "image" else [png(5)]}
    ((one,),) = read(tmp_path, [row]).items
    low, high = POLICY.layout.image
    for side in one.sides:
        (ids,) = side.sources
        assert [token - low for token in ids if low <= token < high] == codes_of(5)


def test_of_two_columns_of_source_images_one_must_be_named(tmp_path: Path) -> None:
    row = {"prompt": "hello", "chosen": png(2), "rejected": png(3), "image": png(5), "images": [png(6)]}
    with pytest.raises(ValueError, match=r"columns images and image, .*data.sources_column"):
        read(tmp_path, [row])
    assert len(read(tmp_path / "named", [row], sources_column="image").items) == 1
    unpaired = {"prompt": "hello", "image": png(2), "label": True}
    ((one,),) = read(tmp_path / "unpaired", [unpaired], completion_column="image").items
    assert not one.sides[0].sources and list(one.sides[0].image or []) == codes_of(2)


@pytest.mark.parametrize("conversational", [False, True])
def test_trls_texts_about_an_image_are_answers(tmp_path: Path, conversational: bool) -> None:
    row: dict[str, Any] = {"images": [png(5)]}
    if conversational:
        row |= {"prompt": asked("what"), "chosen": said("a cat"), "rejected": said("a dog")}
    else:
        row |= {"prompt": "what", "chosen": "a cat", "rejected": "a dog"}
    found = read(tmp_path, [row])
    ((one,),) = found.items
    assert one.understanding and not found.excluded
    for side, text in zip(one.sides, ("a cat", "a dog"), strict=True):
        assert list(side.text) == [*POLICY.encode_prompt(text), POLICY.tokenizer.eos_token_id]
        assert side.prompt == POLICY.encode_prompt("what") and len(side.sources) == 1


def test_an_image_may_be_a_message_of_the_assistant(tmp_path: Path) -> None:
    row = {"prompt": "hello"}
    for side, value in (("chosen", 2), ("rejected", 3)):
        row[side] = [{"role": "assistant", "content": [{"type": "image", "image": png(value)}]}]  # pyrefly: ignore
    ((one,),) = read(tmp_path, [row]).items
    assert [list(side.image or []) for side in one.sides] == [codes_of(2), codes_of(3)]


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        ("pictures/a cat.png", "a dog", "missing image"),
        ("https://example.com/7", "a dog", "remote image"),
        (" ", "a dog", "empty answer"),
        ("a dog", "a dog", IDENTICAL),
        ("a \u4f60", "a dog", UNSPELLED),
        (png(2), None, "missing image"),
        (said(" "), said("a dog"), "empty answer"),
        (asked("a cat"), said("a dog"), "answer with turns that are not the assistant's"),
    ],
)
def test_a_bad_answer_has_its_own_reason(tmp_path: Path, chosen: Any, rejected: Any, reason: str) -> None:
    rows = [{"prompt": "what", "chosen": chosen, "rejected": rejected}]
    assert read(tmp_path, rows).excluded == {reason: 1}


def test_sides_of_two_kinds_are_no_pair(tmp_path: Path) -> None:
    drawn = [{"role": "assistant", "content": [{"type": "image", "image": png(2), "text": None}]}]
    wrote = [{"role": "assistant", "content": [{"type": "text", "image": None, "text": "a dog"}]}]
    assert read(tmp_path, [{"prompt": "what", "chosen": drawn, "rejected": wrote}]).excluded == {UNLIKE: 1}


def test_a_text_is_no_answer_of_a_policy_that_draws_alone(tmp_path: Path) -> None:
    masked = build(
        NewPolicy(family="masked", hidden_size=16, num_layers=1, num_heads=2, intermediate_size=24),
        num_codes=64,
        grid=(2, 3),
        seed=0,
    )
    mute = replace(POLICY.spelling, layout=replace(POLICY.layout, decides_text=False))
    row = {"prompt": "what", "chosen": "a cat", "rejected": "a dog"}
    for spelling in (masked.spelling, mute):
        assert read(tmp_path, [row], spelling=spelling).excluded == {UNWRITTEN: 1}


def test_turns_that_no_prompt_holds_are_counted(tmp_path: Path) -> None:
    prompt = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "what"}]
    found = read(tmp_path, [{"prompt": prompt, "chosen": "a cat", "rejected": "a dog"}])
    assert len(found.items) == 1 and found.unread_turns == 1
