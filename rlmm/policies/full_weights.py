"""A model's weights as a checkpoint has them, one at a time: an adapter folded in, and what is in parts gathered."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from rlmm.policies.head_rows import ROWS
from rlmm.policies.parts import gathered


def full_weights(model: nn.Module, left_out: tuple[str, ...]) -> Iterator[tuple[str, Tensor]]:
    """Full weights under the checkpoint's names, without those whose names begin as one of `left_out`.

    An adapter is folded into a copy: merging and unmerging in place drifts in bfloat16. Of weights in parts no more
    than one is gathered at once, with the adapter on it, and every process must go through all of them.
    """
    modules = dict(model.named_modules())
    for name, parameter in model.named_parameters():
        if ".lora_" in name or name.endswith(f".{ROWS}") or name.startswith(left_out):
            continue
        inner, _, last = name.rpartition(".base_layer.")
        layer: Any = modules[inner] if inner and last == "weight" else None
        low_rank = [] if layer is None else [p for n, p in layer.named_parameters() if "lora_" in n]
        with gathered([parameter, *low_rank]):
            weight = parameter.detach()
            for adapter in [] if layer is None else layer.active_adapters:
                weight = weight + layer.get_delta_weight(adapter).detach()
        yield name.replace(".base_layer.", "."), weight
