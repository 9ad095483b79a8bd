"""DPO on pairs of images of one prompt: the batches of a step and its loss.

Shapes: N stored pairs, P pairs of a micro-batch, T positions of a sequence or codes of an image, as named.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from rlmm.objectives.dpo import dpo_loss
from rlmm.objectives.legality import LogProbKind
from rlmm.objectives.noise import SCHEME_KINDS, Scheme, check_draws, noise_plan
from rlmm.policies.base import Policy, SequenceBatch
from rlmm.policies.layout_io import Supervised, supervised_batch
from rlmm.seeds import derive, epoch_indices
from rlmm.train.gates import GateError
from rlmm.train.metrics import Meter
from rlmm.train.processes import share
from rollouts.trajectory import IMAGE


@dataclass(frozen=True)
class PreferencePairs:
    """Prompts [N] with the codes [N, T] (int64) of the image preferred and of the one it was preferred to."""

    prompts: Sequence[str]
    chosen_NT: Tensor
    rejected_NT: Tensor

    def __post_init__(self) -> None:
        if self.chosen_NT.shape != self.rejected_NT.shape or len(self.prompts) != len(self.chosen_NT):
            raise ValueError(
                f"{len(self.prompts)} prompts with chosen codes {tuple(self.chosen_NT.shape)} and rejected ones "
                f"{tuple(self.rejected_NT.shape)}; give one prompt and two images of equal size a pair"
            )


@dataclass(frozen=True)
class DpoBatch:
    """2P sequences, the P chosen ones first, whose targets are the images alone: the prompt is given. `weight` is
    1 / (pairs of the step). Of a masked policy each sequence stands there `draws` times, with masks of its own and
    what each masked token weighs."""

    sequences: SequenceBatch
    weight: float
    noise_weight_BT: Tensor | None = None
    draws: int = 1

    def to(self, device: torch.device | str) -> "DpoBatch":
        noise = None if self.noise_weight_BT is None else self.noise_weight_BT.to(device)
        return replace(self, sequences=self.sequences.to(device), noise_weight_BT=noise)


@dataclass(frozen=True)
class PairNoise:
    """What a masked policy's log-probs of a pair are estimated with: `draws` masks of an ELBO's scheme.

    Raises ValueError for a scheme that estimates no bound: DPO compares likelihoods.
    """

    scheme: Scheme = "stratified"
    draws: int = 4

    def __post_init__(self) -> None:
        if SCHEME_KINDS[self.scheme] is not LogProbKind.ELBO:
            raise ValueError(
                f"noise scheme {self.scheme!r} estimates a {SCHEME_KINDS[self.scheme].value}, and DPO compares "
                "likelihoods or their bounds; use count, stratified, complement, quadrature or bernoulli"
            )
        check_draws(self.scheme, self.draws)


def pair_batch(
    policy: Policy,
    pairs: PreferencePairs,
    rows: Sequence[int],
    weight: float,
    *,
    noise: PairNoise | None = None,
    seeds: Sequence[int] = (),
) -> DpoBatch:
    """The pairs at `rows` as one batch. A masked policy needs `noise`, and a seed a pair: its two images have the same
    positions masked, and so have policy and reference, which makes the margin far steadier than each bound."""
    prompts = [policy.encode_prompt(pairs.prompts[row]) for row in rows]
    codes = torch.cat([pairs.chosen_NT[list(rows)], pairs.rejected_NT[list(rows)]]).tolist()
    both = supervised_batch(policy.layout, [Supervised(p, c) for p, c in zip(prompts * 2, codes, strict=True)])
    both = replace(both, target_BT=both.target_BT & (both.modality_BT == IMAGE))
    if policy.layout.mask is None:
        return DpoBatch(both, weight)
    if noise is None or len(seeds) != len(rows):
        raise ValueError("a masked policy's log-probs are estimated: give the noise, and a seed for each pair")
    plan = noise_plan(noise.scheme, both.target_BT, [*seeds, *seeds], noise.draws)
    each = both.each(lambda value: value.repeat_interleave(noise.draws, 0))
    return DpoBatch(
        replace(each, noised_BT=plan.masks_BnS.flatten(0, 1)), weight, plan.weight_BnS.flatten(0, 1), noise.draws
    )


class PairSource:
    """Step -> this process's micro-batches of pairs."""

    nothing_counts = False

    def __init__(
        self,
        policy: Policy,
        pairs: PreferencePairs,
        *,
        batch_size: int,
        micro_batch_size: int,
        seed: int,
        noise: PairNoise | None = None,
    ) -> None:
        rows = share(batch_size, "batch_size")
        if (rows.stop - rows.start) % micro_batch_size:
            raise ValueError(
                f"{rows.stop - rows.start} pairs a process are not a multiple of micro_batch_size {micro_batch_size}; "
                "change either"
            )
        self.policy, self.pairs, self.rows, self.seed, self.noise = policy, pairs, rows, seed, noise
        self.batch_size, self.micro_batch_size = batch_size, micro_batch_size
        self.micro_batches_per_step = (rows.stop - rows.start) // micro_batch_size

    def micro_batches(self, step: int) -> list[DpoBatch]:
        size = self.micro_batch_size
        picked = epoch_indices(len(self.pairs.prompts), step * self.batch_size, self.batch_size, self.seed, "pairs")
        mine = picked[self.rows]
        seeds = [derive(self.seed, "noise", step, place) for place in range(self.batch_size)][self.rows]
        return [
            pair_batch(
                self.policy, self.pairs, mine[at : at + size], 1 / self.batch_size, noise=self.noise,
                seeds=seeds[at : at + size],
            )
            for at in range(0, len(mine), size)
        ]  # fmt: skip


def dpo_step_loss(
    policy: Policy,
    model: nn.Module,
    batch: DpoBatch,
    meter: Meter,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    by_length: bool = False,
    bias_ceiling: float = 0.1,
) -> Tensor:
    """This micro-batch's share of the step's mean pair loss (`objectives.dpo.dpo_loss`).

    The reference is the policy's own (`Policy.reference`), read here and without gradient. `by_length` divides each
    log-ratio by the image's decided tokens. Of a masked policy the margins are estimates: their noise biases the loss
    by at most beta^2 Var / 8 (its curvature is at most 1/4; LLaDA 1.5, arXiv 2505.19223), which is metered.

    Raises GateError where that bound, as a mean over the pairs, is past `bias_ceiling`.
    """
    sequences = batch.sequences
    with torch.no_grad(), policy.reference():
        reference_Bn = _by_draw(policy.sequence_log_probs(sequences), batch)
    policy_Bn = _by_draw(policy.sequence_log_probs(sequences, model=model), batch)
    chosen_P, rejected_P = policy_Bn.mean(1).chunk(2)
    reference_chosen_P, reference_rejected_P = reference_Bn.mean(1).chunk(2)
    length_P, other_P = sequences.target_BT[:: batch.draws].sum(1).chunk(2)
    if batch.draws > 1:
        ratio_Bn = (policy_Bn.detach() - reference_Bn) / (torch.cat([length_P, other_P])[:, None] if by_length else 1)
        _check_bias(ratio_Bn, beta, bias_ceiling, meter)
    found = dpo_loss(
        chosen_P,
        rejected_P,
        reference_chosen_P,
        reference_rejected_P,
        beta,
        label_smoothing=label_smoothing,
        lengths_P=(length_P, other_P) if by_length else None,
    )
    pairs = found.metrics["pairs"]
    for name, total in found.metrics.items():
        if name != "pairs":
            meter.add(f"dpo/{name}", total, pairs)
    return found.loss_P.sum() * batch.weight


def _by_draw(logp_BT: Tensor, batch: DpoBatch) -> Tensor:
    """Log-probs of the sequences [2P, draws]: exact ones once, or one estimate a draw, whose mean is the estimate."""
    if batch.noise_weight_BT is None:
        return logp_BT.sum(1, keepdim=True)
    weight_BT = batch.noise_weight_BT.to(logp_BT) * batch.draws
    return (weight_BT * logp_BT).sum(1).unflatten(0, (-1, batch.draws))


def _check_bias(ratio_Bn: Tensor, beta: float, ceiling: float, meter: Meter) -> None:
    chosen_Pn, rejected_Pn = ratio_Bn.double().chunk(2)
    bound_P = beta**2 * (chosen_Pn - rejected_Pn).var(1) / chosen_Pn.shape[1] / 8
    meter.add("dpo/bias_bound", float(bound_P.sum()), float(len(bound_P)))
    if float(bound_P.mean()) > ceiling:
        raise GateError(
            f"the noise of the estimated margins may bias the DPO loss by {float(bound_P.mean()):.3g} nats a pair "
            f"(ceiling {ceiling:g}); take more draws, a lower beta, or divide by the length"
        )
