"""The perceptual loss: its value by hand, where its gradient goes, what is refused, and a stage trained with it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedModel,
    ResNetConfig,
    ResNetModel,
)

from rlmm.codecs import build_codec, codec_loss
from rlmm.codecs.perceptual import PerceptualLoss
from rlmm.config.codec import FsqCodec, Perceptual
from rlmm.config.recipe import Recipe, read_recipe
from rlmm.pipeline import run_recipe
from rlmm.run_folder import RunFolder
from rlmm.train.codec import ImageSource
from rlmm.train.metrics import MetricsFile

TINY = Path(__file__).parents[1] / "recipes" / "tiny.yaml"
VISION: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip
TEXT: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
KINDS = ["resnet", "clip vision", "clip"]


def network(kind: str) -> PreTrainedModel:
    """A tiny network with random weights and, in a ResNet, batch statistics that are not the fresh ones."""
    torch.manual_seed(0)
    if kind == "clip vision":
        return CLIPVisionModel(CLIPVisionConfig(**VISION))
    if kind == "clip":
        return CLIPModel(CLIPConfig(text_config=TEXT, vision_config=VISION))
    model = ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"))
    model.train()(torch.rand(4, 3, 16, 24))
    return model


def loss_of(kind: str, folder: Path, **settings: Any) -> PerceptualLoss:
    network(kind).save_pretrained(folder)
    return PerceptualLoss(Perceptual(model=str(folder), **settings))


def pictures(channels: int = 1, height: int = 16, width: int = 16) -> torch.Tensor:
    return torch.rand(2, channels, height, width, generator=torch.Generator().manual_seed(1))


def by_hand(kind: str, first: torch.Tensor, second: torch.Tensor, mean: Any, std: Any, layers: list[int]) -> float:
    """Eq. 1 of Zhang et al. with unit weights, in numpy: position by position, the mean of the layers."""
    model = network(kind).eval()
    sides = []
    for images in (first, second):
        rgb = np.concatenate([images.numpy()] * (3 // images.shape[1]), axis=1)
        pixels = (rgb - np.reshape(mean, (1, 3, 1, 1))) / np.reshape(std, (1, 3, 1, 1))
        with torch.no_grad():
            output = model(pixel_values=torch.from_numpy(pixels).float(), output_hidden_states=True)
        sides.append([state.double().numpy() for state in output.hidden_states])
    distances = []
    for index in layers:
        a, b = (np.moveaxis(side[index], 1, -1) if side[index].ndim == 4 else side[index] for side in sides)
        a, b = a / np.linalg.norm(a, axis=-1, keepdims=True), b / np.linalg.norm(b, axis=-1, keepdims=True)
        distances.append(np.mean(2 - 2 * np.einsum("...d,...d->...", a, b)))
    return float(np.mean(distances))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("channels", [1, 3])
def test_zero_where_equal_and_growing_with_the_distortion(kind: str, channels: int, tmp_path: Path) -> None:
    loss, images = loss_of(kind, tmp_path), pictures(channels)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(2))
    values = [float(loss(images + size * noise, images)) for size in (0, 0.02, 0.1, 0.5)]
    assert values[0] == pytest.approx(0, abs=1e-9)
    assert values == sorted(values) and 1e-6 < values[1] < values[3] < 4


@pytest.mark.parametrize(
    ("kind", "channels", "layers"),
    [("resnet", 1, None), ("resnet", 3, (0, 2)), ("clip vision", 1, None), ("clip vision", 3, (-1,))],
)
def test_the_value_is_that_of_the_formula(kind: str, channels: int, layers: Any, tmp_path: Path) -> None:
    first, second = pictures(channels), pictures(channels).flip(-1)
    found = float(loss_of(kind, tmp_path, layers=layers)(first, second))
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    # Both have three hidden states. A batch norm would give another value outside evaluation mode.
    assert found == pytest.approx(by_hand(kind, first, second, mean, std, list(layers or (0, 1, 2))), rel=1e-4)


def test_images_are_normalised_as_the_model_says(tmp_path: Path) -> None:
    mean, std = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": mean, "image_std": std}))
    first, second = pictures(), pictures().flip(-1)
    found = float(loss_of("resnet", tmp_path)(first, second))
    assert found == pytest.approx(by_hand("resnet", first, second, mean, std, [0, 1, 2]), rel=1e-4)


@pytest.mark.parametrize("size", [(8, 12), (32, 40)])
def test_a_vit_sees_images_in_its_own_size(size: tuple[int, int], tmp_path: Path) -> None:
    """Against Pillow's bilinear resizing; a ResNet takes any size as it is."""
    first, second = pictures(1, *size), pictures(1, *size).flip(-1)

    def resized(images: torch.Tensor) -> torch.Tensor:
        rows = [
            np.asarray(Image.fromarray(image.numpy()).resize((16, 16), Image.Resampling.BILINEAR))
            for image in images[:, 0]
        ]
        return torch.from_numpy(np.stack(rows))[:, None]

    vit, resnet = loss_of("clip vision", tmp_path / "vit"), loss_of("resnet", tmp_path / "resnet")
    assert float(vit(first, second)) == pytest.approx(float(vit(resized(first), resized(second))), rel=1e-3)
    assert float(resnet(first, second)) != pytest.approx(float(resnet(resized(first), resized(second))), rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_goes_to_the_reconstruction_alone(kind: str, tmp_path: Path) -> None:
    loss = loss_of(kind, tmp_path).train()
    reconstruction, images = pictures().flip(-1).requires_grad_(), pictures().requires_grad_()
    loss(reconstruction, images).backward()
    assert reconstruction.grad is not None and reconstruction.grad.isfinite().all() and reconstruction.grad.any()
    assert images.grad is None
    assert all(p.grad is None and not p.requires_grad for p in loss.parameters())
    assert not any(module.training for module in loss.modules())


def test_the_gradient_is_finite_where_all_features_are_zero(tmp_path: Path) -> None:
    """A CLIP tower without biases or positions whose input is the mean colour: every feature of it is zero."""
    loss = loss_of("clip vision", tmp_path, layers=(0,))
    with torch.no_grad():
        for name, weight in loss.network.named_parameters():
            if "patch_embedding" not in name:
                weight.zero_()
    loss.network.pre_layrnorm = torch.nn.Identity()
    loss.mean_C11.fill_(0.5)
    reconstruction = torch.full((1, 1, 16, 16), 0.5, requires_grad=True)
    assert not loss._features(reconstruction)[0].any()
    loss(reconstruction, pictures()[:1]).backward()
    assert reconstruction.grad is not None and reconstruction.grad.isfinite().all()
    assert 0 < reconstruction.grad.abs().max() < 1e6


def test_the_codecs_loss_grows_by_the_weighted_distance() -> None:
    config = FsqCodec.model_validate({"image_size": (16, 16), "channels": 1, "width": 8, "blocks": 1})
    codec, images = build_codec(config), pictures()
    plain, without = codec_loss(codec, images)
    loss, figures = codec_loss(codec, images, lambda a, b: (a - b).abs().amax(), 0.25)
    distance = float((codec(images).reconstruction - images).detach().abs().amax())
    assert loss.item() == pytest.approx(plain.item() + 0.25 * distance, rel=1e-6)
    assert figures == {**without, "perceptual": pytest.approx(distance)}


def test_what_cannot_be_used_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"names \[3, -4\].*has 3 hidden_states; choose from 0 to 2"):
        loss_of("resnet", tmp_path / "resnet", layers=(0, 3, -3, -4))(pictures(), pictures())
    with pytest.raises(ValueError, match=r"perceptual\.model '.*nowhere' cannot be read"):
        PerceptualLoss(Perceptual(model=str(tmp_path / "nowhere")))
    weights = tmp_path / "resnet" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(ValueError, match="resnet' cannot be read"):
        PerceptualLoss(Perceptual(model=str(tmp_path / "resnet")))
    BertModel(BertConfig(**TEXT)).save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match="takes input_ids, not images"):
        PerceptualLoss(Perceptual(model=str(tmp_path / "bert")))
    for wrong in ({"weight": 0}, {"layers": ()}, {"layer": (1,)}):
        with pytest.raises(ValidationError):
            Perceptual.model_validate({"model": "x", **wrong})


def test_loading_leaves_the_random_generator_alone(tmp_path: Path) -> None:
    network("clip vision").save_pretrained(tmp_path)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    PerceptualLoss(Perceptual(model=str(tmp_path)))
    assert torch.equal(before, torch.get_rng_state())


def codec_stage(run_dir: Path, *overrides: str) -> Recipe:
    recipe = read_recipe(TINY, [f"run_dir={run_dir}", "runtime.trackers=[]", *overrides])
    return recipe.model_copy(update={"stages": {"codec": recipe.stages["codec"]}})


def outcome(folder: RunFolder) -> tuple[bytes, list[dict[str, Any]]]:
    """The codec's weights and the figures that are not times."""
    rows = MetricsFile(folder.stage("codec") / "metrics.jsonl").read()
    figures = [{name: value for name, value in row.items() if not name.startswith("time/")} for row in rows]
    return (folder.stage("codec") / "codec" / "codec.safetensors").read_bytes(), figures


def test_a_stage_trains_with_it_and_resumes_bit_identically(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network("resnet").save_pretrained(tmp_path / "resnet")
    perceptual = f"stages.codec.perceptual={{model: {tmp_path / 'resnet'}, weight: 0.5}}"
    whole = outcome(run_recipe(codec_stage(tmp_path / "whole", perceptual), print))
    plain = outcome(run_recipe(codec_stage(tmp_path / "plain"), print))
    assert len(whole[1]) == 4 and all(0 < row["perceptual"] < 4 for row in whole[1])
    assert "perceptual" not in plain[1][0] and len(whole[0]) == len(plain[0]) and whole[0] != plain[0]
    first, first_plain = whole[1][0], plain[1][0]
    assert first["loss"] == pytest.approx(first_plain["loss"] + 0.5 * first["perceptual"], abs=1e-4)

    make = ImageSource.micro_batches

    def stop(source: ImageSource, step: int) -> Any:
        if step == 3:
            raise KeyboardInterrupt
        return make(source, step)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ImageSource, "micro_batches", stop)
        run_recipe(codec_stage(tmp_path / "cut", perceptual), print)
    said: list[str] = []
    assert outcome(run_recipe(codec_stage(tmp_path / "cut", perceptual), said.append)) == whole
    assert any("resuming from step 2 of 4" in line for line in said)
