"""A judge for tests: a real Idefics3 at a tiny random size, in a folder that `vllm serve` takes."""

from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    LlamaConfig,
    PreTrainedTokenizerFast,
)
from transformers.models.idefics3.configuration_idefics3 import Idefics3VisionConfig
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

SIDE, PATCH, MERGED = 16, 4, 2
UNKNOWN, START, END = "<unk>", "<s>", "</s>"
PICTURE = ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]
VOCABULARY = [UNKNOWN, START, END, *PICTURE, "Yes", "yes", "No", *"0123456789"]
"""Twenty tokens, as many as a server lists the log-probabilities of."""
WRITING = [UNKNOWN, START, END, *PICTURE, *'{}":,', *"0123456789", "reasoning", "success", "faithful", "dull", " "]
"""What a JSON object of marks is written with."""
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}<image>{% endif %}"
    "{% endfor %}{% endif %}{% endfor %}"
)


def write_judge(folder: Path, seed: int = 0, vocabulary: Sequence[str] = VOCABULARY) -> str:
    """An Idefics3ForConditionalGeneration and its processor; of a text it knows the words of its vocabulary."""
    ids = {token: at for at, token in enumerate(vocabulary)}
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = LlamaConfig(
        vocab_size=len(ids), max_position_embeddings=2048, bos_token_id=ids[START], eos_token_id=ids[END],
        pad_token_id=ids[END], **sizes,
    )  # fmt: skip
    vision = Idefics3VisionConfig(image_size=SIDE, patch_size=PATCH, **sizes)
    config = Idefics3Config(
        vision_config=vision, text_config=text, scale_factor=MERGED, image_token_id=ids[PICTURE[0]],
        pad_token_id=ids[END],
    )  # fmt: skip
    torch.manual_seed(seed)
    model = Idefics3ForConditionalGeneration(config)
    with torch.no_grad():  # large weights, so that different pictures get different answers
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3)
        model.lm_head.weight[: len([UNKNOWN, START, END, *PICTURE])] = 0  # seldom said
    model.save_pretrained(folder)
    _processor(vocabulary).save_pretrained(folder)
    return str(folder)


def _processor(vocabulary: Sequence[str]) -> Idefics3Processor:
    tokenizer = Tokenizer(models.WordLevel({token: at for at, token in enumerate(vocabulary)}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.Fuse()  # an answer is its tokens, with nothing between them
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token=UNKNOWN, bos_token=START, eos_token=END, pad_token=END,
        additional_special_tokens=PICTURE,
    )  # fmt: skip
    edge = {"longest_edge": SIDE}
    pictures = Idefics3ImageProcessorPil(size=edge, max_image_size=edge, do_image_splitting=False)
    return Idefics3Processor(pictures, fast, image_seq_len=(SIDE // PATCH // MERGED) ** 2, chat_template=TEMPLATE)
