"""Tiny random instances of the published classes, made once a test process, and what the tests do with them."""

import importlib.util
import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch

from rlmm.config.policy import CheckpointPolicy
from rlmm.policies.families.loading import FAMILIES, load_policy
from rlmm.policies.transformer import TransformerPolicy
from rollouts.contract import Request
from rollouts.law import Law
from rollouts.torch_engine.causal import TorchEngine
from rollouts.trajectory import Span, Trajectory

SIZES = {
    "emu3": (48, 48), "chameleon": (48, 48), "lumina_mgpt": (64, 64), "janus": (48, 48), "llamagen": (48, 48),
    "llamagen_text": (48, 48),
    "glm_image": (48, 48), "glm_image_edit": (48, 48), "simplear": (48, 48), "blip3o_next": (48, 48),
}  # fmt: skip
LARGER = {
    "emu3": 5,
    "chameleon": 2,
    "lumina_mgpt": 2,
    "janus": 6,
    "llamagen": 5,
    "llamagen_text": 5,
    "glm_image": 5,
    "glm_image_edit": 5,
    "simplear": 5,
    "blip3o_next": 5,
}
"""What weights are multiplied by: much, but not so much that rounding in float32 reaches 1e-4 nats under guidance."""
WRITERS = ("emu3", "chameleon", "lumina_mgpt", "janus", "simplear", "blip3o_next")
"""Families with a head for text."""
PROMPTS = {"llamagen": ["207", "360", "22"]}
"""Of families that do not take any text."""
DIFFUSERS = importlib.util.find_spec("diffusers") is not None
"""GLM-Image's decoder."""
FACTS = Path(__file__).parents[1] / "fixtures" / "families"
_scratch = tempfile.TemporaryDirectory()


@cache
def tiny(name: str) -> CheckpointPolicy:
    """What a recipe says of the tiny checkpoint of a family."""
    folder = Path(_scratch.name) / name
    make = FAMILIES[name].tiny
    assert make is not None
    make(folder, SIZES[name])
    return CheckpointPolicy(path=str(folder), family=name, image_size=SIZES[name])


def peaked(name: str) -> TransformerPolicy:
    """The tiny policy with weights so large that what came before matters and the heads are far from uniform: a wrong
    law or a wrong prefix shows."""
    policy = load_policy(tiny(name).path, tiny(name))
    policy.model.eval()
    with torch.no_grad():
        for parameter in policy.model.parameters():
            if parameter.requires_grad and parameter.ndim == 2:
                parameter.mul_(LARGER[name])
        for parameter in policy.output_head(policy.layout.image).linear.parameters():
            parameter.mul_(2)
    return policy


def prompts(name: str) -> list[str]:
    """Three prompts that a family's policies take."""
    return PROMPTS.get(name, ["a red circle", "two blue squares", "a"])


def requests(
    policy: TransformerPolicy, prompts: list[str], samples: int = 2, source: list[int] | None = None
) -> list[Request]:
    """`source`: a spelled image; None: what a picture without codes would be, for who takes sources."""
    layout = policy.layout
    source = [*layout.grid.forced().values()] if source is None else source
    sources = [source] if layout.takes_sources else []
    made = []
    for number, prompt in enumerate(prompts):
        ids = policy.encode_prompt(prompt)
        null = layout.null(ids)
        streams = {
            "cond": layout.prefix(ids, sources),
            "uncond": layout.prefix(null),
            "source": layout.prefix(null, sources),
        }
        seeds = tuple(100 * number + sample for sample in range(samples))
        made.append(Request(prompt, streams, seeds, tuple(f"{prompt}/{seed}" for seed in seeds)))
    return made


def sample(policy: TransformerPolicy, law: Law, *, use_cache: bool = True) -> Trajectory:
    engine = TorchEngine(policy, num_layers=policy.sizes.num_hidden_layers, use_cache=use_cache)
    span = Span("image", law, policy.layout.grid.length)
    return engine.generate(requests(policy, prompts(policy.layout.family)[:2]), [span])


def facts(name: str) -> dict[str, Any]:
    """What was published of a checkpoint, with its sources."""
    return json.loads((FACTS / f"{name}.json").read_text())
