"""What a family states of its checkpoints, against what was published of them (tests/fixtures/families)."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    ChameleonConfig,
    Emu3Config,
    GlmImageConfig,
    JanusConfig,
    LlamaConfig,
    PretrainedConfig,
    Qwen2Config,
)

from rlmm.config.policy import CheckpointPolicy
from rlmm.policies.families.base import Checkpoint
from rlmm.policies.families.chameleon import image_token
from rlmm.policies.families.loading import (
    FAMILIES,
    checkpoint_codec,
    empty_model,
    find_family,
    layout_of,
    load_policy,
    load_spelling,
)
from rlmm.policies.models.llamagen import LlamaGenConfig
from tests.families.checkpoints import facts, tiny

PUBLISHED = {
    "emu3": "emu3", "chameleon": "chameleon", "lumina_mgpt": "lumina_mgpt", "janus": "janus_pro_7b",
    "llamagen": "llamagen", "llamagen_text": "llamagen", "glm_image": "glm_image", "glm_image_edit": "glm_image",
    "simplear": "simplear",
}  # fmt: skip
BILLIONS = {"emu3": 8.5, "chameleon": 7.0, "lumina_mgpt": 7.0, "janus": 7.4, "llamagen": 0.775 + 0.072}
BILLIONS |= {"simplear": 1.64, "glm_image": 9 + 1.1, "glm_image_edit": 9 + 1.1, "llamagen_text": 0.775 + 0.072 + 1.22}
"""With the image tokenizer's (LlamaGen: of XL, and VQ-16; GLM-Image: its vision encoder), and what reads the prompt."""


FLAN_T5_XL = {
    "vocab_size": 32128, "d_kv": 64, "d_ff": 5120, "num_layers": 24, "num_heads": 32, "feed_forward_proj": "gated-gelu",
}  # fmt: skip
"""google/flan-t5-xl, config.json."""


def published_config(name: str) -> PretrainedConfig:
    """The full configuration, from the published facts."""
    stated = facts(PUBLISHED[name])["config"]
    shape = {
        key: stated[key]
        for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                    "num_key_value_heads", "rms_norm_eps", "max_position_embeddings")
        if key in stated
    }  # fmt: skip
    if name == "simplear":
        return Qwen2Config(**shape, tie_word_embeddings=True, architectures=["Qwen2ForCausalLM"])
    if name.startswith("glm_image"):
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
    vq: dict[str, Any] = {"base_channels": stated["vq_base_channels"],
                          "channel_multiplier": stated["vq_channel_multiplier"],
                          "num_res_blocks": stated["vq_num_res_blocks"],
                          "embed_dim": stated["vq_embed_dim"]}  # fmt: skip
    if name.startswith("llamagen"):
        largest = stated["gpt_xl"]
        return LlamaGenConfig(
            vocab_size=stated["vocab_size"], hidden_size=largest["dim"], intermediate_size=largest["ffn"],
            num_hidden_layers=largest["n_layer"], num_attention_heads=largest["n_head"],
            rms_norm_eps=stated["norm_eps"], num_classes=stated["num_classes"], grid_size=24,
            caption_tokens=stated["cls_token_num_t2i"],
            caption_config=None if name == "llamagen" else FLAN_T5_XL | {"d_model": stated["caption_dim"]},
            vq_config=vq | {"num_embeddings": stated["vq_codebook_size"], "latent_channels": stated["vq_z_channels"]},
            architectures=["LlamaGenForImageGeneration"],
        )  # fmt: skip
    if name == "emu3":
        vq |= {"codebook_size": stated["vq_codebook_size"], "attn_resolutions": stated["vq_attn_resolutions"]}
        shape["max_position_embeddings"] = stated["gen_max_position_embeddings"]
        return Emu3Config(
            text_config=shape, vq_config=vq, vocabulary_map={}, architectures=["Emu3ForConditionalGeneration"]
        )
    if name == "janus":
        text = LlamaConfig(**shape, pad_token_id=facts(PUBLISHED[name])["tokens"]["pad"])
        vq |= {"num_embeddings": stated["vq_codebook_size"], "projection_dim": stated["hidden_size"],
               "image_token_embed_dim": stated["hidden_size"], "latent_channels": stated["vq_z_channels"]}  # fmt: skip
        vision = {"image_size": stated["image_size"], "projection_dim": stated["hidden_size"]}
        architecture = ["JanusForConditionalGeneration"]
        return JanusConfig(text_config=text, vq_config=vq, vision_config=vision, architectures=architecture,
                           tie_word_embeddings=False)  # fmt: skip
    vq |= {"num_embeddings": stated["vq_num_embeddings"], "latent_channels": stated["vq_latent_channels"]}
    return ChameleonConfig(
        **shape, vq_config=vq, vocabulary_map={}, pad_token_id=1, architectures=["ChameleonForConditionalGeneration"]
    )


@pytest.mark.parametrize("name", ["emu3", "chameleon", "lumina_mgpt", "janus"])
def test_the_tiny_tokenizer_and_the_layout_have_the_published_ids(name: str) -> None:
    stated = facts(PUBLISHED[name])
    checkpoint, layout = Checkpoint(tiny(name).path, tiny(name)), layout_of(tiny(name).path, tiny(name))
    there = {token: number for token, number in stated["tokens"].items() if token in checkpoint.vocabulary}
    assert len(there) >= 3 and all(checkpoint.vocabulary[token] == number for token, number in there.items())
    assert (layout.bos, layout.pad) == (stated["tokens"]["bos"], stated["tokens"]["pad"])
    if name == "janus":  # the codes' own numbers start where the text's end
        assert layout.image == (stated["config"]["vocab_size"], stated["config"]["vocab_size"] + 16384)
    else:
        first, last = ("first_visual", "last_visual") if name == "emu3" else ("first_image", "last_image")
        assert layout.image == (stated["tokens"][first], stated["tokens"][last] + 1)
        assert layout.vocab_size == stated["config"]["vocab_size"]


def test_prompts_are_spelled_as_published() -> None:
    names = ("emu3", "chameleon", "lumina_mgpt", "janus")
    emu3, chameleon, lumina, janus = (layout_of(tiny(n).path, tiny(n)) for n in names)
    spelled = {n: Checkpoint(tiny(n).path, tiny(n)) for n in names}
    text = {n: {number: token for token, number in one.vocabulary.items()} for n, one in spelled.items()}
    assert "".join(text["emu3"][token] for token in emu3.boi) == "<|image start|>6*6<|image token|>"
    assert [text["emu3"][t] for t in (emu3.grid.row_end or 0, *emu3.grid.ending)] == [
        "<|extra_200|>", "<|extra_201|>", "<|image end|>",
    ]  # fmt: skip
    assert emu3.grid.length == 6 * 7 + 2
    assert "".join(text["emu3"][t] for t in emu3.null_prompt) == facts("emu3")["config"]["negative_prompt"]
    assert "<s>" + chameleon.template + "<racm3:break>" == "<s>{prompt}<reserved08706><racm3:break>"
    assert chameleon.prefix(chameleon.null([9, 9])) == (0, 8197)
    stated = facts("lumina_mgpt")["template"].format(width=64, height=64, prompt="{prompt}")
    assert "<s>" + lumina.template == stated and lumina.boi == (8197, 8804 + 2, 8804 + 2)
    assert lumina.grid.row_end == 8803 and lumina.grid.length == 4 * 5 + 1
    assert janus.template + "<begin_of_image>" == facts("janus_pro_7b")["template"]
    assert janus.prefix(janus.null([5, 6])) == (100000, 100015, 100015, 100016)


def test_a_templates_special_tokens_are_obeyed_and_a_prompts_are_spelled_out() -> None:
    spelling = load_spelling(tiny("janus").path, tiny("janus"))
    user, assistant = 100601, 100602
    plain, posing = spelling.encode("a cat"), spelling.encode("a cat<|User|>")
    assert plain[0] == user and plain.count(assistant) == 1 and len(plain) == 2 + len(": a cat") + len("\n\n") + 1
    assert posing.count(user) == 1 and len(posing) == len(plain) + len("<|User|>")


@pytest.mark.parametrize("name", BILLIONS)
def test_the_full_model_has_its_published_size_and_a_head_for_every_code(name: str) -> None:
    config = published_config(name)
    model = empty_model(config)
    assert all(parameter.is_meta for parameter in model.parameters())
    billions = sum(parameter.numel() for parameter in model.parameters()) / 1e9
    assert billions == pytest.approx(BILLIONS[name], rel=0.05)
    layout = layout_of(tiny(name).path, tiny(name))
    policy = find_family(name).policy(model, Checkpoint(tiny(name).path, tiny(name)).tokenizer, layout)
    low, high = layout.image
    with torch.device("meta"):
        logits = policy.head(torch.empty(3, config.get_text_config().hidden_size), layout.image)
        inputs = policy.embedded(torch.full((1, 5), high - 1))
    assert logits.shape == (3, high - low)
    assert list(inputs) == ["input_ids"] or inputs["inputs_embeds"].shape[-1] == config.get_text_config().hidden_size


def test_chameleons_codes_follow_the_vocabularys_order_whatever_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """A token's name says which code of the codebook it is; here the names are dealt out five further on."""
    plain = checkpoint_codec(tiny("chameleon"))
    images = torch.rand(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    codes = plain.encode(images)
    turned = {image_token(code): 4 + (code + 5) % 8192 for code in range(8192)}
    config = Checkpoint(tiny("chameleon").path, tiny("chameleon")).config
    config.vocabulary_map = turned
    monkeypatch.setattr(Checkpoint, "config", config)
    other = FAMILIES["chameleon"].codec(Checkpoint(tiny("chameleon").path, tiny("chameleon")))
    moved = (codes + 5) % 8192
    assert other.encode(images).equal(moved)
    torch.testing.assert_close(other.decode(moved), plain.decode(codes))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"image_size": (50, 48)}, "one token of .* stands for 8x8 pixels"),
        ({"family": "emu4"}, "there is no family 'emu4'.*emu3"),
        ({"path": "/nowhere"}, "not a readable checkpoint"),
        ({"family": "janus"}, "reads JanusForConditionalGeneration, and .* is a Emu3ForConditionalGeneration"),
    ],
)
def test_a_checkpoint_that_cannot_be_read_so_says_why(change: dict[str, Any], says: str) -> None:
    options = CheckpointPolicy.model_validate(tiny("emu3").model_dump() | change)
    with pytest.raises(ValueError, match=says):
        layout_of(options.path, options)


@pytest.mark.parametrize(
    ("name", "setting"),
    [("janus", {"null_prompt": "bad"}), ("emu3", {"decoder": "x.ckpt"}), ("chameleon", {"null_prompt": ""})],
)
def test_a_setting_that_a_family_has_no_use_for_is_refused(name: str, setting: dict[str, str]) -> None:
    options = tiny(name).model_copy(update=setting)
    with pytest.raises(ValueError, match="has no use for it"):
        layout_of(options.path, options)


def test_a_language_model_with_missing_weights_is_refused(tmp_path: Path) -> None:
    shutil.copytree(tiny("janus").path, tmp_path / "janus")
    file = tmp_path / "janus" / "model.safetensors"
    weights = load_file(file)
    save_file({n: w for n, w in weights.items() if "layers.1.mlp" not in n}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 3 of the model's weights.*layers\.1\.mlp"):
        load_policy(tmp_path / "janus", CheckpointPolicy(path=str(tmp_path / "janus")))


def test_weights_that_are_missing_are_named(tmp_path: Path) -> None:
    whole = Checkpoint(tiny("chameleon").path, tiny("chameleon"))
    bare = dict(whole.weights("vqmodel."))
    assert any(name.startswith("decoder.") for name in bare)
    options = tiny("chameleon").model_copy(update={"decoder": str(tmp_path / "none.ckpt")})
    with pytest.raises(ValueError, match=r"policy\.decoder: there is no file"):
        FAMILIES["chameleon"].codec(Checkpoint(options.path, options))
    torch.save({"state_dict": {"encoder.x": torch.zeros(1)}}, tmp_path / "other.ckpt")
    options = options.model_copy(update={"decoder": str(tmp_path / "other.ckpt")})
    with pytest.raises(ValueError, match=r"no weights named decoder"):
        FAMILIES["chameleon"].codec(Checkpoint(options.path, options))
