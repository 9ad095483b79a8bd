"""A user's rows: every format, what is excluded and counted, and what is an error."""

import gzip
import io
import json
import logging
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from rlmm.config.data import RowsData, Split
from rlmm.data import build_dataset
from rlmm.data.rows import Rows, is_held_out

datasets.disable_progress_bars()


def png(color: str = "red", size: tuple[int, int] = (8, 6)) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, color).save(stream, "PNG")
    return stream.getvalue()


def jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return str(path)


def corner(image: Image.Image | None) -> Any:
    assert image is not None
    return image.getpixel((0, 0))


def read(tmp_path: Path, path: str, split: Split = "train", **settings: Any) -> Rows:
    config: dict[str, Any] = {"held_out_share": 0.0, "cache_dir": str(tmp_path / "cache")} | settings
    data = build_dataset(RowsData(path=path, **config), split, 0)
    assert isinstance(data, Rows)
    return data


def numbered(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"prompt {number}", "answer": number} for number in range(count)]


@pytest.mark.parametrize("streaming", [False, True])
def test_json_lines_keep_other_columns_as_they_are(tmp_path: Path, streaming: bool) -> None:
    rows = [
        {"prompt": "a cat", "include": [{"class": "cat", "count": 1}], "n": 3, "tag": None, "mixed": 1},
        {
            "prompt": " a dog ",
            "include": [{"class": "dog", "color": "red"}],
            "n": 4,
            "tag": "t",
            "mixed": "one",
        },
    ]
    settings: dict[str, Any] = {"streaming": True, "limit": 10} if streaming else {}
    data = read(tmp_path, jsonl(tmp_path / "rows.jsonl", rows), **settings)
    assert [item.prompt for item in data] == ["a cat", " a dog "]
    assert [dict(item.row) for item in data] == [{k: v for k, v in row.items() if k != "prompt"} for row in rows]
    assert all(item.target is None and item.sources == () for item in data)
    assert not data.excluded


def test_csv_text_gz_and_globs(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt,score\nnull,1.5\n,2\nNA,\n")
    data = read(tmp_path, str(tmp_path / "a.csv"), max_excluded_share=0.5)
    assert [(item.prompt, item.row["score"]) for item in data] == [("null", 1.5), ("NA", None)]
    assert data.excluded == {"empty prompt": 1}
    (tmp_path / "a.txt").write_text("first\nsecond\n")
    assert [item.prompt for item in read(tmp_path, str(tmp_path / "a.txt"), prompt_column="text")] == [
        "first",
        "second",
    ]
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"prompt": "zipped"}\n'))
    assert read(tmp_path, str(tmp_path / "a.jsonl.gz"))[0].prompt == "zipped"
    for name in ("part-2.jsonl", "part-1.jsonl"):
        jsonl(tmp_path / name, [{"prompt": name}])
    data = read(tmp_path, str(tmp_path / "part-*.jsonl"))
    assert [item.prompt for item in data] == ["part-1.jsonl", "part-2.jsonl"]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("typed", [True, False])
def test_parquet_with_images_inside(tmp_path: Path, typed: bool, streaming: bool) -> None:
    """As `datasets` writes it, and as plain {bytes, path} structs."""
    stored = [{"bytes": png(color), "path": None} for color in ("red", "blue")]
    columns = {
        "caption": ["r", "b"],
        "image": stored,
        "inputs": [[stored[0], stored[1]], []],
        "other": stored,
        "scene": [{"objects": [{"shape": "circle", "count": 2}]}, {"objects": []}],
    }
    path = tmp_path / "rows.parquet"
    if typed:
        image = datasets.Image()
        features = datasets.Dataset.from_dict(columns).features | {
            "image": image,
            "other": image,
            "inputs": datasets.List(image),
        }
        datasets.Dataset.from_dict(columns, features=datasets.Features(features)).to_parquet(path)
    else:
        pq.write_table(pa.table(columns), path)
    names = {"prompt_column": "caption", "target_column": "image", "sources_column": "inputs"}
    data = read(tmp_path, str(path), **names, streaming=streaming, limit=5)
    assert [corner(item.target) for item in data] == [(255, 0, 0), (0, 0, 255)]
    assert [[corner(image) for image in item.sources] for item in data] == [
        [(255, 0, 0), (0, 0, 255)],
        [],
    ]
    assert [item.row["scene"] for item in data] == columns["scene"]
    assert data[0].row["other"]["bytes"] == png("red"), "an image nobody asked for stays encoded"
    assert set(data[0].row) == {"scene", "other"}


@pytest.mark.parametrize("streaming", [False, True])
def test_corrupt_images_inside_typed_columns_are_counted(tmp_path: Path, streaming: bool) -> None:
    """`datasets` decodes such columns itself, and stops at the first damaged one, unless told not to."""
    image = {"bytes": png(), "path": None}
    cut = {"bytes": png(size=(64, 64))[:60], "path": None}
    columns = {
        "prompt": list("abc"),
        "image": [image, cut, image],
        "inputs": [[image], [image], [image, cut]],
        "unused": [[cut]] * 3,
    }
    features = datasets.Features(
        prompt=datasets.Value("string"),
        image=datasets.Image(),
        inputs=datasets.List(datasets.Image()),
        unused=datasets.List(datasets.Image()),
    )
    datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "rows.parquet")
    data = read(
        tmp_path,
        str(tmp_path / "rows.parquet"),
        target_column="image",
        sources_column="inputs",
        max_excluded_share=0.7,
        streaming=streaming,
        limit=5,
    )
    assert [item.prompt for item in data] == ["a"]
    assert data.excluded == {"corrupt image": 2}


def image_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for color in ("red", "green", "blue"):
        (folder / f"{color}.png").write_bytes(png(color))
    (folder / "cut.png").write_bytes(png(size=(64, 64))[:60])
    rows = [{"file_name": f"{name}.png", "prompt": name} for name in ("red", "cut", "green", "gone", "blue")]
    jsonl(folder / "metadata.jsonl", rows)
    return folder


def test_image_folder_counts_corrupt_and_missing_images(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = image_folder(tmp_path)
    with caplog.at_level(logging.WARNING):
        data = read(tmp_path, str(folder), target_column="file_name", image_size=(4, 4), max_excluded_share=0.4)
    assert [item.prompt for item in data] == ["red", "green", "blue"]
    assert [item.target and item.target.size for item in data] == [(4, 4)] * 3
    assert data.excluded == {"corrupt image": 1, "missing image": 1}
    assert "2 of 5 rows excluded" in caplog.text
    assert "row 1: corrupt image" in caplog.text and "gone.png: No such file" in caplog.text


def test_past_the_ceiling_it_is_an_error_that_names_the_rows(tmp_path: Path) -> None:
    folder = image_folder(tmp_path)
    with pytest.raises(ValueError, match=r"(?s)2 of 5 .*row 1: .*row 3: .*max_excluded_share 0.39: mend"):
        read(tmp_path, str(folder), target_column="file_name", max_excluded_share=0.39)


def test_a_header_check_finds_only_what_does_not_open(tmp_path: Path) -> None:
    folder = image_folder(tmp_path)
    data = read(tmp_path, str(folder), target_column="file_name", check_images="header", max_excluded_share=0.4)
    assert data.excluded == {"missing image": 1}
    with pytest.raises(ValueError, match="row 1 of .* cannot now: corrupt image.*check_images: decode"):
        data[1]
    assert data[2].prompt == "green"


def test_a_folder_without_metadata_says_what_it_needs(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    with pytest.raises(ValueError, match=r'no metadata.jsonl .*"file_name"'):
        read(tmp_path, str(tmp_path))


def test_a_missing_column_names_the_nearest(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"promt": "x", "picture": "y", "id": 1}])
    with pytest.raises(ValueError, match=r"no column 'prompt' \(data.prompt_column\). Nearest: promt"):
        read(tmp_path, path)
    with pytest.raises(ValueError, match=r"no column 'pictures' \(data.target_column\). Nearest: picture"):
        read(tmp_path, path, prompt_column="promt", target_column="pictures")
    with pytest.raises(ValueError, match=r"no column 'zzz' \(data.sources_column\). Known: id, picture, promt"):
        read(tmp_path, path, prompt_column="promt", sources_column="zzz", streaming=True, limit=1)


def test_prompts_that_cannot_be_used_are_counted(tmp_path: Path) -> None:
    prompts: list[Any] = ["good", "", "  \n", None, "far too long for this", 7]
    path = jsonl(tmp_path / "a.jsonl", [{"prompt": prompt} for prompt in prompts])
    data = read(tmp_path, path, max_excluded_share=0.9, max_prompt_characters=10)
    assert [item.prompt for item in data] == ["good"]
    assert data.excluded == {
        "empty prompt": 3,
        "prompt longer than 10 characters": 1,
        "prompt is neither text nor messages": 1,
    }
    assert data.faults[0] == "row 1: empty prompt" and len(data.faults) == 5
    with pytest.raises(ValueError, match="no rows for the train split"):
        read(tmp_path, path, max_excluded_share=1.0, max_prompt_characters=3)


def test_null_images_are_missing_and_an_empty_list_is_none(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    rows = [
        {"prompt": "both", "target": "a.png", "sources": ["a.png", "a.png"]},
        {"prompt": "no sources", "target": "a.png", "sources": []},
        {"prompt": "no target", "target": None, "sources": []},
        {"prompt": "null source", "target": "a.png", "sources": None},
        {"prompt": "null in list", "target": "a.png", "sources": [None]},
    ]
    path = jsonl(tmp_path / "a.jsonl", rows)
    data = read(
        tmp_path,
        path,
        target_column="target",
        sources_column="sources",
        max_excluded_share=0.6,
        image_mode="L",
    )
    assert [(item.prompt, len(item.sources)) for item in data] == [("both", 2), ("no sources", 0)]
    assert data.excluded == {"missing image": 3}
    assert data[0].target and data[0].target.mode == "L"


def test_messages_bring_images_and_the_answer_is_the_target(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for color in ("red", "blue"):
        (tmp_path / f"{color}.png").write_bytes(png(color))
    ask = [{"type": "image", "image": "red.png"}, {"type": "text", "text": "make it blue"}]
    answer = {"role": "assistant", "content": [{"type": "image", "image": "blue.png"}]}
    rows = [
        {"messages": [{"role": "user", "content": ask}, answer], "id": 1},
        {"messages": [{"role": "system", "content": "hm"}, {"role": "user", "content": "draw"}], "id": 2},
        {"messages": [answer], "id": 3},
        {"messages": [{"role": "user", "content": [{"type": "image"}, ask[1]]}], "id": 4},
    ]
    path = jsonl(tmp_path / "a.jsonl", rows)
    with caplog.at_level(logging.WARNING):
        data = read(tmp_path, path, prompt_column="messages", max_excluded_share=0.5)
    first, second = data
    assert (first.prompt, dict(first.row)) == ("make it blue", {"id": 1})
    assert corner(first.target) == (0, 0, 255) and corner(first.sources[0]) == (255, 0, 0)
    assert (second.prompt, second.target, second.sources) == ("draw", None, ())
    assert data.excluded == {
        "messages without a user turn at their end": 1,
        "image parts without images": 1,
    }
    assert data.unread_turns == 1 and "1 earlier or system turns" in caplog.text


def test_image_parts_are_filled_from_the_sources_column(tmp_path: Path) -> None:
    for color in ("red", "blue"):
        (tmp_path / f"{color}.png").write_bytes(png(color))
    mark, words = {"type": "image"}, {"type": "text", "text": "mix"}
    rows = [
        {"prompt": [{"role": "user", "content": content}], "images": ["red.png", "blue.png"]}
        for content in ([mark, words, mark], "mix", [words, mark])
    ]
    data = read(tmp_path, jsonl(tmp_path / "a.jsonl", rows), sources_column="images", max_excluded_share=0.5)
    assert len(data) == 2
    for item in data:
        assert [corner(image) for image in item.sources] == [(255, 0, 0), (0, 0, 255)]
    assert data.excluded == {"image parts without images": 1}


def test_held_out_prompts_are_chosen_by_their_text_alone(tmp_path: Path) -> None:
    rows = numbered(300) + numbered(300)
    path = jsonl(tmp_path / "a.jsonl", rows)
    splits: tuple[Split, ...] = ("train", "prompts", "held_out")
    train, prompts, held_out = (
        [item.prompt for item in read(tmp_path, path, split, held_out_share=0.2)] for split in splits
    )
    assert train == prompts and not set(train) & set(held_out)
    assert len(train) + len(held_out) == 600 and 80 < len(held_out) < 160
    assert set(held_out) == {row["prompt"] for row in rows if is_held_out(row["prompt"], 0.2)}
    backwards = jsonl(tmp_path / "b.jsonl", rows[::-1])
    assert [item.prompt for item in read(tmp_path, backwards, "held_out", held_out_share=0.2)] == held_out[::-1]


def test_held_out_rows_may_have_a_file_of_their_own(tmp_path: Path) -> None:
    train = jsonl(tmp_path / "a.jsonl", numbered(5))
    test = jsonl(tmp_path / "b.jsonl", [{"prompt": "other"}])
    settings = {"held_out_path": test, "held_out_share": 0.5}
    assert [item.prompt for item in read(tmp_path, train, "held_out", **settings)] == ["other"]
    assert len(read(tmp_path, train, "train", **settings)) == 5
    with pytest.raises(ValueError, match="no rows for the held_out split.*held_out_share"):
        read(tmp_path, train, "held_out")


def test_one_bad_row_does_not_condemn_a_small_held_out_side(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [*numbered(99), {"prompt": ""}])
    assert len(read(tmp_path, path, "held_out", held_out_share=0.05)) < 15


@pytest.mark.parametrize("streaming", [False, True])
def test_a_limit_reads_the_first_rows_and_items_do_not_depend_on_the_order(tmp_path: Path, streaming: bool) -> None:
    path = jsonl(tmp_path / "a.jsonl", numbered(50))
    data = read(tmp_path, path, limit=20, streaming=streaming)
    forward = [(item.prompt, dict(item.row)) for item in data]
    assert forward == [(f"prompt {number}", {"answer": number}) for number in range(20)]
    again = read(tmp_path, path, limit=20, streaming=streaming)
    assert [(again[i].prompt, dict(again[i].row)) for i in reversed(range(20))] == forward[::-1]
    assert len(read(tmp_path, path, limit=500, streaming=streaming)) == 50


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no file .*nope.jsonl .*format: hub"):
        read(tmp_path, str(tmp_path / "nope.jsonl"))
    (tmp_path / "a.dat").write_text("x")
    with pytest.raises(ValueError, match=r"extension \(.dat\); known: .parquet"):
        read(tmp_path, str(tmp_path / "a.dat"))
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n{"prompt": \n')
    with pytest.raises(ValueError, match=r"bad.jsonl .* cannot be read as json"):
        read(tmp_path, str(tmp_path / "bad.jsonl"))
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(ValueError, match=r"bad.parquet .* cannot be read as parquet"):
        read(tmp_path, str(tmp_path / "bad.parquet"))
    with pytest.raises(ValueError, match=r"is a folder; give the files"):
        read(tmp_path, str(tmp_path), format="parquet")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("harm", ["torn", "a page", "empty", "a line"])
def test_of_several_files_the_one_that_cannot_be_read_is_named(tmp_path: Path, harm: str, streaming: bool) -> None:
    suffix = "jsonl" if harm == "a line" else "parquet"
    for i in range(3):
        table = pa.table({"prompt": [f"word {i} {j}" for j in range(500)]})
        if suffix == "parquet":
            pq.write_table(table, tmp_path / f"{i}.parquet")
        else:
            (tmp_path / f"{i}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in table.to_pylist()))
    path = tmp_path / f"1.{suffix}"
    whole = path.read_bytes()
    harmed = {"torn": whole[:-30], "a page": whole[:60] + bytes(30) + whole[90:], "empty": b"", "a line": whole[:-9]}
    path.write_bytes(harmed[harm])
    with pytest.raises(ValueError, match=rf"^{path}, a file of {tmp_path}/.* cannot be read as "):
        read(tmp_path, str(tmp_path / f"*.{suffix}"), limit=1500, streaming=streaming)


def test_a_hub_dataset_that_cannot_be_reached_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nobody/nothing \(split 'train'\) cannot be read as hub dataset"):
        read(tmp_path, "nobody/nothing", format="hub")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"streaming": True}, "streaming needs `limit`"),
        ({"split": "test"}, "split: only for datasets of the hub"),
        ({"subset": "en", "revision": "abc"}, "revision, subset: only for datasets"),
        ({"format": "hub", "held_out_path": "a", "held_out_split": "b"}, "exclude each other"),
        ({"image_size": (0, 4)}, "both at least 1"),
        ({"prompt_colum": "x"}, "unknown key 'prompt_colum'. Nearest: prompt_column"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RowsData(path="a.jsonl", **settings)
