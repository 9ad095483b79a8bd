"""Cosmos on one frame: against an independent network for video, from files of its published kind."""

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from rlmm.codecs.cosmos import CosmosNetwork, cosmos_config, flattened, for_video, haar, inverse_haar
from rlmm.codecs.network_files import load_network
from rlmm.codecs.torchscript import read_torchscript

RENAMED = (
    (r"conv_s\.", "0.conv3d."),
    (r"conv_t\.", "1.conv3d."),
    (r"(down|up)_blocks\.", r"\1."),
    (r"(down|up)\.(\d)\.resnets", r"\1.\2.block"),
    (r"(down|up)\.(\d)\.(down|up)samplers\.0", r"\1.\2.\3sample"),
    (r"mid_block\.resnets\.0", "mid.block_1"),
    (r"mid_block\.resnets\.1", "mid.block_2"),
    (r"mid_block\.attentions\.0", "mid.attn_1.0"),
    (r"mid_block\.temp_attentions\.0", "mid.attn_1.1"),
    (r"to_out\.0\.", "proj_out.conv3d."),
    (r"to_([qkv])\.", r"\1.conv3d."),
    (r"conv_shortcut\.", "nin_shortcut.conv3d."),
    (r"sample\.conv([123])\.", r"sample.conv\1.conv3d."),
)
"""diffusers' names of the video network -> those that NVIDIA published it under."""


def video(channels: int, widths: list[int]) -> tuple[nn.Module, nn.Module, dict[str, Tensor]]:
    """diffusers' encoder and decoder with random weights, and these as published."""
    cosmos = pytest.importorskip("diffusers.models.autoencoders.autoencoder_kl_cosmos")
    sizes = {"num_resnet_blocks": 1, "spatial_compression_ratio": 16, "temporal_compression_ratio": 8}
    encoder = cosmos.CosmosEncoder3d(out_channels=4, block_out_channels=(channels, *widths), **sizes)
    decoder = cosmos.CosmosDecoder3d(in_channels=4, block_out_channels=(*widths, widths[-1]), **sizes)
    published: dict[str, Tensor] = {}
    for part, module in (("encoder", encoder), ("decoder", decoder)):
        for name, weight in module.state_dict().items():
            weight.normal_(std=0.3)
            for pattern, put in RENAMED:
                name = re.sub(pattern, put, name)
            # diffusers counts the decoder's resolutions from the narrowest picture.
            name = re.sub(r"^up\.(\d)", lambda found: f"up.{2 - int(found[1])}", name)
            published[f"{part}.{name}"] = weight
    convolutions = {"quant_conv": (6, 4, 1, 1, 1), "post_quant_conv": (4, 6, 1, 1, 1)}
    for name, shape in convolutions.items():
        published |= {f"{name}.conv3d.weight": torch.randn(shape), f"{name}.conv3d.bias": torch.randn(shape[0])}
    return encoder, decoder, published


def write_torchscript(weights: Mapping[str, Tensor], file: Path) -> None:
    """An archive of modules that hold these tensors as parameters and can do nothing."""
    root = nn.Module()
    for name, tensor in weights.items():
        *path, last = name.split(".")
        module = root
        for part in path:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        module.register_parameter(last, nn.Parameter(tensor, requires_grad=False))
    torch.jit.script(root).save(str(file))


def test_one_frame_of_the_video_network_is_the_network_over_the_plane() -> None:
    torch.manual_seed(0)
    encoder, decoder, published = video(8, [16, 24, 32])
    network = CosmosNetwork(cosmos_config(published)).double()
    load_network(network, flattened({name: weight.double() for name, weight in published.items()}), "published")
    frame, latents = torch.rand(2, 3, 64, 48).double() * 2 - 1, torch.randn(2, 4, 4, 3).double()
    with torch.no_grad():
        wanted = encoder.double()(frame.unsqueeze(2)).squeeze(2), decoder.double()(latents.unsqueeze(2)).squeeze(2)
        found = network.encoder(frame), network.decoder(latents)
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.shape == theirs.shape and float(theirs.std()) > 0.1
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_weights_for_video_flatten_to_the_networks_own_and_have_the_published_names_and_shapes() -> None:
    torch.manual_seed(0)
    network = CosmosNetwork({"channels": 8, "widths": [16, 24, 32], "blocks": 1, "z_channels": 4})
    made, own = for_video(network), network.state_dict()
    assert cosmos_config(made) == {"channels": 8, "widths": [16, 24, 32], "blocks": 1, "z_channels": 4}
    back = flattened(made)
    assert back.keys() == own.keys() and all(back[name].equal(weight) for name, weight in own.items())
    published = video(8, [16, 24, 32])[2]
    assert {name: tensor.shape for name, tensor in made.items()}.items() <= {
        name: tensor.shape for name, tensor in published.items()
    }.items()


def test_wavelets_are_undone_and_a_flat_picture_has_no_differences() -> None:
    pixels = torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close(inverse_haar(haar(pixels)), pixels)
    flat = haar(torch.full((1, 3, 8, 8), 0.25))
    assert flat.shape == (1, 48, 2, 2) and flat[:, :3].eq(0.25).all() and flat[:, 3:].eq(0).all()


def test_tensors_are_read_as_torch_reads_them(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, 2).to(torch.bfloat16), nn.GroupNorm(1, 4))
    module.register_buffer("counts", torch.arange(5))
    for number, made in enumerate([torch.jit.script(module), torch.jit.trace(module[0], torch.rand(1, 3, 8, 8))]):
        file = str(tmp_path / f"{number}.jit")
        torch.jit.save(made, file)
        found, wanted = read_torchscript(Path(file)), torch.jit.load(file).state_dict()
        assert sorted(found) == sorted(wanted)
        assert all(found[name].equal(tensor) and found[name].dtype == tensor.dtype for name, tensor in wanted.items())


def test_an_archive_that_would_make_something_else_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "bad.jit", "w") as archive:
        archive.writestr("bad/data.pkl", b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(ValueError, match=r"asks for os\.system, which is neither module nor tensor"):
        read_torchscript(tmp_path / "bad.jit")
    (tmp_path / "not.jit").write_bytes(b"no zip")
    with pytest.raises(ValueError, match="cannot be read as a TorchScript archive"):
        read_torchscript(tmp_path / "not.jit")


def test_other_weights_are_no_cosmos(tmp_path: Path) -> None:
    write_torchscript({"decoder.conv_in.weight": torch.rand(2, 2)}, tmp_path / "other.jit")
    with pytest.raises(ValueError, match=r"no 'encoder\.conv_in.*no weights of Cosmos"):
        cosmos_config(read_torchscript(tmp_path / "other.jit"))
