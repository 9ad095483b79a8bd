"""A memory plan: what a stage will hold, in bytes, from the recipe alone.

An update's part and what sampling holds are those of dry runs (`rlmm.dry_run`, `rlmm.dry_sampling`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from rlmm.config.engines import TorchEngineConfig, VllmServerConfig, VllmSizes
from rlmm.config.policy import CheckpointPolicy, NewPolicy
from rlmm.config.recipe import Recipe
from rlmm.config.stages import DpoStage, GrpoStage, PolicyStage
from rlmm.dry_run import NO_DRY_RUN, Held, dry_run
from rlmm.dry_sampling import Drawing, packed_shape, sampled
from rlmm.planned_codec import CodecPlan, codec_plan
from rlmm.planned_data import read_data
from rlmm.planned_rewards import RewardPlan, reward_plan
from rlmm.planned_rows import Rows, rows_of
from rlmm.planned_update import law_of, update_of
from rlmm.policies.families import llama
from rlmm.policies.families.loading import find_family, not_here, outline
from rlmm.policies.transformer import TransformerPolicy
from rlmm.readings import widest_step
from rlmm.sharing import Sharing, gathered, libraries, read_sharing, shared
from rollouts.contract import Layout

FLOAT_BYTES = 4


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
    """What sampling holds in their place, and in that of gradients and gathered weights: keys and values, the forward
    of a masked policy, logits; of weights in parts all, where it reads the policy's own."""
    engine: int
    """The rollout engine's own copy of the weights, and the copy of what is trained that rollouts are drawn ahead
    with."""
    at_once: bool = False
    """Whether rollouts are drawn during updates."""
    exchange: int = 0
    """What passes between processes: buckets of gradients, gathered weights."""
    offloaded: int = 0
    """Of the CPU's memory, and not in the total."""
    libraries: int = 0
    """What a process holds beside its tensors (`sharing.libraries`)."""
    pictures: int = 0
    """What making pictures of codes holds in the place of sampling, beside what vLLM reserves; or before the first step
    codes of pictures, in the optimizer's place too."""
    codec: int = 0
    """The image tokenizer's weights."""
    rewards: int = 0
    """Models and OCR engines of rewards that run in this process."""
    notes: tuple[str, ...] = ()
    """What was assumed, and what is not counted, with why."""

    @property
    def total(self) -> int:
        """Where sampling and updating take turns, the larger of their working sets counts."""
        held = self.weights + self.gradients + self.optimizer + self.reference + self.engine + self.exchange
        held += self.libraries + self.codec + self.rewards
        drawing = max(self.sampling, self.pictures)
        return held + (self.working + drawing if self.at_once else max(self.working, drawing))


@dataclass(frozen=True)
class Beside:
    """What a stage's process holds beside the policy."""

    codec: CodecPlan
    rewards: RewardPlan


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
    with torch.device("meta"):
        spelling = make().spelling
    data, beside = read_data(recipe.data, recipe.seed), Beside(codec_plan(recipe), reward_plan(recipe))
    return [
        _plan(name, stage, make, rows_of(recipe, stage, spelling, data), processes, beside)
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
    ] + notes(plans)


def notes(plans: Sequence[MemoryPlan]) -> list[str]:
    """What plans assume and what they leave out, each with the stages that it is true of."""
    stages: dict[str, list[str]] = {}
    for plan in plans:
        for note in plan.notes:
            stages.setdefault(note, []).append(plan.stage)
    return [f"of {', '.join(of)}: {note}" for note, of in stages.items()]


def no_dry_run(error: Exception) -> str:
    """What is said where a model's forward asks for values (`NO_DRY_RUN`)."""
    return f"no memory plan: the policy's forward cannot run on tensors without values ({error})"


def _plan(name: str, stage: PolicyStage, make: Make, rows: Rows, processes: int, beside: Beside) -> MemoryPlan:
    with torch.device("meta"):
        policy = make()
    layout, adapted = policy.layout, partial(_adapted, make, stage)
    held = dry_run(adapted, law_of(stage, layout), update_of(stage, layout, rows, processes))
    sharing = read_sharing(stage.deepspeed, processes, policy.sizes.hidden_size)
    share = shared(held, sharing)
    total = sum(weight.numel() for weight in policy.model.parameters())
    codec, scores = beside.codec, isinstance(stage, GrpoStage)
    sampling, pictures = 0, codec.working(stage, processes, rows.data)
    if isinstance(stage, GrpoStage):
        sampling = _sampling(stage, adapted, rows.own.length, processes) + _whole(stage, adapted, held, sharing)
        # vLLM keeps what it reserves while pictures are made.
        pictures += sampling if isinstance(stage.engine, VllmSizes) else 0
    ahead = isinstance(stage, GrpoStage) and stage.max_staleness > 0
    still = held.weights if stage.lora is None else held.gradients
    gradients = share.gradients * _gradients(stage)
    gone = 0 if ahead else gradients + (0 if scores else share.optimizer)
    return MemoryPlan(
        stage=name,
        weights=share.weights,
        gradients=gradients,
        optimizer=share.optimizer,
        reference=held.weights if _holds_reference(stage, layout) else 0,
        working=share.working,
        sampling=sampling if ahead else max(0, sampling - gradients - gathered(held, sharing)),
        engine=(_engine_copy(stage, adapted, total, held) if isinstance(stage, GrpoStage) else 0) + still * ahead,
        at_once=ahead,
        exchange=share.exchange,
        offloaded=share.offloaded,
        libraries=libraries(),
        codec=codec.weights,
        rewards=beside.rewards.held if scores else 0,
        pictures=max(0, pictures - gone),
        notes=(*filter(None, [rows.assumed]), *codec.notes(stage), *(beside.rewards.uncounted if scores else ())),
    )


def _adapted(make: Make, stage: PolicyStage) -> TransformerPolicy:
    """The policy, with the stage's adapter."""
    policy = make()
    if stage.lora is not None:
        policy.add_lora(stage.lora, seed=0)
    return policy


def _holds_reference(stage: PolicyStage, layout: Layout) -> bool:
    """Whether a second set of weights stands beside the trained ones."""
    if isinstance(stage, DpoStage):
        live = layout.mask is not None or stage.loss == "kto"
        return live and (stage.lora is None or stage.reference is not None)
    return isinstance(stage, GrpoStage) and stage.objective.kl.coefficient > 0 and stage.lora is None


def _gradients(stage: PolicyStage) -> int:
    """Of a step, and beside it that of its first half where the halves are compared."""
    return 2 if isinstance(stage, GrpoStage) and stage.diagnostics.gradient_agreement else 1


def _engine_copy(stage: GrpoStage, make: Make, total: int, held: Held) -> int:
    """vLLM has one in what it computes in. The torch engine has one where it packs the weights: under bfloat16 the
    float32 ones stand beside the rounded ones, for its fingerprint."""
    if isinstance(stage.engine, VllmSizes):
        servers = stage.engine.started if isinstance(stage.engine, VllmServerConfig) else 1
        half = (stage.engine.dtype or stage.precision) == "bfloat16"
        # Bases of adapters are in main memory, which is the one that is planned where there is no GPU.
        bases = 0 if torch.cuda.is_available() else stage.engine.bases * held.weights
        return servers * total * (FLOAT_BYTES // 2 if half else FLOAT_BYTES) + bases
    with torch.device("meta"):
        packed = packed_shape(make()) is not None
    return packed * total * FLOAT_BYTES * (3 if stage.precision == "bfloat16" else 2) // 2


def _whole(stage: GrpoStage, make: Make, held: Held, sharing: Sharing) -> int:
    """The weights, where they are in parts and the torch engine has no copy of them to draw from, or the image is drawn
    from the policy's hidden states."""
    if sharing.zero != 3:
        return 0
    with torch.device("meta"):
        policy = make()
    draws = isinstance(stage.engine, TorchEngineConfig) and packed_shape(policy) is None
    decodes = stage.sampling.answer is None and find_family(policy.layout.family).reads_hidden
    return held.weights if draws or decodes else 0


def _sampling(stage: GrpoStage, make: Make, length: int, processes: int) -> int:
    """What the torch engine holds in its widest batch, or what vLLM reserves."""
    if isinstance(stage.engine, VllmSizes):
        servers = stage.engine.started if isinstance(stage.engine, VllmServerConfig) else 1
        return servers * (stage.engine.kv_megabytes << 20)
    with torch.device("meta"):
        layout = make().layout
    answer = stage.sampling.answer
    law = law_of(stage, layout) if answer is None else answer.span(layout, ()).law
    return sampled(make, law, _drawing(stage, layout, len(law.streams()), length, processes))


def _drawing(stage: GrpoStage, layout: Layout, streams: int, length: int, processes: int) -> Drawing:
    answer = stage.sampling.answer
    prompts = stage.prompts_per_step // processes
    prompts = min(prompts, stage.score_chunk or prompts)
    masked, positions = layout.mask is not None, len(layout.grid.decided())
    # Samples are drawn prompt by prompt, but where each has its own: a masked policy's, and those that have thought.
    each = 1 if masked or stage.sampling.thought is not None else stage.samples_per_prompt
    requests = prompts * stage.samples_per_prompt // each
    held = min(requests, max(1, stage.engine.max_rows // (streams * each)))
    unmasking = None if stage.sampling.unmasking is None else stage.sampling.unmasking.record()
    span = layout.grid.length if answer is None else answer.length_limit
    return Drawing(
        streams=streams,
        prefixes=streams * (prompts if masked else held),
        prefix=length - span,
        rows=streams * held * each,
        span=span,
        drawn=held * each * (1 if unmasking is None else widest_step(unmasking, positions)),
        precision=stage.precision,
        order=None if unmasking is None or unmasking.policy_free else unmasking,
    )


def readable(size: int) -> str:
    """1536 -> '1.5 KiB'."""
    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"
