"""Padded rows: one mask for all layers, which no layer copies and keeps for the backward."""

from typing import cast

import pytest
import torch
from torch import Tensor

from rlmm.config.policy import NewPolicy
from rlmm.policies.causal import CausalPolicy
from rlmm.policies.families.llama import build

LAYERS, LENGTH = 3, 21


def policy_of(precision: str) -> CausalPolicy:
    shape = NewPolicy(hidden_size=32, num_layers=LAYERS, num_heads=2, intermediate_size=48)
    policy = cast(CausalPolicy, build(shape, num_codes=16, grid=(4, 4), seed=0))
    policy.precision = precision
    return policy


def kept_masks(policy: CausalPolicy, mask_BT: Tensor) -> set[int]:
    """Addresses of what a forward keeps for its backward that has a row and a column a position."""
    found: set[int] = set()

    def seen(tensor: Tensor) -> Tensor:
        if tensor.shape[-2:] == (LENGTH, LENGTH):
            found.add(tensor.untyped_storage().data_ptr())
            held.append(tensor)
        return tensor

    held: list[Tensor] = []  # so that no address is given out twice
    with torch.autograd.graph.saved_tensors_hooks(seen, lambda tensor: tensor):
        policy.hidden(torch.full(mask_BT.shape, 9), mask_BT).sum().backward()
    return found


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_layers_share_the_mask_of_padded_rows(precision: str) -> None:
    mask_BT = torch.ones(2, LENGTH, dtype=torch.bool)
    assert kept_masks(policy_of(precision), mask_BT) == set(), "rows without padding need no mask"
    mask_BT[0, :5] = False
    assert len(kept_masks(policy_of(precision), mask_BT)) == 1


def test_what_a_padded_row_computes_is_what_it_computes_alone() -> None:
    policy = policy_of("float32")
    ids_BT = torch.randint(8, 40, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    padded, mask_BT = ids_BT.clone(), torch.ones(1, LENGTH, dtype=torch.bool)
    padded[:, :5], mask_BT[:, :5] = 0, False
    with torch.no_grad():
        alone = policy.hidden(ids_BT[:, 5:], mask_BT[:, 5:])
        together = policy.hidden(padded, mask_BT)[:, 5:]
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
