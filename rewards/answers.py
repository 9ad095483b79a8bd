"""What the policy wrote against what it might rightly have written: `Sample.text` and `Sample.target_texts`.

Exact match is ours; the others are the field's packages, of the extra `answers`, each imported where it is used. Every
score is in [0, 1], CIDEr's in [0, 10], and more is better.
"""

import hashlib
import importlib
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rewards.base import Sample, Score
from rewards.gold import GoldPair

Compare = Callable[[str, Sequence[str]], float]


class AnswerReward:
    """`compare(text, references)` of each sample. Without references a sample is the data's fault, not the policy's:
    its score is unavailable. An empty text is a wrong answer, and scores 0."""

    def __init__(self, name: str, compare: Compare, identity: str) -> None:
        self.name, self._compare, self._identity = name, compare, identity

    def score(self, samples: Sequence[Sample]) -> list[Score]:
        return [self._one(sample) for sample in samples]

    def fingerprint(self) -> str:
        return self._identity

    def gold(self) -> list[GoldPair]:
        good, bad = (
            Sample(f"{self.name}/{text}", self.name, "what is shown?", text=text, target_texts=("two red circles",))
            for text in ("two red circles", "a blue square")
        )
        return [GoldPair(good, bad, "the right answer and another one")]

    def _one(self, sample: Sample) -> Score:
        if not any(text.strip() for text in sample.target_texts):
            return Score.unavailable("the row has no text to compare with; name it in data.text_column")
        return Score.ok(self._compare(sample.text, sample.target_texts) if sample.text.strip() else 0.0)


def plain(text: str) -> str:
    """The form in which answers are compared: NFKC, casefolded, one space between words, none at the ends."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def exact_match() -> AnswerReward:
    """1 where the text is one of the references, case and white space apart."""
    return AnswerReward(
        "exact_match", lambda text, wanted: float(plain(text) in {plain(one) for one in wanted}), "exact_match/1"
    )


def anls(threshold: float) -> AnswerReward:
    """1 - the least normalised edit distance to a reference, 0 from `threshold` on (Biten et al. 2019, eq. 1)."""
    if not 0 < threshold <= 1:
        raise ValueError(f"anls: threshold {threshold} must be in (0, 1]; the published one is 0.5")
    score = _package("anls").anls_score
    return AnswerReward("anls", lambda text, wanted: score(text, list(wanted), threshold), f"anls/1 {threshold}")


def wer() -> AnswerReward:
    """1 - the least word error rate to a reference, at least 0."""
    rate = _package("jiwer").wer
    return AnswerReward(
        "wer", lambda text, wanted: max(0.0, 1 - min(rate(plain(one), plain(text)) for one in wanted)), "wer/1"
    )


def bleu() -> AnswerReward:
    """Sentence BLEU of up to four words in a row, of those that are there (sacrebleu's effective order), in [0, 1]."""
    sentence = _package("sacrebleu").sentence_bleu
    return AnswerReward(
        "bleu", lambda text, wanted: sentence(plain(text), [plain(one) for one in wanted]).score / 100, "bleu/1"
    )


def cider(corpus: str) -> AnswerReward:
    """CIDEr-D (Vedantam et al. 2015, section 5), in [0, 10]. How rare a phrase is says `corpus`, a text file with a
    reference a line, so that a score does not depend on the samples beside it."""
    lines = [plain(line) for line in Path(corpus).read_text(encoding="utf-8").splitlines() if line.strip()]
    if len(lines) < 2:
        raise ValueError(f"cider: {corpus} has {len(lines)} references; rarity needs many, one a line")
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
    return AnswerReward("cider", _Cider(lines), f"cider/1 {digest}")


class _Cider:
    def __init__(self, lines: Sequence[str]) -> None:
        self._module = _package("pycocoevalcap.cider.cider_scorer")
        counted = self._module.CiderScorer(n=4, sigma=6.0)
        for line in lines:
            counted.cook_append(None, [line])
        counted.compute_doc_freq()
        self._counted = counted

    def __call__(self, text: str, wanted: Sequence[str]) -> float:
        scorer = self._module.CiderScorer(test=plain(text), refs=[plain(one) for one in wanted], n=4, sigma=6.0)
        scorer.document_frequency = self._counted.document_frequency
        # Only the first has a text to score; the number of references is what frequencies are a share of.
        scorer.crefs = [*scorer.crefs, *self._counted.crefs]
        return float(scorer.compute_cider()[0])


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"{name} is not installed ({error}); install the extra `answers`: pip install rlmm[answers]"
        ) from error
