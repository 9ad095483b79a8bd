"""What a recipe's stages may say. A stage has a name (its key in the recipe), a kind and its own settings."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from rlmm.config.base import Strict
from rlmm.config.codec import Perceptual
from rlmm.config.engines import EngineConfig, TorchEngineConfig
from rlmm.config.masked import EstimatorConfig, NoiseConfig
from rlmm.config.objectives import ObjectiveConfig
from rlmm.config.policy import Lora
from rlmm.config.sampling import Sampled, Sampling, Writing


class Optimization(Strict):
    """AdamW and its schedule."""

    steps: int = Field(..., ge=1)
    learning_rate: float = Field(..., gt=0)
    schedule: Literal["constant", "constant_with_warmup", "cosine", "linear"] = "cosine"
    warmup_steps: int = Field(0, ge=0)
    weight_decay: float = Field(0.0, ge=0)
    betas: tuple[float, float] = (0.9, 0.95)
    max_grad_norm: float = Field(1.0, ge=0)
    """0 switches clipping off."""

    @model_validator(mode="after")
    def _warm_up_has_a_schedule(self) -> "Optimization":
        if self.schedule == "constant" and self.warmup_steps:
            raise ValueError("schedule constant has no warm-up; use constant_with_warmup, or set warmup_steps to 0")
        return self

    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 runs the transformer's body under autocast, in sampler and trainer alike."""
    gradient_checkpointing: bool = False
    checkpoint_every: int = Field(50, ge=1)
    checkpoints_kept: int = Field(2, ge=2)
    """At least two: should the newest be torn, the one before it is used."""
    deepspeed: str | None = None
    """Path of a DeepSpeed configuration file."""


class CodecStage(Optimization):
    """Train the image tokenizer."""

    kind: Literal["codec"] = "codec"
    batch_size: int = Field(64, ge=1)
    images: int | None = Field(None, ge=1)
    """How many training images to use; all by default."""
    perceptual: Perceptual | None = None

    @model_validator(mode="after")
    def _small_network(self) -> "CodecStage":
        if self.gradient_checkpointing:
            raise ValueError("a codec stage has no gradient checkpointing: its network is small; leave it out")
        return self


class SftStage(Optimization):
    """Supervised fine-tuning on (prompt, image) pairs."""

    kind: Literal["sft"] = "sft"
    start_from: str | None = None
    """A stage's name, or `policy` for the recipe's own; by default the policy stage before this one, if any."""
    batch_size: int = Field(64, ge=1)
    micro_batch_size: int = Field(64, ge=1)
    pairs: Literal["train", "fresh"] = "train"
    """fresh: pictures made for the prompts RL samples from (generated data alone): what RL is worth beside labels."""
    images: int | None = Field(None, ge=1)
    """How many of the pairs to use; all by default."""
    prompt_dropout: float = Field(0.1, ge=0, lt=1)
    """Share of rows that see the null prompt, which guidance needs."""
    image_weight: float = Field(1.0, ge=0)
    text_weight: float = Field(0.0, ge=0)
    writing: Writing = Writing()
    """How rows with a text of their own (an answer, or a thought before the image) are asked for it."""
    understanding_share: float = Field(0.0, ge=0, lt=1)
    """Share of a batch's rows that come from the recipe's `understanding` data."""
    noise: NoiseConfig | None = None
    """How images are masked, for a masked policy alone; its defaults where nothing is said."""
    lora: Lora | None = None

    @model_validator(mode="after")
    def _whole_batches(self) -> "SftStage":
        _divides(self.batch_size, self.micro_batch_size, "batch_size", "micro_batch_size")
        if self.noise is not None and self.noise.complementary:
            _divides(self.micro_batch_size, 2, "micro_batch_size", "the two masks of complementary noise")
        if self.image_weight + self.text_weight == 0:
            raise ValueError("image_weight and text_weight are both 0: nothing would be trained; raise one of them")
        return self


class Gates(Strict):
    """What stops a run. Shares are of one rollout; a ceiling stops after `patience` rollouts in a row above it."""

    off_policy: Literal["refuse", "allow"] = "refuse"
    """allow: the mismatch is still measured and no longer stops."""
    mismatch_mean: float | None = None
    """Largest mean |trainer - sampler| log-prob in nats; by default 1e-5 in float32 and 0.02 in bfloat16."""
    mismatch_max: float | None = None
    """Largest single one; by default 100 times the mean's."""
    flat_share: float = 0.98
    unavailable_share: float = 0.5
    duplicate_share: float = 0.98
    patience: int = Field(5, ge=1)
    canary_drift: float | None = Field(None, gt=0)
    """Largest change of a canary's score, in standard deviations of the canaries' first scores; null never stops."""


class GrpoStage(Optimization):
    """Group-relative policy optimisation on generated images."""

    kind: Literal["grpo"] = "grpo"
    start_from: str | None = None
    objective: ObjectiveConfig = ObjectiveConfig.model_validate({})
    prompts_per_step: int = Field(16, ge=1)
    samples_per_prompt: int = Field(8, ge=2)
    micro_batch_size: int = Field(64, ge=1)
    sampling: Sampling = Sampling()
    estimator: EstimatorConfig | None = None
    """What a masked policy's log-probs are; along the trajectory where nothing is said."""
    engine: EngineConfig = TorchEngineConfig()
    gates: Gates = Gates()
    held_out_every: int = Field(10, ge=0)
    """Score every n-th rollout with the held-out judge too; 0 never does."""
    canary_every: int = Field(0, ge=0)
    """Score the canaries, groups of the first rollout, anew every n-th rollout; 0 never does."""
    canary_prompts: int = Field(2, ge=1)
    """How many groups of the first rollout are canaries."""
    resample_flat: int = Field(0, ge=0)
    """How often a rollout's prompts whose group has no spread are replaced by others (DAPO's dynamic sampling)."""
    score_chunk: int | None = Field(None, ge=1)
    """So many prompts of a process are drawn, then scored while the next are drawn; by default all are drawn first."""
    store_every: int = Field(1, ge=1)
    """Keep every n-th rollout file with its images; the others are deleted once their updates are checkpointed."""
    lora: Lora | None = None

    @property
    def trains_image_rows(self) -> bool:
        """Of the head only the rows of image codes are trained: no others have a gradient, and nothing decays them."""
        whole = self.lora is None and self.weight_decay == 0 and self.deepspeed is None
        return whole and self.sampling.written is None

    @property
    def rollouts(self) -> int:
        """Samples a rollout step makes, over all processes."""
        return self.prompts_per_step * self.samples_per_prompt

    @model_validator(mode="after")
    def _whole_batches(self) -> "GrpoStage":
        updates = self.objective.updates_per_rollout
        _divides(self.samples_per_prompt, updates, "samples_per_prompt", "objective.updates_per_rollout")
        each = self.rollouts // updates
        _divides(each, self.micro_batch_size, "rollouts an update", "micro_batch_size")
        return self

    @model_validator(mode="after")
    def _canaries_are_looked_at(self) -> "GrpoStage":
        if self.gates.canary_drift is not None and not self.canary_every:
            raise ValueError("gates.canary_drift stops by the canaries, which canary_every: 0 never looks at; set it")
        return self

    @model_validator(mode="after")
    def _only_dropped_groups_are_replaced(self) -> "GrpoStage":
        advantage = self.objective.advantage
        if self.resample_flat and (advantage.flat_groups == "count" or advantage.baseline == "batch_mean"):
            raise ValueError(
                f"resample_flat replaces groups without spread, and objective {self.objective.name} counts them: its "
                "gradient would be another; set resample_flat to 0, or use an objective that drops them (grpo, dapo)"
            )
        return self


class EvalStage(Sampled):
    """Held-out prompts, several temperatures and sampling seeds, the held-out judge, intervals."""

    kind: Literal["eval"] = "eval"
    arms: tuple[str, ...] = Field(..., min_length=1)
    """Names of the policy stages to compare; the first is the baseline the others are measured against."""
    prompts: int = Field(256, ge=1)
    skip: int = Field(0, ge=0)
    """Held-out prompts passed over, so that choices can be made on others than those a result is reported on."""
    sampling_seeds: int = Field(2, ge=1)
    temperatures: tuple[Annotated[float, Field(gt=0)], ...] = Field((1.0, 0.7, 0.4), min_length=1)
    batch_prompts: int = Field(64, ge=1)

    def sampling(self, temperature: float) -> Sampling:
        """The law of the samples at one of the temperatures."""
        return Sampling(temperature=temperature, **{name: getattr(self, name) for name in Sampled.model_fields})


class ExportStage(Strict):
    """The adapter as plain PEFT files, merged weights as a transformers folder, both with card and codec."""

    kind: Literal["export"] = "export"
    start_from: str


Stage = Annotated[
    CodecStage | SftStage | GrpoStage | EvalStage | ExportStage,
    Field(discriminator="kind"),
]


def _divides(total: int, part: int, total_name: str, part_name: str) -> None:
    if total % part:
        raise ValueError(
            f"{total_name} = {total} is not a multiple of {part_name} = {part}; choose {part_name} among its divisors "
            f"{[d for d in range(1, total + 1) if total % d == 0]}"
        )
