"""The transformer's body runs in bfloat16 whatever the model is wrapped in."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from rlmm.config.policy import NewPolicy
from rlmm.policies.families.llama import build


class Switching(nn.Module):
    """What a DeepSpeed engine does around its forward."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast("cpu", enabled=False):
            return self.module(*args, **kwargs)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_wrapper_that_switches_autocast_off_changes_nothing(precision: str) -> None:
    shape = NewPolicy(hidden_size=32, num_layers=2, num_heads=2, intermediate_size=48)
    policy = build(shape, num_codes=8, grid=(2, 2), seed=0)
    ids, mask = torch.arange(6).repeat(2, 1), torch.ones(2, 6, dtype=torch.bool)
    exact = policy.hidden(ids, mask)
    policy.precision = precision
    bare, wrapped = policy.hidden(ids, mask), policy.hidden(ids, mask, model=Switching(policy.model))
    assert torch.equal(bare, wrapped)
    assert torch.equal(bare, exact) == (precision == "float32")
    assert "forward" not in policy.base.base_model.__dict__
    other = copy.deepcopy(policy.model)
    for parameter in policy.model.parameters():
        parameter.data.zero_()
    policy._swapped = other
    assert torch.equal(policy.hidden(ids, mask), bare)
