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
    sizes: Annotated[str, typer.Option(help="Models, of tiny, quickstart, 5m, 50m, 1b and 7b")] = "5m,50m",
    samples: Annotated[int, typer.Option(min=1)] = 64,
    tokens: Annotated[int, typer.Option(min=1, help="Image tokens a sample")] = 256,
    repeats: Annotated[int, typer.Option(min=1, help="Interleaved repeats, of which medians are shown")] = 3,
    threads: Threads = 1,
    engines: Annotated[
        str,
        typer.Option(
            help="Of torch, vllm, vllm-pairs (a request a stream) and vllm-compiled; torch-lora and so on: with LoRA"
        ),
    ] = "torch",
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
    lora: Annotated[bool, typer.Option(help="Also of an adapter")] = True,
    checkpointed: Annotated[bool, typer.Option(help="Also with gradient checkpointing, TRL's default")] = True,
    steps: Annotated[int, typer.Option(min=2, help="Updates a process, the first of which is not counted")] = 3,
    repeats: Annotated[int, typer.Option(min=1, help="Interleaved processes a side, of which medians are shown")] = 3,
    threads: Threads = 1,
) -> None:
    """Seconds and peak memory of one GRPO update, against TRL's GRPOTrainer on the same tokens."""
    from rlmm.bench.step import bench_step, step_plan

    names = tuple(problems.split(","))
    kinds = {"lora": lora, "checkpointed": checkpointed}
    bench_step(step_plan(names, prompts, tokens, **kinds, steps=steps, repeats=repeats, threads=threads), json_file)


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


@bench_app.command("gradients")
def gradients(
    runs: Annotated[list[Path], typer.Argument(help="Run folders of a masked policy; a start each")],
    stages: Annotated[str, typer.Option(help="GRPO stages whose start, sampling and prompts are used")] = "grpo",
    json_file: JsonFile = None,
    plot: Annotated[Path | None, typer.Option(help="A picture of the table")] = None,
    sets: Annotated[int, typer.Option(min=1, help="Rollouts that every estimate is differentiated on")] = 4,
    plans: Annotated[int, typer.Option(min=2, help="Noise plans an estimate and rollout")] = 4,
    forwards: Annotated[int, typer.Option(min=1, help="A sample")] = 6,
    bound_plans: Annotated[int, typer.Option(min=2, help="Of eight draws each, for the ELBO's own gradient")] = 8,
    others: Annotated[int, typer.Option(min=2, help="Other rollouts, for the expected reward's gradient")] = 16,
    threads: Threads = 1,
) -> None:
    """The policy gradient by every estimate of a masked policy's log-prob, on the same rollouts and advantages."""
    from rlmm.bench.gradients import GradientPlan, bench_gradients

    plan = GradientPlan(sets, plans, forwards, bound_plans, others, threads)
    bench_gradients(runs, stages.split(","), plan, json_file, plot)


@bench_app.command("unmasking")
def unmasking(
    json_file: JsonFile = None,
    size: Annotated[str, typer.Option(help="Model, of tiny, quickstart, 5m, 50m, 1b and 7b")] = "5m",
    samples: Annotated[int, typer.Option(min=1)] = 8,
    tokens: Annotated[int, typer.Option(min=1, help="Image tokens a sample")] = 256,
    steps: Annotated[int, typer.Option(min=1, help="Steps that reveal an image")] = 12,
    repeats: Annotated[int, typer.Option(min=1, help="Interleaved repeats, of which medians are shown")] = 3,
    threads: Threads = 1,
) -> None:
    """A masked policy's sampler against MaskGIT's loop as published, and what an exact trajectory's update costs."""
    from rlmm.bench.unmasking import UnmaskingPlan, bench_unmasking

    bench_unmasking(UnmaskingPlan(size, samples, tokens, steps, repeats, threads), json_file)


@bench_app.command("scale")
def scale(
    json_file: JsonFile = None,
    plot: Annotated[Path | None, typer.Option(help="A picture of how cost grows")] = None,
    models: Annotated[
        str,
        typer.Option(
            help="Of tiny, quickstart, 5m, 50m, 1b and 7b, or checkpoints, of which the configuration is read"
        ),
    ] = "5m,quickstart,50m",
    rows: Annotated[str, typer.Option(help="Rows an update; of each list the first is the base")] = "8,2,32",
    tokens: Annotated[str, typer.Option(help="Image tokens a row")] = "256,1024,4096",
    processes: Annotated[str, typer.Option(help="That share an update's rows")] = "1,2",
    zero: Annotated[str, typer.Option(help="Stages of DeepSpeed's ZeRO; 0: without DeepSpeed")] = "0",
    lora: Annotated[bool, typer.Option(help="Train an adapter")] = False,
    precision: Annotated[str, typer.Option(help="Of the body's products: float32 or bfloat16")] = "float32",
    weights: Annotated[str, typer.Option(help="What a checkpoint's weights are held in")] = "float32",
    guidance_scale: float = 1.0,
    checkpointing: Annotated[bool, typer.Option(help="Gradient checkpointing")] = False,
    micro: Annotated[int, typer.Option(min=0, help="Rows a micro-batch; 0: all")] = 0,
    drawn: Annotated[int, typer.Option(min=0, help="Image tokens a row that a rollout draws at most; 0: all")] = 0,
    engine: Annotated[str, typer.Option(help="Of the rollout: torch, vllm or vllm-compiled")] = "torch",
    steps: Annotated[int, typer.Option(min=2, help="Updates a point, the first of which is not counted")] = 3,
    repeats: Annotated[int, typer.Option(min=1, help="Of each point, of which medians are shown")] = 1,
    threads: Threads = 1,
) -> None:
    """How seconds and memory of a rollout and an update grow with rows, image tokens, the model and processes."""
    from rlmm.bench.scale import bench_scale, scale_plan

    lists = {"model": models, "rows": rows, "tokens": tokens, "processes": processes, "zero": zero}
    fixed = {"precision": precision, "weights": weights, "guidance_scale": guidance_scale, "lora": lora}
    fixed |= {"checkpointing": checkpointing, "micro": micro, "drawn": drawn, "engine": engine}
    bench_scale(scale_plan(lists, fixed, steps=steps, repeats=repeats, threads=threads), json_file, plot)


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
