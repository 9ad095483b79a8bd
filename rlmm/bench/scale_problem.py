"""What `rlmm bench scale` measures at a point: a random policy, its rollout, and a GRPO update on made-up samples.

Shapes: B rows, P prompt positions, S image positions.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from rlmm.bench.rollout_problem import PROMPT, SIZES
from rlmm.bench.step_problem import images_as_drawn
from rlmm.config.engines import EngineConfig, TorchEngineConfig, VllmEngineConfig
from rlmm.config.policy import CheckpointPolicy, Lora
from rlmm.config.stages import GrpoStage
from rlmm.dry_run import Update, dry_run
from rlmm.objectives.weights import count_totals, token_weights
from rlmm.policies.families.llama import build
from rlmm.policies.families.loading import outline
from rlmm.policies.transformer import TransformerPolicy
from rlmm.sharing import libraries, read_sharing, shared
from rlmm.train.grpo import rows_alone
from rlmm.train.grpo_batch import GrpoBatch
from rlmm.train.processes import world
from rollouts.contract import Grid, Request
from rollouts.law import COND, UNCOND, Law
from rollouts.trajectory import Stream, Trajectory
from rollouts.vllm_engine.host import BLOCK

Precision = Literal["float32", "bfloat16"]
Rollouts = Literal["torch", "vllm", "vllm-compiled"]


@dataclass(frozen=True)
class Point:
    """One measurement. `model`: a name of `SIZES`, or the folder or hub id of a checkpoint, of which the configuration
    alone is read and the weights are random. `rows` of `tokens` image tokens are updated from in micro-batches of
    `micro` rows a process (0: all at once); of them `drawn` tokens are sampled in the rollout (0: all). `zero`: the
    stage of DeepSpeed's ZeRO that the update is made under; 0: without DeepSpeed. `engine`: what makes the rollout."""

    model: str = "5m"
    rows: int = 8
    tokens: int = 256
    processes: int = 1
    lora: bool = False
    precision: Precision = "float32"
    weights: Precision = "float32"
    guidance_scale: float = 1.0
    checkpointing: bool = False
    micro: int = 0
    drawn: int = 0
    zero: int = 0
    engine: Rollouts = "torch"

    def __post_init__(self) -> None:
        if min(self.rows, self.tokens, self.processes) < 1:
            raise ValueError(f"rows, tokens and processes must be at least 1, and the point is {self}")
        if self.zero not in (0, 1, 2, 3):
            raise ValueError(f"zero {self.zero}: it is 0 (without DeepSpeed), 1, 2 or 3")
        if self.engine != "torch" and self.processes > 1:
            raise ValueError(
                f"engine {self.engine} runs inside a single process, and the point has {self.processes}; measure it at "
                "--processes 1, or give --engine torch"
            )
        if self.rows % self.processes or (self.rows // self.processes) % (self.micro or 1):
            raise ValueError(
                f"{self.rows} rows over {self.processes} process(es) in micro-batches of {self.micro or 'all'} do not "
                "come out even; change one of them"
            )

    @property
    def rows_each(self) -> int:
        """Rows of a process."""
        return self.rows // self.processes

    @property
    def micro_rows(self) -> int:
        return self.micro or self.rows_each

    @property
    def sampled(self) -> int:
        """Image tokens a row that the rollout draws."""
        return min(self.tokens, self.drawn or self.tokens)


def make_policy(point: Point) -> TransformerPolicy:
    """The policy on the current device, over a grid of one row of `tokens` codes."""
    if point.model in SIZES:
        size = SIZES[point.model]
        shape = size.model.model_copy(update={"max_positions": 2 * PROMPT + point.tokens, "null": "token"})
        policy = build(shape, num_codes=size.codes, grid=(1, point.tokens), seed=0)
    else:
        policy = outline(CheckpointPolicy(path=point.model, dtype=point.weights))
        policy.layout = replace(policy.layout, grid=Grid(1, point.tokens))
    policy.precision = point.precision
    if point.lora:
        policy.add_lora(Lora(), seed=0)
    return policy


def law(point: Point, policy: TransformerPolicy) -> Law:
    return Law(policy.layout.image, guidance_scale=point.guidance_scale)


def prefixes(policy: TransformerPolicy) -> dict[str, tuple[int, ...]]:
    """A prompt of about `PROMPT` tokens, and the one without it."""
    words = policy.encode_prompt("a red square left of a blue circle")[:PROMPT]
    return {COND: policy.layout.prefix(words), UNCOND: policy.layout.prefix(policy.layout.null(words))}


def requests(point: Point, policy: TransformerPolicy) -> list[Request]:
    """A prompt a row, as the widest batch has them; of this process alone."""
    rows = range(point.rows_each)
    return [Request(str(row), prefixes(policy), (row,), (str(row),)) for row in rows]


def engine_config(point: Point, policy: TransformerPolicy) -> EngineConfig:
    """The engine of the rollout, large enough for all rows at once."""
    rows = point.rows_each * len(law(point, policy).streams())
    if point.engine == "torch":
        return TorchEngineConfig(max_rows=rows)
    longest = max(map(len, prefixes(policy).values())) + point.sampled
    blocks = rows * (-(-longest // BLOCK) + 2)
    size = blocks * BLOCK * position_bytes(policy, 2 if point.precision == "bfloat16" else 4)
    return VllmEngineConfig(
        max_rows=rows, max_prompt_tokens=2 * rows * PROMPT, max_length=longest, kv_megabytes=(size >> 20) + 1,
        enforce_eager=point.engine != "vllm-compiled",
    )  # fmt: skip


def position_bytes(policy: TransformerPolicy, each: int) -> int:
    """Of the keys and values of one position, at so many bytes a number."""
    sizes = policy.sizes
    size = getattr(sizes, "head_dim", None) or sizes.hidden_size // sizes.num_attention_heads
    return sizes.num_hidden_layers * 2 * sizes.num_key_value_heads * size * each


def update_of(point: Point, length: int, streams: int, deepspeed: str | None = None) -> Update:
    """What the dry run makes of the point, sequences of `length` positions."""
    return Update(
        rows=point.micro_rows * streams,
        streams=streams,
        length=length,
        decided=point.tokens,
        again=point.rows_each > point.micro_rows,
        precision=point.precision,
        checkpointing=point.checkpointing,
        image_rows=rows_alone(stage(point, 1, deepspeed)),
    )


def planned(point: Point, deepspeed: str | None) -> tuple[int, int]:
    """Bytes: of the whole weights, and what one process's update is predicted to hold beside them (or in their place:
    ZeRO-3 leaves it a part of them)."""
    with torch.device("meta"):
        outlined = make_policy(point)
    streams = len(law(point, outlined).streams())
    length = max(map(len, prefixes(outlined).values())) + point.tokens
    held = dry_run(lambda: make_policy(point), law(point, outlined), update_of(point, length, streams, deepspeed))
    share = shared(held, read_sharing(deepspeed, point.processes, outlined.sizes.hidden_size))
    total = share.weights + share.gradients + share.optimizer + share.working + share.exchange + libraries()
    return held.weights, total - held.weights


def zero_file(point: Point, folder: Path) -> str | None:
    """A DeepSpeed file that asks for the point's stage of ZeRO, laid out as those in configs/deepspeed."""
    if not point.zero:
        return None
    auto = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    sized = ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")
    zero = {"stage": point.zero, "overlap_comm": False, "contiguous_gradients": True} | dict.fromkeys(sized, "auto")
    path = folder / "deepspeed.json"
    path.write_text(
        json.dumps(
            dict.fromkeys(auto, "auto")
            | {"zero_allow_untested_optimizer": True, "bf16": {"enabled": "auto"}, "zero_optimization": zero}
        )
    )
    return str(path)


def stage(point: Point, steps: int, deepspeed: str | None = None) -> GrpoStage:
    return GrpoStage.model_validate(
        {
            "steps": steps,
            "learning_rate": 1e-6,
            "micro_batch_size": point.micro_rows,
            "prompts_per_step": 1,
            "samples_per_prompt": max(2, point.rows),  # a stage wants a group; what is updated from is the point's
            "precision": point.precision,
            "gradient_checkpointing": point.checkpointing,
            "lora": {} if point.lora else None,
            "deepspeed": deepspeed,
        }
    )


def micro_batches(point: Point, policy: TransformerPolicy, config: GrpoStage) -> list[GrpoBatch]:
    """This process's share of a step: random images whose advantages are half 1, half -1, or 1 for a single row."""
    rank, _ = world()
    whole = made_up(point, policy)
    advantage_B = torch.ones(point.rows)
    advantage_B[1::2] = -1
    kept_B = torch.ones(point.rows, dtype=torch.bool)
    totals = count_totals(whole.target_mask, kept_B)
    weight_BS = token_weights(
        config.objective.objective().weights, whole.target_mask, kept_B, totals=totals, max_length=point.tokens
    )
    first = rank * point.rows_each
    starts = range(first, first + point.rows_each, point.micro_rows)
    parts = [list(range(at, at + point.micro_rows)) for at in starts]
    return [GrpoBatch(whole.rows(part), advantage_B[part], kept_B[part], weight_BS[part], gate=False) for part in parts]


def made_up(point: Point, policy: TransformerPolicy) -> Trajectory:
    """Random images of `tokens` codes under the point's law, as if they had been sampled."""
    shape, given, found = (point.rows, point.tokens), prefixes(policy), law(point, policy)
    ids_BS = torch.randint(*policy.layout.image, shape, generator=torch.Generator().manual_seed(0))
    return images_as_drawn(ids_BS, found, {name: _stream(given[name], point.rows) for name in found.streams()})


def _stream(ids: tuple[int, ...], rows: int) -> Stream:
    ids_BP = torch.tensor(ids).expand(rows, -1)
    return Stream(ids_BP, torch.ones_like(ids_BP, dtype=torch.bool))


def bytes_a_step(point: Point, policy: TransformerPolicy) -> float:
    """Bytes that a decode step of one process reads at the least: each weight that decides once (the head's rows of
    image codes alone, no embedding), and the keys and values of every row at half of the drawn length."""
    model: Any = policy.base
    each = 2 if "bfloat16" in (point.precision, point.weights) else 4
    left_out = (*policy.frozen_parts, *policy.untrained_parts)
    matrices: dict[int, Tensor] = {id(p): p for n, p in model.named_parameters() if not n.startswith(left_out)}
    matrices.pop(id(model.get_input_embeddings().weight), None)
    head = policy.output_head(policy.layout.image).linear.get_parameter("weight")
    matrices.pop(id(head), None)
    weights = sum(one.numel() for one in matrices.values()) * each
    low, high = policy.layout.image
    weights += (high - low) * head.shape[1] * (2 if point.weights == "bfloat16" else 4)
    rows = point.rows_each * len(law(point, policy).streams())
    return weights + rows * position_bytes(policy, each) * (len(prefixes(policy)[COND]) + point.sampled / 2)
