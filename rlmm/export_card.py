"""The model card of an exported adapter or merged model: what it is, how it came about, how to load it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import yaml


@dataclass(frozen=True)
class HeldOut:
    """One figure on held-out prompts; `low` and `high` bound its interval over prompts."""

    judge: str
    metric: str
    arm: str
    temperature: float
    mean: float
    low: float | None = None
    high: float | None = None
    n_prompts: int | None = None


@dataclass(frozen=True)
class CardInfo:
    """What a model card tells.

    `base` is a hub id or the path of what the adapter sits on; `stages` are (name, description) in the order
    they ran; `codec` names the image tokenizer, `codec_path` where it lies beside the weights; `data` and
    `reward` are sentences; `versions` maps a library to its version; `limitations` are sentences beyond the
    standing ones; `model_class` is what loads the model: the package to import it from, and the class.
    """

    name: str
    kind: Literal["adapter", "merged"]
    base: str
    recipe: str
    stages: Sequence[tuple[str, str]]
    objective: str
    data: str
    reward: str
    codec: str
    codec_path: str
    held_out: Sequence[HeldOut] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    limitations: Sequence[str] = ()
    license: str | None = None
    model_class: tuple[str, str] = ("transformers", "AutoModelForCausalLM")
    seed: int | None = None


def model_card(info: CardInfo) -> str:
    """The card as Markdown with YAML front matter (the hub's model card format)."""
    parts = [
        f"---\n{yaml.safe_dump(_front_matter(info), sort_keys=False, allow_unicode=True)}---",
        f"# {info.name}",
        _summary(info),
        "## How it was made",
        "\n".join(f"{number}. **{name}**: {text}" for number, (name, text) in enumerate(info.stages, start=1)),
        _facts(info),
        "## On held-out prompts",
        _held_out_table(info.held_out),
        "## How to load it",
        _loading(info),
        "## Limitations",
        "\n".join(f"- {line}" for line in (*info.limitations, *_STANDING_LIMITATIONS)),
        "## Versions",
        "\n".join(f"- {name} {version}" for name, version in info.versions.items()) or "Not recorded.",
    ]
    return "\n\n".join(parts) + "\n"


_STANDING_LIMITATIONS = (
    "The model was optimised for the reward named above and for nothing else. What that reward does not "
    "measure may have become worse.",
    "Intervals are over prompts of one training run; another training seed can give another result.",
    "It makes image tokens. Without the codec named above they are not images.",
)


def _front_matter(info: CardInfo) -> dict[str, Any]:
    front: dict[str, Any] = {
        "library_name": "peft" if info.kind == "adapter" else "transformers",
        "base_model": info.base,
        "base_model_relation": "adapter" if info.kind == "adapter" else "finetune",
        "pipeline_tag": "text-to-image",
        "tags": ["rlmm", "image-tokens", "reinforcement-learning", info.objective],
    }
    return front | ({"license": info.license} if info.license else {})


def _summary(info: CardInfo) -> str:
    what = "A LoRA adapter for" if info.kind == "adapter" else "Merged weights, started from"
    return (
        f"{what} `{info.base}`, a policy that makes images as discrete tokens. Post-trained with `rlmm`, "
        f"recipe `{info.recipe}`{'' if info.seed is None else f', seed {info.seed}'}."
    )


def _facts(info: CardInfo) -> str:
    rows = [
        ("Objective", info.objective),
        ("Data", info.data),
        ("Reward", info.reward),
        ("Image codec", f"{info.codec} (`{info.codec_path}`)"),
    ]
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {_cell(text)} |" for name, text in rows)])


def _held_out_table(figures: Sequence[HeldOut]) -> str:
    if not figures:
        return "Not evaluated."
    head = [
        "| arm | temperature | metric | judge | mean | interval | prompts |",
        "|---|---|---|---|---|---|---|",
    ]
    return "\n".join(head + [_held_out_row(figure) for figure in figures])


def _held_out_row(figure: HeldOut) -> str:
    known = figure.low is not None and figure.high is not None
    cells = (
        figure.arm,
        f"{figure.temperature:g}",
        figure.metric,
        figure.judge,
        f"{figure.mean:.3f}",
        f"[{figure.low:.3f}, {figure.high:.3f}]" if known else "–",
        "–" if figure.n_prompts is None else str(figure.n_prompts),
    )
    return f"| {' | '.join(map(_cell, cells))} |"


def _loading(info: CardInfo) -> str:
    package, name = info.model_class
    lines = [f"from {package} import {name}", "", f'model = {name}.from_pretrained("path/to/this/folder")']
    if info.kind == "adapter":
        lines = [
            "from peft import PeftModel",
            f"from {package} import {name}",
            "",
            f"base = {name}.from_pretrained({info.base!r})",
            'model = PeftModel.from_pretrained(base, "path/to/this/folder")',
        ]
    code = "\n".join(["```python", *lines, "```"])
    return (
        f"{code}\n\nThe image tokens that it samples are turned into pixels by the codec in "
        f"`{info.codec_path}`; `rlmm sample` does both."
    )


def _cell(text: str) -> str:
    """Text that cannot break out of its table cell."""
    return " ".join(text.split()).replace("|", "\\|")
