"""`rlmm bench ahead`: seconds of a GRPO step with rollouts drawn a step ahead, against drawing and scoring in turns.

The quickstart's policy without its SFT, with four times as many tokens an image, and a judge that keeps the trainer
waiting, as a served one does. A step is the sum of its phases, checkpoints left out; the limit is the longer of drawing
and of all the rest, from the figures of the same judge in turns.
"""

import tempfile
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from rlmm.bench.machine import setting, torch_threads, write_json
from rlmm.config.recipe import Recipe, read_recipe, validate_recipe
from rlmm.pipeline import run_recipe
from rlmm.train.metrics import MetricsFile

WARM = 2
"""First steps that are not counted; the very first rollout is never ahead."""

PROMPTS, CHUNKS = 8, 4

JUDGE = """import time
import numpy as np

def waits(prompts, completions, **columns):
    time.sleep({latency!r})
    return [1.0 - float(np.asarray(image, dtype=np.float64).mean()) / 255 for image in completions]
"""

WAYS: dict[str, dict[str, Any]] = {
    "in turns": {},
    "scored behind": {"score_chunk": PROMPTS // CHUNKS},
    "drawn ahead": {"max_staleness": 1, "objective": {"mismatch": {"kind": "truncate"}}},
}
"""What is measured, by the stage's settings."""


@dataclass(frozen=True)
class AheadPlan:
    """`latencies`: seconds that the judge takes for a rollout, of `PROMPTS` prompts."""

    latencies: tuple[float, ...]
    steps: int
    repeats: int
    threads: int


@dataclass(frozen=True)
class Row:
    """Medians of steps, in seconds. `ratio`: of the step in turns with the same judge over this one; `limit`: over the
    shortest step that drawing ahead could come to."""

    latency: float
    way: str
    step: float
    phases: dict[str, float]
    ratio: float
    limit: float


def bench_ahead(plan: AheadPlan, json_file: Path | None) -> None:
    """Print the table; write it where asked."""
    with torch_threads(plan.threads):
        rows = [row for latency in plan.latencies for row in measure(plan, latency)]
    table = Table(title=f"Seconds of a step, medians of {plan.repeats} x {plan.steps - WARM} steps")
    for column in ("judge", "way", "step", "waits for rollout", "score", "update", "ratio", "limit"):
        table.add_column(column, justify="left" if column == "way" else "right")
    for row in rows:
        parts = [f"{row.phases[name]:.2f}" for name in ("rollout", "score", "update")]
        table.add_row(f"{row.latency:g}", row.way, f"{row.step:.2f}", *parts, f"{row.ratio:.2f}", f"{row.limit:.2f}")
    Console().print(table)
    if json_file is not None:
        rows_json = [asdict(row) for row in rows]
        write_json(json_file, {"setting": setting(plan.threads), "plan": asdict(plan), "rows": rows_json})


def measure(plan: AheadPlan, latency: float) -> list[Row]:
    """Every way with one judge; interleaved repeats."""
    found: dict[str, dict[str, list[float]]] = {way: defaultdict(list) for way in WAYS}
    for _ in range(plan.repeats):
        for way, settings in WAYS.items():
            for name, values in phases_of(plan, latency, settings).items():
                found[way][name] += values
    turns = {name: median(values) for name, values in found["in turns"].items()}
    whole = sum(turns.values())
    limit = whole / max(turns["rollout"], whole - turns["rollout"])
    rows = []
    for way, phases in found.items():
        step = median(map(sum, zip(*phases.values(), strict=True)))
        rows.append(Row(latency, way, step, {n: median(v) for n, v in phases.items()}, whole / step, limit))
    return rows


def phases_of(plan: AheadPlan, latency: float, settings: dict[str, Any]) -> dict[str, list[float]]:
    """Phase -> its seconds in every step that counts."""
    with tempfile.TemporaryDirectory() as folder:
        run = run_recipe(_recipe(plan, latency, settings, Path(folder)), lambda line: None)
        rows = MetricsFile(run.stage("grpo") / "metrics.jsonl").read()[WARM:]
    names = [name for name in rows[0] if name.startswith("time/")]
    return {name.removeprefix("time/"): [row[name] for row in rows] for name in names}


def _recipe(plan: AheadPlan, latency: float, settings: dict[str, Any], folder: Path) -> Recipe:
    judge = folder / "judge.py"
    judge.write_text(JUDGE.format(latency=latency / CHUNKS))
    raw = read_recipe(Path("quickstart")).model_dump(mode="json")
    codec, grpo = raw["stages"]["codec"] | {"steps": 1}, raw["stages"]["grpo"]
    grpo |= {"start_from": "policy", "steps": plan.steps, "held_out_every": 0, "checkpoint_every": plan.steps}
    grpo |= {"prompts_per_step": PROMPTS, "micro_batch_size": PROMPTS * grpo["samples_per_prompt"]}
    grpo |= {"gates": {"duplicate_share": 1.0, "flat_share": 1.0}}
    grpo |= settings | {"objective": grpo["objective"] | settings.get("objective", {})}
    rewards = {"terms": [{"function": f"{judge}:waits"}], "batch_size": PROMPTS * grpo["samples_per_prompt"] // CHUNKS}
    raw["codec"] |= {"patch": [8, 4]}
    raw |= {"run_dir": str(folder / "run"), "rewards": rewards, "stages": {"codec": codec, "grpo": grpo}}
    return validate_recipe(raw, "the bench's recipe")
