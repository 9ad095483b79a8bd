"""How a masked span is revealed: which positions are decided at which step. With the law, all that makes a trajectory.

Policy-free orders (`random`, `blocks`, `ancestral`) are functions of a row's seed; the others are decided by the
policy's own confidence, whose log-prob is then part of the trajectory's (`order_log_probs`).

Shapes: B rows, S positions of the span, D positions that are decided, T steps, V vocabulary slice.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from rollouts.schedules import Schedule, check_schedule, masked_share

Order = Literal["random", "blocks", "ancestral", "confidence", "noisy_confidence", "threshold"]

POLICY_FREE: tuple[Order, ...] = ("random", "blocks", "ancestral")
GRID_PER_NAT = 8192


@dataclass(frozen=True)
class Unmasking:
    """`steps` reveal a span.

    order: `random`: a uniformly drawn order, the schedule's counts a step. `blocks`: the same within runs of `block`
        positions, one run after the other. `ancestral`: each position by itself, revealed in a step with the chance
        the schedule gives (MDLM, arXiv 2406.07524, eq. 7). `confidence`: every masked position proposes a token and
        the likeliest proposals are kept (MaskGIT). `noisy_confidence`: the same with Gumbel noise on log-probs, of
        scale `noise` at the first step and linearly less, 0 at the last. `threshold`: all proposals at least as likely
        as `threshold` are kept, or the likeliest one.
    schedule: share still masked over time; a step reveals at least one position, but for `ancestral`, where chance
        decides, and samples with given tokens.
    """

    steps: int
    order: Order = "random"
    schedule: Schedule = "cosine"
    block: int | None = None
    noise: float = 0.0
    threshold: float | None = None

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"unmasking: steps {self.steps} must be at least 1")
        check_schedule(self.schedule)
        for name, wanted, given in (
            ("block", self.order == "blocks", self.block),
            ("noise", self.order == "noisy_confidence", self.noise or None),
            ("threshold", self.order == "threshold", self.threshold),
        ):
            if wanted != (given is not None):
                raise ValueError(
                    f"unmasking: order {self.order!r} {'needs' if wanted else 'has no use for'} {name}; "
                    f"{'give it' if wanted else 'leave it out'}"
                )
        if self.order == "threshold" and self.schedule != "cosine":
            raise ValueError("unmasking: order 'threshold' reveals what is sure, whatever the schedule; leave it out")
        if self.threshold is not None and not 0 < self.threshold <= 1:
            raise ValueError(f"unmasking: threshold {self.threshold} is a probability; give one in (0, 1]")
        if self.block is not None and self.block < 1:
            raise ValueError(f"unmasking: a block of {self.block} positions; give at least 1")

    @property
    def policy_free(self) -> bool:
        """Whether the order says nothing about the policy, so that the tokens' log-probs are the trajectory's."""
        return self.order in POLICY_FREE

    @property
    def exact(self) -> bool:
        """Whether the trajectory's log-prob is computed here: with Gumbel noise on the confidence it would take the
        proposals that were not kept, too (Plackett-Luce), and those are not stored."""
        return self.order != "noisy_confidence"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(record: Mapping[str, Any]) -> "Unmasking":
        return Unmasking(**record)


def masked_counts(schedule: Schedule, steps: int, length: int) -> list[int]:
    """Positions still masked after each of `steps` steps: strictly fewer each time, 0 after the last.

    Raises ValueError where there are more steps than positions.
    """
    if not 1 <= steps <= length:
        raise ValueError(
            f"unmasking: {steps} steps for {length} positions, and each step reveals at least one; set "
            f"sampling.unmasking.steps to at most {length}"
        )
    counts, before = [], length
    for step in range(1, steps + 1):
        wanted = round(length * masked_share(schedule, step / steps))
        before = max(steps - step, min(before - 1, wanted))
        counts.append(before)
    return counts


def noise_scale(unmasking: Unmasking, step: int, steps: int) -> float:
    """Of the Gumbel noise at a step: linear from `noise` at the first to 0 at the last. A function of the step alone:
    published samplers multiply it up over the steps by mistake, and so anneal far too fast."""
    return unmasking.noise * (1 - step / (steps - 1)) if steps > 1 else 0.0


def planned_steps(
    unmasking: Unmasking, masked_BS: Tensor, seeds: Sequence[int], decided: Sequence[int] | None = None
) -> Tensor:
    """The step [B, S] (int32) at which a policy-free order reveals each masked position; 0 for the others.

    `decided`: the grid's positions that a policy decides, all by default. A row in which some of them are given already
    takes as many steps as it can.
    """
    places = list(range(masked_BS.shape[1])) if decided is None else list(decided)
    step_BS = torch.zeros(masked_BS.shape, dtype=torch.int32)
    for row, seed in enumerate(seeds):
        # The second word of the key sets these draws apart from the tokens' own.
        luck = np.random.Generator(np.random.Philox(key=seed + (1 << 64)))
        open_S = masked_BS[row, places].numpy()
        step_BS[row, places] = torch.from_numpy(_row_steps(unmasking, open_S, luck))
    return step_BS


def _row_steps(unmasking: Unmasking, open_S: np.ndarray, luck: np.random.Generator) -> np.ndarray:
    """Of the places that are open; 0 for the others."""
    steps, count = np.zeros(len(open_S), dtype=np.int32), len(open_S)
    if unmasking.order == "ancestral":
        levels = [masked_share(unmasking.schedule, step / unmasking.steps) for step in range(1, unmasking.steps + 1)]
        levels[-1] = 0.0
        # Still masked after a step while the level is above a uniform of the position's own.
        return np.where(open_S, (np.array(levels)[None, :] > luck.random(count)[:, None]).sum(1), 0).astype(np.int32)
    block = unmasking.block or count
    runs = [at + np.flatnonzero(open_S[at : at + block]) for at in range(0, count, block)]
    sizes = [len(run) for run in runs if len(run)]
    total = unmasking.steps if open_S.all() else min(max(unmasking.steps, len(sizes)), sum(sizes))
    shares, first = iter(block_steps(total, sizes) if len(runs) > 1 else [total]), 0
    for run in runs:
        if len(run):
            share = next(shares)
            revealed = np.diff(-np.array([len(run), *masked_counts(unmasking.schedule, share, len(run))]))
            steps[luck.permutation(run)] = first + np.repeat(np.arange(share), revealed)
            first += share
    return steps


def block_steps(steps: int, sizes: Sequence[int]) -> list[int]:
    """The steps of each block: one each, and the rest where a step would reveal most. Raises ValueError where there are
    fewer than blocks, or more than positions."""
    if sizes and not len(sizes) <= steps <= sum(sizes):
        raise ValueError(
            f"unmasking: {steps} steps over blocks of {list(sizes)} positions; give each block at least one step and "
            f"at most one a position, so between {len(sizes)} and {sum(sizes)} steps in all"
        )
    shares = [1] * len(sizes)
    for _ in range(steps - len(sizes)):
        open_blocks = [i for i, size in enumerate(sizes) if shares[i] < size]
        shares[max(open_blocks, key=lambda i: (sizes[i] / shares[i], -i))] += 1
    return shares


def check_steps(unmasking: Unmasking, positions: int) -> None:
    """Raises ValueError where a grid of `positions` decided positions cannot be revealed so."""
    if unmasking.order == "blocks":
        block = unmasking.block or positions
        block_steps(unmasking.steps, [min(block, positions - at) for at in range(0, positions, block)])
    elif unmasking.order != "ancestral":
        masked_counts(unmasking.schedule, unmasking.steps, positions)


def ranks(logp: Tensor) -> Tensor:
    """Confidences as they are compared: on a grid of 1/8192 nat, ties to the first position. Two tokens that are both
    all but certain are then as likely, whatever rounding says, in the sampler and in the trainer."""
    return (logp.double() * GRID_PER_NAT).round()


def keep_confident(
    unmasking: Unmasking, confidence_BS: Tensor, masked_BS: Tensor, step: int, counts: Sequence[int]
) -> Tensor:
    """Which masked positions [B, S] a confidence order reveals. `confidence_BS`: log-probs of the proposals, noise
    added; `counts`: positions that stay masked after each step."""
    ranked_BS = ranks(confidence_BS).masked_fill(~masked_BS, -torch.inf)
    left_B = masked_BS.sum(1)
    if unmasking.threshold is not None:
        last = step == len(counts) - 1
        sure_BS = masked_BS & (ranked_BS >= _sure(unmasking.threshold))
        many_B = torch.where(sure_BS.any(1), sure_BS.sum(1), left_B.clamp(max=1))
        many_B = left_B if last else many_B
    else:
        many_B = (left_B - counts[step]).clamp_min(0)
    order_BS = ranked_BS.argsort(dim=1, descending=True, stable=True)
    rank_BS = torch.empty_like(order_BS).scatter_(
        1, order_BS, torch.arange(order_BS.shape[1], device=order_BS.device).expand_as(order_BS)
    )
    return masked_BS & (rank_BS < many_B[:, None])


def order_log_probs(
    unmasking: Unmasking, logp_NV: Tensor, tokens_N: Tensor, row_N: Tensor, kept_N: Tensor, rows: int
) -> Tensor:
    """Log-prob [rows] that the positions not kept in a step proposed nothing better: sum over them of
    log sum_{u: p(u) < c} p(u), c the least likely kept proposal, or the threshold where all kept ones reach it. A
    proposal as likely as c (`ranks`) is no better where its position comes after the last kept one at c.

    With the kept tokens' log-probs this is the step's whole transition, exactly (Mask-GRPO, arXiv 2510.13418, the first
    candidate). The N masked positions of all states come flat, in the order of their positions: law log-probs [N, V],
    token (index in the slice; any where not kept), state, and whether it was kept. The floor c is a value of the
    policy, but which tokens are under it changes at isolated points only, so it has no gradient.
    """
    rank_NV = ranks(logp_NV.detach())
    chosen_N = rank_NV.gather(1, tokens_N[:, None]).squeeze(1)
    floor_R = chosen_N.new_full((rows,), torch.inf)
    floor_R = floor_R.scatter_reduce(0, row_N, chosen_N.masked_fill(~kept_N, torch.inf), "amin")
    place_N = torch.arange(len(row_N), device=row_N.device)
    at_floor_N = kept_N & (chosen_N == floor_R[row_N])
    last_R = torch.full((rows,), -1, device=row_N.device)
    last_R = last_R.scatter_reduce(0, row_N, place_N.masked_fill(~at_floor_N, -1), "amax")
    if unmasking.threshold is not None:
        sure = floor_R >= _sure(unmasking.threshold)
        floor_R = torch.where(sure, _sure(unmasking.threshold), floor_R)
        last_R = torch.where(sure, len(row_N), last_R)  # all that reach the threshold are kept, wherever they are
    floor_N1, after_N1 = floor_R[row_N][:, None], (place_N > last_R[row_N])[:, None]
    under_NV = (rank_NV < floor_N1) | ((rank_NV == floor_N1) & after_N1)
    mass_N = logp_NV.masked_fill(~under_NV, -torch.inf).logsumexp(1)
    return logp_NV.new_zeros(rows).index_add(0, row_N, mass_N.masked_fill(kept_N, 0.0))


def _sure(threshold: float) -> float:
    return float(round(math.log(threshold) * GRID_PER_NAT))
