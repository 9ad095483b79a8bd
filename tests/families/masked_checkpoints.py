"""Tiny random instances of the masked families' published classes, and what the tests do with them."""

import tempfile
from functools import cache
from pathlib import Path
from typing import cast

import torch

from rlmm.config.policy import CheckpointPolicy
from rlmm.policies.families.loading import FAMILIES, load_policy
from rlmm.policies.masked import MaskedPolicy
from rollouts.contract import Request
from rollouts.law import Law
from rollouts.torch_engine.masked import MaskedTorchEngine
from rollouts.trajectory import Span, Trajectory
from rollouts.unmasking import Unmasking

MASKED = ("mmada", "lumina_dimoo", "show_o")
SIZE = (48, 64)
LARGER = {"mmada": 6, "lumina_dimoo": 6, "show_o": 6}
"""What weights are multiplied by, so that what a position sees matters: a wrong attention or prefix shows."""
_scratch = tempfile.TemporaryDirectory()


@cache
def tiny(name: str) -> CheckpointPolicy:
    """What a recipe says of the tiny checkpoint of a family."""
    folder = Path(_scratch.name) / name
    make = FAMILIES[name].tiny
    assert make is not None
    make(folder, SIZE)
    return CheckpointPolicy(path=str(folder), family=name, image_size=SIZE)


def peaked(name: str) -> MaskedPolicy:
    """The tiny policy with larger weights."""
    policy = cast(MaskedPolicy, load_policy(tiny(name).path, tiny(name)))
    policy.model.eval()
    with torch.no_grad():
        for parameter in policy.model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(LARGER[name])
    return policy


def requests(policy: MaskedPolicy, prompts: list[str], samples: int = 2) -> list[Request]:
    layout, made = policy.layout, []
    for number, prompt in enumerate(prompts):
        ids = policy.encode_prompt(prompt)
        streams = {"cond": layout.prefix(ids), "uncond": layout.prefix(layout.null(ids))}
        seeds = tuple(100 * number + sample for sample in range(samples))
        made.append(Request(prompt, streams, seeds, tuple(f"{prompt}/{seed}" for seed in seeds)))
    return made


def sample(policy: MaskedPolicy, law: Law, unmasking: Unmasking) -> Trajectory:
    """Two prompts of different length, so that one of them is padded."""
    span = Span("image", law, policy.layout.grid.length, unmasking=unmasking)
    return MaskedTorchEngine(policy).generate(requests(policy, ["a red circle", "two blue squares"]), [span])
