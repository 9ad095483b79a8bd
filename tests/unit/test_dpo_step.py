"""A DPO step of the next-token policy: where it starts, where it goes, and what it must leave alone."""

import math
from pathlib import Path

import pytest
import torch

from rlmm.config.policy import Lora
from rlmm.config.stages import Optimization
from rlmm.policies.layout_io import Supervised, supervised_batch
from rlmm.policies.transformer import TransformerPolicy
from rlmm.train.dpo import DpoBatch, PairSource, PreferencePairs, dpo_step_loss, pair_batch
from rlmm.train.metrics import Meter, MetricsFile
from rlmm.train.trainer import StageTrainer, training_arguments
from rollouts.trajectory import IMAGE
from tests.parity.test_sampler_trainer import CODES, GRID, make_policy

PAIRS, BETA = 6, 0.1


def policy_of(kind: str) -> TransformerPolicy:
    policy = make_policy(row_ends=True)
    policy.model.train()
    if kind == "lora":
        policy.add_lora(Lora(rank=4, target_modules=("q_proj", "down_proj", "lm_head")), seed=1)
    else:
        policy.freeze_reference()
    return policy


def pairs() -> PreferencePairs:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, CODES, (2, PAIRS, GRID[0] * GRID[1]), generator=generator)
    return PreferencePairs([f"word {i}" * (1 + i % 3) for i in range(PAIRS)], codes[0], codes[1])


def whole(policy: TransformerPolicy) -> DpoBatch:
    return pair_batch(policy, pairs(), range(PAIRS), 1 / PAIRS)


def image_log_probs(policy: TransformerPolicy) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs of the chosen and of the rejected images, by the policy as it is, one pair and side at a time."""
    return logp_of(policy, pairs().chosen_NT), logp_of(policy, pairs().rejected_NT)


def logp_of(policy: TransformerPolicy, codes_NT: torch.Tensor) -> torch.Tensor:
    values = []
    for prompt, codes in zip(pairs().prompts, codes_NT.tolist(), strict=True):
        batch = supervised_batch(policy.layout, [Supervised(policy.encode_prompt(prompt), codes)])
        with torch.no_grad():
            values.append(policy.sequence_log_probs(batch)[batch.modality_BT == IMAGE].sum())
    return torch.stack(values)


def reference_log_probs(policy: TransformerPolicy) -> torch.Tensor:
    with policy.reference():
        return torch.cat(image_log_probs(policy))


def train(policy: TransformerPolicy, folder: Path, *, micro_batch_size: int = 3) -> list[dict[str, float]]:
    """One optimizer step over all pairs by the stages' own trainer; its line of metrics."""
    source = PairSource(policy, pairs(), batch_size=PAIRS, micro_batch_size=micro_batch_size, seed=2)
    arguments = training_arguments(
        Optimization(steps=1, learning_rate=1e-3, schedule="constant", checkpoint_every=1),
        folder,
        micro_batch_size=micro_batch_size,
        accumulation=source.micro_batches_per_step,
        report_to=(),
        name="dpo",
    )
    metrics = MetricsFile(folder / "metrics.jsonl")
    trainer = StageTrainer(
        policy.model,
        arguments,
        source,
        lambda model, batch, meter: dpo_step_loss(policy, model, batch, meter, beta=BETA),
        metrics,
        Meter(),
    )
    trainer.run(lambda _: None)
    return metrics.read()


@pytest.mark.parametrize("by_length", [False, True])
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_before_any_step_the_loss_is_log_2(kind: str, by_length: bool) -> None:
    policy, meter = policy_of(kind), Meter()
    loss = dpo_step_loss(policy, policy.model, whole(policy), meter, beta=BETA, by_length=by_length)
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
    loss = dpo_step_loss(policy, policy.model, whole(policy), Meter(), beta=BETA)
    assert float(loss.detach()) < math.log(2) - 1e-3


def test_the_loss_after_a_step_is_the_formula_in_float64(tmp_path: Path) -> None:
    policy = policy_of("full")
    before = torch.cat(image_log_probs(policy)).double()
    train(policy, tmp_path)
    ratio = torch.cat(image_log_probs(policy)).double() - before
    wanted = sum(math.log1p(math.exp(-BETA * float(ratio[i] - ratio[PAIRS + i]))) for i in range(PAIRS)) / PAIRS
    loss = dpo_step_loss(policy, policy.model, whole(policy), Meter(), beta=BETA)
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
        dpo_step_loss(policy, policy.model, whole(policy), Meter(), beta=BETA)


def test_pairs_that_do_not_fit_are_refused() -> None:
    codes = torch.zeros(3, 12, dtype=torch.long)
    with pytest.raises(ValueError, match="2 prompts with chosen codes"):
        PreferencePairs(["a", "b"], codes, codes)
    with pytest.raises(ValueError, match="not a multiple of micro_batch_size 4"):
        PairSource(policy_of("lora"), pairs(), batch_size=PAIRS, micro_batch_size=4, seed=0)
