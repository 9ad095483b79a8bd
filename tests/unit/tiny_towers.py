"""Real two-tower classes at a tiny random size, written to a folder as a checkpoint is."""

from pathlib import Path
from string import ascii_lowercase
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, PreTrainedTokenizerFast, SiglipConfig, SiglipModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

SIDE, TOKENS = 16, 20


def _text(vocabulary: int, **ids: int) -> dict[str, Any]:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return {"vocab_size": vocabulary, "max_position_embeddings": TOKENS, **sizes, **ids}


def _vision() -> dict[str, Any]:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return {"image_size": SIDE, "patch_size": 8, **sizes}


def write_clip(folder: Path, seed: int = 0) -> str:
    """A CLIPModel with its own tokenizer (letters, no merges) and image processor."""
    letters = [*ascii_lowercase, *(letter + "</w>" for letter in ascii_lowercase)]
    vocabulary = {token: at for at, token in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    start, end = len(letters), len(letters) + 1
    text = _text(len(vocabulary), bos_token_id=start, eos_token_id=end, pad_token_id=end)
    torch.manual_seed(seed)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=_vision(), projection_dim=12))
    _widen(model)
    model.save_pretrained(folder)
    CLIPTokenizer(vocab=vocabulary, merges=[]).save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}).save_pretrained(
        folder
    )
    return str(folder)


def write_siglip(folder: Path, seed: int = 0) -> str:
    """A SiglipModel with its image processor, and a tokenizer of letters in place of its SentencePiece model."""
    vocabulary = {token: at for at, token in enumerate(["<pad>", "</s>", *ascii_lowercase])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="</s>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(" ", "")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    text = _text(len(vocabulary), pad_token_id=0, eos_token_id=1, bos_token_id=1)
    torch.manual_seed(seed)
    model = SiglipModel(SiglipConfig(text_config=text, vision_config=_vision()))
    _widen(model)
    torch.nn.init.constant_(model.logit_scale, 1.5)
    torch.nn.init.constant_(model.logit_bias, -0.7)
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="</s>"
    ).save_pretrained(folder)
    SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    return str(folder)


def _widen(model: torch.nn.Module) -> None:
    """Larger weights, so that different pictures and texts give vectors that differ by more than rounding."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3)
