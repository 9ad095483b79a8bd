"""Files that vanish or break while a run goes or between two starts of it: named, and a way out that works."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rlmm.config.data import RowsData
from rlmm.config.recipe import Recipe
from rlmm.pipeline import run_folder, run_recipe
from rlmm.train.faults import StorageError
from rlmm.train.grpo_source import GrpoSource
from rlmm.train.trainer import StageTrainer
from rollouts.torch_engine.causal import TorchEngine

LONG = pytest.mark.long
SIX_STEPS = ("stages.grpo.checkpoint_every=1", "stages.grpo.held_out_every=0")
"""Two updates a rollout: checkpoints of odd steps lie inside one."""


class Killed(BaseException):
    """Stands in for a kill."""


def interrupted(monkeypatch: pytest.MonkeyPatch, owner: type, name: str, call: int, event: Callable[[], None]) -> None:
    original, calls = getattr(owner, name), 0

    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            event()
        return original(self, *args, **kwargs)

    monkeypatch.setattr(owner, name, wrapped)


def die() -> None:
    raise Killed


def figures(recipe: Recipe) -> list[dict[str, Any]]:
    lines = (run_folder(recipe).stage("grpo") / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith("time/")} for line in lines]


def killed(recipe: Recipe, loss: int, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """The recipe, whose run was killed at that call of the loss."""
    with monkeypatch.context() as patch:
        interrupted(patch, StageTrainer, "compute_loss", loss, die)
        with pytest.raises(Killed):
            run_recipe(recipe, lambda line: None)
    return recipe


@pytest.fixture
def killed_inside_a_rollout(variant: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """Killed in its sixth step: its newest checkpoint, of the fifth, lies inside the third rollout."""
    return killed(variant(*SIX_STEPS), 11, monkeypatch)


def test_a_lost_rollout_sends_the_run_back_to_the_checkpoint_before_it(
    killed_inside_a_rollout: Recipe, variant: Callable[..., Recipe], tmp_path: Path
) -> None:
    recipe, said = killed_inside_a_rollout, []
    path = run_folder(recipe).stage("grpo") / "rollouts" / "step-000002.parquet"
    whole = path.read_bytes()
    path.write_bytes(whole[:-200])
    run_recipe(recipe, said.append)
    (passed,) = [line for line in said if line.startswith("passing over")]
    assert passed.startswith("passing over checkpoint-5: it lies inside rollout 2, and that cannot be read back: ")
    assert "resuming from step 4 of 6" in said
    assert path.read_bytes() == whole  # made again, and the same
    straight = variant(*SIX_STEPS, f"run_dir={tmp_path / 'straight'}")
    run_recipe(straight, lambda line: None)
    assert figures(recipe) == figures(straight)
    check_curves(run_folder(recipe).stage("grpo") / "tensorboard")


def check_curves(folder: Path) -> None:
    """Of two starts, the second of which began at a step that the first had passed: every step is there once."""
    assert len(list(folder.iterdir())) == 2
    events = EventAccumulator(str(folder)).Reload()
    assert [event.step for event in events.Scalars("train/reward/mean")] == [1, 3, 5]
    assert [event.step for event in events.Scalars("train/grad_norm")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.long
def test_without_a_checkpoint_before_it_the_stage_begins_anew(
    variant: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checkpoints of every third step, of which the first lies inside the second rollout."""
    recipe, said = variant("stages.grpo.checkpoint_every=3"), []
    with monkeypatch.context() as patch:
        interrupted(patch, StageTrainer, "compute_loss", 9, die)
        with pytest.raises(Killed):
            run_recipe(recipe, lambda line: None)
    folder = run_folder(recipe).stage("grpo")
    (folder / "rollouts" / "step-000001.parquet").unlink()
    checkpoints = []
    with monkeypatch.context() as patch:
        interrupted(
            patch, GrpoSource, "make", 1, lambda: checkpoints.append(sorted((folder / "checkpoints").glob("*")))
        )
        run_recipe(recipe, said.append)
    assert any(line.startswith("passing over checkpoint-3: it lies inside rollout 1") for line in said)
    assert checkpoints == [[]]  # one of a run that is not followed would be taken by the next start
    assert [row["step"] for row in figures(recipe)] == [1, 2, 3, 4, 5, 6]


def test_a_full_disk_in_a_rollout_is_named_and_the_run_goes_on_when_there_is_room(
    variant: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = variant(*SIX_STEPS)
    folder = run_folder(recipe).stage("grpo") / "rollouts"
    with monkeypatch.context() as patch:
        interrupted(patch, GrpoSource, "make", 3, lambda: (folder / "step-000002.partial").symlink_to("/dev/full"))
        with pytest.raises(StorageError, match=r"rollout 2: .*step-000002.*the disk is full"):
            run_recipe(recipe, lambda line: None)
    (folder / "killed.partial").write_bytes(b"half")
    said: list[str] = []
    run_recipe(recipe, said.append)
    assert "removed 1 half-written file(s) of a process that was ended" in said
    assert "resuming from step 4 of 6" in said
    assert [row["step"] for row in figures(recipe)] == [1, 2, 3, 4, 5, 6]


@pytest.fixture
def edits(variant: Callable[..., Recipe], tmp_path: Path) -> Recipe:
    """Prompts with a source image each, in files of their own beside the table."""
    folder = tmp_path / "rows"
    folder.mkdir()
    names = [f"{i}.png" for i in range(6)]
    for i, name in enumerate(names):
        Image.new("L", (96, 32), 40 * i).save(folder / name)
    table = pa.table({"prompt": [f"word{i}" for i in range(6)], "source": names})
    pq.write_table(table, folder / "rows.parquet")
    data = RowsData(
        path=str(folder / "rows.parquet"),
        held_out_path=str(folder / "rows.parquet"),
        prompt_column="prompt",
        sources_column="source",
        image_size=(96, 32),
        image_mode="L",
        max_excluded_share=1.0,
        cache_dir=str(tmp_path / "cache"),
    )
    return variant(*SIX_STEPS, "stages.grpo.steps=4").model_copy(update={"data": data})


def test_an_image_that_vanishes_is_named_and_put_back_the_run_goes_on(
    edits: Recipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder, away = tmp_path / "rows", tmp_path / "away"

    def vanish() -> None:
        away.mkdir()
        for path in folder.glob("*.png"):
            path.rename(away / path.name)

    with monkeypatch.context() as patch:
        interrupted(patch, GrpoSource, "make", 2, vanish)
        with pytest.raises(ValueError, match=r"row \d of .*rows.parquet could be used at the start.*missing.*png"):
            run_recipe(edits, lambda line: None)
    for path in away.iterdir():
        path.rename(folder / path.name)
    said: list[str] = []
    run_recipe(edits, said.append)
    assert "resuming from step 2 of 4" in said and run_folder(edits).done("grpo")


def test_a_table_that_vanishes_is_named(edits: Recipe, tmp_path: Path) -> None:
    (tmp_path / "rows" / "rows.parquet").unlink()
    with pytest.raises(ValueError, match=r"there is no file .*rows.parquet"):
        run_recipe(edits, lambda line: None)


def test_a_torn_table_is_named(edits: Recipe, tmp_path: Path) -> None:
    path = tmp_path / "rows" / "rows.parquet"
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"rows.parquet .*cannot be read as parquet"):
        run_recipe(edits, lambda line: None)


def counted_rollouts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Fills with 1 for every call of the engine."""
    made: list[int] = []
    generate = TorchEngine.generate

    def counting(self: TorchEngine, *args: Any) -> Any:
        made.append(1)
        return generate(self, *args)

    monkeypatch.setattr(TorchEngine, "generate", counting)
    return made


@pytest.fixture
def killed_before_a_checkpoint(variant: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """Killed in its fifth step, of which the rollout is finished; the newest checkpoint is of the fourth."""
    return killed(variant("stages.grpo.checkpoint_every=2"), 10, monkeypatch)


def test_a_finished_rollout_is_read_back_and_changes_nothing(
    killed_before_a_checkpoint: Recipe, variant: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    said: list[str] = []
    with monkeypatch.context() as patch:
        made = counted_rollouts(patch)
        run_recipe(killed_before_a_checkpoint, said.append)
    assert not made and "rollout 2 is read back: it was finished, and drawn by these weights" in said
    straight = variant("stages.grpo.checkpoint_every=2", f"run_dir={tmp_path / 'straight'}")
    run_recipe(straight, lambda line: None)
    assert figures(killed_before_a_checkpoint) == figures(straight)
    weights = [run_folder(recipe).stage("grpo") / "model" for recipe in (killed_before_a_checkpoint, straight)]
    one, other = ((folder / "model.safetensors").read_bytes() for folder in weights)
    assert one == other


@pytest.mark.parametrize("harm", ["weights", pytest.param("gates", marks=LONG), pytest.param("unfinished", marks=LONG)])
def test_a_rollout_of_other_weights_or_gates_is_drawn_again(
    killed_before_a_checkpoint: Recipe, monkeypatch: pytest.MonkeyPatch, harm: str
) -> None:
    recipe, said = killed_before_a_checkpoint, []
    record = run_folder(recipe).stage("grpo") / "rollouts" / "step-000002.json"
    if harm == "weights":
        record.write_text(json.dumps(json.loads(record.read_text()) | {"weights": "others"}))
    elif harm == "unfinished":
        record.unlink()
    else:
        stage = recipe.stages["grpo"]
        gates = stage.gates.model_copy(update={"patience": 9})  # pyrefly: ignore
        recipe = recipe.model_copy(update={"stages": {"grpo": stage.model_copy(update={"gates": gates})}})
    made = counted_rollouts(monkeypatch)
    run_recipe(recipe, said.append)
    assert len(made) == 1 and not any("is read back" in line for line in said)
