"""A cheap digest of a model's weights, equal on both sides of a weight sync."""

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor


def weights_fingerprint(weights: Iterable[tuple[str, Tensor]], dtype: torch.dtype = torch.float32) -> str:
    """Digest of (name, shape, sum, sum of magnitudes, alternating sum) of each tensor, in float64, by sorted name.

    Tensors are rounded to `dtype` first: the one an engine holds them in. It reads each weight once and holds one at a
    time. It is made to catch a stale or half-taken sync, not an adversary.
    """
    lines = sorted(_line(name, weight.to(dtype)) for name, weight in weights)
    return hashlib.blake2b("\n".join(lines).encode(), digest_size=16).hexdigest()


def _line(name: str, weight: Tensor) -> str:
    flat = weight.detach().reshape(-1).to(torch.float64)
    figures = (flat.sum(), flat.abs().sum(), flat[::2].sum() - flat[1::2].sum())
    return f"{name} {tuple(weight.shape)} " + " ".join(float(figure).hex() for figure in figures)
