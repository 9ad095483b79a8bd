"""From what an engine drew to the record of it."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rollouts.contract import Layout, Request
from rollouts.trajectory import IMAGE, TEXT, Span, Stream, Trajectory


def request_stream(request: Request, name: str) -> tuple[int, ...]:
    """A stream's prefix ids. Raises ValueError where the request lacks it."""
    if name not in request.streams:
        raise ValueError(
            f"request {request.group_id} has streams {sorted(request.streams)} and the law needs {name!r}; "
            "give the prompt that stream (guidance needs an unconditional prefix) or set the guidance scale to 1"
        )
    return request.streams[name]


def one_span(spans: Sequence[Span], engine: str) -> Span:
    """The span of an engine that samples one after the other. Raises ValueError on several, and where a span that is to
    be unmasked meets an engine that goes from left to right."""
    if len(spans) != 1:
        raise ValueError(
            f"the {engine} engine samples one span at a time, and got {[span.kind for span in spans]}; chain them with "
            "rollouts.interleaved.generate_spans"
        )
    if spans[0].unmasking is not None and not engine.startswith("masked"):
        raise ValueError(
            f"the {engine} engine decides one token after the other, and the span has an unmasking; sample a masked "
            "policy with MaskedTorchEngine, or leave the unmasking out"
        )
    return spans[0]


def one_image_span(spans: Sequence[Span], engine: str) -> Span:
    """`one_span` of an engine that samples images alone."""
    span = one_span(spans, engine)
    if span.kind != "image":
        raise ValueError(f"the {engine} engine samples images alone, and got a span of kind {span.kind!r}")
    return span


def span_length(layout: Layout, span: Span) -> int:
    """Positions that a span may take."""
    return layout.grid.length if span.kind == "image" else span.length_limit


def span_forced(layout: Layout, span: Span) -> dict[int, int]:
    """Position in the span -> the token that no policy decides."""
    return layout.grid.forced() if span.kind == "image" else {}


def refuse_given(requests: Sequence[Request], engine: str) -> None:
    """Of an engine that decides one token after the other. Raises ValueError where a request has given tokens."""
    for request in requests:
        if request.given:
            raise ValueError(
                f"request {request.group_id} has given tokens, and the {engine} engine decides one token after the "
                "other, so what comes before a given one could not see it; use a masked policy"
            )


def held_positions(span: Span, ids_BS: Tensor) -> Tensor:
    """Which positions [B, S] of a text a row has: up to its first stop token, that one included; all where none is."""
    stopped_BS = torch.isin(ids_BS, torch.tensor(span.stop, dtype=ids_BS.dtype, device=ids_BS.device))
    return (stopped_BS.cumsum(1) - stopped_BS.long()) == 0


def span_trajectory(
    layout: Layout,
    span: Span,
    requests: Sequence[Request],
    *,
    streams: Mapping[str, Stream],
    ids_BS: Tensor,
    logp_BS: Tensor,
    support: Tensor | None,
    weights_version: int,
    step_BS: Tensor | None = None,
    order_logp: Tensor | None = None,
) -> Trajectory:
    """The trajectory of one span a row, one row a seed, in request order. `streams` has one row a sample. `step_BS`:
    when each position was decided; None: one after the other. What follows a text's stop token is padding."""
    rows, length = ids_BS.shape
    image = span.kind == "image"
    held_BS = torch.ones(rows, length, dtype=torch.bool) if image else held_positions(span, ids_BS)
    target_BS = held_BS.clone()
    target_BS[:, list(span_forced(layout, span))] = False
    for row, given in enumerate(request.given for request in requests for _ in request.seeds):
        target_BS[row, [position for position, _ in given]] = False
    return Trajectory(
        ids=ids_BS.masked_fill(~held_BS, layout.pad),
        attention_mask=held_BS,
        target_mask=target_BS,
        modality=torch.full((rows, length), IMAGE if image else TEXT, dtype=torch.int8),
        step=torch.arange(length, dtype=torch.int32).expand(rows, -1).clone() if step_BS is None else step_BS,
        span=torch.zeros(rows, length, dtype=torch.int8),
        spans=(span,),
        streams=streams,
        sampler_logp=logp_BS.masked_fill(~held_BS, 0.0),
        seed=tuple(seed for request in requests for seed in request.seeds),
        group_id=tuple(r.group_id for r in requests for _ in r.seeds),
        sample_id=tuple(sample for r in requests for sample in r.sample_ids),
        weights_version=weights_version,
        support=support,
        order_logp=order_logp,
        sources=tuple(r.sources for r in requests for _ in r.seeds),
    )
