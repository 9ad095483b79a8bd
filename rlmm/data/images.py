"""Images of a row: read from whatever a column holds, decoded at once, brought to one size and mode."""

import base64
import binascii
import io
import re
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from PIL import Image, ImageOps, UnidentifiedImageError

from rlmm.data.base import UnusableRow

FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM")
"""Formats that are read. Pillow knows others, some of which start programs (EPS) or have no pixels of their own."""

_ADDRESS = re.compile(r"data:(\w+/|[^\s,]*;base64,)|\w+://\S+$")

_DECODING_ERRORS = (
    OSError,
    RuntimeError,  # AVIF
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
"""What Pillow's readers raise for damaged files, by format; all become UnusableRow."""


@dataclass(frozen=True)
class ImageReader:
    """Reads images as a data set's settings say.

    `root` is where relative paths start; without it any path is refused, because rows from elsewhere must not
    pick files of this machine. `size` is (width, height), or None to leave the image's own.
    """

    root: Path | None
    size: tuple[int, int] | None = None
    mode: Literal["RGB", "L"] = "RGB"
    resize: Literal["crop", "pad", "stretch"] = "crop"

    def read(self, value: Any) -> Image.Image:
        """The image a column holds: bytes, a {bytes, path} mapping, a path, a data: URI or a Pillow image.

        Upright by its EXIF tag, transparency on white. Raises UnusableRow.
        """
        image = self._open(value)
        try:
            image = ImageOps.exif_transpose(image)
            image = _flatten(image).convert(self.mode)
        except _DECODING_ERRORS as error:
            raise UnusableRow("corrupt image", f"{type(error).__name__}: {error}") from error
        return image if self.size is None else fit(image, self.size, self.resize)

    def probe(self, value: Any) -> None:
        """Open the image without decoding it. Raises UnusableRow."""
        self._open(value)

    def is_named_by(self, text: str) -> bool:
        """Whether text stands for an image and not for itself: a data: URI, an address, a name that ends like an image
        file's, or the path of a file that is there."""
        if _ADDRESS.match(text) or Path(text).suffix.lower() in _suffixes():
            return True
        try:
            return self.root is not None and (self.root / text).is_file()
        except (OSError, ValueError):  # too long for a path, or with a null byte in it
            return False

    def _open(self, value: Any) -> Image.Image:
        if isinstance(value, Image.Image):
            return value
        stream = self._stream(value)
        try:
            return Image.open(stream, formats=FORMATS)
        except UnidentifiedImageError as error:
            size = stream.getbuffer().nbytes
            raise UnusableRow("corrupt image", f"{size} bytes in none of {', '.join(FORMATS)}") from error
        except _DECODING_ERRORS as error:
            raise UnusableRow("corrupt image", f"{type(error).__name__}: {error}") from error

    def _stream(self, value: Any) -> io.BytesIO:
        if isinstance(value, Mapping):
            value = next((value[key] for key in ("bytes", "path", "url") if value.get(key) is not None), None)
        if value is None or value in ("", b""):
            raise UnusableRow("missing image", "the column is empty in this row")
        if isinstance(value, bytes):
            return io.BytesIO(value)
        if not isinstance(value, str | Path):
            raise UnusableRow("not an image", f"the column holds a {type(value).__name__}")
        text = str(value)
        if text.startswith("data:"):
            return _from_data_uri(text)
        if "://" in text:
            raise UnusableRow("remote image", f"{text} is not downloaded; store it in the row or as a file")
        return self._from_file(text)

    def _from_file(self, path: str) -> io.BytesIO:
        if self.root is None:
            raise UnusableRow("image path without image_root", f"{path}: set data.image_root")
        try:
            return io.BytesIO((self.root / path).read_bytes())
        except (OSError, ValueError) as error:  # ValueError: a path with a null byte
            said = error.strerror if isinstance(error, OSError) else str(error)
            raise UnusableRow("missing image", f"{self.root / path}: {said}") from error


@cache
def _suffixes() -> frozenset[str]:
    """Of the formats that are read, each with its dot."""
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS)


def _from_data_uri(uri: str) -> io.BytesIO:
    header, _, payload = uri.partition(",")
    if not header.endswith(";base64"):
        raise UnusableRow("corrupt image", f"a data URI that is not base64: {header[:40]}")
    try:
        return io.BytesIO(base64.b64decode(payload, validate=True))
    except binascii.Error as error:
        raise UnusableRow("corrupt image", f"data URI: {error}") from error


def _flatten(image: Image.Image) -> Image.Image:
    """Transparency on white; 16-bit greys scaled to 8 bits, which `convert` would clip."""
    if image.mode.startswith("I;16") or image.mode == "I":
        return image.convert("I").point(lambda level: level / 256).convert("L")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image


def fit(image: Image.Image, size: tuple[int, int], how: Literal["crop", "pad", "stretch"]) -> Image.Image:
    """The image in exactly `size` (width, height): its middle, or whole on white, or distorted."""
    if image.size == size:
        return image
    if how == "stretch":
        return image.resize(size, Image.Resampling.LANCZOS)
    if how == "pad":
        white = 255 if image.mode == "L" else (255, 255, 255)
        return ImageOps.pad(image, size, Image.Resampling.LANCZOS, color=white)
    return ImageOps.fit(image, size, Image.Resampling.LANCZOS)
