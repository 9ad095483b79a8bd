"""Drawings for the built-in gold pairs; all they share with the recipes' own drawings is what they show."""

from collections.abc import Mapping

from PIL import Image, ImageDraw, ImageFont

from rewards.scenes_spec import BACKGROUND, CELL, PALETTE, SIZE


def word_image(text: str) -> Image.Image:
    """A line of black text on white, RGB, in the font that Pillow carries; '' gives a blank image."""
    font = ImageFont.load_default(size=24)
    width = max(96, round(font.getlength(text)) + 16)
    image = Image.new("RGB", (width, 32), "white")
    ImageDraw.Draw(image).text((width / 2, 16), text, fill="black", font=font, anchor="mm")
    return image


def scene_image(cells: Mapping[tuple[int, int], tuple[str, str]]) -> Image.Image:
    """A scene as rewards.scenes_spec has it, from (row, column) -> (shape, color)."""
    image = Image.new("RGB", (SIZE, SIZE), BACKGROUND)
    pen = ImageDraw.Draw(image)
    for (row, column), (shape, color) in cells.items():
        left, top = column * CELL + 1, row * CELL + 1
        right, bottom = left + CELL - 3, top + CELL - 3
        if shape == "circle":
            pen.ellipse((left, top, right, bottom), fill=PALETTE[color])
        elif shape == "square":
            pen.rectangle((left, top, right, bottom), fill=PALETTE[color])
        else:
            pen.polygon([((left + right) / 2, top), (right, bottom), (left, bottom)], fill=PALETTE[color])
    return image
