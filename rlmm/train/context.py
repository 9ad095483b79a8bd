"""What every stage is handed, and how one finds what earlier stages made."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlmm.codecs import Codec, load_codec
from rlmm.config.data import Data, RowsData, Split
from rlmm.config.policy import CheckpointPolicy
from rlmm.config.recipe import OWN_POLICY, Recipe
from rlmm.config.stages import CodecStage, PolicyStage
from rlmm.data import Dataset, build_dataset
from rlmm.policies.families import llama
from rlmm.policies.families.loading import checkpoint_codec, load_policy
from rlmm.policies.spelling import Spelling
from rlmm.policies.transformer import TransformerPolicy
from rlmm.run_folder import RunFolder
from rlmm.seeds import derive
from rlmm.train.processes import device
from rlmm.train.prompts import reasons, usable_rows
from rlmm.train.tokens import ImageTokens


@dataclass(frozen=True)
class StageContext:
    """A stage's name and settings, the recipe around it, and the run folder it writes to."""

    recipe: Recipe
    run: RunFolder
    name: str
    config: Any
    say: Callable[[str], None]
    place: Path | None = None
    """Where it writes, for work that is no stage of the recipe."""

    @property
    def folder(self) -> Path:
        return self.place or self.run.stage(self.name)

    @property
    def model_folder(self) -> Path:
        return self.folder / "model"

    def seed(self, *parts: int | str) -> int:
        """A seed for one purpose of this stage."""
        return derive(self.recipe.seed, self.name, *parts)


def load_split(context: StageContext, split: Split, *spellings: Spelling) -> Dataset:
    """The recipe's rows of a split whose prompt each of `spellings` can take."""
    return load_rows(context, context.recipe.data, split, *spellings)


def load_rows(context: StageContext, config: Data, split: Split, *spellings: Spelling) -> Dataset:
    """The rows of a split whose prompt each of `spellings` can take; what was left out of it is said, by reason."""
    data = usable_rows(build_dataset(config, split, context.recipe.seed), spellings, config)
    if data.excluded:
        context.say(f"{split} data: {len(data)} rows, {data.excluded.total()} excluded ({reasons(data.excluded)})")
    return data


def run_codec(context: StageContext) -> Codec:
    """The codec of this run: what its codec stage trained, or the one inside the policy's checkpoint."""
    for name, stage in context.recipe.stages.items():
        if isinstance(stage, CodecStage):
            return load_codec(context.run.stage(name) / "codec").to(device())
    if isinstance(context.recipe.policy, CheckpointPolicy):
        return checkpoint_codec(context.recipe.policy).to(device())
    raise ValueError("the recipe has no codec stage and a new policy; add a stage of kind 'codec' before the others")


def image_tokens(context: StageContext, codec: Codec, policy: TransformerPolicy) -> ImageTokens:
    """The codec with the codes that were made before: by this run, or in the folder that the data names."""
    return ImageTokens(codec, _tokens_folder(context), policy.pictures)


def _tokens_folder(context: StageContext) -> Path:
    data = context.recipe.data
    shared = data.token_cache if isinstance(data, RowsData) else None
    return context.run.path / "tokens" if shared is None else Path(shared)


def starting_policy(context: StageContext, codec: Codec) -> TransformerPolicy:
    """The policy a stage starts from: `start_from`, else the policy stage before it, else the recipe's policy."""
    policy = sampled_policy(context, codec)
    if context.config.lora is not None:
        policy.add_lora(context.config.lora, context.seed("lora"))
        policy.to(device())
    return policy


def sampled_policy(context: StageContext, codec: Codec) -> TransformerPolicy:
    """The policy a stage starts from, without what the stage would add to train it."""
    start = parent(context)
    policy = own_policy(context, codec) if start is None else stage_policy(context, start)
    return placed(context, policy, context.config.precision)


def stage_policy(context: StageContext, stage: str) -> TransformerPolicy:
    """The policy that a stage left."""
    return load_policy(context.run.stage(stage) / "model")


def placed(context: StageContext, policy: TransformerPolicy, precision: str) -> TransformerPolicy:
    """The same policy, as a stage runs it: its precision, its device, and where the pictures are that it sees."""
    policy.precision = precision
    policy.to(device())
    if policy.pictures is not None:
        policy.pictures.folder = _tokens_folder(context) / "seen"
    return policy


def own_policy(context: StageContext, codec: Codec) -> TransformerPolicy:
    """The recipe's policy, as no stage has trained it."""
    if isinstance(context.recipe.policy, CheckpointPolicy):
        return load_policy(context.recipe.policy.path, context.recipe.policy)
    seed = derive(context.recipe.seed, "policy")
    return llama.build(context.recipe.policy, num_codes=codec.num_codes, grid=codec.grid, seed=seed)


def parent(context: StageContext) -> str | None:
    """The stage this one starts from; None where that is the recipe's own policy."""
    start = context.config.start_from or policy_stage_before(context)
    return None if start == OWN_POLICY else start


def published_base(context: StageContext) -> str | None:
    """The published checkpoint that this stage starts from, where it starts from one: a name that others know."""
    policy = context.recipe.policy
    if not isinstance(policy, CheckpointPolicy) or policy.tiny or Path(policy.path).exists():
        return None
    return policy.path if parent(context) is None else None


def policy_stage_before(context: StageContext) -> str | None:
    """The policy stage that stands before this one in the recipe."""
    before: str | None = None
    for name, stage in context.recipe.stages.items():
        if name == context.name:
            return before
        if isinstance(stage, PolicyStage):
            before = name
    return before
