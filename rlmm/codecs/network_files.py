"""Weights of published image tokenizers, by the names that their checkpoints use."""

import pickle
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

DECODER = "decoder."


def load_network(network: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Fill an image tokenizer. Raises ValueError naming the first weight that is missing or does not fit."""
    own = network.state_dict()
    faults = [name for name in own if name not in weights or weights[name].shape != own[name].shape]
    if faults:
        there = "has another shape" if faults[0] in weights else "is missing"
        raise ValueError(
            f"{source}: weight {faults[0]!r} of the image tokenizer {there} ({len(faults)} of {len(own)} do not fit); "
            "is the checkpoint complete, and of this family?"
        )
    network.load_state_dict({name: weights[name] for name in own})


def vqgan_decoder(found: Mapping[str, Tensor], file: str | None, levels: int, source: str) -> dict[str, Tensor]:
    """The weights `decoder.*` of a VQGAN (Esser et al. 2021, arXiv 2012.09841) under transformers' names.

    Args:
        found: what the checkpoint holds, `decoder.*` among it or not.
        file: another file to take them from: safetensors, or the VQGAN's own .ckpt, of which tensors alone are read.
        levels: resolutions of the decoder.

    Raises:
        ValueError: they are in neither.
    """
    decoder = {n.removeprefix(DECODER): t for n, t in found.items() if n.startswith(DECODER)}
    if file is not None:
        decoder = {n.removeprefix(DECODER): t for n, t in _read(Path(file)).items() if n.startswith(DECODER)}
    if not decoder:
        where = f"{file} has no weights named {DECODER}*" if file else f"{source} has no image decoder"
        raise ValueError(
            f"{where}: Chameleon was published without one in transformers' format; name the original vqgan.ckpt (or a "
            "safetensors file with decoder.*) in policy.decoder"
        )
    # The original counts its levels from the widest picture, which has no upsampling, transformers from the narrowest.
    if "up.0.upsample.conv.weight" not in decoder:
        decoder = reversed_levels(decoder, levels)
    return {DECODER + name: tensor for name, tensor in decoder.items()}


def reversed_levels(decoder: Mapping[str, Tensor], levels: int) -> dict[str, Tensor]:
    """The weights with `up.i` called `up.(levels - 1 - i)`."""
    return {re.sub(r"^up\.(\d+)", lambda m: f"up.{levels - 1 - int(m[1])}", n): t for n, t in decoder.items()}


def _read(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise ValueError(f"policy.decoder: there is no file {file}")
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        read = torch.load(file, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, pickle.UnpicklingError) as error:
        raise ValueError(f"policy.decoder: {file} cannot be read as tensors ({error})") from error
    return read.get("state_dict", read)
