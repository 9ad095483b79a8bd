"""Text against reference texts: each metric against its definition on small examples."""

from pathlib import Path

import numpy as np
import pytest

from rewards import build
from rewards.base import Sample
from rewards.cache import cache_key
from rewards.gold import gold_check_pairs

REFERENCES = ("two red circles and a blue square", "a blue square and two red circles")
NAMES = ("exact_match", "anls", "wer", "bleu")


def score(name: str, text: str, references: tuple[str, ...] = REFERENCES, **options: object) -> float | None:
    (found,) = build(name, **options).score([Sample("a", "a", "what?", text=text, target_texts=references)])
    return found.value


@pytest.mark.parametrize("name", NAMES)
def test_every_reference_is_right_case_and_spaces_apart(name: str) -> None:
    for text in (*REFERENCES, " Two red  circles and a BLUE square\n"):
        assert score(name, text) == pytest.approx(1.0)
    assert score(name, "") == 0.0 and score(name, "nothing of it at all here") == pytest.approx(0.15, abs=0.15)


@pytest.mark.parametrize("name", NAMES)
def test_the_gold_pair_is_in_order_and_without_references_there_is_no_score(name: str) -> None:
    reward = build(name)
    assert gold_check_pairs(reward, reward.gold()).passed  # pyrefly: ignore
    assert score(name, "two", ()) is None


def test_values_of_the_definitions() -> None:
    assert score("exact_match", "two red circles") == 0.0
    assert score("wer", "two red squares", ("two red circles",)) == pytest.approx(1 - 1 / 3)
    assert score("anls", "abcx", ("abcd",)) == pytest.approx(0.75)
    assert score("anls", "xxcd", ("abcd",)) == 0.0, "from half of the letters on, nothing"
    assert score("anls", "xxcd", ("abcd",), threshold=0.6) == pytest.approx(0.5)
    # 3 of 4 words, 2 of 3 pairs, 1 of 2 triples, no four in a row (smoothed to half a count, as sacrebleu's exp does)
    assert score("bleu", "a b c x", ("a b c d",)) == pytest.approx((3 / 4 * 2 / 3 * 1 / 2 * 1 / 2) ** (1 / 4))


def test_cider_is_its_definition_and_depends_on_no_other_sample(tmp_path: Path) -> None:
    corpus = ["a red circle", "a blue circle", "two green squares", "a red square"]
    (tmp_path / "corpus.txt").write_text("\n".join(corpus))

    def vectors(text: str) -> list[dict[tuple[str, ...], float]]:
        words, made = text.split(), []
        for n in range(1, 5):
            grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
            seen = {
                g: sum(g in {tuple(c.split()[i : i + n]) for i in range(len(c.split()))} for c in corpus) for g in grams
            }
            made.append({g: grams.count(g) * (np.log(5) - np.log(max(1, seen[g]))) for g in grams})
        return made

    def by_definition(text: str, reference: str) -> float:
        total = 0.0
        for a, b in zip(vectors(text), vectors(reference), strict=True):
            norms = np.sqrt(sum(v**2 for v in a.values())) * np.sqrt(sum(v**2 for v in b.values()))
            if norms:
                total += sum(min(a[g], b.get(g, 0)) * b.get(g, 0) for g in a) / norms
        gap = len(text.split()) - len(reference.split())
        return 10 * total / 4 * np.exp(-(gap**2) / (2 * 36))

    reward = build("cider", corpus=str(tmp_path / "corpus.txt"))
    texts = ["a red circle", "a red square", "two green squares"]
    samples = [Sample(t, "g", "?", text=t, target_texts=("a red circle",)) for t in texts]
    together = [one.value for one in reward.score(samples)]
    assert together == [reward.score([one])[0].value for one in samples]
    assert together == pytest.approx([by_definition(text, "a red circle") for text in texts])
    with pytest.raises(ValueError, match="rarity needs many"):
        (tmp_path / "one.txt").write_text("a red circle")
        build("cider", corpus=str(tmp_path / "one.txt"))


def test_references_are_part_of_what_a_score_is_kept_by() -> None:
    one, other = (Sample("a", "a", "what?", text="x", target_texts=(text,)) for text in ("x", "y"))
    assert cache_key(one, "judge") != cache_key(other, "judge")
