"""Prompt files of published benchmarks, and the folders that their official scripts read."""

import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from rewards.object_spec import read_spec
from rlmm.cli import app
from rlmm.evaluation.benchmarks import READERS, BenchmarkError, BenchPrompt, read_benchmark, summary
from rlmm.evaluation.layouts import SAMPLES, WRITERS

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
FILES = {
    "geneval": [FIXTURES / "geneval" / "metadata.jsonl"],
    "t2i_compbench": sorted((FIXTURES / "benchmarks" / "t2i_compbench").glob("*_val.txt")),
    "dpg_bench": [FIXTURES / "benchmarks" / "dpg_bench" / "prompts.jsonl"],
    "longtext_bench": sorted((FIXTURES / "benchmarks" / "longtext_bench").glob("*.jsonl")),
}
CASES = [(kind, path) for kind, paths in FILES.items() for path in paths]


@pytest.mark.parametrize(("kind", "path"), CASES, ids=lambda value: getattr(value, "name", value))
def test_every_line_becomes_a_prompt(kind: str, path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    read = read_benchmark(kind, path)
    assert len(read) == len(lines) >= 3 and len({item.key for item in read}) == len(read)
    for item, line in zip(read, lines, strict=True):
        assert item.prompt in (line if kind == "t2i_compbench" else json.loads(line)["prompt"])
        assert kind == "t2i_compbench" or item.row == json.loads(line)
    assert summary(read).startswith(f"{len(lines)} prompts")


WHOLE = {
    "geneval/metadata.whole.jsonl.gz": ("geneval", 553),
    "benchmarks/dpg_bench/prompts.whole.jsonl.gz": ("dpg_bench", 1065),
    "benchmarks/longtext_bench/text_prompts.whole.jsonl.gz": ("longtext_bench", 160),
    "benchmarks/longtext_bench/text_prompts_zh.whole.jsonl.gz": ("longtext_bench", 160),
    **{
        f"benchmarks/t2i_compbench/{name}_val.whole.txt.gz": ("t2i_compbench", 300)
        for name in ("color", "shape", "texture", "spatial", "3d_spatial", "numeracy", "non_spatial", "complex")
    },
}
"""Published files as they are, and how many prompts they say they have."""


@pytest.mark.parametrize("name", WHOLE)
def test_a_published_file_is_read_whole(name: str, tmp_path: Path) -> None:
    kind, count = WHOLE[name]
    path = tmp_path / Path(name).stem
    path.write_bytes(gzip.decompress((FIXTURES / name).read_bytes()))
    read = read_benchmark(kind, path)
    assert len(read) == len({item.key for item in read}) == count and all(item.prompt for item in read)
    if kind == "geneval":
        specs = [read_spec(item.row) for item in read]
        assert all(spec.include for spec in specs)
        assert [spec.counting for spec in specs] == [item.group == "counting" for item in read]


def test_keys_and_groups_are_the_benchmarks_own() -> None:
    assert set(FILES) == set(READERS) == set(WRITERS) == set(SAMPLES)
    geneval = read_benchmark("geneval", FILES["geneval"][0])
    assert {item.group for item in geneval} == {
        "single_object", "two_object", "counting", "colors", "position", "color_attr",
    }  # fmt: skip
    dpg = read_benchmark("dpg_bench", FILES["dpg_bench"][0])
    assert [item.key for item in dpg] == ["0", "1", "10", "100", "whoops8", "whoops9"]
    chinese = read_benchmark("longtext_bench", FILES["longtext_bench"][1])
    assert chinese[0].key == "0000" and chinese[0].row["text"][0] == "每日新鲜烘焙"


GOOD = {
    "geneval": '{"tag": "colors", "include": [{"class": "book", "count": 1}], "prompt": "a book"}',
    "t2i_compbench": "a red book",
    "dpg_bench": '{"item_id": "7", "prompt": "a book"}',
    "longtext_bench": '{"prompt_id": 7, "prompt": "a book", "category": "sign", "text": ["OPEN"]}',
}


def without(key: str, kind: str, **changed: Any) -> str:
    return json.dumps({k: v for k, v in json.loads(GOOD[kind]).items() if k != key} | changed)


@pytest.mark.parametrize(
    ("kind", "line", "message"),
    [
        *((kind, "not json", "line 2: Expecting value") for kind in GOOD if kind != "t2i_compbench"),
        *((kind, without("prompt", kind), "line 2: lacks 'prompt'") for kind in GOOD if kind != "t2i_compbench"),
        *(
            (kind, without("prompt", kind, prompt=3), "line 2: `prompt` is of type int")
            for kind in ("geneval", "dpg_bench")
        ),
        ("geneval", without("include", "geneval"), "line 2: .*no list `include`"),
        (
            "geneval",
            without("include", "geneval", include=[{"class": "a", "count": 1, "color": "pnk"}]),
            "Nearest: pink",
        ),
        ("t2i_compbench", "", "the prompt '000001' is empty"),
        ("t2i_compbench", "a red_book", "line 2: the prompt has a '_'"),
        ("t2i_compbench", "either/or", "line 2: the prompt has a '/'"),
        ("dpg_bench", GOOD["dpg_bench"], "2 prompts are called '7'"),
        ("dpg_bench", without("item_id", "dpg_bench", item_id="a.b"), "cannot be the name of a picture"),
        ("dpg_bench", without("item_id", "dpg_bench", item_id=7), "`item_id` is of type int"),
        ("longtext_bench", without("text", "longtext_bench", text=[]), "no list of the texts"),
        ("longtext_bench", without("prompt_id", "longtext_bench", prompt_id="7"), "prompt_id '7' is no number"),
    ],
)
def test_what_is_no_line_of_the_file_is_named(kind: str, line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "prompts"
    path.write_text(f"{GOOD[kind]}\n{line}\n")
    with pytest.raises(BenchmarkError, match=message):
        read_benchmark(kind, path)


def test_missing_files_and_kinds_are_named(tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match="no benchmark 'genevl'.*geneval"):
        read_benchmark("genevl", tmp_path)
    with pytest.raises(BenchmarkError, match="evaluation_metadata.jsonl of djghosh13/geneval"):
        read_benchmark("geneval", tmp_path / "none")
    (tmp_path / "empty").write_text("")
    with pytest.raises(BenchmarkError, match="is empty"):
        read_benchmark("t2i_compbench", tmp_path / "empty")


def pictures(count: int, place: int) -> list[Image.Image]:
    return [Image.new("RGB", (8, 8), (place, number, 0)) for number in range(count)]


def written(kind: str, folder: Path, count: int) -> list[BenchPrompt]:
    prompts = read_benchmark(kind, FILES[kind][0])
    for place, item in enumerate(prompts):
        WRITERS[kind](folder, place, item, pictures(count, place))
    return prompts


def colour(path: Path, at: tuple[int, int] = (0, 0)) -> Any:
    return Image.open(path).convert("RGB").getpixel(at)


def test_geneval_finds_every_picture_and_its_metadata(tmp_path: Path) -> None:
    """The walk of evaluate_images.py: numbered folders, metadata.jsonl read as JSON, samples/<digits>.png."""
    prompts, seen = written("geneval", tmp_path, 4), 0
    for folder in sorted(tmp_path.iterdir()):
        assert folder.is_dir() and folder.name.isdigit()
        with (folder / "metadata.jsonl").open() as file:
            assert json.load(file) == prompts[int(folder.name)].row
        for number, path in enumerate(sorted((folder / "samples").iterdir())):
            assert re.match(r"\d+\.png", path.name) and colour(path) == (int(folder.name), number, 0)
            seen += 1
    assert seen == 4 * len(prompts)


def test_compbench_tells_prompt_and_number_from_a_name(tmp_path: Path) -> None:
    """The reading of BLIP_vqa.py: sorted by the number after the last stroke, the prompt before the first."""
    prompts = written("t2i_compbench", tmp_path, 3)
    names = [path.name for path in (tmp_path / "samples").iterdir()]
    names.sort(key=lambda name: int(name.split("_")[-1].split(".")[0]))
    assert [name.split("_")[0] for name in names] == [item.prompt for item in prompts for _ in range(3)]
    for at, name in enumerate(names):
        assert colour(tmp_path / "samples" / name) == (at // 3, at % 3, 0)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_dpg_cuts_every_picture_from_its_sheet(tmp_path: Path, count: int) -> None:
    """The crops of compute_dpg_bench.py with --pic-num and --resolution 8; the item is the name before the point."""
    prompts, side = written("dpg_bench", tmp_path, count), 8
    corners = [(0, 0), (side, 0), (0, side), (side, side)][:count]
    assert {path.name.split(".")[0] for path in tmp_path.iterdir()} == {item.key for item in prompts}
    for place, item in enumerate(prompts):
        found = [colour(tmp_path / f"{item.key}.png", (x + 7, y + 7)) for x, y in corners]
        assert found == [(place, number, 0) for number in range(count)]


@pytest.mark.parametrize(
    "images", [pictures(5, 0), [*pictures(1, 0), Image.new("RGB", (9, 9))], [Image.new("L", (8, 9))]]
)
def test_a_sheet_that_dpg_would_cut_wrongly_is_refused(images: list[Image.Image], tmp_path: Path) -> None:
    item = read_benchmark("dpg_bench", FILES["dpg_bench"][0])[0]
    with pytest.raises(ValueError, match="one to four square pictures of one size"):
        WRITERS["dpg_bench"](tmp_path, 0, item, images)


def test_longtext_tells_the_prompt_from_a_name(tmp_path: Path) -> None:
    prompts = written("longtext_bench", tmp_path, 4)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [f"{at:04d}_{number}.png" for at in range(len(prompts)) for number in (1, 2, 3, 4)]
    assert {int(name.split("_")[0]) for name in names} == {item.row["prompt_id"] for item in prompts}
    assert colour(tmp_path / "0002_3.png") == (2, 2, 0)


def test_the_command_says_what_a_file_has(invoke: Callable[..., Any]) -> None:
    answer = invoke("benchmark", "check", "geneval", str(FILES["geneval"][0]))
    assert answer.exit_code == 0 and "19 prompts (" in answer.output and "3 counting" in answer.output


@pytest.fixture
def invoke() -> Callable[..., Any]:
    return lambda *arguments: CliRunner().invoke(app, list(arguments))
