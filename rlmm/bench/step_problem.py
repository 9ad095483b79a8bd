"""Who makes an update, and one update's worth of made-up work: a model, prompts, images already sampled, rewards.

Shapes: B rows (prompts x samples), P prompt positions, S image positions.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from rlmm.policies.causal import CausalPolicy
from rlmm.policies.tokenizer import character_tokenizer
from rollouts.contract import Grid, Layout
from rollouts.law import COND, Law
from rollouts.trajectory import IMAGE, Span, Stream, Trajectory

SEED = 0
LEARNING_RATE = 1e-6


@dataclass(frozen=True)
class Side:
    """Who makes the update, which weights it trains, and whether the body's activations are made again in the
    backward (TRL's default, and not rlmm's)."""

    framework: Literal["rlmm", "trl"]
    lora: bool
    checkpointing: bool

    @property
    def name(self) -> str:
        """What a table calls it."""
        return f"{self.framework} {'LoRA' if self.lora else 'full'}{', checkpointed' if self.checkpointing else ''}"


@dataclass(frozen=True)
class StepProblem:
    """Sizes. `codes` image codes are the last ids of `vocabulary`, as in Emu3; the model's head is not tied."""

    name: str
    vocabulary: int
    codes: int
    prompts: int = 4
    samples: int = 8
    prompt_tokens: int = 16
    image_tokens: int = 256
    hidden: int = 512
    layers: int = 4
    heads: int = 8
    intermediate: int = 1408

    @property
    def rows(self) -> int:
        return self.prompts * self.samples

    @property
    def layout(self) -> Layout:
        first = self.vocabulary - self.codes
        return Layout(
            vocab_size=self.vocabulary,
            text=(0, first),
            image=(first, self.vocabulary),
            bos=1,
            pad=0,
            boi=(4,),
            grid=Grid(1, self.image_tokens),
        )


@dataclass(frozen=True)
class Sampled:
    """prompt_BP and image_BS int64, all rows of one length; reward_B float32."""

    prompt_BP: Tensor
    image_BS: Tensor
    reward_B: Tensor


def build_model(problem: StepProblem) -> PreTrainedModel:
    """A random Llama of the problem's sizes, in float32."""
    config = LlamaConfig(
        vocab_size=problem.vocabulary,
        hidden_size=problem.hidden,
        intermediate_size=problem.intermediate,
        num_hidden_layers=problem.layers,
        num_attention_heads=problem.heads,
        num_key_value_heads=problem.heads,
        max_position_embeddings=problem.prompt_tokens + problem.image_tokens,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
    )
    torch.manual_seed(SEED)
    return LlamaForCausalLM(config)


def build_policy(problem: StepProblem) -> CausalPolicy:
    """The model as rlmm's policy; its tokenizer is never asked, since the prompts are ids already."""
    tokenizer = cast(PreTrainedTokenizerBase, character_tokenizer())
    return CausalPolicy(build_model(problem), tokenizer, problem.layout)


def make_samples(problem: StepProblem) -> Sampled:
    """Random prompts and images; a group's rewards differ, so that every row counts."""
    draw = torch.Generator().manual_seed(SEED + 1)
    first = problem.vocabulary - problem.codes
    prompt_BP = torch.randint(8, first, (problem.prompts, problem.prompt_tokens), generator=draw)
    return Sampled(
        prompt_BP=prompt_BP.repeat_interleave(problem.samples, 0),
        image_BS=torch.randint(first, problem.vocabulary, (problem.rows, problem.image_tokens), generator=draw),
        reward_B=torch.rand(problem.rows, generator=draw),
    )


def make_trajectory(problem: StepProblem, sampled: Sampled) -> Trajectory:
    """The samples as a trajectory under the plain law of the image codes."""
    prompts = Stream(sampled.prompt_BP, torch.ones_like(sampled.prompt_BP, dtype=torch.bool))
    law = Law(problem.layout.image, mode="none")
    return images_as_drawn(sampled.image_BS, law, {COND: prompts}, group=problem.samples)


def images_as_drawn(ids_BS: Tensor, law: Law, streams: Mapping[str, Stream], *, group: int = 1) -> Trajectory:
    """Images as if they had been drawn under the law, `group` of them a prompt, each token at log-prob 0."""
    whole_BS = torch.ones_like(ids_BS, dtype=torch.bool)
    count, length = ids_BS.shape
    return Trajectory(
        ids=ids_BS,
        attention_mask=whole_BS,
        target_mask=whole_BS,
        modality=torch.full_like(ids_BS, IMAGE, dtype=torch.int8),
        step=torch.arange(length, dtype=torch.int32).expand(count, length),
        span=torch.zeros_like(ids_BS, dtype=torch.int8),
        spans=(Span("image", law, length),),
        streams=streams,
        sampler_logp=torch.zeros(count, length, dtype=torch.float64),
        seed=tuple(range(count)),
        group_id=tuple(str(row // group) for row in range(count)),
        sample_id=tuple(str(row) for row in range(count)),
        weights_version=0,
    )
