"""Rows of a run's parquet files."""

import math
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from rlmm.report.records import Notes

Row = dict[str, Any]


def read_rows(
    path: Path, needed: tuple[str, ...], optional: tuple[str, ...], prefixes: tuple[str, ...], notes: Notes
) -> list[Row]:
    """Rows of a parquet file with only the columns asked for; a file that cannot be used is a note and no
    rows.
    """
    where = "/".join(path.parts[-3:])
    try:
        file = pyarrow.parquet.ParquetFile(path)
        there = file.schema_arrow.names
        missing = [name for name in needed if name not in there]
        if missing:
            notes.add(f"{where} left out: no column {', '.join(missing)} (it has {', '.join(there)}).")
            return []
        wanted = [name for name in there if name in (*needed, *optional) or name.startswith(prefixes)]
        return file.read(columns=wanted).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        notes.add(f"{where} is not a readable parquet file and is left out: {error}.")
        return []


def number(value: Any) -> float | None:
    """A finite number, or None."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def text(value: Any) -> str | None:
    """A text that is not empty, or None."""
    return str(value) if value not in (None, "") else None
