"""A memory plan: what a stage will hold, in bytes, from the recipe alone.

Weights, gradients and Adam's moments are counted; activations are the estimate of Korthikanti et al. 2022
(arXiv 2205.05198, eq. 2) without dropout masks, scaled to the precision in use.
"""

from dataclasses import dataclass

import torch

from rlmm.config.data import Data, RowsData, ScenesData
from rlmm.config.engines import TorchEngineConfig, VllmServerConfig, VllmSizes
from rlmm.config.policy import CheckpointPolicy, NewPolicy
from rlmm.config.preference import PairNoise
from rlmm.config.recipe import Recipe
from rlmm.config.stages import DpoStage, GrpoStage, PolicyStage
from rlmm.policies.families import llama
from rlmm.policies.families.loading import empty_model, layout_of, load_config
from rlmm.policies.head import LOGIT_BYTES
from rollouts.contract import Layout

ADAM_BYTES = 8
FLOAT_BYTES = 4
PROMPT_TOKENS = 32
"""What a prompt is taken to need."""


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
    engine: int
    """The rollout engine's own copy of the weights."""

    @property
    def total(self) -> int:
        """Sampling and updating take turns, so the larger of their working sets counts."""
        held = self.weights + self.gradients + self.optimizer + self.reference + self.engine
        return held + max(self.activations + self.logits, self.kv_cache)


def memory_plans(recipe: Recipe) -> list[MemoryPlan]:
    """A plan for each policy stage. Raises ValueError where the recipe's checkpoint cannot be read."""
    if isinstance(recipe.policy, NewPolicy):
        assert recipe.codec is not None, "the recipe lets no new policy be without"
        size = recipe.policy
        with torch.device("meta"):  # shapes alone
            policy = llama.build(size, num_codes=recipe.codec.num_codes, grid=recipe.codec.grid, seed=0)
        layout, total = policy.layout, sum(parameter.numel() for parameter in policy.model.parameters())
    else:
        layout, whole = layout_of(recipe.policy.path, recipe.policy), load_config(recipe.policy.path, recipe.policy)
        total = sum(parameter.numel() for parameter in empty_model(whole).parameters())
        config = whole.get_text_config()
        size = NewPolicy(
            hidden_size=config.hidden_size,
            num_layers=config.num_hidden_layers,
            num_heads=config.num_attention_heads,
            intermediate_size=config.intermediate_size,
            tie_embeddings=config.tie_word_embeddings,
        )
    stages = {name: stage for name, stage in recipe.stages.items() if isinstance(stage, PolicyStage)}
    half = isinstance(recipe.policy, CheckpointPolicy) and recipe.policy.dtype == "bfloat16"
    held = FLOAT_BYTES // 2 if half else FLOAT_BYTES
    sources = _has_sources(recipe.data)
    return [
        _plan(name, stage, size, total, layout, held, _length(stage, layout, sources)) for name, stage in stages.items()
    ]


def _has_sources(data: Data) -> bool:
    """Whether prompts hold an image; one is counted."""
    if isinstance(data, RowsData):
        return data.sources_column is not None
    return isinstance(data, ScenesData) and data.variant != "text_to_image"


def _length(stage: PolicyStage, layout: Layout, sources: bool) -> int:
    """Positions of a sequence: prompt, source image, text at its longest, image."""
    written = stage.sampling.written if isinstance(stage, GrpoStage) else None
    draws = not isinstance(stage, GrpoStage) or stage.sampling.answer is None
    text = 0 if written is None else written.length_limit
    return PROMPT_TOKENS + text + (sources + draws) * layout.grid.length


def _plan(
    name: str, stage: PolicyStage, shape: NewPolicy, total: int, layout: Layout, held: int, length: int
) -> MemoryPlan:
    trained = _trained(stage, shape, total, layout)
    streams = len(stage.sampling.law(layout.image).streams()) if isinstance(stage, GrpoStage) else 1
    rows = stage.micro_batch_size * streams * _sequences(stage, layout)
    return MemoryPlan(
        stage=name,
        weights=total * held + (trained if stage.lora else 0) * FLOAT_BYTES,
        gradients=trained * FLOAT_BYTES * _gradients(stage),
        optimizer=trained * ADAM_BYTES,
        reference=total * FLOAT_BYTES if _holds_reference(stage, layout) else 0,
        activations=_activations(shape, rows, length, stage),
        logits=_logits(stage, rows, layout),
        kv_cache=_sampling(stage, shape, streams, length, layout.causal_prompt) if isinstance(stage, GrpoStage) else 0,
        engine=_engine_copy(stage, total) if isinstance(stage, GrpoStage) else 0,
    )


def _logits(stage: PolicyStage, rows: int, layout: Layout) -> int:
    """A few copies of a chunk; under an order of confidence those of every masked position at once."""
    size = rows * (layout.grid.length + PROMPT_TOKENS) * (layout.image[1] - layout.image[0]) * FLOAT_BYTES
    unmasking = stage.sampling.unmasking if isinstance(stage, GrpoStage) else None
    whole = unmasking is not None and unmasking.order in ("confidence", "threshold")
    return 3 * (size if whole else min(size, LOGIT_BYTES))


def _sequences(stage: PolicyStage, layout: Layout) -> int:
    """Sequences that a row of a micro-batch is read as."""
    if isinstance(stage, DpoStage):
        draws = 1 if layout.mask is None else (stage.noise or PairNoise()).draws
        return draws if stage.loss == "kto" else 2 * draws
    return _states(stage) if isinstance(stage, GrpoStage) else 1


def _holds_reference(stage: PolicyStage, layout: Layout) -> bool:
    """Whether a second set of weights stands beside the trained ones."""
    if isinstance(stage, DpoStage):
        live = layout.mask is not None or stage.loss == "kto"
        return live and (stage.lora is None or stage.reference is not None)
    return isinstance(stage, GrpoStage) and stage.objective.kl.coefficient > 0 and stage.lora is None


def _states(stage: GrpoStage) -> int:
    """Partly masked sequences that a sample's log-prob reads at once; 1 for a next-token policy."""
    if stage.sampling.unmasking is None:
        return 1
    steps = stage.sampling.unmasking.steps
    if stage.estimator is None:
        return steps
    return min(steps, stage.estimator.steps or steps) if stage.estimator.kind == "trajectory" else stage.estimator.draws


def _trained(stage: PolicyStage, shape: NewPolicy, total: int, layout: Layout) -> int:
    """Weights with a gradient: an adapter's, or all but the rows of the head that are never decided."""
    if stage.lora is not None:
        return _lora_size(shape, stage.lora.rank, len(stage.lora.target_modules))
    if not isinstance(stage, GrpoStage) or not stage.trains_image_rows or shape.tie_embeddings:
        return total
    return total - (layout.vocab_size - (layout.image[1] - layout.image[0])) * shape.hidden_size


def _gradients(stage: PolicyStage) -> int:
    """Of a step, and beside it that of its first half where the halves are compared."""
    return 2 if isinstance(stage, GrpoStage) and stage.diagnostics.gradient_agreement else 1


def _engine_copy(stage: GrpoStage, total: int) -> int:
    """Under bfloat16 the torch engine keeps the float32 weights beside the rounded ones, for its fingerprint."""
    if isinstance(stage.engine, VllmServerConfig):
        return stage.engine.started * total * FLOAT_BYTES
    both = stage.precision == "bfloat16" and isinstance(stage.engine, TorchEngineConfig)
    return total * FLOAT_BYTES * 3 // 2 if both else total * FLOAT_BYTES


def _sampling(stage: GrpoStage, shape: NewPolicy, streams: int, length: int, causal_prompt: bool) -> int:
    """Keys and values of the torch engine's widest batch, or what vLLM reserves; of a masked policy, a forward's."""
    if isinstance(stage.engine, VllmSizes):
        servers = stage.engine.started if isinstance(stage.engine, VllmServerConfig) else 1
        return servers * (stage.engine.kv_megabytes << 20)
    rows = min(stage.rollouts * streams, stage.engine.max_rows)
    if stage.sampling.unmasking is not None:  # one layer's activations at a time, and prompts' keys and values if kept
        kept = rows * PROMPT_TOKENS * shape.num_layers * 2 * shape.hidden_size * FLOAT_BYTES
        return _activations(shape, rows, length, stage) // shape.num_layers + causal_prompt * kept
    return rows * length * shape.num_layers * 2 * shape.hidden_size * FLOAT_BYTES


def _activations(shape: NewPolicy, rows: int, length: int, stage: PolicyStage) -> int:
    """All layers' activations, or with gradient checkpointing each layer's input and one layer's activations."""
    half = stage.precision == "bfloat16"
    per_layer = rows * length * shape.hidden_size * 32 + 4 * shape.num_heads * rows * length * length
    per_layer *= 1 if half else 2
    if stage.gradient_checkpointing:
        return per_layer + shape.num_layers * rows * length * shape.hidden_size * (2 if half else FLOAT_BYTES)
    return per_layer * shape.num_layers


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
