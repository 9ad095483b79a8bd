"""The character tokenizer of the small shipped policy: an ordinary transformers tokenizer, saved with the model."""

import string

from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PAD, BOS, EOS, UNK, BOI, EOI, EOL, NULL = "<pad>", "<bos>", "<eos>", "<unk>", "<boi>", "<eoi>", "<eol>", "<null>"
SPECIAL = (PAD, BOS, EOS, UNK, BOI, EOI, EOL, NULL)


def character_tokenizer() -> PreTrainedTokenizerFast:
    """One token a printable ASCII character, after the special tokens. Anything else is `<unk>`."""
    characters = [c for c in string.printable if c in " \n" or not c.isspace()]
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        additional_special_tokens=[BOI, EOI, EOL, NULL],
    )
