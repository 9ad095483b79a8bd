"""KTO's reference point, over a whole step; and pairs taken apart for it."""

import pytest
import torch

from rlmm.policies.layout_io import Supervised, supervised_batch
from rlmm.policies.transformer import TransformerPolicy
from rlmm.train.dpo import dpo_step_loss, metered
from rlmm.train.dpo_source import PreferenceSource, reference_point
from rlmm.train.metrics import Meter
from rlmm.train.preference_rows import apart
from rollouts.trajectory import IMAGE
from tests.unit.test_dpo_step import CODES_2NT, PAIRS, config, logp_of, pairs, policy_of

ROWS = 2 * PAIRS


def source_of(policy: TransformerPolicy, micro_batch_size: int = 4, meter: Meter | None = None) -> PreferenceSource:
    measure = metered(lambda source, step: reference_point(source, step, per_token=False), meter or Meter())
    return PreferenceSource(
        policy,
        apart([(one,) for one in pairs(policy)]),
        batch_size=ROWS,
        micro_batch_size=micro_batch_size,
        seed=5,
        point=measure,
    )


def test_the_point_is_the_mean_log_ratio_of_the_next_rows_answers() -> None:
    policy, meter = policy_of("full"), Meter()
    source = source_of(policy, meter=meter)
    picked = [source.items[row][0].sides[0] for row in source.picked(0)]
    crossed = [Supervised(row.prompt, picked[(i + 1) % ROWS].image) for i, row in enumerate(picked)]

    def log_probs() -> torch.Tensor:
        return torch.cat([logp_of_row(policy, row) for row in crossed])

    with torch.no_grad():
        for weight in policy.model.parameters():
            weight.mul_(0.9)  # flatter, so that other rows' answers become likelier
    with policy.reference():
        before = log_probs()
    wanted = float((log_probs() - before).mean())
    assert wanted > 0.05
    assert source.micro_batches(0)[0].point == pytest.approx(wanted, abs=1e-4)
    assert meter.flush()["dpo/point"] == pytest.approx(wanted, abs=1e-4)
    assert source_of(policy, 3).micro_batches(0)[3].point == pytest.approx(wanted, abs=1e-4)


def logp_of_row(policy: TransformerPolicy, row: Supervised) -> torch.Tensor:
    batch = supervised_batch(policy.layout, [row])
    with torch.no_grad():
        return policy.sequence_log_probs(batch)[batch.modality_BT == IMAGE].sum()[None]


def test_a_point_below_zero_is_zero() -> None:
    policy = policy_of("full")
    with torch.no_grad():
        for weight in policy.model.parameters():
            weight.mul_(1.2)  # surer of itself, so that other rows' answers become less likely
    assert source_of(policy).micro_batches(0)[0].point == 0.0


def test_pairs_are_taken_apart_and_the_loss_is_of_each_answer() -> None:
    policy = policy_of("full")
    items = apart([(one,) for one in pairs(policy)])
    assert [one.desirable for (one,) in items] == [True, False] * PAIRS
    source, settings = source_of(policy), config(loss="kto", undesirable_weight=3.0)
    batches = source.micro_batches(0)
    losses = [float(dpo_step_loss(policy, settings, policy.model, batch, Meter()).detach()) for batch in batches]
    # At the reference every sigmoid is 1/2: half the mean weight.
    assert sum(losses) == pytest.approx((1 + 3) / 2 / 2, abs=1e-5)


def test_what_is_wanted_becomes_likelier_and_the_rest_less() -> None:
    policy, settings = policy_of("full"), config(loss="kto")
    optimizer = torch.optim.SGD(policy.model.parameters(), lr=0.05)
    before = [logp_of(policy, CODES_2NT[side]).mean() for side in (0, 1)]
    for batch in source_of(policy, ROWS).micro_batches(0):
        dpo_step_loss(policy, settings, policy.model, batch, Meter()).backward()
    optimizer.step()
    after = [logp_of(policy, CODES_2NT[side]).mean() for side in (0, 1)]
    assert after[0] > before[0] and after[1] < before[1]
