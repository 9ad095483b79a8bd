"""Reads a run folder into typed records. Nothing here draws.

A report may be asked for while the run is going, so a part that is missing is simply absent, and a part that
cannot be read (a torn last line, a broken row) is left out, counted and named in `Notes`, which the page
shows.
"""

import json
import math
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from rlmm.report.records import (
    BestOf,
    Contrast,
    Curve,
    Diversity,
    EvalRow,
    Evaluation,
    Notes,
    Record,
    Run,
    Stage,
    Understood,
)

RecordT = TypeVar("RecordT", bound=Record)


def read_run(folder: Path) -> Run:
    """Reads a run folder. Raises `FileNotFoundError` where there is none; what is broken inside becomes a
    note.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder. Give a run folder, such as runs/quickstart.")
    if not (folder / "config.yaml").exists() and not (folder / "stages").is_dir():
        found = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        raise FileNotFoundError(
            f"{folder} is not a run folder: it has neither config.yaml nor stages/ (found: {found}). "
            "Give the folder that `rlmm run` writes, such as runs/quickstart."
        )
    notes = Notes()
    text, config = _read_config(folder / "config.yaml", notes)
    stage_folders = sorted(path for path in folder.glob("stages/*") if path.is_dir())
    stages = tuple(_read_stage(path, config, notes) for path in stage_folders)
    return Run(folder, config, text, _read_json(folder / "environment.json", notes), stages, notes)


def read_metrics(path: Path, notes: Notes) -> dict[str, Curve]:
    """Reads metrics.jsonl to one curve a key. Lines of one step are merged, a later value replacing an
    earlier one.

    A last line without its newline is taken for a line being written: counted and left out, like any other
    line that is not a JSON object with an integer step.
    """
    if not path.exists():
        return {}
    text = path.read_text(encoding="utf-8", errors="replace")
    points: dict[str, dict[int, float]] = {}
    broken: list[int] = []
    lines = text.split("\n")
    for number, line in enumerate(lines, start=1):
        if line.strip() and not _add_line(line, points):
            broken.append(number)
    if broken and broken[-1] == len(lines):
        notes.add(f"{_short(path)}: the last line is torn (it was being written); 1 line left out.")
        broken.pop()
    if broken:
        listed = ", ".join(map(str, broken[:5]))
        notes.add(f"{_short(path)}: {len(broken)} line(s) left out, not an object with a step: {listed}.")
    return {key: Curve(*zip(*sorted(values.items()), strict=True)) for key, values in points.items()}


def _add_line(line: str, points: dict[str, dict[int, float]]) -> bool:
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return False
    if not isinstance(record, dict) or not isinstance(record.get("step"), int):
        return False
    for key, value in record.items():
        if key != "step" and isinstance(value, int | float):
            points.setdefault(key, {})[record["step"]] = float(value) if math.isfinite(value) else math.nan
    return True


def _read_stage(folder: Path, config: Mapping[str, Any] | None, notes: Notes) -> Stage:
    info = _read_json(folder / "stage.json", notes) or {}
    plain_name = re.sub(r"^\d+-", "", folder.name)
    name = str(info.get("name", plain_name))
    return Stage(
        folder=folder,
        name=name,
        kind=str(info.get("kind", plain_name)),
        status=str(info.get("status", "running")),
        started=_moment(info.get("started"), folder, notes),
        finished=_moment(info.get("finished"), folder, notes),
        curves=read_metrics(folder / "metrics.jsonl", notes),
        gates=_gates(info, config, name),
        evaluation=_read_evaluation(folder / "eval.json", notes),
        samples=_if_there(folder / "samples.parquet"),
        answers=_if_there(folder / "answers.parquet"),
        reference=_if_there(folder / "reference.parquet"),
        rollouts=tuple(sorted(folder.glob("rollouts/*.parquet"))),
        reconstruction=_if_there(folder / "reconstruction.png") or _if_there(folder / "margins.png"),
    )


_GATED = {
    "mismatch_mean": "mismatch/mean",
    "mismatch_max": "mismatch/max",
    "flat_share": "group/flat_share",
    "unavailable_share": "sample/unavailable_share",
    "duplicate_share": "sample/duplicate_share",
}
"""The gates of a stage's config -> the metrics that they bound."""


def _gates(info: Mapping[str, Any], config: Mapping[str, Any] | None, name: str) -> dict[str, float]:
    """Ceilings by metric: those of the stage's config, replaced by stage.json's `gates` where it has them."""
    configured = config
    for key in ("stages", name, "gates"):
        configured = configured.get(key) if isinstance(configured, Mapping) else None
    found = {_GATED[k]: v for k, v in configured.items() if k in _GATED} if isinstance(configured, dict) else {}
    resolved = info.get("gates")
    found |= resolved if isinstance(resolved, dict) else {}
    return {key: float(value) for key, value in found.items() if isinstance(value, int | float)}


def _read_evaluation(path: Path, notes: Notes) -> Evaluation | None:
    content = _read_json(path, notes)
    if content is None:
        return None
    return Evaluation(
        rows=_records(content, "rows", EvalRow, path, notes),
        contrasts=_records(content, "contrasts", Contrast, path, notes),
        diversity=_records(content, "diversity", Diversity, path, notes),
        understood=_records(content, "understanding", Understood, path, notes),
        best_of=_records(content, "best_of", BestOf, path, notes),
        compute_notes=tuple(str(line) for line in content.get("compute_notes", [])),
    )


def _records(
    content: Mapping[str, Any], key: str, kind: type[RecordT], path: Path, notes: Notes
) -> tuple[RecordT, ...]:
    kept: list[RecordT] = []
    entries = content.get(key) or []
    for number, entry in enumerate(entries if isinstance(entries, list) else [entries]):
        try:
            kept.append(kind.model_validate(entry))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the entry itself"
            notes.add(f"{_short(path)}: {key}[{number}] left out: {where}: {first['msg']}.")
    return tuple(kept)


def _read_config(path: Path, notes: Notes) -> tuple[str | None, Mapping[str, Any] | None]:
    if not path.exists():
        return None, None
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError as error:
        notes.add(f"{_short(path)} is not YAML, so the batch equation is left out: {error}")
        return text, None
    return text, config if isinstance(config, dict) else None


def _read_json(path: Path, notes: Notes) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except json.JSONDecodeError as error:
        notes.add(f"{_short(path)} is not JSON and is left out: {error}.")
        return None
    if not isinstance(content, dict):
        notes.add(f"{_short(path)} holds a {type(content).__name__}, not an object, and is left out.")
        return None
    return content


def _moment(value: Any, folder: Path, notes: Notes) -> datetime | None:
    """A moment in UTC from seconds since 1970 or an ISO 8601 text (one without an offset is taken as UTC)."""
    if value is None:
        return None
    try:
        if isinstance(value, int | float):
            return datetime.fromtimestamp(value, UTC)
        moment = datetime.fromisoformat(str(value))
    except (ValueError, OverflowError, OSError):
        notes.add(f"{_short(folder)}/stage.json: {value!r} is neither seconds since 1970 nor an ISO 8601 time.")
        return None
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)


def _if_there(path: Path) -> Path | None:
    return path if path.exists() else None


def _short(path: Path) -> str:
    return "/".join(path.parts[-3:])
