"""Generated text rendering: one word an image, one letter a cell, so that letters fall on whole image tokens.

The image is 96x32 grey: black capitals on white, letter k in the middle of cell k (16x32 pixels),
left-aligned. With 8-pixel patches a letter is 2 columns of 4 tokens whatever its neighbours are, which is
what a small model can learn in minutes. Two fonts, DejaVu Sans Mono regular and bold, come with matplotlib.
"""

from collections import Counter
from functools import cache
from pathlib import Path
from typing import Final

import matplotlib
from PIL import Image, ImageDraw, ImageFont

from rlmm.config.data import Split, WordsData
from rlmm.data.base import Dataset, Example, Outline, position
from rlmm.seeds import derive

CELL: Final = (16, 32)
"""Width and height of a letter's cell in pixels."""
CELLS: Final = 6
SIZE: Final = (CELL[0] * CELLS, CELL[1])
FONTS: Final = {"regular": "DejaVuSansMono.ttf", "bold": "DejaVuSansMono-Bold.ttf"}
_FONT_SIZE: Final = 24  # the widest letter, W, then keeps a white pixel on either side of its cell
_BASELINE: Final = 25  # puts 18 px capitals in the middle and leaves room for the tail of the Q


@cache
def word_list() -> tuple[str, ...]:
    """The shipped words: 3 to 6 letters a-z, sorted. Origin and licence: word_list.LICENSE."""
    return tuple(Path(__file__).with_name("word_list.txt").read_text(encoding="ascii").split())


@cache
def _font(name: str) -> ImageFont.FreeTypeFont:
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / FONTS[name]
    # The basic engine, for the same pixels with and without libraqm.
    return ImageFont.truetype(str(path), _FONT_SIZE, layout_engine=ImageFont.Layout.BASIC)


@cache
def _cell(letter: str, font: str) -> Image.Image:
    """One letter in its cell, 16x32 grey."""
    cell = Image.new("L", CELL, 255)
    ImageDraw.Draw(cell).text((CELL[0] / 2, _BASELINE), letter, fill=0, font=_font(font), anchor="ms")
    return cell


def render(text: str, font: str = "regular") -> Image.Image:
    """`text` (1 to 6 capitals A-Z) as a 96x32 image of mode L. Raises ValueError for anything else."""
    if not (1 <= len(text) <= CELLS and text.isascii() and text.isalpha() and text.isupper()):
        raise ValueError(f"cannot render {text!r}: it must be 1 to {CELLS} capitals A-Z")
    image = Image.new("L", SIZE, 255)
    for index, letter in enumerate(text):
        image.paste(_cell(letter, font), (index * CELL[0], 0))
    return image


def split_words(config: WordsData) -> tuple[list[str], list[str]]:
    """(train, held out) words, lower case, both in hash order: pseudo-random, and the same in every run.

    Raises ValueError if holding that many words out leaves none to train on.
    """
    fitting = [word for word in word_list() if config.min_letters <= len(word) <= config.max_letters]
    if config.held_out_words >= len(fitting):
        raise ValueError(
            f"held_out_words {config.held_out_words} leaves nothing to train on: there are {len(fitting)}"
            f" words of {config.min_letters} to {config.max_letters} letters; lower it"
        )
    ordered = sorted(fitting, key=lambda word: derive("words", "held out", word))
    return ordered[config.held_out_words :], ordered[: config.held_out_words]


class Words(Dataset):
    """One split: `words` in order, wrapping around with the next font where `size` exceeds their number."""

    def __init__(self, words: list[str], size: int, *, seed: int, drawn: bool, font_in_prompt: bool) -> None:
        self.excluded = Counter()
        self._words, self._size, self._seed = words, size, seed
        self._drawn, self._font_in_prompt = drawn, font_in_prompt

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> Example:
        text, font = self._asked(index)
        return Example(
            prompt=self._prompt(text, font),
            target=render(text, font) if self._drawn else None,
            row={"text": text} | ({"font": font} if self._font_in_prompt else {}),
        )

    def outline(self, index: int) -> Outline:
        return Outline(self._prompt(*self._asked(index)))

    def _asked(self, index: int) -> tuple[str, str]:
        """The word, in capitals, and the font of item `index`."""
        turn, place = divmod(position(index, self._size), len(self._words))
        text = self._words[place].upper()
        names = list(FONTS)
        return text, names[(derive(self._seed, "words", "font", text) + turn) % len(names)]

    def _prompt(self, text: str, font: str) -> str:
        return f'render "{text}"' + (f" in {font}" if self._font_in_prompt else "")


def build(config: WordsData, split: Split, seed: int) -> Words:
    """`train`: `train_images` pictures of words drawn with `seed`. `prompts`: every training word, no
    pictures. `fresh`: the same with pictures. `held_out`: the held-out words, with pictures. `row["text"]` is the
    word, in capitals.

    Raises ValueError for more `train_images` than there are pairs of a training word and a font.
    """
    train, held_out = split_words(config)
    pairs = len(train) * len(FONTS)
    if config.train_images > pairs:
        raise ValueError(
            f"train_images {config.train_images} is more than the {pairs} different pictures"
            f" ({len(train)} words x {len(FONTS)} fonts); lower it or held_out_words"
        )
    if split == "held_out":
        return Words(held_out, len(held_out), seed=0, drawn=True, font_in_prompt=config.font_in_prompt)
    words = sorted(train, key=lambda word: derive(seed, "words", "train", word))
    size = config.train_images if split == "train" else len(words)
    return Words(words, size, seed=seed, drawn=split != "prompts", font_in_prompt=config.font_in_prompt)
