"""From a trajectory to its images."""

import torch
from PIL import Image

from rlmm.codecs import Codec, tensor_to_images
from rlmm.policies.base import Policy
from rlmm.policies.layout_io import read_codes
from rollouts.trajectory import Trajectory

DRAWN_AT_ONCE = 16
"""Images, where drawing one takes the policy's hidden states."""


def decode_images(codec: Codec, policy: Policy, trajectory: Trajectory) -> list[Image.Image]:
    """The images of a trajectory's rows; none where its rows are texts."""
    if trajectory.spans[-1].kind != "image":
        return []
    layout = policy.layout
    codes_BN = read_codes(layout, trajectory.ids[:, -layout.grid.length :])
    with torch.no_grad():
        if not codec.reads_hidden:
            return tensor_to_images(codec.decode(codes_BN))
        parts = torch.arange(len(codes_BN)).split(DRAWN_AT_ONCE)
        drawn = [codec.decode(codes_BN[at], policy.image_hidden(trajectory.rows(at))) for at in parts]
        return tensor_to_images(torch.cat(drawn))
