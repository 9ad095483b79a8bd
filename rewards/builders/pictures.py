"""Rewards that look at the pixels: text, scenes, guards."""

from typing import Literal

from rewards.base import Reward


def ocr(
    *,
    case_sensitive: bool = False,
    text_column: str | None = None,
    level: Literal["characters", "words"] = "characters",
    model: str | None = None,
    height: int = 48,
    width_scale: float = 1.0,
    characters: str | None = None,
    batch_size: int = 8,
    threads: int = 1,
) -> Reward:
    """Text in the image, read by PP-OCR, against the prompt's quoted text."""
    from rewards.ocr import OcrReward
    from rewards.paddle import PaddleReader

    reader = PaddleReader(
        model=model,
        height=height,
        width_scale=width_scale,
        characters=characters,
        batch_size=batch_size,
        threads=threads,
    )
    return OcrReward(reader, name="ocr", case_sensitive=case_sensitive, text_column=text_column, level=level)


def tesseract(
    *,
    case_sensitive: bool = False,
    text_column: str | None = None,
    level: Literal["characters", "words"] = "characters",
    language: str = "eng",
    tessdata: str | None = None,
    characters: str | None = None,
) -> Reward:
    """Text in the image, read by Tesseract, against the prompt's quoted text."""
    from rewards.ocr import OcrReward
    from rewards.tesseract import TesseractReader

    reader = TesseractReader(language=language, tessdata=tessdata, characters=characters)
    return OcrReward(reader, name="tesseract", case_sensitive=case_sensitive, text_column=text_column, level=level)


def letter_forms(*, language: str = "eng", tessdata: str | None = None, characters: str | None = None) -> Reward:
    """Share of the letters read that are whole: pieces and holes as in common fonts; for a gate."""
    from rewards.letters import LetterFormsReward
    from rewards.tesseract import TesseractReader

    return LetterFormsReward(TesseractReader(language=language, tessdata=tessdata, characters=characters))


def scenes() -> Reward:
    """Counted coloured shapes and their relation, checked exactly; also edits."""
    from rewards.scenes import ScenesReward

    return ScenesReward()


def not_blank() -> Reward:
    """1 for a picture that shows something, 0 for a blank one."""
    from rewards.guards import not_blank

    return not_blank()


def edge_density() -> Reward:
    """Share of pixels at an edge; for a gate, or clipped by a transform."""
    from rewards.guards import edges

    return edges()


def colour_entropy() -> Reward:
    """Entropy of the colours in bits; for a gate, or clipped by a transform."""
    from rewards.guards import colours

    return colours()


def jpeg_size() -> Reward:
    """Bits a pixel as a JPEG; for a gate, or clipped by a transform."""
    from rewards.guards import jpeg_size

    return jpeg_size()


def distinct() -> Reward:
    """The share of its group that a picture is no copy of; for a gate, or a small weight."""
    from rewards.distinct import DistinctReward

    return DistinctReward()


def no_painted_text(
    *,
    forbid: Literal["judge", "any"] = "judge",
    min_characters: int = 3,
    text_column: str | None = None,
    side: int = 512,
    min_confidence: float = 0.5,
    threads: int = 1,
) -> Reward:
    """1 for a picture without writing for its judge, 0 for one with it; for a gate."""
    from rewards.page import PageReader
    from rewards.painted import PaintedTextReward

    reader = PageReader(side=side, min_confidence=min_confidence, threads=threads)
    return PaintedTextReward(reader, forbid=forbid, min_characters=min_characters, text_column=text_column)


def changed(*, side: int = 16, without_source: Literal["unavailable", "pass"] = "unavailable") -> Reward:
    """How far an edit is from its source, 0 for a copy; for a gate."""
    from rewards.copies import ChangedReward

    return ChangedReward(side=side, without_source=without_source)
