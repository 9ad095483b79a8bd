"""What the stages of a whole run hold, rollouts, judges and files included, is what is planned."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlmm.config.data import WordsData
from rlmm.data import build_dataset

PROGRAM = """
import ctypes, gc, json, sys
from pathlib import Path
from rlmm import pipeline
from rlmm.bench.step_child import read_peak, reset_peak
from rlmm.config.recipe import read_recipe
from rlmm.memory import memory_plans

recipe = read_recipe(Path("quickstart"), sys.argv[1:])
planned = {plan.stage: plan.total for plan in memory_plans(recipe)}
run_stage, found = pipeline._run_stage, {}

def measured(context):
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what the stages before left free would hide what this one takes
    before = reset_peak()
    run_stage(context)
    if context.name in planned:
        found[context.name] = (planned[context.name], read_peak() - before)

pipeline._run_stage = measured
try:
    pipeline.run_recipe(recipe, lambda line: None)
finally:
    print(json.dumps(found))
"""
REWARDS = "rewards={terms: [{function: tests/recipes/rewards.py:darkness}, {name: ocr, weight: 0}]}"
"""A group without spread has no update to hold."""


def files(folder: Path) -> str:
    """Words with long prompts, as rows of one's own."""
    for split, count in (("train", 300), ("held_out", 256)):
        rows = build_dataset(WordsData(), split, 0)  # pyrefly: ignore[bad-argument-type]
        said = []
        for number in range(count):
            example, name = rows[number], f"{split}{number}.png"
            assert example.target is not None
            example.target.save(folder / name)
            prompt = f"{example.prompt}, as large as it goes, on a white page with nothing else"[: 50 + number % 20]
            said.append({"prompt": prompt, "image": name, "text": example.row["text"]})
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, said)))
    return (
        f"data={{kind: rows, path: {folder / 'train.jsonl'}, held_out_path: {folder / 'held_out.jsonl'}, "
        f"target_column: image, image_size: [96, 32], image_mode: L, cache_dir: {folder / 'cache'}}}"
    )


@pytest.mark.long
@pytest.mark.parametrize("own", [False, True], ids=["words", "files"])
def test_a_runs_stages_hold_what_is_planned(own: bool, tmp_path: Path) -> None:
    few = [f"stages.{stage}.steps=3" for stage in ("codec", "sft", "grpo", "sft_more")]
    given = [f"run_dir={tmp_path / 'run'}", "policy.max_positions=128", REWARDS, *few, *[files(tmp_path)] * own]
    command = [sys.executable, "-c", PROGRAM, *given]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert set(found) == {"sft", "grpo", "sft_more"}, done.stderr[-3000:]
    for stage, (planned, held) in found.items():
        assert planned == pytest.approx(held, rel=0.15), (stage, planned >> 20, held / 2**20)
