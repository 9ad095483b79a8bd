"""Reading the policy's pixels: an image that cannot be decoded is the policy's fault, and told apart as
such.
"""

from PIL import Image

from rewards.base import Sample, Score


class CorruptImage(ValueError):
    """An image whose pixels cannot be had."""


def load_rgb(image: Image.Image) -> Image.Image:
    """The image, decoded, in mode RGB. Raises CorruptImage with the reason where that cannot be done."""
    try:
        # Pillow decodes lazily, and reports damage as OSError, SyntaxError (PNG chunks) or ValueError.
        rgb = image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise CorruptImage(f"the image cannot be decoded: {type(error).__name__}: {error}") from error
    if 0 in rgb.size:
        raise CorruptImage(f"the image is empty ({rgb.width}x{rgb.height} pixels)")
    return rgb


def load_all(sample: Sample) -> list[Image.Image]:
    """The sample's generated images, at least one, in mode RGB. Raises CorruptImage."""
    if not sample.images:
        raise CorruptImage("the sample has no image")
    return [load_rgb(image) for image in sample.images]


def load_or_invalid(sample: Sample) -> list[Image.Image] | Score:
    """The sample's images in mode RGB, or the score of a sample whose images cannot be had."""
    try:
        return load_all(sample)
    except CorruptImage as error:
        return Score.invalid_output(str(error))
