"""A checkpoint counts only when its manifest verifies.

The manifest lists every file with its size and SHA-256 and is renamed in last, after all ranks have written; a kill
anywhere before leaves a folder without one, which is passed over with a message.
"""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
PREFIX = "checkpoint-"


def file_digest(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def write_json_atomically(path: Path, record: Any) -> None:
    """Write under another name, flush to disk, rename: a reader sees the old file or the new one, never a part."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w") as handle:
        json.dump(record, handle, indent=2)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(partial, path)


def write_manifest(folder: Path) -> None:
    """Seal a folder: from now on it counts as complete."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(MANIFEST))
    record = {str(p.relative_to(folder)): {"size": p.stat().st_size, "sha256": file_digest(p)} for p in files}
    write_json_atomically(folder / MANIFEST, record)


def fault(folder: Path) -> str | None:
    """What is wrong with a sealed folder, or None where every file is as the manifest says."""
    manifest = folder / MANIFEST
    if not manifest.is_file():
        return "it has no manifest: the process stopped while it was being written"
    try:
        record = json.loads(manifest.read_text())
    except json.JSONDecodeError as error:
        return f"its manifest is unreadable ({error})"
    for name, entry in record.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry["size"] or file_digest(path) != entry["sha256"]:
            return f"{name} is not the file that was written"
    return None


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix(PREFIX))


def checkpoints(folder: Path) -> list[Path]:
    """The folder's checkpoints, whole or not, the newest first."""
    found = [p for p in folder.glob(f"{PREFIX}*") if p.is_dir() and p.name.removeprefix(PREFIX).isdigit()]
    return sorted(found, key=step_of, reverse=True)


def latest_checkpoint(folder: Path, say: Callable[[str], None], before: int | None = None) -> Path | None:
    """The newest checkpoint that verifies; each newer one that does not is named through `say`. `before`: of those of
    earlier steps."""
    for candidate in checkpoints(folder):
        if before is not None and step_of(candidate) >= before:
            continue
        problem = fault(candidate)
        if problem is None:
            return candidate
        say(f"passing over {candidate.name}: {problem}")
    return None
