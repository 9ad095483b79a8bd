"""The memory plan of a masked policy is what its updates and its sampler hold."""

import pytest
import torch

from rlmm.config.recipe import read_recipe
from rlmm.config.stages import GrpoStage
from rlmm.dry_run import Live
from rlmm.dry_sampling import sampled
from rlmm.memory import _drawing, memory_plans
from rlmm.planned_update import law_of
from rlmm.train.grpo import grpo_loss
from rlmm.train.grpo_batch import GrpoBatch
from rlmm.train.metrics import Meter
from rollouts.torch_engine.masked import MaskedTorchEngine
from rollouts.trajectory import Trajectory
from tests.integration.planned import RECIPES, Planned, planned, sizes

ROWS = (
    "stages.grpo.lora=null",
    "stages.grpo.weight_decay=0.1",  # so that the whole head is trained, here as there
    "stages.grpo.prompts_per_step=2",
    "stages.grpo.micro_batch_size=8",
)
TOKENS, ROW = "objective={name: grpo}", "objective={name: gspo}"
CONFIDENT = "sampling={unmasking: {steps: 6, order: confidence}}"
GUIDED = "sampling={guidance_scale: 2.0, unmasking: {steps: 6, order: confidence}}"
PLAIN = "sampling={unmasking: {steps: 6}}"


def case(name: str, *overrides: str, size: str = "", often: bool = False) -> object:
    settings = (size or sizes(family="masked"), *ROWS, *(f"stages.grpo.{one}" for one in overrides))
    return pytest.param(settings, id=name, marks=() if often else pytest.mark.long)


WIDE = sizes(256, 512, family="masked")
CASES = [
    case("whole trajectories", TOKENS, PLAIN),
    case("two micro-batches", TOKENS, PLAIN, "micro_batch_size=4", size=WIDE),
    case("a part of the steps", TOKENS, PLAIN, "estimator={steps: 2}", often=True),
    case("blocks", TOKENS, "sampling={unmasking: {steps: 6, order: blocks, block: 16}}"),
    case("steps that chance leaves empty", TOKENS,
         "sampling={unmasking: {steps: 48, order: ancestral, schedule: linear}}", "micro_batch_size=2", often=True),
    case("top-k", TOKENS, "sampling={top_k: 10, unmasking: {steps: 6}}", often=True),
    case("guidance off-policy", TOKENS, "gates.off_policy=allow",
         "sampling={guidance: conditional_only, guidance_scale: 2.0, unmasking: {steps: 6}}"),
    case("editing", TOKENS, "sampling={guidance_scale: 2.0, source_scale: 1.5, unmasking: {steps: 6}}"),
    case("entropy", "objective={name: grpo, entropy: {coefficient: 0.01}}", PLAIN),
    case("confident", TOKENS, CONFIDENT, often=True),
    case("confident, linear", TOKENS, "sampling={unmasking: {steps: 6, order: confidence, schedule: linear}}"),
    case("confident, guided", TOKENS, GUIDED, often=True),
    case("confident, guided, wide", TOKENS, GUIDED, size=WIDE),
    case("confident, causal prompts", TOKENS, GUIDED, size=sizes(family="masked", attention="causal")),
    case("confident, editing", TOKENS,
         "sampling={guidance_scale: 2.0, source_scale: 1.5, unmasking: {steps: 4, order: confidence}}"),
    case("confident, a part of the steps", TOKENS, CONFIDENT, "estimator={steps: 2}"),
    case("confident, without the order", TOKENS, CONFIDENT, "estimator={order_term: false}", often=True),
    case("confident, without the order, guided", TOKENS, GUIDED, "estimator={order_term: false}"),
    case("confident, bfloat16", TOKENS, GUIDED, "precision=bfloat16", size=WIDE),
    case("confident, entropy", "objective={name: grpo, entropy: {coefficient: 0.01}}", CONFIDENT),
    case("threshold", TOKENS, "sampling={unmasking: {steps: 6, order: threshold, threshold: 0.9}}"),
    case("noise", ROW, PLAIN, "estimator={kind: stratified, draws: 4}", often=True),
    case("noise, confident", ROW, GUIDED, "estimator={kind: stratified, draws: 4}"),
    case("complements", ROW, PLAIN, "estimator={kind: complement, draws: 4}"),
    case("quadrature", ROW, PLAIN, "estimator={kind: quadrature, draws: 3}"),
    case("coupled", ROW, PLAIN, "estimator={kind: coupled, draws: 3}"),
    case("everything masked", ROW, CONFIDENT, "estimator={kind: mean_field}", often=True),
    case("two sides", "objective={name: reinforce}", PLAIN, "estimator={kind: stratified, draws: 4, upper: {}}"),
]  # fmt: skip


def drawn(made: Planned, prompts: int, samples: int) -> Trajectory:
    stage, layout = made.stage, made.policy.layout
    assert isinstance(stage, GrpoStage)
    law = stage.sampling.law(layout.image)
    requests = made.requests(prompts, samples, law.streams(), law.source_scale is not None)
    engine = MaskedTorchEngine(made.policy, max_rows=stage.engine.max_rows)
    return engine.generate(requests, [stage.sampling.span(layout)])


@pytest.mark.parametrize("settings", CASES)
def test_an_update_holds_what_is_planned(settings: tuple[str, ...]) -> None:
    made = planned("tiny_masked.yaml", "grpo", *settings)
    stage, policy = made.stage, made.policy
    assert isinstance(stage, GrpoStage)
    policy.precision = stage.precision
    trajectory = drawn(made, stage.rollouts, 1)
    rows = [list(range(at, at + stage.micro_batch_size)) for at in range(0, stage.rollouts, stage.micro_batch_size)]
    kept, bonus = torch.ones(stage.micro_batch_size, dtype=torch.bool), stage.objective.entropy.coefficient
    with Live() as live:
        for part in rows[:2]:
            some = trajectory.rows(part)
            weight_BS = some.target_mask.float()
            batch = GrpoBatch(some, torch.ones(len(part)), kept, weight_BS, True, entropy_coefficient=bonus)
            grpo_loss(policy, stage, policy.model, batch, Meter()).backward()
    assert made.passing > 10 << 20
    assert made.passing == pytest.approx(live.peak, rel=0.15)


SAMPLERS = [
    case("random", TOKENS, PLAIN),
    case("top-k", TOKENS, "sampling={top_k: 10, unmasking: {steps: 6}}", often=True),
    case("blocks, editing", TOKENS, "sampling={guidance_scale: 2.0, source_scale: 1.5, unmasking: "
         "{steps: 6, order: blocks, block: 16}}"),
    case("ancestral", TOKENS, "sampling={unmasking: {steps: 4, order: ancestral}}"),
    case("confident", TOKENS, CONFIDENT, often=True),
    case("confident, wide", TOKENS, GUIDED, size=WIDE, often=True),
    case("threshold", TOKENS, "sampling={unmasking: {steps: 6, order: threshold, threshold: 0.9}}"),
    case("causal prompts", TOKENS, GUIDED, size=sizes(256, 512, family="masked", attention="causal"), often=True),
    case("a part of the rows at once", TOKENS, CONFIDENT, "engine={kind: torch, max_rows: 4}"),
]  # fmt: skip


@pytest.mark.parametrize("settings", SAMPLERS)
def test_sampling_holds_what_is_planned(settings: tuple[str, ...]) -> None:
    made = planned("tiny_masked.yaml", "grpo", *settings)
    stage, layout = made.stage, made.policy.layout
    assert isinstance(stage, GrpoStage)
    law = law_of(stage, layout)
    found = sampled(made.make, law, _drawing(stage, layout, len(law.streams()), made.length, 1))
    with Live() as live:
        drawn(made, stage.prompts_per_step, stage.samples_per_prompt)
    assert found > 2 << 20
    assert found == pytest.approx(live.peak, rel=0.15)


def test_a_masked_policy_is_sampled_from_itself() -> None:
    plans = {one.stage: one for one in memory_plans(read_recipe(RECIPES / "tiny_masked.yaml", []))}
    assert plans["grpo"].engine == 0 < plans["grpo"].sampling
