"""Generated words: disjoint splits, purity, and letters that stay in their cells."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rlmm.config.data import Split, WordsData
from rlmm.data import Example, build_dataset
from rlmm.data.words import CELL, FONTS, SIZE, render, word_list

ROOT = Path(__file__).resolve().parents[2]
SPLITS: tuple[Split, ...] = ("train", "prompts", "held_out")


def digest(item: Example) -> tuple:
    pixels = None if item.target is None else item.target.tobytes()
    return item.prompt, pixels, dict(item.row)


def test_the_list_has_only_words_that_fit() -> None:
    words = word_list()
    assert len(words) == len(set(words)) > 14_000
    assert all(3 <= len(word) <= 6 and word.isascii() and word.isalpha() and word.islower() for word in words)
    assert list(words) == sorted(words)


def test_held_out_words_are_never_trained_on_whatever_the_seed() -> None:
    config = WordsData()
    held_out = [item.row["text"] for item in build_dataset(config, "held_out", 5)]
    assert len(set(held_out)) == len(held_out) == 512
    assert held_out == [item.row["text"] for item in build_dataset(config, "held_out", 99)]
    for seed in (0, 5):
        train = [item.row["text"] for item in build_dataset(config, "train", seed)]
        prompts = [item.row["text"] for item in build_dataset(config, "prompts", seed)]
        assert len(train) == 1500
        assert not set(train) & set(held_out)
        assert set(prompts) | set(held_out) == {word.upper() for word in word_list()}
        assert len(prompts) + len(held_out) == len(word_list())
        assert set(train) <= set(prompts)


def test_prompts_have_no_pictures_and_the_other_splits_have() -> None:
    for split in SPLITS:
        item = build_dataset(WordsData(), split, 0)[0]
        assert item.prompt == f'render "{item.row["text"]}"'
        assert (item.target is None) == (split == "prompts")


def test_fresh_pairs_are_pictures_of_the_prompts() -> None:
    config = WordsData(train_images=20)
    prompts, fresh = build_dataset(config, "prompts", 3), build_dataset(config, "fresh", 3)
    assert len(fresh) == len(prompts) > 20
    for index in (0, 19, 20, len(fresh) - 1):
        assert fresh[index].prompt == prompts[index].prompt
        assert fresh[index].target is not None


@pytest.mark.parametrize("split", SPLITS)
def test_an_item_is_the_same_in_any_order(split: Split) -> None:
    config = WordsData(train_images=40, held_out_words=40)
    forward = [digest(item) for item, _ in zip(build_dataset(config, split, 3), range(40), strict=False)]
    data = build_dataset(config, split, 3)
    assert [digest(data[index]) for index in reversed(range(40))] == forward[::-1]


def test_an_item_is_the_same_in_another_process() -> None:
    code = (
        "from rlmm.data import build_dataset; from rlmm.config.data import Split, WordsData; import hashlib;"
        "d = build_dataset(WordsData(train_images=20), 'train', 3);"
        "print([(i.prompt, hashlib.md5(i.target.tobytes()).hexdigest()) for i in d])"
    )
    runs = {
        subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, env={"PYTHONHASHSEED": salt}, text=True)
        for salt in ("1", "2")
    }
    assert len(runs) == 1


def test_the_seed_picks_other_words() -> None:
    first, second = (
        {item.row["text"] for item in build_dataset(WordsData(train_images=100), "train", s)} for s in (0, 1)
    )
    assert len(first & second) < 20


def test_both_fonts_occur_and_the_prompt_may_name_them() -> None:
    items = list(build_dataset(WordsData(train_images=200, font_in_prompt=True), "train", 0))
    fonts = [item.row["font"] for item in items]
    assert all(60 < fonts.count(font) < 140 for font in FONTS)
    for item in items[:20]:
        assert item.prompt == f'render "{item.row["text"]}" in {item.row["font"]}'
        assert digest(item)[1] == render(item.row["text"], item.row["font"]).tobytes()


def test_a_second_pass_over_the_words_takes_the_other_font() -> None:
    pairs = 2 * (len(word_list()) - 15_000)
    data = build_dataset(WordsData(train_images=pairs, held_out_words=15_000), "train", 0)
    assert len({digest(item)[1] for item in data}) == pairs


@pytest.mark.parametrize("font", FONTS)
def test_letters_stay_in_their_cells_whatever_stands_beside_them(font: str) -> None:
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    looks = set()
    for letter in alphabet:
        image = render(f"W{letter}M", font)
        assert (image.size, image.mode) == (SIZE, "L")
        pixels = np.asarray(image)
        cell = pixels[:, CELL[0] : 2 * CELL[0]]
        assert (cell == np.asarray(render(letter, font))[:, : CELL[0]]).all()
        assert (pixels[:, 3 * CELL[0] :] == 255).all()
        ink = np.argwhere(cell < 128)
        assert ink[:, 0].min() >= 4 and ink[:, 0].max() <= 28, "top and bottom stay free"
        assert ink[:, 1].min() >= 1 and ink[:, 1].max() <= 14, "neighbours do not touch"
        looks.add(cell.tobytes())
    assert len(looks) == len(alphabet)


@pytest.mark.parametrize("text", ["", "hello", "TOOLONG", "A B", "É", "A1"])
def test_what_cannot_be_drawn_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="capitals A-Z"):
        render(text)


def test_sizes_that_cannot_be_had_are_refused() -> None:
    with pytest.raises(ValueError, match=r"held_out_words 20000 .* lower it"):
        build_dataset(WordsData(held_out_words=20_000), "train", 0)
    with pytest.raises(ValueError, match=r"train_images 50000 .* different pictures"):
        build_dataset(WordsData(train_images=50_000), "train", 0)
    with pytest.raises(ValueError, match="min_letters 5 is above max_letters 4"):
        WordsData(min_letters=5, max_letters=4)
    with pytest.raises(ValueError, match=r"unknown split 'held-out'. Nearest: held_out"):
        build_dataset(WordsData(), "held-out", 0)  # type: ignore[arg-type]


def test_an_index_past_the_end_ends_iteration() -> None:
    data = build_dataset(WordsData(train_images=3), "train", 0)
    assert len(list(data)) == 3
    assert data[-1].prompt == data[2].prompt
    with pytest.raises(IndexError, match="row 3 of a data set of 3 rows"):
        data[3]
