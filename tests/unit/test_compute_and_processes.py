"""What arms cost, said beside their differences; and a stage that is resumed with another number of processes."""

from pathlib import Path
from typing import Any

import pytest
import torch

from rlmm.config.recipe import RecipeError, read_recipe
from rlmm.config.stages import EvalStage, SftStage
from rlmm.evaluation.compute import compute, compute_lines
from rlmm.pipeline import run_recipe
from rlmm.run_folder import RunFolder
from rlmm.train.context import StageContext
from rlmm.train.launch import deepspeed_digest, processes
from rlmm.train.metrics import MetricsFile
from rlmm.train.trainer import training_arguments
from tests.integration.conftest import TINY


def row(arm: str, stages: str, steps: int, seconds: float) -> dict[str, Any]:
    return {"arm": arm, "stages": stages.split(), "steps": steps, "seconds": seconds}


def test_equal_and_unequal_compute_are_told_apart() -> None:
    rows = [row("sft", "sft", 10, 100), row("more", "sft more", 30, 290), row("rl", "sft rl", 20, 300)]
    assert compute_lines(rows) == [
        "sft: sft, 10 steps, 100 s",
        "more: sft + more, 30 steps, 290 s",
        "rl: sft + rl, 20 steps, 300 s",
        "beyond sft, more had 0.95 of rl's compute: equal",
    ]
    rows[1]["seconds"] = 180
    assert "more had 0.40 of rl's compute: NOT equal" in compute_lines(rows)[-1]
    rows[1]["stages"] = ["more"]  # it did not grow from the first arm, so there is no "beyond"
    assert len(compute_lines(rows)) == 3
    assert len(compute_lines(rows[:1])) == 1


def test_compute_counts_rollouts_and_scoring_and_leaves_monitoring_out(tmp_path: Path) -> None:
    recipe = read_recipe(TINY)
    context = StageContext(recipe, RunFolder(tmp_path, tuple(recipe.stages)), "evaluation", None, lambda line: None)
    for name, figures in {
        "sft": {"time/update": 2.0},
        "grpo": {"time/update": 3.0, "time/rollout": 4.0, "time/score": 5.0, "time/held_out": 100.0},
    }.items():
        context.run.stage(name).mkdir(parents=True)
        MetricsFile(context.run.stage(name) / "metrics.jsonl").append(1, figures)
    assert compute(context, "grpo") == row("grpo", "sft grpo", 2, 14.0)


def test_a_stage_is_not_resumed_with_another_number_of_processes(tmp_path: Path) -> None:
    run = RunFolder(tmp_path, ("sft",))
    run.mark("sft", "sft", "running", processes=2)
    run.mark("sft", "sft", "running", processes=2)
    with pytest.raises(ValueError, match=r"started with 2 process\(es\) and this is a run with 1.*Resume with 2"):
        run.mark("sft", "sft", "running", processes=1)
    assert run.status("sft")["processes"] == 2


def test_a_run_that_two_processes_began_is_not_gone_on_with_by_one(tmp_path: Path) -> None:
    recipe = read_recipe(TINY, [f"run_dir={tmp_path}"])
    RunFolder(tmp_path, tuple(recipe.stages)).mark("codec", "codec", "running", processes=2)
    with pytest.raises(ValueError, match=r"stage 'codec' was started with 2 process\(es\) and this is a run with 1"):
        run_recipe(recipe, lambda line: None)
    assert not list((tmp_path / "stages" / "01-codec").glob("*.jsonl"))


def test_a_stage_is_not_under_deepspeed_because_the_one_before_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")  # what accelerate leaves behind
    stage = read_recipe(TINY).stages["sft"]
    assert isinstance(stage, SftStage) and stage.deepspeed is None
    made = training_arguments(stage, tmp_path, micro_batch_size=1, accumulation=1, report_to=[], name="sft")
    assert made.deepspeed_plugin is None


def test_a_stage_is_not_resumed_with_other_deepspeed_settings(tmp_path: Path) -> None:
    run, path = RunFolder(tmp_path, ("sft",)), tmp_path / "zero.json"
    path.write_text('{"zero_optimization": {"stage": 2}}')
    given = deepspeed_digest(path)
    run.mark("sft", "sft", "running", deepspeed=given)
    path.write_text('{"zero_optimization":\n  {"stage": 2}}')
    run.mark("sft", "sft", "running", deepspeed=deepspeed_digest(path))
    path.write_text('{"zero_optimization": {"stage": 3}}')
    with pytest.raises(ValueError, match="said something else"):
        run.mark("sft", "sft", "running", deepspeed=deepspeed_digest(path))
    with pytest.raises(ValueError, match="said something else"):
        run.mark("sft", "sft", "running")
    assert run.status("sft")["deepspeed"] == given


def test_evaluation_samples_from_the_law_its_stage_names() -> None:
    stage = EvalStage(arms=("a",), guidance_scale=2.0, source_scale=1.5, top_k=7, top_p=0.9)
    law = stage.sampling(0.5).law((0, 100))
    assert (law.temperature, law.guidance_scale, law.source_scale, law.top_k, law.top_p) == (0.5, 2.0, 1.5, 7, 0.9)
    assert law.mode == "guided"


def test_one_process_does_not_take_several_gpus_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(RuntimeError, match="4 visible GPUs.*nproc_per_node=4"), processes(deepspeed=False):
        pass
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with processes(deepspeed=False):
        pass


def test_a_checkpoint_and_a_codec_stage_exclude_each_other() -> None:
    with pytest.raises(RecipeError, match="brings its own codec"):
        read_recipe(TINY, ["policy={kind: checkpoint, path: anywhere}"])


def test_a_run_may_change_its_trackers_and_not_its_threads(tmp_path: Path) -> None:
    run = RunFolder(tmp_path, ())
    for override in ("runtime.threads=1", "runtime.log_every=9", "runtime.trackers=[wandb]"):
        run.bind_config(read_recipe(TINY, [override]).model_dump(mode="json"))
    with pytest.raises(ValueError, match=r"runtime\.threads: 1 -> 2"):
        run.bind_config(read_recipe(TINY, ["runtime.threads=2"]).model_dump(mode="json"))
