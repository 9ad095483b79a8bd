"""GRPO of many steps in a process of its own: what it holds as it goes on. `RUN_DIR STEPS [DEEPSPEED_JSON]`, prints the
first process's as JSON rows."""

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

from rlmm.config.recipe import read_recipe
from rlmm.pipeline import run_recipe
from rlmm.train.launch import processes
from rlmm.train.processes import world
from rlmm.train.trainer import StageTrainer

RECIPE = Path(__file__).parents[1] / "recipes" / "tiny.yaml"
EVERY = 25


def held(folder: Path) -> dict[str, int]:
    """Resident kilobytes, open files, threads, and files of the run."""
    gc.collect()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {
        "resident": int(status["VmRSS"].split()[0]),
        "open": len(os.listdir("/proc/self/fd")),
        "threads": int(status["Threads"]),  # of libraries, too
        "files": sum(len(files) for _, _, files in os.walk(folder)),
    }


def main(folder: Path, steps: int, deepspeed: str | None = None) -> None:
    rows: list[dict[str, int]] = []
    logged = StageTrainer.log

    def log(self: StageTrainer, logs: dict[str, float], start_time: float | None = None) -> None:
        logged(self, logs, start_time)
        if self.state.max_steps == steps and self.state.global_step % EVERY == 0:
            rows.append({"step": self.state.global_step, **held(folder)})

    StageTrainer.log = log
    settings: list[Any] = [f"run_dir={folder}", f"stages.grpo.steps={steps}", f"stages.grpo.store_every={steps}"]
    settings += ["stages.grpo.checkpoint_every=20", "stages.grpo.learning_rate=1.0e-5"]
    if deepspeed is not None:
        settings += [f"stages.grpo.deepspeed={deepspeed}", "stages.grpo.lora=null"]
    with processes(deepspeed=deepspeed is not None):
        run_recipe(read_recipe(RECIPE, settings), lambda line: None)
        if world()[0] == 0:
            print(json.dumps(rows), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
