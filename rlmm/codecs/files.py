"""Codecs on disk (safetensors and JSON), their identity, and images as tensors."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlmm.codecs.base import Codec, build_codec
from rlmm.codecs.networks import NetworkCodec
from rlmm.config.codec import PretrainedCodec, StoredCodec

WEIGHTS, CONFIG = "codec.safetensors", "codec.json"


def save_codec(codec: Codec, folder: Path) -> None:
    """Write codec.safetensors and codec.json."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in codec.state_dict().items()}, folder / WEIGHTS)
    (folder / CONFIG).write_text(codec.settings.model_dump_json(indent=2))


def load_codec(folder: Path) -> Codec:
    """The codec of a folder, in evaluation mode. Raises ValueError naming what is missing or does not fit."""
    codec = empty_codec(load_settings(folder))
    try:
        weights = load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise _unreadable(folder, error) from error
    try:
        codec.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"{folder / WEIGHTS} does not fit {CONFIG} beside it ({error})") from error
    return codec.eval()


def load_settings(folder: Path) -> StoredCodec:
    """What a codec of a folder is like. Raises ValueError as `load_codec` does."""
    missing = [name for name in (WEIGHTS, CONFIG) if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{folder} holds no codec ({', '.join(missing)} missing); run the codec stage first")
    try:
        return TypeAdapter(StoredCodec).validate_json((folder / CONFIG).read_text())
    except (ValidationError, UnicodeDecodeError) as error:
        raise _unreadable(folder, error) from error


def empty_codec(settings: StoredCodec) -> Codec:
    """A codec whose weights nothing has filled."""
    return NetworkCodec(settings) if isinstance(settings, PretrainedCodec) else build_codec(settings)


def _unreadable(folder: Path, error: Exception) -> ValueError:
    return ValueError(f"the codec in {folder} cannot be read ({error}); train or copy it again")


def codec_hash(codec: Codec) -> str:
    """A digest of config and weights: codes of two codecs are comparable only where it is equal."""
    digest = hashlib.sha256(codec.settings.model_dump_json().encode())
    for name, tensor in sorted(codec.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:32]


def images_to_tensor(images: Sequence[Image.Image], codec: Codec) -> Tensor:
    """Images as float32 [B, C, H, W] in [0, 1], in the codec's mode. Raises ValueError on another size."""
    height, width = codec.image_size
    mode = "L" if codec.channels == 1 else "RGB"
    rows = []
    for number, image in enumerate(images):
        if image.size != (width, height):
            raise ValueError(
                f"image {number} is {image.size[0]}x{image.size[1]} pixels and the codec takes {width}x{height}; "
                "resize the data (data.image_size) or train a codec of that size"
            )
        rows.append(np.asarray(image.convert(mode), dtype=np.float32).reshape(height, width, codec.channels) / 255)
    return torch.from_numpy(np.stack(rows)).permute(0, 3, 1, 2).contiguous()


def tensor_to_images(images_BCHW: Tensor) -> list[Image.Image]:
    """Pillow images (L or RGB) of floats in [0, 1], rounded to 8 bits."""
    pixels = (images_BCHW.detach().cpu().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(one[..., 0] if one.shape[-1] == 1 else one) for one in pixels]
