"""What a recipe says of making preferences."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from rlmm.config.base import Strict, nearest
from rlmm.config.engines import EngineConfig, TorchEngineConfig, check_sync
from rlmm.config.preference import DpoStage
from rlmm.config.rewards import Rewards
from rlmm.config.sampling import Sampling, Written

DRAWING = (
    "start_from", "judge", "understanding", "split", "prompts", "samples_per_prompt", "batch_prompts", "sampling",
    "engine", "precision",
)  # fmt: skip
"""Settings of a pairs stage that samples are drawn with."""


class Asked(Strict):
    """A question about a picture, whose right answer is the prompt that asks for such a picture."""

    question: str = Field("what is shown", min_length=1)
    answer: Written
    rewards: Rewards
    """What compares the answer with the prompt, such as exact_match or bleu."""


class PairsStage(Strict):
    """Preference pairs of a policy's own samples: the best of a prompt against the worst."""

    kind: Literal["pairs"] = "pairs"
    rollouts: str | None = None
    """A grpo stage before this one, whose stored rollouts are used; null: samples are drawn anew."""
    start_from: str | None = None
    """The stage whose policy is sampled; by default the policy stage before this one, if any."""
    rewards: Rewards | None = None
    """What scores the samples; null: the recipe's rewards (of stored rollouts, the scores stored with them)."""
    judge: Asked | None = None
    """Self-play: in place of rewards the policy itself says what its picture shows, and is scored by its answer."""
    understanding: Asked | None = None
    """Pairs of answers about the rows' own pictures, too: a row's prompt and picture give one pair of each kind."""
    split: Literal["prompts", "train", "fresh"] = "prompts"
    """Whose prompts are sampled; `understanding` needs rows with pictures, which `prompts` has not."""
    prompts: int = Field(64, ge=1)
    """Prompts that are sampled, of those that RL samples from."""
    samples_per_prompt: int = Field(8, ge=2)
    batch_prompts: int = Field(16, ge=1)
    """Prompts sampled at once; a stopped stage goes on after the last whole batch."""
    sampling: Sampling = Sampling()
    engine: EngineConfig = TorchEngineConfig()
    precision: Literal["float32", "bfloat16"] = "float32"
    pairs_per_prompt: int = Field(1, ge=1)
    """Most pairs a prompt: the best against the worst, the second best against the second worst, and so on."""
    margin: float = Field(0.0, ge=0)
    """Pairs whose scores differ by no more than this are left out."""
    duplicate_distance: float = Field(0.0, ge=0, lt=1)
    """Of two samples of a prompt that differ in no more than this share of their tokens, the later one is left out."""
    max_excluded_share: float = Field(1.0, ge=0, le=1)
    """Prompts without a pair above this share are an error; one that has none at all always is."""

    @model_validator(mode="after")
    def _stored_rollouts_are_drawn(self) -> "PairsStage":
        fields = type(self).model_fields
        given = [name for name in fields if name in DRAWING and getattr(self, name) != fields[name].default]
        if self.rollouts is not None and given:
            raise ValueError(f"{given[0]} is of samples drawn anew, and `rollouts` has some that were; leave it out")
        if 2 * self.pairs_per_prompt > self.samples_per_prompt and self.rollouts is None:
            raise ValueError(
                f"{self.samples_per_prompt} samples a prompt make at most {self.samples_per_prompt // 2} pairs; lower "
                "pairs_per_prompt, or raise samples_per_prompt"
            )
        if self.judge is not None and self.rewards is not None:
            raise ValueError("the samples are scored by `judge` or by `rewards`; give one of them")
        if self.understanding is not None and self.split == "prompts":
            raise ValueError("understanding asks about a row's picture, and split prompts has none; use train or fresh")
        check_sync(self.engine, lora=False)
        if (self.judge or self.understanding) and self.sampling.written is not None:
            raise ValueError("judge and understanding are of pictures alone; leave thought and answer out of sampling")
        return self


def check_preferences(stages: Mapping[str, Any]) -> None:
    """Raises ValueError where a dpo stage names no pairs stage before it, or a pairs stage no grpo stage before it."""
    before: dict[str, str] = {}
    for name, stage in stages.items():
        for setting, kind in (("pairs", "pairs"), ("rollouts", "grpo")):
            wanted = getattr(stage, setting, None) if isinstance(stage, DpoStage | PairsStage) else None
            known = [other for other, its in before.items() if its == kind]
            if wanted is not None and wanted not in known:
                raise ValueError(
                    f"stage {name!r}: {setting} names {wanted!r}, which is no {kind} stage before it."
                    f"{nearest(wanted, known)}"
                )
        before[name] = stage.kind
