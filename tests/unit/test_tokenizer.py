"""The tokenizer of the small policy: characters, and whole words where the recipe names them."""

import pytest

from rlmm.config.policy import NewPolicy
from rlmm.policies.tokenizer import character_tokenizer


def test_without_words_a_prompt_is_spelled_in_characters() -> None:
    assert character_tokenizer().tokenize("a red") == ["a", " ", "r", "e", "d"]


def test_named_words_are_one_token_with_the_space_before_them() -> None:
    tokenizer = character_tokenizer(["two", "red", "circle", "circles", "a"])
    assert tokenizer.tokenize("two red circles a") == ["two", " red", " circles", " a"]
    ids = tokenizer("two red circles a").input_ids
    assert tokenizer.unk_token_id not in ids and len(set(ids)) == 4


def test_a_word_inside_another_one_is_spelled_in_characters() -> None:
    tokenizer = character_tokenizer(["red", "a"])
    assert tokenizer.tokenize("redder") == list("redder")
    assert tokenizer.tokenize("tsared red") == [*"tsared", " red"]


def test_words_keep_the_ids_of_the_characters() -> None:
    plain, worded = character_tokenizer().get_vocab(), character_tokenizer(["red"]).get_vocab()
    assert plain.items() <= worded.items() and len(worded) == len(plain) + 2


@pytest.mark.parametrize(("words", "message"), [(("red", "blue", "red"), "'red' twice"), (("left of",), "pattern")])
def test_words_that_cannot_be_tokens_are_refused(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NewPolicy(words=words)
