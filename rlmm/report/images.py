"""Image bytes to data URIs a browser is sure to show."""

import base64
from dataclasses import dataclass
from io import BytesIO

from PIL import Image

MAX_SIDE = 512
"""Longer images are shrunk to this many pixels, so that the page stays small enough to send."""

PIXEL_ART_WIDTH = 160
"""Images narrower than this are magnified with hard pixel edges, so that what is seen is what was scored."""

# Of broken data: unidentified or truncated is an OSError, a broken PNG chunk a SyntaxError.
_UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


@dataclass(frozen=True)
class Picture:
    """An image on the page: its data URI, its size in pixels as shown, and its alternative text."""

    uri: str
    width: int
    height: int
    alt: str

    @property
    def pixelated(self) -> bool:
        return self.width < PIXEL_ART_WIDTH


def decoded(data: bytes | None) -> Image.Image | None:
    """The picture, RGB or RGBA, read in full; None where there are no bytes or they do not decode."""
    if not data:
        return None
    try:
        with Image.open(BytesIO(data)) as opened:
            return opened.convert("RGBA" if "A" in opened.getbands() else "RGB")
    except _UNREADABLE:
        return None


def picture(data: bytes | None, alt: str, max_side: int = MAX_SIDE) -> Picture | None:
    """Decodes `data` fully and encodes it anew; None where there are no bytes or they do not decode.

    What is small stays lossless (PNG); what is larger than `max_side` is shrunk and becomes WebP.
    """
    image = decoded(data)
    if image is None:
        return None
    buffer = BytesIO()
    if max(image.size) > max_side:
        image.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
        image.save(buffer, "WEBP", quality=88)
        kind = "webp"
    else:
        image.save(buffer, "PNG", optimize=True)
        kind = "png"
    encoded = base64.b64encode(buffer.getvalue()).decode("ascii")
    return Picture(f"data:image/{kind};base64,{encoded}", image.width, image.height, alt)
