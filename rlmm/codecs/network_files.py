"""Weights of published image tokenizers, by the names that their checkpoints use."""

import json
import pickle
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file

from rlmm.codecs.torchscript import read_torchscript

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
            return read_tensors(Path(found), source)
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
        there = read_tensors(Path(file), "policy.decoder")
        decoder = {n.removeprefix(DECODER): t for n, t in there.items() if n.startswith(DECODER)}
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


def read_tensors(file: Path, whose: str) -> dict[str, Tensor]:
    """What is in a file: safetensors, TorchScript (.jit) or a torch checkpoint, of which tensors alone are read. Raises
    ValueError naming `whose` it is."""
    if not file.is_file():
        raise ValueError(f"{whose}: there is no file {file}")
    if file.suffix == ".jit":
        return read_torchscript(file)
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        read = torch.load(file, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, pickle.UnpicklingError) as error:
        raise ValueError(f"{whose}: {file} cannot be read as tensors ({error})") from error
    return read.get("state_dict", read)


def safetensors_of(source: str, part: str) -> Iterator[tuple[str, Tensor]]:
    """The weights with `part` in their names. Raises ValueError where the checkpoint has no safetensors files."""
    files = _files(source, part)
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 (no mapping)
                    if part in name:
                        yield name, opened.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise unreadable(source, error) from error


def _files(source: str, part: str) -> list[str]:
    """The files that hold the part."""
    index = published_file(source, SAFE_WEIGHTS_INDEX_NAME)
    if index is not None:
        places: dict[str, Any] = json.loads(Path(index).read_text())["weight_map"]
        names = sorted({file for name, file in places.items() if part in name})
        return [file for name in names if (file := published_file(source, name)) is not None]
    whole = published_file(source, SAFE_WEIGHTS_NAME)
    if whole is None:
        raise ValueError(f"{source} has no {SAFE_WEIGHTS_NAME}; convert its weights to safetensors first")
    return [whole]


def unreadable(source: str, error: Exception) -> ValueError:
    """What to raise."""
    return ValueError(
        f"{source} is not a readable checkpoint ({error}); give a complete folder, a stage's with its layout.json or a "
        "published one, or a hub id"
    )
