"""Trajectories on disk: one parquet row a sample, with whatever columns (images, rewards, advantages) go beside them.

A file is written under a temporary name and renamed in, so a reader never sees half of one, and its pages have
checksums.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from rollouts.trajectory import SCHEMA_VERSION, Span, Stream, Trajectory

_META = b"rlmm.trajectory"
_TENSORS = {
    "ids": torch.int64,
    "attention_mask": torch.bool,
    "target_mask": torch.bool,
    "modality": torch.int8,
    "step": torch.int32,
    "span": torch.int8,
    "sampler_logp": torch.float64,
    "support": torch.uint8,
    "order_logp": torch.float64,
    "states": torch.int32,
    "proposals": torch.int32,
}


def write_trajectory(path: Path, trajectory: Trajectory, columns: Mapping[str, Sequence[Any]]) -> None:
    """Write a trajectory and extra columns, each with one value a row; dtypes survive the round trip."""
    table: dict[str, Any] = {
        "seed": pa.array(trajectory.seed, pa.uint64()),
        "group_id": list(trajectory.group_id),
        "sample_id": list(trajectory.sample_id),
        "sources": [list(row) for row in trajectory.sources] or [[] for _ in trajectory.seed],
    }
    shapes: dict[str, list[int]] = {}
    for name in _TENSORS:
        value = getattr(trajectory, name)
        if value is not None:
            table[f"trajectory/{name}"], shapes[name] = _rows(value), list(value.shape[1:])
    for name, stream in trajectory.streams.items():
        table[f"stream/{name}/ids"], table[f"stream/{name}/mask"] = _rows(stream.ids_BP), _rows(stream.mask_BP)
        if stream.sees_BS is not None:
            table[f"stream/{name}/sees"] = _rows(stream.sees_BS)
    clash = sorted(set(table) & set(columns))
    if clash:
        raise ValueError(f"extra columns {clash} are names the store uses itself; rename them")
    meta = {
        "schema_version": trajectory.schema_version,
        "weights_version": trajectory.weights_version,
        "spans": [span.to_dict() for span in trajectory.spans],
        "shapes": shapes,
        "streams": list(trajectory.streams),
    }
    arrow = pa.table({**table, **{name: list(values) for name, values in columns.items()}})
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    arrow = arrow.replace_schema_metadata({_META: json.dumps(meta).encode()})
    pq.write_table(arrow, partial, compression="zstd", write_page_checksum=True)
    os.replace(partial, path)


def read_trajectory(path: Path) -> tuple[Trajectory, dict[str, list[Any]]]:
    """The trajectory and the extra columns of a file.

    Raises:
        ValueError: the file is no rollout file, is torn, or is of another schema version.
    """
    try:
        arrow = pq.read_table(path, page_checksum_verification=True)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(
            f"{path} is not a readable rollout file ({error}); delete it and start the run that made it again: it goes "
            "back to the last checkpoint before it, and makes the file anew"
        ) from error
    meta = json.loads((arrow.schema.metadata or {}).get(_META, b"{}"))
    if meta.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(
            f"{path} has rollout schema {meta.get('schema_version')}, and this version reads {SCHEMA_VERSION}; "
            "write it again with this version"
        )
    data = arrow.to_pydict()
    tensors: dict[str, Any] = {
        name: _tensor(data.pop(f"trajectory/{name}"), shape, name) for name, shape in meta["shapes"].items()
    }
    streams = {name: _stream(data, f"stream/{name}") for name in meta["streams"]}
    trajectory = Trajectory(
        **tensors,
        spans=tuple(Span.from_dict(span) for span in meta["spans"]),
        streams=streams,
        seed=tuple(data.pop("seed")),
        group_id=tuple(data.pop("group_id")),
        sample_id=tuple(data.pop("sample_id")),
        sources=tuple(tuple(row) for row in data.pop("sources")),
        weights_version=meta["weights_version"],
    )
    return trajectory, data


def _stream(data: dict[str, list[Any]], name: str) -> Stream:
    ids, mask, sees = (data.pop(f"{name}/{part}", None) for part in ("ids", "mask", "sees"))
    seen = None if sees is None else torch.tensor(sees, dtype=torch.bool)
    return Stream(torch.tensor(ids, dtype=torch.int64), torch.tensor(mask, dtype=torch.bool), seen)


def _rows(value: Tensor) -> list[Any]:
    return list(value.detach().cpu().flatten(1).numpy())


def _tensor(rows: list[Any], shape: list[int], name: str) -> Tensor:
    flat = torch.from_numpy(np.asarray(rows)).to(_TENSORS[name])
    return flat.reshape(len(rows), *shape)
