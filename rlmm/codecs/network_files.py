"""Weights of published image tokenizers, by the names that their checkpoints use."""

import pickle
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.utils.hub import cached_file

DECODER = "decoder."
FILES = (
    "model.safetensors", "diffusion_pytorch_model.safetensors", "pytorch_model.safetensors",
    "pytorch_model.bin", "diffusion_pytorch_model.bin",
)  # fmt: skip
"""What a published image tokenizer's weights are called, the first one that there is."""


def published_tensors(source: str, folder: str = "") -> dict[str, Tensor]:
    """The weights of an image tokenizer that is a checkpoint by itself, or lies in a folder of one. Of a pickle tensors
    alone are read. Raises ValueError where there are none. `source`: a folder or a hub id."""
    for name in FILES:
        found = published_file(source, folder + name)
        if found is not None:
            return _read(Path(found), source)
    raise ValueError(f"{source} has no weights of an image tokenizer: none of {', '.join(folder + n for n in FILES)}")


def published_file(source: str, name: str) -> str | None:
    """Where a file of a folder or hub id is; None where there is no such file. Raises ValueError where the hub cannot
    be asked."""
    try:
        return cached_file(source, name, _raise_exceptions_for_missing_entries=False)
    except OSError as error:
        raise ValueError(f"{source} is no readable checkpoint ({error}); give a folder or a hub id") from error


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
        decoder = {
            n.removeprefix(DECODER): t for n, t in _read(Path(file), "policy.decoder").items() if n.startswith(DECODER)
        }
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


def _read(file: Path, whose: str) -> dict[str, Tensor]:
    if not file.is_file():
        raise ValueError(f"{whose}: there is no file {file}")
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        read = torch.load(file, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, pickle.UnpicklingError) as error:
        raise ValueError(f"{whose}: {file} cannot be read as tensors ({error})") from error
    return read.get("state_dict", read)
