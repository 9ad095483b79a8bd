"""Random draws from counters: a draw is a function of what it is for, never of what was drawn before it.

A resumed run, or one with another number of processes, therefore draws the same.
"""

import hashlib

import numpy as np


def derive(*parts: int | str) -> int:
    """A 63-bit seed from a tuple of names and counters, e.g. derive(seed, "rollout", step, row, sample)."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(*parts: int | str) -> np.random.Generator:
    """A numpy generator seeded by `derive(*parts)`."""
    return np.random.Generator(np.random.Philox(key=derive(*parts)))


def epoch_indices(size: int, first: int, count: int, *parts: int | str) -> list[int]:
    """`count` row indices from position `first` of an endless pass over `size` rows, reshuffled each epoch.

    Raises ValueError where there are no rows to pass over.
    """
    if size < 1:
        raise ValueError("no rows to draw from: every row was excluded or the split is empty; look at the data report")
    picked: list[int] = []
    orders: dict[int, np.ndarray] = {}
    for position in range(first, first + count):
        epoch, place = divmod(position, size)
        if epoch not in orders:
            orders[epoch] = generator(*parts, "epoch", epoch).permutation(size)
        picked.append(int(orders[epoch][place]))
    return picked
