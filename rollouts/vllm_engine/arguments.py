"""What a request to vLLM must carry, as plain data."""

from collections.abc import Mapping
from typing import Any

from rollouts.law import Law


def row_arguments(
    sample: str, stream: str, law: Law, forced: Mapping[int, int], seed: int, length: int, wave: tuple[str, int]
) -> dict[str, Any]:
    """A row of `sample`: its stream, the law it is drawn from, the tokens forced on it (position -> token), its seed,
    its length, and the wave it starts with (name, rows in it). JSON, so a 64-bit seed is a string."""
    return {
        "sample": sample, "stream": stream, "law": law.to_dict(), "forced": sorted(forced.items()), "seed": str(seed),
        "length": length, "wave": list(wave),
    }  # fmt: skip
