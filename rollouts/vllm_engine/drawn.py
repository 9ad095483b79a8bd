"""What an engine drew for one sample, and the same as plain data for a wire."""

import base64
from dataclasses import dataclass
from typing import Any

import numpy as np

KEY = "rollouts"
"""The entry of vLLM's `extra_args` that holds what a row must carry (`arguments.row_arguments`)."""


@dataclass
class Drawn:
    """Tokens [S] int64, log-probs [S] float64, support [S, bytes] uint8 or None; what went wrong, if anything did."""

    tokens_S: np.ndarray
    logp_S: np.ndarray
    support: np.ndarray | None
    fault: str | None = None

    def to_wire(self) -> dict[str, Any]:
        """JSON; arrays in base64."""
        return {
            "tokens": _packed(self.tokens_S),
            "logp": _packed(self.logp_S),
            "support": None if self.support is None else _packed(self.support),
            "fault": self.fault,
        }

    @staticmethod
    def from_wire(record: dict[str, Any]) -> "Drawn":
        tokens_S = _unpacked(record["tokens"], np.int64)
        support = None if record["support"] is None else _unpacked(record["support"], np.uint8)
        return Drawn(
            tokens_S,
            _unpacked(record["logp"], np.float64),
            None if support is None else support.reshape(len(tokens_S), -1),
            record["fault"],
        )


def _packed(values: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(values).tobytes()).decode()


def _unpacked(text: str, dtype: type[np.generic]) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype=dtype).copy()
