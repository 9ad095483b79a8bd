"""A recipe: everything a run is made of. YAML in, overrides on top, unknown key = error."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import Field, ValidationError, model_validator

from rlmm.config.base import Strict, nearest, reason_of
from rlmm.config.codec import CodecConfig
from rlmm.config.credit import check_credit, check_held_out_credit
from rlmm.config.data import Data
from rlmm.config.families import check_family, check_understanding
from rlmm.config.pairs import check_preferences
from rlmm.config.policy import CheckpointPolicy, NewPolicy, Policy
from rlmm.config.rewards import Rewards
from rlmm.config.rounds import with_rounds
from rlmm.config.sampling import Written
from rlmm.config.stages import CodecStage, EvalStage, ExportStage, GrpoStage, PolicyStage, SftStage, Stage
from rlmm.config.staleness import check_staleness
from rlmm.config.tiny import OVERRIDE, tiny_recipe
from rlmm.installation import recipes_dir

OWN_POLICY = "policy"
"""What `start_from` says for the recipe's own policy, whatever stages stand before."""


class Runtime(Strict):
    """How a run uses the machine."""

    threads: int = Field(1, ge=1)
    """Torch threads a process. Two threads on a shared machine were seen many times slower than one."""
    log_every: int = Field(1, ge=1)
    """A line of the log every n steps of a stage; metrics.jsonl has them all."""
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ("tensorboard",)
    hang_seconds: float | None = Field(3600.0, gt=0)
    """A process that stands still for longer ends the run and is named; null: nobody looks. It must be more than the
    longest rollout, micro-batch, batch of a judge or checkpoint takes."""


class Understanding(Strict):
    """Questions about images, or texts alone, that show what training on images does to a policy's understanding."""

    data: Data
    """Rows with texts of their own: scenes of variant describe, or rows with a text_column."""
    answer: Written
    """How answers are asked for and drawn; a low temperature, or top_k 1, takes the likeliest."""
    rewards: Rewards
    """What scores them, such as exact_match, anls, bleu."""
    prompts: int = Field(128, ge=1)
    """Held-out rows that are asked."""


class Recipe(Strict):
    """The whole recipe, stages by name in the order they run."""

    name: str = Field(..., pattern=r"^[A-Za-z0-9._-]+$")
    description: str = ""
    seed: int = Field(0, ge=0)
    run_dir: str = ""
    """Where the run goes; runs/<name> by default."""
    data: Data
    codec: CodecConfig | None = None
    """What the codec stage trains. A checkpoint brings its own."""
    policy: Policy = NewPolicy()
    rewards: Rewards
    """What GRPO trains on."""
    held_out: Rewards
    """The judge that is scored and never trained on."""
    understanding: Understanding | None = None
    """Measured for every arm of an eval stage; SFT may learn from its training rows too."""
    stages: dict[str, Stage]
    runtime: Runtime = Runtime()

    @model_validator(mode="after")
    def _stages_fit_together(self) -> "Recipe":
        check_held_out_credit(self.held_out)
        shared = {term.key for term in self.rewards.terms} & {term.key for term in self.held_out.terms}
        if shared:
            raise ValueError(f"{sorted(shared)} is in rewards and in held_out; give one of them a label of its own")
        if isinstance(self.policy, NewPolicy) and self.codec is None:
            raise ValueError("policy.kind new takes its vocabulary and its grid from the codec; give `codec`")
        if isinstance(self.policy, CheckpointPolicy) and self.codec is not None:
            raise ValueError("a checkpoint brings its own codec, so `codec` would change nothing; leave it out (null)")
        if isinstance(self.policy, CheckpointPolicy) and any(isinstance(s, CodecStage) for s in self.stages.values()):
            raise ValueError(
                "a checkpoint brings its own codec, and codes of a newly trained one would mean nothing to it; take the"
                " codec stage out, or start from policy.kind new"
            )
        _check_scales(self)
        _check_dtype(self.policy, self.stages)
        for name, stage in self.stages.items():
            if isinstance(stage, SftStage) and stage.understanding_share and self.understanding is None:
                raise ValueError(f"stage {name!r} takes a share of its rows from `understanding`; give the recipe one")
        if self.understanding is not None:
            check_understanding(self.stages.values(), self.policy)
        check_preferences(self.stages)
        before: list[str] = []
        for name, stage in self.stages.items():
            if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
                raise ValueError(f"stage name {name!r} is a folder's name: use letters, digits, _ and - alone")
            if name == OWN_POLICY:
                raise ValueError(
                    f"{OWN_POLICY!r} means the recipe's own policy in start_from; call the stage otherwise"
                )
            wanted = _references(stage)
            unknown = [other for other in wanted if other not in before]
            if unknown:
                raise ValueError(
                    f"stage {name!r} refers to {unknown[0]!r}, which is no policy stage before it."
                    f"{nearest(unknown[0], before)}"
                )
            check_staleness(name, stage)
            check_credit(name, stage, self.rewards)
            check_family(name, stage, self.policy, None if self.codec is None else math.prod(self.codec.grid))
            if isinstance(stage, PolicyStage):
                before.append(name)
        return self

    @property
    def folder(self) -> Path:
        return Path(self.run_dir or f"runs/{self.name}")


def _check_scales(recipe: Recipe) -> None:
    """Totals that are relative to their group tell nothing about a policy, and are not to be scaled a second time."""
    judges = {"held_out": recipe.held_out} | (
        {"understanding.rewards": u.rewards} if (u := recipe.understanding) else {}
    )
    for part, rewards in judges.items():
        if rewards.relative:
            raise ValueError(
                f"{part} has {rewards.relative}, so its mean would be the same whatever the policy does; use affine or "
                "sigmoid"
            )
    for name, stage in recipe.stages.items():
        if not isinstance(stage, GrpoStage) or recipe.rewards.normalise == "total":
            continue
        if stage.objective.advantage.scale == "group_std":
            raise ValueError(
                f"rewards.normalise: terms has normalised each term in its group, and stage {name!r} would do it with "
                "their sum again; set objective.advantage.scale: batch_std (GDPO) or none"
            )


def _check_dtype(policy: Policy, stages: Mapping[str, Stage]) -> None:
    """Weights in bfloat16 are frozen ones: an update of 1e-6 rounds to nothing beside them. And the gates of a stage
    have to know how its log-probs round."""
    if not isinstance(policy, CheckpointPolicy) or policy.dtype != "bfloat16":
        return
    for name, stage in stages.items():
        if isinstance(stage, PolicyStage) and stage.lora is None:
            raise ValueError(
                f"stage {name!r} trains all weights and policy.dtype is bfloat16, in which small updates round away; "
                "give the stage a lora section, or set policy.dtype: float32 (and precision: bfloat16)"
            )
        if isinstance(stage, PolicyStage) and stage.precision != "bfloat16":
            raise ValueError(
                f"stage {name!r} has precision {stage.precision} and policy.dtype is bfloat16; set precision: bfloat16"
            )


def _references(stage: Any) -> list[str]:
    if isinstance(stage, EvalStage):
        return list(stage.arms)
    if isinstance(stage, ExportStage):
        return [stage.start_from]
    named = (getattr(stage, "start_from", None), getattr(stage, "reference", None))
    return [name for name in named if name and name != OWN_POLICY]


class RecipeError(ValueError):
    """A recipe that cannot be read; the text names the key, what was given and what to do."""


def read_recipe(path: Path, overrides: list[str] | None = None) -> Recipe:
    """Read and validate a recipe, with `key.subkey=value` overrides (values are YAML); `model=tiny` among them makes it
    small first (`rlmm.config.tiny`).

    Raises:
        RecipeError: no such file, no mapping, a broken override, or a value that does not fit.
    """
    path = _locate(path)
    try:
        config = OmegaConf.load(path)
        if OVERRIDE in (overrides or []):
            config = OmegaConf.create(tiny_recipe(cast(Any, OmegaConf.to_container(config, resolve=True))))
        for override in overrides or []:
            if override == OVERRIDE:
                continue
            if "=" not in override:
                raise RecipeError(f"override {override!r} has no '='; write key.subkey=value")
            key, value = override.split("=", 1)
            OmegaConf.update(config, key, yaml.safe_load(value), merge=False, force_add=True)
        raw = OmegaConf.to_container(config, resolve=True)
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise RecipeError(f"{path} cannot be read as YAML with these overrides: {error}") from error
    if not isinstance(raw, dict):
        raise RecipeError(f"{path} holds a {type(raw).__name__}; a recipe is a mapping of keys")
    return validate_recipe(raw, str(path))


def _locate(path: Path) -> Path:
    """A file, or the shipped recipe of that name (`quickstart`, `configs/quickstart.yaml`)."""
    shipped = {recipe.stem: recipe for recipe in recipes_dir().glob("*.yaml")}
    if path.is_file():
        return path
    if path.stem in shipped and path.parent in (Path("."), Path("configs")):
        return shipped[path.stem]
    near = [str(p) for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
    raise RecipeError(f"no recipe at {path}.{nearest(str(path), [*near, *shipped])}")


def validate_recipe(raw: dict[Any, Any], source: str) -> Recipe:
    """A Recipe from plain data, its rounds written out; every fault is listed with its key path."""
    try:
        stages = raw.get("stages")
        return Recipe.model_validate(raw | {"stages": with_rounds(stages)} if isinstance(stages, dict) else raw)
    except ValidationError as error:
        lines = [f"  {_place(fault['loc'])}: {reason_of(fault)}" for fault in error.errors()]
        raise RecipeError(f"{source} is not a valid recipe:\n" + "\n".join(dict.fromkeys(lines))) from error
    except ValueError as error:
        raise RecipeError(f"{source} is not a valid recipe:\n  {error}") from error


def recipe_of(run_dir: Path) -> Recipe:
    """The recipe of a run. Raises ValueError where the folder is none."""
    config = run_dir / "config.yaml"
    if not config.is_file():
        raise ValueError(f"{run_dir} is no run folder: it has no config.yaml; give a folder that `rlmm run` made")
    return validate_recipe(yaml.safe_load(config.read_text()), str(config))


def _place(location: tuple[int | str, ...]) -> str:
    parts = [str(part) for part in location]
    tag = {"stages": 2, "policy": 1, "data": 1, "codec": 1}.get(parts[0]) if parts else None
    if tag is not None and len(parts) > tag:  # the kind, which pydantic adds and no override can name
        del parts[tag]
    return ".".join(parts) or "recipe"
