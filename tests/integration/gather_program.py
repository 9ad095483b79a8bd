"""What two processes tell each other: `FOLDER`, for the log. Fails where one of them finds something wrong."""

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlmm.codecs.together import of_all
from rlmm.train.launch import processes
from rlmm.train.processes import OtherProcessError, everywhere, gather, gather_arrays, in_first
from tests.integration.forked import fork_group

VALUES: list[tuple[Any, Any]] = [
    (None, True),
    ([], {}),
    ("", "x" * 100_000),
    ("Übermut \N{GRINNING FACE} \ud800 \0 \"'", ["long", {"a": [1, None, -7]}]),
    ([0.1, -0.0, 5e-324, 1.7976931348623157e308], [math.pi, 1 / 3]),
    ([math.inf, -math.inf, math.nan], 2**80),
]
"""Of the first process and of the second."""
ARRAYS = [
    (np.array([-0.0, math.nan, 1 / 3]), np.array([math.inf])),
    (np.zeros((0, 3), bool), np.array([[True, False, True]])),
    (np.arange(6).reshape(2, 3), np.arange(600).reshape(200, 3)[:, ::-1]),
]


def alike(found: Any, told: Any) -> bool:
    """To the sign of a zero, with one NaN like another, and no float for an int."""
    return repr(found) == repr(told)


def tell(rank: int) -> None:
    with processes(deepspeed=False):
        for pair in VALUES:
            assert alike(gather(pair[rank]), list(pair)), pair
        for pair in ARRAYS:
            found = gather_arrays(pair[rank])
            assert [one.dtype for one in found] == [one.dtype for one in pair]
            assert all(one.shape == other.shape for one, other in zip(found, pair, strict=True))
            assert alike([one.tolist() for one in found], [one.tolist() for one in pair])
        parts = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 5.0])]
        part = parts[rank].clone().requires_grad_()
        found_PD = of_all(part)
        assert found_PD.tolist() == torch.stack(parts).tolist()
        # Each process weighs the other's part by its own number; a part is told the sum.
        ((1 + rank) * found_PD.square()).sum().backward()
        assert part.grad is not None and part.grad.tolist() == (3 * 2 * parts[rank]).tolist()
        assert in_first(lambda: {"rank": rank}) == {"rank": 0}
        assert everywhere(lambda: (rank,)) == (rank,)  # it stays here
        # The second process is told of it, and does not wait for what the first one cannot send.
        with pytest.raises(OtherProcessError if rank else TypeError, match=r"is a pathlib\..*PosixPath"):
            in_first(lambda: Path("x"))


if __name__ == "__main__":
    log = Path(sys.argv[1]) / "log"
    if any(statuses := fork_group(tell, log, count=2)):
        raise SystemExit(f"{statuses}\n{log.read_text()}")
