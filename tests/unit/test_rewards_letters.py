"""Whole letters: their form by hand, and a broken word that recognisers read as if nothing were wrong."""

import numpy as np
import pytest
from PIL import Image

from rewards import build
from rewards.base import Sample
from rewards.gold_images import word_image
from rewards.letters import LetterFormsReward, Symbol, form_of, known_forms

WORDS = ["HELLO", "BRICK", "PLANT", "WATER", "Queen", "Paper", "Bridge", "MOON"]


def drawing(*rows: str, scale: int = 4) -> np.ndarray:
    """Ink where a row has an x."""
    small = np.array([[mark == "x" for mark in row] for row in rows])
    return small.repeat(scale, 0).repeat(scale, 1)


RING = ("xxx", "x.x", "xxx")


@pytest.mark.parametrize(
    ("rows", "form"),
    [
        (RING, (1, 1)),
        (("xxx", "x.x", "x.x"), (1, 0)),
        (("x", ".", "x", "x"), (2, 0)),
        (("xxx", "x.x", "xxx", "x.x", "xxx"), (1, 2)),
        (("x..", ".x.", "..x"), (1, 0)),
        (("xx.", "x.x", ".xx"), (1, 1)),
        (("...", "...", "..."), (0, 0)),
    ],
)
def test_pieces_and_holes(rows: tuple[str, ...], form: tuple[int, int]) -> None:
    assert form_of(drawing(*rows)) == form


def test_specks_are_neither_pieces_nor_holes() -> None:
    ink = drawing(*RING, scale=8)
    ink[12, 12], ink[2, 2] = True, False
    assert form_of(ink) == (1, 1)


def test_forms_of_letters() -> None:
    wanted = {"O": {(1, 1)}, "B": {(1, 2)}, "i": {(2, 0)}, "T": {(1, 0)}, "8": {(1, 2)}, "a": {(1, 1)}}
    assert {letter: set(known_forms(letter)) for letter in wanted} == wanted
    assert {(1, 1), (1, 2)} >= known_forms("g") >= {(1, 1)}


def damaged(image: Image.Image, seed: int) -> Image.Image:
    """Three squares of five pixels rubbed out, each at a stroke."""
    pixels, luck = np.array(image), np.random.default_rng(seed)
    ink = np.argwhere(pixels[..., 0] < 128)
    for y, x in ink[luck.integers(len(ink), size=3)]:
        pixels[max(0, y - 2) : y + 3, max(0, x - 2) : x + 3] = 255
    return Image.fromarray(pixels)


def of(word: str, image: Image.Image) -> Sample:
    return Sample(word, "g", f'the word "{word}"', (image,))


def test_broken_letters_that_are_read_as_whole_ones_do_not_pass() -> None:
    forms, reads = build("letter_forms"), build("ocr")
    broken = [of(word, damaged(word_image(word), seed)) for word in WORDS for seed in range(4)]
    whole = [score.value or 0 for score in forms.score([of(word, word_image(word)) for word in WORDS])]
    assert min(whole) > 0.8 and sum(whole) / len(whole) > 0.95
    values = [
        (read.value, form.value or 0) for read, form in zip(reads.score(broken), forms.score(broken), strict=True)
    ]
    fooled = [form for read, form in values if read == 1]
    assert len(fooled) >= 5  # PP-OCR reads the word all the same
    assert sum(form < 0.9 for form in fooled) >= 0.8 * len(fooled)


def test_what_is_malformed_is_named_and_a_blank_picture_has_no_letter() -> None:
    class Told:
        def symbols(self, images: object) -> list[list[Symbol]]:
            return [[Symbol("O", drawing(*RING)), Symbol("B", drawing(*RING)), Symbol("!", drawing(*RING))], []]

        def fingerprint(self) -> str:
            return "told"

    blank = Image.new("RGB", (96, 32), "white")
    broken, nothing = LetterFormsReward(Told()).score([of("OB", blank), of("", blank)])
    assert (broken.value, broken.parts, broken.reason) == (0.5, {"letters": 2.0}, "malformed: B")
    assert (nothing.value, nothing.reason) == (0.0, "no letter is read")
    assert build("letter_forms").score([of("", blank)])[0].value == 0
