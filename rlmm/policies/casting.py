"""Autocast of a transformer's body, whatever its model is wrapped in."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def cast_inside(body: nn.Module, device: str, enabled: bool) -> Iterator[None]:
    """Inside, every forward of `body` runs under autocast to bfloat16. Autocast around a wrapped model would not do: a
    DeepSpeed engine switches it off for its own forward, and says so once, in a log."""
    if not enabled:
        yield
        return
    plain, own = body.forward, "forward" in body.__dict__

    def cast(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(device, torch.bfloat16):
            return plain(*args, **kwargs)

    body.forward = cast
    try:
        yield
    finally:
        if own:
            body.forward = plain
        else:
            del body.forward  # a copy of the module must not call this one's
