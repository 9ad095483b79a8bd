"""Noise plans: which tokens of a sequence are masked in each draw, and what each masked token weighs.

A plan is a pure function of the rows' seeds, so the current, old and reference policy see the same masks, and a resumed
run sees them again. With l_i = log p(x_i | x with the draw's mask) a draw's estimate is sum_i weight_i l_i over its
masked i. For the schemes of kind ELBO its expectation is the any-order bound

    ELBO(x) = E_order sum_i log p(x_i | those before it) = E_{k ~ U{1..L}} E_{|m| = k} (L / k) sum_{i in m} l_i

(LLaDA, arXiv 2502.09992, eq. 6; LLaDA 1.5, arXiv 2505.19223). Shapes: B rows, n draws, S positions, L targets of a row.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from rlmm.objectives.legality import LogProbKind
from rlmm.seeds import generator
from rollouts.schedules import Schedule, time_of

Scheme = Literal["count", "stratified", "complement", "quadrature", "bernoulli", "truncated", "coupled", "mean_field"]
LEAST = 1e-3
"""Least mask ratio of `bernoulli`, whose weight is its inverse."""


@dataclass(frozen=True)
class NoisePlan:
    """masks_BnS bool (True: masked), weight_BnS float64, 0 where not masked; 1/n is in the weights."""

    masks_BnS: Tensor
    weight_BnS: Tensor


Draw = tuple[np.ndarray, np.ndarray]
"""Of one row: masks [n, L] and weights [n, L], before the mean over draws (over triples where they are coupled)."""


def noise_plan(
    scheme: Scheme,
    target_BS: Tensor,
    seeds: Sequence[int],
    draws: int,
    *,
    ratios: tuple[float, float] | None = None,
) -> NoisePlan:
    """The masks of each row over its targets [B, S].

    `ratios`: the range of mask ratios of `truncated`. Raises ValueError where `draws` does not fit the scheme.
    """
    check_draws(scheme, draws)
    rows, length = target_BS.shape
    masks = np.zeros((rows, draws, length), dtype=bool)
    weights = np.zeros((rows, draws, length))
    for row, (targets, seed) in enumerate(zip(target_BS.cpu().numpy(), seeds, strict=True)):
        at = np.flatnonzero(targets)
        if len(at):
            luck = generator("noise", scheme, seed)
            masks[row][:, at], weights[row][:, at] = SCHEMES[scheme](len(at), draws, luck, ratios or (0.0, 1.0))
    groups = draws // 3 if scheme == "coupled" else draws
    return NoisePlan(torch.from_numpy(masks), torch.from_numpy(weights * masks / groups))


def check_draws(scheme: Scheme, draws: int) -> None:
    """Raises ValueError where a scheme cannot be made with that many draws."""
    each = {"complement": 2, "coupled": 3}.get(scheme, 1)
    if draws < 1 or draws % each:
        raise ValueError(f"noise scheme {scheme!r} takes its draws {each} at a time, and was given {draws}; change it")
    if scheme == "mean_field" and draws != 1:
        raise ValueError(f"noise scheme 'mean_field' masks everything, so {draws} draws are all the same; use 1")


def _subset(size: int, count: int, luck: np.random.Generator) -> np.ndarray:
    mask = np.zeros(size, dtype=bool)
    mask[luck.permutation(size)[:count]] = True
    return mask


def _fixed_counts(size: int, counts: Sequence[int], luck: np.random.Generator) -> Draw:
    masks = np.stack([_subset(size, count, luck) for count in counts])
    return masks, np.repeat(size / np.array(counts, dtype=float)[:, None], size, 1)


def _count(size: int, draws: int, luck: np.random.Generator, _: tuple[float, float]) -> Draw:
    """k ~ U{1..L}, weight L / k."""
    return _fixed_counts(size, luck.integers(1, size + 1, draws).tolist(), luck)


def _stratified(size: int, draws: int, luck: np.random.Generator, _: tuple[float, float]) -> Draw:
    """The same with the n counts spread: one in each n-th of the range, so that their mean is uniform still."""
    level = (np.arange(draws) + luck.random(draws)) / draws
    return _fixed_counts(size, (1 + np.floor(level * size)).astype(int).clip(1, size).tolist(), luck)


def _complement(size: int, draws: int, luck: np.random.Generator, _: tuple[float, float]) -> Draw:
    """Pairs of a mask and its complement (ESPO, arXiv 2512.03759): k ~ U{0..L}, weights (L+1)/k and (L+1)/(L-k)."""
    masks, weights = [], []
    for _pair in range(draws // 2):
        mask = _subset(size, int(luck.integers(0, size + 1)), luck)
        for part in (mask, ~mask):
            masks.append(part)
            weights.append(np.full(size, (size + 1) / max(1, part.sum())))
    return np.stack(masks), np.stack(weights)


def _quadrature(size: int, draws: int, luck: np.random.Generator, _: tuple[float, float]) -> Draw:
    """Counts at the Gauss-Legendre nodes of the mask ratio (GDPO, arXiv 2510.08554, with counts in place of Bernoulli
    masks): less variance for a small bias, of rounding the nodes to counts."""
    nodes, share = np.polynomial.legendre.leggauss(draws)
    counts = np.rint((nodes + 1) / 2 * size).astype(int).clip(1, size)
    masks, weights = _fixed_counts(size, counts.tolist(), luck)
    return masks, weights * (share / 2 * draws)[:, None]


def _bernoulli(size: int, draws: int, luck: np.random.Generator, _: tuple[float, float]) -> Draw:
    """t ~ U(LEAST, 1), each token masked with chance t, weight 1 / t: the usual training loss, with its heavy tail."""
    ratio = luck.uniform(LEAST, 1, draws)[:, None]
    return luck.random((draws, size)) < ratio, np.repeat(1 / ratio, size, 1)


def _truncated(size: int, draws: int, luck: np.random.Generator, ratios: tuple[float, float]) -> Draw:
    """Ratio ~ U(ratios), the mean over the masked tokens times L (UniGRPO, MaskGRPO, dLLM-RL): no bound of anything
    once the range is not (0, 1]."""
    masks = luck.random((draws, size)) < luck.uniform(*ratios, draws)[:, None]
    return masks, np.repeat(size / masks.sum(1, keepdims=True).clip(1), size, 1)


def _coupled(size: int, draws: int, luck: np.random.Generator, _: tuple[float, float]) -> Draw:
    """Everything masked, a mask at t ~ U(.2, .8) and its complement, weighed 1, 1/t and 1/(1-t), halved (DiffuCoder,
    arXiv 2506.20639): on a scale of 1.5 log-probs."""
    masks, weights = [], []
    for _triple in range(draws // 3):
        ratio = luck.uniform(0.2, 0.8)
        mask = luck.random(size) < ratio
        for part, weight in ((np.ones(size, dtype=bool), 1.0), (mask, 1 / ratio), (~mask, 1 / (1 - ratio))):
            masks.append(part)
            weights.append(np.full(size, weight / 2))
    return np.stack(masks), np.stack(weights)


def _mean_field(size: int, draws: int, luck: np.random.Generator, _: tuple[float, float]) -> Draw:
    """Everything masked, weight 1 (d1, arXiv 2504.12216): every token as if independent of the others."""
    return np.ones((draws, size), dtype=bool), np.ones((draws, size))


SCHEMES: dict[Scheme, Callable[[int, int, np.random.Generator, tuple[float, float]], Draw]] = {
    "count": _count,
    "stratified": _stratified,
    "complement": _complement,
    "quadrature": _quadrature,
    "bernoulli": _bernoulli,
    "truncated": _truncated,
    "coupled": _coupled,
    "mean_field": _mean_field,
}

SCHEME_KINDS: dict[Scheme, LogProbKind] = {
    "count": LogProbKind.ELBO,
    "stratified": LogProbKind.ELBO,
    "complement": LogProbKind.ELBO,
    "quadrature": LogProbKind.ELBO,
    "bernoulli": LogProbKind.ELBO,
    "truncated": LogProbKind.SURROGATE,
    "coupled": LogProbKind.SURROGATE,
    "mean_field": LogProbKind.MEAN_FIELD,
}


def mean_share(scheme: Scheme, ratios: tuple[float, float] | None = None) -> float:
    """Share of a row's targets that a draw masks, in the mean over draws, for rows of many targets."""
    if scheme == "truncated":
        return sum(ratios or (0.0, 1.0)) / 2
    return {"mean_field": 1.0, "coupled": 2 / 3}.get(scheme, 0.5)


INDEPENDENT: tuple[Scheme, ...] = ("count", "bernoulli")
"""Schemes whose draws know nothing of each other."""

Weighting = Literal["elbo", "mean"]


def training_noise(
    target_BT: Tensor,
    seeds: Sequence[int],
    schedule: Schedule,
    weighting: Weighting,
    *,
    complement: Sequence[bool] | None = None,
) -> tuple[Tensor, Tensor]:
    """Which targets of supervised rows are masked [B, T], and what each masked one weighs [B, T] (float64).

    A row's count is k = ceil(L r(u)), u ~ U(0, 1], with r the schedule. `complement`: rows come in pairs of one seed,
    and those where it is True mask what the other does not; k = 0 is then possible, too: k = ceil((L + 1) r(u)) - 1.
    `elbo`: a masked token weighs 1 / (masked x the count's chance), so that a row's expected sum is the ELBO whatever
    the schedule. `mean`: weight 1.
    """
    masks, weights = np.zeros(target_BT.shape, dtype=bool), np.zeros(target_BT.shape)
    paired = complement is not None
    for row, (targets, seed) in enumerate(zip(target_BT.numpy(), seeds, strict=True)):
        at = np.flatnonzero(targets)
        if not len(at):
            continue
        luck, chance = generator("training noise", seed), count_chances(schedule, len(at) + paired)
        drawn = int(np.searchsorted(chance.cumsum(), luck.random() * chance.sum()).clip(0, len(chance) - 1))
        mask = _subset(len(at), drawn if paired else drawn + 1, luck)
        mask = ~mask if complement is not None and complement[row] else mask
        masks[row, at] = mask
        weights[row, at] = 1.0 if weighting == "mean" else 1 / (max(1, mask.sum()) * chance[drawn])
    return torch.from_numpy(masks), torch.from_numpy(weights * masks)


def count_chances(schedule: Schedule, size: int) -> np.ndarray:
    """Chance of each k = 1 .. L [L] of ceil(L r(u)), L = `size`: the schedule falls from 1 to 0, so it is the length of
    the times at which the ratio is in ((k - 1) / L, k / L]."""
    edges = np.array([time_of(schedule, k / size) for k in range(size + 1)])
    return edges[:-1] - edges[1:]
