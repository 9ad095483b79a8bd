"""Samples and scores as JSON, for a reward in another process. Nothing that comes over a network is unpickled.

A sample is ``{sample_id, group_id, prompt, text, images, source_images, target_images, target_texts, row}`` with images
as PNG in base64; a score ``{status, value, reason, parts, steps}``. Row values may be what JSON has, and NumPy's
scalars and arrays as lists of it.
"""

import base64
import binascii
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict

from rewards.base import Sample, Score
from rewards.images import CorruptImage, load_rgb

PROTOCOL: Literal[1] = 1


class WireError(ValueError):
    """What cannot be sent, or is not what it should be."""


class _Closed(BaseModel):
    model_config = ConfigDict(extra="forbid")


class WireSample(_Closed):
    """A sample as it travels."""

    sample_id: str
    group_id: str
    prompt: str
    text: str = ""
    images: list[str] = []
    source_images: list[str] = []
    target_images: list[str] = []
    target_texts: list[str] = []
    row: dict[str, Any] = {}


class WireScore(_Closed):
    """A score as it travels."""

    status: Literal["ok", "unavailable", "invalid_output"]
    value: float | None = None
    reason: str = ""
    parts: dict[str, float] = {}
    steps: list[tuple[float, float]] = []


class ScoreRequest(_Closed):
    """What is asked of a reward's server."""

    protocol: Literal[1]
    samples: list[WireSample]


class ScoreAnswer(_Closed):
    """One score a sample, in order, and the fingerprint of the reward that gave them."""

    fingerprint: str
    scores: list[WireScore]


class WirePair(_Closed):
    """A gold pair."""

    good: WireSample
    bad: WireSample
    what: str


class Served(_Closed):
    """What a server says of its reward."""

    protocol: int
    name: str
    fingerprint: str
    whole_groups: bool
    gold: list[WirePair]


def png(image: Image.Image) -> str:
    """An image in mode RGB as PNG in base64. Raises CorruptImage for one that does not decode."""
    file = io.BytesIO()
    load_rgb(image).save(file, "PNG", compress_level=1)
    return base64.b64encode(file.getvalue()).decode()


def read_png(text: str) -> Image.Image:
    """The image, decoded. Raises WireError for what is no PNG in base64."""
    try:
        image = Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=["PNG"])
        image.load()
    except (binascii.Error, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise WireError(f"an image is no PNG in base64: {type(error).__name__}: {error}") from error
    return image


def send_sample(sample: Sample, columns: Sequence[str] | None = None) -> WireSample | Score:
    """A sample as it travels, with all of its row or these columns of it; or the score of one that cannot travel: a
    generated image that does not decode is invalid output, another image or a row value without JSON is unavailable.
    """
    wanted = sample.row if columns is None else {key: sample.row[key] for key in columns if key in sample.row}
    try:
        row = {str(key): _plain(value) for key, value in wanted.items()}
    except WireError as error:
        return Score.unavailable(
            f"the row cannot be sent: {error}; name the columns that the reward needs in `columns`"
        )
    try:
        images = [png(image) for image in sample.images]
    except CorruptImage as error:
        return Score.invalid_output(str(error))
    try:
        sources, targets = ([png(image) for image in given] for given in (sample.source_images, sample.target_images))
    except CorruptImage as error:
        return Score.unavailable(f"source or target image: {error}")
    return WireSample(
        sample_id=sample.sample_id,
        group_id=sample.group_id,
        prompt=sample.prompt,
        text=sample.text,
        images=images,
        source_images=sources,
        target_images=targets,
        target_texts=list(sample.target_texts),
        row=row,
    )


def read_sample(sent: WireSample) -> Sample:
    """The sample that was sent. Raises WireError."""
    images, sources, targets = (
        tuple(map(read_png, given)) for given in (sent.images, sent.source_images, sent.target_images)
    )
    return Sample(
        sample_id=sent.sample_id,
        group_id=sent.group_id,
        prompt=sent.prompt,
        images=images,
        text=sent.text,
        source_images=sources,
        target_images=targets,
        target_texts=tuple(sent.target_texts),
        row=sent.row,
    )


def send_score(score: Score) -> WireScore:
    """A score as it travels; a part that is not finite has no JSON and stays behind."""
    parts = {name: float(value) for name, value in score.parts.items() if math.isfinite(value)}
    return WireScore(status=score.status, value=score.value, reason=score.reason, parts=parts, steps=list(score.steps))


def read_score(sent: WireScore) -> Score:
    """The score that was sent: a value where the status is ok and none elsewhere. Raises WireError."""
    if (sent.status == "ok") != (sent.value is not None):
        raise WireError(f"a score of status {sent.status} has the value {sent.value}")
    if sent.steps:
        ends, values = zip(*sent.steps, strict=True)
        try:
            return replace(Score.stepwise(values, ends), reason=sent.reason, parts=sent.parts)
        except ValueError as error:
            raise WireError(str(error)) from error
    return Score(sent.status, sent.value, sent.reason, sent.parts)


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        value = value.tolist()
    elif isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise WireError(f"{value} is no JSON")
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    raise WireError(f"a {type(value).__name__} has no JSON")
