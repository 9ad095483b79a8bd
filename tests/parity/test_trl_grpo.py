"""Under a law over the whole vocabulary, loss and gradients are those of TRL's GRPOTrainer on the same tokens."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import TrainerCallback
from trl import GRPOConfig

from rlmm.bench.step_problem import Sampled, StepProblem, build_policy, make_samples, make_trajectory
from rlmm.bench.step_trl import ready_rollout, trl_trainer
from rlmm.config.objectives import ObjectiveConfig
from rlmm.config.sampling import Sampling
from rlmm.config.stages import GrpoStage
from rlmm.objectives.advantages import group_advantages
from rlmm.objectives.weights import count_totals, token_weights
from rlmm.train.grpo import grpo_loss
from rlmm.train.grpo_batch import GrpoBatch
from rlmm.train.metrics import Meter
from rollouts.law import Law

PROBLEM = StepProblem(
    name="tiny",
    vocabulary=96,
    codes=64,
    prompts=2,
    samples=4,
    prompt_tokens=5,
    image_tokens=12,
    hidden=32,
    layers=2,
    heads=2,
    intermediate=48,
)
LENGTHS = [12, 7, 12, 3, 12, 12, 9, 1]
"""Rows of unequal length: a token-weighted loss is then no constant."""


class Gradients(TrainerCallback):
    """Keeps what the optimizer is about to see, and the loss that is logged."""

    def __init__(self) -> None:
        self.by_name: dict[str, Tensor] = {}
        self.loss = float("nan")

    def on_pre_optimizer_step(self, *_: Any, model: nn.Module, **__: Any) -> None:
        self.by_name = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        self.loss = logs.get("loss", self.loss)


def trl_step(sampled: Sampled, folder: Path, **options: Any) -> Gradients:
    """One step of TRL's trainer; rows are cut to their lengths by its rollout hook."""
    arguments = GRPOConfig(
        output_dir=str(folder),
        max_steps=1,
        per_device_train_batch_size=PROBLEM.rows,
        num_generations=PROBLEM.samples,
        max_completion_length=PROBLEM.image_tokens,
        max_grad_norm=0.0,
        bf16=False,
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        scale_rewards="none",
        **options,
    )
    whole = ready_rollout(PROBLEM, sampled)

    def cut(prompts: list[str], trainer: Any) -> dict[str, list[Any]]:
        made = whole(prompts, trainer)
        rows = [int(prompt) * PROBLEM.samples + prompts[:at].count(prompt) for at, prompt in enumerate(prompts)]
        for name in ("completion_ids", "logprobs"):
            made[name] = [values[: LENGTHS[row]] for row, values in zip(rows, made[name], strict=True)]
        return made

    found = Gradients()
    trl_trainer(PROBLEM, cut, arguments, [found], lora=False).train()
    return found


def rlmm_step(sampled: Sampled, config: GrpoStage) -> tuple[float, dict[str, Tensor]]:
    policy, trajectory = build_policy(PROBLEM), make_trajectory(PROBLEM, sampled)
    law = Law((0, PROBLEM.vocabulary), mode="none", temperature=config.sampling.temperature)
    inside = torch.arange(PROBLEM.image_tokens) < torch.tensor(LENGTHS)[:, None]
    trajectory = replace(
        trajectory,
        spans=(replace(trajectory.spans[0], law=law),),
        attention_mask=inside,
        target_mask=inside,
    )
    advantage_B = group_advantages(
        sampled.reward_B.double().numpy(),
        np.ones(PROBLEM.rows, bool),
        trajectory.group_id,
        baseline="mean",
        scale="none",
    ).advantage_B
    kept_B = torch.ones(PROBLEM.rows, dtype=torch.bool)
    weight_BS = token_weights(
        config.objective.objective().weights,
        inside,
        kept_B,
        totals=count_totals(inside, kept_B),
        max_length=PROBLEM.image_tokens,
    )
    batch = GrpoBatch(trajectory, torch.from_numpy(advantage_B).float(), kept_B, weight_BS, gate=False)
    loss = grpo_loss(policy, config, policy.model, batch, Meter())
    loss.backward()
    return float(loss.detach()), {name: p.grad for name, p in policy.model.named_parameters() if p.grad is not None}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "loss_type", "temperature"),
    [("grpo", "grpo", 1.0), ("bnpo", "dapo", 1.0), ("bnpo", "bnpo", 0.7), ("dr_grpo", "dr_grpo", 1.3)],
)
def test_loss_and_gradients_are_trls(name: str, loss_type: str, temperature: float, tmp_path: Path) -> None:
    sampled = make_samples(PROBLEM)
    config = GrpoStage(
        steps=1,
        learning_rate=1e-6,
        objective=ObjectiveConfig.model_validate({"name": name}),
        sampling=Sampling(temperature=temperature),
    )
    loss, ours = rlmm_step(sampled, config)
    theirs = trl_step(sampled, tmp_path, loss_type=loss_type, temperature=temperature)
    assert abs(loss - theirs.loss) < 1e-6
    assert ours.keys() == theirs.by_name.keys()
    scale = max(float(gradient.abs().max()) for gradient in ours.values())
    for parameter, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs.by_name[parameter], rtol=1e-4, atol=1e-6 * scale, msg=parameter)
