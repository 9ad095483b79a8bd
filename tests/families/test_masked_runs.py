"""A whole run from each masked family's class: SFT, guided GRPO with LoRA, evaluation, export, and back."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from rlmm.config.policy import CheckpointPolicy
from rlmm.config.recipe import Recipe, validate_recipe
from rlmm.config.sampling import Sampling
from rlmm.memory import memory_plans
from rlmm.pipeline import run_recipe
from rlmm.policies.families.loading import load_policy, model_class
from rlmm.run_folder import RunFolder
from rlmm.sampling import draw_samples
from rlmm.train.metrics import MetricsFile
from tests.families.masked_checkpoints import MASKED, tiny

pytestmark = pytest.mark.long

TRAINED = {"steps": 2, "learning_rate": 1.0e-3, "micro_batch_size": 2, "warmup_steps": 0}
GRPO: dict[str, Any] = {
    "kind": "grpo", **TRAINED, "prompts_per_step": 2, "samples_per_prompt": 2, "lora": {"rank": 4, "alpha": 8},
    "sampling": {"guidance_scale": 2.0, "unmasking": {"steps": 3}},
    "gates": {"duplicate_share": 1.0, "flat_share": 1.0},
}  # fmt: skip
STAGES: dict[str, Any] = {
    "sft": {"kind": "sft", **TRAINED, "batch_size": 4, "prompt_dropout": 0.2, "text_weight": 0.1,
            "noise": {"schedule": "cosine", "weighting": "mean"}},
    "grpo": GRPO,
    "evaluation": {"kind": "eval", "arms": ["sft", "grpo"], "prompts": 4, "temperatures": [1.0],
                   "unmasking": {"steps": 4, "order": "noisy_confidence", "noise": 1.0}},
    "export": {"kind": "export", "start_from": "grpo"},
}  # fmt: skip


def stages(name: str) -> dict[str, Any]:
    """Show-o's text is causal, and cannot be learned under masks."""
    return STAGES | ({"sft": STAGES["sft"] | {"text_weight": 0}} if name == "show_o" else {})


def recipe(name: str, folder: Path, stages: dict[str, Any]) -> Recipe:
    return validate_recipe(
        {
            "name": name, "run_dir": str(folder),
            "data": {"kind": "scenes", "train_images": 8, "held_out": 8, "prompts": 8},
            "policy": tiny(name).model_dump() | {"image_size": [48, 48]},
            "rewards": {"terms": [{"function": "tests/recipes/rewards.py:left_darkness", "label": "dark"}]},
            "held_out": {"terms": [{"name": "scenes", "label": "verifier"}]},
            "stages": stages,
        },
        name,
    )  # fmt: skip


@pytest.fixture(scope="module", params=MASKED)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, RunFolder]:
    name, folder = request.param, tmp_path_factory.mktemp(request.param) / "run"
    return name, run_recipe(recipe(name, folder, stages(name)), lambda line: None)


def test_the_adapter_on_its_base_is_the_merged_model_in_the_class_that_the_card_names(
    run: tuple[str, RunFolder],
) -> None:
    name, folder = run
    package, kind_name = model_class(tiny(name).path)
    kind = getattr(importlib.import_module(package), kind_name)
    merged = load_policy(folder.path / "merged")
    on_base = PeftModel.from_pretrained(kind.from_pretrained(folder.path / "base"), str(folder.path / "adapter"))
    prefix = merged.layout.prefix(merged.encode_prompt("a red circle"))
    ids = torch.tensor([[*prefix, *[merged.layout.mask or -1] * merged.layout.grid.length]])
    with torch.no_grad():
        wanted, found = (model.eval()(input_ids=ids).logits for model in (merged.model, on_base))
        base = kind.from_pretrained(folder.path / "base").eval()(input_ids=ids).logits
        hidden = merged.hidden(ids, torch.ones_like(ids, dtype=torch.bool))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert float((found - base).abs().max()) > 1e-4
    ours = merged.head(hidden[0], merged.layout.image)
    torch.testing.assert_close(ours, wanted[0, :, slice(*merged.layout.image)], rtol=1e-4, atol=1e-5)
    assert f"from {package} import {kind_name}" in (folder.path / "adapter" / "README.md").read_text()


def test_sampler_and_trainer_agree_in_the_run(run: tuple[str, RunFolder]) -> None:
    name, folder = run
    rows = MetricsFile(folder.stage("grpo") / "metrics.jsonl").read()
    assert len(rows) == 2 and all(row["mismatch/max"] < 1e-4 for row in rows)
    modality = "image" if name == "show_o" else "text"
    losses = [row[f"loss/{modality}"] for row in MetricsFile(folder.stage("sft") / "metrics.jsonl").read()]
    assert len(losses) == 2 and all(value > 5 for value in losses)  # nats a token, over thousands of them


def test_what_a_run_made_draws(run: tuple[str, RunFolder]) -> None:
    _, folder = run
    source = CheckpointPolicy(path=str(folder.path / "merged"))
    law = Sampling.model_validate({"guidance_scale": 2.0, "unmasking": {"steps": 4, "order": "random"}})
    sheet = draw_samples(source, ["a red circle"], 2, law).grid()
    assert sheet.size == (2 * 52 + 4, 52 + 4)
    assert len({sheet.getpixel((x, y)) for x in range(4, 52) for y in range(4, 52)}) > 20


@pytest.mark.parametrize("name", MASKED)
def test_all_weights_train_but_for_the_heads_other_rows(name: str, tmp_path: Path) -> None:
    full = {k: v for k, v in GRPO.items() if k != "lora"} | {"prompts_per_step": 4, "samples_per_prompt": 4}
    made = run_recipe(recipe(name, tmp_path / "run", {"grpo": full}), lambda line: None)
    before = dict(load_policy(tiny(name).path, tiny(name)).base.named_parameters())
    after = load_policy(made.stage("grpo") / "model")
    moved = {n: not weight.equal(before[n]) for n, weight in after.base.named_parameters()}
    assert all(moved.values())
    own = after.output_head(after.layout.image).linear.weight
    head = next(n for n, weight in after.base.named_parameters() if weight is own)
    low, high = after.layout.image
    rows = dict(after.base.named_parameters())[head]
    assert rows[:low].equal(before[head][:low]) and not rows[low:high].equal(before[head][low:high])


@pytest.mark.parametrize("name", MASKED)
def test_the_memory_plan_reads_the_configuration(name: str, tmp_path: Path) -> None:
    plans = memory_plans(recipe(name, tmp_path, stages(name)))
    assert [plan.stage for plan in plans] == ["sft", "grpo"] and all(plan.total > 0 for plan in plans)
