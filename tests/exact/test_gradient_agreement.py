"""The agreement of a step's halves, in float64, against gradients taken prompt by prompt."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlmm.config.policy import Lora
from rlmm.config.stages import GrpoStage, Optimization
from rlmm.objectives.weights import count_totals, token_weights
from rlmm.policies.masked import MaskedPolicy
from rlmm.train.agreement import GradientAgreement
from rlmm.train.experience import Experience
from rlmm.train.grpo import grpo_loss
from rlmm.train.grpo_batch import GrpoBatch
from rlmm.train.grpo_source import GrpoSource
from rollouts.torch_engine.masked import MaskedTorchEngine
from rollouts.trajectory import Span
from rollouts.unmasking import Unmasking
from tests.exact.masked_enumerable import LENGTH, law_named, make_policy, request_for
from tests.steps import take_steps

PROMPTS, SAMPLES = ("a", "b", 'say "no"', "two red"), 3
ROWS = len(PROMPTS) * SAMPLES


def config(**settings: Any) -> GrpoStage:
    shape = {"prompts_per_step": len(PROMPTS), "samples_per_prompt": SAMPLES, "micro_batch_size": 3}
    diagnostics = {"diagnostics": {"gradient_agreement": True}}
    return GrpoStage.model_validate({"steps": 2, "learning_rate": 0.01, **shape, **diagnostics, **settings})


def experience(policy: MaskedPolicy, dropped: tuple[int, ...]) -> Experience:
    span = Span("image", law_named("guidance", policy), LENGTH, unmasking=Unmasking(LENGTH, schedule="linear"))
    requests = [request_for(policy, range(SAMPLES * i, SAMPLES * i + SAMPLES), p) for i, p in enumerate(PROMPTS)]
    made = MaskedTorchEngine(policy).generate(requests, [span])
    kept_B = torch.tensor([row not in dropped for row in range(ROWS)])
    advantage_B = torch.randn(ROWS, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    return Experience(made, advantage_B, kept_B)


class Steps:
    """The same experience at every step, cut by the stage's own source."""

    nothing_counts = False

    def __init__(self, stage: GrpoStage, given: Experience, micro_batches: int) -> None:
        self.given, self.micro_batches_per_step = given, micro_batches
        self.source = GrpoSource.__new__(GrpoSource)
        self.source.config, self.source.micro_batches_per_step = stage, micro_batches

    def micro_batches(self, step: int) -> list[GrpoBatch]:
        return self.source._cut(self.given, list(range(ROWS)), False, 0.0)


def trained(policy: MaskedPolicy, given: Experience, micro_batches: int, folder: Path) -> list[dict[str, Any]]:
    """The log of two steps, clipped to a hundredth of a usual gradient."""
    stage = config()
    return take_steps(
        policy.model,
        Steps(stage, given, micro_batches),
        lambda model, batch, meter: grpo_loss(policy, stage, model, batch, meter),
        folder,
        Optimization(steps=2, learning_rate=0.01, schedule="constant", max_grad_norm=1e-3, checkpoint_every=2),
        gradient_agreement=True,
    )


def half_gradients(policy: MaskedPolicy, given: Experience) -> list[Tensor]:
    """Of the prompts at even places and of those at odd ones, each prompt's by itself."""
    made, parameters = given.trajectory, [p for p in policy.model.parameters() if p.requires_grad]
    totals, halves = count_totals(made.target_mask, given.kept_B), [torch.zeros(()), torch.zeros(())]
    for place, prompt in enumerate(PROMPTS):
        rows = [row for row in range(ROWS) if made.group_id[row] == prompt and given.kept_B[row]]
        if not rows:
            continue
        weight_BS = token_weights(
            config().objective.objective().weights, made.target_mask[rows], given.kept_B[rows], totals=totals,
            max_length=LENGTH,
        )  # fmt: skip
        ratio_free = -(weight_BS * given.advantage[rows][:, None] * policy.log_probs(made.rows(rows)).logp_BS).sum()
        found = torch.autograd.grad(ratio_free, parameters, allow_unused=True)
        flat = torch.cat(
            [(torch.zeros_like(p) if g is None else g).flatten() for g, p in zip(found, parameters, strict=True)]
        )
        halves[place % 2] = halves[place % 2] + flat
    return halves


@pytest.mark.parametrize("dropped", [(), (1, 3, 4, 5)])
@pytest.mark.parametrize("micro_batches", [2, 4, 12])
@pytest.mark.parametrize("lora", [False, True])
def test_it_is_that_of_the_two_halves(lora: bool, micro_batches: int, dropped: tuple[int, ...], tmp_path: Path) -> None:
    policy = make_policy()
    if lora:
        policy.add_lora(Lora(rank=2, alpha=2, target_modules=("q_proj", "down_proj")), seed=1)
        policy.model.double()
        generator = torch.Generator().manual_seed(0)
        for name, weight in policy.model.named_parameters():
            if "lora_B" in name:
                weight.data.normal_(std=0.3, generator=generator)
    given = experience(policy, dropped)
    even, odd = half_gradients(policy, given)
    first, second = trained(policy, given, micro_batches, tmp_path)
    cosine = float(torch.nn.functional.cosine_similarity(even, odd, dim=0))
    ratio = 4 * float(even @ odd) / float((even - odd).square().sum())
    assert first["gradient/agreement"] == pytest.approx(cosine, rel=1e-9)
    assert first["gradient/signal_to_noise"] == pytest.approx(ratio, rel=1e-9)
    assert second["gradient/agreement"] != pytest.approx(cosine, rel=1e-6)  # the weights moved, and it was counted anew


def test_a_half_without_a_group_has_no_figures(tmp_path: Path) -> None:
    policy = make_policy()
    odd = tuple(row for row in range(ROWS) if row // SAMPLES % 2)
    rows = trained(policy, experience(policy, odd), 4, tmp_path)
    assert len(rows) == 2 and not any("gradient/agreement" in row for row in rows)


def test_the_ratio_is_that_of_mean_and_variance() -> None:
    """Gradients of two parts, each a mean of its own and noise: 20000 steps of a known signal."""
    generator, mean = torch.Generator().manual_seed(0), torch.tensor([3.0, 0.0, -1.0, 2.0]).double()
    parameter = torch.nn.Parameter(torch.zeros(4, dtype=torch.float64))
    meter, both, apart = GradientAgreement([parameter], 2), [], []
    for _ in range(20_000):
        parts = [mean / 2 + torch.randn(4, generator=generator, dtype=torch.float64) for _ in range(2)]
        parameter.grad = parts[0]
        assert meter.after_backward() == {}
        parameter.grad = parts[0] + parts[1]
        found = meter.after_backward()["gradient/signal_to_noise"]
        noise = float((parts[0] - parts[1]).square().sum())
        both.append(found * noise)
        apart.append(noise)
    assert sum(both) / len(both) == pytest.approx(float(mean.square().sum()), abs=0.5)
    assert sum(apart) / len(apart) == pytest.approx(2 * 4, rel=0.03)


def test_rows_of_a_half_are_of_whole_groups_and_none_is_lost() -> None:
    policy = make_policy()
    stage = config()
    batches = Steps(stage, replace(experience(policy, (0, 7))), 4).micro_batches(0)
    halves = [{name for batch in part for name in batch.trajectory.group_id} for part in (batches[:2], batches[2:])]
    assert halves == [{"a", 'say "no"'}, {"b", "two red"}]
    assert sorted(name for b in batches for name in b.trajectory.sample_id) == sorted(
        f"{p}/{SAMPLES * i + s}" for i, p in enumerate(PROMPTS) for s in range(SAMPLES) if SAMPLES * i + s not in (0, 7)
    )
    assert max(len(batch.trajectory) for batch in batches) <= stage.micro_batch_size


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"deepspeed": "zero2.json"}, "DeepSpeed keeps it reduced"),
        ({"micro_batch_size": 12}, "of 1 micro-batches"),
        ({"micro_batch_size": 4}, "of 3 micro-batches"),
        ({"prompts_per_step": 3, "micro_batch_size": 9}, "3 prompts"),
    ],
)
def test_what_has_no_two_halves_is_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        config(**settings)


def test_a_process_with_an_odd_number_of_micro_batches_is_refused() -> None:
    with pytest.raises(ValueError, match="a process has 3"):
        GradientAgreement([], 3)
