"""SimpleAR and BLIP3o-NEXT: what was published of them, their image tokenizers' files, and images of hidden states."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlmm.codecs import codec_hash
from rlmm.codecs.cosmos import LEVELS, CosmosNetwork
from rlmm.config.policy import CheckpointPolicy
from rlmm.policies.families.base import Checkpoint
from rlmm.policies.families.loading import FAMILIES, checkpoint_codec, layout_of
from rlmm.policies.families.simplear import CODES
from rlmm.policies.layout_io import read_codes
from rollouts.law import Law
from tests.families.checkpoints import facts, peaked, sample, tiny
from tests.unit.test_codecs_cosmos import write_torchscript


@pytest.mark.parametrize("name", ["simplear", "blip3o_next"])
def test_ids_and_spelling_are_the_published_ones(name: str) -> None:
    stated, checkpoint = facts(name), Checkpoint(tiny(name).path, tiny(name))
    layout, tokenizer, tokens = layout_of(checkpoint.source, tiny(name)), checkpoint.tokenizer, stated["tokens"]
    there = {token: number for token, number in tokens.items() if token in checkpoint.vocabulary}
    assert len(there) >= 3 and all(checkpoint.vocabulary[token] == number for token, number in there.items())
    assert layout.image == (tokens["first_image"], tokens["last_image"] + 1) and layout.pad == tokens["pad"]
    assert layout.vocab_size == stated["config"].get("vocab_size", tokens["last_image"] + 1)
    asked = tokenizer.decode([*layout.prefix(checkpoint.spelled(layout, "a cat"))])
    assert asked == stated["template"].format(prompt="a cat")
    assert layout.grid.length == 9 and layout.grid.decided() == list(range(9))
    if name == "simplear":  # which of the added tokens has which id is the tokenizer's affair
        assert layout.bos is not None and tokens["first_added"] <= layout.bos <= tokens["last_added"]
        null = tokenizer.decode([*layout.prefix(layout.null([]))])
        negative = stated["config"]["negative_prompt"]
        assert null == stated["templates"]["unconditional"].format(negative_prompt=negative)


def test_simplears_image_tokenizer_is_asked_for_and_read_of_its_archives(tmp_path: Path) -> None:
    options = tiny("simplear").model_copy(update={"decoder": str(tmp_path)})
    codec, checkpoint = FAMILIES["simplear"].codec, Checkpoint(options.path, options)
    with pytest.raises(ValueError, match=r"no image tokenizer in .*Cosmos-1\.0-Tokenizer-DV8x16x16"):
        codec(checkpoint)
    published = load_file(Path(options.path) / "cosmos.safetensors")
    for name, parts in (("encoder.jit", ("encoder.", "quant_conv.")), ("decoder.jit", ("decoder.", "post_quant_"))):
        write_torchscript({n: w for n, w in published.items() if n.startswith(parts)}, tmp_path / name)
    assert codec_hash(codec(checkpoint)) == codec_hash(codec(Checkpoint(options.path, tiny("simplear"))))


def test_the_full_image_tokenizer_of_simplear_has_the_published_shape() -> None:
    stated = facts("simplear")["config"]
    with torch.device("meta"):
        widths = [stated["vq_channels"] * factor for factor in stated["vq_channels_mult"]]
        sizes = {"channels": stated["vq_channels"], "widths": widths, "z_channels": stated["vq_z_channels"]}
        network = CosmosNetwork(sizes | {"blocks": stated["vq_num_res_blocks"]})
    assert network.quant_conv.weight.shape == (stated["vq_embedding_dim"], stated["vq_z_channels"], 1, 1)
    assert CODES == stated["vq_codebook_size"] and list(LEVELS) == stated["vq_levels"]


def test_a_plain_qwen_is_no_simplear_unless_a_recipe_says_so(tmp_path: Path) -> None:
    unnamed = tiny("simplear").model_copy(update={"family": None, "image_size": None})
    with pytest.raises(ValueError, match="which of its tokens are image codes is unknown"):
        layout_of(unnamed.path, unnamed)
    shutil.copytree(unnamed.path, tmp_path / "qwen")
    config = json.loads((tmp_path / "qwen" / "config.json").read_text()) | {"vocab_size": 151936}
    (tmp_path / "qwen" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="no room for 64000 image codes"):
        layout_of(tmp_path / "qwen", CheckpointPolicy(path=str(tmp_path / "qwen"), family="simplear"))


def test_blip3os_grid_is_ta_toks_and_the_published_one_without_it(tmp_path: Path) -> None:
    shutil.copytree(tiny("blip3o_next").path, tmp_path / "blip3o")
    file = tmp_path / "blip3o" / "model.safetensors"
    save_file({n: w for n, w in load_file(file).items() if "vision_tower" not in n}, file, metadata={"format": "pt"})
    (tmp_path / "blip3o" / "plain.safetensors").unlink()
    options, stated = CheckpointPolicy(path=str(tmp_path / "blip3o"), family="blip3o_next"), facts("blip3o_next")
    layout = layout_of(options.path, options)
    assert [layout.grid.rows, layout.grid.cols] == stated["config"]["image_grid"]
    assert checkpoint_codec(options).image_size == (stated["config"]["image_size"],) * 2
    with pytest.raises(ValueError, match="draws 1024x1024 pixels; leave it out"):
        layout_of(options.path, options.model_copy(update={"image_size": (512, 512)}))


def test_blip3o_draws_of_what_the_last_layer_holds_from_the_scale_token_on() -> None:
    """Rows of unlike prompts, padded: each is what the model gives of its own sequence alone."""
    policy = peaked("blip3o_next")
    layout, made = policy.layout, sample(policy, Law(policy.layout.image))
    with torch.no_grad():
        found_BMH = policy.image_hidden(made)
        for row, name in enumerate(made.sample_id):
            prompt = policy.encode_prompt(name.rsplit("/", 1)[0])
            source = [*layout.grid.forced().values()]
            ids = torch.tensor([[*layout.prefix(prompt, [source]), *made.ids[row].tolist()]])
            alone = policy.base.base_model(input_ids=ids).last_hidden_state[0]
            start = int((ids[0] == layout.boi[1]).nonzero()[-1])
            torch.testing.assert_close(found_BMH[row], alone[start:], rtol=1e-4, atol=1e-4)
    codec = checkpoint_codec(tiny("blip3o_next"))
    other = torch.cat([found_BMH[1:], found_BMH[:1]])
    images, moved = (codec.decode(read_codes(layout, made.ids), hidden) for hidden in (found_BMH, other))
    assert not images.equal(moved)
