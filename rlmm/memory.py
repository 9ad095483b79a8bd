"""A memory plan: what a stage will hold, in bytes, from the recipe alone.

Weights, gradients and Adam's moments are counted; activations are the estimate of Korthikanti et al. 2022
(arXiv 2205.05198, eq. 2) without dropout masks, scaled to the precision in use.
"""

from dataclasses import dataclass

from rlmm.codecs import build_codec
from rlmm.config.policy import NewPolicy
from rlmm.config.recipe import Recipe
from rlmm.config.stages import GrpoStage, SftStage
from rlmm.policies.causal import CausalPolicy
from rlmm.policies.families import llama
from rlmm.policies.head import CHUNK

ADAM_BYTES = 8
FLOAT_BYTES = 4


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes a stage holds at its widest point, by what holds them."""

    stage: str
    weights: int
    gradients: int
    optimizer: int
    reference: int
    activations: int
    logits: int
    kv_cache: int

    @property
    def total(self) -> int:
        """Sampling and updating take turns, so the larger of their working sets counts."""
        held = self.weights + self.gradients + self.optimizer + self.reference
        return held + max(self.activations + self.logits, self.kv_cache)


def memory_plans(recipe: Recipe) -> list[MemoryPlan]:
    """A plan for each policy stage of a recipe with a new policy; empty for a checkpoint, whose size is its own."""
    if not isinstance(recipe.policy, NewPolicy):
        return []
    codec = build_codec(recipe.codec)
    policy = llama.build(recipe.policy, num_codes=codec.num_codes, grid=codec.grid, seed=0)
    stages = {name: stage for name, stage in recipe.stages.items() if isinstance(stage, SftStage | GrpoStage)}
    return [_plan(name, stage, recipe.policy, policy) for name, stage in stages.items()]


def _plan(name: str, stage: SftStage | GrpoStage, shape: NewPolicy, policy: CausalPolicy) -> MemoryPlan:
    total = sum(parameter.numel() for parameter in policy.model.parameters())
    trained = total if stage.lora is None else _lora_size(shape, stage.lora.rank, len(stage.lora.target_modules))
    streams = 2 if isinstance(stage, GrpoStage) and stage.sampling.guidance_scale != 1 else 1
    length = policy.layout.grid.length + 32
    rows = stage.micro_batch_size * streams
    frozen = isinstance(stage, GrpoStage) and stage.objective.kl.coefficient > 0 and stage.lora is None
    kv_rows = min(stage.rollouts * streams, stage.engine.max_rows) if isinstance(stage, GrpoStage) else 0
    width = policy.layout.image[1] - policy.layout.image[0]
    return MemoryPlan(
        stage=name,
        weights=(total + (trained if stage.lora else 0)) * FLOAT_BYTES,
        gradients=trained * FLOAT_BYTES,
        optimizer=trained * ADAM_BYTES,
        reference=total * FLOAT_BYTES if frozen else 0,
        activations=_activations(shape, rows, length, stage.precision == "bfloat16"),
        logits=3 * min(rows * length, CHUNK) * width * FLOAT_BYTES,
        kv_cache=kv_rows * length * shape.num_layers * 2 * shape.hidden_size * FLOAT_BYTES,
    )


def _activations(shape: NewPolicy, rows: int, length: int, half: bool) -> int:
    per_layer = rows * length * shape.hidden_size * 32 + 4 * shape.num_heads * rows * length * length
    return int(per_layer * shape.num_layers * (1 if half else 2))


def _lora_size(shape: NewPolicy, rank: int, modules: int) -> int:
    return shape.num_layers * modules * rank * (shape.hidden_size + max(shape.hidden_size, shape.intermediate_size))


def readable(size: int) -> str:
    """1536 -> '1.5 KiB'."""
    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"
