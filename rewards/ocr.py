"""The text-rendering reward: read the image, compare with the text the prompt asks for."""

import dataclasses
from collections.abc import Sequence
from typing import Literal, Protocol, get_args

from PIL import Image

from rewards.base import Sample, Score
from rewards.gold import GoldPair
from rewards.gold_images import word_image
from rewards.images import CorruptImage, load_all
from rewards.names import nearest
from rewards.text import match_text, match_words, quoted_spans

Level = Literal["characters", "words"]


class Reader(Protocol):
    """Reads text from images."""

    name: str

    def read(self, images: Sequence[Image.Image]) -> list[str]:
        """The text of each RGB image, in order; '' where there is none."""
        ...

    def fingerprint(self) -> str:
        """Identity of the reader: engine, model, settings."""
        ...


class OcrReward:
    """How well the text in the image matches the text asked for; the value is the F-measure of characters
    (`rewards.text.match_text`), or of whole words (`rewards.text.match_words`) where `level` is "words".

    The wanted text is every quoted span of the prompt, or, with `text_column`, that column of the data row (a
    string or a list of strings). Several images of a sample are read as one text. Parts: exact, similarity,
    precision, recall, and words, the F-measure of words; the reason of a score holds what was read. A sample
    without wanted text is unavailable; an image in which nothing is read scores 0, because that is what the policy
    drew; one that does not decode is invalid output.
    """

    def __init__(
        self,
        reader: Reader,
        *,
        name: str = "ocr",
        case_sensitive: bool = False,
        text_column: str | None = None,
        level: Level = "characters",
    ) -> None:
        if level not in (known := get_args(Level)):
            raise ValueError(f"level is characters or words, got {level!r}. {nearest(level, known)}")
        self.name = name
        self.level = level
        self.reader = reader
        self.case_sensitive = case_sensitive
        self.text_column = text_column

    def fingerprint(self) -> str:
        """The reader's identity and the settings of the comparison."""
        settings = f"case={self.case_sensitive} text={self.text_column} level={self.level}"
        return f"ocr/2 [{self.reader.fingerprint()}] {settings}"

    def score(self, samples: Sequence[Sample]) -> list[Score]:
        """One Score a sample; all readable images go to the reader in one call."""
        scores: list[Score | None] = []
        images: list[Image.Image] = []
        pending: list[tuple[int, list[str], int]] = []
        for index, sample in enumerate(samples):
            wanted = self._wanted(sample)
            if isinstance(wanted, Score):
                scores.append(wanted)
                continue
            try:
                loaded = load_all(sample)
            except CorruptImage as error:
                scores.append(Score.invalid_output(str(error)))
                continue
            scores.append(None)
            images.extend(loaded)
            pending.append((index, wanted, len(loaded)))
        readings = iter(self.reader.read(images) if images else [])
        for index, wanted, count in pending:
            scores[index] = self._compare(wanted, "\n".join(next(readings) for _ in range(count)))
        return [score for score in scores if score is not None]

    def gold(self) -> Sequence[GoldPair]:
        """A word against another word, against the word with more behind it, and against a blank image."""

        def drawn(text: str) -> Sample:
            row = {} if self.text_column is None else {self.text_column: "HELLO"}
            return Sample(text, "gold", 'the word "HELLO"', (word_image(text),), row=row)

        wrong = {"another word": "BRICK", "extra text": "HELLO FRIEND", "a blank image": ""}
        return [GoldPair(drawn("HELLO"), drawn(text), f"HELLO against {what}") for what, text in wrong.items()]

    def _wanted(self, sample: Sample) -> list[str] | Score:
        """The wanted spans, or why there are none."""
        if self.text_column is None:
            spans = quoted_spans(sample.prompt)
            missing = f"the prompt has no quoted text: {sample.prompt!r}"
        else:
            column = sample.row.get(self.text_column)
            listed = [column] if isinstance(column, str) else column if isinstance(column, Sequence) else []
            spans = [span for span in listed if isinstance(span, str) and span.strip()]
            missing = f"column {self.text_column!r} holds no text: {column!r}"
        return spans or Score.unavailable(missing)

    def _compare(self, wanted: list[str], read: str) -> Score:
        try:
            match = match_text(wanted, read, case_sensitive=self.case_sensitive)
            by_word = match_words(wanted, read, case_sensitive=self.case_sensitive)
        except ValueError as error:
            return Score.unavailable(str(error))
        score = Score.ok(
            match.f_measure if self.level == "characters" else by_word.f_measure,
            exact=match.exact,
            similarity=match.similarity,
            precision=match.precision,
            recall=match.recall,
            words=by_word.f_measure,
        )
        return dataclasses.replace(score, reason=f"read {read!r}")
