"""Training some rows of an output head: those of the only tokens that are ever decided.

The other rows have no gradient, and AdamW without weight decay leaves them as they are; but their zeros and their two
moments take three times their own memory. At Emu3's vocabulary five sixths of the head are such rows. Here the head's
matrix is frozen, and a parameter that shares the storage of its trained rows takes gradient and moments. Whoever reads
the matrix (saving, syncing, the head itself) finds the trained values in it.
"""

from collections.abc import MutableMapping
from typing import Any

from torch import Tensor, nn

from rlmm.policies.parts import readable

ROWS = "trained_rows"
"""The parameter's name in the head. It is in no state dict: its values are the matrix's."""
FIRST = "trained_from_to"


def train_rows(head: nn.Linear, rows: tuple[int, int]) -> None:
    """Train rows [low, high) of `head.weight` alone. The head must not be moved to another device afterwards."""
    head.weight.requires_grad_(False)
    head.register_parameter(ROWS, nn.Parameter(head.weight.data[slice(*rows)]))
    object.__setattr__(head, FIRST, rows)  # a plain fact about the module, no part of it
    head.register_state_dict_post_hook(_forget)
    head.register_load_state_dict_post_hook(_not_missing)


def forget_rows(model: nn.Module) -> None:
    """Of a copy that is not trained: its heads have their matrices alone, as if no rows had been set to train."""
    for head in model.modules():
        if hasattr(head, FIRST):
            delattr(head, ROWS)
            object.__delattr__(head, FIRST)


def rows_weight(head: nn.Linear, rows: slice) -> Tensor:
    """`head.weight[rows]`, through the parameter that is trained where these are its rows.

    Raises RuntimeError where parameter and matrix no longer share their storage: the matrix would be stale."""
    weight_RH = readable(head.weight)[rows]
    if getattr(head, FIRST, None) != (rows.start, rows.stop):
        return weight_RH
    trained = head.get_parameter(ROWS)
    if trained.data_ptr() != weight_RH.data_ptr():
        raise RuntimeError(
            "the output head was moved after its rows were set to train, so what is trained is no longer what is "
            "saved; move the policy to its device before training starts"
        )
    return trained


def _forget(head: nn.Module, state: MutableMapping[str, Any], prefix: str, local: Any) -> None:
    state.pop(prefix + ROWS, None)


def _not_missing(head: nn.Module, keys: Any) -> None:
    keys.missing_keys[:] = [key for key in keys.missing_keys if not key.endswith(ROWS)]
