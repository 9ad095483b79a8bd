"""PP-OCR's detector and recogniser from the rapidocr package: reads text anywhere in a picture, many lines of it."""

import logging
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
from PIL import Image


class PageReader:
    """Reads all text of a picture, a line of text a line. `side`: the picture's longer side is brought down to so many
    pixels before text is looked for; letters under about 8 pixels are then missed. `min_confidence` of a line, 0 to 1.
    """

    name = "pp-ocr-page"

    def __init__(self, *, side: int = 512, min_confidence: float = 0.5, threads: int = 1) -> None:
        if side < 32 or not 0 <= min_confidence <= 1 or threads < 1:
            raise ValueError(
                f"the page reader needs side >= 32, min_confidence in [0, 1] and threads >= 1; got {side}, "
                f"{min_confidence} and {threads}"
            )
        release = _installed()
        from rapidocr import RapidOCR

        logging.getLogger("RapidOCR").setLevel(logging.CRITICAL)
        settings: dict[str, Any] = {
            "Global.use_cls": False,
            "Global.log_level": "critical",
            "Global.text_score": min_confidence,
            "Det.limit_type": "max",
            "Det.limit_side_len": side,
            "EngineConfig.onnxruntime.intra_op_num_threads": threads,
            "EngineConfig.onnxruntime.inter_op_num_threads": 1,
        }
        self._engine = RapidOCR(params=settings)
        self._fingerprint = f"{self.name} rapidocr {release} side={side} min={min_confidence}"

    def fingerprint(self) -> str:
        """Package version, whose models it carries, and settings."""
        return self._fingerprint

    def read(self, images: Sequence[Image.Image]) -> list[str]:
        """The text of each RGB image, in order; '' where nothing is read."""
        return ["\n".join(getattr(self._engine(np.asarray(image)[:, :, ::-1]), "txts", None) or ()) for image in images]


def _installed() -> str:
    try:
        return version("rapidocr")
    except PackageNotFoundError as error:
        raise ModuleNotFoundError("reading a page needs the rapidocr package: pip install 'rlmm[ocr]'") from error
