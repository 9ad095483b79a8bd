"""The OCR reward: its policy with a scripted reader, and the two real engines on rendered words."""

import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from PIL import Image, ImageFile

from rewards import build
from rewards.base import Reward, Sample
from rewards.gold import HasGold, gold_check_pairs
from rewards.gold_images import word_image
from rewards.ocr import Level, OcrReward
from rewards.paddle import PaddleReader

ROOT = Path(__file__).resolve().parents[2]
ENGINES = ["ocr", "tesseract"]
WORDS = ["GARDEN", "STONE", "BRIDGE", "LAMP", "TRAIN", "HOUSE", "WINTER", "CANDLE"]


class Scripted:
    """A reader that reads what it is told, one text an image."""

    name = "scripted"

    def __init__(self, *texts: str) -> None:
        self.texts = texts
        self.asked = 0

    def fingerprint(self) -> str:
        return "scripted"

    def read(self, images: Sequence[Image.Image]) -> list[str]:
        self.asked += len(images)
        return list(self.texts)


def torn_png(folder: Path) -> Image.Image:
    """A PNG whose header reads and whose pixels do not."""
    path = folder / "torn.png"
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:2000])
    return Image.open(path)


@cache
def engine(name: str) -> Reward:
    return build(name)


def drawn(prompt: str, text: str) -> Sample:
    return Sample(f"{prompt} {text}", "g", prompt, (word_image(text),))


def test_scores_go_to_their_own_samples_past_those_without_one(tmp_path: Path) -> None:
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    samples = [
        drawn('write "CAT"', "x"),
        drawn("write nothing", "x"),
        Sample("torn", "g", 'write "CAT"', (torn_png(tmp_path),)),
        Sample("none", "g", 'write "CAT"'),
        drawn('write "DOG"', "x"),
    ]
    reader = Scripted("CAT", "DOT")
    scores = OcrReward(reader).score(samples)
    assert [score.status for score in scores] == ["ok", "unavailable", *["invalid_output"] * 2, "ok"]
    assert (scores[0].value, scores[0].parts["exact"], scores[0].reason) == (1.0, 1.0, "read 'CAT'")
    assert "write nothing" in scores[1].reason
    assert scores[4].value == pytest.approx(2 / 3) and scores[4].parts["exact"] == 0
    assert reader.asked == 2


def test_several_images_of_a_sample_are_one_text() -> None:
    image = word_image("x")
    sample = Sample("s", "g", 'write "ONE" and "TWO"', (image, image))
    assert OcrReward(Scripted("TWO", "ONE")).score([sample])[0].value == 1


@pytest.mark.parametrize("column", ["CAT", ["CAT"]])
def test_the_text_may_come_from_a_column(column: str | list[str]) -> None:
    sample = Sample("s", "g", 'not "this"', (word_image("x"),), row={"text": column})
    assert OcrReward(Scripted("cat"), text_column="text").score([sample])[0].value == 1
    empty = Sample("s", "g", 'not "this"', (word_image("x"),), row={"text": None})
    score = OcrReward(Scripted(), text_column="text").score([empty])[0]
    assert score.status == "unavailable" and "'text'" in score.reason


def test_settings_are_part_of_the_fingerprint() -> None:
    rewards = [
        OcrReward(Scripted()),
        OcrReward(Scripted(), case_sensitive=True),
        OcrReward(Scripted(), text_column="text"),
    ]
    prints = {reward.fingerprint() for reward in rewards}
    assert len(prints) == 3


@pytest.mark.parametrize("name", ENGINES)
def test_an_engine_reads_words_and_tells_shuffled_prompts_apart(name: str) -> None:
    right = engine(name).score([drawn(f'the word "{word}"', word) for word in WORDS])
    assert np.mean([score.parts["exact"] for score in right]) >= 7 / 8
    shuffled = engine(name).score(
        [drawn(f'the word "{word}"', other) for word, other in zip(WORDS, WORDS[1:] + WORDS[:1], strict=True)]
    )
    assert max(score.parts["exact"] for score in shuffled) == 0
    assert np.mean([score.value or 0 for score in shuffled]) < 0.35


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("color", ["white", "black", "gray"])
def test_a_blank_image_is_a_score_of_0(name: str, color: str) -> None:
    score = engine(name).score([Sample("s", "g", 'the word "LAMP"', (Image.new("RGB", (96, 32), color),))])[0]
    assert (score.status, score.value, score.reason) == ("ok", 0.0, "read ''")


@pytest.mark.parametrize("name", ENGINES)
def test_an_engine_reads_a_line_of_words_and_extra_text_costs(name: str) -> None:
    line, extra = engine(name).score([drawn('"OPEN NOW"', "OPEN NOW"), drawn('"OPEN"', "OPEN NOW")])
    assert line.value == 1
    assert extra.parts["recall"] == 1 and extra.parts["precision"] == pytest.approx(4 / 7)


@pytest.mark.parametrize("name", ENGINES)
def test_an_engine_passes_its_gold_check(name: str) -> None:
    reward = engine(name)
    assert isinstance(reward, HasGold)
    assert gold_check_pairs(reward, reward.gold()).passed


def test_a_reading_does_not_depend_on_its_batch() -> None:
    reader = PaddleReader(batch_size=3)
    images = [word_image(word) for word in [*WORDS, "A LONGER LINE OF TEXT"]]
    assert reader.read(images) == [reader.read([image])[0] for image in images]


def test_the_dropped_softmax_changes_no_reading() -> None:
    import onnxruntime

    from rewards.paddle import bundled_model

    reader = PaddleReader()
    session = onnxruntime.InferenceSession(bundled_model(), providers=["CPUExecutionProvider"])
    characters = session.get_modelmeta().custom_metadata_map["character"].split("\n")
    for word in WORDS[:3]:
        pixels = reader._prepare(word_image(word))[None]
        (chances_1TV,) = session.run(None, {"x": pixels})
        best = np.asarray(chances_1TV)[0].argmax(axis=-1)
        merged = [int(k) for at, k in enumerate(best) if k and (at == 0 or k != best[at - 1])]
        assert reader.read([word_image(word)]) == ["".join(characters[k - 1] for k in merged)]


def test_limited_characters_and_a_lower_height_still_read() -> None:
    reader = PaddleReader(height=32, characters="ABCDEFGHIJKLMNOPQRSTUVWXYZ")
    assert reader.read([word_image(word) for word in WORDS]) == WORDS
    assert PaddleReader(characters="0123456789").read([word_image("2024")]) == ["2024"]


def test_characters_that_the_model_lacks_are_named() -> None:
    with pytest.raises(ValueError, match="knows no 'Ж'"):
        PaddleReader(characters="ABЖ")


def test_a_model_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere.onnx"):
        PaddleReader(model=tmp_path / "nowhere.onnx")
    with pytest.raises(FileNotFoundError, match="xyz.traineddata"):
        build("tesseract", language="xyz", tessdata=str(tmp_path))


def test_rewards_need_no_torch_and_load_no_engine_before_it_is_asked_for() -> None:
    code = (
        "import sys, rewards\n"
        "heavy = {'torch', 'onnxruntime', 'onnx', 'tesserocr', 'skimage', 'transformers'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "for name in ('ocr', 'tesseract', 'scenes'):\n"
        "    rewards.build(name)\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_level_says_whether_words_or_characters_are_the_value() -> None:
    sample = Sample("s", "g", 'a sign "OPEN NOW"', (Image.new("RGB", (8, 8)),))
    values = {}
    for level in get_args(Level):
        (score,) = OcrReward(Scripted("opennow"), level=level).score([sample])
        assert score.parts["words"] == 0 and score.parts["exact"] == 1
        values[level] = score.value
    assert values == {"characters": 1.0, "words": 0.0}
    with pytest.raises(ValueError, match="word"):
        OcrReward(Scripted(), level="word")  # pyrefly: ignore[bad-argument-type]
