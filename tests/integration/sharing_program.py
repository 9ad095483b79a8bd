"""GRPO of tiny recipes on one, two and four processes, each from one SFT policy: `FOLDER`.

A next-token policy's, the same in float64, a masked one's by its trajectory's log-probs with all that is logged of a
step, and by a noise plan's. Beside each run's folder lies what its processes planned, RUN-plans-RANK.jsonl: the digest
of every plan, by sample, and RUN-gradients.safetensors, the gradients of its first GRPO step. And the stages before
GRPO, which start from nothing: `CODEC-PROCESSES`.
"""

import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor, nn

import rlmm.train.grpo as grpo
from rlmm.codecs import Codec
from rlmm.objectives.estimators import Estimator
from rlmm.objectives.noise import NoisePlan
from rlmm.policies.head_rows import FIRST, ROWS
from rlmm.policies.transformer import TransformerPolicy
from rlmm.train.context import StageContext
from rlmm.train.processes import world
from rlmm.train.trainer import StageTrainer
from rollouts.trajectory import Trajectory
from tests.integration.forked import run_forked

RECIPES = Path(__file__).parents[1] / "recipes"
SHAPE = {"steps": 4, "prompts_per_step": 4, "micro_batch_size": 2, "checkpoint_every": 4}
CASES: dict[str, dict[str, Any]] = {
    "next-token": SHAPE | {"lora": None},
    "float64": SHAPE | {"lora": None},
    "trajectory": SHAPE | {"diagnostics": {"gradient_agreement": True}},
    "noise": SHAPE
    | {
        "estimator": {"kind": "stratified", "draws": 2},
        "objective": {"name": "gspo", "clip_low": 0.2, "clip_high": 0.2, "updates_per_rollout": 2},
    },
}
SUPERVISED = (1, 2, 4)
PROCESSES = {"next-token": (1, 2, 4), "float64": (1, 2, 4), "trajectory": (1, 2), "noise": (1, 2, 4)}
STARTS = {
    "next-token": "next-token-1",
    "float64": "next-token-1",
    "trajectory": "trajectory-1",
    "noise": "trajectory-1",
}
"""The run whose first stages each case goes on from."""


def in_float64() -> None:
    """From here on a GRPO stage of this process samples and trains in float64."""
    start = grpo.starting_policy

    def doubled(context: StageContext, codec: Codec) -> TransformerPolicy:
        policy = start(context, codec)
        policy.model.double()
        return policy

    grpo.starting_policy = doubled


def noting(folder: Path) -> Callable[[int], None]:
    """What makes a process write down its plans."""

    def prepare(rank: int) -> None:
        if folder.name.startswith("float64"):
            in_float64()
        plan = Estimator.plan

        def noted(self: Estimator, trajectory: Trajectory) -> NoisePlan:
            made = plan(self, trajectory)
            with (folder.parent / f"{folder.name}-plans-{rank}.jsonl").open("a") as handle:
                for row, name in enumerate(trajectory.sample_id):
                    whole = made.masks_BnS[row].numpy().tobytes() + made.weight_BnS[row].numpy().tobytes()
                    handle.write(json.dumps([name, hashlib.sha256(whole).hexdigest()]) + "\n")
            return made

        Estimator.plan = noted  # pyrefly: ignore
        note_gradients(folder.parent / f"{folder.name}-gradients.safetensors")

    return prepare


def note_gradients(path: Path) -> None:
    """Write down what process 0 has after the last backward of a GRPO stage's first step, not yet clipped."""
    original = StageTrainer.training_step

    def noted(self: StageTrainer, *args: Any, **kwargs: Any) -> Tensor:
        loss = original(self, *args, **kwargs)
        first = "grpo" in str(self.args.output_dir) and self.state.global_step == 0 and world()[0] == 0
        if first and self.accelerator.sync_gradients:
            save_file(whole_gradients(cast(nn.Module, self.model)), path)
        return loss

    StageTrainer.training_step = noted  # pyrefly: ignore


def whole_gradients(model: nn.Module) -> dict[str, Tensor]:
    """By name; those of a head of which one process trains the rows of images alone, with zeros for the others."""
    found = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    for name in [name for name in found if name.endswith(ROWS)]:
        head: Any = model.get_submodule(name.rpartition(".")[0])
        every = torch.zeros_like(head.weight)
        every[slice(*getattr(head, FIRST))] = found.pop(name)
        found[name.replace(ROWS, "weight")] = every
    return found


def run(recipe: Path, folder: Path, count: int) -> None:
    log = folder.with_suffix(".log")
    if any(run_forked(recipe, [f"run_dir={folder}"], log, count=count, prepare=noting(folder))):
        sys.exit(f"{folder.name}:\n{log.read_text()[-6000:]}")


def supervised(out: Path) -> None:
    """A codec, and SFT of all weights and of an adapter; then each of the other codecs."""
    raw = yaml.safe_load((RECIPES / "tiny.yaml").read_text())
    stages = {name: raw["stages"][name] for name in ("codec", "sft")}
    stages["sft"] |= {"micro_batch_size": 2}
    stages["adapter"] = stages["sft"] | {"lora": {"rank": 4, "alpha": 4}}
    size = {name: raw["codec"][name] for name in ("image_size", "channels", "patch", "width", "blocks")}
    recipes = {"fsq": raw | {"stages": stages}}
    for kind, sizes in {"vq": {"codebook_size": 64, "code_dim": 8}, "lfq": {"bits": 6}}.items():
        recipes[kind] = raw | {"stages": {"codec": stages["codec"]}, "codec": {"kind": kind, **size, **sizes}}
    for name, made in recipes.items():
        recipe = out / f"{name}.yaml"
        recipe.write_text(yaml.safe_dump(made, sort_keys=False))
        for count in SUPERVISED:
            run(recipe, out / f"{name}-{count}", count)


def main(out: Path) -> None:
    supervised(out)
    for case, changes in CASES.items():
        name = "tiny.yaml" if case in ("next-token", "float64") else "tiny_masked.yaml"
        raw = yaml.safe_load((RECIPES / name).read_text())
        stages = {name: raw["stages"][name] for name in ("codec", "sft", "grpo")}
        recipe = out / f"{case}.yaml"
        recipe.write_text(
            yaml.safe_dump(raw | {"stages": stages | {"grpo": stages["grpo"] | changes}}, sort_keys=False)
        )
        for count in PROCESSES[case]:
            folder, start = out / f"{case}-{count}", out / STARTS[case] / "stages"
            for stage in ("01-codec", "02-sft") if start.is_dir() else ():
                shutil.copytree(start / stage, folder / "stages" / stage)
            run(recipe, folder, count)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
