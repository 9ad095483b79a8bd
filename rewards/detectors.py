"""Detectors that `detection` may ask: transformers' open-vocabulary ones, and the exact one of generated scenes."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from PIL import Image

from rewards.checkpoints import load_model
from rewards.detection import Detection
from rewards.gold import GoldPair
from rewards.object_spec import COLORS
from rewards.two_towers import Precision, TwoTowers, check_device, weights_digest

OWL_ASKS = "a photo of a {}"
COLOR_ASKS = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")


class _Checkpoint:
    """A zero-shot detector's model and processor, loaded from a folder or hub id, and what tells it from others."""

    def __init__(self, model: str, kinds: Sequence[str], device: str, precision: Precision, batch_size: int) -> None:
        check_device(device, precision)
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        from transformers import AutoConfig, AutoModelForZeroShotObjectDetection, AutoProcessor

        kind = AutoConfig.from_pretrained(model, trust_remote_code=False).model_type
        if kind not in kinds:
            raise ValueError(f"{model} holds a model of type {kind!r}; this detector runs {', '.join(kinds)}")
        loaded: Any = load_model(AutoModelForZeroShotObjectDetection, model, dtype=getattr(torch, precision))
        self.device, self.batch_size = torch.device(device), batch_size
        self.model = loaded.eval().requires_grad_(False).to(self.device)
        self.processor: Any = AutoProcessor.from_pretrained(model, trust_remote_code=False)
        self.print = f"{type(loaded).__name__} {weights_digest(loaded)} {precision}"

    def run(self, inputs: Any) -> Any:
        """The model's outputs."""
        given = inputs.to(self.device)
        given["pixel_values"] = given["pixel_values"].to(self.model.dtype)
        with torch.inference_mode():
            return self.model(**given)


class OwlDetector:
    """OWL-ViT or OWLv2: every box goes to the name that fits it best. Its confidences are low; thresholds of 0.1 to 0.3
    are usual.
    """

    tells_colours = False

    def __init__(
        self, model: str, *, device: str = "cpu", precision: Precision = "float32", batch_size: int = 8
    ) -> None:
        self._loaded = _Checkpoint(model, ("owlv2", "owlvit"), device, precision, batch_size)

    def fingerprint(self) -> str:
        """The weights and how names are put."""
        return f"owl {self._loaded.print} {OWL_ASKS}"

    def gold(self) -> Sequence[GoldPair]:
        """None: it was trained on photographs."""
        return []

    def detect(self, images: Sequence[Image.Image], names: Sequence[Sequence[str]]) -> list[list[Detection]]:
        """Each image's boxes; images that ask for the same names share a forward pass."""
        found: list[list[Detection]] = [[] for _ in images]
        for asked in dict.fromkeys(tuple(each) for each in names):
            rows = [row for row, each in enumerate(names) if tuple(each) == asked]
            for chunk in _chunks(rows, self._loaded.batch_size):
                for row, boxes in zip(chunk, self._chunk([images[row] for row in chunk], asked), strict=True):
                    found[row] = boxes
        return found

    def _chunk(self, images: Sequence[Image.Image], names: Sequence[str]) -> list[list[Detection]]:
        texts = [[OWL_ASKS.format(name) for name in names]] * len(images)
        inputs = self._loaded.processor(text=texts, images=list(images), truncation=True, return_tensors="pt")
        answers = self._loaded.processor.post_process_grounded_object_detection(
            self._loaded.run(inputs),
            threshold=0.0,
            target_sizes=[(image.height, image.width) for image in images],
            text_labels=[list(names)] * len(images),
        )
        return [_read(answer, answer["text_labels"], image) for answer, image in zip(answers, images, strict=True)]


class GroundingDinoDetector:
    """Grounding DINO, one name a forward pass, so that no phrase has to be read back into a name."""

    tells_colours = False

    def __init__(
        self, model: str, *, device: str = "cpu", precision: Precision = "float32", batch_size: int = 8
    ) -> None:
        self._loaded = _Checkpoint(model, ("grounding-dino",), device, precision, batch_size)

    def fingerprint(self) -> str:
        """The weights and how names are put."""
        return f"grounding-dino {self._loaded.print} one name a pass"

    def gold(self) -> Sequence[GoldPair]:
        """None: it was trained on photographs."""
        return []

    def detect(self, images: Sequence[Image.Image], names: Sequence[Sequence[str]]) -> list[list[Detection]]:
        """Each image's boxes of each of its names."""
        found: list[list[Detection]] = [[] for _ in images]
        asked = [(row, name) for row, each in enumerate(names) for name in each]
        for chunk in _chunks(asked, self._loaded.batch_size):
            shown = [images[row] for row, _ in chunk]
            inputs = self._loaded.processor(
                text=[f"{name.lower()}." for _, name in chunk], images=shown, padding=True, return_tensors="pt"
            )
            tokens = inputs["input_ids"]
            answers = self._loaded.processor.post_process_grounded_object_detection(
                self._loaded.run(inputs),
                tokens,
                threshold=0.0,
                text_threshold=0.0,
                target_sizes=[(image.height, image.width) for image in shown],
            )
            for (row, name), answer, image in zip(chunk, answers, shown, strict=True):
                found[row] += _read(answer, [name] * len(answer["scores"]), image)
        return found


def _chunks(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _read(answer: Any, names: Sequence[str], image: Image.Image) -> list[Detection]:
    """Detections with boxes cut to the picture."""
    found: list[Detection] = []
    for name, score, box in zip(names, answer["scores"].tolist(), answer["boxes"].tolist(), strict=True):
        left, right = (min(max(edge, 0.0), float(image.width)) for edge in (box[0], box[2]))
        top, bottom = (min(max(edge, 0.0), float(image.height)) for edge in (box[1], box[3]))
        found.append(Detection(name, score, (left, top, right, bottom)))
    return found


class ClipColours:
    """Colours by a CLIP: the one of `object_spec.COLORS` whose description fits an object's crop best. GenEval greys
    out what is around the object by its mask; open-vocabulary detectors give none, so the whole box is looked at.
    """

    def __init__(self, model: TwoTowers) -> None:
        self._model = model

    def fingerprint(self) -> str:
        """The CLIP and the descriptions."""
        return f"clip colours {self._model.fingerprint()} {COLOR_ASKS}"

    def name_colours(self, image: Image.Image, objects: Sequence[Detection]) -> list[str]:
        """A colour for each object."""
        crops = [image.crop(_at_least_a_pixel(one.box, image)) for one in objects]
        pictures = self._model.pictures(crops)
        named: list[str] = []
        for picture, one in zip(pictures, objects, strict=True):
            asked = [ask.format(color=color, name=one.name) for color in COLORS for ask in COLOR_ASKS]
            texts = self._model.texts(asked).unflatten(0, (len(COLORS), len(COLOR_ASKS))).mean(dim=1)
            named.append(COLORS[int((torch.nn.functional.normalize(texts, dim=-1) @ picture).argmax())])
        return named


def _at_least_a_pixel(box: Sequence[float], image: Image.Image) -> tuple[int, int, int, int]:
    left, top = min(int(box[0]), image.width - 1), min(int(box[1]), image.height - 1)
    return left, top, max(left + 1, round(box[2])), max(top + 1, round(box[3]))
