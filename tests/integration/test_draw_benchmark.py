"""A benchmark's pictures drawn by a checkpoint: whole, resumed, and never of two laws."""

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from rlmm.cli import app
from rlmm.config.policy import CheckpointPolicy
from rlmm.config.sampling import Sampling
from rlmm.evaluation import draw_benchmark
from rlmm.evaluation.benchmarks import BenchmarkError
from tests.integration.conftest import TinyRun

PROMPTS = Path(__file__).parents[1] / "fixtures" / "geneval" / "metadata.jsonl"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_stopped_call_goes_on_and_draws_the_same(
    tiny_run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = str(tiny_run.folder.stage("sft") / "model")
    file = tmp_path / "some.jsonl"
    file.write_text("".join(PROMPTS.read_text().splitlines(keepends=True)[:5]))

    def draw(out: str, batch: int, **options: Any) -> None:
        settings = {"samples": 2, "seed": 3, **options}
        draw_benchmark.draw_benchmark(
            "geneval", file, CheckpointPolicy(path=model), Sampling(), tmp_path / out, lambda line: None,
            batch_prompts=batch, **settings,
        )  # fmt: skip

    draw("whole", 5)
    whole = contents(tmp_path / "whole")
    assert len(whole) == 5 * 3 and len({value for name, value in whole.items() if name.endswith("png")}) > 5

    class Stopped(Exception):
        pass

    real = draw_benchmark.write_json_atomically

    def stops(path: Path, record: dict[str, Any]) -> None:
        if record["done"] == 4:
            raise Stopped
        real(path, record)

    monkeypatch.setattr(draw_benchmark, "write_json_atomically", stops)
    with pytest.raises(Stopped):
        draw("parts", 2)
    monkeypatch.setattr(draw_benchmark, "write_json_atomically", real)
    draw("parts", 1)
    assert contents(tmp_path / "parts") == whole
    draw("parts", 1)  # nothing is left to do
    with pytest.raises(BenchmarkError, match="begun with another samples, seed"):
        draw("parts", 1, samples=1, seed=4)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(BenchmarkError, match="is not empty"):
        draw("full", 1)


def test_the_command_draws(tiny_run: TinyRun, tmp_path: Path) -> None:
    file, out = tmp_path / "two.txt", tmp_path / "out"
    file.write_text("a red book and a yellow vase\r\na blue car and a brown giraffe\r\n")
    model = str(tiny_run.folder.stage("sft") / "model")
    command = ["benchmark", "draw", "t2i_compbench", str(file), model, "--out", str(out), "--samples", "2"]
    answer = CliRunner().invoke(app, command)
    assert answer.exit_code == 0 and "2 prompts of t2i_compbench, 2 pictures each" in answer.output
    assert sorted(contents(out)) == [
        "samples/a blue car and a brown giraffe_000002.png",
        "samples/a blue car and a brown giraffe_000003.png",
        "samples/a red book and a yellow vase_000000.png",
        "samples/a red book and a yellow vase_000001.png",
    ]
