"""Objectives: pure functions from log-probs, rewards and masks to losses, and the registry of the named ones.

This module and `records` import no torch, so that reading a config stays quick.
"""

from rlmm.objectives.records import DPO_FAMILY, OBJECTIVES, Objective

__all__ = ["DPO_FAMILY", "OBJECTIVES", "Objective"]
