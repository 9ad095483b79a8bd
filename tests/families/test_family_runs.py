"""A whole run from each published class: SFT on edits, GRPO with guidance and LoRA, evaluation, export, and back."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from PIL import Image

from rlmm.config.policy import CheckpointPolicy
from rlmm.config.recipe import Recipe, RecipeError, validate_recipe
from rlmm.config.sampling import Sampling
from rlmm.memory import memory_plans
from rlmm.pipeline import run_recipe
from rlmm.policies.families.loading import layout_of, load_policy
from rlmm.run_folder import RunFolder
from rlmm.sampling import draw_samples
from tests.families.checkpoints import DIFFUSERS, PROMPTS, SIZES, prompts, tiny

CLASSES = {
    "emu3": "Emu3ForConditionalGeneration",
    "chameleon": "ChameleonForConditionalGeneration",
    "lumina_mgpt": "ChameleonForConditionalGeneration",
    "janus": "JanusForConditionalGeneration",
    "llamagen": "LlamaGenForImageGeneration",
    "llamagen_text": "LlamaGenForImageGeneration",
    "glm_image": "GlmImageForConditionalGeneration",
    "glm_image_edit": "GlmImageForConditionalGeneration",
    "simplear": "Qwen2ForCausalLM",
    "blip3o_next": "Qwen3ForCausalLM",
}
TRAINED = {"steps": 2, "learning_rate": 1.0e-3, "micro_batch_size": 2, "warmup_steps": 0}
HELD_OUT = {
    False: {"name": "scenes", "label": "verifier"},
    True: {"function": "tests/recipes/rewards.py:left_darkness", "label": "verifier"},
}
GRPO: dict[str, Any] = {
    "kind": "grpo", **TRAINED, "prompts_per_step": 2, "samples_per_prompt": 2, "lora": {"rank": 4, "alpha": 8},
    "sampling": {"guidance_scale": 2.0, "source_scale": 1.5}, "gates": {"duplicate_share": 1.0, "flat_share": 1.0},
}  # fmt: skip


def edits(name: str) -> bool:
    return layout_of(tiny(name).path, tiny(name)).takes_sources


def takes_scenes(name: str) -> bool:
    """Some take no text, and Lumina-mGPT's sides are multiples of 32."""
    return name not in PROMPTS and SIZES[name] == (48, 48)


def data(name: str, folder: Path) -> dict[str, Any]:
    """Scenes, edits of them where a family takes source images; else rows with its prompts."""
    if takes_scenes(name):
        variant = "edit" if edits(name) else "text_to_image"
        return {"kind": "scenes", "variant": variant, "train_images": 8, "held_out": 8, "prompts": 8}
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"prompt": str(number), "image": f"{number}.png"} for number in range(16)]
    for row in rows:
        Image.effect_noise(SIZES[name], 60).convert("RGB").save(folder / row["image"])
    (folder / "rows.json").write_text(json.dumps(rows))
    columns = {"target_column": "image"} | ({"sources_column": "image"} if edits(name) else {})
    return {"kind": "rows", "path": str(folder / "rows.json"), **columns, "image_size": SIZES[name],
            "held_out_share": 0.4}  # fmt: skip


def law(name: str) -> dict[str, Any]:
    """Two scales where there are source images to have one."""
    return {"guidance_scale": 2.0} | ({"source_scale": 1.5} if edits(name) else {})


def recipe(name: str, folder: Path, stages: dict[str, Any], **policy: Any) -> Recipe:
    return validate_recipe(
        {
            "name": name, "run_dir": str(folder),
            "data": data(name, folder.parent / "rows"),
            "policy": tiny(name).model_dump() | policy,
            "rewards": {"terms": [{"function": "tests/recipes/rewards.py:left_darkness", "label": "dark"}]},
            "held_out": {"terms": [HELD_OUT[not takes_scenes(name)]]},
            "stages": stages,
        },
        name,
    )  # fmt: skip


LONG = ("glm_image", "lumina_mgpt", "chameleon", "llamagen", "simplear")
"""One much like each is in the suite."""


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=[pytest.mark.long] * (name in LONG)) for name in CLASSES]
)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, RunFolder]:
    if request.param.startswith("glm_image") and not DIFFUSERS:
        pytest.skip("diffusers, which has the decoder, is not installed")
    name, folder = request.param, tmp_path_factory.mktemp(request.param) / "run"
    stages = {
        "sft": {"kind": "sft", **TRAINED, "batch_size": 4, "prompt_dropout": 0.2},
        "grpo": GRPO | {"sampling": law(name)},
        "evaluation": {"kind": "eval", "arms": ["sft", "grpo"], "prompts": 4, "temperatures": [1.0]},
        "export": {"kind": "export", "start_from": "grpo"},
    }
    return name, run_recipe(recipe(name, folder, stages), lambda line: None)


def test_the_adapter_on_its_base_is_the_merged_model_in_plain_transformers_and_peft(
    run: tuple[str, RunFolder],
) -> None:
    name, folder = run
    merged = load_policy(folder.path / "merged")
    kind: Any = type(merged.base)
    assert kind.__name__ == CLASSES[name]
    on_base = PeftModel.from_pretrained(kind.from_pretrained(folder.path / "base"), str(folder.path / "adapter"))
    ids = torch.tensor([merged.layout.prefix(merged.encode_prompt(prompts(name)[0]))])
    with torch.no_grad():
        wanted, found = (model.eval()(input_ids=ids).logits for model in (merged.model, on_base))
        base = kind.from_pretrained(folder.path / "base").eval()(input_ids=ids).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert float((found - base).abs().max()) > 1e-4
    card = (folder.path / "adapter" / "README.md").read_text()
    loader = "AutoModelForCausalLM" if CLASSES[name].startswith("Qwen") else CLASSES[name]
    assert f"from {'transformers' if hasattr(transformers, loader) else kind.__module__} import {loader}" in card


def test_the_image_tokenizer_is_the_published_one_to_the_end(run: tuple[str, RunFolder]) -> None:
    name, folder = run
    before, after = load_policy(tiny(name).path, tiny(name)), load_policy(folder.path / "merged")
    frozen = {n: w for n, w in before.base.named_parameters() if n.startswith(before.frozen_parts)}
    moved = dict(after.base.named_parameters())
    assert bool(frozen) == bool(before.frozen_parts) and all(moved[n].equal(w) for n, w in frozen.items())
    assert any(not moved[n].equal(w) for n, w in before.base.named_parameters() if n not in frozen)


def test_what_a_run_made_draws(run: tuple[str, RunFolder]) -> None:
    name, folder = run
    source = CheckpointPolicy(path=str(folder.path / "merged"))
    sheet = draw_samples(source, prompts(name)[:1], 2, Sampling(guidance_scale=2.0)).grid()
    height, width = SIZES[name]
    assert sheet.size == (2 * (width + 4) + 4, height + 4 + 4)
    assert len({sheet.getpixel((x, y)) for x in range(4, 4 + width) for y in range(4, 4 + height)}) > 20


def test_images_of_hidden_states_take_the_whole_policy_while_a_server_draws(tmp_path: Path) -> None:
    """Under ZeRO-3, where the engine has a copy of the weights: `Roller` holds the policy whole to decode."""
    stages = {"grpo": GRPO | {"engine": {"kind": "vllm_server", "kv_megabytes": 64}, "sampling": {}}}
    parts = {"deepspeed": "configs/deepspeed/zero3.json", "micro_batch_size": 1}

    def sampling(name: str) -> tuple[int, int]:
        """Of two processes, and the weights."""
        (plan,) = memory_plans(recipe(name, tmp_path / name, {"grpo": stages["grpo"] | parts}), 2)
        (alone,) = memory_plans(recipe(name, tmp_path / name, stages), 2)
        return plan.sampling + plan.gradients + min(alone.weights, plan.exchange) - (64 << 20), alone.weights

    assert sampling("blip3o_next")[0] == pytest.approx(sampling("blip3o_next")[1], rel=0.1)
    assert sampling("simplear")[0] < 0.1 * sampling("simplear")[1]


@pytest.mark.long
def test_an_adapter_from_a_folder_brings_it_along_and_frozen_weights_take_half_the_memory(tmp_path: Path) -> None:
    stages = {"grpo": GRPO | {"precision": "bfloat16"}, "export": {"kind": "export", "start_from": "grpo"}}
    made = recipe("janus", tmp_path / "run", stages, dtype="bfloat16")
    whole = recipe("janus", tmp_path / "run", stages)
    assert memory_plans(made)[0].weights < 0.6 * memory_plans(whole)[0].weights
    folder = run_recipe(made, lambda line: None)
    assert '"../base"' in (folder.path / "adapter" / "adapter_config.json").read_text()
    assert load_policy(folder.path / "base", tiny("janus")).layout == load_policy(folder.path / "merged").layout
    assert load_policy(folder.path / "merged").base.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("stage", "says"),
    [
        ({k: v for k, v in GRPO.items() if k != "lora"} | {"precision": "bfloat16"}, "small updates round away"),
        (GRPO, "set precision: bfloat16"),
    ],
)
def test_weights_in_bfloat16_are_frozen_and_known_to_the_gates(stage: Any, says: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=says):
        recipe("janus", tmp_path, {"grpo": stage}, dtype="bfloat16")


def test_all_weights_that_draw_are_trained_and_no_others(tmp_path: Path) -> None:
    full = {k: v for k, v in GRPO.items() if k != "lora"} | {"prompts_per_step": 4, "samples_per_prompt": 4}
    run = run_recipe(recipe("janus", tmp_path / "run", {"grpo": full}), lambda line: None)
    before = dict(load_policy(tiny("janus").path, tiny("janus")).base.named_parameters())
    still = ("lm_head.", "model.vqmodel.", "model.vision_model.", "model.aligner.")
    # Several processes wait for the gradient of whatever asks for one.
    assert all(weight.requires_grad != name.startswith(still) for name, weight in before.items())
    after = dict(load_policy(run.stage("grpo") / "model").base.named_parameters())
    moved = {name for name, weight in after.items() if not weight.equal(before[name])}
    assert {"model.generation_head.vision_head.weight", "model.generation_aligner.fc1.weight"} <= moved
    assert not any(name.startswith(still) for name in moved)


def test_a_checkpoint_with_a_codec_section_is_refused(tmp_path: Path) -> None:
    codec = {"kind": "fsq", "image_size": [48, 48]}
    with pytest.raises(RecipeError, match="a checkpoint brings its own codec"):
        validate_recipe(recipe("janus", tmp_path, {"grpo": GRPO}).model_dump(mode="json") | {"codec": codec}, "x")
