"""What a request to vLLM must carry, as plain data."""

from collections.abc import Mapping, Sequence
from typing import Any

from rollouts.law import Law


def row_arguments(
    sample: str,
    streams: Sequence[str],
    law: Law,
    forced: Mapping[int, int],
    seed: int,
    length: int,
    wave: tuple[str, int] | None,
) -> dict[str, Any]:
    """A row of `sample`: the streams it carries, the law it is drawn from, the tokens forced on it (position -> token),
    its seed, its length, and the wave it starts with (name, rows in it), if it must. JSON, so a 64-bit seed is text."""
    return {
        "sample": sample, "streams": list(streams), "law": law.to_dict(), "forced": sorted(forced.items()),
        "seed": str(seed), "length": length, "wave": wave and list(wave),
    }  # fmt: skip
