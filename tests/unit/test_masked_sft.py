"""How a masked policy learns from pictures: which tokens are masked, what they weigh, and what that is on average."""

from itertools import product
from math import comb

import numpy as np
import pytest
import torch

from rlmm.config.policy import NewPolicy
from rlmm.config.stages import SftStage
from rlmm.objectives.noise import count_chances, training_noise
from rlmm.policies.families.llama import build
from rlmm.policies.layout_io import Supervised
from rlmm.policies.masked import MaskedPolicy
from rlmm.train.metrics import Meter
from rlmm.train.sft import SftSource, sft_loss
from rollouts.schedules import Schedule, masked_share, time_of
from rollouts.trajectory import IMAGE, TEXT

GRID, CODES = (3, 4), 40
SCHEDULES = ("linear", "cosine", "square", "1 - t**0.5", "1 - t**3")
LENGTH = 4


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_inverses_are_inverse_and_chances_are_those_of_the_ceiling(schedule: Schedule) -> None:
    for t in np.linspace(0, 1, 11):
        assert time_of(schedule, masked_share(schedule, float(t))) == pytest.approx(t, abs=1e-9)
    chance = count_chances(schedule, 7)
    times = (np.arange(200_000) + 0.5) / 200_000
    counts = np.ceil(7 * np.array([masked_share(schedule, t) for t in times])).astype(int)
    assert chance.sum() == pytest.approx(1)
    np.testing.assert_allclose(np.bincount(counts, minlength=8)[1:] / len(times), chance, atol=1e-4)


@pytest.mark.parametrize(
    "schedule", [SCHEDULES[0], *(pytest.param(other, marks=pytest.mark.long) for other in SCHEDULES[1:])]
)
@pytest.mark.parametrize("paired", [False, True])
def test_the_expected_weight_of_every_mask_is_the_bounds(schedule: Schedule, paired: bool) -> None:
    """E sum over masked i of w l_i(mask) is the ELBO whatever l is, if each mask's expected weight is its weight there:
    1/L of its count, spread over the masks of that count, times L / k."""
    rows = 60_000
    target = torch.ones(rows, LENGTH, dtype=torch.bool)
    seeds = [row // 2 for row in range(rows)] if paired else range(rows)
    complement = [row % 2 == 1 for row in range(rows)] if paired else None
    masks, weights = training_noise(target, list(seeds), schedule, "elbo", complement=complement)
    if paired:
        assert (masks[::2] ^ masks[1::2]).all()
    number = (masks * torch.tensor([8, 4, 2, 1])).sum(1)
    for mask in product([0, 1], repeat=LENGTH):
        size = sum(mask)
        if not size:
            continue
        at = number == int("".join(map(str, mask)), 2)
        weight = torch.where(at, weights.amax(1), 0.0)
        wanted = LENGTH / size / LENGTH / comb(LENGTH, size)
        assert abs(float(weight.mean()) - wanted) < 5 * float(weight.std()) / (rows / (2 if paired else 1)) ** 0.5


@pytest.mark.parametrize("schedule", SCHEDULES[:3])
def test_the_published_mean_weighs_masks_otherwise_than_the_bound(schedule: Schedule) -> None:
    """The mean over masked tokens, pooled over a batch: against the bound it makes much of large masks, whichever the
    published schedule (the weights of masks of one and of all tokens are in another proportion)."""
    rows = 40_000
    masks, weights = training_noise(torch.ones(rows, LENGTH, dtype=torch.bool), range(rows), schedule, "mean")
    size, weight = masks.sum(1), weights.amax(1)
    share = {k: float(torch.where(size == k, weight, 0.0).mean()) / comb(LENGTH, k) for k in (1, LENGTH)}
    bound = {k: LENGTH / k / LENGTH / comb(LENGTH, k) for k in (1, LENGTH)}
    assert share[LENGTH] / share[1] > 2 * bound[LENGTH] / bound[1]


def policy_of(seed: int = 1) -> MaskedPolicy:
    config = NewPolicy(family="masked", hidden_size=32, num_layers=2, num_heads=2, intermediate_size=48)
    policy = build(config, num_codes=CODES, grid=GRID, seed=seed)
    assert isinstance(policy, MaskedPolicy)
    return policy


def source(policy: MaskedPolicy, **changes: object) -> SftSource:
    base = {"steps": 4, "learning_rate": 1e-3, "batch_size": 8, "micro_batch_size": 8, "prompt_dropout": 0}
    codes = torch.randint(0, CODES, (12, GRID[0] * GRID[1]), generator=torch.Generator().manual_seed(0))
    rows = [Supervised(policy.encode_prompt("x" * (1 + i % 5)), codes[i].tolist()) for i in range(12)]
    return SftSource(policy.layout, rows, SftStage.model_validate(base | changes), seed=5)


@pytest.mark.parametrize("noise", [{}, {"schedule": "cosine"}, {"weighting": "mean"}, {"complementary": True}])
def test_the_loss_is_the_weighed_cross_entropy_of_plain_transformers_at_the_masked(noise: dict[str, object]) -> None:
    policy = policy_of()
    (batch,) = source(policy, noise=noise).micro_batches(1)
    ours = float(sft_loss(policy, policy.model, batch, Meter()).detach())
    one = batch.sequences
    assert one.noised_BT is not None
    low, high = policy.layout.image
    ids = torch.where(one.noised_BT, policy.mask, one.ids_BT)
    with torch.no_grad():
        logits = policy.model(ids, attention_mask=one.mask_BT).logits[..., low:high]
    losses = torch.nn.functional.cross_entropy(logits[one.noised_BT], one.ids_BT[one.noised_BT] - low, reduction="none")
    if noise.get("weighting") == "mean":
        wanted = losses.mean()
    else:
        wanted = (losses * batch.weight_BT[one.noised_BT]).sum()
        assert float(batch.weight_BT[~one.noised_BT & (one.modality_BT == IMAGE)].sum()) == 0
    assert ours == pytest.approx(float(wanted), rel=1e-5)
    assert not (one.noised_BT & (one.modality_BT == TEXT)).any()


def test_the_mean_elbo_loss_over_many_steps_is_the_negative_elbo_a_token() -> None:
    """Of a policy whose every log-prob is -1 the loss is 1, whatever is masked, under count weights."""
    policy = policy_of()
    data = source(policy, noise={"schedule": "linear"})
    total = [float(batch.weight_BT.sum()) for step in range(6) for batch in data.micro_batches(step)]
    assert total == pytest.approx([1.0] * 6)


def test_text_is_masked_where_it_is_weighed() -> None:
    policy = policy_of()
    (batch,) = source(policy, text_weight=0.5).micro_batches(0)
    one = batch.sequences
    assert one.noised_BT is not None and (one.noised_BT & (one.modality_BT == TEXT)).any()
    (words,) = source(policy, text_weight=1.0, image_weight=0.0).micro_batches(0)
    assert words.sequences.noised_BT is not None
    assert not (words.sequences.noised_BT & (words.sequences.modality_BT == IMAGE)).any()


@pytest.mark.parametrize("settings", [{}, {"prompt_dropout": 0.5, "text_weight": 0.5}])
def test_complementary_masks_come_in_pairs_of_one_picture_and_prompt(settings: dict[str, object]) -> None:
    policy, pairs = policy_of(), 0
    data = source(policy, noise={"complementary": True}, **settings)
    for step in range(8):
        (batch,) = data.micro_batches(step)
        one = batch.sequences
        assert one.noised_BT is not None
        taught = one.target_BT if settings else one.target_BT & (one.modality_BT == IMAGE)
        masks: dict[str, list[torch.Tensor]] = {}
        for row in range(8):
            sequence = str(one.ids_BT[row, one.mask_BT[row]].tolist())
            masks.setdefault(sequence, []).append(one.noised_BT[row, taught[row]])
        for found in masks.values():
            assert len(found) % 2 == 0
            if len(found) == 2:
                assert (found[0] ^ found[1]).all()
                pairs += 1
    assert pairs > 20


def test_a_step_is_the_same_however_it_is_cut() -> None:
    policy = policy_of()
    cut = [source(policy, micro_batch_size=size).micro_batches(2) for size in (8, 2)]
    totals = [sum(float(sft_loss(policy, policy.model, one, Meter()).detach()) for one in batches) for batches in cut]
    assert totals[0] == pytest.approx(totals[1], rel=1e-5)
