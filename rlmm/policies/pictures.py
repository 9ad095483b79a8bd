"""Source images that a policy sees through an encoder of its own, and how prompts refer to them.

Prompts are token ids everywhere: in requests, caches, trajectories and files. So a picture stands in one as ids past
any vocabulary, which hold what its pixels hash to and the position in it; whoever embeds them looks the pixels up here.
"""

import hashlib
import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rollouts.contract import SEEN

PLACES = 12
"""Bits of an id that hold the position."""
DIGITS = 12
"""Hexadecimal digits of the hash, 48 bits: of a million pictures two are taken for one in 1 of 500 runs."""


class Pictures:
    """Pixels by the number that ids hold: safetensors files in `folder`, or in memory while there is none.

    `length`: the ids of one picture.
    """

    def __init__(self, length: int) -> None:
        if length > 1 << PLACES:
            raise ValueError(f"a picture of {length} positions; an id has room for {1 << PLACES}")
        self.length = length
        self.folder: Path | None = None
        self._held: dict[int, Tensor] = {}

    def spell(self, images: Sequence[Image.Image]) -> list[list[int]]:
        """Ids of each picture. Of several processes each may write the same file."""
        return [self._spelled(np.array(image.convert("RGB"))) for image in images]

    def pixels(self, number: int) -> Tensor:
        """uint8 [3, height, width]. ValueError where they were never spelled here."""
        if number in self._held:
            return self._held[number]
        try:
            if self.folder is None:
                raise FileNotFoundError("there is no folder of pictures")
            return load_file(self._path(self.folder, number))["pixels"]
        except (OSError, SafetensorError, KeyError) as error:
            raise ValueError(
                f"a prompt is about picture {number:012x}, and its pixels cannot be read ({error}); they are kept "
                "beside the codes of images (tokens/, or data.token_cache): bring the folder back, or start anew"
            ) from error

    def _spelled(self, pixels_HWC: np.ndarray) -> list[int]:
        number = int(hashlib.sha256(f"{pixels_HWC.shape}".encode() + pixels_HWC.tobytes()).hexdigest()[:DIGITS], 16)
        pixels_CHW = torch.from_numpy(pixels_HWC).permute(2, 0, 1).contiguous()
        if self.folder is None:
            self._held[number] = pixels_CHW
        elif not (path := self._path(self.folder, number)).is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(f".{uuid.uuid4().hex}.partial")
            save_file({"pixels": pixels_CHW}, partial)
            partial.replace(path)
        first = SEEN + (number << PLACES)
        return list(range(first, first + self.length))

    def _path(self, folder: Path, number: int) -> Path:
        return folder / f"{number:012x}.safetensors"


def numbers_and_places(ids_N: Tensor) -> tuple[Tensor, Tensor]:
    """What ids past `SEEN` hold: the pictures' numbers [N], and the positions in them [N]."""
    return (ids_N - SEEN) >> PLACES, (ids_N - SEEN) & ((1 << PLACES) - 1)


Encoder = Callable[[list[int]], Tensor]
"""Features [n, L, H] of the pictures of these numbers."""


class Features:
    """What an encoder makes of pictures, each once: the last `most` are kept."""

    def __init__(self, most: int = 64) -> None:
        self.most = most
        self._known: dict[int, Tensor] = {}

    def hold(self, numbers: Iterable[int], features: Iterable[Tensor]) -> None:
        """Features [L, H] of pictures for the next call of `of`, which forgets the oldest. More than there are numbers
        are of no picture."""
        self._known |= dict(zip(numbers, features, strict=False))

    def of(self, numbers: Iterable[int], encode: Encoder) -> list[Tensor]:
        """Features [L, H] of each picture, encoded in one batch where they are new."""
        wanted = list(numbers)
        new = [number for number in wanted if number not in self._known]
        if new:
            self._known |= dict(zip(new, encode(new), strict=True))
        found = [self._known[number] for number in wanted]
        for number in list(self._known)[: max(0, len(self._known) - self.most)]:
            del self._known[number]
        return found
