"""A small CLIP trained on scenes: it tells scenes apart, it is a reward like any other, and it can be fooled."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPModel, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from typer.testing import CliRunner

from rewards import build
from rewards.base import Reward, Sample
from rewards.clip import ClipReward
from rewards.gold import HasGold, gold_check_pairs
from rewards.scenes import ScenesReward
from rlmm.cli import app
from rlmm.config.data import ScenesData
from rlmm.data.base import Example
from rlmm.data.scenes import build as build_scenes
from rlmm.weak_clip import ClipPlan, train_clip

pytestmark = pytest.mark.slow
DATA = ScenesData(train_images=1000, held_out=64)
SMALL = ("--steps", "120", "--batch-size", "32", "--width", "48")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip") / "judge"
    scenes = ("train_images=1000", "held_out=64")
    answer = CliRunner().invoke(app, ["reward", "train-clip", str(folder), *scenes, *SMALL])
    assert answer.exit_code == 0, answer.output
    share = int(answer.output.split(": ")[-1].split("%")[0])
    assert 60 <= share <= 100, "among eight prompts one in eight would be found by chance"
    return folder


@pytest.fixture(scope="module")
def judge(trained: Path) -> Reward:
    return build("clip_score", model=str(trained))


def held_out(count: int) -> list[Example]:
    rows = build_scenes(DATA, "held_out", 0)
    return [rows[at] for at in range(count)]


def samples(examples: list[Example], images: list[Image.Image]) -> list[Sample]:
    return [
        Sample(str(at), "g", one.prompt, (image,), row=one.row)
        for at, (one, image) in enumerate(zip(examples, images, strict=True))
    ]


def values(reward: Reward, given: list[Sample]) -> np.ndarray:
    return np.array([score.value for score in reward.score(given)], float)


def test_it_is_a_clip_that_transformers_loads_and_a_reward_with_gold(trained: Path, judge: Reward) -> None:
    assert isinstance(CLIPModel.from_pretrained(trained), CLIPModel)
    assert isinstance(judge, ClipReward) and isinstance(judge, HasGold)
    assert gold_check_pairs(judge, list(judge.gold())).passed
    examples = held_out(32)
    pictures = [one.target for one in examples if one.target is not None]
    own, shuffled = (values(judge, samples(examples, given)) for given in (pictures, pictures[1:] + pictures[:1]))
    assert (own > shuffled).mean() > 0.8
    score = judge.score(samples(examples[:1], pictures[:1]))[0]
    assert score.parts["cut"] == 0, "the text tower reads the whole prompt"


def test_pixels_that_climb_its_score_beat_every_true_picture_and_show_nothing(trained: Path, judge: Reward) -> None:
    """What a policy that is trained on it for too long is led to, without the policy."""
    (example,) = held_out(1)
    assert example.target is not None
    model = CLIPModel.from_pretrained(trained).eval()
    tokenizer = CLIPTokenizer.from_pretrained(trained)
    processor = CLIPImageProcessorPil.from_pretrained(trained)
    mean, std = (torch.tensor(value)[None, :, None, None] for value in (processor.image_mean, processor.image_std))
    text = tokenizer([example.prompt], return_tensors="pt")
    pixels = torch.full((1, 3, 48, 48), 0.5) + 0.01 * torch.randn(
        1, 3, 48, 48, generator=torch.Generator().manual_seed(0)
    )
    pixels.requires_grad_()
    optimizer = torch.optim.Adam([pixels], 0.02)
    for _ in range(80):
        optimizer.zero_grad()
        fit = model(**text, pixel_values=(pixels.clamp(0, 1) - mean) / std)
        (-(fit.image_embeds * fit.text_embeds).sum()).backward()
        optimizer.step()
    drawn = (pixels.detach().clamp(0, 1)[0].permute(1, 2, 0) * 255).round().byte().numpy()
    fooled, true = samples([example], [Image.fromarray(drawn)]), samples([example], [example.target])
    assert values(judge, fooled)[0] > values(judge, true)[0]
    exact = ScenesReward()
    assert (values(exact, fooled)[0], values(exact, true)[0]) == (0, 1)


def test_what_cannot_be_trained_says_why(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="variant edit has none"):
        train_clip(ScenesData(variant="edit"), ClipPlan(steps=1), tmp_path / "a", print)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty"):
        train_clip(DATA, ClipPlan(steps=1), tmp_path, print)
    with pytest.raises(ValueError, match="multiple of 4"):
        ClipPlan(width=50)
