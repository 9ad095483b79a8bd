"""The exact detector of generated scenes, as `detection` asks one: circles, squares, triangles, and their colours."""

from collections.abc import Sequence

from PIL import Image

from rewards import scenes_detect
from rewards.base import Sample
from rewards.detection import Detection
from rewards.gold import GoldPair
from rewards.gold_images import scene_image
from rewards.names import nearest
from rewards.scenes_spec import SHAPES, SIZE


class SceneDetector:
    """Finds what `scenes_detect` finds, with confidence 1, in 48x48 images."""

    tells_colours = True

    def fingerprint(self) -> str:
        """The constants of the detection."""
        return f"scenes {scenes_detect.fingerprint()}"

    def detect(self, images: Sequence[Image.Image], names: Sequence[Sequence[str]]) -> list[list[Detection]]:
        """Each image's shapes. Raises ValueError for another name, and for an image of another size."""
        for name in (name for each in names for name in each):
            if name not in SHAPES:
                raise ValueError(f"the scene detector finds no {name!r}. {nearest(name, SHAPES)}")
        for image in images:
            if image.size != (SIZE, SIZE):
                raise ValueError(f"a scene image is {SIZE}x{SIZE} pixels, got {image.width}x{image.height}")
        return [
            [
                Detection(one.shape, 1.0, one.box, one.color)
                for one in scenes_detect.detect(image)
                if one.shape in asked and one.shape is not None and one.box is not None
            ]
            for image, asked in zip(images, names, strict=True)
        ]

    def gold(self) -> Sequence[GoldPair]:
        """Two red discs above a blue square, against places and colours swapped and a blank picture."""
        row = {
            "include": [
                {"class": "square", "count": 1, "color": "blue"},
                {"class": "circle", "count": 2, "color": "red", "position": ["above", 0]},
            ]
        }
        red, blue = ("circle", "red"), ("square", "blue")
        right = scene_image({(0, 0): red, (0, 1): red, (3, 0): blue})
        wrong = {
            "places swapped": scene_image({(3, 0): red, (3, 1): red, (0, 0): blue}),
            "colours swapped": scene_image({(0, 0): ("circle", "blue"), (0, 1): red, (3, 0): ("square", "red")}),
            "a blank picture": scene_image({}),
        }
        good = Sample("gold good", "gold", "", (right,), row=row)
        return [
            GoldPair(good, Sample("gold bad", "gold", "", (image,), row=row), f"a scene against {what}")
            for what, image in wrong.items()
        ]
