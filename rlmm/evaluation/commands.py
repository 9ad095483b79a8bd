"""`rlmm benchmark`: the prompt files of published benchmarks, and pictures for their official scripts."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

benchmark_app = typer.Typer(
    help="Published benchmarks: their prompts, and pictures for their official scripts.", no_args_is_help=True
)
console = Console()


def say(line: str) -> None:
    """A line for the person at the terminal."""
    console.print(line, markup=False, highlight=False, soft_wrap=True)


@benchmark_app.command("check")
def benchmark_check(
    kind: Annotated[str, typer.Argument(help="geneval, t2i_compbench, dpg_bench, longtext_bench")],
    files: Annotated[list[Path], typer.Argument(help="Prompt files as the benchmark ships them")],
) -> None:
    """Read prompt files whole, and say how many prompts of which kind they have."""
    from rlmm.evaluation.benchmarks import read_benchmark, summary

    for path in files:
        say(f"{path}: {summary(read_benchmark(kind, path))}")


@benchmark_app.command("draw")
def benchmark_draw(
    kind: Annotated[str, typer.Argument(help="geneval, t2i_compbench, dpg_bench, longtext_bench")],
    file: Annotated[Path, typer.Argument(help="A prompt file as the benchmark ships it")],
    model: Annotated[str, typer.Argument(help="stages/<nn-name>/model, merged/, or a published checkpoint")],
    out: Annotated[Path, typer.Option(help="The folder for the benchmark's own script")],
    samples: Annotated[int | None, typer.Option(min=1, help="A prompt; by default the benchmark's")] = None,
    temperature: float = 1.0,
    guidance_scale: float = 1.0,
    seed: int = 0,
    batch_prompts: Annotated[int, typer.Option(min=1, help="Prompts drawn at once")] = 16,
    sampling: Annotated[list[str] | None, typer.Option(help="key=value as in a stage's sampling section")] = None,
    policy: Annotated[list[str] | None, typer.Option(help="key=value as in a recipe's policy section")] = None,
) -> None:
    """Draw a benchmark's prompts, laid out as its official scripts expect; goes on where it was stopped."""
    from rlmm.config.policy import CheckpointPolicy
    from rlmm.config.sampling import Sampling
    from rlmm.config.settings import read_settings
    from rlmm.evaluation.draw_benchmark import draw_benchmark

    options = read_settings(CheckpointPolicy, policy or [], "image_size=[512, 512]", path=model)
    law = {"temperature": temperature, "guidance_scale": guidance_scale}
    asked = read_settings(Sampling, sampling or [], "top_k=50", **law)
    draw_benchmark(kind, file, options, asked, out, say, samples=samples, seed=seed, batch_prompts=batch_prompts)
