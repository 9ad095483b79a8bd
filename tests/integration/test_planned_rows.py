"""The sequences that a memory plan is made of are those that the stages' updates read."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.nn.modules.module import register_module_forward_hook
from transformers import PreTrainedModel

from rlmm import pipeline
from rlmm.config.recipe import Recipe, read_recipe
from rlmm.config.stages import PolicyStage
from rlmm.dry_run import Update
from rlmm.planned_data import read_data
from rlmm.planned_rows import rows_of
from rlmm.planned_update import update_of
from rlmm.train.context import own_policy, run_codec
from tests.integration.planned import RECIPES

Shapes = dict[str, list[tuple[int, int]]]
"""Stage -> rows and positions of each forward that has a gradient."""


@contextmanager
def seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[Shapes]:
    shapes: Shapes = {}
    names: list[str] = []
    run_stage = pipeline._run_stage

    def running(context: pipeline.StageContext) -> None:
        names.append(context.name)
        run_stage(context)

    def note(module: torch.nn.Module, args: object, output: object) -> None:
        hidden = getattr(output, "hidden_states", None)
        if isinstance(module, PreTrainedModel) and hidden and module.training and torch.is_grad_enabled():
            shapes.setdefault(names[-1], []).append((hidden[-1].shape[0], hidden[-1].shape[1]))

    monkeypatch.setattr(pipeline, "_run_stage", running)
    handle = register_module_forward_hook(note)
    yield shapes
    handle.remove()


def planned(recipe: Recipe, context: pipeline.StageContext) -> dict[str, Update]:
    policy = own_policy(context, run_codec(context))
    data = read_data(recipe.data, recipe.seed)
    return {
        name: update_of(stage, policy.layout, rows_of(recipe, stage, policy.spelling, data), 1)
        for name, stage in recipe.stages.items()
        if isinstance(stage, PolicyStage)
    }


def widest(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[Update, tuple[int, int]]]:
    """Of each policy stage what is planned, and rows and positions of the widest of its forwards. These do not read the
    last position, which decides nothing."""
    with seen(monkeypatch) as shapes:
        folder = pipeline.run_recipe(recipe, lambda line: None)
    updates = planned(recipe, pipeline.StageContext(recipe, folder, "sft", recipe.stages["sft"], lambda line: None))
    assert set(shapes) == set(updates)
    most = {name: max(shapes[name], key=lambda shape: shape[1]) for name in updates}
    return {name: (updates[name], (rows, read + 1)) for name, (rows, read) in most.items()}


@pytest.mark.parametrize("name", ["tiny_thought", "tiny_pair_dpo"])
def test_of_generated_rows(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = read_recipe(RECIPES / f"{name}.yaml", [f"run_dir={tmp_path / 'run'}"])
    for stage, (update, (rows, length)) in widest(recipe, monkeypatch).items():
        assert update.rows == rows, stage
        # A text that the policy writes may end before its limit, and of so few rows the longest need not be drawn.
        assert update.length <= length + 12, stage
        # Words that a random policy draws side by side are spelled by their letters when they are learned from.
        assert length <= update.length or stage == "dpo", stage


ROWS = 12
LONG = "a red circle and two blue squares " * 8


def pictures(folder: Path) -> Path:
    """Rows whose prompts are of many lengths, with pictures and texts of several kinds."""
    for number in range(ROWS):
        Image.new("RGB", (48, 48), (20 * number, 0, 0)).save(folder / f"{number}.png")
    said = [{"prompt": LONG[: 20 * number + 3], "image": f"{number}.png"} for number in range(ROWS)]
    said += [{"prompt": "", "image": "0.png"}]  # left out, and counted
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, said)))
    (folder / "held_out.jsonl").write_text(
        json.dumps({"prompt": "red", "image": "0.png", "about": "0.png", "text": "a"})
    )
    texts = [
        {"prompt": "what is shown", "about": f"{number}.png", "text": LONG[: 10 * number + 3]} for number in range(ROWS)
    ]
    (folder / "texts.jsonl").write_text("\n".join(map(json.dumps, texts)))
    pairs = [
        {"prompt": LONG[:9], "chosen": "yes", "rejected": "no " * (3 * number + 1), "images": [f"{number}.png"]}
        for number in range(ROWS)
    ]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    return folder


def test_of_rows_in_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = pictures(tmp_path)
    training = "steps: 3, learning_rate: 1.0e-3"
    own = f"kind: rows, image_size: [48, 48], held_out_path: {folder / 'held_out.jsonl'}, cache_dir: {folder / 'cache'}"
    recipe = read_recipe(
        RECIPES / "tiny_pair_dpo.yaml",
        [
            f"run_dir={tmp_path / 'run'}",
            f"data={{{own}, path: {folder / 'rows.jsonl'}, target_column: image, max_excluded_share: 0.1}}",
            "policy.max_positions=400",
            f"understanding={{data: {{{own}, path: {folder / 'texts.jsonl'}, sources_column: about, "
            "text_column: text}, "
            "answer: {length_limit: 8}, rewards: {terms: [{name: wer}]}}",
            f"stages={{codec: {{kind: codec, batch_size: 8, {training}}}, "
            f"sft: {{kind: sft, batch_size: {ROWS}, micro_batch_size: 4, {training}}}, "
            f"mixed: {{kind: sft, batch_size: {ROWS}, micro_batch_size: 6, understanding_share: 0.25, {training}}}, "
            f"grpo: {{kind: grpo, prompts_per_step: {ROWS}, samples_per_prompt: 2, micro_batch_size: 8, {training}}}, "
            f"dpo: {{kind: dpo, data: {{path: {folder / 'pairs.jsonl'}}}, batch_size: {ROWS}, micro_batch_size: 6, "
            f"{training}}}}}",
        ],
    )
    found = widest(recipe, monkeypatch)
    for stage, (update, shape) in found.items():
        assert (update.rows, update.length) == shape, stage
    assert found["dpo"][0].decided == 0 and found["grpo"][0].text == 0
