"""Rewards that run a published model in this process, through transformers."""

from typing import TYPE_CHECKING, Literal

from rewards.base import Reward

if TYPE_CHECKING:
    from rewards.detection import Colours, Detector

Precision = Literal["float32", "bfloat16", "float16"]
HPSV2 = "adams-story/HPSv2-hf"
DETECTORS = {"owl": "google/owlv2-base-patch16-ensemble", "grounding_dino": "IDEA-Research/grounding-dino-base"}
"""Detector -> its model where none is named."""
LAION_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


def clip_score(
    *,
    model: str = "openai/clip-vit-large-patch14",
    processor: str = "",
    device: str = "cpu",
    precision: Precision = "float32",
    batch_size: int = 32,
) -> Reward:
    """CLIPScore, 2.5 max(cosine, 0) of picture and prompt."""
    from rewards.clip import ClipReward
    from rewards.two_towers import TwoTowers

    towers = TwoTowers(model, processor=processor, device=device, precision=precision, batch_size=batch_size)
    return ClipReward(towers, "clip_score", name="clip_score")


def siglip(
    *,
    model: str = "google/siglip-so400m-patch14-384",
    processor: str = "",
    formula: Literal["probability", "logit", "cosine"] = "probability",
    device: str = "cpu",
    precision: Precision = "float32",
    batch_size: int = 32,
) -> Reward:
    """SigLIP's probability that prompt and picture belong together."""
    from rewards.clip import FORMULAS, ClipReward
    from rewards.names import nearest
    from rewards.two_towers import TwoTowers

    if formula not in FORMULAS:
        raise ValueError(f"siglip has no formula {formula!r}. {nearest(formula, FORMULAS)}")
    towers = TwoTowers(model, processor=processor, device=device, precision=precision, batch_size=batch_size)
    return ClipReward(towers, formula, name="siglip")


def pickscore(
    *,
    model: str = "yuvalkirstain/PickScore_v1",
    processor: str = LAION_H,
    device: str = "cpu",
    precision: Precision = "float32",
    batch_size: int = 32,
) -> Reward:
    """PickScore, the scaled cosine of a CLIP that was trained on people's choices."""
    from rewards.clip import ClipReward
    from rewards.two_towers import TwoTowers

    towers = TwoTowers(model, processor=processor, device=device, precision=precision, batch_size=batch_size)
    return ClipReward(towers, "logit", name="pickscore")


def hpsv2(
    *,
    model: str = HPSV2,
    processor: str = "",
    device: str = "cpu",
    precision: Precision = "float32",
    batch_size: int = 32,
) -> Reward:
    """HPSv2, the cosine of a CLIP that was trained on people's choices; whole pictures in a black square."""
    from rewards.clip import ClipReward
    from rewards.two_towers import TwoTowers

    processor = processor or ("openai/clip-vit-base-patch32" if model == HPSV2 else "")  # that conversion has none
    towers = TwoTowers(
        model, processor=processor, device=device, precision=precision, batch_size=batch_size, whole=True
    )
    return ClipReward(towers, "cosine", name="hpsv2")


def image_reward(*, model: str, device: str = "cpu", precision: Precision = "float32", batch_size: int = 16) -> Reward:
    """ImageReward, the mark of a BLIP that was trained on people's choices, from `rlmm reward convert image_reward`."""
    from rewards.image_reward import ImageReward

    return ImageReward(model, device=device, precision=precision, batch_size=batch_size)


def aesthetic(
    *,
    head: str,
    model: str = "openai/clip-vit-large-patch14",
    processor: str = "",
    device: str = "cpu",
    precision: Precision = "float32",
    batch_size: int = 32,
) -> Reward:
    """The LAION aesthetic predictor's mark of the picture, whatever the prompt."""
    from rewards.aesthetic import AestheticReward
    from rewards.two_towers import TwoTowers

    towers = TwoTowers(model, processor=processor, device=device, precision=precision, batch_size=batch_size)
    return AestheticReward(towers, head)


def objects(
    *,
    detector: Literal["owl", "grounding_dino", "scenes"],
    model: str = "",
    colours: str = "",
    form: Literal["graded", "strict"] = "graded",
    exact: bool = False,
    column: str | None = None,
    threshold: float = 0.3,
    counting_threshold: float | None = None,
    max_objects: int = 16,
    max_overlap: float = 1.0,
    device: str = "cpu",
    precision: Precision = "float32",
    batch_size: int = 8,
) -> Reward:
    """Counted, coloured and placed objects of GenEval's metadata, found by a detector."""
    from rewards.detection import ObjectsReward
    from rewards.names import nearest

    if detector not in (*DETECTORS, "scenes"):
        raise ValueError(f"objects has no detector {detector!r}. {nearest(detector, (*DETECTORS, 'scenes'))}")
    if detector == "scenes" and (model or colours):
        raise ValueError("the scenes detector tells shapes and colours exactly; leave out model and colours")
    found, named = _detection(detector, model or DETECTORS.get(detector, ""), colours, device, precision, batch_size)
    return ObjectsReward(
        found,
        colours=named,
        form=form,
        exact=exact,
        column=column,
        threshold=threshold,
        counting_threshold=counting_threshold,
        max_objects=max_objects,
        max_overlap=max_overlap,
    )


def _detection(
    detector: str, model: str, colours: str, device: str, precision: Precision, batch_size: int
) -> tuple["Detector", "Colours | None"]:
    """The detector and who names its colours. Scenes need no torch."""
    if detector == "scenes":
        from rewards.scenes_detector import SceneDetector

        return SceneDetector(), None
    from rewards.detectors import ClipColours, GroundingDinoDetector, OwlDetector
    from rewards.two_towers import TwoTowers

    kind = OwlDetector if detector == "owl" else GroundingDinoDetector
    found = kind(model, device=device, precision=precision, batch_size=batch_size)
    return found, ClipColours(TwoTowers(colours, device=device, precision=precision)) if colours else None
