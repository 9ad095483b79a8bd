"""`rlmm run` of a tiny recipe, killed at moments drawn from a fixed seed and started again."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).parents[2]
RUNS, KILLS = 2, 4


@dataclass(frozen=True)
class Case:
    recipe: Path
    processes: int
    settings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Whole:
    """The run that was left alone: digests of what it left, what it said and when, and when it ended.

    Seconds since its first word: imports, which touch nothing, are behind it then.
    """

    case: Case
    files: dict[str, str]
    said: list[tuple[str, float]]
    seconds: float


@dataclass(frozen=True)
class Moment:
    """Some seconds after the command says a line."""

    line: str
    delay: float


class Command:
    """`rlmm run` of a tiny recipe as a process of its own, and the lines it says."""

    def __init__(self, folder: Path, case: Case) -> None:
        self.folder, self.log = folder, folder.with_suffix(".log")
        self.log.touch()
        self.read, self.rest = self.log.stat().st_size, ""
        with self.log.open("ab") as handle:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "rlmm.cli",
                    "run",
                    str(case.recipe),
                    f"run_dir={folder}",
                    "runtime.trackers=[]",
                    *case.settings,
                    *(["--nproc", str(case.processes)] if case.processes > 1 else []),
                ],
                cwd=ROOT,
                stdout=handle,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"},
                start_new_session=True,
            )

    def lines(self) -> Iterator[str]:
        """Every line when it is said, without the figures that follow a step's number, until the process ends."""
        ended = False
        while not ended:
            ended = self.process.poll() is not None
            with self.log.open() as handle:
                handle.seek(self.read)
                *whole, self.rest = (self.rest + handle.read()).split("\n")
                self.read = handle.tell()
            for line in whole:
                yield line.split("  ")[0].replace(str(self.folder), "")
            time.sleep(0.002)

    def finish(self) -> tuple[list[tuple[str, float]], float]:
        """What it says until it ends and when, from its first word on, and when that was."""
        said = [(line, time.monotonic()) for line in self.lines()]
        now = time.monotonic()
        assert self.process.returncode == 0, self.log.read_text()[-6000:]
        return [(line, at - said[0][1]) for line, at in said], now - said[0][1]

    def kill_at(self, moment: Moment) -> str | None:
        """Where the kill found it; None where it ended without having come there."""
        if any(line == moment.line for line in self.lines()):
            time.sleep(moment.delay)
        ended = self.process.poll()
        if ended is None:
            kill_all(self.process.pid)
        code = self.process.wait()
        assert code in (0, -signal.SIGKILL), self.log.read_text()[-6000:]
        return f"{moment.delay:.2f} s after {moment.line!r}: {progress(self.folder)}" if ended is None else None


def children(process: int, sessions: bool = False) -> list[int]:
    """The processes that a process has started, or those of them that lead a session of their own (servers)."""
    found = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [child for child in map(int, found) if not sessions or os.getsid(child) == child]


def kill_all(process: int) -> None:
    """A process and all that it started, the launcher first, so that it starts or ends no other."""
    started = children(process)
    os.kill(process, signal.SIGKILL)
    for child in started:
        with suppress(FileNotFoundError, ProcessLookupError):
            kill_all(child)


def progress(folder: Path) -> str:
    """The newest stage with a record, its state, its lines of metrics and the newest file."""
    stages = sorted(folder.glob("stages/*/stage.json"))
    if not stages:
        return "before the first stage"
    stage = stages[-1].parent
    metrics = stage / "metrics.jsonl"
    lines = len(metrics.read_text().splitlines()) if metrics.is_file() else 0
    newest = max((path for path in folder.rglob("*")), key=lambda path: path.stat().st_mtime_ns)
    status = json.loads(stages[-1].read_text())["status"]
    return f"{stage.name} {status}, {lines} steps, last file {newest.relative_to(folder)}"


def stored(path: Path) -> bytes:
    """What a rollout file holds, but for the seconds that it took."""
    table = pq.read_table(path)
    kept = table.drop_columns([name for name in table.column_names if name.startswith("time/")])
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, kept.schema) as writer:
        writer.write_table(kept.combine_chunks())
    return sink.getvalue().to_pybytes()


def moments(run: int, whole: Whole) -> list[Moment]:
    """Four moments of a run: each somewhere between two lines of its own eighth of what the command says."""
    chance, found = random.Random(f"kills of run {run}"), []
    times = [said for _, said in whole.said] + [whole.seconds]
    # A resumed run would not say the same seconds again.
    lines = [i for i, (line, _) in enumerate(whole.said) if not line.endswith(" s")]
    for part in range(KILLS):
        place = lines[int(len(lines) * (run + RUNS * part + chance.random()) / (RUNS * KILLS))]
        found.append(Moment(whole.said[place][0], chance.random() * (times[place + 1] - times[place])))
    return found
