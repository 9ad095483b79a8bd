"""Figures of a step: sums and counts while it runs, one JSON line when it ends."""

import json
import math
import os
from collections import defaultdict, deque
from pathlib import Path
from typing import Any

from rlmm.objectives.policy_gradient import summarise_policy_metrics
from rlmm.train.faults import storing
from rlmm.train.processes import gather, world


class Meter:
    """Collects (sum, count) pairs and single values over micro-batches and processes.

    `add` makes a mean weighted by its counts, or keeps the largest where the name ends in `max`; `total` makes a sum
    for the policy's ratios.
    """

    def __init__(self) -> None:
        self._sums: dict[str, float] = defaultdict(float)
        self._counts: dict[str, float] = defaultdict(float)
        self._totals: dict[str, float] = defaultdict(float)
        self._values: dict[str, float] = {}

    def total(self, name: str, amount: float) -> None:
        """A plain sum, e.g. one that `summarise_policy_metrics` turns into ratios when the step ends."""
        self._totals[name] += amount

    def add(self, name: str, total: float, count: float = 1.0) -> None:
        if name.endswith("max"):
            self._sums[name] = max(self._sums.get(name, -math.inf), total)
            self._counts[name] = 1.0
        else:
            self._sums[name] += total
            self._counts[name] += count

    def put(self, values: dict[str, float]) -> None:
        """Figures that are already final for the step (over all processes)."""
        self._values.update(values)

    def flush(self) -> dict[str, float]:
        """The step's figures over all processes; starts anew. Every process must call it at the same step."""
        sums, counts, totals = dict(self._sums), dict(self._counts), dict(self._totals)
        if world()[1] > 1:
            sums, counts, totals = _reduce(sums, counts, totals)
        figures = {name: sums[name] / counts[name] for name in sums if counts[name] > 0}
        if totals:
            figures |= summarise_policy_metrics(totals)
        figures |= self._values
        self.__init__()
        return figures


def _reduce(
    sums: dict[str, float], counts: dict[str, float], totals: dict[str, float]
) -> tuple[dict[str, float], dict[str, float], dict[str, float]]:
    meter = Meter()
    for part_sums, part_counts, part_totals in gather([sums, counts, totals]):
        for name, total in part_sums.items():
            meter.add(name, total, part_counts[name])
        for name, total in part_totals.items():
            meter.total(name, total)
    return dict(meter._sums), dict(meter._counts), dict(meter._totals)


class MetricsFile:
    """`metrics.jsonl`: one object a step, appended and flushed; cut back to a checkpoint's step on resume."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, step: int, figures: dict[str, float]) -> None:
        clean = {name: (value if math.isfinite(value) else None) for name, value in figures.items()}
        with storing(f"the figures of step {step}", self.path), self.path.open("a") as handle:
            handle.write(json.dumps({"step": step, **clean}) + "\n")
            handle.flush()

    def read(self) -> list[dict[str, Any]]:
        """All whole lines; a torn last line (a kill while writing) is dropped."""
        return self.last(None)

    def last(self, count: int | None) -> list[dict[str, Any]]:
        """The last `count` of them. A long stage asks at every step, so that the others are not parsed."""
        if not self.path.is_file():
            return []
        with self.path.open() as handle:
            lines = deque(handle, None if count is None else count + 1)
        rows = []
        for line in lines:
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return rows if count is None else rows[-count:]

    def cut(self, step: int) -> None:
        """Forget every line after `step`, so that a resumed run writes them once."""
        kept = [row for row in self.read() if row["step"] <= step]
        partial = self.path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(row) + "\n" for row in kept))
        os.replace(partial, self.path)
