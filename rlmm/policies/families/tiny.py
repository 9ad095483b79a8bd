"""A tokenizer with a published checkpoint's special tokens at their ids, and characters for all other text."""

import string
from collections.abc import Mapping

from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer

UNKNOWN = "<unknown>"


def published_tokenizer(
    special: Mapping[str, int], codes: Mapping[str, int], *, bos: str, eos: str, pad: str, first: int = 10
) -> PreTrainedTokenizerFast:
    """Printable ASCII characters, one token each, at the free ids from `first` on; `special` and `codes` at theirs."""
    taken = {*special.values(), *codes.values()}
    free = (number for number in range(first, 1 << 30) if number not in taken)
    characters = [c for c in string.printable if c in " \n" or not c.isspace()]
    vocabulary = {**special, **codes, **{c: next(free) for c in (UNKNOWN, *characters)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        unk_token=UNKNOWN,
        additional_special_tokens=[name for name in special if name not in (bos, eos, pad)],
    )


def qwen_tokenizer(
    special: Mapping[str, int], codes: Mapping[str, int] | None = None, *, eos: str, pad: str
) -> Qwen2Tokenizer:
    """Qwen's own tokenizer, which transformers builds the same way whatever the files say, without merges: one token a
    byte at Qwen's ids, 0 to 255, and `special` and `codes` at theirs."""
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {**{c: number for number, c in enumerate(characters)}, **special, **(codes or {})}
    return Qwen2Tokenizer(
        vocab=vocabulary,
        merges=[],
        eos_token=eos,
        pad_token=pad,
        additional_special_tokens=[name for name in special if name not in (eos, pad)],
    )
