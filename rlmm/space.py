"""What a run will write to its disk at least, in bytes, from the recipe alone."""

from dataclasses import dataclass

import torch
from torch import nn

from rlmm.config.policy import CheckpointPolicy
from rlmm.config.recipe import Recipe
from rlmm.config.stages import PolicyStage
from rlmm.policies.families import llama
from rlmm.policies.families.loading import empty_model, load_config
from rlmm.run_folder import RunFolder
from rlmm.train.launch import keeps_parts

FLOAT_BYTES = 4


@dataclass(frozen=True)
class Written:
    """Bytes of a stage's model/, and of one of its checkpoints."""

    model: int
    checkpoint: int


def space_needed(recipe: Recipe, run: RunFolder) -> int:
    """The models that stages leave, and the checkpoints of the stage with the largest: those that are kept and the one
    that is written before the oldest goes. What a stage has already written is not counted again.

    Rollouts and exports come on top. Raises ValueError where the recipe's checkpoint cannot be read.
    """
    stages = {
        name: stage for name, stage in recipe.stages.items() if isinstance(stage, PolicyStage) and not run.done(name)
    }
    if not stages:
        return 0
    model = outline(recipe)
    sizes = {name: written(recipe, model, stage) for name, stage in stages.items()}
    kept = [
        max(0, (stage.checkpoints_kept + 1) * sizes[name].checkpoint - _there(run, name))
        for name, stage in stages.items()
    ]
    return sum(size.model for size in sizes.values()) + max(kept)


def outline(recipe: Recipe) -> nn.Module:
    """The recipe's model without its weights."""
    policy = recipe.policy
    if isinstance(policy, CheckpointPolicy):
        return empty_model(load_config(policy.path, policy))
    assert recipe.codec is not None, "the recipe lets no new policy be without"
    with torch.device("meta"):
        return llama.build(policy, num_codes=recipe.codec.num_codes, grid=recipe.codec.grid, seed=0).model


def written(recipe: Recipe, model: nn.Module, stage: PolicyStage) -> Written:
    """A checkpoint holds what is trained (the adapter or the whole model), two moments of it in float32, and under
    DeepSpeed what its optimizer steps on, in float32 too, with ZeRO 1 and 2 beside the model's own state."""
    copies = 3 + _of_deepspeed(stage.deepspeed)
    half = isinstance(recipe.policy, CheckpointPolicy) and recipe.policy.dtype == "bfloat16"
    whole = sum(one.numel() for one in model.parameters()) * (FLOAT_BYTES // 2 if half else FLOAT_BYTES)
    if stage.lora is None:
        # Of the head, GRPO may train a part alone; it is not large beside the rest.
        return Written(whole, copies * whole)
    sides = [
        module.in_features + module.out_features
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rsplit(".", 1)[-1] in stage.lora.target_modules
    ]
    return Written(whole, copies * stage.lora.rank * sum(sides) * FLOAT_BYTES)


def _of_deepspeed(path: str | None) -> int:
    """How often what is trained is written once more; under ZeRO-3 the model's state has no weights."""
    if path is None:
        return 0
    return 1 if keeps_parts(path) else 2


def _there(run: RunFolder, name: str) -> int:
    folder = run.stage(name) / "checkpoints"
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
