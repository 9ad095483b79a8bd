"""What a recipe's stages may say. A stage has a name (its key in the recipe), a kind and its own settings."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from rlmm.config.base import Strict
from rlmm.config.codec import Perceptual
from rlmm.config.engines import EngineConfig, TorchEngineConfig, check_sync
from rlmm.config.masked import EstimatorConfig, NoiseConfig
from rlmm.config.objectives import ObjectiveConfig
from rlmm.config.optimization import Optimization, divides
from rlmm.config.pairs import PairsStage
from rlmm.config.policy import Lora
from rlmm.config.preference import DpoStage
from rlmm.config.sampling import Sampled, Sampling, Writing
from rlmm.objectives.noise import INDEPENDENT
from rlmm.objectives.records import Family


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
        divides(self.batch_size, self.micro_batch_size, "batch_size", "micro_batch_size")
        if self.noise is not None and self.noise.complementary:
            divides(self.micro_batch_size, 2, "micro_batch_size", "the two masks of complementary noise")
        if self.image_weight + self.text_weight == 0:
            raise ValueError("image_weight and text_weight are both 0: nothing would be trained; raise one of them")
        return self

    @property
    def rows_beside(self) -> int:
        """Of a batch's pictures and questions, each of which fills `rows_each` rows: those of `understanding`."""
        return round(self.understanding_share * (self.batch_size // self.rows_each))

    @property
    def rows_each(self) -> int:
        """2 under complementary noise: a mask and its complement of the same row."""
        return 2 if self.noise is not None and self.noise.complementary else 1


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


class Diagnostics(Strict):
    """Figures that cost something, and change nothing of the training."""

    gradient_agreement: bool = False
    """Log how far the gradients of the step's two halves, of different prompts, agree; holds one more gradient."""


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
    diagnostics: Diagnostics = Diagnostics()
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
    max_staleness: int = Field(0, ge=0, le=1)
    """1: a rollout is drawn while the one before it is scored and trained on, by the weights that were there then; the
    ratios of `objective.mismatch` correct for it."""
    store_every: int = Field(1, ge=1)
    """Keep every n-th rollout file with its images; the others are deleted once their updates are checkpointed."""
    lora: Lora | None = None

    def trains_image_rows(self, processes: int, *, cuda: bool) -> bool:
        """Of the head only the rows of image codes are trained: no others have a gradient, and nothing decays them.
        Not by several processes of CPUs: accelerate moves the model to "cpu:0", which copies every tensor, and rows and
        head would part; the whole head comes to the same."""
        whole = self.lora is None and self.weight_decay == 0 and self.deepspeed is None
        return whole and self.sampling.written is None and (processes == 1 or cuda)

    @property
    def kl_of_bounds(self) -> bool:
        """Whether the KL term is of bounds that are known by independent draws, so that it can be had without bias."""
        noise = self.estimator
        return noise is not None and noise.kind in INDEPENDENT and noise.draws > 1 and self.objective.kl.kind == "k2"

    @property
    def families(self) -> list[Family]:
        """What of the objective must be allowed to use the log-probs."""
        kl: list[Family] = ["bound_kl" if self.kl_of_bounds else "token_kl"]
        return [self.objective.objective().family, *(kl if self.objective.kl.coefficient > 0 else [])]

    @property
    def rollouts(self) -> int:
        """Samples a rollout step makes, over all processes."""
        return self.prompts_per_step * self.samples_per_prompt

    @model_validator(mode="after")
    def _whole_batches(self) -> "GrpoStage":
        updates = self.objective.updates_per_rollout
        divides(self.samples_per_prompt, updates, "samples_per_prompt", "objective.updates_per_rollout")
        each = self.rollouts // updates
        divides(each, self.micro_batch_size, "rollouts an update", "micro_batch_size")
        return self

    @model_validator(mode="after")
    def _a_step_has_two_halves(self) -> "GrpoStage":
        if not self.diagnostics.gradient_agreement:
            return self
        if self.deepspeed is not None:
            raise ValueError(
                "diagnostics.gradient_agreement reads the gradient when half of a step's micro-batches are done, and "
                "DeepSpeed keeps it reduced and in parts of its own from the first on; leave one of the two out"
            )
        micro_batches = self.rollouts // self.objective.updates_per_rollout // self.micro_batch_size
        if micro_batches % 2 or self.prompts_per_step % 2:
            raise ValueError(
                f"diagnostics.gradient_agreement compares two halves of a step: of {micro_batches} micro-batches and "
                f"{self.prompts_per_step} prompts; choose micro_batch_size and prompts_per_step so that both are even "
                "(with several processes, on each of them)"
            )
        return self

    @model_validator(mode="after")
    def _a_sync_of_adapters(self) -> "GrpoStage":
        check_sync(self.engine, lora=self.lora is not None)
        return self

    @model_validator(mode="after")
    def _one_law(self) -> "GrpoStage":
        gates = self.gates
        given = gates.mismatch_mean is not None or gates.mismatch_max is not None
        if self.sampling.law((0, 1 << 31)).off_policy and gates.off_policy == "refuse" and not given:
            raise ValueError(
                f"sampling.guidance {self.sampling.guidance}: the loss would be of another law than the one sampled "
                "from, which the gate stops; use guidance: guided or none, or set gates.off_policy: allow"
            )
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
    best_of: dict[str, Annotated[int, Field(ge=2)]] = {}
    """Arm -> n: a further arm, of each n samples the one that the recipe's rewards like most. It is trained no further,
    and draws n times as much."""
    prompts: int = Field(256, ge=1)
    skip: int = Field(0, ge=0)
    """Held-out prompts passed over, so that choices can be made on others than those a result is reported on."""
    sampling_seeds: int = Field(2, ge=1)
    temperatures: tuple[Annotated[float, Field(gt=0)], ...] = Field((1.0, 0.7, 0.4), min_length=1)
    batch_prompts: int = Field(64, ge=1)

    @model_validator(mode="after")
    def _the_best_of_an_arm(self) -> "EvalStage":
        unknown = [name for name in self.best_of if name not in self.arms]
        if unknown:
            raise ValueError(f"best_of names {unknown[0]!r}, which is none of the arms {list(self.arms)}; add it there")
        return self

    @property
    def every_arm(self) -> tuple[str, ...]:
        """The arms, after each the one that is the best of its samples, if any."""
        chosen = {arm: (best_of_name(arm, n),) for arm, n in self.best_of.items()}
        return tuple(name for arm in self.arms for name in (arm, *chosen.get(arm, ())))

    def sampling(self, temperature: float) -> Sampling:
        """The law of the samples at one of the temperatures."""
        return Sampling(temperature=temperature, **{name: getattr(self, name) for name in Sampled.model_fields})


def best_of_name(arm: str, n: int) -> str:
    """What an evaluation calls the best of n samples of an arm."""
    return f"{arm} best of {n}"


class ExportStage(Strict):
    """The adapter as plain PEFT files, merged weights as a transformers folder, both with card and codec."""

    kind: Literal["export"] = "export"
    start_from: str


PolicyStage = SftStage | GrpoStage | DpoStage
"""Stages that train a policy: what others start from, compare and export."""

Stage = Annotated[
    CodecStage | SftStage | GrpoStage | PairsStage | DpoStage | EvalStage | ExportStage,
    Field(discriminator="kind"),
]
