"""Text asked for against text read: quoted spans, normalisation, and F-measures of characters and of words."""

import itertools
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from rapidfuzz.distance import Levenshtein

MAX_SPANS = 6
"""More spans than this cannot be compared in every order (6! = 720 orders)."""

# A straight double quote after a digit is an inch sign. A single quote opens only at the start of a word and
# closes only at its end, so apostrophes stay apostrophes.
_QUOTED = re.compile(
    r'(?<!\d)"([^"]*)"'
    r"|\u201c([^\u201d]*)\u201d"
    r"|\u201e([^\u201c\u201d]*)[\u201c\u201d]"
    r"|\u300c([^\u300d]*)\u300d"
    r"|(?<!\w)'((?:[^']|(?<=\w)'(?=\w))*)'(?!\w)"
    r"|(?<!\w)\u2018((?:[^\u2019]|(?<=\w)\u2019(?=\w))*)\u2019(?!\w)"
)


def quoted_spans(prompt: str) -> list[str]:
    """Every quoted, non-blank span of a prompt, in order, without its quotes.

    Knows straight double and single quotes, curly double and single quotes, low-high quotes and corner
    brackets. A span quoted inside another one is part of the outer span.
    """
    spans = (next(group for group in match.groups() if group is not None) for match in _QUOTED.finditer(prompt))
    return [span.strip() for span in spans if span.strip()]


def normalise(text: str, *, case_sensitive: bool = False) -> str:
    """The form in which texts are compared: Unicode NFKC, no white space, and casefolded unless case counts.

    White space goes because recognisers guess it: letter spacing in a drawing is not a spelling mistake.
    """
    bare = "".join(unicodedata.normalize("NFKC", text).split())
    return bare if case_sensitive else bare.casefold()


@dataclass(frozen=True)
class TextMatch:
    """How well a reading matches the wanted text; all fields in [0, 1], `exact` is 0 or 1."""

    f_measure: float
    precision: float
    recall: float
    similarity: float
    exact: float


def match_text(wanted: Sequence[str], read: str, *, case_sensitive: bool = False) -> TextMatch:
    """Compares the wanted spans with one reading.

    Both sides are normalised. The spans t are joined in the order (of all orders) that fits the reading r
    best, so the layout of several spans is free, while the order within a span counts. With d the Levenshtein
    distance of t and r over characters::

        hits       = max(|t|, |r|) - d     characters that need no edit
        precision  = hits / |r|            falls with extra text (0 for an empty reading)
        recall     = hits / |t|            falls with missing text
        f_measure  = 2 * hits / (|t| + |r|)
        similarity = hits / max(|t|, |r|)  = 1 - normalised edit distance

    For a reading as long as the wanted text all four are equal. Raises ValueError for no wanted text, or for
    more than MAX_SPANS spans.
    """
    spans = [span for span in (normalise(span, case_sensitive=case_sensitive) for span in wanted) if span]
    if not spans:
        raise ValueError("there is no wanted text to compare with")
    if len(spans) > MAX_SPANS:
        raise ValueError(f"{len(spans)} wanted spans; at most {MAX_SPANS} can be compared in every order")
    reading = normalise(read, case_sensitive=case_sensitive)
    orders = {"".join(order) for order in itertools.permutations(spans)}
    distance = min(Levenshtein.distance(order, reading) for order in orders)
    length = sum(map(len, spans))
    longest = max(length, len(reading))
    hits = longest - distance
    return TextMatch(
        f_measure=2 * hits / (length + len(reading)),
        precision=hits / len(reading) if reading else 0.0,
        recall=hits / length,
        similarity=hits / longest,
        exact=float(distance == 0),
    )


def words(text: str, *, case_sensitive: bool = False) -> list[str]:
    """The words of a text, normalised: what stands between white space, without the punctuation around it. A script
    that puts no space between words is one word a run.
    """
    bare = (re.sub(r"^[\W_]+|[\W_]+$", "", word) for word in text.split())
    return [normalise(word, case_sensitive=case_sensitive) for word in bare if word]


@dataclass(frozen=True)
class WordMatch:
    """How many words were read as they were wanted; all fields in [0, 1]."""

    f_measure: float
    precision: float
    recall: float


def match_words(wanted: Sequence[str], read: str, *, case_sensitive: bool = False) -> WordMatch:
    """Compares the words of the wanted spans with those of one reading, whatever their order; a word counts as often as
    it stands on both sides, and only whole::

        hits      = sum over words of min(times wanted, times read)
        precision = hits / words read      (0 for an empty reading)
        recall    = hits / words wanted
        f_measure = 2 * hits / (wanted + read)

    Raises ValueError for no wanted word.
    """
    asked = Counter(word for span in wanted for word in words(span, case_sensitive=case_sensitive))
    found = Counter(words(read, case_sensitive=case_sensitive))
    if not asked:
        raise ValueError("there is no wanted word to compare with")
    hits = (asked & found).total()
    return WordMatch(
        f_measure=2 * hits / (asked.total() + found.total()),
        precision=hits / found.total() if found else 0.0,
        recall=hits / asked.total(),
    )
