"""A reward's process in runs of two training processes: one for both, which does not outlive them."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.integration.test_reward_process import gone

pytestmark = pytest.mark.long
ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "tests" / "recipes" / "tiny.yaml"
NOTING = """
import os, signal
from tests.recipes.rewards import darkness

def noted(prompts, completions, folder="", dies_at=0, **columns):
    calls = os.path.join(folder, "calls")
    with open(calls, "a") as handle:
        print(os.getpid(), os.environ.get("RANK"), os.environ.get("MASTER_PORT"), file=handle)
    with open(calls) as handle:
        if len(handle.readlines()) == dies_at:
            os.kill(os.getppid(), signal.SIGKILL)
    return darkness(prompts, completions)
"""
CODEC = {"kind": "codec", "steps": 2, "batch_size": 8, "learning_rate": 1e-3, "checkpoint_every": 2}
SFT = {"kind": "sft", "steps": 2, "batch_size": 8, "micro_batch_size": 4, "learning_rate": 3e-3, "checkpoint_every": 2}
GRPO = {
    "kind": "grpo", "steps": 4, "prompts_per_step": 2, "samples_per_prompt": 4, "micro_batch_size": 2,
    "learning_rate": 1e-3, "checkpoint_every": 2, "held_out_every": 2,
}  # fmt: skip
EVAL = {"kind": "eval", "arms": ["sft", "grpo"], "prompts": 4, "sampling_seeds": 2}


def run(folder: Path, options: dict[str, Any], term: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    """`rlmm run` in two processes, with the reward of NOTING."""
    (folder / "own.py").write_text(NOTING)
    terms = [{"function": f"{folder}/own.py:noted", "options": {"folder": str(folder), **options}, **term}]
    stages = {"codec": CODEC, "sft": SFT, "grpo": GRPO, "evaluation": EVAL}
    command = [sys.executable, "-m", "rlmm.cli", "run", "--nproc", "2", str(RECIPE)]
    command += [f"run_dir={folder / 'run'}", f"stages={json.dumps(stages)}", f"rewards={json.dumps({'terms': terms})}"]
    given = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, "runtime.trackers=[]"], cwd=ROOT, env=given, capture_output=True, text=True, timeout=500
    )


def figures(folder: Path) -> list[dict[str, Any]]:
    rows = (folder / "run" / "stages" / "03-grpo" / "metrics.jsonl").read_text()
    return [{k: v for k, v in json.loads(row).items() if not k.startswith("time/")} for row in rows.splitlines()]


def test_two_processes_share_one_and_a_resumed_run_starts_another(tmp_path: Path) -> None:
    folders = {name: tmp_path / name for name in ("here", "served", "killed")}
    for folder in folders.values():
        folder.mkdir()
    for name, term in (("here", {}), ("served", {"serve": {}})):
        done = run(folders[name], {}, term)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        for stage in ("01-codec", "02-sft") if name == "here" else ():  # where all three start
            for other in ("served", "killed"):
                shutil.copytree(folders["here"] / "run/stages" / stage, folders[other] / "run/stages" / stage)
    assert figures(folders["served"]) == figures(folders["here"]) and len(figures(folders["here"])) == 4
    calls = [line.split() for line in (folders["served"] / "calls").read_text().splitlines()]
    assert {tuple(place) for _, *place in calls} == {("None", "None")}, "it is none of the run's processes"
    assert len({pid for pid, *_ in calls}) == 1 and gone(int(calls[0][0]))

    died = run(folders["killed"], {"dies_at": 6}, {"serve": {}})  # and takes the process that started it along
    assert died.returncode != 0 and len(figures(folders["killed"])) < 4
    done = run(folders["killed"], {"dies_at": 6}, {"serve": {}})
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    pids = [line.split()[0] for line in (folders["killed"] / "calls").read_text().splitlines()]
    assert len(set(pids)) == 2 and all(gone(int(pid)) for pid in set(pids))
    assert figures(folders["killed"]) == figures(folders["here"])


def test_a_process_that_does_not_come_up_is_an_error_in_both(tmp_path: Path) -> None:
    done = run(tmp_path, {}, {"serve": {"python": "/nowhere/python"}})
    told = done.stdout + done.stderr
    assert done.returncode not in (0, 70, -9), told[-4000:]
    assert "cannot be served by serve.python /nowhere/python" in told
    assert "process 0 failed: ValueError" in told, "the other process knows why"
