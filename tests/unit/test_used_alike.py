"""Under ZeRO-3 every micro-batch must use the same weights; the parameters here only bear its mark."""

import pytest
import torch
from torch import nn

from rlmm.train.gates import GateError
from rlmm.train.guard import UsedAlike


def two_layers(in_parts: bool) -> nn.ModuleDict:
    model = nn.ModuleDict({"one": nn.Linear(2, 1, bias=False), "other": nn.Linear(2, 1, bias=False)})
    for parameter in model.parameters() if in_parts else ():
        parameter.ds_status = "AVAILABLE"  # pyrefly: ignore
    return model


def micro_batch(model: nn.ModuleDict, used: UsedAlike, *names: str) -> None:
    used.begin(step=3)
    sum((model[name](torch.ones(1, 2)).sum() for name in names), torch.zeros(())).backward()


@pytest.mark.parametrize(("first", "second"), [(("one", "other"), ("one",)), (("one",), ("one", "other"))])
def test_a_weight_that_only_some_use_stops(first: tuple[str, ...], second: tuple[str, ...]) -> None:
    model = two_layers(in_parts=True)
    used = UsedAlike(model)
    micro_batch(model, used, *first)
    micro_batch(model, used, *second)
    with pytest.raises(GateError, match=r"at step 3 .*other\.weight"):
        used.check(step=3)
    with pytest.raises(GateError, match=r"other\.weight"):
        used.begin(step=3)


@pytest.mark.parametrize("names", [("one",), ("one", "other")])
def test_the_same_weights_each_time_do_not(names: tuple[str, ...]) -> None:
    model = two_layers(in_parts=True)
    used = UsedAlike(model)
    for _ in range(3):
        micro_batch(model, used, *names)
        used.check(step=3)


def test_nothing_is_watched_where_nothing_is_in_parts() -> None:
    model = two_layers(in_parts=False)
    used = UsedAlike(model)
    micro_batch(model, used, "one")
    micro_batch(model, used, "other")
    used.check(step=3)
