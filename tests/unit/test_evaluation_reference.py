"""The pictures that a report holds the arms' pictures against: whose they are, and that each has its own prompt."""

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from rlmm.codecs import build_codec
from rlmm.config.codec import FsqCodec
from rlmm.config.recipe import read_recipe
from rlmm.data import build_dataset
from rlmm.data.words import FONTS, render
from rlmm.evaluation import reference
from rlmm.run_folder import RunFolder
from rlmm.train.context import StageContext

TINY = Path(__file__).parents[1] / "recipes" / "tiny.yaml"
SIZE = (32, 96)
"""Height and width of a word's picture."""


def written(folder: Path, image_size: tuple[int, int] = SIZE, *overrides: str) -> tuple[list[dict[str, Any]], str]:
    """The rows left by an untrained codec, and what was said."""
    torch.manual_seed(0)
    codec = build_codec(
        FsqCodec.model_validate(
            {"levels": (4, 4), "image_size": image_size, "channels": 1, "patch": 16, "width": 16, "blocks": 1}
        )
    )
    said: list[str] = []
    run = RunFolder(folder, ("evaluation",))
    run.stage("evaluation").mkdir(parents=True)
    context = StageContext(read_recipe(TINY, list(overrides)), run, "evaluation", None, said.append)
    reference.write_reference(context, codec)
    path = run.stage("evaluation") / "reference.parquet"
    return pyarrow.parquet.read_table(path).to_pylist() if path.exists() else [], "\n".join(said)


def pixels(row: dict[str, Any]) -> np.ndarray:
    return np.asarray(Image.open(BytesIO(row["image"])))


def test_every_training_prompt_has_its_target_and_what_the_codec_makes_of_it(tmp_path: Path) -> None:
    rows, _ = written(tmp_path)
    targets, drawn = (
        [row for row in rows if row["kind"] == kind] for kind in (reference.TARGET, reference.RECONSTRUCTION)
    )
    train = build_dataset(read_recipe(TINY, []).data, "train", 3)
    prompts = [train[index].prompt for index in range(48)]
    assert len(rows) == 96 and [row["prompt"] for row in targets] == [row["prompt"] for row in drawn] == prompts
    for row in targets:
        word = row["prompt"].split('"')[1]
        assert any(np.array_equal(pixels(row), np.asarray(render(word, font))) for font in FONTS)
    for row, target in zip(drawn, targets, strict=True):  # an untrained codec draws no word
        assert pixels(row).shape == SIZE and np.abs(pixels(row) - pixels(target).astype(float)).mean() > 20


def test_the_first_targets_are_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "PICTURES", 5)
    rows, _ = written(tmp_path)
    train = build_dataset(read_recipe(TINY, []).data, "train", 3)
    assert [row["prompt"] for row in rows] == [train[index].prompt for index in range(5)] * 2


def test_without_targets_of_the_codecs_size_there_is_no_file(tmp_path: Path) -> None:
    rows, said = written(tmp_path, (96, 32))
    assert not rows and "the report compares with the first rollouts" in said
