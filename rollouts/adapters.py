"""Low-rank adapters: folded into the weights that they are of, or sent beside them.

Sent apart, a weight `w` is followed by `w.lora_A.NAME` [r, in], `w.lora_B.NAME` [out, r] and `w.lora_scale.NAME` (one
number) of each adapter on it. Whoever holds the weights folds them as the trainer does (`folded`).
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rollouts.fingerprint import weights_fingerprint

KINDS = ("lora_A", "lora_B", "lora_scale")


@dataclass(frozen=True)
class Adapter:
    """LoRA (arXiv 2106.09685) on one weight W [out, in]: W + scale B A."""

    name: str
    a_RI: Tensor
    b_OR: Tensor
    scale: float

    def change(self) -> Tensor:
        """What it adds [out, in], in its own dtype. Half precision is multiplied in float32 on a CPU, as PEFT does."""
        a_RI, b_OR, dtype = self.a_RI, self.b_OR, self.b_OR.dtype
        if b_OR.device.type == "cpu" and dtype in (torch.float16, torch.bfloat16):
            a_RI, b_OR = a_RI.float(), b_OR.float()
        return (b_OR @ a_RI * self.scale).to(dtype)


def folded(weight_OI: Tensor, adapters: Sequence[Adapter]) -> Tensor:
    """A weight with its adapters on it, in another tensor where it has any."""
    for adapter in adapters:
        weight_OI = weight_OI + adapter.change()
    return weight_OI


def apart(name: str, weight_OI: Tensor, adapters: Sequence[Adapter]) -> Iterator[tuple[str, Tensor]]:
    """A weight and its adapters as they are sent."""
    yield name, weight_OI
    for adapter in adapters:
        scale = torch.tensor(adapter.scale, dtype=torch.float64)
        for kind, tensor in zip(KINDS, (adapter.a_RI, adapter.b_OR, scale), strict=True):
            yield f"{name}.{kind}.{adapter.name}", tensor


def adapters_alone(weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Of what `apart` gives for all weights, the adapters."""
    return ((name, tensor) for name, tensor in weights if _kind(name) is not None)


@dataclass
class BesideBase:
    """Weights and adapters apart, as they came, in main memory. `key`: of the trainer whose they are. `complete`: the
    last of them arrived, too."""

    key: str
    complete: bool = False
    _base: dict[str, Tensor] = field(default_factory=dict)
    _adapters: dict[str, Tensor] = field(default_factory=dict)

    def take(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """All weights at first, later their adapters alone. They are copied: a file that they came in may go."""
        self.complete = False
        for name, tensor in weights:
            held = self._base if _kind(name) is None else self._adapters
            held[name] = tensor.detach().to("cpu", copy=True)
        self.complete = True

    def folded(self, device: torch.device) -> Iterator[tuple[str, Tensor]]:
        """Whole weights, one at a time."""
        adapters = self._by_weight(device)
        for name, weight in self._base.items():
            yield name, folded(weight.to(device), adapters.get(name, ()))

    def fingerprint(self) -> str:
        """Of all that is held, at the precision that adapters are trained in."""
        return weights_fingerprint([*self._base.items(), *self._adapters.items()])

    def _by_weight(self, device: torch.device) -> dict[str, list[Adapter]]:
        found: dict[str, list[Adapter]] = {}
        for full in [name for name in self._adapters if _kind(name) == KINDS[0]]:
            weight, name = full.split(f".{KINDS[0]}.")
            a_RI, b_OR, scale = (self._adapters[f"{weight}.{kind}.{name}"].to(device) for kind in KINDS)
            found.setdefault(weight, []).append(Adapter(name, a_RI, b_OR, scale.item()))
        return found


def _kind(name: str) -> str | None:
    """Which part of an adapter has this name; None for a weight."""
    return next((kind for kind in KINDS if f".{kind}." in name), None)
