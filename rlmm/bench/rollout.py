"""`rlmm bench rollout`: image tokens a second of the torch engine, of transformers' `generate`, and of the machine.

Both sample the same random Llama at the same dtype and threads, in interleaved repeats. The limit is the time of a
step's matrix products alone, made on this machine with random inputs of the same shapes.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import product as combinations
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from rlmm.bench.machine import ProductStep, Timing, setting, timed, torch_threads, write_json
from rlmm.bench.rollout_problem import Case, Problem, known_sizes
from rlmm.config.base import nearest
from rlmm.config.stages import Gates
from rlmm.train.gates import Mismatch, ceilings


@dataclass(frozen=True)
class RolloutPlan:
    """What to measure: every size in both dtypes, with and without guidance."""

    sizes: tuple[str, ...] = ("5m", "50m")
    samples: int = 64
    tokens: int = 256
    repeats: int = 3
    threads: int = 1
    guidance_scale: float = 3.0

    def __post_init__(self) -> None:
        for size in self.sizes:
            if size not in known_sizes():
                raise ValueError(f"bench rollout has no size {size!r}.{nearest(size, known_sizes())}")
        if min(self.samples, self.tokens, self.repeats, self.threads) < 1:
            raise ValueError(f"samples, tokens, repeats and threads must be at least 1, and the plan is {self}")

    def cases(self) -> list[Case]:
        pairs = combinations(self.sizes, ("float32", "bfloat16"), (1.0, self.guidance_scale))
        return [Case(size, precision, scale, self.samples, self.tokens) for size, precision, scale in pairs]


@dataclass(frozen=True)
class RolloutRow:
    """One case's figures. Rates are image tokens a second; `ratio` is of medians, `share` of the limit."""

    case: Case
    parameters: int
    kernels: bool
    engine: Timing
    generate: Timing
    products: Timing
    engine_rate: float
    generate_rate: float
    limit_rate: float
    ratio: float
    ratio_cpu: float
    share: float
    share_cpu: float
    gflops: float
    mismatch_mean: float
    mismatch_max: float
    within_gate: bool


def measure(case: Case, repeats: int, advance: Callable[[], None]) -> RolloutRow:
    """Interleaved repeats of one case; `advance` is called after each."""
    problem = Problem(case)
    products = ProductStep(problem.product_shapes(), problem.device)
    found = problem.mismatch()  # also the warm-up
    problem.warm_up_generate()
    engine, generate, limit = Timing(), Timing(), Timing()
    for _ in range(repeats):
        engine = engine.also(timed(problem.sample))
        limit = limit.also(products.measure())
        generate = generate.also(timed(problem.generate))
        advance()
    return _row(case, problem, products.flops, found, (engine, generate, limit))


def _row(
    case: Case, problem: Problem, flops: int, found: Mismatch, timings: tuple[Timing, Timing, Timing]
) -> RolloutRow:
    engine, generate, limit = timings
    tokens = case.samples * case.tokens
    gates = ceilings(Gates(), case.precision)
    return RolloutRow(
        case=case,
        parameters=problem.parameters,
        kernels=problem.kernels,
        engine=engine,
        generate=generate,
        products=limit,
        engine_rate=tokens / engine.wall,
        generate_rate=tokens / generate.wall,
        limit_rate=case.samples / limit.wall,
        ratio=generate.wall / engine.wall,
        ratio_cpu=generate.cpu / engine.cpu,
        share=limit.wall * case.tokens / engine.wall,
        share_cpu=limit.cpu * case.tokens / engine.cpu,
        gflops=flops / limit.wall / 1e9,
        mismatch_mean=found.mean,
        mismatch_max=found.largest,
        within_gate=found.mean <= gates["mismatch/mean"] and found.largest <= gates["mismatch/max"],
    )


def bench_rollout(plan: RolloutPlan, json_file: Path | None) -> list[RolloutRow]:
    """Measure, show tables, and write the JSON file if one is asked for (after every case, so a kill loses one)."""
    console, rows = Console(), []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with torch_threads(plan.threads), Progress(*columns, console=console) as progress:
        around = setting(plan.threads)
        task = progress.add_task("rollout", total=len(plan.cases()) * plan.repeats)
        for case in plan.cases():
            progress.update(task, description=str(case))
            rows.append(measure(case, plan.repeats, lambda: progress.advance(task)))
            if json_file is not None:
                record = {"setting": around, "plan": asdict(plan), "rows": [asdict(row) for row in rows]}
                write_json(json_file, record)
    for made in tables(rows):
        console.print(made)
    return rows


def tables(rows: list[RolloutRow]) -> list[Table]:
    """Speed and exactness for a person. In brackets: ratios of processor time, steadier on a shared machine."""
    speed = _table("Image tokens a second (medians)", "torch engine,generate,ratio,limit,share of limit")
    exact = _table("|trainer - sampler| log-prob, nats", "mean,max,gate,limit at GFLOP/s")
    for row in rows:
        name, ratio, share = str(row.case), f"{row.ratio:.2f} ({row.ratio_cpu:.2f})", f"{row.share:.2f}"
        rates = [f"{rate:.0f}" for rate in (row.engine_rate, row.generate_rate, row.limit_rate)]
        speed.add_row(name, *rates[:2], ratio, rates[2], f"{share} ({row.share_cpu:.2f})")
        gate = "within" if row.within_gate else "past"
        exact.add_row(name, f"{row.mismatch_mean:.1e}", f"{row.mismatch_max:.1e}", gate, f"{row.gflops:.0f}")
    return [speed, exact]


def _table(title: str, headings: str) -> Table:
    made = Table(title=title)
    made.add_column("case")
    for heading in headings.split(","):
        made.add_column(heading, justify="right")
    return made
