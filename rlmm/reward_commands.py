"""`rlmm reward`: the rewards there are, a check of a recipe's, one as a service, and a weak one to be trained."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
import yaml
from rich.console import Console

reward_app = typer.Typer(help="Rewards: which there are, and whether one tells good from bad.", no_args_is_help=True)
console = Console()

Config = Annotated[Path, typer.Argument(help="A recipe file, or the name of a shipped one")]
Overrides = Annotated[list[str] | None, typer.Argument(help="key.subkey=value, any number of them")]


def say(line: str) -> None:
    """A line for the person at the terminal."""
    console.print(line, markup=False, highlight=False, soft_wrap=True)


@reward_app.command("list")
def reward_list() -> None:
    """The rewards there are, with those of installed packages."""
    from rewards import REWARDS
    from rewards.plugins import plugins

    others = plugins(REWARDS)
    for name in sorted([*REWARDS, *others]):
        say(f"{name}  ({others[name].value})" if name in others else name)


@reward_app.command("check")
def reward_check(
    config: Config,
    overrides: Overrides = None,
    good: Annotated[Path | None, typer.Option(help="An image that should score high")] = None,
    bad: Annotated[Path | None, typer.Option(help="An image that should score low")] = None,
    prompt: Annotated[str, typer.Option(help="The prompt both images answer")] = "",
    row: Annotated[str, typer.Option(help="The data row's other columns, as YAML")] = "{}",
) -> None:
    """Score a known good and a known bad sample with a recipe's rewards; exit 1 where the order is wrong."""
    from rlmm.config.recipe import read_recipe
    from rlmm.rewarding import check_rewards

    columns: dict[str, Any] = yaml.safe_load(row) or {}
    pair = (good, bad) if good and bad else None
    passed = check_rewards(read_recipe(config, overrides), say, pair=pair, prompt=prompt, row=columns)
    raise typer.Exit(0 if passed else 1)


@reward_app.command("serve")
def reward_serve(
    name: Annotated[str, typer.Argument(help="A reward of `rlmm reward list`, or path/file.py:function")],
    options: Annotated[list[str] | None, typer.Argument(help="key=value, as in a term's options")] = None,
    host: Annotated[str, typer.Option(help="The address to listen on; there is no TLS")] = "127.0.0.1",
    port: int = 8900,
    token_env: Annotated[str, typer.Option(help="The environment variable with the token")] = "RLMM_REWARD_TOKEN",
    concurrency: Annotated[int, typer.Option(min=1, help="Requests scored at once")] = 1,
    max_megabytes: Annotated[int, typer.Option(min=1, help="Of one request")] = 256,
) -> None:
    """Serve one reward over HTTP, for terms `name: remote` of runs in other environments."""
    from rlmm.reward_server import serve_reward

    serve_reward(name, options or [], host, port, token_env, concurrency, max_megabytes, say)


@reward_app.command("train-clip")
def reward_train_clip(
    out: Annotated[Path, typer.Argument(help="The folder to write; `model` of a clip_score term")],
    scenes: Annotated[list[str] | None, typer.Argument(help="key=value as in data of kind scenes")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Fewer make a weaker judge")] = 400,
    batch_size: Annotated[int, typer.Option(min=2)] = 64,
    width: Annotated[int, typer.Option(min=4, help="Of both towers")] = 64,
    seed: int = 0,
) -> None:
    """Train a small CLIP on scenes, as a judge that can be over-optimised on purpose. Half a minute of one core."""
    from rlmm.config.data import ScenesData
    from rlmm.config.settings import read_settings
    from rlmm.weak_clip import ClipPlan, train_clip

    data = read_settings(ScenesData, scenes or [], "train_images=2000")
    found = train_clip(data, ClipPlan(steps, batch_size, width=width, seed=seed), out, say)
    say(f"wrote {out}: {found:.0%} of held-out pictures find their prompt among eight")


@reward_app.command("convert")
def reward_convert(
    kind: Annotated[Literal["hpsv2", "image_reward"], typer.Argument(help="What the file holds")],
    file: Annotated[Path, typer.Argument(help="HPS_v2_compressed.pt, HPS_v2.1_compressed.pt or ImageReward.pt")],
    out: Annotated[Path, typer.Argument(help="The folder to write; `model` of a term of that name")],
    tokenizer: Annotated[str, typer.Option(help="Folder or hub id of its tokenizer, where not the published one")] = "",
) -> None:
    """A preference model's published pickle as a folder that its reward reads. Of the pickle tensors alone are read."""
    from importlib import import_module

    given = {"tokenizer": tokenizer} if tokenizer else {}
    import_module(f"rewards.conversions.{kind}").convert(file, out, **given)
    say(f"wrote {out}")
