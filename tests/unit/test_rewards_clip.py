"""Two-tower rewards on the real classes at tiny random size: what transformers itself computes, batches, failures."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from safetensors.torch import save_file
from torch import nn
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel, CLIPProcessor, SiglipModel

from rewards import build
from rewards.aesthetic import load_head
from rewards.base import Sample, Score
from rewards.gold import HasGold
from rewards.runner import RewardRunner
from rewards.two_towers import TwoTowers
from tests.unit.tiny_towers import SIDE, TOKENS, write_clip, write_siglip

NOISE = np.random.default_rng(0).integers(0, 256, (6, 20, 30, 3), dtype=np.uint8)
IMAGES = [Image.fromarray(pixels) for pixels in NOISE]
PROMPTS = ["a red cat", "blue", "a red cat", "two dogs", "blue", "sea"]
SAMPLES = [
    Sample(str(at), "g", prompt, (image,)) for at, (prompt, image) in enumerate(zip(PROMPTS, IMAGES, strict=True))
]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def siglip(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_siglip(tmp_path_factory.mktemp("siglip"))


def values(scores: Any) -> list[float]:
    return [score.value for score in scores]


@torch.inference_mode()
def clip_logits(folder: str) -> tuple[CLIPModel, np.ndarray]:
    """The logits of every sample, from transformers' own processor and forward pass, one sample at a time."""
    model: Any = CLIPModel.from_pretrained(folder)
    processor: Any = CLIPProcessor.from_pretrained(folder)
    rows = [processor(text=[s.prompt], images=list(s.images), return_tensors="pt", padding=True) for s in SAMPLES]
    return model, np.array([float(model(**row).logits_per_image) for row in rows])


@pytest.mark.parametrize("batch_size", [1, 4, 32])
def test_clip_scores_are_those_of_transformers(clip: str, batch_size: int) -> None:
    model, logits = clip_logits(clip)
    cosines = logits / float(model.logit_scale.detach().exp())
    assert np.ptp(cosines) > 0.05 and cosines.min() < 0, "the tiny model tells its inputs apart"
    options: dict[str, Any] = {"model": clip, "batch_size": batch_size}
    pick = build("pickscore", processor=clip, **options).score(SAMPLES)
    assert values(pick) == pytest.approx(logits, abs=1e-4)
    whole = [replace(sample, images=(ImageOps.pad(sample.images[0], (SIDE, SIDE)),)) for sample in SAMPLES]
    hps = build("hpsv2", processor=clip, **options).score(SAMPLES)
    assert [one.parts["cosine"] for one in build("clip_score", **options).score(whole)] == pytest.approx(values(hps))
    assert abs(np.array(values(hps)) - cosines).max() > 1e-3, "a CLIP sees the middle alone"
    score = build("clip_score", **options).score(SAMPLES)
    assert values(score) == pytest.approx(2.5 * np.maximum(cosines, 0), abs=1e-5)
    assert [one.parts["cosine"] for one in score] == pytest.approx(cosines, abs=1e-5)


@torch.inference_mode()
def test_siglip_fills_texts_up_and_has_a_bias(siglip: str) -> None:
    model = SiglipModel.from_pretrained(siglip)
    tokenizer: Any = AutoTokenizer.from_pretrained(siglip)
    pixels: Any = AutoImageProcessor.from_pretrained(siglip, backend="pil")
    text = tokenizer(PROMPTS, padding="max_length", max_length=TOKENS, return_tensors="pt")
    own = model(input_ids=text.input_ids, pixel_values=pixels(images=IMAGES, return_tensors="pt")["pixel_values"])
    logits = own.logits_per_image.diagonal().numpy()
    assert np.ptp(logits) > 0.1, logits
    probability = build("siglip", model=siglip).score(SAMPLES)
    assert values(probability) == pytest.approx(1 / (1 + np.exp(-logits)), abs=1e-5)
    assert values(build("siglip", model=siglip, formula="logit").score(SAMPLES)) == pytest.approx(logits, abs=1e-4)


def test_several_images_are_averaged_and_failures_keep_their_places(clip: str) -> None:
    reward = build("pickscore", model=clip, processor=clip)
    one, two = values(reward.score([Sample("a", "g", "sea", (IMAGES[0],)), Sample("b", "g", "sea", (IMAGES[1],))]))
    mixed = [
        Sample("a", "g", " ", (IMAGES[0],)),
        Sample("b", "g", "sea", (IMAGES[0], IMAGES[1].convert("RGBA"))),
        Sample("c", "g", "sea"),
    ]
    scores = reward.score(mixed)
    assert [score.status for score in scores] == ["unavailable", "ok", "invalid_output"]
    assert scores[1].value == pytest.approx((one + two) / 2, abs=1e-5)
    assert [score.status for score in reward.score(mixed[::2])] == ["unavailable", "invalid_output"]


def test_a_prompt_that_is_cut_is_told(clip: str) -> None:
    long = "x" * (TOKENS + 5)
    scores = build("clip_score", model=clip).score(
        [Sample("s", "g", prompt, (IMAGES[0],)) for prompt in ("short", long)]
    )
    assert [score.parts["cut"] for score in scores] == [0, 1]


def test_a_model_that_breaks_gives_no_number(tmp_path: Path) -> None:
    model = CLIPModel.from_pretrained(write_clip(tmp_path))
    nn.init.constant_(model.visual_projection.weight, float("nan"))
    model.save_pretrained(tmp_path)
    scores = RewardRunner(build("clip_score", model=str(tmp_path))).score(SAMPLES)
    assert {(score.status, score.value) for score in scores} == {("unavailable", None)}
    assert build("pickscore", model=str(tmp_path), processor=str(tmp_path)).score(SAMPLES)[0].status == "unavailable"


def test_the_fingerprint_is_that_of_the_weights_not_of_the_place(clip: str, siglip: str, tmp_path: Path) -> None:
    again, other = write_clip(tmp_path / "again"), write_clip(tmp_path / "other", seed=1)
    prints = [TwoTowers(folder).fingerprint() for folder in (clip, again, other, siglip)]
    assert prints[0] == prints[1] and len(set(prints)) == 3
    assert TwoTowers(clip, precision="bfloat16").fingerprint() != prints[0]
    names = {build(name, model=clip, processor=clip).fingerprint() for name in ("clip_score", "pickscore", "hpsv2")}
    assert len(names) == 3


def test_bfloat16_is_near(clip: str) -> None:
    full = build("clip_score", model=clip).score(SAMPLES)
    half = build("clip_score", model=clip, precision="bfloat16").score(SAMPLES)
    assert [s.parts["cosine"] for s in half] == pytest.approx([s.parts["cosine"] for s in full], abs=0.05)


class Predictor(nn.Module):
    """The published predictor's layers, at another width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        sizes = [width, 10, 8, 6, 4, 1]
        linear = [nn.Linear(one, other) for one, other in zip(sizes, sizes[1:], strict=False)]
        drop = nn.Dropout(0.2)
        self.layers = nn.Sequential(linear[0], drop, linear[1], drop, linear[2], drop, linear[3], linear[4])


@pytest.mark.parametrize("form", ["pth", "safetensors"])
def test_the_aesthetic_mark_is_the_predictors_own(clip: str, form: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    predictor, path = Predictor(12).eval(), tmp_path / f"head.{form}"
    state = predictor.state_dict()
    torch.save(state, path) if form == "pth" else save_file(state, path)
    model: Any = CLIPModel.from_pretrained(clip)
    processor: Any = CLIPProcessor.from_pretrained(clip)
    with torch.inference_mode():
        given = processor(images=IMAGES, return_tensors="pt")
        vectors = model.get_image_features(**given).pooler_output
        marks = predictor.layers(vectors / vectors.norm(dim=-1, keepdim=True))[:, 0].numpy()
    reward = build("aesthetic", head=str(path), model=clip)
    assert np.ptp(marks) > 1e-3 and values(reward.score(SAMPLES)) == pytest.approx(marks, abs=1e-5)
    pair = Sample("p", "g", "", (IMAGES[0], IMAGES[1]))
    assert reward.score([pair, Sample("none", "g", "")])[0].value == pytest.approx(marks[:2].mean(), abs=1e-5)
    assert reward.score([Sample("none", "g", "")])[0] == Score.invalid_output("the sample has no image")
    assert not isinstance(reward, HasGold)


def test_a_head_that_is_none_says_so(clip: str, tmp_path: Path) -> None:
    for name, state, message in (
        ("wide", Predictor(7).state_dict(), "the CLIP gives 12"),
        ("keys", {"mlp.weight": torch.ones(1, 12)}, "no stack of linear layers"),
        ("half", {"layers.0.weight": torch.ones(1, 12)}, "no stack of linear layers"),
    ):
        save_file(state, tmp_path / f"{name}.safetensors")
        with pytest.raises(ValueError, match=message):
            build("aesthetic", head=str(tmp_path / f"{name}.safetensors"), model=clip)
    with pytest.raises(ValueError, match="no aesthetic head at"):
        load_head(tmp_path / "nowhere.pth")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "gpu"}, "none that torch knows"),
        ({"precision": "fp16"}, "Nearest: float16"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"model": "no/such/folder"}, "no/such/folder"),
    ],
)
def test_options_that_cannot_work_say_why(clip: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, OSError), match=message):
        build("clip_score", **{"model": clip, **options})
    with pytest.raises(ValueError, match="Nearest: probability"):
        build("siglip", model=clip, formula="probabilty")


def test_another_kind_of_model_is_refused(clip: str, tmp_path: Path) -> None:
    CLIPModel.from_pretrained(clip).vision_model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no CLIP or SigLIP model with two towers"):
        build("clip_score", model=str(tmp_path))
