"""The `rlmm` command: thin, every line of work lies elsewhere."""

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer
import yaml
from rich.console import Console

from rlmm.bench.commands import bench_app
from rlmm.evaluation.commands import benchmark_app
from rlmm.reward_commands import reward_app

app = typer.Typer(
    help="SFT, then GRPO, of models that generate images as discrete tokens.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.add_typer(reward_app, name="reward")
app.add_typer(bench_app, name="bench")
app.add_typer(benchmark_app, name="benchmark")
console = Console()

Config = Annotated[Path, typer.Argument(help="A recipe file, or the name of a shipped one")]
Overrides = Annotated[list[str] | None, typer.Argument(help="key.subkey=value, any number of them")]
RunDir = Annotated[Path, typer.Argument(help="A run folder, e.g. runs/quickstart")]


def say(line: str) -> None:
    """A line for the person at the terminal, from the first process alone."""
    if os.environ.get("RANK", "0") == "0":
        console.print(line, markup=False, highlight=False, soft_wrap=True)


@app.command()
def run(
    config: Config,
    overrides: Overrides = None,
    nproc: Annotated[int | None, typer.Option(min=1, help="Processes of this machine, e.g. one a GPU")] = None,
) -> None:
    """Run a recipe's stages in order. A second call resumes where the first one stopped."""
    from rlmm.launcher import check_launcher, launch

    check_launcher(os.environ)
    if nproc is not None:
        launch(nproc, config, overrides or [])
        return

    from rlmm.config.recipe import read_recipe
    from rlmm.memory import plan_lines
    from rlmm.pipeline import run_recipe
    from rlmm.train.launch import deepspeed_files, processes
    from rlmm.train.signals import listening

    recipe = read_recipe(config, overrides)
    files = deepspeed_files(recipe)
    if os.environ.get("RANK", "0") == "0":
        for line in plan_lines(recipe, int(os.environ.get("WORLD_SIZE", "1"))):
            say(line)
    with processes(deepspeed=bool(files)), listening():
        folder = run_recipe(recipe, say)
    say(f"report: {folder.path / 'report.html'}")


@app.command()
def check(
    config: Config,
    overrides: Overrides = None,
    nproc: Annotated[int, typer.Option(min=1, help="Plan for so many processes, over all machines")] = 1,
) -> None:
    """Read and resolve a recipe; print it, its batch equation and, if its checkpoint is here, a memory plan."""
    import torch

    from rlmm import allocator
    from rlmm.batch import batch_equations
    from rlmm.config.policy import CheckpointPolicy
    from rlmm.config.recipe import read_recipe
    from rlmm.dry_run import NO_DRY_RUN
    from rlmm.memory import memory_plans, no_dry_run, notes
    from rlmm.plan_table import plan_table
    from rlmm.policies.families.loading import not_here
    from rlmm.preflight import check_stages
    from rlmm.train.launch import deepspeed_files

    recipe = read_recipe(config, overrides)
    check_stages(recipe, nproc)
    say(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True))
    for line in batch_equations(recipe, nproc):
        say(line)
    if isinstance(recipe.policy, CheckpointPolicy) and (absent := not_here(recipe.policy)) is not None:
        say(f"no memory plan: {recipe.policy.path} is not here: {absent}")
        return
    deepspeed_files(recipe)
    try:
        plans = memory_plans(recipe, nproc)
    except NO_DRY_RUN as error:
        say(no_dry_run(error))
        return
    console.print(plan_table(plans, nproc))
    for line in notes(plans) + allocator.prepare(torch.cuda.is_available()):
        say(line)


@app.command()
def sample(
    model: Annotated[str, typer.Argument(help="stages/<nn-name>/model, merged/, or a published checkpoint")],
    prompts: Annotated[list[str], typer.Argument(help="Prompts, each quoted")],
    out: Annotated[Path, typer.Option(help="The picture to write")] = Path("samples.png"),
    samples: Annotated[int, typer.Option(min=1, help="Samples a prompt")] = 4,
    temperature: float = 1.0,
    guidance_scale: float = 1.0,
    seed: int = 0,
    steps: Annotated[int | None, typer.Option(min=1, help="Of a masked policy: forward passes an image")] = None,
    order: Annotated[str, typer.Option(help="Of a masked policy: random, ancestral, confidence")] = "random",
    source: Annotated[
        list[Path] | None, typer.Option(help="An image that every prompt is about; may be given again")
    ] = None,
    sampling: Annotated[
        list[str] | None,
        typer.Option(help="key=value as in a stage's sampling section, e.g. answer={length_limit: 64}"),
    ] = None,
    policy: Annotated[
        list[str] | None, typer.Option(help="Of a published checkpoint: key=value as in a recipe's policy section")
    ] = None,
    best_of: Annotated[
        int | None, typer.Option(min=2, help="Draw so many of each prompt, and show the --samples best by --reward")
    ] = None,
    reward: Annotated[str, typer.Option(help="For --best-of: a recipe, a reward's name, or file.py:function")] = "",
    row: Annotated[str, typer.Option(help="For --best-of: columns that the reward reads, as YAML")] = "{}",
) -> None:
    """Draw a grid of images, one row a prompt, from a checkpoint; print what it writes, where it writes."""
    from rlmm.best_of import check_kept, rank, rewards_named
    from rlmm.config.policy import CheckpointPolicy
    from rlmm.config.sampling import Sampling
    from rlmm.config.settings import read_settings
    from rlmm.sampling import draw_samples, read_image

    options = read_settings(CheckpointPolicy, policy or [], "image_size=[512, 512]", path=model)
    unmasking = {} if steps is None else {"unmasking": {"steps": steps, "order": order}}
    law = {"temperature": temperature, "guidance_scale": guidance_scale, **unmasking}
    asked = read_settings(Sampling, sampling or [], "thought={length_limit: 64}", **law)
    images = [read_image(path) for path in source or []]
    if (best_of is None) == bool(reward):
        raise ValueError("--best-of and --reward go together: how many to draw, and what says which is the best")
    rewards = rewards_named(reward) if reward else None
    check_kept(samples, best_of or samples)
    made = draw_samples(options, prompts, best_of or samples, asked, seed=seed, sources=images)
    if rewards is not None:
        ranked = rank(made, prompts, rewards, samples, row=yaml.safe_load(row), sources=images)
        made = ranked.samples
        for line in ranked.lines(prompts):
            say(line)
    for place, text in enumerate(made.texts if asked.written else []):
        say(f"{prompts[place // samples]}: {text}")
    if made.images:
        made.grid().save(out)
        say(f"wrote {out}")


@app.command()
def pairs(
    run_dir: RunDir,
    out: Annotated[Path, typer.Argument(help="A folder for pairs.parquet and the report of margins")],
    settings: Annotated[
        list[str] | None, typer.Argument(help="key=value of a pairs stage: rollouts=grpo margin=0.1, or start_from=sft")
    ] = None,
) -> None:
    """Preference pairs of a run: from the stored rollouts of a GRPO stage, or of samples drawn anew and scored."""
    from rlmm.train.pairs import pairs_of_run

    pairs_of_run(run_dir, out, settings or [], say)
    say(f"wrote {out / 'pairs.parquet'}")


@app.command()
def report(run_dir: RunDir) -> None:
    """Write report.html of a run, finished or not."""
    from rlmm.report import write_report

    say(f"wrote {write_report(run_dir)}")


@app.command()
def export(
    run_dir: RunDir,
    stage: Annotated[str, typer.Option(help="The policy stage to export")],
) -> None:
    """Write adapter/, base/ and merged/ of a finished policy stage into the run folder."""
    from rlmm.export import export_stage

    export_stage(run_dir, stage, say)


@app.command()
def evidence(
    plan: Annotated[Path, typer.Argument(help="A plan, e.g. configs/evidence/words.yaml")],
    runs: Annotated[Path, typer.Option(help="Where the runs go, and resume from")] = Path("runs/evidence"),
    out: Annotated[Path, typer.Option(help="Where the record, table and plot go")] = Path("docs/evidence"),
) -> None:
    """Whether RL helped: tune every arm alike, train every seed, compare on test prompts. Hours; resumes."""
    from rlmm.evidence.plan import EvidencePlan, read_plan
    from rlmm.evidence.run import run_plan
    from rlmm.train.signals import listening

    read = read_plan(plan, EvidencePlan)
    with listening():
        run_plan(read, runs / read.name, out, say)
    say(f"wrote {out / read.name}.json, .md and .png")


@app.command()
def ablate(
    plan: Annotated[Path, typer.Argument(help="A plan, e.g. configs/ablations/scenes.yaml")],
    runs: Annotated[Path, typer.Option(help="Where the run goes, and resumes from")] = Path("runs/ablations"),
    out: Annotated[Path, typer.Option(help="Where the record, table and plots go")] = Path("docs/ablations"),
) -> None:
    """What each setting of a GRPO stage does, one changed at a time, one seed. An hour or so; resumes."""
    from rlmm.evidence.ablation import run_ablation
    from rlmm.evidence.plan import AblationPlan, read_plan
    from rlmm.train.signals import listening

    read = read_plan(plan, AblationPlan)
    with listening():
        run_ablation(read, runs / read.name, out, say)
    say(f"wrote {out / read.name}.json, .md and .png")


@app.command()
def rollout_server(
    model: Annotated[Path, typer.Argument(help="The policy that a run starts from: a folder with model and layout")],
    port: Annotated[int, typer.Option(help="Where to listen")] = 8000,
    host: Annotated[
        str, typer.Option(help="On what address; others than this machine's own let others in")
    ] = "127.0.0.1",
    settings: Annotated[
        list[str] | None, typer.Argument(help="key=value of the engine: max_rows, kv_megabytes, tensor_parallel, ...")
    ] = None,
) -> None:
    """Serve rollouts by vLLM to training runs that name this server in engine.urls. RLMM_ROLLOUT_TOKEN has its key."""
    from rlmm.rollout_server import serve_rollouts

    serve_rollouts(model, host, port, settings or [])


@app.command()
def convert_llamagen(
    transformer: Annotated[Path, typer.Argument(help="The published transformer, e.g. c2i_XL_384.pt")],
    tokenizer: Annotated[Path, typer.Argument(help="The published image tokenizer, e.g. vq_ds16_c2i.pt")],
    folder: Annotated[Path, typer.Argument(help="The folder to write, for policy.path")],
    image_size: Annotated[int, typer.Option(help="Side in pixels of its images: the number in the first name")],
    text_encoder: Annotated[
        str | None, typer.Option(help="Of a text-conditional one: folder or id of flan-t5-xl")
    ] = None,
) -> None:
    """LlamaGen's published pickles as a folder that recipes can name. Of the pickles tensors alone are read."""
    from rlmm.policies.families.llamagen_convert import convert

    convert(transformer, tokenizer, folder, image_size, text_encoder)
    say(f"wrote {folder}")


@app.command()
def doctor() -> None:
    """Versions, devices and optional parts, and the fix for what does not fit."""
    from rlmm.doctor import print_report

    raise typer.Exit(print_report())


def main() -> None:
    """Run the command; an error a person can mend is one message without a traceback."""
    from rlmm.errors import MENDABLE
    from rlmm.train.processes import Stopped
    from rlmm.train.signals import EXIT_STOPPED

    try:
        app()
    except MENDABLE as error:
        if os.environ.get("RLMM_TRACEBACK"):
            raise
        told = "\n".join([f"error: {error}", *getattr(error, "__notes__", [])])
        Console(stderr=True).print(told, style="bold red", markup=False, highlight=False)
        raise SystemExit(2) from error
    except Stopped as stopped:
        say(f"{stopped}; what is done is kept. Go on with the same command: {shlex.join(['rlmm', *sys.argv[1:]])}")
        raise SystemExit(EXIT_STOPPED) from None


if __name__ == "__main__":
    main()
