"""What a family states of its checkpoints, against what was published of them (tests/fixtures/families)."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Emu3Config

from rlmm.config.policy import CheckpointPolicy
from rlmm.policies.families.base import Checkpoint
from rlmm.policies.families.chameleon import image_token
from rlmm.policies.families.janus import ASSISTANT, BEGIN, BOS, END, EOS, PAD, USER
from rlmm.policies.families.loading import (
    FAMILIES,
    checkpoint_codec,
    empty_model,
    find_family,
    layout_of,
    load_policy,
    load_spelling,
)
from rlmm.policies.families.tiny import published_tokenizer
from tests.families.checkpoints import facts, tiny
from tests.families.published import CASES, published_config


@pytest.mark.parametrize("case", ["emu3", "chameleon", "anole", "lumina_mgpt", "janus_pro_7b"])
def test_the_tiny_tokenizer_and_the_layout_have_the_published_ids(case: str) -> None:
    name, stated = CASES[case].family, facts(case)
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
    assert "<s>" + chameleon.template + "<racm3:break>" == facts("anole")["template"]
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


def test_the_smaller_janus_has_other_ids_which_are_its_tokenizers(tmp_path: Path) -> None:
    stated, folder = facts("janus_pro_1b"), tmp_path / "janus"
    shutil.copytree(tiny("janus").path, folder)
    special = {BOS: 100000, EOS: 100001, PAD: 100002, BEGIN: 100003, END: 100580, USER: 100588, ASSISTANT: 100589}
    published_tokenizer(special, {}, bos=BOS, eos=EOS, pad=PAD).save_pretrained(folder)
    layout, tokens = layout_of(folder, CheckpointPolicy(path=str(folder))), stated["tokens"]
    assert (layout.bos, layout.pad, layout.null_token) == (tokens["bos"], tokens["pad"], tokens["pad"])
    assert layout.boi == (tokens["boi"],) and layout.template + BEGIN == stated["template"]


def test_what_transformers_converter_leaves_out_of_emu3_is_published_by_default() -> None:
    """It writes the positions and the vocabulary alone."""
    stated, text = facts("emu3")["config"], Emu3Config(vocabulary_map={}).get_text_config()
    for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                "num_key_value_heads", "rms_norm_eps", "tie_word_embeddings"):  # fmt: skip
        assert getattr(text, key) == stated[key], key
    assert text.rope_parameters["rope_theta"] == stated["rope_theta"]
    assert text.bos_token_id == facts("emu3")["tokens"]["bos"] and text.pad_token_id == facts("emu3")["tokens"]["pad"]


@pytest.mark.parametrize("case", CASES)
def test_the_full_model_has_its_published_size_and_a_head_for_every_code(case: str) -> None:
    name, config = CASES[case].family, published_config(case)
    model = empty_model(config)
    assert all(parameter.is_meta for parameter in model.parameters())
    billions = sum(parameter.numel() for parameter in model.parameters()) / 1e9
    assert billions == pytest.approx(CASES[case].billions, rel=0.05)
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


def lumina_as_published(folder: Path, groups: int) -> dict[str, Tensor]:
    """A tiny Lumina-mGPT with its authors' class name and its norms once a group of heads; those norms."""
    shutil.copytree(tiny("lumina_mgpt").path, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["ChameleonXLLMXForConditionalGeneration"], "model_parallel_size": groups}
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")
    norms = {n: torch.randn(groups, w.shape[1]) for n, w in weights.items() if ".q_norm." in n or ".k_norm." in n}
    save_file(weights | norms, folder / "model.safetensors", metadata={"format": "pt"})
    return norms


@pytest.mark.parametrize("groups", [1, 2])
def test_lumina_is_known_by_its_authors_class_and_each_head_has_its_groups_norms(groups: int, tmp_path: Path) -> None:
    norms = lumina_as_published(tmp_path / "lumina", groups)
    assert len(norms) == 2 * 2 * 2  # layers, queries and keys, weights and biases
    options = CheckpointPolicy(path=str(tmp_path / "lumina"), image_size=(64, 64))
    policy = load_policy(options.path, options)
    assert policy.layout.family == "lumina_mgpt" and type(policy.base).__name__ == "ChameleonForConditionalGeneration"
    for name, weight in norms.items():
        found = policy.base.get_parameter(name)
        assert found.shape[0] == 2 and all(found[head].equal(weight[head * groups // 2]) for head in range(2))
    assert checkpoint_codec(options).image_size == (64, 64)
    untouched = load_policy(tiny("lumina_mgpt").path, tiny("lumina_mgpt")).base.get_parameter("lm_head.weight")
    assert policy.base.get_parameter("lm_head.weight").equal(untouched)


def test_a_lumina_with_other_shapes_is_refused(tmp_path: Path) -> None:
    lumina_as_published(tmp_path / "lumina", 1)
    file = tmp_path / "lumina" / "model.safetensors"
    weights = load_file(file)
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(weights | {name: weights[name][:8].clone()}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"up_proj\.weight has another shape"):
        load_policy(tmp_path / "lumina", CheckpointPolicy(path=str(tmp_path / "lumina"), image_size=(64, 64)))
