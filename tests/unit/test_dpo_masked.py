"""DPO of a masked policy: on a bound, under masks that both images and both policies share."""

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from rlmm.config.optimization import Optimization
from rlmm.config.policy import Lora, NewPolicy
from rlmm.config.preference import DpoStage, PairNoise
from rlmm.policies.families.llama import build
from rlmm.policies.layout_io import Supervised, supervised_batch
from rlmm.policies.masked import MaskedPolicy
from rlmm.train.dpo import BiasGate, dpo_step_loss
from rlmm.train.dpo_source import PreferenceSource
from rlmm.train.gates import GateError
from rlmm.train.metrics import Meter
from rlmm.train.preference_rows import apart
from rlmm.train.preferences import Preference, PreferenceBatch, preference_batch, sequence_log_probs
from rollouts.trajectory import IMAGE
from tests.steps import take_steps

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


def config(noise: PairNoise, **changes: object) -> DpoStage:
    given = {"steps": 1, "learning_rate": 1e-3, "pairs": "pairs", "beta": BETA}
    return DpoStage.model_validate({**given, "noise": noise.model_dump(), **changes})


def pairs(policy: MaskedPolicy, order: tuple[int, int] = (0, 1)) -> list[Preference]:
    """The pairs; with `order` (1, 0) chosen and rejected change places."""
    return [
        Preference(tuple(Supervised(policy.encode_prompt(PROMPTS[i]), CODES_2NT[side, i].tolist()) for side in order))
        for i in range(PAIRS)
    ]


def gate_of(noise: PairNoise, micro_batches: int = 1) -> BiasGate:
    return BiasGate(noise.bias_ceiling, micro_batches)


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
    batch = batch_of(policy, rows, weight, noise)
    return dpo_step_loss(policy, config(noise), policy.model, batch, Meter(), gate_of(noise))


def test_at_the_reference_the_loss_is_log_2_whatever_the_masks() -> None:
    policy = policy_of()
    for noise in (noise_of("count", 2), noise_of("stratified", 4), noise_of("complement", 2)):
        loss = loss_of(policy, list(range(PAIRS)), 1 / PAIRS, noise).detach()
        assert float(loss) == pytest.approx(math.log(2), abs=1e-6)


def test_both_images_of_a_pair_have_the_same_positions_masked() -> None:
    policy = policy_of()
    batch = batch_of(policy, [0, 1, 2], 1.0, noise_of("count", 3))
    one = batch.sequences
    assert one.noised_BT is not None and one.noised_BT.shape[0] == 2 * 3 * 3
    assert one.noised_BT[:9].equal(one.noised_BT[9:]) and not (one.noised_BT & (one.modality_BT != IMAGE)).any()
    assert not one.noised_BT[:3].equal(one.noised_BT[3:6])


LOSSES = (
    {},
    {"label_smoothing": 0.1, "sft_weight": 0.3},
    {"loss": "ipo", "per_token": True},
    {"loss": "hinge"},
    {"loss": "kto", "undesirable_weight": 2.0},
)


@pytest.mark.parametrize("changes", LOSSES, ids=lambda changes: str(changes.get("loss", len(changes))))
def test_the_loss_of_a_batch_is_the_mean_of_its_preferences(changes: dict[str, object]) -> None:
    policy, noise = policy_of(0.05), noise_of("stratified", 3, 10)
    settings, every = config(noise, **changes), [(one,) for one in pairs(policy)]
    rows = [one for (one,) in (apart(every) if settings.loss == "kto" else every)]

    def loss(chosen: Sequence[int]) -> float:
        batch = preference_batch(
            policy.layout,
            [rows[row] for row in chosen],
            [1 / len(chosen)] * len(chosen),
            noise=noise,
            seeds=[100 + row for row in chosen],
            point=0.2,
        )
        return float(dpo_step_loss(policy, settings, policy.model, batch, Meter(), gate_of(noise)).detach())

    single = [loss([row]) for row in range(len(rows))]
    assert loss(range(len(rows))) == pytest.approx(sum(single) / len(rows), abs=1e-5)
    assert max(single) - min(single) > 1e-3


@pytest.mark.parametrize("changes", [{}, {"loss": "ipo", "per_token": True}, {"loss": "hinge"}], ids=str)
def test_swapping_chosen_and_rejected_flips_the_sign_of_the_gradient(changes: dict[str, object]) -> None:
    """At the reference, where the loss is the same either way."""
    policy, noise, found = policy_of(), noise_of("count", 2), []
    for order in ((0, 1), (1, 0)):
        each = [1 / PAIRS] * PAIRS
        batch = preference_batch(policy.layout, pairs(policy, order), each, noise=noise, seeds=SEEDS)
        policy.model.zero_grad()
        dpo_step_loss(policy, config(noise, **changes), policy.model, batch, Meter(), gate_of(noise)).backward()
        found.append(torch.cat([p.grad.flatten() for p in policy.model.parameters() if p.grad is not None]))
    torch.testing.assert_close(found[0], -found[1], rtol=1e-3, atol=1e-6)
    assert float(found[0].abs().max()) > 1e-3


def reference_log_probs(policy: MaskedPolicy, noise: PairNoise) -> torch.Tensor:
    with torch.no_grad(), policy.reference():
        return sequence_log_probs(policy, batch_of(policy, range(PAIRS), 1.0, noise))


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_training_raises_the_margin_and_leaves_the_reference_bit_equal(kind: str, tmp_path: Path) -> None:
    policy, noise = policy_of(), noise_of("count", 2)
    if kind == "lora":
        policy.add_lora(Lora(rank=4, target_modules=("q_proj", "down_proj", "lm_head")), seed=1)
    before = reference_log_probs(policy, noise)
    source = PreferenceSource(
        policy, [(one,) for one in pairs(policy)], batch_size=4, micro_batch_size=2, seed=2, noise=noise
    )
    gate = gate_of(noise, source.micro_batches_per_step)
    first, *_, last = take_steps(
        policy.model,
        source,
        lambda model, batch, meter: dpo_step_loss(policy, config(noise), model, batch, meter, gate),
        tmp_path,
        Optimization(steps=4, learning_rate=3e-3, schedule="constant", checkpoint_every=4),
    )
    assert first["dpo/margin"] == pytest.approx(0, abs=1e-5) and last["dpo/margin"] > 0.01
    torch.testing.assert_close(reference_log_probs(policy, noise), before, rtol=0, atol=0)


def test_the_margin_is_that_of_the_weighed_sums_by_hand() -> None:
    policy, noise = policy_of(0.05), noise_of("count", 2)
    meter = Meter()
    batch, values = batch_of(policy, [3], 1.0, noise), []
    dpo_step_loss(policy, config(noise), policy.model, batch, meter, gate_of(noise))
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
        dpo_step_loss(policy, config(noise), policy.model, batch, meter, gate_of(noise))
        bounds.append(meter.flush()["dpo/bias_bound"])
    assert 0 < bounds[1] < bounds[0] / 3
    with pytest.raises(GateError, match="take more noise.draws"):
        loss_of(policy, [0, 1], 0.5, noise_of("count", 2, 1e-9))


def test_the_bound_of_a_weighed_answer_is_weighed_as_its_loss_is() -> None:
    policy, noise = policy_of(0.3), noise_of("count", 3, 10)
    rows = [row for (row,) in apart([(one,) for one in pairs(policy)])]

    def metered(chosen: Sequence[Preference], **changes: object) -> float:
        meter, weights = Meter(), [1 / len(chosen)] * len(chosen)
        batch = preference_batch(policy.layout, chosen, weights, noise=noise, seeds=range(len(chosen)))
        dpo_step_loss(policy, config(noise, loss="kto", **changes), policy.model, batch, meter, gate_of(noise))
        return meter.flush()["dpo/bias_bound"]

    wanted = [row for row in rows if row.desirable]
    others = [row for row in rows if not row.desirable]
    assert metered(wanted, desirable_weight=3.0) == pytest.approx(3 * metered(wanted))
    assert metered(others, undesirable_weight=2.0) == pytest.approx(2 * metered(others))
    assert metered(wanted, undesirable_weight=2.0) == pytest.approx(metered(wanted))


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_gate_looks_at_the_mean_of_a_step_however_it_is_cut(size: int) -> None:
    bound_P = torch.tensor([0.3, 0.01, 0.02, 0.01])  # 0.085 in the mean
    passing, stopping = BiasGate(0.09, 4 // size), BiasGate(0.08, 4 // size)
    for _step in range(2):
        for part in bound_P.split(size):
            passing.check(part)
    *before, last = bound_P.split(size)
    for part in before:
        stopping.check(part)
    with pytest.raises(GateError, match="bias the DPO loss by 0.085 a pair"):
        stopping.check(last)


def test_the_noise_of_the_margins_biases_the_loss_by_no_more_than_the_bound() -> None:
    """One pair under 600 plans: the mean loss is above the loss of the mean margin, by less than the metered bound."""
    policy, times = policy_of(0.3), 600
    for draws in (2, 8):
        meter, noise = Meter(), noise_of("count", draws, 1e9)
        settings = config(noise).model_copy(update={"beta": 1.0})
        same = [pairs(policy)[1]] * times
        batch = preference_batch(policy.layout, same, [1 / times] * times, noise=noise, seeds=range(times))
        with torch.no_grad():
            mean = float(dpo_step_loss(policy, settings, policy.model, batch, meter, gate_of(noise)))
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
    with pytest.raises(ValueError, match="told by how much draws differ; use 2 or more"):
        noise_of("count", 1)
    policy = policy_of()
    with pytest.raises(ValueError, match="give the noise"):
        preference_batch(policy.layout, pairs(policy)[:1], [1.0])
