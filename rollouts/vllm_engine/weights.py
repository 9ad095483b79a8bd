"""The weights that vLLM's kernels really multiply by, under the checkpoint's names.

vLLM repacks weights into forms that cannot be read (on a CPU the packed copy is the one that runs, whatever the
parameter beside it says), and joins several of a checkpoint's matrices into one. So a linear layer is asked for its
answers to the unit vectors: these are its weights, exactly, and a copy that missed a sync shows. Under tensor
parallelism each device answers for its part and the parts are gathered, one weight at a time: all must ask together.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import tensor_model_parallel_all_gather as gather
from vllm.model_executor.layers.linear import LinearBase, RowParallelLinear
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from rollouts.fingerprint import weights_fingerprint


def running_fingerprint(model: nn.Module) -> str:
    """`weights_fingerprint` of what `model` (vLLM's) computes with."""
    with torch.no_grad():
        return weights_fingerprint(running_weights(model))


def reload_all(reload: Callable[..., Any], weights: Iterable[tuple[str, Tensor]]) -> None:
    """vLLM's `reload_weights` of weights that may break off. They then seem to end, so that vLLM puts its layers
    together again before the error is raised: left in the middle of a pass, it would take no other one. Raises
    RuntimeError where vLLM itself refuses a weight, which does leave it there."""
    broke: list[BaseException] = []

    def until_broken() -> Iterator[tuple[str, Tensor]]:
        try:
            yield from weights
        except BaseException as error:  # raised below
            broke.append(error)

    try:
        reload(weights_iterator=until_broken())
    except Exception as error:
        if broke:  # vLLM misses what did not come
            raise broke[0] from None
        said = f"vLLM cannot load the weights it was sent ({error}), and is left in the middle of them; start it anew"
        raise RuntimeError(f"{said} for the checkpoint that is trained") from error
    if broke:
        raise broke[0]


def refresh_tied_head(model: Any) -> None:
    """Repack the head of a model with tied embeddings: a reload repacks the embedding's layer alone."""
    if model.config.tie_word_embeddings:
        model.lm_head.quant_method.process_weights_after_loading(model.lm_head)


def running_weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    """One weight at a time, whole, of those that a sync brings (not the model's `kept`).

    Raises NotImplementedError on a layer that cannot be read so.
    """
    named, kept = getattr(model, "checkpoint_name", str), getattr(model, "kept", ())
    return ((named(name), weight) for name, weight in _own_weights(model) if not name.startswith(kept))


def _own_weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    tied = bool(model.config.tie_word_embeddings)
    for name, module in model.named_modules():
        if isinstance(module, ParallelLMHead):
            if not tied:
                yield f"{name}.weight", _vocabulary(module, _answers(module))
        elif isinstance(module, VocabParallelEmbedding):
            yield (
                f"{name}.weight",
                _vocabulary(module, _answers(model.lm_head) if tied else module.get_parameter("weight")),
            )
        elif isinstance(module, LinearBase):
            yield from _split(name, module, model.packed_modules_mapping)
        else:
            for own, parameter in module.named_parameters(recurse=False):
                yield f"{name}.{own}", parameter


def _vocabulary(layer: Any, weight_VH: Tensor) -> Tensor:
    """Rows of all devices, without those that fill up the last one."""
    return gather(weight_VH.contiguous(), dim=0)[: layer.org_vocab_size]


def _split(name: str, layer: Any, joined: dict[str, list[str]]) -> Iterator[tuple[str, Tensor]]:
    """A layer's weight and bias; of joined ones, each part under its own name."""
    if getattr(layer, "num_kv_head_replicas", 1) > 1:
        raise NotImplementedError(
            f"{name} repeats key heads over devices, which cannot be compared with the trainer's; use no more devices "
            f"than the model has key heads ({layer.total_num_kv_heads})"
        )
    parent, _, own = name.rpartition(".")
    parts = joined.get(own, [own])
    whole = list(layer.output_sizes) if len(parts) > 1 else [layer.output_size]
    rows_apart = isinstance(layer, RowParallelLinear)  # each device has some inputs of every output
    sizes = whole if rows_apart else [size // getattr(layer, "tp_size", 1) for size in whole]
    tensors = {"weight": _answers(layer)} | ({} if layer.bias is None else {"bias": layer.bias})
    for kind, tensor in tensors.items():
        for part, piece in zip(parts, tensor.split(sizes), strict=True):
            yield f"{parent}.{part}.{kind}", _whole(piece, kind, rows_apart)


def _whole(piece: Tensor, kind: str, rows_apart: bool) -> Tensor:
    if rows_apart:
        return gather(piece.contiguous(), dim=1) if kind == "weight" else piece
    return gather(piece.contiguous(), dim=0)


def _answers(layer: Any) -> Tensor:
    """This device's weight [out, in] of a linear layer or head, through the kernel that runs in the forward pass."""
    width = getattr(layer, "input_size_per_partition", None) or getattr(layer, "input_size", None)
    dtype = layer.weight.dtype
    if not dtype.is_floating_point:
        raise NotImplementedError(
            f"the weights of a {type(layer).__name__} of type {dtype} cannot be compared with the trainer's; run the "
            "engine unquantised"
        )
    eye = torch.eye(width or layer.embedding_dim, dtype=dtype, device=layer.weight.device)
    return layer.quant_method.apply(layer, eye, bias=None).T
