"""What a masked family states of its checkpoints, against what was published of them (tests/fixtures/families)."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

from rlmm.config.families import family_of
from rlmm.config.policy import CheckpointPolicy
from rlmm.policies.families.base import Checkpoint
from rlmm.policies.families.loading import empty_model, layout_of, load_policy, load_spelling
from rlmm.policies.layout_io import Supervised, supervised_batch
from rlmm.policies.models import LLaDAConfig, MMadaConfig, Showo, ShowoConfig
from tests.families.checkpoints import facts
from tests.families.masked_checkpoints import MASKED, tiny


def published_mmada() -> MMadaConfig:
    """The full configuration, as its config.json states it."""
    stated = facts("mmada")["config"]
    return MMadaConfig(
        vocab_size=stated["vocab_size"], d_model=stated["hidden_size"], n_layers=stated["num_hidden_layers"],
        n_heads=stated["num_attention_heads"], n_kv_heads=stated["num_key_value_heads"],
        mlp_hidden_size=stated["intermediate_size"], rms_norm_eps=stated["rms_norm_eps"],
        architectures=["MMadaModelLM"],
    )  # fmt: skip


def spelled(name: str, prompt: list[int]) -> list[int]:
    """A whole masked sequence."""
    layout = layout_of(tiny(name).path, tiny(name))
    forced = layout.grid.forced()
    return [*layout.prefix(prompt), *[forced.get(i, layout.mask or -1) for i in range(layout.grid.length)]]


def test_mmada_is_spelled_as_published() -> None:
    layout, token = layout_of(tiny("mmada").path, tiny("mmada")), facts("mmada")["tokens"]
    prompt = list(Checkpoint(tiny("mmada").path, tiny("mmada")).spelled(layout, "a cat"))
    characters = prompt[1:-1]
    wanted = [token["<|t2i|>"], token["bos"], *characters, token["eos"], token["<|soi|>"]]
    assert len(characters) == 5
    assert spelled("mmada", prompt) == [*wanted, *[token["mask"]] * 12, token["<|eoi|>"]]
    assert layout.prefix(layout.null(prompt)) == (token["<|t2i|>"], token["bos"], token["eos"], token["<|soi|>"])
    assert layout.image == tuple(facts("mmada")["config"]["image_logits_slice"]) and layout.pad == token["[iPAD]"]
    assert layout.image == (token["first_image"], token["last_image"] + 1)
    assert layout.vocab_size == facts("mmada")["config"]["vocab_size"]


def test_show_o_is_spelled_as_published() -> None:
    layout, token = layout_of(tiny("show_o").path, tiny("show_o")), facts("show_o")["tokens"]
    checkpoint = Checkpoint(tiny("show_o").path, tiny("show_o"))
    named = {name: number for name, number in token.items() if name in checkpoint.vocabulary}
    assert len(named) == 11 and all(checkpoint.vocabulary[name] == number for name, number in named.items())
    prompt = list(checkpoint.spelled(layout, "a cat"))
    wanted = [token["<|t2i|>"], token["bos"], *prompt[1:-1], token["eos"], token["<|soi|>"]]
    assert len(prompt) == 7
    assert spelled("show_o", prompt) == [*wanted, *[token["mask"]] * 12, token["<|eoi|>"]]
    assert layout.prefix(layout.null(prompt)) == (token["<|t2i|>"], token["bos"], token["eos"], token["<|soi|>"])
    assert layout.image == tuple(facts("show_o")["config"]["image_logits_slice"]) and layout.pad == token["[PAD]"]
    assert layout.vocab_size == facts("show_o")["config"]["vocab_size"]


@pytest.mark.parametrize("normed", [True, False])
def test_show_o_is_read_as_its_authors_keep_it(normed: bool, tmp_path: Path) -> None:
    """A config.json of the table alone, a pickle of weights, and the tokenizer of another checkpoint."""
    stated, phi = facts("show_o")["config"], tmp_path / "phi"
    words = {f"<w{i}>": i for i in range(stated["llm_vocab_size"])} | {"<|endoftext|>": 50256}
    words = {word: number for word, number in words.items() if word != "<w50256>"}
    words |= {letter: words.pop(f"<w{200 + i}>") for i, letter in enumerate("a cirle")}
    plain = Tokenizer(WordLevel(words, unk_token="<|endoftext|>"))
    plain.pre_tokenizer = Split(Regex(r"[\s\S]"), "isolated")
    end = "<|endoftext|>"
    PreTrainedTokenizerFast(tokenizer_object=plain, bos_token=end, eos_token=end, unk_token=end).save_pretrained(phi)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = Showo(ShowoConfig(**small, qk_layernorm=normed))
    folder = tmp_path / "showo"
    folder.mkdir()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    table = {name: stated[name] for name in ("vocab_size", "llm_vocab_size", "codebook_size", "mask_token_id")}
    record = {"_class_name": "Showo", **table, "num_vq_tokens": 1024, "w_clip_vit": False}
    (folder / "config.json").write_text(json.dumps(record | small | {"llm_model_path": str(phi)}))
    options = CheckpointPolicy(path=str(folder))
    policy = load_policy(options.path, options)
    assert policy.layout.family == "show_o" and len(policy.layout.grid.decided()) == 1024
    assert policy.layout.image == tuple(stated["image_logits_slice"]) and family_of(options) == "masked"
    tokens = facts("show_o")["tokens"]
    assert policy.encode_prompt("a circle")[::9] == [tokens["bos"], tokens["eos"]]
    for name, weight in policy.base.named_parameters():
        assert weight.equal(model.get_parameter(name))
    assert any("q_layernorm" in name for name, _ in policy.base.named_parameters()) == normed
    policy.save(tmp_path / "saved")
    again = load_policy(tmp_path / "saved")
    assert again.encode_prompt("a circle") == policy.encode_prompt("a circle")


def test_a_show_o_with_clip_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "Showo", "w_clip_vit": True}))
    with pytest.raises(ValueError, match="reads pictures through CLIP"):
        load_policy(tmp_path, CheckpointPolicy(path=str(tmp_path), family="show_o"))


@pytest.mark.parametrize("normed", [True, False])
def test_the_full_show_o_has_the_published_weights(normed: bool) -> None:
    config = ShowoConfig(qk_layernorm=normed, architectures=["Showo"])
    stated = facts("show_o")
    assert all(getattr(config, name) == stated["config"][name] for name in PHI)
    shapes = {n: list(weight.shape) for n, weight in empty_model(config).state_dict().items()}
    wanted = stated["weights"] | (stated["weights_where_queries_and_keys_are_normed"] if normed else {})
    assert {n: shapes.get(n) for n in wanted} == wanted
    assert {n for n in shapes if ".layers.23." in n} == {n for n in wanted if ".layers.23." in n}
    assert {n for n in shapes if ".layers." not in n} == {n for n in wanted if ".layers." not in n}


PHI = (
    "vocab_size", "llm_vocab_size", "mask_token_id", "hidden_size", "intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "hidden_act", "layer_norm_eps", "max_position_embeddings",
)  # fmt: skip


def test_lumina_dimoo_is_spelled_as_published() -> None:
    stated = facts("lumina_dimoo")
    layout, token = layout_of(tiny("lumina_dimoo").path, tiny("lumina_dimoo")), stated["tokens"]
    checkpoint = Checkpoint(tiny("lumina_dimoo").path, tiny("lumina_dimoo"))
    text = {number: name for name, number in checkpoint.vocabulary.items()}
    prompt = list(checkpoint.spelled(layout, "a cat"))
    whole = spelled("lumina_dimoo", prompt)
    assert "".join(text[i] for i in layout.question(prompt)) == stated["template"].format(prompt="a cat")
    null = layout.question(layout.null(prompt))
    assert "".join(text[i] for i in null) == stated["templates"]["unconditional"] and token["<uncondition>"] in null
    row = [*[token["mask"]] * 4, token["newline"]]
    assert whole[1 + len(prompt) :] == [
        token["answer_start"], token["boi"], *row * 3, token["eoi"], token["answer_end"],
    ]  # fmt: skip
    assert layout.image == (token["first_image"], token["last_image"] + 1)
    assert layout.vocab_size == stated["config"]["vocab_size_from_slices"]
    spelling = load_spelling(checkpoint.source, checkpoint.options.model_copy(update={"image_size": (1024, 1024)}))
    assert spelling.fault("a cat", 0) is None


def test_a_templates_tokens_outside_of_the_text_are_no_targets_and_neither_is_what_announces_an_image() -> None:
    layout = layout_of(tiny("lumina_dimoo").path, tiny("lumina_dimoo"))
    prompt = list(Checkpoint(tiny("lumina_dimoo").path, tiny("lumina_dimoo")).spelled(layout, "a cat"))
    batch = supervised_batch(layout, [Supervised(prompt, range(12))])
    targets = batch.ids_BT[0][batch.target_BT[0]].tolist()
    assert targets == [i for i in prompt if i < 126336] + [126356 + code for code in range(12)]
    assert len(targets) < len(prompt) + 12


def test_a_tokenizer_that_begins_with_bos_keeps_it(tmp_path: Path) -> None:
    shutil.copytree(tiny("lumina_dimoo").path, tmp_path / "bos")
    file = tmp_path / "bos" / "tokenizer.json"
    bos = {"id": "<|startoftext|>", "ids": [126080], "tokens": ["<|startoftext|>"]}
    adds = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": bos["id"], "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}}], "pair": [{"Sequence": {"id": "A", "type_id": 0}},
            {"Sequence": {"id": "B", "type_id": 1}}], "special_tokens": {bos["id"]: bos}}  # fmt: skip
    file.write_text(json.dumps(json.loads(file.read_text()) | {"post_processor": adds}))
    options = tiny("lumina_dimoo").model_copy(update={"path": str(tmp_path / "bos")})
    layout, plain = layout_of(options.path, options), layout_of(tiny("lumina_dimoo").path, tiny("lumina_dimoo"))
    checkpoint = Checkpoint(options.path, options)
    assert layout.bos == 126080 and layout.template == "<system>" + plain.template
    prefix = layout.prefix(checkpoint.spelled(layout, "a cat"))
    assert prefix == (126080, *plain.prefix(checkpoint.spelled(plain, "a cat")))


@pytest.mark.parametrize("name", MASKED)
def test_the_mask_can_be_drawn_in_no_modality(name: str) -> None:
    layout = layout_of(tiny(name).path, tiny(name))
    assert layout.mask == facts(name)["tokens"]["mask"]
    assert not any(layout.mask in range(*taken) for taken in (layout.text, layout.image))


@pytest.mark.parametrize("name", MASKED)
def test_a_families_own_size_is_the_published_one(name: str) -> None:
    options = tiny(name).model_copy(update={"image_size": None})
    grid = layout_of(options.path, options).grid
    assert len(grid.decided()) == OWN_TOKENS[name]


OWN_TOKENS = {
    "mmada": facts("mmada")["config"]["num_vq_tokens"],
    "lumina_dimoo": facts("lumina_dimoo")["config"]["image_body_length_1024"] - 64,
    "show_o": facts("show_o")["config"]["num_vq_tokens_256"],
}


@pytest.mark.parametrize(("name", "config"), [("mmada", published_mmada())])
def test_the_full_model_has_the_published_weights(name: str, config: LLaDAConfig) -> None:
    model = empty_model(config)
    shapes = {n: list(weight.shape) for n, weight in model.state_dict().items()}
    assert all(weight.is_meta for weight in model.parameters())
    assert {n: shapes.get(n) for n in facts(name)["weights"]} == facts(name)["weights"]
    in_block = [n for n in shapes if n.startswith("model.transformer.blocks.31.")]
    assert set(in_block) == {n for n in facts(name)["weights"] if ".blocks." in n}
    # 6.98 billion without the tables: model card of LLaDA's successor, which compares the two.
    tables = 2 * config.rows * config.d_model
    assert (sum(weight.numel() for weight in model.parameters()) - tables) / 1e9 == pytest.approx(6.98, abs=0.005)


def test_a_llada_that_does_not_draw_is_named(tmp_path: Path) -> None:
    shutil.copytree(tiny("lumina_dimoo").path, tmp_path / "text")
    file = tmp_path / "text" / "config.json"
    text_alone = json.loads(file.read_text()) | {"vocab_size": 126464, "architectures": ["LLaDAModelLM"]}
    file.write_text(json.dumps(text_alone))
    options = CheckpointPolicy(path=str(tmp_path / "text"))
    with pytest.raises(ValueError, match="has a table of 126464 rows, and image codes go up to 134548"):
        layout_of(options.path, options)


def test_an_architecture_that_was_never_published_is_refused() -> None:
    with pytest.raises(ValueError, match="config.json says block_type: 'sequential'.*another architecture"):
        MMadaConfig.from_dict({"block_type": "sequential"})


@pytest.mark.parametrize("name", MASKED)
def test_a_recipe_knows_that_the_family_is_masked(name: str, tmp_path: Path) -> None:
    assert family_of(tiny(name)) == "masked"
    assert family_of(CheckpointPolicy(path="someone/something", family=name)) == "masked"
    assert family_of(CheckpointPolicy(path=tiny(name).path)) == "masked"
    assert family_of(CheckpointPolicy(path="someone/something")) == "next_token"
    assert family_of(CheckpointPolicy(path=str(tmp_path))) == "next_token"


def test_a_checkpoints_own_code_is_never_run(tmp_path: Path) -> None:
    shutil.copytree(tiny("mmada").path, tmp_path / "mmada")
    file = tmp_path / "mmada" / "config.json"
    auto = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"auto_map": auto}))
    (tmp_path / "mmada" / "evil.py").write_text("raise SystemExit('ran')")
    load_policy(tmp_path / "mmada", CheckpointPolicy(path=str(tmp_path / "mmada")))


@pytest.mark.parametrize("setting", [{"decoder": "x.ckpt"}])
@pytest.mark.parametrize("name", MASKED)
def test_a_setting_that_a_family_has_no_use_for_is_refused(name: str, setting: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="has no use for it"):
        layout_of(tiny(name).path, tiny(name).model_copy(update=setting))


def test_a_tokenizer_that_is_not_the_models_and_missing_weights_are_refused(tmp_path: Path) -> None:
    shutil.copytree(tiny("mmada").path, tmp_path / "mmada")
    weights = load_file(tmp_path / "mmada" / "model.safetensors")
    kept = {n: w for n, w in weights.items() if "blocks.1.ff" not in n}
    save_file(kept, tmp_path / "mmada" / "model.safetensors", metadata={"format": "pt"})
    options = CheckpointPolicy(path=str(tmp_path / "mmada"))
    with pytest.raises(ValueError, match=r"lacks 3 of the model's weights.*blocks\.1\.ff_norm"):
        load_policy(options.path, options)
    config = json.loads((tmp_path / "mmada" / "config.json").read_text()) | {"vocab_size": 130000}
    (tmp_path / "mmada" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="tokenizer ends at 126349, so 8192 codes"):
        layout_of(options.path, options)
