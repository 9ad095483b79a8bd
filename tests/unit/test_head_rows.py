"""Training only the head's rows of image codes: the weights of training it whole, in the files and names of ever."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from rlmm.config.policy import Lora, NewPolicy
from rlmm.policies.families.llama import build
from rlmm.policies.families.loading import load_policy
from rlmm.policies.head_rows import ROWS, rows_weight, train_rows
from rlmm.policies.transformer import TransformerPolicy
from rollouts.contract import Request
from rollouts.law import Law
from rollouts.torch_engine.causal import TorchEngine
from rollouts.trajectory import Span, Trajectory


def policy_of(*, tied: bool = False) -> TransformerPolicy:
    config = NewPolicy(hidden_size=16, num_layers=1, num_heads=2, intermediate_size=24, tie_embeddings=tied)
    return build(config, num_codes=8, grid=(1, 3), seed=3)


def rollout(policy: TransformerPolicy) -> Trajectory:
    layout = policy.layout
    request = Request("a", {"cond": layout.prefix(policy.encode_prompt("ab"))}, (1, 2), ("a/0", "a/1"))
    return TorchEngine(policy, num_layers=1).generate([request], [Span("image", Law(layout.image), 3)])


def trained(policy: TransformerPolicy, made: Trajectory, steps: int = 4) -> tuple[dict[str, Tensor], list[float]]:
    """Weights, and the gradient's norm at each step."""
    parameters = [p for p in policy.model.parameters() if p.requires_grad]
    optimizer, norms = torch.optim.AdamW(parameters, lr=0.01, weight_decay=0), []
    for _ in range(steps):
        optimizer.zero_grad()
        policy.log_probs(made).logp_BS.sum().neg().backward()
        norms.append(float(nn.utils.clip_grad_norm_(policy.model.parameters(), 0.5)))
        optimizer.step()
    return {name: weight.clone() for name, weight in policy.named_weights()}, norms


def test_the_weights_and_norms_are_those_of_training_the_head_whole() -> None:
    whole, rows = policy_of(), policy_of()
    made = rollout(whole)
    rows.train_image_rows()
    start = dict(whole.named_weights())["lm_head.weight"].clone()
    (wanted, wanted_norms), (found, norms) = trained(whole, made), trained(rows, made)
    assert list(found) == list(wanted)
    assert norms == pytest.approx(wanted_norms, rel=1e-6)
    for name, weight in wanted.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-5, atol=1e-7)
    low, high = rows.layout.image
    assert torch.equal(found["lm_head.weight"][:low], start[:low])
    assert not torch.equal(found["lm_head.weight"][low:high], start[low:high])


def test_only_the_rows_have_a_gradient_and_moments() -> None:
    policy = policy_of()
    policy.train_image_rows()
    trained(policy, rollout(policy), steps=1)
    head = policy.model.lm_head
    assert head.weight.grad is None and not head.weight.requires_grad
    low, high = policy.layout.image
    assert head.get_parameter(ROWS).grad.shape == (high - low, 16)


def test_files_and_names_are_those_of_ever(tmp_path: Path) -> None:
    policy = policy_of()
    names = [name for name, _ in policy.named_weights()]
    keys = list(policy.model.state_dict())
    policy.train_image_rows()
    made = rollout(policy)
    trained(policy, made)
    assert [name for name, _ in policy.named_weights()] == names and list(policy.model.state_dict()) == keys
    policy.save(tmp_path)
    again = load_policy(tmp_path)
    assert torch.equal(again.log_probs(made).logp_BS, policy.log_probs(made).logp_BS)


def test_a_checkpoint_that_is_loaded_reaches_the_trained_rows() -> None:
    policy, other = policy_of(), policy_of()
    policy.train_image_rows()
    with torch.no_grad():
        other.model.lm_head.weight.add_(1.0)
    answer = policy.model.load_state_dict(other.model.state_dict(), strict=True)
    assert not answer.missing_keys
    low, high = policy.layout.image
    assert torch.equal(policy.model.lm_head.get_parameter(ROWS), other.model.lm_head.weight[low:high])


def test_a_head_that_was_moved_is_found_out() -> None:
    head = nn.Linear(4, 6, bias=False)
    train_rows(head, (2, 5))
    assert rows_weight(head, slice(2, 5)) is head.get_parameter(ROWS)
    assert rows_weight(head, slice(0, 3)).data_ptr() == head.weight.data_ptr()
    head.weight.data = head.weight.data.clone()
    with pytest.raises(RuntimeError, match="moved after its rows were set to train"):
        rows_weight(head, slice(2, 5))


def test_tied_heads_and_adapters_train_as_before() -> None:
    tied, adapted = policy_of(tied=True), policy_of()
    adapted.add_lora(Lora(rank=2, target_modules=("q_proj",)), seed=1)
    for policy in (tied, adapted):
        before = [(name, p.requires_grad) for name, p in policy.model.named_parameters()]
        policy.train_image_rows()
        assert [(name, p.requires_grad) for name, p in policy.model.named_parameters()] == before
