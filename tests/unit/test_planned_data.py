"""What a memory plan reads of data: of files their first rows, and where it cannot what is assumed and why."""

import gzip
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image

from rlmm import planned_data
from rlmm.config.data import RowsData, ScenesData, WordsData
from rlmm.config.preference import PreferenceData
from rlmm.config.recipe import read_recipe
from rlmm.data.loading import load_raw
from rlmm.memory import MemoryPlan, notes, plan_lines
from rlmm.planned_data import Read, Shown, read_data, read_preferences
from tests.integration.planned import RECIPES


def lines(folder: Path, *rows: Mapping[str, Any]) -> str:
    file = folder / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return str(file)


def read(path: str, **settings: Any) -> Read:
    return read_data(RowsData(path=path, **settings), 0)


def test_rows_of_every_kind(tmp_path: Path) -> None:
    path = lines(
        tmp_path,
        {"prompt": "plain", "image": "none.png", "text": "said", "about": ["a.png", "b.png"], "codes": None},
        {"prompt": " ", "image": "none.png", "text": "said", "about": [], "codes": None},
        {"prompt": "coded", "image": "none.png", "text": "more", "about": [], "codes": [1, 2]},
    )
    assert read(path).shown == [Shown("plain", image=False), Shown("coded", image=False)]
    assert read(path, target_column="image").shown[1] == Shown("coded")  # no image is opened
    assert read(path, codes_column="codes").shown == [Shown("coded", coded=True)]
    several = read(path, sources_column="about", text_column="text", target_column="image")
    assert several == Read([Shown("plain", 2, "said"), Shown("coded", 0, "more")])


def test_conversations_and_pictures_in_a_table(tmp_path: Path) -> None:
    said = [
        {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "what is it"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "a dog"}]},
    ]
    table = datasets.Dataset.from_list([{"prompt": said, "picture": Image.new("RGB", (4, 4))}] * 3)
    table.to_parquet(tmp_path / "rows.parquet")
    found = read(str(tmp_path / "rows.parquet"), sources_column="picture")
    assert found == Read([Shown("what is it", 1, "a dog", image=False)] * 3)


def test_so_many_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = lines(tmp_path, *[{"prompt": str(number)} for number in range(5)])
    assert len(read(path).shown) == 5 and len(read(path, limit=3).shown) == 3
    monkeypatch.setattr(planned_data, "LOOKED_AT", 2)
    assert [one.prompt for one in read(path, limit=3).shown] == ["0", "1"]
    assert len(read_data(WordsData(), 0).shown) == 2


def test_generated_rows() -> None:
    words, asked = read_data(WordsData(), 0).shown, read_data(ScenesData(variant="describe"), 0).shown
    assert len(words) == 1500 and {one.sources for one in words} == {0} and {one.text for one in words} == {""}
    assert all(one.image for one in words) and all(one.text and one.sources == 1 and not one.image for one in asked)
    assert {one.sources for one in read_data(ScenesData(variant="edit"), 0).shown} == {1}


def test_of_a_table_only_columns_that_matter_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = datasets.Dataset.from_list([{"prompt": "a", "picture": Image.new("RGB", (4, 4)), "more": "x"}])
    table.to_parquet(tmp_path / "rows.parquet")
    path, seen = str(tmp_path / "rows.parquet"), list[set[str]]()
    parse = planned_data.parse_row
    monkeypatch.setattr(planned_data, "parse_row", lambda row, data: seen.append(set(row)) or parse(row, data))
    assert read(path, target_column="picture").shown == [Shown("a")] and seen == [{"prompt"}]
    assert read(path, sources_column="picture").shown == [Shown("a", 1, image=False)]


def test_files_of_two_kinds_and_torn_ones_are_told_as_a_run_does(tmp_path: Path) -> None:
    datasets.Dataset.from_list([{"prompt": "a"}]).to_parquet(tmp_path / "a.parquet")
    datasets.Dataset.from_list([{"prompt": [{"role": "user", "content": "a"}]}]).to_parquet(tmp_path / "b.parquet")
    packed = gzip.compress(b'{"prompt": "a"}\n' * 5000)
    (tmp_path / "torn.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    (tmp_path / "bad.jsonl.gz").write_bytes(packed[:20] + bytes(20) + packed[40:])
    for name in ("*.parquet", "torn.jsonl.gz", "bad.jsonl.gz"):
        data = RowsData(path=str(tmp_path / name), cache_dir=str(tmp_path / "cache"))
        found = read_data(data, 0)
        assert not found.shown and "cannot be read as" in found.assumed and name in found.assumed
        with pytest.raises(ValueError, match="cannot be read as"):
            load_raw(data, data.path, data.split)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"path": "nowhere.jsonl"}, "there is no file nowhere.jsonl"),
        ({"path": "some/one", "format": "hub"}, "some/one is of the hub, and not opened for a plan"),
        ({"path": "{torn}"}, "cannot be read as parquet"),
        ({"path": "{rows}", "prompt_column": "ask"}, "none of the first rows of"),
    ],
)
def test_what_cannot_be_read_is_assumed(settings: dict[str, str], why: str, tmp_path: Path) -> None:
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 and no more")
    places = {"{torn}": str(tmp_path / "torn.parquet"), "{rows}": lines(tmp_path, {"prompt": "a"})}
    path = places.get(settings["path"], settings["path"])
    found = read(**settings | {"path": path}, sources_column="about")
    assert not found.shown and found.sources == 1 and why in found.assumed


def preferences(folder: Path, row: Mapping[str, Any], **settings: Any) -> Sequence[Shown]:
    return read_preferences(PreferenceData(path=lines(folder, row, {"prompt": ""}), **settings)).shown


def test_preferences_of_every_kind(tmp_path: Path) -> None:
    drawn = {"prompt": "a", "chosen": "good.png", "rejected": "bad.png"}
    assert preferences(tmp_path, drawn) == [Shown("a")] * 2
    assert preferences(tmp_path, drawn | {"chosen_text": "well", "rejected_text": ""}) == [
        Shown("a", text="well"),
        Shown("a"),
    ]
    coded = {"prompt": "a", "chosen_codes": [1], "rejected_codes": [2], "sources": ["s.png"]}
    assert preferences(tmp_path, coded) == [Shown("a", 1, coded=True)] * 2
    said = {"prompt": "a", "chosen": "yes", "rejected": "not at all", "images": ["s.png", "t.png"]}
    assert preferences(tmp_path, said) == [Shown("a", 2, text, image=False) for text in ("yes", "not at all")]
    assert not preferences(tmp_path, drawn | {"chosen_text": 5})  # which a run leaves out, and counts
    single = {"prompt": "a", "answer": "good.png", "label": True}
    assert preferences(tmp_path, single, completion_column="answer") == [Shown("a")]


def test_preferences_with_two_columns_of_sources_are_assumed(tmp_path: Path) -> None:
    row = {"prompt": "a", "chosen": "yes", "rejected": "no", "image": "a.png", "images": ["a.png"]}
    found = read_preferences(PreferenceData(path=lines(tmp_path, row)))
    assert not found.shown and "name the right one in data.sources_column" in found.assumed


def test_what_is_assumed_is_said_once_for_all_its_stages(tmp_path: Path) -> None:
    none = MemoryPlan("", 0, 0, 0, 0, 0, 0, 0)
    why = {"a": "x", "b": "", "c": "xy"}
    plans = [replace(none, stage=stage, notes=tuple(one)) for stage, one in why.items()]
    assert notes(plans) == ["of a, c: x", "of c: y"]
    recipe = read_recipe(RECIPES / "tiny.yaml", ["data={kind: rows, path: nowhere.jsonl}"])
    assert plan_lines(recipe)[-1].startswith("of sft, grpo: prompts are taken to be 32 positions: there is no file")
    rows = lines(tmp_path, {"prompt": "a", "image": "a.png"})
    there = read_recipe(RECIPES / "tiny.yaml", [f"data={{kind: rows, path: {rows}, target_column: image}}"])
    assert [line.split(":")[0] for line in plan_lines(there)] == ["sft", "grpo"]
