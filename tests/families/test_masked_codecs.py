"""The image tokenizers of the masked families, against what was published of them and against diffusers' class."""

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rlmm.codecs import NetworkCodec
from rlmm.codecs.vq_model import vq_model_config, vq_model_name
from rlmm.codecs.vqgan import MAGVITV2, VqganNetwork
from rlmm.policies.families.loading import checkpoint_codec
from tests.families.checkpoints import facts
from tests.families.masked_checkpoints import SIZE, tiny

MAGVIT = facts("magvitv2")


def test_amuseds_tokenizer_gives_the_codes_and_pixels_of_diffusers_class() -> None:
    golden = facts("vq_model")
    shapes, config = golden["weights"], vq_model_config(golden["config"], "here")
    network = VqganNetwork(config).double()
    theirs = {name: vq_model_name(name, 3) for name in network.state_dict()}
    assert sorted(theirs.values()) == sorted(shapes)
    weights = {name: golden_weight(i, shapes[name]) for i, name in enumerate(sorted(shapes))}
    network.load_state_dict({name: weights[published] for name, published in theirs.items()})
    place = torch.arange(2 * 3 * 16 * 24, dtype=torch.float64)
    with torch.no_grad():
        codes, latents = network.encode(((place**1.3).sin() / 2 + 0.5).reshape(2, 3, 16, 24))
        pixels = network.decode((torch.arange(48) * 29 % 64).view(2, 4, 6))
    torch.testing.assert_close(latents.flatten()[:8].tolist(), golden["latents"], rtol=0, atol=1e-9)
    assert codes.tolist() == golden["codes"] and len({*golden["codes"][0]}) > 5
    torch.testing.assert_close(pixels.flatten()[::97].tolist()[:24], golden["pixels"], rtol=0, atol=1e-9)


def golden_weight(number: int, shape: list[int]) -> torch.Tensor:
    """The rule in the fixture."""
    place = torch.arange(math.prod(shape), dtype=torch.float64)
    if len(shape) == 1:
        return 0.5 + 0.5 * (place + number).sin()
    return (place * 0.7 + number).sin().reshape(shape) * (2.0 / max(1, math.prod(shape[1:]))) ** 0.5


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"mid_block_add_attention": True}, "mid_block_add_attention: True"),
        ({"down_block_types": ["AttnDownEncoderBlock2D"]}, "a block AttnDownEncoderBlock2D"),
        ({"block_out_channels": [64, 96]}, "96 channels"),
    ],
)
def test_a_vq_model_of_another_build_is_refused(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=f"image tokenizer of here has {says}"):
        vq_model_config(facts("vq_model")["config"] | change, "here")


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
