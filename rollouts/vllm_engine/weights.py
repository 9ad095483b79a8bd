"""The weights that vLLM's kernels really multiply by, under the checkpoint's names.

vLLM repacks weights into forms that cannot be read (on a CPU the packed copy is the one that runs, whatever the
parameter beside it says), and joins several of a checkpoint's matrices into one. So a linear layer is asked for its
answers to the unit vectors: these are its weights, exactly, and a copy that missed a sync shows.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from rollouts.fingerprint import weights_fingerprint


def running_fingerprint(model: nn.Module) -> str:
    """`weights_fingerprint` of what `model` (vLLM's) computes with."""
    with torch.no_grad():
        return weights_fingerprint(running_weights(model))


def refresh_tied_head(model: Any) -> None:
    """Repack the head of a model with tied embeddings: a reload repacks the embedding's layer alone."""
    if model.config.tie_word_embeddings:
        model.lm_head.quant_method.process_weights_after_loading(model.lm_head)


def running_weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    """One weight at a time. Raises NotImplementedError on a layer that cannot be read so."""
    tied = bool(model.config.tie_word_embeddings)
    for name, module in model.named_modules():
        if isinstance(module, ParallelLMHead):
            if not tied:
                yield f"{name}.weight", _answers(module)[: module.org_vocab_size]
        elif isinstance(module, VocabParallelEmbedding):
            weight_VH = _answers(model.lm_head) if tied else module.get_parameter("weight")
            yield f"{name}.weight", weight_VH[: module.org_vocab_size]
        elif isinstance(module, LinearBase):
            yield from _split(name, module, model.packed_modules_mapping)
        else:
            for own, parameter in module.named_parameters(recurse=False):
                yield f"{name}.{own}", parameter


def _split(name: str, layer: Any, joined: dict[str, list[str]]) -> Iterator[tuple[str, Tensor]]:
    """A layer's weight and bias; of joined ones, each part under its own name."""
    parent, _, own = name.rpartition(".")
    parts = joined.get(own, [own])
    sizes = list(layer.output_sizes) if len(parts) > 1 else [layer.output_size]
    tensors = {"weight": _answers(layer)} | ({} if layer.bias is None else {"bias": layer.bias})
    for kind, tensor in tensors.items():
        for part, piece in zip(parts, tensor.split(sizes), strict=True):
            yield f"{parent}.{part}.{kind}", piece


def _answers(layer: Any) -> Tensor:
    """The weight [out, in] of a linear layer or head, through the kernel that runs in the forward pass."""
    width = getattr(layer, "input_size", None) or layer.embedding_dim
    dtype = layer.weight.dtype
    if not dtype.is_floating_point or getattr(layer, "tp_size", 1) > 1:
        raise NotImplementedError(
            f"the weights of a {type(layer).__name__} of type {dtype} over {getattr(layer, 'tp_size', 1)} devices "
            "cannot be compared with the trainer's; run the engine unquantised and on one device"
        )
    eye = torch.eye(width, dtype=dtype, device=layer.weight.device)
    return layer.quant_method.apply(layer, eye, bias=None).T
