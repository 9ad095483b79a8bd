"""Weights that DeepSpeed's ZeRO-3 keeps in parts, one on each process, and how they are read whole.

A parameter in parts has no values of its own, and a module gathers those of its parameters around its own forward and
backward. Here is what reads them otherwise: an output head that is sliced, and forwards and copies between updates. To
gather is a collective, so every process must come to it, in the same order. Where nothing is in parts, nothing happens.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn


def several_processes() -> bool:
    return torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1


def in_parts(parameter: Tensor) -> bool:
    """Whether the parameter is one that ZeRO-3 cares for, gathered just now or not."""
    return hasattr(parameter, "ds_status")


@contextmanager
def gathered(parameters: Iterable[Tensor]) -> Iterator[None]:
    """The parameters whole; they must not be changed. What was taken from them (a view, an alias) outlives this."""
    missing = _gather(parameters)
    try:
        yield
    finally:
        _release(missing)


@contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """The whole model on every process, as if it had never been in parts: inside, forwards are no collectives, so
    processes need not make the same number of them."""
    parameters = [parameter for parameter in model.parameters() if in_parts(parameter)]
    if not parameters:
        yield
        return
    settle(model)
    with gathered(parameters), _without_hooks(model):
        yield


def settle(model: nn.Module) -> None:
    """Wait for what DeepSpeed has begun to gather ahead of its use."""
    under_way: Any = getattr(model, "ds_inflight_param_registry", {})
    for parameter in list(under_way):
        under_way.pop(parameter).wait()


def readable(parameter: Tensor) -> Tensor:
    """The parameter's whole values, through which a gradient finds its way back to the parts."""
    if not in_parts(parameter):
        return parameter
    with gathered([parameter]):
        return cast(Tensor, _Readable.apply(parameter))


class _Readable(torch.autograd.Function):
    """The identity. A gradient is added to a parameter that is whole, so it is gathered for as long as that takes."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor) -> Tensor:
        ctx.parameter = parameter
        return parameter.detach()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Tensor:
        missing = _gather([ctx.parameter])
        if missing:
            torch.autograd.Variable._execution_engine.queue_callback(lambda: _release(missing))
        return grad_outputs[0]


def _gather(parameters: Iterable[Tensor]) -> list[Any]:
    """Those that had to be gathered, each once, in one order on all processes."""
    held: set[Any] = {parameter for parameter in parameters if in_parts(parameter)}
    missing = [
        parameter
        for parameter in sorted(held, key=lambda one: one.ds_id)
        if parameter.ds_status.name == "NOT_AVAILABLE"
    ]
    if missing:
        missing[0].all_gather(param_list=missing)
    return missing


def _release(parameters: list[Any]) -> None:
    """A parameter that a module has come to use meanwhile is that module's to release."""
    idle = [parameter for parameter in parameters if not parameter.ds_active_sub_modules]
    if idle:
        idle[0].partition(param_list=idle)


@contextmanager
def _without_hooks(model: nn.Module) -> Iterator[None]:
    """No hook of DeepSpeed's, which would part again what is whole; all others, and all in their old order after."""
    tables = [hooks for m in model.modules() for hooks in (m._forward_pre_hooks, m._forward_hooks)]
    before = [dict(hooks) for hooks in tables]
    for hooks in tables:
        for key in [key for key, hook in hooks.items() if hook.__module__.startswith("deepspeed.")]:
            del hooks[key]
    try:
        yield
    finally:
        for hooks, old in zip(tables, before, strict=True):
            new = dict(hooks)
            hooks.clear()
            hooks.update(old | new)
