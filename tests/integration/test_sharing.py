"""Stages on several processes: the samples, the plans and the steps of one process alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rollouts.store import read_trajectory
from tests.integration.sharing_program import PROCESSES, STARTS, SUPERVISED

ROOT = Path(__file__).parents[2]
SEVERAL = [(case, count) for case, counts in PROCESSES.items() for count in counts[1:]]
pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all runs, `CASE-PROCESSES` each."""
    folder = tmp_path_factory.mktemp("processes")
    answer = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "integration" / "sharing_program.py"), str(folder)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert answer.returncode == 0, answer.stderr[-6000:]
    return folder


def plans(folder: Path) -> dict[str, set[str]]:
    """sample -> the digests of the plans it was given, over all processes."""
    found: dict[str, set[str]] = {}
    for path in folder.parent.glob(f"{folder.name}-plans-*.jsonl"):
        for name, digest in map(json.loads, path.read_text().splitlines()):
            found.setdefault(name, set()).add(digest)
    return found


def samples(folder: Path) -> dict[str, tuple[list[int], list[int]]]:
    """sample -> its tokens, and the steps at which they were revealed, over all processes."""
    found = {}
    for path in (folder / "stages" / "03-grpo" / "rollouts").glob("*.parquet"):
        made, _ = read_trajectory(path)
        found |= dict(zip(made.sample_id, zip(made.ids.tolist(), made.step.tolist(), strict=True), strict=True))
    return found


def advantages(folder: Path) -> dict[str, float]:
    """sample of the first rollout -> its advantage, over all processes."""
    found = {}
    for path in (folder / "stages" / "03-grpo" / "rollouts").glob("step-000000*.parquet"):
        made, columns = read_trajectory(path)
        found |= dict(zip(made.sample_id, columns["advantage"], strict=True))
    return found


def rows(folder: Path, stage: str = "03-grpo") -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "stages" / stage / "metrics.jsonl").read_text().splitlines()]


def assert_the_same_rows(alone: list[dict[str, float]], together: list[dict[str, float]]) -> None:
    for one, other in zip(alone, together, strict=True):
        wanted = {name: value for name, value in one.items() if not name.startswith("time/")}
        assert {name: other[name] for name in wanted} == pytest.approx(wanted, rel=1e-4, abs=1e-6)


def test_every_process_took_part(runs: Path) -> None:
    for case, count in SEVERAL:
        files = {path.name for path in (runs / f"{case}-{count}" / "stages" / "03-grpo" / "rollouts").glob("*.parquet")}
        assert files == {f"step-{step:06d}.rank{rank}.parquet" for step in (0, 1) for rank in range(count)}


@pytest.mark.parametrize("count", PROCESSES["noise"][1:])
def test_plans_are_the_same(runs: Path, count: int) -> None:
    alone, together = plans(runs / "noise-1"), plans(runs / f"noise-{count}")
    assert len(alone) == 2 * 4 * 4 and all(len(digests) == 1 for digests in alone.values())
    assert len(set.union(*alone.values())) == len(alone)
    assert together == alone


@pytest.mark.parametrize(("case", "count"), SEVERAL)
def test_samples_and_their_orders_are_the_same(runs: Path, case: str, count: int) -> None:
    alone = samples(runs / f"{case}-1")
    assert len(alone) == 2 * 4 * 4 and samples(runs / f"{case}-{count}") == alone


@pytest.mark.parametrize(("case", "count"), SEVERAL)
def test_advantages_are_the_same_to_the_bit(runs: Path, case: str, count: int) -> None:
    """Of the first rollout, which is drawn and scored by the same weights whatever the number of processes."""
    alone = advantages(runs / f"{case}-1")
    assert len(alone) == 4 * 4 and any(alone.values()) and advantages(runs / f"{case}-{count}") == alone


@pytest.mark.parametrize(("case", "count"), SEVERAL)
def test_gradients_are_the_same_to_rounding(runs: Path, case: str, count: int) -> None:
    """Of the first step, whose trajectories and weights are the same."""
    one, other = (load_file(runs / f"{case}-{n}-gradients.safetensors") for n in (1, count))
    shared = {name for name in one if other[name].any()}
    assert len(shared) > 10 and shared == {name for name in one if one[name].any()}
    scale = max(float(gradient.abs().max()) for gradient in one.values())
    allowed = (1e-13 if case == "float64" else 1e-5) * scale
    for name in one:
        torch.testing.assert_close(other[name], one[name], rtol=0, atol=allowed)


@pytest.mark.parametrize(("case", "count"), SEVERAL)
def test_the_steps_are_the_same(runs: Path, case: str, count: int) -> None:
    alone, together = rows(runs / f"{case}-1"), rows(runs / f"{case}-{count}")
    assert len(alone) == len(together) == 4
    assert all(("gradient/agreement" in row) == (case == "trajectory") for row in alone)
    assert_the_same_rows(alone, together)


@pytest.mark.parametrize("count", SUPERVISED[1:])
@pytest.mark.parametrize(
    ("case", "stage", "made"),
    [
        *((codec, "01-codec", "codec/codec") for codec in ("fsq", "vq", "lfq")),
        ("fsq", "02-sft", "model/model"),
        ("fsq", "03-adapter", "model/model"),
    ],
)
def test_so_they_are_of_codecs_and_sft(runs: Path, case: str, stage: str, made: str, count: int) -> None:
    folders = [runs / f"{case}-{n}" / "stages" / stage for n in (1, count)]
    records = [json.loads((folder / "stage.json").read_text()) for folder in folders]
    assert [record["processes"] for record in records] == [1, count]
    alone, together = (rows(folder.parents[1], stage) for folder in folders)
    assert len(alone) == 4
    assert_the_same_rows(alone, together)
    one, other = (load_file(folder / f"{made}.safetensors") for folder in folders)
    for name in one:
        torch.testing.assert_close(other[name], one[name], rtol=0, atol=5e-5)  # Adam divides small by small


@pytest.mark.parametrize(("case", "count"), SEVERAL)
def test_the_weights_are_the_same(runs: Path, case: str, count: int) -> None:
    one, other = (load_file(runs / f"{case}-{n}" / "stages/03-grpo/model/model.safetensors") for n in (1, count))
    start = load_file(runs / STARTS[case] / "stages/02-sft/model/model.safetensors")
    assert max(float((one[name] - start[name]).abs().max()) for name in one) > 1e-4
    for name in one:
        torch.testing.assert_close(other[name], one[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("count", PROCESSES["float64"][1:])
def test_in_float64_everything_is_the_same_to_its_rounding(runs: Path, count: int) -> None:
    def stored(folder: Path) -> dict[str, torch.Tensor]:
        found = {}
        for path in (folder / "stages" / "03-grpo" / "rollouts").glob("*.parquet"):
            made, _ = read_trajectory(path)
            found |= dict(zip(made.sample_id, made.sampler_logp, strict=True))
        return found

    alone, together = stored(runs / "float64-1"), stored(runs / f"float64-{count}")
    assert alone.keys() == together.keys() and len(alone) == 2 * 4 * 4
    assert max(float((alone[name] - together[name]).abs().max()) for name in alone) < 1e-12
    one, other = (load_file(runs / f"float64-{n}" / "stages/03-grpo/model/model.safetensors") for n in (1, count))
    assert {weight.dtype for weight in one.values()} == {torch.float64}
    for name in one:
        torch.testing.assert_close(other[name], one[name], rtol=0, atol=1e-12)
