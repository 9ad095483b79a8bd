"""`rlmm bench step`: one GRPO update by rlmm against TRL's GRPOTrainer on the same tokens: seconds and peak memory.

Each measurement is a process of its own, and the sides take turns over the repeats. On a machine that others use,
processor time is the steadier figure.
"""

import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from rlmm.bench.machine import write_json
from rlmm.bench.step_problem import Side, StepProblem
from rlmm.config.base import nearest
from rlmm.memory import readable
from rlmm.run_folder import environment

PROBLEMS = {
    "small": StepProblem("small", vocabulary=1024, codes=512),
    "emu3": StepProblem("emu3", vocabulary=184_622, codes=32_768),
}
"""At Emu3's vocabulary (184 622 ids, 32 768 of them image codes) embedding and head alone have 189M weights."""

SIDES = tuple(
    Side(framework, lora=lora, checkpointing=checkpointing)
    for lora in (False, True)
    for checkpointing in (False, True)
    for framework in ("rlmm", "trl")
)
"""TRL checkpoints unless told otherwise, rlmm does not: ratios are between equals."""


@dataclass(frozen=True)
class StepPlan:
    """What is measured: `repeats` processes a side, each of `steps` updates of which the first is not counted."""

    problems: tuple[StepProblem, ...]
    sides: tuple[Side, ...] = SIDES
    repeats: int = 3
    steps: int = 3
    threads: int = 1


@dataclass(frozen=True)
class Measured:
    """Medians over all counted steps (seconds) and over processes (bytes above the loaded trainer)."""

    problem: str
    side: Side
    seconds: float
    cpu_seconds: float
    peak: float
    baseline: float


def step_plan(
    names: Sequence[str],
    prompts: int,
    tokens: int,
    *,
    lora: bool = True,
    checkpointed: bool,
    steps: int,
    repeats: int,
    threads: int,
) -> StepPlan:
    """A plan over named problems of the given sizes. Raises ValueError where a name is unknown."""
    unknown = [name for name in names if name not in PROBLEMS]
    if unknown:
        raise ValueError(f"unknown problem {unknown[0]!r}.{nearest(unknown[0], list(PROBLEMS))}")
    problems = tuple(replace(PROBLEMS[name], prompts=prompts, image_tokens=tokens) for name in names)
    sides = tuple(side for side in SIDES if (checkpointed or not side.checkpointing) and (lora or not side.lora))
    return StepPlan(problems, sides, repeats=repeats, steps=steps, threads=threads)


def bench_step(plan: StepPlan, json_file: Path | None) -> list[Measured]:
    """Measure, show, and write the report where a file is given."""
    console = Console()
    measured = measure(plan, lambda line: console.print(line, highlight=False))
    for problem in plan.problems:
        console.print(table(problem, [one for one in measured if one.problem == problem.name]))
    if json_file is not None:
        write_json(json_file, report(plan, measured))
    return measured


def measure(plan: StepPlan, say: Callable[[str], None]) -> list[Measured]:
    """Every side of every problem. Raises RuntimeError with the process's last words where one fails."""
    if plan.steps < 2 or plan.repeats < 1:
        raise ValueError(
            f"steps {plan.steps}, repeats {plan.repeats}: the first step of a process makes the optimizer's state and "
            "is not counted, so steps must be at least 2 and repeats at least 1"
        )
    measured = []
    for problem in plan.problems:
        made: dict[Side, list[dict[str, Any]]] = {side: [] for side in plan.sides}
        for repeat in range(plan.repeats):
            for side in plan.sides:
                made[side].append(run_child(side, problem, plan))
                say(f"{problem.name}, repeat {repeat + 1} of {plan.repeats}, {side.name}: {_last(made[side])}")
        measured += [summary(problem, side, runs) for side, runs in made.items()]
    return measured


def summary(problem: StepProblem, side: Side, runs: Sequence[dict[str, Any]]) -> Measured:
    """The medians of a side's processes; the first step of each is left out."""
    return Measured(
        problem=problem.name,
        side=side,
        seconds=median(value for run in runs for value in run["seconds"][1:]),
        cpu_seconds=median(value for run in runs for value in run["cpu_seconds"][1:]),
        peak=median(run["peak"] for run in runs),
        baseline=median(run["baseline"] for run in runs),
    )


def run_child(side: Side, problem: StepProblem, plan: StepPlan) -> dict[str, Any]:
    """One process: seconds and processor seconds of its steps, bytes of its peak above its baseline."""
    order = {"side": asdict(side), "problem": asdict(problem), "steps": plan.steps, "threads": plan.threads}
    with tempfile.TemporaryDirectory() as folder:
        asked, answer = Path(folder) / "order.json", Path(folder) / "result.json"
        asked.write_text(json.dumps(order))
        done = subprocess.run(
            [sys.executable, "-m", "rlmm.bench.step_child", str(asked), str(answer)],
            env=os.environ
            | {"OMP_NUM_THREADS": str(plan.threads), "HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise RuntimeError(f"{side.name} at {problem.name} failed (exit {done.returncode}):\n{done.stderr[-2000:]}")
        return json.loads(answer.read_text())


def ratios(measured: Sequence[Measured]) -> list[dict[str, Any]]:
    """rlmm / TRL of each pair of sides that train the same weights in the same way; below 1 rlmm needs less."""
    by_side = {(one.problem, one.side): one for one in measured}
    found = []
    for one in measured:
        other = by_side.get((one.problem, replace(one.side, framework="trl")))
        if one.side.framework == "rlmm" and other is not None:
            found.append(
                {
                    "problem": one.problem,
                    "lora": one.side.lora,
                    "checkpointing": one.side.checkpointing,
                    "seconds": one.seconds / other.seconds,
                    "cpu_seconds": one.cpu_seconds / other.cpu_seconds,
                    "peak": one.peak / other.peak,
                }
            )
    return found


def report(plan: StepPlan, measured: Sequence[Measured]) -> dict[str, Any]:
    """Settings, machine, versions, medians and ratios, as JSON takes them."""
    return {
        "settings": asdict(plan),
        "environment": environment() | {"processor": processor(), "cores": os.cpu_count()},
        "measured": [asdict(one) | {"name": one.side.name} for one in measured],
        "ratios": ratios(measured),
    }


def processor() -> str:
    """What runs the update: the GPU where torch sees one, else the processor."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*:\s*(.*)$", cpuinfo.read_text() if cpuinfo.exists() else "", re.MULTILINE)
    return names[0] if names else platform.processor()


def table(problem: StepProblem, measured: Sequence[Measured]) -> Table:
    """One line a side, with rlmm's ratios to TRL beside rlmm's lines."""
    title = (
        f"One GRPO update, {problem.rows} x {problem.image_tokens} image tokens, {problem.vocabulary} ids, "
        f"{problem.codes} of them image codes"
    )
    shown = Table(title=title)
    for column in ("side", "seconds", "processor seconds", "peak memory", "time / TRL", "memory / TRL"):
        shown.add_column(column, justify="left" if column == "side" else "right")
    beside = {(row["lora"], row["checkpointing"]): row for row in ratios(measured)}
    for one in measured:
        row = beside.get((one.side.lora, one.side.checkpointing)) if one.side.framework == "rlmm" else None
        compared = ("", "") if row is None else (f"{row['cpu_seconds']:.2f}", f"{row['peak']:.2f}")
        shown.add_row(one.side.name, f"{one.seconds:.2f}", f"{one.cpu_seconds:.2f}", readable(int(one.peak)), *compared)
    return shown


def _last(runs: Sequence[dict[str, Any]]) -> str:
    run = runs[-1]
    return f"{median(run['seconds'][1:]):.2f} s, {readable(int(run['peak']))}"
