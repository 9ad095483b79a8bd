"""Reading one image of a row: every stored form, every kind of damage, size and mode."""

import base64
import io
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rlmm.data.base import UnusableRow
from rlmm.data.images import FORMATS, ImageReader, fit


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def picture(width: int = 24, height: int = 16) -> Image.Image:
    noise = np.random.Generator(np.random.Philox(key=1)).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise, "RGB")


def test_every_stored_form_gives_the_same_pixels(tmp_path: Path) -> None:
    data = encoded(picture())
    (tmp_path / "a.png").write_bytes(data)
    uri = "data:image/png;base64," + base64.b64encode(data).decode()
    forms = [
        data,
        {"bytes": data, "path": "gone.png"},
        {"bytes": None, "path": "a.png"},
        {"url": uri},
        "a.png",
        str(tmp_path / "a.png"),
        uri,
        picture(),
    ]
    for form in forms:
        assert ImageReader(tmp_path).read(form).tobytes() == picture().tobytes()


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "missing image"),
        ("", "missing image"),
        ({"bytes": None, "path": None}, "missing image"),
        ("nope.png", "missing image"),
        ("a\0b.png", "missing image"),
        (b"not an image", "corrupt image"),
        (encoded(picture())[:200], "corrupt image"),
        (encoded(picture(), "JPEG")[:-300], "corrupt image"),
        ("data:image/png;base64,%%%", "corrupt image"),
        ("data:image/png,abc", "corrupt image"),
        ("https://example.com/a.png", "remote image"),
        (3.5, "not an image"),
        (encoded(picture(), "PCX"), "corrupt image"),
    ],
)
def test_what_cannot_be_read_says_why(value: object, reason: str, tmp_path: Path) -> None:
    with pytest.raises(UnusableRow) as caught:
        ImageReader(tmp_path).read(value)
    assert caught.value.reason == reason
    assert " at 0x" not in str(caught.value)


@pytest.mark.parametrize("path", ["a.png", "/etc/hostname"])
def test_paths_are_refused_without_a_root(path: str) -> None:
    with pytest.raises(UnusableRow, match="set data.image_root"):
        ImageReader(None).read(path)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("format", FORMATS)
def test_no_damage_escapes_as_another_error(format: str) -> None:
    whole, draw = encoded(picture(), format), random.Random(0)
    for _ in range(60):
        damaged = bytearray(whole[: draw.randrange(1, len(whole) + 1)])
        for _ in range(draw.randrange(6)):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        try:
            ImageReader(None, size=(8, 8)).read(bytes(damaged))
        except UnusableRow as error:
            assert error.reason == "corrupt image"


def test_a_bomb_is_corrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(UnusableRow, match="DecompressionBomb"):
        ImageReader(None).read(encoded(picture()))


def test_a_probe_opens_and_does_not_decode() -> None:
    cut = encoded(picture())[:200]
    ImageReader(None).probe(cut)
    with pytest.raises(UnusableRow):
        ImageReader(None).probe(b"not an image")


def test_transparency_is_on_white_and_sixteen_bits_become_eight() -> None:
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert ImageReader(None).read(encoded(clear)).getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (4, 4), 0)
    assert ImageReader(None).read(encoded(palette, transparency=0)).getpixel((0, 0)) == (255, 255, 255)
    deep = Image.fromarray(np.full((4, 4), 0x80FF, dtype=np.uint16))
    assert ImageReader(None, mode="L").read(encoded(deep)).getpixel((0, 0)) == 0x80
    assert ImageReader(None).read(encoded(picture().convert("CMYK"), "TIFF")).mode == "RGB"


def test_the_exif_tag_turns_the_image_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise
    turned = ImageReader(None).read(encoded(picture(24, 16), exif=exif.tobytes()))
    assert turned.tobytes() == picture(24, 16).transpose(Image.Transpose.ROTATE_270).tobytes()


def test_three_ways_to_a_size() -> None:
    image = Image.new("RGB", (40, 20), "red")
    image.paste("blue", (10, 0, 30, 20))
    crop = np.asarray(fit(image, (10, 10), "crop"))
    assert (crop[5, 1:9, 2] > 200).all(), "the middle"
    pad = np.asarray(fit(image, (20, 20), "pad"))
    assert (pad[:4] == 255).all() and (pad[-4:] == 255).all() and pad[10, 1, 0] > 200 > pad[10, 1, 2]
    stretch = np.asarray(fit(image, (20, 20), "stretch"))
    assert stretch[1, 1, 0] > 200 and stretch[10, 10, 2] > 200
    assert fit(image.convert("L"), (9, 7), "pad").size == (9, 7)
    assert fit(image, (40, 20), "crop") is image
