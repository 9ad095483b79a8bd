"""What a masked family states of its checkpoints, against what was published of them (tests/fixtures/families)."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlmm.codecs import NetworkCodec
from rlmm.codecs.vqgan import MAGVITV2, VqganNetwork
from rlmm.config.families import family_of
from rlmm.config.policy import CheckpointPolicy
from rlmm.policies.families.base import Checkpoint
from rlmm.policies.families.loading import checkpoint_codec, empty_model, layout_of, load_policy
from rlmm.policies.models import LLaDAConfig, MMadaConfig
from tests.families.checkpoints import facts
from tests.families.masked_checkpoints import MASKED, SIZE, tiny

MAGVIT = facts("magvitv2")


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


OWN_TOKENS = {"mmada": facts("mmada")["config"]["num_vq_tokens"]}


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


def test_an_architecture_that_was_never_published_is_refused() -> None:
    with pytest.raises(ValueError, match="config.json says block_type: 'sequential'.*another architecture"):
        MMadaConfig.from_dict({"block_type": "sequential"})


def test_magvit_has_the_published_weights() -> None:
    with torch.device("meta"):
        shapes = {n: list(weight.shape) for n, weight in VqganNetwork(dict(MAGVITV2)).state_dict().items()}
    assert {n: shapes.get(n) for n in MAGVIT["weights"]} == MAGVIT["weights"]
    assert not set(MAGVIT["absent"]) & set(shapes)


def test_magvits_codes_are_signs_the_first_channel_highest() -> None:
    codec = checkpoint_codec(tiny("mmada"))
    assert isinstance(codec, NetworkCodec) and codec.num_codes == MAGVIT["codes"]
    quantize = codec.network.quantize
    latents = -torch.ones(1, MAGVIT["bits"], 1, 2)
    latents[0, 0, 0, 0] = latents[0, -1, 0, 1] = 0.3
    assert quantize.codes(latents).tolist() == [[4096, 1]]
    assert quantize.latents(torch.tensor([[[4096, 1]]])).equal(latents.sign())


def test_a_tokenizer_by_itself_is_read_from_its_pickle_and_its_buffers_are_no_weights(tmp_path: Path) -> None:
    beside = Path(tiny("mmada").path) / "magvitv2"
    weights = load_file(beside / "model.safetensors")
    buffers = {name: torch.zeros(3) for name in MAGVIT["buffers"]}
    torch.save(weights | buffers, tmp_path / MAGVIT["file"])
    shutil.copy(beside / "config.json", tmp_path)
    options = tiny("mmada").model_copy(update={"image_tokenizer": str(tmp_path)})
    images = torch.rand(1, 3, *SIZE, generator=torch.Generator().manual_seed(0))
    assert checkpoint_codec(options).encode(images).equal(checkpoint_codec(tiny("mmada")).encode(images))
    torch.save({"other": torch.zeros(1)}, tmp_path / MAGVIT["file"])
    with pytest.raises(ValueError, match="of the image tokenizer is missing"):
        checkpoint_codec(options)
    (tmp_path / MAGVIT["file"]).unlink()
    with pytest.raises(ValueError, match="has no weights of an image tokenizer: none of model.safetensors"):
        checkpoint_codec(options)


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
