"""`rlmm bench step`: what is counted, what is compared, and a smoke-sized run of both sides."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rlmm.bench.step import PROBLEMS, Measured, StepPlan, bench_step, measure, ratios, step_plan, summary
from rlmm.bench.step_child import CLEAR
from rlmm.bench.step_problem import Side, StepProblem, make_samples, make_trajectory
from tests.integration.programs import ROOT

TINY = StepProblem(
    name="tiny",
    vocabulary=96,
    codes=64,
    prompts=2,
    samples=2,
    prompt_tokens=4,
    image_tokens=6,
    hidden=16,
    layers=1,
    heads=2,
    intermediate=24,
)
RLMM, TRL = Side("rlmm", lora=False, checkpointing=False), Side("trl", lora=False, checkpointing=False)


def measured(side: Side, seconds: float, peak: float) -> Measured:
    return Measured("tiny", side, seconds=seconds, cpu_seconds=seconds / 2, peak=peak, baseline=1.0)


def test_ratios_are_between_sides_that_train_alike() -> None:
    lora = Side("rlmm", lora=True, checkpointing=False)
    found = ratios([measured(RLMM, 2.0, 10.0), measured(TRL, 8.0, 40.0), measured(lora, 1.0, 1.0)])
    assert [(row["lora"], row["seconds"], row["cpu_seconds"], row["peak"]) for row in found] == [
        (False, 0.25, 0.25, 0.25)
    ]


def test_the_first_step_of_a_process_is_not_counted() -> None:
    runs = [
        {"seconds": [90.0, 1.0, 3.0], "cpu_seconds": [90.0, 1.0, 1.0], "peak": 5.0, "baseline": 2.0},
        {"seconds": [90.0, 2.0, 2.5], "cpu_seconds": [90.0, 2.0, 2.0], "peak": 7.0, "baseline": 2.0},
    ]
    found = summary(TINY, RLMM, runs)
    assert (found.seconds, found.cpu_seconds, found.peak) == (2.25, 1.5, 6.0)


def test_a_plan_without_a_counted_step_is_refused() -> None:
    with pytest.raises(ValueError, match="steps must be at least 2"):
        measure(StepPlan((TINY,), steps=1), print)


def test_a_plan_names_the_nearest_problem() -> None:
    with pytest.raises(ValueError, match="emu3"):
        step_plan(["emu"], 1, 4, checkpointed=False, steps=2, repeats=1, threads=1)
    plan = step_plan(["emu3"], 1, 4, checkpointed=False, steps=2, repeats=1, threads=1)
    assert plan.problems[0].rows == 8 and plan.problems[0].vocabulary == PROBLEMS["emu3"].vocabulary
    assert not any(side.checkpointing for side in plan.sides) and any(side.lora for side in plan.sides)
    whole = step_plan(["emu3"], 1, 4, lora=False, checkpointed=True, steps=2, repeats=1, threads=1)
    assert not any(side.lora for side in whole.sides) and any(side.checkpointing for side in whole.sides)


def test_images_are_of_image_codes_and_groups_differ_in_reward() -> None:
    sampled = make_samples(TINY)
    trajectory = make_trajectory(TINY, sampled)
    low, high = TINY.layout.image
    assert ((sampled.image_BS >= low) & (sampled.image_BS < high)).all()
    assert (sampled.prompt_BP < low).all()
    assert trajectory.group_id == ("0", "0", "1", "1")
    assert all(sampled.reward_B[trajectory.group_id.index(g)] != sampled.reward_B[i] for i, g in ((1, "0"), (3, "1")))


PEAKS = """
import torch
from rlmm.bench.step_child import read_peak, reset_peak
torch.ones(256 << 20, dtype=torch.uint8)  # before the reset: not in the peak
before = reset_peak()
held = torch.ones(512 << 20, dtype=torch.uint8)
del held
print(read_peak() - before, reset_peak() - before)
"""


@pytest.mark.long
@pytest.mark.skipif(not CLEAR.exists() or torch.cuda.is_available(), reason="resident memory of Linux")
def test_the_peak_is_what_was_held_and_let_go() -> None:
    """In sizes far above the kernel's own error: it counts pages per processor and adds them up now and then. In a
    process of its own: of one with much idle memory the system may take some back meanwhile."""
    done = subprocess.run([sys.executable, "-c", PEAKS], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    peak, after = map(float, done.stdout.split()[-2:])
    assert 400 << 20 < peak < 640 << 20
    assert after < 120 << 20


@pytest.mark.long  # the README's own is in the suite
def test_a_smoke_sized_bench_measures_both_sides(tmp_path: Path) -> None:
    plan = StepPlan((TINY,), (RLMM, TRL), repeats=1, steps=2)
    bench_step(plan, tmp_path / "figures" / "step.json")
    written = json.loads((tmp_path / "figures" / "step.json").read_text())
    assert [row["name"] for row in written["measured"]] == ["rlmm full", "trl full"]
    assert all(row["seconds"] > 0 and row["cpu_seconds"] > 0 and row["peak"] > 0 for row in written["measured"])
    assert written["ratios"][0]["peak"] == written["measured"][0]["peak"] / written["measured"][1]["peak"]
    assert written["settings"]["problems"][0]["codes"] == TINY.codes
    assert {"processor", "commit", "packages"} <= written["environment"].keys()
