"""Full configurations of the published checkpoints, made of the facts in tests/fixtures/families."""

from dataclasses import dataclass
from typing import Any

from transformers import (
    ChameleonConfig,
    Emu3Config,
    GlmImageConfig,
    JanusConfig,
    LlamaConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from rlmm.policies.families.base import Checkpoint
from rlmm.policies.models.llamagen import LlamaGenConfig
from tests.families.checkpoints import facts, tiny


@dataclass(frozen=True)
class Published:
    """A checkpoint, or one size of it.

    Attributes:
        family: its name in rlmm.
        fixture: its facts.
        billions: weights, with the image tokenizer's, the vision encoder's and what reads the prompt.
        part: which keys of the facts state its size, where there are several.
    """

    family: str
    fixture: str
    billions: float
    part: str = ""


VQ_16, FLAN_T5_XL_ENCODER = 0.072, 1.22
QWEN_CODES = 0.0571
"""Of SimpleAR 0.5B: 63736 rows more than Qwen2.5-0.5B, which has 0.494."""
CASES = {
    "emu3": Published("emu3", "emu3", 8.5),
    "chameleon": Published("chameleon", "chameleon", 7.0),
    "anole": Published("chameleon", "anole", 7.0),
    "lumina_mgpt": Published("lumina_mgpt", "lumina_mgpt", 7.0),
    "janus_pro_7b": Published("janus", "janus_pro_7b", 7.4),
    "janus_pro_1b": Published("janus", "janus_pro_1b", 2.1),
    "llamagen_b": Published("llamagen", "llamagen", 0.111 + VQ_16, "gpt_b"),
    "llamagen_l": Published("llamagen", "llamagen", 0.343 + VQ_16, "gpt_l"),
    "llamagen_xl": Published("llamagen", "llamagen", 0.775 + VQ_16, "gpt_xl"),
    "llamagen_xxl": Published("llamagen", "llamagen", 1.4 + VQ_16, "gpt_xxl"),
    "llamagen_3b": Published("llamagen", "llamagen", 3.1 + VQ_16, "gpt_3b"),
    "llamagen_text": Published("llamagen_text", "llamagen", 0.775 + VQ_16 + FLAN_T5_XL_ENCODER, "gpt_xl"),
    "glm_image": Published("glm_image", "glm_image", 9 + 1.1),
    "glm_image_edit": Published("glm_image_edit", "glm_image", 9 + 1.1),
    "simplear_1.5b": Published("simplear", "simplear", 1.64),
    "simplear_0.5b": Published("simplear", "simplear", 0.494 + QWEN_CODES, "small_"),
    "blip3o_next": Published("blip3o_next", "blip3o_next", 0.663, "script_"),
}

FLAN_T5_XL = {
    "vocab_size": 32128, "d_kv": 64, "d_ff": 5120, "num_layers": 24, "num_heads": 32, "feed_forward_proj": "gated-gelu",
}  # fmt: skip
"""google/flan-t5-xl, config.json."""
SHAPE = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "rms_norm_eps", "max_position_embeddings", "head_dim",
)  # fmt: skip


def published_config(name: str) -> PretrainedConfig:
    """The full configuration, from the published facts."""
    case = CASES[name]
    stated = facts(case.fixture)["config"]
    shape = {key: stated[key] for key in SHAPE if key in stated}
    if "rope_theta" in stated:
        shape["rope_parameters"] = {"rope_type": "default", "rope_theta": stated["rope_theta"]}
    if case.family in ("simplear", "blip3o_next"):
        return _qwen(case, stated, shape)
    if case.family.startswith("glm_image"):
        return _glm_image(stated, shape)
    vq: dict[str, Any] = {"base_channels": stated["vq_base_channels"],
                          "channel_multiplier": stated["vq_channel_multiplier"],
                          "num_res_blocks": stated["vq_num_res_blocks"],
                          "embed_dim": stated["vq_embed_dim"]}  # fmt: skip
    if case.family.startswith("llamagen"):
        return _llamagen(case, stated, vq)
    if case.family == "emu3":
        vq |= {"codebook_size": stated["vq_codebook_size"], "attn_resolutions": stated["vq_attn_resolutions"]}
        shape["max_position_embeddings"] = stated["gen_max_position_embeddings"]
        return Emu3Config(text_config=shape, vq_config=vq, vocabulary_map=_names(case),
                          architectures=["Emu3ForConditionalGeneration"])  # fmt: skip
    if case.family == "janus":
        text = LlamaConfig(**shape, pad_token_id=facts(case.fixture)["tokens"]["pad"])
        vq |= {"num_embeddings": stated["vq_codebook_size"], "projection_dim": stated["hidden_size"],
               "image_token_embed_dim": stated["hidden_size"], "latent_channels": stated["vq_z_channels"]}  # fmt: skip
        vision = {"image_size": stated["image_size"], "projection_dim": stated["hidden_size"]}
        return JanusConfig(text_config=text, vq_config=vq, vision_config=vision, tie_word_embeddings=False,
                           architectures=["JanusForConditionalGeneration"])  # fmt: skip
    vq |= {"num_embeddings": stated["vq_num_embeddings"], "latent_channels": stated["vq_latent_channels"]}
    shape.pop("head_dim")  # Chameleon's is what its heads share out
    return ChameleonConfig(
        **shape, vq_config=vq | {"resolution": stated["vq_resolution"]}, vocabulary_map=_names(case), pad_token_id=1,
        architectures=["ChameleonForConditionalGeneration"],
    )  # fmt: skip


def _names(case: Published) -> dict[str, int]:
    """The published names of special tokens and codes, as the tiny checkpoint has them."""
    options = tiny(case.family)
    return Checkpoint(options.path, options).config.vocabulary_map


def _qwen(case: Published, stated: dict[str, Any], shape: dict[str, Any]) -> PretrainedConfig:
    for key in SHAPE:
        if case.part + key in stated:
            shape[key] = stated[case.part + key]
    kind = Qwen2Config if case.family == "simplear" else Qwen3Config
    return kind(**shape, tie_word_embeddings=True, architectures=[kind.__name__.replace("Config", "ForCausalLM")])


def _glm_image(stated: dict[str, Any], shape: dict[str, Any]) -> PretrainedConfig:
    rope = {"rope_type": "default"} | {
        key: stated[key] for key in ("rope_theta", "mrope_section", "partial_rotary_factor")
    }
    vision = {key.removeprefix("vision_"): value for key, value in stated.items() if key.startswith("vision_")}
    return GlmImageConfig(
        text_config=shape | {"rope_parameters": rope, "vision_vocab_size": vision.pop("vocab_size")},
        vision_config=vision,
        vq_config={"embed_dim": stated["vq_embed_dim"], "num_embeddings": stated["vq_num_embeddings"],
                   "latent_channels": stated["vq_latent_channels"]},
        architectures=["GlmImageForConditionalGeneration"],
    )  # fmt: skip


def _llamagen(case: Published, stated: dict[str, Any], vq: dict[str, Any]) -> PretrainedConfig:
    size = stated[case.part]
    return LlamaGenConfig(
        vocab_size=stated["vocab_size"], hidden_size=size["dim"], intermediate_size=size["ffn"],
        num_hidden_layers=size["n_layer"], num_attention_heads=size["n_head"],
        rms_norm_eps=stated["norm_eps"], num_classes=stated["num_classes"], grid_size=24,
        caption_tokens=stated["cls_token_num_t2i"],
        caption_config=None if case.family == "llamagen" else FLAN_T5_XL | {"d_model": stated["caption_dim"]},
        vq_config=vq | {"num_embeddings": stated["vq_codebook_size"], "latent_channels": stated["vq_z_channels"]},
        architectures=["LlamaGenForImageGeneration"],
    )  # fmt: skip
