"""Think, then draw: a text and the image it leads to, as one trajectory.

Each span is a response of its own to the engine, so every engine that can sample the one can sample the other, and
guidance keeps to the image. The text is shown to the conditional stream alone.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from rollouts.assembly import request_stream
from rollouts.contract import Engine, Layout, Request
from rollouts.law import COND
from rollouts.trajectory import IMAGE, Span, Stream, Trajectory, pad_left


def generate_spans(engine: Engine, layout: Layout, requests: Sequence[Request], spans: Sequence[Span]) -> Trajectory:
    """One span a row, or a text and then an image. Before a text, `streams` of a request end without begin-of-image.

    The image's begin-of-image tokens belong to the response of a text and an image, forced: the policy decides that it
    draws as little as which size. Texts of different lengths are padded, so that images start at one position.

    Raises:
        ValueError: other spans, a guided text, or a layout without begin-of-image tokens.
    """
    if len(spans) == 1:
        return engine.generate(requests, spans)
    thought, image = _thought_and_image(layout, spans)
    asked = [replace(request, streams={COND: request_stream(request, COND)}) for request in requests]
    written = engine.generate(asked, [thought])
    drawn = engine.generate(_continued(layout, requests, written, image), [image])
    length = drawn.ids.shape[1]
    streams = {name: _stream(layout, requests, written, name, length) for name in image.law.streams()}
    return _joined(layout, written, drawn, streams)


def span_seed(seed: int, index: int) -> int:
    """The seed of a row's span `index`: the first span's is the row's own, so that one span alone draws the same."""
    return seed if index == 0 else int(np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)[0] >> 1)


def _thought_and_image(layout: Layout, spans: Sequence[Span]) -> tuple[Span, Span]:
    kinds = [span.kind for span in spans]
    if kinds != ["text", "image"]:
        raise ValueError(f"spans of kinds {kinds}; give one span, or a text and then an image")
    thought, image = spans
    if thought.law.guided:
        raise ValueError(
            f"the text span has guidance scale {thought.law.guidance_scale}, and no unconditional stream: the image's "
            "does not see the text; set it to 1"
        )
    if not layout.boi:
        raise ValueError(
            f"the {layout.family} layout has no begin-of-image tokens, so nothing says where a text ends and an image "
            "begins; draw images alone with it"
        )
    return thought, image


def _continued(layout: Layout, requests: Sequence[Request], written: Trajectory, image: Span) -> list[Request]:
    """Every sample as a request for its image: what was written stands in its conditional stream."""
    owners = [request for request in requests for _ in request.seeds]
    continued = []
    for row, request in enumerate(owners):
        text = written.ids[row, written.attention_mask[row]].tolist()
        streams = {name: (*request_stream(request, name), *layout.boi) for name in image.law.streams()}
        streams[COND] = (*request_stream(request, COND), *text, *layout.boi)
        seeds, names = (span_seed(written.seed[row], 1),), (written.sample_id[row],)
        continued.append(replace(request, streams=streams, seeds=seeds, sample_ids=names))
    return continued


def _stream(layout: Layout, requests: Sequence[Request], written: Trajectory, name: str, image_length: int) -> Stream:
    """A stream's prefix a row; all but the conditional one pass over what was written."""
    if name == COND:
        return written.streams[COND]
    stream = pad_left([request_stream(request, name) for request in requests for _ in request.seeds], layout.pad)
    sees_S = torch.ones(written.ids.shape[1] + len(layout.boi) + image_length, dtype=torch.bool)
    sees_S[: written.ids.shape[1]] = False
    return replace(stream, sees_BS=sees_S.expand(len(written), -1).clone())


def _joined(layout: Layout, written: Trajectory, drawn: Trajectory, streams: dict[str, Stream]) -> Trajectory:
    rows, boi = len(written), torch.tensor(layout.boi, dtype=torch.long)

    def join(name: str, between: int | bool) -> Tensor:
        first, last = getattr(written, name), getattr(drawn, name)
        middle = torch.full((rows, len(boi)), between, dtype=first.dtype)
        return torch.cat([first, middle, last], 1)

    ids_BS = torch.cat([written.ids, boi.expand(rows, -1), drawn.ids], 1)
    return replace(
        written,
        ids=ids_BS,
        attention_mask=join("attention_mask", True),
        target_mask=join("target_mask", False),
        modality=join("modality", IMAGE),
        step=torch.arange(ids_BS.shape[1], dtype=torch.int32).expand(rows, -1).clone(),
        span=torch.cat([written.span, torch.ones(rows, len(boi) + drawn.ids.shape[1], dtype=torch.int8)], 1),
        spans=(*written.spans, *drawn.spans),
        streams=streams,
        sampler_logp=join("sampler_logp", 0),
        support=_supports(written, drawn, len(boi)),
    )


def _supports(written: Trajectory, drawn: Trajectory, between: int) -> Tensor | None:
    """Packed supports at one width; a span whose law cuts nothing has none to keep."""
    if written.support is None and drawn.support is None:
        return None
    width = max(part.support.shape[2] for part in (written, drawn) if part.support is not None)

    def of(part: Trajectory) -> Tensor:
        if part.support is None:
            return torch.zeros(*part.ids.shape, width, dtype=torch.uint8)
        return F.pad(part.support, (0, width - part.support.shape[2]))

    middle = torch.zeros(len(written), between, width, dtype=torch.uint8)
    return torch.cat([of(written), middle, of(drawn)], 1)
