"""A tiny recipe of preferences up to its last trained stage, as one process or as one of several: `FOLDER RECIPE`.

Stages whose result is there are passed over. Leaves processes.json: how many there were.
"""

import json
import os
import sys
from pathlib import Path

import yaml

from rlmm import pipeline
from rlmm.config.recipe import validate_recipe
from rlmm.train.context import StageContext
from rlmm.train.launch import processes
from rlmm.train.processes import wait

RECIPES = Path(__file__).parents[1] / "recipes"
KTO = {"kind": "dpo", "pairs": "pairs", "start_from": "sft", "loss": "kto", "steps": 2, "batch_size": 4,
       "micro_batch_size": 1, "learning_rate": 1e-3, "checkpoint_every": 2}  # fmt: skip


def main(folder: str, name: str) -> None:
    raw = yaml.safe_load((RECIPES / name).read_text())
    stages = dict(raw["stages"])
    stages.setdefault("kto", KTO)
    trained = {name: stage for name, stage in stages.items() if stage["kind"] not in pipeline.ALONE}
    recipe = validate_recipe(raw | {"run_dir": folder, "stages": trained}, "tiny")
    run = pipeline.run_folder(recipe)
    with processes(deepspeed=False):
        for name, config in recipe.stages.items():
            if not (run.stage(name) / "model").is_dir() and not (run.stage(name) / "codec").is_dir():
                run.stage(name).mkdir(parents=True, exist_ok=True)
                pipeline.STAGES[config.kind](StageContext(recipe, run, name, config, print))
                wait()
        if os.environ.get("RANK", "0") == "0":
            (Path(folder) / "processes.json").write_text(json.dumps(int(os.environ.get("WORLD_SIZE", "1"))))


if __name__ == "__main__":
    main(*sys.argv[1:])
