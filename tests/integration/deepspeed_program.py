"""The tiny recipe up to GRPO, as one process or as one of several: `FOLDER [DEEPSPEED_JSON]`.

Stages whose result is there are passed over. Leaves wrapped.json: what the loss went through, on how many processes.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor, nn

import rlmm.train.grpo as grpo
from rlmm import pipeline
from rlmm.config.recipe import validate_recipe
from rlmm.train.context import StageContext
from rlmm.train.launch import check_deepspeed, processes

RECIPE = Path(__file__).parents[1] / "recipes" / "tiny.yaml"
GRPO = {
    "steps": 3, "prompts_per_step": 4, "micro_batch_size": 4, "checkpoint_every": 3, "max_grad_norm": 0.02,
    "objective": {"name": "grpo", "kl": {"kind": "k3", "coefficient": 0.05}},
}  # fmt: skip


def watch(folder: Path) -> None:
    """Note the module that the GRPO loss is computed with."""
    original = grpo.grpo_loss

    def watched(policy: Any, config: Any, model: nn.Module, *rest: Any) -> Tensor:
        stage = model.zero_optimization_stage() if hasattr(model, "zero_optimization_stage") else None  # pyrefly: ignore
        seen = {"kind": type(model).__name__, "zero": stage, "processes": int(os.environ.get("WORLD_SIZE", "1"))}
        (folder / "wrapped.json").write_text(json.dumps(seen))
        return original(policy, config, model, *rest)

    grpo.grpo_loss = watched  # pyrefly: ignore


def main(folder: str, deepspeed: str = "") -> None:
    raw = yaml.safe_load(RECIPE.read_text())
    raw["stages"] = {name: raw["stages"][name] for name in ("codec", "sft", "grpo")}
    raw["stages"]["grpo"] |= GRPO | ({"deepspeed": deepspeed} if deepspeed else {})
    recipe = validate_recipe(raw | {"run_dir": folder}, "tiny")
    run = pipeline.run_folder(recipe)
    watch(Path(folder))
    if deepspeed:
        check_deepspeed(Path(deepspeed))
    with processes(deepspeed=bool(deepspeed)):
        for name, config in recipe.stages.items():
            if not (run.stage(name) / "model").is_dir() and not (run.stage(name) / "codec").is_dir():
                run.stage(name).mkdir(parents=True, exist_ok=True)
                pipeline.STAGES[config.kind](StageContext(recipe, run, name, config, print))


if __name__ == "__main__":
    main(*sys.argv[1:])
