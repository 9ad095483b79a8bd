"""Any causal model of transformers whose vocabulary holds text and image codes: the folder says where (layout.json)."""

from typing import cast

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from rlmm.codecs import Codec
from rlmm.config.policy import NewPolicy
from rlmm.policies.causal import CausalPolicy
from rlmm.policies.families.base import Checkpoint, Family
from rlmm.policies.masked import MaskedPolicy
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
        boi=(token[BOI],),
        grid=Grid(*grid, row_end=token[EOL] if config.row_ends else None),
        null_prompt=(token[NULL],),
        null_token=token[NULL] if config.null == "token" else None,
        mask=text_size + num_codes if masked else None,
        causal_prompt=config.prompt_attention == "causal",
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
    return policy(cast(PreTrainedModel, model), cast(PreTrainedTokenizerBase, tokenizer), layout)


def policy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, layout: Layout) -> TransformerPolicy:
    """Of the kind that the layout is of."""
    return (CausalPolicy if layout.mask is None else MaskedPolicy)(model, tokenizer, layout)


def layout(checkpoint: Checkpoint) -> Layout:
    """Raises ValueError: where such a model's image codes lie, its files do not say."""
    kind = ", ".join(checkpoint.config.architectures or ["model of unknown class"])
    raise ValueError(
        f"{checkpoint.source} is a {kind}, and which of its tokens are image codes is unknown; give a folder with "
        "layout.json and codec/ beside the model (what a stage or `rlmm export` writes), or write a family for it and "
        "name it in policy.family"
    )


def codec(checkpoint: Checkpoint) -> Codec:
    """Raises ValueError: such a model has none inside."""
    raise ValueError(f"{checkpoint.source} has no codec/ beside the model; copy or train one (see docs/your-own.md)")


FAMILY = Family("llama", (), policy=policy, layout=layout, codec=codec)
