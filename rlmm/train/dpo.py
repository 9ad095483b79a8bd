"""The DPO stage: a policy learns from preferences, held against a reference that is frozen.

Shapes: P preferences of a micro-batch with s sides each, n draws of masks, T positions.
"""

import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from rlmm.config.preference import DpoStage, PairNoise
from rlmm.objectives.dpo import DPOLoss, dpo_loss, kto_loss, noise_bias
from rlmm.policies.base import Policy
from rlmm.train.context import StageContext, run_codec, starting_policy
from rlmm.train.dpo_reference import keep_reference, stored_reference
from rlmm.train.dpo_source import PreferenceSource, reference_point
from rlmm.train.gates import GateError
from rlmm.train.metrics import Meter
from rlmm.train.preference_rows import load_items
from rlmm.train.preferences import PreferenceBatch, sequence_log_probs
from rlmm.train.processes import gather
from rlmm.train.results import save_result
from rlmm.train.running import train

Measure = Callable[[PreferenceSource, int], float]


class BiasGate:
    """Stops a run in whose step the noise of estimated log-probs may bias the loss by more than `ceiling` nats a
    preference: in the mean over all of the step's `micro_batches`, of every process."""

    def __init__(self, ceiling: float, micro_batches: int) -> None:
        self.ceiling, self.micro_batches = ceiling, micro_batches
        self._seen: list[list[float]] = []

    def check(self, bound_P: Tensor) -> None:
        """Takes a micro-batch's bounds. Raises GateError with the step's last one, before any update."""
        self._seen.append([float(bound_P.sum()), len(bound_P)])
        if len(self._seen) < self.micro_batches:
            return
        every = [one for seen in gather(self._seen) for one in seen]
        self._seen = []
        mean = sum(total for total, _ in every) / sum(count for _, count in every)
        if mean > self.ceiling:
            raise GateError(
                f"the noise of the estimated margins may bias the DPO loss by {mean:.3g} a pair (ceiling "
                f"{self.ceiling:g}); take more noise.draws, a lower beta, or set per_token: true"
            )


def dpo_step_loss(
    policy: Policy,
    config: DpoStage,
    model: nn.Module,
    batch: PreferenceBatch,
    meter: Meter,
    gate: BiasGate | None = None,
) -> Tensor:
    """This micro-batch's share of the step's loss: of each preference the loss of its kind (`rlmm.objectives.dpo`), and
    `sft_weight` times the negative log-likelihood of what was chosen, a token.

    The reference's log-probs are the batch's, or read here without gradient (`Policy.reference`). Of a masked policy
    all are estimates, and `gate` looks at how much their noise may bias the loss; it is metered.

    Raises GateError where the gate stops the step.
    """
    reference_Dn = _reference(policy, batch)
    policy_Dn = sequence_log_probs(policy, batch, model)
    if batch.noise_weight_BT is not None:
        assert gate is not None, "estimates are always gated"
        bound_P = _bias_bound(policy_Dn.detach() - reference_Dn, config, batch)
        meter.add("dpo/bias_bound", float(bound_P.sum()), float(len(bound_P)))
        gate.check(bound_P)
    policy_D, reference_D = policy_Dn.mean(1), reference_Dn.mean(1)
    found = _loss(config, batch, policy_D, reference_D)
    _meter(found, batch, meter)
    weight_P = batch.weight_P.to(found.loss_P)
    loss = (weight_P * found.loss_P).sum()
    if config.sft_weight:
        nll_P = -(policy_D / batch.length_D)[: len(weight_P)]
        wanted_P = weight_P if batch.desirable_P is None else weight_P * batch.desirable_P
        meter.add("loss/chosen", float(nll_P.detach()[wanted_P > 0].sum()), float((wanted_P > 0).sum()))
        loss = loss + config.sft_weight * (wanted_P * nll_P).sum()
    return loss


@torch.no_grad()
def _reference(policy: Policy, batch: PreferenceBatch) -> Tensor:
    if batch.reference_D is not None:
        return batch.reference_D[:, None]
    with policy.reference():
        return sequence_log_probs(policy, batch, policy.gathering)


def _loss(config: DpoStage, batch: PreferenceBatch, policy_D: Tensor, reference_D: Tensor) -> DPOLoss:
    reference_D = reference_D.to(policy_D)
    if config.loss == "kto":
        assert batch.desirable_P is not None, "the stage takes pairs apart for kto"
        return kto_loss(
            policy_D,
            reference_D,
            batch.desirable_P,
            config.beta,
            batch.point,
            desirable_weight=config.desirable_weight,
            undesirable_weight=config.undesirable_weight,
            lengths_B=batch.length_D if config.per_token else None,
        )
    length_P, other_P = batch.length_D.chunk(2)
    return dpo_loss(
        *policy_D.chunk(2),
        *reference_D.chunk(2),
        beta=config.beta,
        kind=config.loss,
        label_smoothing=config.label_smoothing,
        lengths_P=(length_P, other_P) if config.per_token else None,
    )


def _meter(found: DPOLoss, batch: PreferenceBatch, meter: Meter) -> None:
    """Means over the preferences, those of understanding under names of their own."""
    for name, value_P in found.figures.items():
        for place, chosen_P in (("dpo", ~batch.understanding_P), ("dpo/understanding", batch.understanding_P)):
            if chosen_P.any():
                meter.add(f"{place}/{name}", float(value_P[chosen_P].sum()), float(chosen_P.sum()))


def _bias_bound(ratio_Dn: Tensor, config: DpoStage, batch: PreferenceBatch) -> Tensor:
    """The bound of `noise_bias` [P], of a variance that is itself estimated from how the draws of a preference differ,
    times the weight of its kind, under kto. `ratio_Dn`: log-ratios, one a draw; their mean is what the loss is of."""
    ratio_Dn = ratio_Dn.double() / (batch.length_D[:, None] if config.per_token else 1)
    if batch.sides == 2:
        chosen_Pn, rejected_Pn = ratio_Dn.chunk(2)
        ratio_Dn = chosen_Pn - rejected_Pn
    bound_P = noise_bias(config.loss, config.beta, ratio_Dn.var(1) / batch.draws)
    if batch.desirable_P is None:
        return bound_P
    return bound_P * torch.where(batch.desirable_P, config.desirable_weight, config.undesirable_weight)


def run_dpo(context: StageContext) -> None:
    """Train from the starting policy on the stage's preferences; leaves model/ (and adapter/) in its folder, and
    preferences.json: what was read and what was left out."""
    config: DpoStage = context.config
    codec = run_codec(context)
    policy = starting_policy(context, codec)
    items = load_items(context, policy, codec)
    meter, reference_NKs, point = Meter(), None, None
    noise = None if policy.layout.mask is None else config.noise or PairNoise()
    if noise is not None or config.loss == "kto":
        keep_reference(context, policy)
    else:
        started = time.perf_counter()
        reference_NKs = stored_reference(context, policy, items)
        meter.put({"time/reference": time.perf_counter() - started})
    if config.loss == "kto":
        point = metered(partial(reference_point, per_token=config.per_token), meter)
    source = PreferenceSource(
        policy,
        items,
        batch_size=config.batch_size,
        micro_batch_size=config.micro_batch_size,
        seed=context.seed("preferences"),
        weights=(1.0,) if config.understanding is None else (config.generation_weight, config.understanding.weight),
        noise=noise,
        reference_NKs=reference_NKs,
        point=point,
    )
    gate = None if noise is None else BiasGate(noise.bias_ceiling, source.micro_batches_per_step)
    train(
        context,
        policy.model,
        source,
        lambda model, batch, meter: dpo_step_loss(policy, config, model, batch, meter, gate),
        meter,
        micro_batch_size=config.micro_batch_size,
        show=("loss", "dpo/correct", "dpo/margin", "dpo/understanding/correct", "learning_rate", "grad_norm"),
    )
    save_result(context, policy, codec)


def metered(measure: Measure, meter: Meter) -> Measure:
    """`measure`, and what it finds among the step's figures."""

    def noted(source: PreferenceSource, step: int) -> float:
        point = measure(source, step)
        meter.put({"dpo/point": point})
        return point

    return noted
