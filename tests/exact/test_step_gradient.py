"""A whole update's gradient, in float64: the formula by hand, and what must not change it.

Three prompts of different lengths and four images each: rows that end early, two spans with their own law and weight,
an unavailable reward, a group without spread, log-probs of an old policy, of a reference and of a sampler that is a
little off. Cut into micro-batches by the stage's own source.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TrainerCallback

from rlmm.config.stages import GrpoStage, Optimization
from rlmm.objectives import OBJECTIVES
from rlmm.objectives.advantages import group_advantages
from rlmm.policies.causal import CausalPolicy
from rlmm.train.experience import Experience
from rlmm.train.grpo import GrpoBatch, GrpoSource
from rollouts.trajectory import Span, Trajectory
from tests.exact.enumerable import (
    assert_same,
    draw_rows,
    gradient,
    law_named,
    make_policy,
    perturbed,
    place,
    table,
    widened,
)
from tests.exact.expected_step import loss, stage
from tests.steps import take_steps

PROMPTS, SAMPLES = ("a", 'say "no"', "two red"), 4
EARLY = {1: 2, 4: 2, 6: 2, 7: 2}  # row -> decided tokens, where fewer than three
UNAVAILABLE, FLAT = (5,), (8, 9, 10, 11)
KL, HIGH, SPAN_WEIGHTS = 0.1, 1.1, (1.0, 0.5)


@dataclass(frozen=True)
class Step:
    """A policy one update past the one that was sampled from, and what it is to learn from."""

    policy: CausalPolicy
    old: CausalPolicy
    reference: CausalPolicy
    experience: Experience


@lru_cache
def step(name: str) -> Step:
    old = make_policy()
    policy, reference = perturbed(old, scale=0.04), perturbed(old, scale=0.1, seed=3)
    made = two_spans(draw_rows(old, law_named("guidance, top-k, top-p", old), SAMPLES, prompts=PROMPTS))
    generator = torch.Generator().manual_seed(0)
    reward = torch.randn(len(made), generator=generator, dtype=torch.float64)
    reward[list(FLAT)] = 1.0
    objective = OBJECTIVES[name]
    result = group_advantages(
        reward,
        [row not in UNAVAILABLE for row in range(len(made))],
        made.group_id,
        baseline=objective.baseline,
        scale=objective.scale,
        flat_groups=objective.flat_groups,
    )
    with torch.no_grad():
        old_BS, reference_BS = old.log_probs(made).logp_BS, reference.log_probs(made).logp_BS
    noise_BS = torch.randn(old_BS.shape, generator=generator, dtype=torch.float64) * 0.2
    made = replace(made, sampler_logp=torch.where(made.target_mask, old_BS + noise_BS, 0.0))
    kept_B, advantage_B = torch.from_numpy(result.kept_B), torch.from_numpy(result.advantage_B)
    return Step(policy, old, reference, Experience(made, advantage_B, kept_B, old_BS, reference_BS))


def two_spans(made: Trajectory) -> Trajectory:
    """The first code under the law it was drawn from, the others under a colder one; some rows end early."""
    first = made.spans[0]
    second = replace(first, law=replace(first.law, temperature=0.9), advantage_weight=SPAN_WEIGHTS[1], length_limit=2)
    span, mask = made.span.clone(), made.target_mask.clone()
    span[:, 1:] = 1
    for row, length in EARLY.items():
        mask[row, length:] = False
    spans: tuple[Span, ...] = (replace(first, length_limit=1), second)
    return replace(made, span=span, spans=spans, target_mask=mask, attention_mask=mask.clone())


def config_of(name: str) -> GrpoStage:
    return stage(
        {"name": name, "kl": {"coefficient": KL}, "mismatch": {"kind": "truncate", "low": 0, "high": HIGH}}
        | ({} if name in ("gspo", "cispo", "reinforce") else {"clip_low": 0.1, "clip_high": 0.1})
    )


def cut(config: GrpoStage, experience: Experience, micro_batches: int, rows: Sequence[int]) -> list[GrpoBatch]:
    """By the stage's source, of which only the cutting is there."""
    source = GrpoSource.__new__(GrpoSource)
    source.config, source.micro_batches_per_step = config, micro_batches
    return source._cut(experience, list(rows), False, 0.0)


def step_gradient(name: str, *, micro_batches: int = 1, experience: Experience | None = None) -> Tensor:
    """Micro-batch by micro-batch, as backward passes add them up."""
    given, config = step(name), config_of(name)
    used = given.experience if experience is None else experience
    batches = cut(config, used, micro_batches, range(len(used.trajectory)))
    return torch.stack([gradient(given.policy, loss(given.policy, config, batch)) for batch in batches]).sum(0)


def by_hand(name: str) -> Tensor:
    """The step's loss, decision by decision, from the definitions of the law and of the objective."""
    given, total = step(name), torch.zeros((), dtype=torch.float64)
    made, kept_B = given.experience.trajectory, given.experience.kept_B
    lengths = {row: EARLY.get(row, 3) for row in range(len(made)) if kept_B[row]}
    for row, length in lengths.items():
        log = decisions_by_hand(given, row, length)
        share = {
            "grpo": 1 / length / len(lengths),
            "dapo": 1 / sum(lengths.values()),
            "dr_grpo": 1 / 3 / len(lengths),
            "rloo": 1 / len(lengths),
        }[OBJECTIVES[name].weights]
        for t, value in enumerate(losses_by_hand(name, log, float(given.experience.advantage[row]))):
            total = total + share * SPAN_WEIGHTS[min(t, 1)] * value
    return gradient(given.policy, total)


def decisions_by_hand(given: Step, row: int, length: int) -> list[dict[str, Tensor]]:
    """Log-probs of each decided token of a row under policy, old policy, reference and sampler."""
    made, found = given.experience.trajectory, []
    image, prompt = int(place(made, given.old)[row]), made.group_id[row]
    support = table(given.old, law_named("guidance, top-k, top-p", given.old), prompt).support_NSV
    for t in range(length):
        law = made.spans[min(t, 1)].law
        known = {"new": given.policy, "old": given.old, "reference": given.reference}
        at = {n: table(p, law, prompt, support_NSV=support).chosen()[image, t] for n, p in known.items()}
        found.append(at | {"sampler": made.sampler_logp[row, t]})
    return found


def losses_by_hand(name: str, log: list[dict[str, Tensor]], advantage: float) -> list[Tensor]:
    """Of each token of a row: surrogate, mismatch weight and KL."""
    config, values = config_of(name).objective, []
    mean = torch.stack([at["new"] - at["old"].detach() for at in log]).mean().exp()
    for at in log:
        ratio = mean if config.level == "sequence" else (at["new"] - at["old"].detach()).exp()
        bounded = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
        if config.surrogate == "cispo":
            value = -bounded.detach() * advantage * at["new"]
        elif config.surrogate == "reinforce":
            value = -advantage * at["new"]
        else:
            value = -torch.minimum(ratio * advantage, bounded * advantage)
        value = value * (at["old"] - at["sampler"]).exp().clamp(max=HIGH).detach()
        gap = at["new"] - at["reference"].detach()
        values.append(value + KL * ((-gap).exp() - 1 + gap))
    return values


@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_it_is_the_formulas(name: str) -> None:
    # The source's token weights are float32: one rounding each.
    assert_same(step_gradient(name), by_hand(name), relative=2e-7)


@pytest.mark.parametrize("micro_batches", [2, 3, 5, 12])
@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_micro_batches_leave_it(name: str, micro_batches: int) -> None:
    """From one to as many as there are rows: more than there are kept ones, so that dropped rows stand in."""
    assert_same(step_gradient(name, micro_batches=micro_batches), step_gradient(name))


@pytest.mark.parametrize("columns", [1, 9])
@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_padding_leaves_it(name: str, columns: int) -> None:
    experience = step(name).experience
    wide = replace(experience, trajectory=widened(experience.trajectory, columns))
    assert_same(step_gradient(name, experience=wide, micro_batches=3), step_gradient(name))


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_the_order_of_the_batch_leaves_it(name: str, seed: int) -> None:
    experience = step(name).experience
    order = torch.randperm(len(experience.trajectory), generator=torch.Generator().manual_seed(seed))
    fields = ("advantage", "kept_B", "old_logp_BS", "reference_logp_BS")
    moved: dict[str, Any] = {field: getattr(experience, field)[order] for field in fields}
    shuffled = replace(experience, trajectory=experience.trajectory.rows(order), **moved)
    assert_same(step_gradient(name, experience=shuffled, micro_batches=4), step_gradient(name))


def test_a_micro_batch_without_a_decision_in_a_span_has_log_probs() -> None:
    given = step("grpo")
    row = given.experience.trajectory.rows([0])
    mask = row.target_mask.clone()
    mask[:, 1:] = False
    found = given.policy.log_probs(replace(row, target_mask=mask)).logp_BS
    assert_same(found[:, 0], given.policy.log_probs(row).logp_BS[:, 0])
    assert (found[:, 1:] == 0).all()


class _Kept(TrainerCallback):
    """The gradient that the optimizer is about to see."""

    def __init__(self) -> None:
        self.found: Tensor | None = None

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        weights = kwargs["model"].parameters()
        self.found = torch.cat([(torch.zeros_like(w) if w.grad is None else w.grad).flatten() for w in weights])


@dataclass
class _OneStep:
    """A source of the one step."""

    batches: list[GrpoBatch]
    micro_batches_per_step: int
    nothing_counts: bool = False

    def micro_batches(self, step: int) -> list[GrpoBatch]:
        return self.batches


@pytest.mark.parametrize("micro_batches", [1, 3, 12])
@pytest.mark.parametrize("name", ["grpo", "dapo"])
def test_accumulation_in_the_trainer_leaves_it(name: str, micro_batches: int, tmp_path: Path) -> None:
    given, config, kept = step(name), config_of(name), _Kept()
    policy = perturbed(given.policy, scale=0)  # the trainer moves its weights
    batches = cut(config, given.experience, micro_batches, range(len(given.experience.trajectory)))
    take_steps(
        policy.model,
        _OneStep(batches, micro_batches),
        lambda _, batch, __: loss(policy, config, batch),
        tmp_path,
        Optimization(steps=1, learning_rate=1e-3, schedule="constant", max_grad_norm=0, checkpoint_every=1),
        callbacks=[kept],
    )
    assert kept.found is not None
    assert_same(kept.found, step_gradient(name))
