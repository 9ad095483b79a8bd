"""How far the gradients of a step's two halves agree, read from the accumulated gradient before it is clipped.

g1 and g2 are the gradients of the first and the second half of a step's micro-batches, each over all processes; g1 + g2
is the step's. Of independent halves <g1, g2> is on average what their means share, and |g1 - g2|^2 what they do not:

    agreement        <g1, g2> / (|g1| |g2|)
    signal_to_noise  4 <g1, g2> / |g1 - g2|^2, an estimate of |E g|^2 / E |g - E g|^2 for g = g1 + g2

which is McCandlish et al. 2018 (arXiv 1812.06162), equation A.1 with the two halves as the small batches: a step of B
independent parts over its signal-to-noise is their gradient noise scale. One step says little; take means.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from rlmm.train.processes import average


class GradientAgreement:
    """Of the parameters that are trained; costs a copy of their gradient.

    Raises ValueError where a process has an odd number of micro-batches a step.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], micro_batches: int) -> None:
        if micro_batches % 2:
            raise ValueError(
                f"diagnostics.gradient_agreement compares two halves of a step, and a process has {micro_batches} "
                "micro-batches a step, which are not two halves; choose micro_batch_size so that they are even in "
                "number, or switch it off"
            )
        self.parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self.micro_batches, self.seen = micro_batches, 0
        self.first: list[Tensor] = []

    def after_backward(self) -> dict[str, float]:
        """To be called after every micro-batch, and the last one's reduction over processes: the two figures after the
        last, nothing before. Nothing where a half has no gradient, and no signal_to_noise of halves that are equal."""
        self.seen += 1
        if self.seen == self.micro_batches // 2:
            self._keep()
        if self.seen < self.micro_batches:
            return {}
        self.seen = 0
        return self._compare()

    def _keep(self) -> None:
        """The first half's gradient, over all processes: theirs is not reduced until the last micro-batch."""
        kept = torch.cat([_gradient(parameter).flatten() for parameter in self.parameters])
        self.first = list(average(kept).split([parameter.numel() for parameter in self.parameters]))

    def _compare(self) -> dict[str, float]:
        products = torch.stack([_products(p, first) for p, first in zip(self.parameters, self.first, strict=True)])
        self.first = []
        one, both, other, apart = products.double().sum(0).tolist()
        if one == 0 or other == 0:
            return {}
        figures = {"gradient/agreement": both / (one * other) ** 0.5}
        return figures | ({"gradient/signal_to_noise": 4 * both / apart} if apart else {})


def _gradient(parameter: nn.Parameter) -> Tensor:
    """In float32 at least; zeros where there is none."""
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    return torch.zeros_like(parameter, dtype=dtype) if parameter.grad is None else parameter.grad.to(dtype)


def _products(parameter: nn.Parameter, first_N: Tensor) -> Tensor:
    """<g1, g1>, <g1, g2>, <g2, g2> and |g1 - g2|^2 [4] of one parameter, whose gradient is now g1 + g2."""
    second_N = _gradient(parameter).flatten() - first_N
    apart_N = first_N - second_N
    pairs = ((first_N, first_N), (first_N, second_N), (second_N, second_N), (apart_N, apart_N))
    return torch.stack([torch.dot(one, other) for one, other in pairs])
