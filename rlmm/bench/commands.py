"""The `rlmm bench` commands: options alone; the measuring lies in a module each, imported when its command runs."""

from pathlib import Path
from typing import Annotated

import typer

bench_app = typer.Typer(help="Speed on this machine, against the plain alternative.", no_args_is_help=True)

JsonFile = Annotated[Path | None, typer.Option("--json", help="Write the setting and every figure to this file")]
Threads = Annotated[int, typer.Option(min=1, help="Torch threads; OMP_NUM_THREADS is the ceiling")]


@bench_app.command("rollout")
def rollout(
    json_file: JsonFile = None,
    sizes: Annotated[str, typer.Option(help="Models, of tiny, quickstart, 5m and 50m")] = "5m,50m",
    samples: Annotated[int, typer.Option(min=1)] = 64,
    tokens: Annotated[int, typer.Option(min=1, help="Image tokens a sample")] = 256,
    repeats: Annotated[int, typer.Option(min=1, help="Interleaved repeats, of which medians are shown")] = 3,
    threads: Threads = 1,
    engines: Annotated[str, typer.Option(help="Of torch, vllm and vllm-pairs (a request a stream)")] = "torch",
) -> None:
    """Image tokens a second of the rollout engines, against transformers' generate and the machine's own limit."""
    from rlmm.bench.rollout import RolloutPlan, bench_rollout

    plan = RolloutPlan(tuple(sizes.split(",")), samples, tokens, repeats, threads, engines=tuple(engines.split(",")))
    bench_rollout(plan, json_file)


@bench_app.command("step")
def step(
    json_file: JsonFile = None,
    problems: Annotated[str, typer.Option(help="Vocabularies, of small and emu3")] = "small,emu3",
    prompts: Annotated[int, typer.Option(min=1, help="Prompts an update, of 8 samples each")] = 4,
    tokens: Annotated[int, typer.Option(min=1, help="Image tokens a sample")] = 256,
    checkpointed: Annotated[bool, typer.Option(help="Also with gradient checkpointing, TRL's default")] = True,
    steps: Annotated[int, typer.Option(min=2, help="Updates a process, the first of which is not counted")] = 3,
    repeats: Annotated[int, typer.Option(min=1, help="Interleaved processes a side, of which medians are shown")] = 3,
    threads: Threads = 1,
) -> None:
    """Seconds and peak memory of one GRPO update, against TRL's GRPOTrainer on the same tokens."""
    from rlmm.bench.step import bench_step, step_plan

    names = tuple(problems.split(","))
    plan = step_plan(names, prompts, tokens, checkpointed=checkpointed, steps=steps, repeats=repeats, threads=threads)
    bench_step(plan, json_file)


@bench_app.command("estimators")
def estimators(
    json_file: JsonFile = None,
    policies: Annotated[int, typer.Option(min=1, help="Random policies")] = 12,
    plans: Annotated[int, typer.Option(min=2, help="Noise plans an estimator")] = 20_000,
) -> None:
    """Bias, variance and gradient of every estimate of a masked policy's log-prob, on policies small enough to
    enumerate."""
    from rlmm.bench.estimators import bench_estimators

    bench_estimators(policies, plans, json_file)


@bench_app.command("unmasking")
def unmasking(
    json_file: JsonFile = None,
    size: Annotated[str, typer.Option(help="Model, of tiny, quickstart, 5m and 50m")] = "5m",
    samples: Annotated[int, typer.Option(min=1)] = 32,
    tokens: Annotated[int, typer.Option(min=1, help="Image tokens a sample")] = 256,
    steps: Annotated[int, typer.Option(min=1, help="Steps that reveal an image")] = 12,
    repeats: Annotated[int, typer.Option(min=1, help="Interleaved repeats, of which medians are shown")] = 3,
    threads: Threads = 1,
) -> None:
    """A masked policy's sampler against MaskGIT's loop as published, and what an exact trajectory's update costs."""
    from rlmm.bench.unmasking import UnmaskingPlan, bench_unmasking

    bench_unmasking(UnmaskingPlan(size, samples, tokens, steps, repeats, threads), json_file)


@bench_app.command("ahead")
def ahead(
    json_file: JsonFile = None,
    latencies: Annotated[str, typer.Option(help="Seconds the judge takes for a rollout")] = "0,1,2,4",
    steps: Annotated[int, typer.Option(min=3, help="Steps a run, the first two of which are not counted")] = 6,
    repeats: Annotated[int, typer.Option(min=1, help="Interleaved runs a way, of which medians are shown")] = 2,
    threads: Threads = 1,
) -> None:
    """Seconds of a GRPO step with rollouts drawn a step ahead, for judges that keep the trainer waiting."""
    from rlmm.bench.ahead import AheadPlan, bench_ahead

    bench_ahead(AheadPlan(tuple(float(one) for one in latencies.split(",")), steps, repeats, threads), json_file)
