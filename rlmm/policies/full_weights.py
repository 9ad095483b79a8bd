"""A model's weights as a checkpoint has them, one at a time: an adapter folded in or beside, and parts gathered."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from rlmm.policies.head_rows import ROWS
from rlmm.policies.parts import gathered
from rollouts.adapters import Adapter, apart, folded

Named = tuple[str, Tensor]
Give = Callable[[str, Tensor, Sequence[Adapter]], Iterable[Named]]
"""What is made of a weight and the adapters on it."""


def full_weights(model: nn.Module, left_out: tuple[str, ...]) -> Iterator[Named]:
    """Full weights under the checkpoint's names, without those whose names begin as one of `left_out`.

    An adapter is folded into a copy: merging and unmerging in place drifts in bfloat16.
    """
    return _through(model, left_out, lambda name, weight, adapters: [(name, folded(weight, adapters))])


def weights_apart(model: nn.Module, left_out: tuple[str, ...]) -> Iterator[Named]:
    """The same weights without their adapters, each followed by those on it (`rollouts.adapters.apart`)."""
    return _through(model, left_out, apart)


def refuse_tied(head: Any, table: nn.Module) -> None:
    """Raises ValueError where an adapter is on a head (PEFT's layer) that shares its matrix with the table of
    embeddings: folded, it would change these, too."""
    if hasattr(head, "base_layer") and head.base_layer.weight is table.get_parameter("weight"):
        raise ValueError(
            "lora.target_modules names the output head, whose matrix is that of the embeddings (tie_word_embeddings), "
            "so no merged model and no rollout engine can have the adapter on one of the two alone; leave it out"
        )


def _through(model: nn.Module, left_out: tuple[str, ...], give: Give) -> Iterator[Named]:
    """Of weights in parts no more than one is gathered at once, with the adapter on it, and every process must go
    through all of them."""
    modules = dict(model.named_modules())
    for name, parameter in model.named_parameters():
        if ".lora_" in name or name.endswith(f".{ROWS}") or name.startswith(left_out):
            continue
        inner, _, last = name.rpartition(".base_layer.")
        layer: Any = modules[inner] if inner and last == "weight" else None
        low_rank = [] if layer is None else [p for n, p in layer.named_parameters() if "lora_" in n]
        with gathered([parameter, *low_rank]):
            given = list(give(name.replace(".base_layer.", "."), parameter.detach(), _adapters(layer)))
        yield from given


def _adapters(layer: Any) -> list[Adapter]:
    """Those that a PEFT layer computes with."""
    names = [] if layer is None else layer.active_adapters
    return [
        Adapter(one, layer.lora_A[one].weight.detach(), layer.lora_B[one].weight.detach(), layer.scaling[one])
        for one in names
    ]
