"""Images drawn of hidden states: SANA at a tiny width by diffusers, against the authors' loop written out; TA-Tok."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from rlmm.codecs import NetworkCodec
from rlmm.codecs.blip3o import Blip3oNetwork, TaTok, ta_tok_config
from rlmm.config.codec import PretrainedCodec

WIDTH = 8


def release(folder: Path) -> tuple[Any, Any, nn.Sequential]:
    """A tiny release of SANA, the parts of a checkpoint that uses it, and those as modules."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    transformer = diffusers.SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=4, num_layers=1,
        num_cross_attention_heads=2, cross_attention_head_dim=4, cross_attention_dim=8, caption_channels=6,
        sample_size=3,
    )  # fmt: skip
    vae = diffusers.AutoencoderDC(
        in_channels=3, latent_channels=4, attention_head_dim=2, encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"), encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8), encoder_qkv_multiscales=((), (5,)), decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1), decoder_layers_per_block=[1, 1], downsample_block_type="conv",
        upsample_block_type="interpolate", decoder_norm_types="rms_norm", decoder_act_fns="silu", scaling_factor=0.41,
    )  # fmt: skip
    connector = nn.Sequential(nn.Linear(WIDTH, 6), nn.GELU("tanh"), nn.Linear(6, 6), nn.RMSNorm(6, eps=1e-5))
    transformer.save_config(folder / "sana" / "transformer")
    vae.save_config(folder / "sana" / "vae")
    diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(folder / "sana" / "scheduler")
    parts = {"sana": transformer, "sana_vae": vae, "diffusion_connector": connector}
    weights = {f"model.{part}.{name}": w for part, module in parts.items() for name, w in module.state_dict().items()}
    (folder / "checkpoint").mkdir()
    save_file(weights, folder / "checkpoint" / "model.safetensors")
    return transformer.eval(), vae.eval(), connector


def config(folder: Path, **other: Any) -> dict[str, Any]:
    own = {"encoder": None, "plain": None, "checkpoint": str(folder / "checkpoint"), "sana": str(folder / "sana")}
    return own | other


def test_an_image_is_what_the_authors_loop_draws_of_the_hidden_states(tmp_path: Path) -> None:
    transformer, vae, connector = release(tmp_path)
    scheduler = pytest.importorskip("diffusers").FlowMatchEulerDiscreteScheduler(shift=3.0)
    hidden = torch.randn(2, 5, WIDTH)
    latents = torch.randn(4, 3, 3, generator=torch.Generator().manual_seed(0)).expand(2, -1, -1, -1)
    with torch.no_grad():
        scheduler.set_timesteps(30, sigmas=torch.linspace(1, 1 / 30, 30).tolist())
        for time in scheduler.timesteps:
            guided = [
                transformer(latents, encoder_hidden_states=connector(seen), timestep=time.expand(2)).sample
                for seen in (torch.zeros_like(hidden), hidden)
            ]
            latents = scheduler.step(guided[0] + 2.0 * (guided[1] - guided[0]), time, latents).prev_sample
        wanted = vae.decode(latents / 0.41).sample
        found = Blip3oNetwork(config(tmp_path)).decode(hidden)
    assert found.shape == wanted.shape and float((wanted[0] - wanted[1]).abs().max()) > 1e-3
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden = torch.zeros(1, 5, WIDTH)
    with pytest.raises(ValueError, match=r"name its release .*SANA1\.5.* in policy\.decoder"):
        Blip3oNetwork(config(tmp_path, sana=None)).decode(hidden)
    with pytest.raises(ValueError, match="no weights of TA-Tok"):
        Blip3oNetwork(config(tmp_path)).encode(torch.zeros(1, 3, 4, 4))
    monkeypatch.setitem(__import__("sys").modules, "diffusers", None)
    with pytest.raises(ImportError, match="needs diffusers.* install the extra `diffusion`"):
        Blip3oNetwork(config(tmp_path)).decode(hidden)
    settings = PretrainedCodec(
        network="blip3o", config=config(tmp_path), grid=(2, 2), image_size=(8, 8), num_codes=16
    )  # fmt: skip
    with pytest.raises(ValueError, match="needs the policy too"):
        NetworkCodec(settings).decode(torch.zeros(1, 4, dtype=torch.long))


def test_a_matrix_in_place_of_the_diffusion_model_draws_each_patch_from_its_own_code() -> None:
    torch.manual_seed(0)
    network = Blip3oNetwork({"encoder": None, "plain": (WIDTH, 4)})
    hidden = torch.randn(1, 1 + 6 * 6, WIDTH)
    whole = network.decode(hidden)
    assert whole.shape == (1, 3, 24, 24)
    hidden[0, 1 + 6 * 2 + 3] += 1  # the code of row 2, column 3
    moved = (network.decode(hidden) - whole).abs().amax((0, 1)) > 0
    assert moved[8:12, 12:16].all() and int(moved.sum()) == 16


def test_ta_tok_names_the_nearest_projected_code_of_the_last_layer_but_one() -> None:
    torch.manual_seed(0)
    tower = TaTok(32, 14, 3, layers=3, intermediate_size=48, codes=64, code_width=8)
    weights = tower.state_dict()
    sizes = {"hidden_size": 32, "patch_size": 14, "side": 3, "layers": 3, "intermediate_size": 48}
    assert ta_tok_config(weights) == sizes | {"codes": 64, "code_width": 8}
    pixels = torch.rand(2, 3, 42, 42) * 2 - 1
    with torch.no_grad():
        codes, _ = tower(pixels)
        seen = tower.encoder(pixels, output_hidden_states=True).hidden_states[-2]
        features = seen @ weights["encode_task_layer.0.weight"].T + weights["encode_task_layer.0.bias"]
        latents = features.tanh() @ weights["bottleneck.in_linear.weight"].T + weights["bottleneck.in_linear.bias"]
        names = [f"bottleneck.regularizer.{name}" for name in ("embedding.weight", "embedding_proj.weight",
                                                               "embedding_proj.bias")]  # fmt: skip
        book, matrix, bias = (weights[name] for name in names)
        cosine = torch.cosine_similarity(latents.unsqueeze(2), (book @ matrix.T + bias)[None, None], dim=-1)
    assert codes.equal(cosine.argmax(-1)) and len(codes.unique()) > 3
