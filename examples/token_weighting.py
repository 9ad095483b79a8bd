"""Token weights of your own: train on the decisions that were open, and leave the forced ones alone.

In the recipe::

    stages:
      grpo:
        objective: {name: dapo, token_weighting: "examples/token_weighting.py:open_decisions"}

A fifth of the tokens carries most of the learning signal in text reasoning (Wang et al. 2025, arXiv 2506.01939); on
images it is worth trying where the entropy of positions differs much.
"""

import torch
from torch import Tensor

from rlmm.objectives.token_weighting import TokenView

SHARE = 0.2


def open_decisions(view: TokenView) -> Tensor:
    """1 for the fifth of a row's decisions with the highest entropy, 0 for the others; shape [B, S].

    Each row is ranked by itself, so that the weights do not depend on which rows share a micro-batch.
    """
    decided_BS = view.trajectory.target_mask
    entropy_BS = view.entropy_BS.masked_fill(~decided_BS, -1.0)
    rank_BS = entropy_BS.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    kept_B1 = (decided_BS.sum(1, keepdim=True) * SHARE).ceil()
    return ((rank_BS < kept_B1) & decided_BS).to(torch.float32)
