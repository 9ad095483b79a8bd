"""Cosines and variances of gradients that are themselves drawn: what noise adds to a squared length is taken out.

Shapes: W weights.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Draws:
    """Gradients of one estimate on one set of rollouts, each under noise of its own, kept as sums. A single one is
    taken for an estimate that draws nothing."""

    count: int = 0
    squares: float = 0.0
    total_W: Tensor = field(default_factory=lambda: torch.zeros(()))

    def add(self, gradient_W: Tensor) -> None:
        self.count += 1
        self.squares += dot(gradient_W, gradient_W)
        self.total_W = self.total_W + gradient_W

    @property
    def mean_W(self) -> Tensor:
        return self.total_W / self.count

    @property
    def squared_length(self) -> float:
        """Of the expected gradient, without bias: the mean product of two different draws."""
        if self.count == 1:
            return self.squares
        return (dot(self.total_W, self.total_W) - self.squares) / (self.count * (self.count - 1))

    @property
    def variance(self) -> float:
        """E |g - E g|^2 of one draw, without bias."""
        if self.count == 1:
            return 0.0
        return (self.squares - dot(self.total_W, self.total_W) / self.count) / (self.count - 1)


@dataclass
class Against:
    """Cosine with a reference, over sets of rollouts as if their gradients stood one after the other in one vector."""

    product: float = 0.0
    squared_length: float = 0.0
    reference: float = 0.0

    def add(self, product: float, squared_length: float, reference: float) -> None:
        self.product += product
        self.squared_length += squared_length
        self.reference += reference

    @property
    def cosine(self) -> float | None:
        """None where noise leaves no length to divide by."""
        if self.squared_length <= 0 or self.reference <= 0:
            return None
        return self.product / (self.squared_length * self.reference) ** 0.5


def dot(one_W: Tensor, other_W: Tensor) -> float:
    return float(torch.dot(one_W.double(), other_W.double()))
