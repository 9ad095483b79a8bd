"""TRL's side of `rlmm bench step`: GRPOTrainer as its documentation has it, its rollouts handed in by `rollout_func`.

The clock of the bench goes from `on_step_begin` to `on_step_end`, so it sees TRL's handling of the ready rollouts too;
that is milliseconds. TRL computes its log-probs in tiles of at most 4096 x 32768 logits, which is no option of it.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from rlmm.bench.step_problem import LEARNING_RATE, Sampled, Side, StepProblem, build_model, make_samples
from rlmm.config.policy import Lora
from rlmm.policies.tokenizer import character_tokenizer

Rollout = Callable[[list[str], Any], dict[str, list[Any]]]
"""TRL's hook: (prompts, one entry a sample; the trainer) -> ids, log-probs, and columns for the rewards."""


def run_trl(side: Side, problem: StepProblem, steps: int, callback: TrainerCallback, folder: Path) -> None:
    """TRL's defaults, but float32 as on rlmm's side, and every row in one micro-batch as there."""
    arguments = GRPOConfig(
        output_dir=str(folder),
        max_steps=steps,
        learning_rate=LEARNING_RATE,
        per_device_train_batch_size=problem.rows,
        num_generations=problem.samples,
        max_completion_length=problem.image_tokens,
        bf16=False,
        gradient_checkpointing=side.checkpointing,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )
    rollout = ready_rollout(problem, make_samples(problem))
    trl_trainer(problem, rollout, arguments, [callback], lora=side.lora).train()


def trl_trainer(
    problem: StepProblem, rollout: Rollout, arguments: GRPOConfig, callbacks: list[TrainerCallback], *, lora: bool
) -> GRPOTrainer:
    """TRL's trainer over the problem's model; the rewards are those that come with the rollout."""
    adapter = Lora()
    return GRPOTrainer(
        model=build_model(problem),
        reward_funcs=lambda prompts, completions, reward, **_: list(reward),
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": [str(place) for place in range(problem.prompts)]}),
        processing_class=character_tokenizer(),
        rollout_func=rollout,
        callbacks=callbacks,
        peft_config=LoraConfig(
            r=adapter.rank,
            lora_alpha=adapter.alpha,
            target_modules=list(adapter.target_modules),
            task_type="CAUSAL_LM",
        )
        if lora
        else None,
    )


def ready_rollout(problem: StepProblem, sampled: Sampled) -> Rollout:
    """TRL's rollout hook: prompts come as the place of their group, once a sample."""

    def rollout(prompts: list[str], trainer: Any) -> dict[str, list[Any]]:
        rows = [int(prompt) * problem.samples + prompts[:at].count(prompt) for at, prompt in enumerate(prompts)]
        return {
            "prompt_ids": sampled.prompt_BP[rows].tolist(),
            "completion_ids": sampled.image_BS[rows].tolist(),
            "logprobs": [[0.0] * problem.image_tokens for _ in rows],
            "reward": sampled.reward_B[rows].tolist(),
        }

    return rollout
