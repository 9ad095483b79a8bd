"""Real detector classes at a tiny random size, written to a folder as a checkpoint is."""

from pathlib import Path
from string import ascii_lowercase
from typing import Any

import torch
from transformers import (
    BertConfig,
    BertTokenizer,
    CLIPTokenizer,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    Owlv2Config,
    Owlv2ForObjectDetection,
    SwinConfig,
)
from transformers.models.grounding_dino.image_processing_pil_grounding_dino import GroundingDinoImageProcessorPil
from transformers.models.grounding_dino.processing_grounding_dino import GroundingDinoProcessor
from transformers.models.owlv2.image_processing_pil_owlv2 import Owlv2ImageProcessorPil
from transformers.models.owlv2.processing_owlv2 import Owlv2Processor


def write_owl(folder: Path) -> str:
    """An Owlv2ForObjectDetection with its processor."""
    letters = [*ascii_lowercase, *(letter + "</w>" for letter in ascii_lowercase)]
    vocabulary = {token: at for at, token in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"bos_token_id": 52, "eos_token_id": 53, "pad_token_id": 53}
    text = {"vocab_size": len(vocabulary), "max_position_embeddings": 32, **ids, **sizes}
    vision = {"image_size": 32, "patch_size": 8, **sizes}
    torch.manual_seed(0)
    model = Owlv2ForObjectDetection(Owlv2Config(text_config=text, vision_config=vision, projection_dim=16))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3)
    model.save_pretrained(folder)
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=32)
    pixels = Owlv2ImageProcessorPil(size={"height": 32, "width": 32})
    Owlv2Processor(image_processor=pixels, tokenizer=tokenizer).save_pretrained(folder)
    return str(folder)


def write_grounding_dino(folder: Path) -> str:
    """A GroundingDinoForObjectDetection with its processor."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "?"]
    letters = [*ascii_lowercase, *("##" + letter for letter in ascii_lowercase)]
    vocabulary = {token: at for at, token in enumerate([*special, *letters])}
    sizes: dict[str, Any] = {"image_size": 32, "patch_size": 4, "embed_dim": 8, "window_size": 2}
    shape: dict[str, Any] = {"depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2]}
    swin = SwinConfig(**sizes, **shape)
    swin.out_features = ["stage2", "stage3", "stage4"]
    bert = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    config = GroundingDinoConfig(
        backbone_config=swin,
        text_config=bert,
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        num_queries=6,
        max_text_len=32,
        encoder_n_points=2,
        decoder_n_points=2,
    )
    GroundingDinoForObjectDetection(config).save_pretrained(folder)
    pixels = GroundingDinoImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 128})
    GroundingDinoProcessor(pixels, BertTokenizer(vocab=vocabulary)).save_pretrained(folder)
    return str(folder)
