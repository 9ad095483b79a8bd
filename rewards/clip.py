"""How well picture and prompt fit by a two-tower model: CLIPScore, SigLIP, PickScore, HPSv2."""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from PIL import Image

from rewards.base import Sample, Score
from rewards.gold import GoldPair
from rewards.gold_images import scene_image
from rewards.images import load_or_invalid
from rewards.two_towers import TwoTowers

Formula = Literal["cosine", "clip_score", "logit", "probability"]
FORMULAS: dict[Formula, Callable[[float, TwoTowers], float]] = {
    "cosine": lambda cosine, model: cosine,
    "clip_score": lambda cosine, model: 2.5 * max(cosine, 0.0),
    "logit": lambda cosine, model: model.scale * cosine + model.bias,
    "probability": lambda cosine, model: float(torch.sigmoid(torch.tensor(model.scale * cosine + model.bias))),
}
"""From the cosine of picture and prompt to the value: as it is (HPSv2, arXiv 2306.09341); 2.5 max(cos, 0) (CLIPScore,
arXiv 2104.08718, eq. 1); scale * cos (+ bias) (PickScore, arXiv 2305.01569); its sigmoid (SigLIP, arXiv 2303.15343).
"""


class ClipReward:
    """A formula of the cosine between picture and prompt, averaged over the sample's images.

    Parts: `cosine`, and `cut`, 1 where the prompt is longer than the text tower reads, so that its end does not count.
    An empty prompt is unavailable; an image that does not decode is invalid output.
    """

    def __init__(self, model: TwoTowers, formula: Formula, *, name: str) -> None:
        self.name, self.model, self.formula = name, model, formula

    def fingerprint(self) -> str:
        """The model's weights and the formula."""
        return f"{self.name}/1 {self.formula} [{self.model.fingerprint()}]"

    def score(self, samples: Sequence[Sample]) -> list[Score]:
        """One Score a sample, in order; each different prompt goes through the text tower once."""
        loaded = [loaded_pictures(sample) for sample in samples]
        shown = [(sample.prompt, item) for sample, item in zip(samples, loaded, strict=True) if isinstance(item, list)]
        if not shown:
            return [item for item in loaded if isinstance(item, Score)]
        prompts = list(dict.fromkeys(prompt for prompt, _ in shown))
        texts = dict(zip(prompts, self.model.texts(prompts), strict=True))
        pictures = iter(self.model.pictures([image for _, images in shown for image in images]))
        cut = {prompt: float(self.model.is_cut(prompt)) for prompt in prompts}
        scores: list[Score] = []
        for sample, item in zip(samples, loaded, strict=True):
            if isinstance(item, Score):
                scores.append(item)
                continue
            cosines = [float(next(pictures) @ texts[sample.prompt]) for _ in item]
            values = [FORMULAS[self.formula](cosine, self.model) for cosine in cosines]
            mean = sum(cosines) / len(cosines)
            scores.append(Score.ok(sum(values) / len(values), cosine=mean, cut=cut[sample.prompt]))
        return scores

    def gold(self) -> Sequence[GoldPair]:
        """A red disc and a blue square, each against the other's prompt."""
        return matching_pairs()


def matching_pairs() -> list[GoldPair]:
    """Pictures that fit their prompt, and as bad ones those that fit the other's."""
    disc, square = (
        scene_image({(1, 1): (shape, color)}).resize((336, 336), Image.Resampling.NEAREST)
        for shape, color in (("circle", "red"), ("square", "blue"))
    )
    pairs = (("a red circle on a white background", disc, square), ("a blue square on white", square, disc))
    return [
        GoldPair(Sample("good", "gold", prompt, (good,)), Sample("bad", "gold", prompt, (bad,)), prompt)
        for prompt, good, bad in pairs
    ]


def loaded_pictures(sample: Sample) -> list[Image.Image] | Score:
    """The sample's images, or why there is nothing to compare a prompt with."""
    if not sample.prompt.strip():
        return Score.unavailable("the prompt is empty, so there is nothing to compare the image with")
    return load_or_invalid(sample)
