"""What a memory plan takes a prompt to need is what the recipe's longest does need."""

from collections import Counter
from collections.abc import Sequence

import pytest

from rlmm import planned_prompts
from rlmm.config.data import RowsData, ScenesData, WordsData
from rlmm.data.base import Outline
from rlmm.planned_prompts import ASSUMED, Asked, asked_of
from rlmm.policies.spelling import Spelling
from rlmm.policies.tokenizer import character_tokenizer
from rollouts.contract import Grid, Layout

LAYOUT = Layout(vocab_size=200, text=(0, 100), image=(100, 200), bos=1, pad=0, boi=(4, 5), grid=Grid(2, 2))
SPELLING = Spelling(character_tokenizer(), LAYOUT, positions=64)


class Prompts:
    """Rows of which a plan reads prompts alone."""

    def __init__(self, prompts: Sequence[str]) -> None:
        self.prompts, self.excluded = prompts, Counter[str]()

    def __len__(self) -> int:
        return len(self.prompts)

    def outline(self, index: int) -> Outline:
        return Outline(self.prompts[index], 0)


def asked(monkeypatch: pytest.MonkeyPatch, *prompts: str) -> Asked:
    monkeypatch.setattr(planned_prompts, "build_dataset", lambda config, split, seed: Prompts(prompts))
    return asked_of(WordsData(), SPELLING, 0)


def test_the_longest_counts_with_what_stands_around_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert asked(monkeypatch, "a dog", "a cat in a box", "fox") == Asked(14 + 3, sources=False)


def test_what_a_run_leaves_out_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    assert asked(monkeypatch, "a dog", "a long prompt in \u4e2d\u6587").prompt == 5 + 3
    assert asked(monkeypatch, "\u4e2d").prompt == ASSUMED


def test_so_many_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planned_prompts, "LOOKED_AT", 2)
    assert asked(monkeypatch, "a", "ab", "abc").prompt == 2 + 3


def test_files_are_not_opened_and_edits_have_a_source() -> None:
    assert asked_of(RowsData(path="nowhere.jsonl"), SPELLING, 0) == Asked(ASSUMED, sources=False)
    assert asked_of(ScenesData(variant="edit"), SPELLING, 0).sources
