"""A Llama-style transformers model with text and image codes in one vocabulary."""

from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rlmm.config.policy import NewPolicy
from rlmm.policies.causal import CausalPolicy
from rlmm.policies.layout_io import load_layout
from rlmm.policies.masked import MaskedPolicy
from rlmm.policies.spelling import Spelling
from rlmm.policies.tokenizer import BOI, BOS, EOL, NULL, PAD, character_tokenizer
from rlmm.policies.transformer import TransformerPolicy
from rollouts.contract import Grid, Layout


def build(config: NewPolicy, *, num_codes: int, grid: tuple[int, int], seed: int) -> TransformerPolicy:
    """A fresh policy over a codec's codes; its weights are a function of `seed` alone."""
    tokenizer = character_tokenizer(config.words)
    token = {name: tokenizer.get_vocab()[name] for name in (PAD, BOS, BOI, EOL, NULL)}
    text_size = len(tokenizer)
    masked = config.family == "masked"
    layout = Layout(
        vocab_size=text_size + num_codes + masked,
        text=(0, text_size),
        image=(text_size, text_size + num_codes),
        bos=token[BOS],
        pad=token[PAD],
        boi=token[BOI],
        grid=Grid(*grid, row_end=token[EOL] if config.row_ends else None),
        null_prompt=(token[NULL],),
        null_token=token[NULL] if config.null == "token" else None,
        mask=text_size + num_codes if masked else None,
    )
    llama = LlamaConfig(
        vocab_size=layout.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_heads,
        max_position_embeddings=config.max_positions,
        tie_word_embeddings=config.tie_embeddings,
        pad_token_id=layout.pad,
        bos_token_id=layout.bos,
        eos_token_id=None,
    )
    if masked:
        llama.is_causal = False  # read where transformers makes its attention masks
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(llama)
    return _policy(cast(PreTrainedModel, model), cast(PreTrainedTokenizerBase, tokenizer), layout)


def _policy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, layout: Layout) -> TransformerPolicy:
    """Of the family that the layout is of."""
    return (CausalPolicy if layout.mask is None else MaskedPolicy)(model, tokenizer, layout)


def load(folder: Path) -> TransformerPolicy:
    """The policy a stage or `rlmm export` wrote. Raises ValueError naming the folder where it cannot be read."""
    layout = load_layout(folder)
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{folder} is not a readable checkpoint ({error}); give a complete model folder") from error
    return _policy(cast(PreTrainedModel, model), cast(PreTrainedTokenizerBase, tokenizer), layout)


def load_config(folder: Path) -> PretrainedConfig:
    """The model's configuration. Raises ValueError as `load` does."""
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} is not a readable checkpoint ({error}); give a complete model folder") from error


def load_spelling(folder: Path) -> Spelling:
    """How the policy in a folder spells prompts, without its weights. Raises ValueError as `load` does."""
    layout, config = load_layout(folder), load_config(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} is not a readable checkpoint ({error}); give a complete model folder") from error
    return Spelling(cast(PreTrainedTokenizerBase, tokenizer), layout, config.max_position_embeddings)
