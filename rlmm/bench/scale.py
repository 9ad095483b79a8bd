"""`rlmm bench scale`: how a rollout and an update grow with rows, image tokens, the model and processes.

One axis is changed at a time, from a base point; every point is a process of its own (or several, under torchrun).
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, get_args

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from rlmm.allocator import prepare
from rlmm.bench.machine import setting, write_json
from rlmm.bench.rollout_problem import SIZES, known_sizes
from rlmm.bench.scale_plot import NAMES, write_plot
from rlmm.bench.scale_problem import Point, Precision, Rollouts
from rlmm.config.base import nearest
from rlmm.config.policy import CheckpointPolicy
from rlmm.launcher import on_this_machine
from rlmm.memory import readable
from rlmm.policies.families.loading import not_here


@dataclass(frozen=True)
class ScalePlan:
    """`axes`: field of a point -> the values it takes beside the base's own. A point's first of `steps` updates is not
    counted."""

    base: Point
    axes: dict[str, tuple[Any, ...]]
    steps: int = 3
    repeats: int = 1
    threads: int = 1

    def __post_init__(self) -> None:
        if self.steps < 2 or self.repeats < 1:
            raise ValueError(f"steps {self.steps} must be at least 2 (the first is not counted), repeats at least 1")

    def points(self) -> list[Point]:
        """Each once, the base among them. Raises ValueError where one cannot be."""
        found = [self.base]
        for name, values in self.axes.items():
            found += [replace(self.base, **{name: value}) for value in values]
        return list(dict.fromkeys(found))


@dataclass(frozen=True)
class ScaleRow:
    """Medians over repeats and counted updates. Bytes of one process: `peak` that it holds above the loaded policy,
    what is `planned` for it, the whole `weights`, and the peak `after_rollout`, whose freed memory an update of the
    same process has first; None on a GPU. `share`: of a decode step's time, what reading its weights and cache once
    would take at the speed of a copy."""

    point: Point
    parameters: int
    rollout_s: float
    tokens_a_second: float
    share: float
    update_s: float
    trained_tokens_a_second: float
    peak: float
    planned: float
    weights: float
    copied_bytes_a_second: float
    after_rollout: float | None


def scale_plan(lists: Mapping[str, str], fixed: Mapping[str, Any], **settings: int) -> ScalePlan:
    """A plan of comma-separated values a field, the first of each the base's. Raises ValueError where one is no number,
    or a model is neither known nor a checkpoint at hand."""
    values: dict[str, tuple[Any, ...]] = {"model": tuple(lists["model"].split(","))}
    for name in ("rows", "tokens", "processes", "zero"):
        try:
            values[name] = tuple(int(one) for one in lists[name].split(","))
        except ValueError as error:
            raise ValueError(f"--{name} {lists[name]!r} must be whole numbers with commas between them") from error
    for model in values["model"]:
        if model not in SIZES and "/" not in model and not Path(model).exists():
            raise ValueError(f"{model!r} is no size and no folder.{nearest(model, known_sizes())}")
        if model not in SIZES and (absent := not_here(CheckpointPolicy(path=model))) is not None:
            raise ValueError(f"{model!r}: {absent}")
    for name, known in (("precision", Precision), ("weights", Precision), ("engine", Rollouts)):
        if fixed[name] not in get_args(known):
            raise ValueError(f"--{name} {fixed[name]!r}: it is one of {', '.join(get_args(known))}")
    base = Point(**{name: given[0] for name, given in values.items()}, **fixed)
    return ScalePlan(base, {name: given[1:] for name, given in values.items()}, **settings)


def bench_scale(plan: ScalePlan, json_file: Path | None, plot_file: Path | None) -> list[ScaleRow]:
    """Measure, show, and write what is asked for, after every point, so that a kill loses one. Raises ValueError where
    a plot is asked for and nothing grows."""
    if plot_file is not None and not any(values for name, values in plan.axes.items() if name in NAMES):
        raise ValueError(f"a plot shows how cost grows; give one of {', '.join(NAMES)} two values or more")
    console, rows, points = Console(), [], plan.points()
    around = setting(plan.threads)
    bar = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*bar, TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task("scale", total=len(points) * plan.repeats)
        for point in points:
            progress.update(task, description=described(point))
            made = []
            for _ in range(plan.repeats):
                made.append(run_point(point, plan))
                progress.advance(task)
            rows.append(row_of(point, made))
            if json_file is not None:
                figures = {"rows": [asdict(row) for row in rows], "growth": growth(rows, plan)}
                write_json(json_file, {"setting": around, "plan": asdict(plan), **figures})
    console.print(table(rows, plan.threads))
    for line in prepare(torch.cuda.is_available()):  # as each process was
        console.print(line)
    for name, found in growth(rows, plan).items():
        console.print(f"with {NAMES[name]}: " + ", ".join(f"{what} to the power {e:.2f}" for what, e in found.items()))
    if plot_file is not None:
        write_plot([asdict(row) for row in rows], plan.axes, asdict(plan.base), plot_file)
    return rows


def run_point(point: Point, plan: ScalePlan) -> dict[str, Any]:
    """What the point's processes found: one that is timed, and on a CPU one that does nothing but the updates. Raises
    RuntimeError with the last words of one that fails."""
    timed = _child(point, plan, only_memory=False)
    if timed["gpu"]:
        return timed | {"after_rollout": None}
    return timed | {"after_rollout": timed["peak"], "peak": _child(point, plan, only_memory=True)["peak"]}


def _child(point: Point, plan: ScalePlan, *, only_memory: bool) -> dict[str, Any]:
    order = {"point": asdict(point), "steps": plan.steps, "threads": plan.threads, "only_memory": only_memory}
    launched = ["-m", "torch.distributed.run", *on_this_machine(point.processes)]
    with tempfile.TemporaryDirectory() as folder:
        asked, answer = Path(folder) / "order.json", Path(folder) / "result.json"
        asked.write_text(json.dumps(order))
        own = ["-m", "rlmm.bench.scale_child", str(asked), str(answer)]
        done = subprocess.run(
            [sys.executable, *(launched if point.processes > 1 else []), *own],
            env=os.environ | {"OMP_NUM_THREADS": str(plan.threads), "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise RuntimeError(f"{described(point)} failed (exit {done.returncode}):\n{done.stderr[-2000:]}")
        return json.loads(answer.read_text())


def described(point: Point) -> str:
    """What differs from one point to the next."""
    name = Path(point.model).name
    return f"{name}, {point.rows} x {point.tokens}, {point.processes} process{'es' * (point.processes > 1)}" + (
        f", ZeRO-{point.zero}" * (point.zero > 0)
    )


def row_of(point: Point, made: Sequence[dict[str, Any]]) -> ScaleRow:
    """The medians of a point's repeats."""
    copied = median(one["copied_bytes_a_second"] for one in made)
    rollout_s = median(one["rollout_s"] for one in made)
    update_s = median(value for one in made for value in one["update_s"][1:])
    return ScaleRow(
        point=point,
        parameters=made[0]["parameters"],
        rollout_s=rollout_s,
        tokens_a_second=point.rows * point.sampled / rollout_s,
        share=made[0]["bytes_a_step"] / copied * point.sampled / rollout_s,
        update_s=update_s,
        trained_tokens_a_second=point.rows * point.tokens / update_s,
        peak=median(one["peak"] for one in made),
        planned=made[0]["planned"],
        weights=made[0]["weights"],
        copied_bytes_a_second=copied,
        after_rollout=None if made[0]["gpu"] else median(one["after_rollout"] for one in made),
    )


def along(rows: Sequence[ScaleRow], plan: ScalePlan, name: str) -> list[ScaleRow]:
    """The base and the points that differ from it in one field, in its order."""
    base = asdict(plan.base)
    found = [row for row in rows if {**asdict(row.point), name: base[name]} == base]
    return sorted(found, key=lambda row: row.parameters if name == "model" else getattr(row.point, name))


def growth(rows: Sequence[ScaleRow], plan: ScalePlan) -> dict[str, dict[str, float]]:
    """Exponents of the power laws that fit best (least squares of logarithms) along each axis of two points or more."""
    found: dict[str, dict[str, float]] = {}
    for name in (axis for axis in plan.axes if axis in NAMES):
        chosen = along(rows, plan, name)
        if len(chosen) > 1:
            x = [row.parameters if name == "model" else getattr(row.point, name) for row in chosen]
            columns = {"rollout": "rollout_s", "update": "update_s", "update's memory": "peak"}
            found[name] = {
                what: float(np.polyfit(np.log(x), np.log([getattr(row, field) for row in chosen]), 1)[0])
                for what, field in columns.items()
            }
    return found


def table(rows: Sequence[ScaleRow], threads: int) -> Table:
    """A line a point."""
    shown = Table(title=f"A rollout and an update ({threads} thread(s) a process)")
    columns = (
        "model", "rows", "tokens", "processes", "ZeRO", "rollout s", "tokens/s", "of bandwidth", "update s", "tokens/s",
        "peak", "planned", "after rollout",
    )  # fmt: skip
    for column in columns:
        shown.add_column(column, justify="left" if column == "model" else "right")
    for row in rows:
        point = row.point
        shown.add_row(
            Path(point.model).name, str(point.rows), str(point.tokens), str(point.processes), str(point.zero or "-"),
            f"{row.rollout_s:.3g}", f"{row.tokens_a_second:.0f}", f"{row.share:.2f}", f"{row.update_s:.3g}",
            f"{row.trained_tokens_a_second:.0f}", readable(int(row.peak)), readable(int(row.planned)),
            "-" if row.after_rollout is None else readable(int(row.after_rollout)),
        )  # fmt: skip
    return shown
