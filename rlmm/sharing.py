"""What each of several processes holds of an update, plain data parallel or under DeepSpeed's ZeRO.

The shares are those of ZeRO (Rajbhandari et al. 2020, figure 1), with what DeepSpeed's own optimizer holds beside them:
a flat copy of the trained weights, gradients laid flat for a step, and buckets that gradients are summed in.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rlmm.dry_run import Held

BUCKET = 500_000_000
"""DeepSpeed's `reduce_bucket_size` where a file names none."""
LIVE = 1_000_000_000
"""DeepSpeed's `stage3_max_live_parameters` where a file names none."""
FLOAT_BYTES = 4
LIBRARIES = 24 << 20
"""What a process's first update on a CPU was seen to hold beside its tensors, in libraries that it is the first to use
(docs/scale.md). It matters where all else is tens of MiB."""


@dataclass(frozen=True)
class Sharing:
    """Among how many processes, and how. zero: ZeRO's stage; 0 is plain data parallel, where each holds everything.
    bucket, live: bytes of the buckets, and of the gathered weights at most."""

    processes: int = 1
    zero: int = 0
    bucket: int = 0
    live: int = 0
    offloads_optimizer: bool = False
    offloads_weights: bool = False


@dataclass(frozen=True)
class Share:
    """Bytes of one process. exchange: what passes between the processes. offloaded: of the CPU's memory."""

    weights: int
    gradients: int
    optimizer: int
    working: int
    exchange: int
    offloaded: int


def read_sharing(path: str | None, processes: int, hidden_size: int) -> Sharing:
    """From a DeepSpeed file, or None. `auto` is what transformers fills in from the model's `hidden_size`."""
    if path is None:
        return Sharing(processes)
    zero: dict[str, Any] = json.loads(Path(path).read_text())["zero_optimization"]
    bucket = zero.get("reduce_bucket_size", BUCKET)
    elements = hidden_size**2 if bucket == "auto" else int(bucket)
    return Sharing(
        processes,
        zero["stage"],
        elements * FLOAT_BYTES * (2 if zero.get("overlap_comm") else 1),
        int(zero.get("stage3_max_live_parameters", LIVE)) * FLOAT_BYTES,
        _offloads(zero.get("offload_optimizer")),
        _offloads(zero.get("offload_param")),
    )


def gathered(held: Held, sharing: Sharing) -> int:
    """Bytes of weights in parts that an update has whole at once, at most."""
    return min(held.weights, sharing.live) if sharing.zero == 3 else 0


def _offloads(part: dict[str, Any] | None) -> bool:
    return (part or {}).get("device", "none") != "none"


def libraries() -> int:
    """Bytes beside the tensors of an update, of the memory that is planned: a GPU's where there is one."""
    return 0 if torch.cuda.is_available() else LIBRARIES


def shared(held: Held, sharing: Sharing) -> Share:
    """What one process holds of `held`, which is all of it."""
    trained, each = held.gradients, sharing.processes
    if not sharing.zero:
        # DistributedDataParallel sums gradients in buckets, which are a second copy of them.
        return Share(held.weights, trained, held.optimizer, held.working, trained if each > 1 else 0, 0)
    part = trained // each
    weights = held.weights // each if sharing.zero == 3 else held.weights
    optimizer = held.optimizer // each + part
    gradients = trained if sharing.zero == 1 else part
    if sharing.zero == 2 and held.again:
        gradients = 2 * part  # those of a micro-batch are laid down beside the sum of those before it
    # The part that a process steps with is laid flat beside the one that was summed; ZeRO-3 keeps it flat.
    flat = 0 if sharing.zero == 3 else max(0, 2 * part - gradients)
    passing = max(0, held.passing - trained) if sharing.zero == 1 else held.activations
    offloaded = sharing.offloads_optimizer * (optimizer + part) + sharing.offloads_weights * weights
    return Share(
        weights=0 if sharing.offloads_weights else weights,
        gradients=0 if sharing.offloads_optimizer and sharing.zero > 1 else gradients,
        optimizer=0 if sharing.offloads_optimizer else optimizer,
        working=max(passing, flat),
        exchange=sharing.bucket + gathered(held, sharing),
        offloaded=offloaded,
    )
