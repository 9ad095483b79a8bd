"""`rlmm bench unmasking`: a masked policy's sampler against the published way, and what a trajectory's update costs.

The published sampler is MaskGIT's loop as masked image models ship it: each step one forward of the conditional and one
of the unconditional sequence, logits of every position over the whole vocabulary, a softmax, a draw, and the surest
kept. Here the same model is used by both, and both take the same number of steps. The update, the GRPO stage's own loss
and its backward, is compared with forwards and backwards of the same states through the plain model and a plain
cross-entropy over the same slice and decisions, in the same run.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from rlmm.bench.machine import Timing, setting, timed, torch_threads, write_json
from rlmm.bench.rollout_problem import PROMPT, SIZES
from rlmm.config.stages import GrpoStage
from rlmm.policies.families.llama import build
from rlmm.policies.masked import MaskedPolicy, trajectory_states
from rlmm.train.grpo import grpo_loss
from rlmm.train.grpo_batch import GrpoBatch
from rlmm.train.metrics import Meter
from rollouts.contract import Request
from rollouts.law import COND, UNCOND, Law
from rollouts.torch_engine.masked import MaskedTorchEngine
from rollouts.trajectory import Span, Trajectory
from rollouts.unmasking import Order, Unmasking, masked_counts

SCALE = 3.0
TEMPERATURE = 4.5
"""Of the published sampler's noise on the confidence."""


@dataclass(frozen=True)
class UnmaskingPlan:
    """What is measured."""

    size: str
    samples: int
    tokens: int
    steps: int
    repeats: int
    threads: int


@dataclass(frozen=True)
class Row:
    """Medians. `forwards`: of the model, an image (a guided step is two); `ratio`: the published time over this one."""

    what: str
    forwards: float
    seconds: float
    tokens_a_second: float
    ratio: float


def bench_unmasking(plan: UnmaskingPlan, json_file: Path | None) -> None:
    """Print the table; write it where asked."""
    with torch_threads(plan.threads):
        rows, update = measure(plan)
    table = Table(title=f"{plan.size}, {plan.samples} samples x {plan.tokens} tokens, {plan.steps} steps")
    for column in ("what", "forwards an image", "seconds", "tokens/s", "ratio"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for row in rows:
        figures = (f"{row.forwards:g}", f"{row.seconds:.2f}", f"{row.tokens_a_second:.0f}", f"{row.ratio:.2f}")
        table.add_row(row.what, *figures)
    console = Console()
    console.print(table)
    console.print(f"update of the exact trajectory: {update['ratio']:.2f} of its plain forwards and backwards")
    if json_file is not None:
        record = {"setting": setting(plan.threads), "plan": asdict(plan), "rows": [asdict(row) for row in rows]}
        write_json(json_file, record | {"update": update})


def measure(plan: UnmaskingPlan) -> tuple[list[Row], dict[str, Any]]:
    """Each way of sampling, guided and not, and the update's ratio; interleaved repeats."""
    problem, alone = Problem(plan), Problem(plan, "causal")
    ways: list[tuple[str, float, Callable[[float], Any]]] = [
        (f"{name}{', guided' if scale != 1 else ''}", scale, work)
        for scale in (1.0, SCALE)
        for name, work in (
            ("published", problem.published),
            ("random order", partial(problem.sample, order="random")),
            ("confidence", partial(problem.sample, order="confidence")),
            ("random order, prompts read once", partial(alone.sample, order="random")),
        )
    ]
    times = {name: Timing() for name, _, _ in ways}
    for name, scale, work in track(ways * plan.repeats, "sampling"):
        times[name] = times[name].also(timed(partial(work, scale)))
    rows = []
    for name, scale, _ in ways:
        base = times["published, guided" if scale != 1 else "published"].wall
        rate = plan.samples * plan.tokens / times[name].wall
        rows.append(Row(name, plan.steps * (2 if scale != 1 else 1), times[name].wall, rate, base / times[name].wall))
    return rows, problem.update(plan.repeats)


class Problem:
    """A random masked policy and as many prompts as samples."""

    def __init__(self, plan: UnmaskingPlan, prompt_attention: str = "full") -> None:
        self.plan, size = plan, SIZES[plan.size]
        changes = {"family": "masked", "max_positions": max(256, plan.tokens + PROMPT + 8)}
        shape = size.model.model_copy(update=changes | {"prompt_attention": prompt_attention})
        policy = build(shape, num_codes=size.codes, grid=(1, plan.tokens), seed=0)
        assert isinstance(policy, MaskedPolicy)
        policy.model.eval()
        self.policy, self.layout = policy, policy.layout
        self.prefix = self.layout.prefix([9] * (PROMPT - len(self.layout.prefix(()))))
        self.null = self.layout.prefix(self.layout.null([]))
        self.engine = MaskedTorchEngine(policy, max_rows=2 * plan.samples)

    def sample(self, scale: float, order: Order) -> Trajectory:
        """By the engine."""
        seeds = tuple(range(self.plan.samples))
        request = Request("a", {COND: self.prefix, UNCOND: self.null}, seeds, tuple(map(str, seeds)))
        law = Law(self.layout.image, guidance_scale=scale)
        span = Span("image", law, self.plan.tokens, unmasking=Unmasking(self.plan.steps, order))
        return self.engine.generate([request], [span])

    @torch.no_grad()
    def published(self, scale: float) -> Tensor:
        """MaskGIT's loop (arXiv 2202.04200, section 3.3), written as published code writes it."""
        plan, mask, low = self.plan, self.policy.mask, self.layout.image[0]
        ids = torch.full((plan.samples, plan.tokens), mask)
        model: Any = self.policy.model
        for step, left in enumerate(masked_counts("cosine", plan.steps, plan.tokens)):
            logits = model(_after(self.prefix, ids)).logits[:, -plan.tokens :]
            if scale != 1:
                null = model(_after(self.null, ids)).logits[:, -plan.tokens :]
                logits = null + scale * (logits - null)
            probs = logits[..., low : self.layout.image[1]].softmax(-1)
            drawn = torch.multinomial(probs.flatten(0, 1), 1).view(ids.shape)
            sure = probs.gather(-1, drawn[..., None]).squeeze(-1).log()
            sure = sure + TEMPERATURE * (1 - (step + 1) / plan.steps) * -(-torch.rand_like(sure).log()).log()
            sure = torch.where(ids == mask, sure, math.inf)
            ids = torch.where(ids == mask, drawn + low, ids)
            ids = ids.scatter(1, sure.topk(left, dim=1, largest=False).indices, mask)
        return ids

    def update(self, repeats: int) -> dict[str, Any]:
        """Seconds of the loss of an exact trajectory and its gradient, and of the plain forwards and backwards."""
        made = self.sample(1.0, "random")
        part = made.rows(list(range(max(1, len(made) // self.plan.steps))))
        ways = {"trajectory": self._stage(part), "plain": self._plain(part)}
        times = {name: Timing() for name in ways}
        for _ in track(range(repeats + 1), "updating"):
            for name, work in ways.items():
                times[name] = times[name].also(timed(work))
                self.policy.model.zero_grad()
        seconds = {name: median(found.wall_s[1:]) for name, found in times.items()}  # the first warms up
        return {"seconds": seconds, "rows": len(part), "ratio": seconds["trajectory"] / seconds["plain"]}

    def _stage(self, part: Trajectory) -> Callable[[], None]:
        """As a step of the stage does it, with its figures."""
        stage, weight_BS = GrpoStage(steps=1, learning_rate=1e-3), torch.full(part.ids.shape, 1 / part.ids.numel())
        kept_B = torch.ones(len(part), dtype=torch.bool)
        batch = GrpoBatch(part, torch.ones(len(part)), kept_B, weight_BS, gate=False)
        return lambda: grpo_loss(self.policy, stage, self.policy.model, batch, Meter()).backward()

    def _plain(self, part: Trajectory) -> Callable[[], None]:
        states = trajectory_states(part, part.target_mask)
        ids = part.ids[states.row_R].masked_fill(states.masked_RS, self.policy.mask)
        targets = part.ids[states.row_R][states.read_RS] - self.layout.image[0]
        model: Any = self.policy.model

        def work() -> None:
            body = model.model(_after(self.prefix, ids)).last_hidden_state[:, -ids.shape[1] :]
            logits = body[states.read_RS] @ model.lm_head.weight[slice(*self.layout.image)].T
            torch.nn.functional.cross_entropy(logits, targets, reduction="sum").backward()

        return work


def _after(prefix: Sequence[int], ids_BS: Tensor) -> Tensor:
    return torch.cat([torch.tensor(prefix).expand(len(ids_BS), -1), ids_BS], 1)
