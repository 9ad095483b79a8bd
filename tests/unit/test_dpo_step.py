"""A DPO step of the next-token policy: where it starts, where it goes, and what it must leave alone."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from rlmm.config.optimization import Optimization
from rlmm.config.policy import Lora
from rlmm.config.preference import DpoStage
from rlmm.policies.layout_io import Supervised, supervised_batch
from rlmm.policies.transformer import TransformerPolicy
from rlmm.train.dpo import dpo_step_loss
from rlmm.train.dpo_source import PreferenceSource
from rlmm.train.metrics import Meter
from rlmm.train.preferences import Preference, PreferenceBatch, preference_batch
from rollouts.trajectory import IMAGE
from tests.parity.test_sampler_trainer import CODES, GRID, make_policy
from tests.steps import take_steps

PAIRS, BETA = 6, 0.1


def policy_of(kind: str) -> TransformerPolicy:
    policy = make_policy(row_ends=True)
    policy.model.train()
    if kind == "lora":
        policy.add_lora(Lora(rank=4, target_modules=("q_proj", "down_proj", "lm_head")), seed=1)
    else:
        policy.freeze_reference()
    return policy


CODES_2NT = torch.randint(0, CODES, (2, PAIRS, GRID[0] * GRID[1]), generator=torch.Generator().manual_seed(0))
PROMPTS = [f"word {i}" * (1 + i % 3) for i in range(PAIRS)]


def config(**changes: object) -> DpoStage:
    given = {"steps": 1, "learning_rate": 1e-3, "pairs": "pairs", "beta": BETA}
    return DpoStage.model_validate({**given, **changes})


def pairs(policy: TransformerPolicy, order: tuple[int, int] = (0, 1)) -> list[Preference]:
    """The pairs; with `order` (1, 0) chosen and rejected change places."""
    return [
        Preference(tuple(Supervised(policy.encode_prompt(PROMPTS[i]), CODES_2NT[side, i].tolist()) for side in order))
        for i in range(PAIRS)
    ]


def whole(policy: TransformerPolicy, rows: Sequence[int] = range(PAIRS), **settings: Any) -> PreferenceBatch:
    every = pairs(policy)
    return preference_batch(policy.layout, [every[row] for row in rows], [1 / len(rows)] * len(rows), **settings)


def image_log_probs(policy: TransformerPolicy) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs of the chosen and of the rejected images, by the policy as it is, one pair and side at a time."""
    return logp_of(policy, CODES_2NT[0]), logp_of(policy, CODES_2NT[1])


def logp_of(policy: TransformerPolicy, codes_NT: torch.Tensor) -> torch.Tensor:
    values = []
    for prompt, codes in zip(PROMPTS, codes_NT.tolist(), strict=True):
        batch = supervised_batch(policy.layout, [Supervised(policy.encode_prompt(prompt), codes)])
        with torch.no_grad():
            values.append(policy.sequence_log_probs(batch)[batch.modality_BT == IMAGE].sum())
    return torch.stack(values)


def reference_log_probs(policy: TransformerPolicy) -> torch.Tensor:
    with policy.reference():
        return torch.cat(image_log_probs(policy))


def train(policy: TransformerPolicy, folder: Path, *, micro_batch_size: int = 3) -> list[dict[str, float]]:
    """One optimizer step over all pairs by the stages' own trainer; its line of metrics."""
    items = [(one,) for one in pairs(policy)]
    source = PreferenceSource(policy, items, batch_size=PAIRS, micro_batch_size=micro_batch_size, seed=2)
    return take_steps(
        policy.model,
        source,
        lambda model, batch, meter: dpo_step_loss(policy, config(), model, batch, meter),
        folder,
        Optimization(steps=1, learning_rate=1e-3, schedule="constant", checkpoint_every=1),
    )


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_before_any_step_the_loss_is_log_2(kind: str, per_token: bool) -> None:
    policy, meter = policy_of(kind), Meter()
    loss = dpo_step_loss(policy, config(per_token=per_token), policy.model, whole(policy), meter)
    assert float(loss.detach()) == pytest.approx(math.log(2), abs=1e-6)
    assert meter.flush()["dpo/margin"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_step_raises_the_margin_and_leaves_the_reference(kind: str, tmp_path: Path) -> None:
    policy = policy_of(kind)
    chosen, rejected = image_log_probs(policy)
    reference = reference_log_probs(policy)
    (row,) = train(policy, tmp_path)
    assert row["loss"] == pytest.approx(math.log(2), abs=1e-5)
    now_chosen, now_rejected = image_log_probs(policy)
    assert float((now_chosen - now_rejected).mean()) > float((chosen - rejected).mean()) + 0.01
    torch.testing.assert_close(reference_log_probs(policy), reference, rtol=0, atol=0)
    loss = dpo_step_loss(policy, config(), policy.model, whole(policy), Meter())
    assert float(loss.detach()) < math.log(2) - 1e-3


def test_the_loss_after_a_step_is_the_formula_in_float64(tmp_path: Path) -> None:
    policy = policy_of("full")
    before = torch.cat(image_log_probs(policy)).double()
    train(policy, tmp_path)
    ratio = torch.cat(image_log_probs(policy)).double() - before
    wanted = sum(math.log1p(math.exp(-BETA * float(ratio[i] - ratio[PAIRS + i]))) for i in range(PAIRS)) / PAIRS
    loss = dpo_step_loss(policy, config(), policy.model, whole(policy), Meter())
    assert float(loss.detach()) == pytest.approx(wanted, abs=1e-5)


def test_the_step_does_not_depend_on_how_it_was_cut(tmp_path: Path) -> None:
    after = []
    for size in (1, 6):
        policy = policy_of("full")
        train(policy, tmp_path / str(size), micro_batch_size=size)
        after.append(torch.cat(image_log_probs(policy)))
    torch.testing.assert_close(after[0], after[1], rtol=0, atol=2e-4)


def test_only_image_codes_are_targets() -> None:
    policy = policy_of("lora")
    sequences = whole(policy).sequences
    low, high = policy.layout.image
    picked = sequences.ids_BT[sequences.target_BT]
    assert ((picked >= low) & (picked < high)).all()
    assert sequences.target_BT.sum(1).unique().tolist() == [GRID[0] * GRID[1]]


def test_full_training_without_a_reference_is_refused() -> None:
    policy = make_policy()
    with pytest.raises(RuntimeError, match="freeze_reference"):
        dpo_step_loss(policy, config(), policy.model, whole(policy), Meter())


def test_the_loss_of_a_batch_is_the_mean_of_its_pairs(tmp_path: Path) -> None:
    policy = policy_of("full")
    train(policy, tmp_path)
    settings = config(sft_weight=0.3, label_smoothing=0.1)

    def loss(*rows: int) -> float:
        return float(dpo_step_loss(policy, settings, policy.model, whole(policy, rows), Meter()).detach())

    together, apart = loss(1, 4), [loss(1), loss(4)]
    assert together == pytest.approx(sum(apart) / 2, abs=1e-6) and abs(apart[0] - apart[1]) > 1e-4


def test_swapping_chosen_and_rejected_flips_the_sign_of_the_gradient() -> None:
    """At the reference, where the loss is the same either way."""
    policy, found = policy_of("full"), []
    for order in ((0, 1), (1, 0)):
        batch = preference_batch(policy.layout, pairs(policy, order), [1 / PAIRS] * PAIRS)
        policy.model.zero_grad()
        dpo_step_loss(policy, config(), policy.model, batch, Meter()).backward()
        found.append(torch.cat([p.grad.flatten() for p in policy.model.parameters() if p.grad is not None]))
    torch.testing.assert_close(found[0], -found[1], rtol=1e-4, atol=1e-6)
    assert float(found[0].abs().max()) > 1e-3


def test_a_reference_read_before_is_the_one_read_beside() -> None:
    policy = policy_of("full")
    known_D = torch.cat(image_log_probs(policy)).double()
    with torch.no_grad():
        for weight in policy.model.parameters():
            weight.mul_(1.05)
    beside = dpo_step_loss(policy, config(), policy.model, whole(policy), Meter())
    before = dpo_step_loss(policy, config(), policy.model, whole(policy, reference_D=known_D), Meter())
    assert float(before.detach()) == pytest.approx(float(beside.detach()), abs=1e-6)
    assert abs(float(before.detach()) - math.log(2)) > 1e-3


def test_the_sft_term_is_the_chosen_images_mean_token() -> None:
    policy = policy_of("full")
    meter = Meter()
    plain = dpo_step_loss(policy, config(), policy.model, whole(policy), Meter())
    with_term = dpo_step_loss(policy, config(sft_weight=0.5), policy.model, whole(policy), meter)
    wanted = float(-image_log_probs(policy)[0].mean()) / (GRID[0] * GRID[1])
    assert float((with_term - plain).detach()) == pytest.approx(0.5 * wanted, abs=1e-5)
    assert meter.flush()["loss/chosen"] == pytest.approx(wanted, abs=1e-5)


def test_two_answers_to_one_prompt_of_different_kinds_count_with_their_weights(tmp_path: Path) -> None:
    policy = policy_of("full")
    question = policy.encode_prompt("what")
    answers = tuple(Supervised(question, text=policy.encode_prompt(text)) for text in ("yes", "no sir"))
    train(policy, tmp_path)
    both = [pairs(policy)[0], Preference(answers)]
    meter = Meter()
    loss = dpo_step_loss(policy, config(), policy.model, preference_batch(policy.layout, both, [0.7, 0.2]), meter)
    batches = [preference_batch(policy.layout, [one], [1.0]) for one in both]
    alone = [float(dpo_step_loss(policy, config(), policy.model, batch, Meter()).detach()) for batch in batches]
    assert float(loss.detach()) == pytest.approx(0.7 * alone[0] + 0.2 * alone[1], abs=1e-6)
    assert {"dpo/margin", "dpo/understanding/margin"} <= set(meter.flush())
    batch = preference_batch(policy.layout, [Preference(answers)], [1.0])
    assert batch.length_D.tolist() == [3, 6]  # the answers, and nothing of the question


def test_pairs_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="a single answer has a label"):
        Preference((Supervised([1], [2]),))
    policy = policy_of("lora")
    with pytest.raises(ValueError, match="not a multiple of micro_batch_size 4"):
        PreferenceSource(policy, [(one,) for one in pairs(policy)], batch_size=PAIRS, micro_batch_size=4, seed=0)
