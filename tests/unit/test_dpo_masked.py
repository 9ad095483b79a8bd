"""DPO of a masked policy: on a bound, under masks that both images and both policies share."""

import math
from collections.abc import Sequence

import pytest
import torch

from rlmm.config.policy import NewPolicy
from rlmm.config.preference import DpoStage, PairNoise
from rlmm.policies.families.llama import build
from rlmm.policies.layout_io import Supervised, supervised_batch
from rlmm.policies.masked import MaskedPolicy
from rlmm.train.dpo import dpo_step_loss
from rlmm.train.dpo_source import PreferenceSource
from rlmm.train.gates import GateError
from rlmm.train.metrics import Meter
from rlmm.train.preferences import Preference, PreferenceBatch, preference_batch
from rollouts.trajectory import IMAGE

GRID, CODES, PAIRS, BETA = (2, 3), 8, 5, 0.1
SEEDS = list(range(100, 100 + PAIRS))


def policy_of(change: float = 0.0) -> MaskedPolicy:
    config = NewPolicy(family="masked", hidden_size=16, num_layers=2, num_heads=2, intermediate_size=24, row_ends=True)
    policy = build(config, num_codes=CODES, grid=GRID, seed=1)
    assert isinstance(policy, MaskedPolicy)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in policy.model.parameters():
            weight.add_(0.2 * torch.randn(weight.shape, generator=generator))
    policy.freeze_reference()
    with torch.no_grad():
        for weight in policy.model.parameters():
            weight.add_(change * torch.randn(weight.shape, generator=generator))
    return policy


CODES_2NT = torch.randint(0, CODES, (2, PAIRS, 6), generator=torch.Generator().manual_seed(0))
PROMPTS = [f"word {i}" * (1 + i % 3) for i in range(PAIRS)]


def noise_of(scheme: str, draws: int, bias_ceiling: float = 0.1) -> PairNoise:
    return PairNoise.model_validate({"scheme": scheme, "draws": draws, "bias_ceiling": bias_ceiling})


def config(noise: PairNoise) -> DpoStage:
    given = {"steps": 1, "learning_rate": 1e-3, "pairs": "pairs", "beta": BETA}
    return DpoStage.model_validate({**given, "noise": noise.model_dump()})


def pairs(policy: MaskedPolicy) -> list[Preference]:
    return [
        Preference(tuple(Supervised(policy.encode_prompt(PROMPTS[i]), CODES_2NT[side, i].tolist()) for side in (0, 1)))
        for i in range(PAIRS)
    ]


def batch_of(policy: MaskedPolicy, rows: Sequence[int], weight: float, noise: PairNoise) -> PreferenceBatch:
    every = pairs(policy)
    return preference_batch(
        policy.layout,
        [every[row] for row in rows],
        [weight] * len(rows),
        noise=noise,
        seeds=[SEEDS[row] for row in rows],
    )


def loss_of(policy: MaskedPolicy, rows: Sequence[int], weight: float, noise: PairNoise) -> torch.Tensor:
    return dpo_step_loss(policy, config(noise), policy.model, batch_of(policy, rows, weight, noise), Meter())


def test_at_the_reference_the_loss_is_log_2_whatever_the_masks() -> None:
    policy = policy_of()
    for noise in (noise_of("count", 1), noise_of("stratified", 4), noise_of("complement", 2)):
        loss = loss_of(policy, list(range(PAIRS)), 1 / PAIRS, noise).detach()
        assert float(loss) == pytest.approx(math.log(2), abs=1e-6)


def test_both_images_of_a_pair_have_the_same_positions_masked() -> None:
    policy = policy_of()
    batch = batch_of(policy, [0, 1, 2], 1.0, noise_of("count", 3))
    one = batch.sequences
    assert one.noised_BT is not None and one.noised_BT.shape[0] == 2 * 3 * 3
    assert one.noised_BT[:9].equal(one.noised_BT[9:]) and not (one.noised_BT & (one.modality_BT != IMAGE)).any()
    assert not one.noised_BT[:3].equal(one.noised_BT[3:6])


def test_the_loss_of_a_batch_is_the_mean_of_its_pairs() -> None:
    policy, noise = policy_of(0.05), noise_of("stratified", 3)
    whole = loss_of(policy, list(range(PAIRS)), 1 / PAIRS, noise)
    single = [loss_of(policy, [row], 1.0, noise) for row in range(PAIRS)]
    assert float(whole.detach()) == pytest.approx(sum(float(one.detach()) for one in single) / PAIRS, abs=1e-6)
    assert max(abs(float(one.detach()) - math.log(2)) for one in single) > 1e-3


def test_the_margin_is_that_of_the_weighed_sums_by_hand() -> None:
    policy, noise = policy_of(0.05), noise_of("count", 2)
    meter = Meter()
    batch, values = batch_of(policy, [3], 1.0, noise), []
    dpo_step_loss(policy, config(noise), policy.model, batch, meter)
    assert batch.noise_weight_BT is not None and batch.sequences.noised_BT is not None
    for side, codes in enumerate(CODES_2NT[:, 3]):
        plain = supervised_batch(policy.layout, [Supervised(policy.encode_prompt(PROMPTS[3]), codes.tolist())])
        total = 0.0
        for draw in range(2):
            row = 2 * side + draw
            ids = torch.where(batch.sequences.noised_BT[row], policy.mask, plain.ids_BT[0])
            for sign, model in ((1, policy.model), (-1, policy._frozen)):
                assert model is not None
                with torch.no_grad():
                    logits = model(ids[None]).logits[0, :, slice(*policy.layout.image)].log_softmax(-1)
                for at in batch.sequences.noised_BT[row].nonzero().flatten().tolist():
                    code = int(plain.ids_BT[0, at]) - policy.layout.image[0]
                    total += sign * float(batch.noise_weight_BT[row, at]) * float(logits[at, code])
        values.append(total)
    assert meter.flush()["dpo/margin"] == pytest.approx(BETA * (values[0] - values[1]), abs=1e-4)


def test_more_draws_bring_the_bound_down_and_a_bound_past_the_ceiling_stops() -> None:
    policy, bounds = policy_of(0.3), []
    for draws in (2, 16):
        meter = Meter()
        noise = noise_of("count", draws, 10)
        batch = batch_of(policy, range(PAIRS), 1 / PAIRS, noise)
        dpo_step_loss(policy, config(noise), policy.model, batch, meter)
        bounds.append(meter.flush()["dpo/bias_bound"])
    assert 0 < bounds[1] < bounds[0] / 3
    with pytest.raises(GateError, match="take more noise.draws"):
        loss_of(policy, [0, 1], 0.5, noise_of("count", 2, 1e-9))


def test_the_noise_of_the_margins_biases_the_loss_by_no_more_than_the_bound() -> None:
    """One pair under 600 plans: the mean loss is above the loss of the mean margin, by less than the metered bound."""
    policy, times = policy_of(0.3), 600
    for draws in (2, 8):
        meter, noise = Meter(), noise_of("count", draws, 1e9)
        settings = config(noise).model_copy(update={"beta": 1.0})
        same = [pairs(policy)[1]] * times
        batch = preference_batch(policy.layout, same, [1 / times] * times, noise=noise, seeds=range(times))
        with torch.no_grad():
            mean = float(dpo_step_loss(policy, settings, policy.model, batch, meter))
        figures = meter.flush()
        bias = mean - math.log1p(math.exp(-figures["dpo/margin"]))
        assert 0 < bias < figures["dpo/bias_bound"]
        assert bias > figures["dpo/bias_bound"] / 20


def test_a_source_gives_the_same_masks_again_and_others_each_step() -> None:
    policy = policy_of()
    items = [(one,) for one in pairs(policy)]
    source = PreferenceSource(policy, items, batch_size=4, micro_batch_size=2, seed=3, noise=noise_of("count", 2))
    first, again, later = (source.micro_batches(step)[0].sequences.noised_BT for step in (0, 0, 1))
    assert first is not None and again is not None and later is not None
    assert first.equal(again) and not (first.shape == later.shape and first.equal(later))


def test_what_is_no_bound_and_a_pair_without_noise_are_refused() -> None:
    with pytest.raises(ValueError, match="DPO compares likelihoods"):
        noise_of("mean_field", 1)
    policy = policy_of()
    with pytest.raises(ValueError, match="give the noise"):
        preference_batch(policy.layout, pairs(policy)[:1], [1.0])
