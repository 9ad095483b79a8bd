"""Errors a person can mend: shown as one message, without a traceback (RLMM_TRACEBACK=1 shows it)."""

from rewards.failures import RewardFailureError
from rewards.runner import RewardContractError
from rlmm.config.recipe import RecipeError
from rlmm.train.gates import GateError
from rlmm.train.processes import OtherProcessError
from rollouts.contract import EngineLost

MENDABLE: tuple[type[Exception], ...] = (
    RecipeError,
    GateError,
    RewardContractError,
    RewardFailureError,
    EngineLost,
    OtherProcessError,
    ValueError,
    OSError,
    ImportError,
)
