"""A sample as a judge is shown it, and the way from samples to scores that the verifier rewards share."""

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from PIL import Image

from rewards.base import Sample, Score
from rewards.images import CorruptImage, load_all, load_rgb
from rewards.verifier.errors import JudgeError

A = TypeVar("A")


@dataclass(frozen=True)
class View:
    """A sample's prompt and its images as data URLs. It is an edit where there are source images. `row` are the data
    row's columns, of which a judge is shown what its reward takes from them.
    """

    prompt: str
    images: tuple[str, ...]
    sources: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()
    row: Mapping[str, Any] = field(default_factory=dict)

    @property
    def edit(self) -> bool:
        return bool(self.sources)


def data_url(image: Image.Image) -> str:
    """An RGB image as PNG, which keeps every pixel, in base64."""
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)  # a larger request is cheaper than slow compression
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def view(sample: Sample, with_target: bool = False) -> View | Score:
    """What a judge is shown, with the target images where asked for, or the score of a sample that no judge need be
    asked about.

    A generated image that is missing or does not decode is the policy's fault (invalid output); a source or target
    image that does not decode, or an empty prompt, is not (unavailable).
    """
    if not sample.prompt.strip():
        return Score.unavailable("the prompt is empty, so there is nothing to judge the image by")
    try:
        images = load_all(sample)
    except CorruptImage as error:
        return Score.invalid_output(str(error))
    given: dict[str, tuple[str, ...]] = {}
    for kind, shown in (("source", sample.source_images), ("target", sample.target_images if with_target else ())):
        try:
            given[kind] = tuple(data_url(load_rgb(image)) for image in shown)
        except CorruptImage as error:
            return Score.unavailable(f"{kind} image: {error}")
    return View(sample.prompt, tuple(map(data_url, images)), given["source"], given["target"], sample.row)


def judge(
    samples: Sequence[Sample],
    workers: int,
    calls: Callable[[View], Sequence[Callable[[], A]]],
    total: Callable[[Sequence[A]], Score],
    *,
    with_target: bool = False,
) -> list[Score]:
    """One Score a sample, in order: `total` of what its `calls` answer. Calls of all samples run at once, `workers` of
    them at a time. A JudgeError of any of them, or of `calls` or `total`, makes its sample unavailable.
    """
    with ThreadPoolExecutor(workers, thread_name_prefix="judge") as pool:
        views = list(pool.map(partial(view, with_target=with_target), samples))
        pending = [seen if isinstance(seen, Score) else _submit(pool, calls, seen) for seen in views]
        return [item if isinstance(item, Score) else _collect(item, total) for item in pending]


def _submit(
    pool: ThreadPoolExecutor, calls: Callable[[View], Sequence[Callable[[], A]]], seen: View
) -> list[Future[A]] | Score:
    try:
        return [pool.submit(call) for call in calls(seen)]
    except JudgeError as error:
        return Score.unavailable(str(error))


def _collect(futures: Sequence[Future[A]], total: Callable[[Sequence[A]], Score]) -> Score:
    try:
        return total([future.result() for future in futures])
    except JudgeError as error:
        return Score.unavailable(str(error))
