"""`rlmm bench rollout`: image tokens a second of the engines, of transformers' `generate`, and of the machine.

All sample the same random Llama at the same dtype and threads, in interleaved repeats. The limit is the time of a
step's matrix products alone, made on this machine with random inputs of the same shapes.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product as combinations
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from rlmm.bench.machine import ProductStep, Timing, setting, timed, torch_threads, write_json
from rlmm.bench.rollout_problem import ENGINES, Case, Problem, known_sizes
from rlmm.config.base import nearest
from rlmm.config.stages import Gates
from rlmm.train.gates import Mismatch, ceilings


@dataclass(frozen=True)
class RolloutPlan:
    """What to measure: every size in both dtypes, with and without guidance, by each of the engines."""

    sizes: tuple[str, ...] = ("5m", "50m")
    samples: int = 64
    tokens: int = 256
    repeats: int = 3
    threads: int = 1
    guidance_scale: float = 3.0
    engines: tuple[str, ...] = ("torch",)

    def __post_init__(self) -> None:
        for engine in self.engines:
            if engine not in ENGINES:
                raise ValueError(f"bench rollout has no engine {engine!r}.{nearest(engine, list(ENGINES))}")
        for size in self.sizes:
            if size not in known_sizes():
                raise ValueError(f"bench rollout has no size {size!r}.{nearest(size, known_sizes())}")
        if min(self.samples, self.tokens, self.repeats, self.threads) < 1:
            raise ValueError(f"samples, tokens, repeats and threads must be at least 1, and the plan is {self}")

    def cases(self) -> list[Case]:
        pairs = combinations(self.sizes, ("float32", "bfloat16"), (1.0, self.guidance_scale))
        return [Case(size, precision, scale, self.samples, self.tokens) for size, precision, scale in pairs]


@dataclass(frozen=True)
class EngineFigures:
    """One engine on one case. Rates are image tokens a second; `ratio` is to `generate`, of medians, `share` of the
    limit, `mismatch` the trainer's log-probs against the engine's."""

    timing: Timing
    rate: float
    ratio: float
    ratio_cpu: float
    share: float
    share_cpu: float
    mismatch_mean: float
    mismatch_max: float
    within_gate: bool


@dataclass(frozen=True)
class RolloutRow:
    """One case's figures."""

    case: Case
    parameters: int
    kernels: bool
    engines: dict[str, EngineFigures]
    generate: Timing
    products: Timing
    generate_rate: float
    limit_rate: float
    gflops: float


def measure(case: Case, engines: Sequence[str], repeats: int, advance: Callable[[], None]) -> RolloutRow:
    """Interleaved repeats of one case; `advance` is called after each."""
    problem = Problem(case, engines)
    products = ProductStep(problem.product_shapes(), problem.device)
    found = {name: problem.mismatch(name) for name in engines}  # also the warm-up
    problem.warm_up_generate()
    sampled, generate, limit = dict.fromkeys(engines, Timing()), Timing(), Timing()
    for _ in range(repeats):
        for name in engines:
            sampled[name] = sampled[name].also(timed(partial(problem.sample, name)))
        limit = limit.also(products.measure())
        generate = generate.also(timed(problem.generate))
        advance()
    problem.close()
    return RolloutRow(
        case=case,
        parameters=problem.parameters,
        kernels=problem.kernels,
        engines={name: _figures(case, sampled[name], generate, limit, found[name]) for name in engines},
        generate=generate,
        products=limit,
        generate_rate=case.samples * case.tokens / generate.wall,
        limit_rate=case.samples / limit.wall,
        gflops=products.flops / limit.wall / 1e9,
    )


def _figures(case: Case, engine: Timing, generate: Timing, limit: Timing, found: Mismatch) -> EngineFigures:
    gates = ceilings(Gates(), case.precision)
    return EngineFigures(
        timing=engine,
        rate=case.samples * case.tokens / engine.wall,
        ratio=generate.wall / engine.wall,
        ratio_cpu=generate.cpu / engine.cpu,
        share=limit.wall * case.tokens / engine.wall,
        share_cpu=limit.cpu * case.tokens / engine.cpu,
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
            rows.append(measure(case, plan.engines, plan.repeats, lambda: progress.advance(task)))
            if json_file is not None:
                record = {"setting": around, "plan": asdict(plan), "rows": [asdict(row) for row in rows]}
                write_json(json_file, record)
    for made in tables(rows):
        console.print(made)
    return rows


def tables(rows: list[RolloutRow]) -> list[Table]:
    """Speed and exactness for a person. In brackets: ratios of processor time, steadier on a shared machine."""
    speed = _table("Image tokens a second (medians)", "engine,tokens/s,generate,ratio,limit,share of limit")
    exact = _table("|trainer - sampler| log-prob, nats", "engine,mean,max,gate,limit at GFLOP/s")
    for row in rows:
        for name, one in row.engines.items():
            ratio, share = f"{one.ratio:.2f} ({one.ratio_cpu:.2f})", f"{one.share:.2f} ({one.share_cpu:.2f})"
            rates = [f"{rate:.0f}" for rate in (one.rate, row.generate_rate, row.limit_rate)]
            speed.add_row(str(row.case), name, *rates[:2], ratio, rates[2], share)
            gate, means = "within" if one.within_gate else "past", (one.mismatch_mean, one.mismatch_max)
            exact.add_row(str(row.case), name, *(f"{value:.1e}" for value in means), gate, f"{row.gflops:.0f}")
    return [speed, exact]


def _table(title: str, headings: str) -> Table:
    made = Table(title=title)
    made.add_column("case")
    for heading in headings.split(","):
        made.add_column(heading, justify="right")
    return made
