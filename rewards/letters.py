"""Are the letters whole? A recogniser that knows words reads a broken glyph as the letter it should have been, so a
score of what was read pays it in full. The number of a letter's pieces and holes is the same in every common font, and
changes when a stroke breaks, a bowl opens or fills up, or a bit of ink lies beside it.
"""

import dataclasses
import string
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Protocol

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from skimage.measure import euler_number, label

from rewards.base import Sample, Score
from rewards.gold import GoldPair
from rewards.gold_images import word_image
from rewards.images import load_or_invalid

FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSansMono", "DejaVuSerif", "STIXGeneral")
"""Of matplotlib's own, whose letters say what is whole."""
SPECK = 4
"""Pieces and holes of fewer pixels than this are left out: rounding at edges makes them."""


@dataclasses.dataclass(frozen=True)
class Symbol:
    """A character that was read, and its ink: bool [H, W], True where there is ink, nothing of its neighbours."""

    text: str
    ink_HW: np.ndarray


class SymbolReader(Protocol):
    """Reads text one character at a time."""

    def symbols(self, images: Sequence[Image.Image]) -> list[list[Symbol]]:
        """The characters of each RGB image, in order."""
        ...

    def fingerprint(self) -> str: ...


Form = tuple[int, int]
"""Pieces, and holes."""


def form_of(ink_HW: np.ndarray) -> Form:
    """Pieces (touching at a corner is touching) and holes of a drawing, without specks."""
    whole = np.pad(ink_HW, 1)
    for value in (True, False):
        labels = label(whole == value, connectivity=2 if value else 1)
        sizes = np.bincount(labels.ravel())
        small = np.isin(labels, np.flatnonzero(sizes < SPECK)) & (labels > 0)
        whole = np.where(small, not value, whole)
    pieces = int(label(whole, connectivity=2).max())
    return pieces, pieces - int(euler_number(whole, connectivity=2))


@cache
def known_forms(text: str) -> frozenset[Form]:
    """The forms of a character in FONTS."""
    folder, forms = Path(matplotlib.get_data_path()) / "fonts" / "ttf", set()
    for name in FONTS:
        font = ImageFont.truetype(str(folder / f"{name}.ttf"), 96)
        page = Image.new("L", (192, 192), 0)
        ImageDraw.Draw(page).text((48, 24), text, fill=255, font=font)
        forms.add(form_of(np.asarray(page) > 127))
    return frozenset(forms)


class LetterFormsReward:
    """The share of the letters and digits read in a picture that have the form of that letter in some common font.

    Characters beyond ASCII letters and digits are left out. 0 for a picture in which none is read, which is what the
    policy drew; one that does not decode is invalid output. Parts: `letters`, how many were read. The reason of a score
    names the malformed ones. It says nothing of which text was asked for, nor of a blemish that touches a stroke
    without closing a hole: use it as a gate beside a reward that reads.
    """

    def __init__(self, reader: SymbolReader, *, name: str = "letter_forms") -> None:
        self.name, self.reader = name, reader

    def fingerprint(self) -> str:
        """The reader's identity, the fonts and the settings."""
        return f"letters/1 [{self.reader.fingerprint()}] {' '.join(FONTS)} {SPECK}"

    def score(self, samples: Sequence[Sample]) -> list[Score]:
        """One Score a sample; all readable images go to the reader in one call."""
        loaded = [load_or_invalid(sample) for sample in samples]
        read = iter(self.reader.symbols([image for item in loaded if isinstance(item, list) for image in item]))
        return [
            item if isinstance(item, Score) else self._score([one for _ in item for one in next(read)])
            for item in loaded
        ]

    def gold(self) -> Sequence[GoldPair]:
        """A word against itself with a cut through its letters."""
        whole = word_image("BOARD")
        cut = whole.copy()
        ImageDraw.Draw(cut).line((0, 16, cut.width, 16), fill="white", width=2)
        good, bad = (Sample(f"gold {at}", "gold", 'the word "BOARD"', (one,)) for at, one in enumerate((whole, cut)))
        return [GoldPair(good, bad, "BOARD against itself cut through")]

    def _score(self, symbols: Sequence[Symbol]) -> Score:
        counted = [one for one in symbols if one.text in string.ascii_letters + string.digits]
        broken = [one.text for one in counted if form_of(one.ink_HW) not in known_forms(one.text)]
        share = 1 - len(broken) / len(counted) if counted else 0.0
        said = (
            f"malformed: {' '.join(broken)}" if broken else "every letter is whole" if counted else "no letter is read"
        )
        return dataclasses.replace(Score.ok(share, letters=float(len(counted))), reason=said)
