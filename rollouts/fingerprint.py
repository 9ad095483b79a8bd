"""A cheap digest of a model's weights, equal on both sides of a weight sync, whatever device each side is on."""

import hashlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

PART = {"cpu": 1 << 18}
"""Numbers looked at in one go, by device: a large matrix is not copied whole, a part stays in a processor's cache."""
LARGE = 1 << 24
"""On other devices."""
BITS = {torch.float32: torch.int32, torch.float64: torch.int64}
STEP = 0x9E3779B97F4A7C15 - (1 << 64)
"""An odd multiplier whose products with a place are spread over all 64 bits (Knuth's, of the golden ratio)."""


def weights_fingerprint(weights: Iterable[tuple[str, Tensor]], dtype: torch.dtype = torch.float32) -> str:
    """Digest of (name, shape, sum of bits, sum of bits times place) of each tensor, by sorted name.

    Tensors are rounded to `dtype` first, the one an engine holds them in, and looked at in float32 (or float64), which
    holds what bfloat16 does. Sums are of integers modulo 2^64, so that no device and no number of threads, each of
    which adds in an order of its own, gives another. It reads each weight once and holds one at a time. It is made to
    catch a stale or half-taken sync, not an adversary.
    """
    lines = sorted(_line(name, weight.to(dtype)) for name, weight in weights)
    return hashlib.blake2b("\n".join(lines).encode(), digest_size=16).hexdigest()


def _line(name: str, weight: Tensor) -> str:
    size = min(PART.get(weight.device.type, LARGE), weight.numel())
    factor_N = torch.arange(1, 1 + size, device=weight.device) * STEP
    total, placed = 0, 0
    for start, bits_N in _bits(weight.detach().reshape(-1), size):
        part = int(bits_N.sum())
        total += part
        placed += int(bits_N.mul_(factor_N[: len(bits_N)]).sum()) + part * start * STEP
    return f"{name} {tuple(weight.shape)} {total % (1 << 64):x} {placed % (1 << 64):x}"


def _bits(flat: Tensor, size: int) -> Iterator[tuple[int, Tensor]]:
    """Where each part starts, and its numbers' bits (int64). Zeros of either sign and what is too small for a full
    mantissa are one zero: some kernels that weights are read back through make it so."""
    wide = torch.promote_types(flat.dtype, torch.float32)
    smallest = torch.finfo(wide).tiny
    for start in range(0, len(flat), size or 1):
        part = flat[start : start + size].to(wide)
        part = part.masked_fill(part.abs() < smallest, 0)
        yield start, part.view(BITS[wide]).to(torch.int64)
