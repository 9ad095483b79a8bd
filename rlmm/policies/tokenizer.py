"""The character tokenizer of the small shipped policy: an ordinary transformers tokenizer, saved with the model."""

import re
import string
from collections.abc import Sequence

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PAD, BOS, EOS, UNK, BOI, EOI, EOL, NULL = "<pad>", "<bos>", "<eos>", "<unk>", "<boi>", "<eoi>", "<eol>", "<null>"
SPECIAL = (PAD, BOS, EOS, UNK, BOI, EOI, EOL, NULL)


def character_tokenizer(words: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """One token a printable ASCII character, after the special tokens. Anything else is `<unk>`.

    Each of `words` is a token too, and another one with the space before it; letters that go on are no such word.
    """
    characters = [c for c in string.printable if c in " \n" or not c.isspace()]
    pieces = [piece for word in words for piece in (f" {word}", word) if piece not in characters]
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *characters, *pieces])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNK))
    whole = "|".join(rf" ?\b{re.escape(word)}\b" for word in words)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(f"{whole}|[\\s\\S]" if words else r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()  # pieces hold their own spaces
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        additional_special_tokens=[BOI, EOI, EOL, NULL],
    )
