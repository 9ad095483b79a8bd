"""What a run leaves behind, and what a second call does with it."""

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from rlmm.config.policy import CheckpointPolicy
from rlmm.config.recipe import Recipe, read_recipe
from rlmm.config.sampling import Sampling
from rlmm.pipeline import run_recipe
from rlmm.policies.families.loading import load_policy
from rlmm.sampling import draw_samples
from rlmm.train.metrics import MetricsFile
from rollouts.store import read_trajectory
from tests.integration.conftest import TINY, TinyRun


def test_every_stage_is_done_and_the_page_is_there(tiny_run: TinyRun) -> None:
    assert all(tiny_run.folder.done(name) for name in tiny_run.recipe.stages)
    assert list((tiny_run.folder.stage("grpo") / "tensorboard").glob("events.*"))
    for name in ("config.yaml", "environment.json", "report.html", "adapter/adapter_config.json", "merged/README.md"):
        assert (tiny_run.folder.path / name).is_file()
    for name in ("codec", "sft", "grpo"):
        assert not (tiny_run.folder.stage(name) / "checkpoints").exists()


def test_the_grpo_log_says_what_matters(tiny_run: TinyRun) -> None:
    rows = MetricsFile(tiny_run.folder.stage("grpo") / "metrics.jsonl").read()
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    rollouts = [row for row in rows if "reward/mean" in row]  # two updates a rollout
    assert len(rollouts) == 3
    for row in rollouts:
        assert row["mismatch/max"] < 1e-5 and row["mismatch/mean"] <= row["mismatch/max"]
        assert {"group/flat_share", "sample/duplicate_share", "diversity", "time/rollout", "time/score"} <= row.keys()
    for row in rows:
        assert {"kl", "entropy", "clip_fraction", "ess", "grad_norm", "learning_rate", "loss"} <= row.keys()
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-6)  # the adapter starts at zero
    assert ["held_out/left_darkness/mean" in row for row in rows] == [True, False, False, False, True, False]


def test_rollouts_are_stored_with_images_rewards_and_advantages(tiny_run: TinyRun) -> None:
    path = tiny_run.folder.stage("grpo") / "rollouts" / "step-000000.parquet"
    trajectory, columns = read_trajectory(path)
    assert len(trajectory) == 8 and trajectory.spans[0].law.guidance_scale == 1.5
    assert set(trajectory.streams) == {"cond", "uncond"}
    assert Image.open(io.BytesIO(columns["image"][0])).size == (96, 32)
    groups = {group: [i for i, g in enumerate(trajectory.group_id) if g == group] for group in trajectory.group_id}
    for rows in groups.values():
        assert sum(columns["advantage"][i] for i in rows) == pytest.approx(0, abs=1e-5)
        best = max(rows, key=lambda i: columns["reward"][i])
        assert columns["advantage"][best] == max(columns["advantage"][i] for i in rows)


def test_a_second_call_does_nothing_and_another_config_is_refused(tiny_run: TinyRun) -> None:
    said: list[str] = []
    run_recipe(tiny_run.recipe, said.append)
    assert said == [f"{name}: done before" for name in tiny_run.recipe.stages]
    changed = read_recipe(TINY, [f"run_dir={tiny_run.folder.path}", "stages.grpo.learning_rate=0.5"])
    with pytest.raises(ValueError, match=r"stages\.grpo\.learning_rate: 0\.001 -> 0\.5"):
        run_recipe(changed, said.append)


PLAIN_PEFT = """
import json, sys, torch
from transformers import AutoModelForCausalLM
from peft import PeftModel
ids, prefix, image, base, adapter = json.loads(sys.stdin.read())
model = AutoModelForCausalLM.from_pretrained(base)
if adapter:
    model = PeftModel.from_pretrained(model, adapter)
assert not any(name.split(".")[0] in ("rlmm", "rollouts", "rewards") for name in sys.modules)
with torch.no_grad():
    logits = model(torch.tensor([ids])).logits[0, prefix - 1 : -1, image[0] : image[1]]
tokens = torch.tensor(ids[prefix:]) - image[0]
print(json.dumps(logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0].tolist()))
"""


@pytest.mark.parametrize("export", ["adapter", "merged"])
def test_exports_load_in_plain_peft_and_transformers_with_the_same_log_probs(tiny_run: TinyRun, export: str) -> None:
    run = tiny_run.folder
    policy = load_policy(run.stage("grpo") / "model")
    layout = policy.layout
    prefix = list(layout.prefix(policy.encode_prompt('render "CAT"')))
    codes = [layout.image[0] + (7 * i) % 64 for i in range(layout.grid.length)]
    base, adapter = (run.path / "base", run.path / "adapter") if export == "adapter" else (run.path / "merged", "")
    request = [[*prefix, *codes], len(prefix), layout.image, str(base), str(adapter)]
    answer = subprocess.run(
        [sys.executable, "-c", PLAIN_PEFT],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        cwd="/",
        timeout=120,
    )
    assert answer.returncode == 0, answer.stderr[-3000:]
    with torch.no_grad():
        hidden = policy.hidden(
            torch.tensor([[*prefix, *codes]]), torch.ones(1, len(prefix) + len(codes), dtype=torch.bool)
        )
        logp = policy.head(hidden[0, len(prefix) - 1 : -1], layout.image).log_softmax(-1)
    expected = logp.gather(-1, torch.tensor(codes)[:, None] - layout.image[0])[:, 0]
    torch.testing.assert_close(torch.tensor(json.loads(answer.stdout)), expected, rtol=0, atol=1e-5)


def test_the_adapter_changes_the_model(tiny_run: TinyRun) -> None:
    before, after = (dict(load_policy(tiny_run.folder.path / n).named_weights()) for n in ("base", "merged"))
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_the_evaluation_has_rows_intervals_and_contrasts(tiny_run: TinyRun) -> None:
    record = json.loads((tiny_run.folder.stage("evaluation") / "eval.json").read_text())
    places = {(row["arm"], row["temperature"], row["judge"]) for row in record["rows"]}
    assert len(places) == 2 * 2 * 2
    assert all(row["low"] <= row["mean"] <= row["high"] for row in record["rows"])
    assert {(row["arm"], row["baseline"], row["at"]) for row in record["contrasts"]} == {
        ("grpo", "sft", at) for at in ("1.0", "0.5", "best")
    }
    assert [row["stages"] for row in record["compute"]] == [["sft"], ["sft", "grpo"]]


def test_sampling_is_repeatable_and_refuses_an_empty_prompt(tiny_run: TinyRun) -> None:
    source = CheckpointPolicy(path=str(tiny_run.folder.path / "merged"))
    law = Sampling(guidance_scale=2.0)
    first, again = (draw_samples(source, ['render "A"', "b"], 3, law, seed=5).grid() for _ in range(2))
    assert first.tobytes() == again.tobytes() and first.size == (3 * 100 + 4, 2 * 36 + 4)
    with pytest.raises(ValueError, match="prompt 2 is empty"):
        draw_samples(source, ["a", " "], 1, Sampling())


def final_weights(recipe: Recipe) -> dict[str, torch.Tensor]:
    folder = run_recipe(recipe, lambda line: None)
    return dict(load_policy(folder.stage("grpo") / "model").named_weights())


def test_the_micro_batch_size_does_not_change_the_update(variant: Callable[..., Recipe], tmp_path: Path) -> None:
    short = ("stages.grpo.steps=2", "stages.grpo.objective.name=dapo")
    small = final_weights(variant(*short, "stages.grpo.micro_batch_size=1", f"run_dir={tmp_path / 'a'}"))
    large = final_weights(variant(*short, "stages.grpo.micro_batch_size=4", f"run_dir={tmp_path / 'b'}"))
    for name, weight in small.items():
        torch.testing.assert_close(weight, large[name], rtol=0, atol=2e-6)


def test_gradient_checkpointing_does_not_change_the_update(variant: Callable[..., Recipe], tmp_path: Path) -> None:
    plain = final_weights(variant("stages.grpo.steps=2", f"run_dir={tmp_path / 'a'}"))
    saving = "stages.grpo.gradient_checkpointing=true"
    checkpointed = final_weights(variant("stages.grpo.steps=2", saving, f"run_dir={tmp_path / 'b'}"))
    for name, weight in plain.items():
        torch.testing.assert_close(weight, checkpointed[name], rtol=0, atol=1e-6)


def test_bfloat16_runs_within_its_own_tolerance_and_really_rounds(
    variant: Callable[..., Recipe], tmp_path: Path
) -> None:
    first = {}
    for precision in ("float32", "bfloat16"):
        asked = ("stages.grpo.steps=2", f"stages.grpo.precision={precision}", f"run_dir={tmp_path / precision}")
        folder = run_recipe(variant(*asked), lambda line: None)
        first[precision] = MetricsFile(folder.stage("grpo") / "metrics.jsonl").read()[0]
    assert first["bfloat16"]["mismatch/mean"] < 0.02
    # Same weights, same seeds. On some processors sampler and trainer round alike, so the mismatch itself may be 0.
    assert abs(first["bfloat16"]["entropy"] - first["float32"]["entropy"]) > 1e-6


def test_training_all_weights_keeps_a_frozen_reference(variant: Callable[..., Recipe]) -> None:
    recipe = variant("stages.grpo.steps=4", "stages.grpo.lora=null", "stages.grpo.objective.kl.kind=k2")
    before = dict(load_policy(Path(recipe.policy.path)).named_weights())  # pyrefly: ignore
    folder = run_recipe(recipe, lambda line: None)
    rows = MetricsFile(folder.stage("grpo") / "metrics.jsonl").read()
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-9) and rows[3]["kl"] > 1e-7
    after = dict(load_policy(folder.stage("grpo") / "model").named_weights())
    assert all(not torch.equal(before[name], after[name]) for name in before)
    assert not (folder.stage("grpo") / "adapter").exists()


def test_the_examples_run(tiny_run: TinyRun, tmp_path: Path) -> None:
    root, out = Path(__file__).parents[2] / "examples", tmp_path / "drawn.png"
    for program in (["load_adapter.py", str(tiny_run.folder.path), 'render "CAT"', str(out)], ["custom_reward.py"]):
        command = [sys.executable, str(root / program[0]), *program[1:]]
        answer = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
        assert answer.returncode == 0, answer.stderr[-3000:]
    assert Image.open(out).size == (96, 32)


def test_a_codec_stage_with_few_held_out_images_shows_those(tmp_path: Path) -> None:
    recipe = read_recipe(TINY, [f"run_dir={tmp_path}", "data.held_out_words=5", "stages.codec.steps=1"])
    folder = run_recipe(recipe.model_copy(update={"stages": {"codec": recipe.stages["codec"]}}), lambda line: None)
    assert Image.open(folder.stage("codec") / "reconstruction.png").height < 3 * (2 * 32 + 8)  # two rows of pairs
