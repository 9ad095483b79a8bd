"""What the rewards hold that run in the training process, for its memory plan: weights of published models, and OCR
engines. Those that are served, and what your own functions load, are not in it."""

import inspect
import json
from collections import Counter
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file

from rewards import REWARDS
from rewards.builders.models import DETECTORS
from rlmm.config.base import nearest
from rlmm.config.recipe import Recipe
from rlmm.config.rewards import RewardTerm

ENGINES = {
    "tesseract": (64 << 20, 14 << 20),
    "letter_forms": (64 << 20, 14 << 20),
    "ocr": (92 << 20, 44 << 20),
    "no_painted_text": (92 << 20, 44 << 20),
}
"""OCR engines, which are in main memory: bytes that a process's first one was seen to hold, with its libraries, and
each one after it."""


WIDTHS = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of a weight, by the precision of a reward."""


@dataclass(frozen=True)
class RewardPlan:
    """Bytes of the memory that is planned, a GPU's where there is one; and the models that are not counted."""

    held: int = 0
    uncounted: tuple[str, ...] = ()


def reward_plan(recipe: Recipe) -> RewardPlan:
    """Of a stage that scores: the recipe's rewards and held-out judges. Raises ValueError for an unknown precision."""
    gpu = torch.cuda.is_available()
    terms = [term for part in (recipe.rewards, recipe.held_out) for term in part.terms if term.serve is None]
    engines = Counter() if gpu else Counter(term.name for term in terms if term.name in ENGINES)
    held = sum(ENGINES[name][0] + (count - 1) * ENGINES[name][1] for name, count in engines.items())
    away = []
    for term in terms:
        models, device, width = _models(term)
        for model in models if device.startswith("cuda") or not gpu else []:
            weights = _weights(model)
            if weights is None:
                away.append(f"the model of reward {term.key} ({model}) is not counted: it is not here, or not readable")
            held += (weights or 0) * width
    return RewardPlan(held, tuple(away))


def _models(term: RewardTerm) -> tuple[list[str], str, int]:
    """The published models of a term, their device, and the bytes of a weight."""
    known = inspect.signature(REWARDS[term.name]).parameters if term.name in REWARDS else {}
    if "precision" not in known:  # it runs none through torch
        return [], "cpu", 0
    options: dict[str, Any] = {name: one.default for name, one in known.items()} | term.options
    precision, device = str(options["precision"]), str(options["device"])
    if precision not in WIDTHS:
        raise ValueError(
            f"reward {term.key}: precision {precision!r} is none of {', '.join(WIDTHS)}."
            f"{nearest(precision, list(WIDTHS))}"
        )
    named = [options["model"] or DETECTORS.get(str(options.get("detector")), ""), options.get("colours", "")]
    return [str(model) for model in named if model], device, WIDTHS[precision]


def _weights(source: str) -> int | None:
    """How many numbers a model is made of, in a folder or downloaded before; None where that cannot be told."""
    try:
        return sum(map(_numbers, _files(source)))
    except (OSError, SafetensorError, ValueError):
        return None


def _files(source: str) -> list[str]:
    """Its safetensors files. Raises OSError where there are none."""
    index = _found(source, SAFE_WEIGHTS_INDEX_NAME)
    names = [SAFE_WEIGHTS_NAME] if index is None else json.loads(Path(index).read_text())["weight_map"].values()
    files = [_found(source, name) for name in sorted(set(names))]
    if None in files:
        raise FileNotFoundError(f"{source} has no {SAFE_WEIGHTS_NAME}")
    return [file for file in files if file is not None]


def _found(source: str, name: str) -> str | None:
    # Nothing is downloaded for a plan.
    return cached_file(source, name, local_files_only=True, _raise_exceptions_for_missing_entries=False)


def _numbers(file: str) -> int:
    with safe_open(file, framework="pt") as opened:
        return sum(prod(opened.get_slice(name).get_shape()) for name in opened.keys())  # noqa: SIM118 (no mapping)
