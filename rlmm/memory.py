"""A memory plan: what a stage will hold, in bytes, from the recipe alone.

An update's part is that of a dry run (`rlmm.dry_run`); what sampling holds is reckoned.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from rlmm.config.data import Data, RowsData, ScenesData
from rlmm.config.engines import TorchEngineConfig, VllmServerConfig, VllmSizes
from rlmm.config.policy import CheckpointPolicy, NewPolicy
from rlmm.config.recipe import Recipe
from rlmm.config.stages import DpoStage, GrpoStage, PolicyStage, SftStage
from rlmm.dry_run import NO_DRY_RUN, Update, dry_run
from rlmm.policies.families import llama
from rlmm.policies.families.loading import not_here, outline
from rlmm.policies.transformer import TransformerPolicy
from rlmm.readings import gate_reading, update_reading
from rlmm.sharing import read_sharing, shared
from rollouts.contract import Layout
from rollouts.law import Law

FLOAT_BYTES = 4
PROMPT_TOKENS = 32
"""What a prompt is taken to need."""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that each process of a stage holds at its widest point, by what holds them."""

    stage: str
    weights: int
    gradients: int
    optimizer: int
    reference: int
    working: int
    """What an update holds beside these at its widest point: activations and logits."""
    sampling: int
    """What sampling holds in their place: keys and values, or a forward of a masked policy."""
    engine: int
    """The rollout engine's own copy of the weights, and the copy of what is trained that rollouts are drawn ahead
    with."""
    at_once: bool = False
    """Whether rollouts are drawn during updates."""
    exchange: int = 0
    """What passes between processes: buckets of gradients, gathered weights."""
    offloaded: int = 0
    """Of the CPU's memory, and not in the total."""

    @property
    def total(self) -> int:
        """Where sampling and updating take turns, the larger of their working sets counts."""
        held = self.weights + self.gradients + self.optimizer + self.reference + self.engine + self.exchange
        return held + (self.working + self.sampling if self.at_once else max(self.working, self.sampling))


Make = Callable[[], TransformerPolicy]
"""Builds a stage's policy on the current device."""


def memory_plans(recipe: Recipe, processes: int = 1) -> list[MemoryPlan]:
    """A plan for each policy stage. Raises ValueError where the recipe's checkpoint cannot be read."""
    if isinstance(recipe.policy, NewPolicy):
        assert recipe.codec is not None, "the recipe lets no new policy be without"
        make: Make = partial(
            llama.build, recipe.policy, num_codes=recipe.codec.num_codes, grid=recipe.codec.grid, seed=0
        )
    else:
        make = partial(outline, recipe.policy)
    sources = has_sources(recipe.data)
    return [
        _plan(name, stage, make, sources, processes)
        for name, stage in recipe.stages.items()
        if isinstance(stage, PolicyStage)
    ]


def plan_lines(recipe: Recipe, processes: int = 1) -> list[str]:
    """What a run says of its memory before it begins: a line a policy stage, or why there is no plan."""
    if isinstance(recipe.policy, CheckpointPolicy) and (absent := not_here(recipe.policy)) is not None:
        return [f"no memory plan: {recipe.policy.path} is not here: {absent}"]
    try:
        plans = memory_plans(recipe, processes)
    except NO_DRY_RUN as error:
        return [no_dry_run(error)]
    return [
        f"{plan.stage}: about {readable(plan.total)} of memory{' a process' * (processes > 1)}, "
        f"{readable(plan.weights)} of them the weights"
        for plan in plans
    ]


def no_dry_run(error: Exception) -> str:
    """What is said where a model's forward asks for values (`NO_DRY_RUN`)."""
    return f"no memory plan: the policy's forward cannot run on tensors without values ({error})"


def has_sources(data: Data) -> bool:
    """Whether prompts hold an image; one is counted."""
    if isinstance(data, RowsData):
        return data.sources_column is not None
    return isinstance(data, ScenesData) and data.variant != "text_to_image"


def _length(stage: PolicyStage, layout: Layout, sources: bool) -> int:
    """Positions of a sequence: prompt, source image, text at its longest, image."""
    written = stage.sampling.written if isinstance(stage, GrpoStage) else None
    draws = not isinstance(stage, GrpoStage) or stage.sampling.answer is None
    text = 0 if written is None else written.length_limit
    # Before a text a source image may be seen through an encoder, with features of its own number.
    source = layout.seeing.length if layout.seeing is not None and text else layout.grid.length
    return PROMPT_TOKENS + text + sources * source + draws * layout.grid.length


def _plan(name: str, stage: PolicyStage, make: Make, sources: bool, processes: int) -> MemoryPlan:
    with torch.device("meta"):
        policy = make()
    layout, length = policy.layout, _length(stage, policy.layout, sources)
    held = dry_run(partial(_adapted, make, stage), _law(stage, layout), _update(stage, layout, length, processes))
    share = shared(held, read_sharing(stage.deepspeed, processes, policy.sizes.hidden_size))
    total = sum(weight.numel() for weight in policy.model.parameters())
    sampling = _sampling(stage, policy, length, processes) if isinstance(stage, GrpoStage) else 0
    ahead = isinstance(stage, GrpoStage) and stage.max_staleness > 0
    still = held.weights if stage.lora is None else held.gradients
    gradients = share.gradients * _gradients(stage)
    return MemoryPlan(
        stage=name,
        weights=share.weights,
        gradients=gradients,
        optimizer=share.optimizer,
        reference=held.weights if _holds_reference(stage, layout) else 0,
        working=share.working,
        sampling=sampling if ahead else max(0, sampling - gradients),
        engine=(_engine_copy(stage, total) if isinstance(stage, GrpoStage) else 0) + still * ahead,
        at_once=ahead,
        exchange=share.exchange,
        offloaded=share.offloaded,
    )


def _adapted(make: Make, stage: PolicyStage) -> TransformerPolicy:
    """The policy, with the stage's adapter."""
    policy = make()
    if stage.lora is not None:
        policy.add_lora(stage.lora, seed=0)
    return policy


def _law(stage: PolicyStage, layout: Layout) -> Law:
    return stage.sampling.law(layout.image) if isinstance(stage, GrpoStage) else Law(layout.image)


def _update(stage: PolicyStage, layout: Layout, length: int, processes: int) -> Update:
    streams = len(_law(stage, layout).streams(replay=True))
    accumulated = _rows(stage) > stage.micro_batch_size * processes
    positions = len(layout.grid.decided())
    read = None if layout.mask is None else update_reading(stage, positions)
    return Update(
        rows=streams * (_sequences(stage) if read is None else read.states),
        streams=streams,
        length=length,
        decided=min(length - 1, layout.grid.length),
        again=accumulated,
        precision=stage.precision,
        checkpointing=stage.gradient_checkpointing,
        image_rows=isinstance(stage, GrpoStage) and stage.trains_image_rows,
        read=read,
        gate=None if layout.mask is None else gate_reading(stage, positions),
        entropy=isinstance(stage, GrpoStage) and stage.objective.entropy.coefficient > 0,
    )


def _rows(stage: PolicyStage) -> int:
    """Of a step, over all processes."""
    if isinstance(stage, GrpoStage):
        return stage.rollouts // stage.objective.updates_per_rollout
    assert isinstance(stage, SftStage | DpoStage), "no other stage trains a policy"
    return stage.batch_size


def _sequences(stage: PolicyStage) -> int:
    """Sequences of a next-token policy's micro-batch."""
    return stage.micro_batch_size * (2 if isinstance(stage, DpoStage) and stage.loss != "kto" else 1)


def _holds_reference(stage: PolicyStage, layout: Layout) -> bool:
    """Whether a second set of weights stands beside the trained ones."""
    if isinstance(stage, DpoStage):
        live = layout.mask is not None or stage.loss == "kto"
        return live and (stage.lora is None or stage.reference is not None)
    return isinstance(stage, GrpoStage) and stage.objective.kl.coefficient > 0 and stage.lora is None


def _gradients(stage: PolicyStage) -> int:
    """Of a step, and beside it that of its first half where the halves are compared."""
    return 2 if isinstance(stage, GrpoStage) and stage.diagnostics.gradient_agreement else 1


def _engine_copy(stage: GrpoStage, total: int) -> int:
    """Under bfloat16 the torch engine keeps the float32 weights beside the rounded ones, for its fingerprint."""
    if isinstance(stage.engine, VllmServerConfig):
        return stage.engine.started * total * FLOAT_BYTES
    both = stage.precision == "bfloat16" and isinstance(stage.engine, TorchEngineConfig)
    return total * FLOAT_BYTES * 3 // 2 if both else total * FLOAT_BYTES


def _sampling(stage: GrpoStage, policy: TransformerPolicy, length: int, processes: int) -> int:
    """Keys and values of the torch engine's widest batch, or what vLLM reserves; of a masked policy, a forward's."""
    if isinstance(stage.engine, VllmSizes):
        servers = stage.engine.started if isinstance(stage.engine, VllmServerConfig) else 1
        return servers * (stage.engine.kv_megabytes << 20)
    sizes, streams = policy.sizes, len(_law(stage, policy.layout).streams())
    rows = min(stage.rollouts // processes * streams, stage.engine.max_rows)
    heads = getattr(sizes, "num_key_value_heads", None) or sizes.num_attention_heads
    width = getattr(sizes, "head_dim", None) or sizes.hidden_size // sizes.num_attention_heads
    position = sizes.num_hidden_layers * 2 * heads * width * FLOAT_BYTES
    if stage.sampling.unmasking is None:
        return rows * length * position
    # One layer's widest activations at a time, and prompts' keys and values if they are kept.
    forward = rows * length * (2 * sizes.intermediate_size + 4 * sizes.hidden_size) * FLOAT_BYTES
    return forward + policy.layout.causal_prompt * rows * PROMPT_TOKENS * position


def readable(size: int) -> str:
    """1536 -> '1.5 KiB'."""
    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"
