"""Quoted spans and the edit-distance F-measure."""

import itertools

import pytest

from rewards.text import MAX_SPANS, match_text, match_words, normalise, quoted_spans


@pytest.mark.parametrize(
    ("prompt", "spans"),
    [
        ('render "HELLO"', ["HELLO"]),
        ("render 'HELLO'", ["HELLO"]),
        ("a \u201ccafé\u201d and \u2018tea\u2019", ["café", "tea"]),
        ('a sign "NEW YORK" over "SALE"', ["NEW YORK", "SALE"]),
        ("a shop called 'it's ok'", ["it's ok"]),
        ("\u2018it\u2019s\u2019 the dogs\u2019 bowl", ["it\u2019s"]),
        ("say \"he said 'hi' now\"", ["he said 'hi' now"]),
        ('a 5" x 7" print with "A"', ["A"]),
        ('a shirt with "ROUTE 66"', ["ROUTE 66"]),
        ('写着"你好"和「再见」', ["你好", "再见"]),
        ('" X "', ["X"]),
        ("don't draw what you can't", []),
        ('an "unfinished quote', []),
        ('"" and "  "', []),
        ("", []),
    ],
)
def test_every_quoted_span_is_found(prompt: str, spans: list[str]) -> None:
    assert quoted_spans(prompt) == spans


def test_normalising_drops_white_space_case_and_width() -> None:
    assert normalise("New\n Ｙork ﬁt") == "newyorkfit"
    assert normalise("New York", case_sensitive=True) == "NewYork"


def test_a_substitution_costs_its_share() -> None:
    match = match_text(["HELLO"], "hellp")
    assert match.f_measure == match.precision == match.recall == match.similarity == pytest.approx(0.8)
    assert match.exact == 0


def test_extra_text_costs_precision_and_missing_text_costs_recall() -> None:
    extra = match_text(["ABCD"], "ABCDABCD")
    assert (extra.precision, extra.recall, extra.f_measure) == (0.5, 1.0, pytest.approx(2 / 3))
    missing = match_text(["ABCD"], "AB")
    assert (missing.precision, missing.recall, missing.f_measure) == (1.0, 0.5, pytest.approx(2 / 3))


def test_spraying_letters_falls_towards_nothing() -> None:
    values = [match_text(["SALE"], "SALE" + "X" * extra).f_measure for extra in (0, 4, 16, 64)]
    assert values == sorted(values, reverse=True) and values[0] == 1 and values[-1] < 0.12


def test_spans_may_stand_in_any_order_and_letters_may_not() -> None:
    assert match_text(["NEW YORK", "SALE"], "sale\nnewyork").exact == 1
    assert match_text(["NEW YORK"], "YORK NEW").exact == 0


def test_a_missing_span_is_missed() -> None:
    assert match_text(["SALE", "SHOP"], "SALE").f_measure == pytest.approx(2 * 4 / 12)


def test_nothing_read_is_0_and_not_an_error() -> None:
    match = match_text(["HELLO"], " ")
    assert (match.f_measure, match.precision, match.similarity, match.exact) == (0, 0, 0, 0)


def test_case_counts_only_where_asked() -> None:
    assert match_text(["Ab"], "aB").exact == 1
    assert match_text(["Ab"], "aB", case_sensitive=True).f_measure == 0


def test_values_are_shares_and_the_f_measure_is_the_harmonic_mean() -> None:
    texts = ["".join(letters) for n in range(5) for letters in itertools.product("ab", repeat=n)]
    for wanted, read in itertools.product(texts[1:], texts):
        match = match_text([wanted], read)
        assert 0 <= match.similarity <= match.f_measure <= 1
        assert (match.exact == 1) == (wanted == read) == (match.f_measure == 1)
        if match.precision + match.recall:
            harmonic = 2 * match.precision * match.recall / (match.precision + match.recall)
            assert match.f_measure == pytest.approx(harmonic)


def test_no_wanted_text_and_too_many_spans_are_errors() -> None:
    with pytest.raises(ValueError, match="no wanted text"):
        match_text([" "], "X")
    with pytest.raises(ValueError, match=f"at most {MAX_SPANS}"):
        match_text(["A"] * (MAX_SPANS + 1), "X")


@pytest.mark.parametrize(
    ("wanted", "read", "expected"),
    [
        (["OPEN NOW"], "open now", (1.0, 1.0, 1.0)),
        (["OPEN NOW"], "now, open!", (1.0, 1.0, 1.0)),
        (["OPEN NOW"], "opennow", (0.0, 0.0, 0.0)),  # characters alone would call it right
        (["OPEN", "CLOSED"], "open", (2 / 3, 1.0, 0.5)),
        (["go go go"], "go go away", (2 / 3, 2 / 3, 2 / 3)),
        (["it's"], "its", (0.0, 0.0, 0.0)),
        (["stop"], "", (0.0, 0.0, 0.0)),
    ],
)
def test_words_count_whole_and_in_any_order(wanted: list[str], read: str, expected: tuple[float, float, float]) -> None:
    found = match_words(wanted, read)
    assert (found.f_measure, found.precision, found.recall) == pytest.approx(expected)


def test_the_case_of_words_counts_where_asked_and_no_word_is_an_error() -> None:
    assert match_words(["Bar"], "bar", case_sensitive=True).f_measure == 0
    with pytest.raises(ValueError, match="no wanted word"):
        match_words(["--", " "], "bar")
