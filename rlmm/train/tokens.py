"""Image codes, each made once: kept on disk beside the hash of the image, for the codec that made them."""

import hashlib
import uuid
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor

from rlmm.codecs import Codec, codec_hash, images_to_tensor
from rlmm.policies.pictures import Pictures

BATCH = 256
"""Images encoded at once."""


def image_hash(image: Image.Image) -> str:
    """A content hash: mode, size and pixels."""
    head = f"{image.mode} {image.size[0]}x{image.size[1]} ".encode()
    return hashlib.sha256(head + image.tobytes()).hexdigest()[:32]


class ImageTokens:
    """From images to codes by a codec. With a `folder`, what was encoded before is read from there, and `save` adds
    what was new: parquet files of columns `image` (hash) and `codes`, in a folder named by the codec's hash.
    `pictures` are of the policy, where it sees source images through an encoder of its own.

    Raises ValueError where a file there cannot be read.
    """

    def __init__(self, codec: Codec, folder: Path | None = None, pictures: Pictures | None = None) -> None:
        self.codec, self.pictures = codec, pictures
        self.folder = None if folder is None else folder / codec_hash(codec)
        self._known: dict[str, Tensor] = {}
        self._new: list[str] = []
        for file in [] if self.folder is None else sorted(self.folder.glob("*.parquet")):
            self._known |= _read(file, codec)

    def codes(self, images: Sequence[Image.Image]) -> Tensor:
        """Codes [B, N] int64."""
        if self.folder is None:
            return self._encoded(images)
        names = [image_hash(image) for image in images]
        missing = {name: image for name, image in zip(names, images, strict=True) if name not in self._known}
        if missing:
            self._known |= dict(zip(missing, self._encoded(list(missing.values())).int(), strict=True))
            self._new += missing
        return torch.stack([self._known[name] for name in names]).long()

    def save(self) -> None:
        """Write what is new since the last time. Of several processes one is enough."""
        if self.folder is None or not self._new:
            return
        table = pa.table({"image": self._new, "codes": [self._known[name].numpy() for name in self._new]})
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{hashlib.sha256(''.join(self._new).encode()).hexdigest()[:16]}.parquet"
        partial = path.with_suffix(f".{uuid.uuid4().hex}.partial")
        pq.write_table(table, partial, compression="zstd")
        partial.replace(path)
        self._new = []

    def _encoded(self, images: Sequence[Image.Image]) -> Tensor:
        with torch.no_grad():
            parts = [
                self.codec.encode(images_to_tensor(images[at : at + BATCH], self.codec)).cpu()
                for at in range(0, len(images), BATCH)
            ]
        return torch.cat(parts)


def _read(file: Path, codec: Codec) -> dict[str, Tensor]:
    """Image hash -> codes of one file."""
    try:
        table = pq.read_table(file, columns=["image", "codes"])
        codes = table.column("codes").combine_chunks()
        flat_RN = torch.tensor(codes.flatten().to_numpy(), dtype=torch.int32).reshape(len(table), -1)
    except (pa.ArrowException, OSError, RuntimeError) as error:
        raise ValueError(
            f"{file} is no readable file of image codes ({error}); delete it, and they are made again"
        ) from error
    if flat_RN.shape[1] != codec.tokens or int(flat_RN.max()) >= codec.num_codes or int(flat_RN.min()) < 0:
        raise ValueError(f"{file} holds codes that are not of this codec; delete it, and they are made again")
    return dict(zip(table.column("image").to_pylist(), flat_RN, strict=True))
