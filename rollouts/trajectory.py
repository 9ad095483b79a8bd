"""The record of what was sampled, under which law, and how likely it was.

Shapes: B rows (prompts x samples), S response positions, P prefix positions of a stream. Prompts live in `streams`,
each a left-padded prefix; `ids` holds the response, which every stream shares. A stream's full sequence is its prefix
followed by `ids`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor

from rollouts.law import Law
from rollouts.unmasking import Unmasking

SCHEMA_VERSION = 2
TEXT, IMAGE = 0, 1


@dataclass(frozen=True)
class Span:
    """A stretch of the response with one law: think-then-draw is two of them. `unmasking`: how a masked family reveals
    it; None for one token after the other. `stop`: tokens that end a text before its `length_limit`; the one drawn is
    its last."""

    kind: Literal["text", "image"]
    law: Law
    length_limit: int
    advantage_weight: float = 1.0
    unmasking: Unmasking | None = None
    stop: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.length_limit < 1:
            raise ValueError(f"a {self.kind} span of {self.length_limit} tokens; give a length_limit of at least 1")
        if self.stop and self.kind == "image":
            raise ValueError("an image ends where its grid does; leave `stop` out")
        outside = [token for token in self.stop if not self.law.vocabulary[0] <= token < self.law.vocabulary[1]]
        if outside:
            raise ValueError(
                f"the stop tokens {outside} are outside the slice {list(self.law.vocabulary)} that the text is drawn "
                "from, so they could never end it"
            )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(record: Mapping[str, Any]) -> "Span":
        unmasking = record.get("unmasking")
        fields: dict[str, Any] = {**record, "law": Law.from_dict(record["law"])}
        fields["unmasking"] = None if unmasking is None else Unmasking.from_dict(unmasking)
        fields["stop"] = tuple(record["stop"])
        return Span(**fields)


@dataclass(frozen=True)
class Stream:
    """A conditioning input: left-padded prefix ids [B, P] (int64) and their mask [B, P] (bool). `sees_BS` (bool): the
    response positions it attends to, None for all: an unconditional stream does not see the thought before an image."""

    ids_BP: Tensor
    mask_BP: Tensor
    sees_BS: Tensor | None = None

    def each(self, change: Callable[[Tensor], Tensor]) -> "Stream":
        """With every tensor changed."""
        sees_BS = None if self.sees_BS is None else change(self.sees_BS)
        return Stream(change(self.ids_BP), change(self.mask_BP), sees_BS)

    def rows(self, index: Tensor) -> "Stream":
        return self.each(lambda value: value[index.to(value.device)])

    def to(self, device: torch.device | str) -> "Stream":
        return self.each(lambda value: value.to(device))


@dataclass(frozen=True)
class Trajectory:
    """Tokens with the law they were drawn from.

    ids [B,S] int64; attention_mask [B,S] bool (False: padding after a short text, so that the span after it starts at
    the same position in every row); target_mask [B,S] bool (decided by
    the policy, so not forced and not given); modality [B,S] int8 (0 text, 1 image); step [B,S] int32 (the order of
    decisions); span [B,S] int8 (index into `spans`); sampler_logp [B,S] float64 (under the law sampled from, 0 outside
    targets); support [B,S,ceil(V/8)] uint8, the packed top-k/top-p set over the span's slice; order_logp [B,T], states
    [B,T,S], proposals [B,T,S] for families whose decisions need them; seed: one integer a row, independent of rank and
    batch position.

    Where a masked policy's confidence chose the order, `order_logp` is that choice's log-prob a step, and
    `sampler_logp` holds it too, in equal parts on the tokens the step revealed: so a row's `sampler_logp` always sums
    to the trajectory's log-prob.
    """

    ids: Tensor
    attention_mask: Tensor
    target_mask: Tensor
    modality: Tensor
    step: Tensor
    span: Tensor
    spans: tuple[Span, ...]
    streams: Mapping[str, Stream]
    sampler_logp: Tensor
    seed: tuple[int, ...]
    group_id: tuple[str, ...]
    sample_id: tuple[str, ...]
    weights_version: int
    support: Tensor | None = None
    order_logp: Tensor | None = None
    states: Tensor | None = None
    proposals: Tensor | None = None
    sources: tuple[tuple[str, ...], ...] = ()
    schema_version: int = field(default=SCHEMA_VERSION)

    def __len__(self) -> int:
        return self.ids.shape[0]

    def rows(self, index: Sequence[int] | Tensor) -> "Trajectory":
        """The rows at `index` (int64), in that order."""
        at = torch.as_tensor(index, dtype=torch.long)
        return replace(self, **{name: _take(getattr(self, name), at) for name in _row_fields()})

    def columns(self, index: Tensor) -> "Trajectory":
        """The response positions at `index` (int64), in that order."""
        tensors: dict[str, Any] = {
            name: getattr(self, name)[:, index] for name in _POSITIONS if getattr(self, name) is not None
        }
        streams = {
            name: replace(stream, sees_BS=None if stream.sees_BS is None else stream.sees_BS[:, index])
            for name, stream in self.streams.items()
        }
        return replace(self, **tensors, streams=streams)

    def to(self, device: torch.device | str) -> "Trajectory":
        moved: dict[str, Any] = {
            f.name: getattr(self, f.name).to(device) for f in fields(self) if isinstance(getattr(self, f.name), Tensor)
        }
        return replace(self, **moved, streams={name: stream.to(device) for name, stream in self.streams.items()})


_POSITIONS = ("ids", "attention_mask", "target_mask", "modality", "step", "span", "sampler_logp", "support")


def _row_fields() -> list[str]:
    return [f.name for f in fields(Trajectory) if f.name not in ("spans", "weights_version", "schema_version")]


def _take(value: Any, at: Tensor) -> Any:
    if value is None or value == ():
        return value
    if isinstance(value, Tensor):
        return value[at.to(value.device)]
    if isinstance(value, Mapping):
        return {name: stream.rows(at) for name, stream in value.items()}
    return tuple(value[i] for i in at.tolist())


def pad_left(sequences: Sequence[Sequence[int]], pad: int) -> Stream:
    """Left-pad prefixes to one width, so that every response starts at the same position."""
    width = max(len(sequence) for sequence in sequences)
    ids = torch.full((len(sequences), width), pad, dtype=torch.long)
    mask = torch.zeros((len(sequences), width), dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        ids[row, width - len(sequence) :] = torch.tensor(sequence, dtype=torch.long)
        mask[row, width - len(sequence) :] = True
    return Stream(ids, mask)


def concatenate(parts: Sequence[Trajectory], pad: int) -> Trajectory:
    """Join trajectories of the same spans row-wise; prefixes are padded to the widest."""
    first = parts[0]
    if any(part.spans != first.spans or part.ids.shape[1] != first.ids.shape[1] for part in parts):
        raise ValueError("trajectories with different spans or response lengths cannot be joined; join each kind alone")

    def joined(name: str) -> Any:
        values = [getattr(part, name) for part in parts]
        if values[0] is None:
            return None
        if isinstance(values[0], Tensor):
            return torch.cat(values)
        return tuple(item for value in values for item in value)

    streams = {name: _join_streams([part.streams[name] for part in parts], pad) for name in first.streams}
    return replace(first, **{name: joined(name) for name in _row_fields() if name != "streams"}, streams=streams)


def _join_streams(streams: Sequence[Stream], pad: int) -> Stream:
    width = max(stream.ids_BP.shape[1] for stream in streams)
    grow = [(width - stream.ids_BP.shape[1], 0) for stream in streams]
    ids = [torch.nn.functional.pad(s.ids_BP, g, value=pad) for s, g in zip(streams, grow, strict=True)]
    mask = [torch.nn.functional.pad(s.mask_BP, g, value=False) for s, g in zip(streams, grow, strict=True)]
    sees = [s.sees_BS for s in streams if s.sees_BS is not None]
    return Stream(torch.cat(ids), torch.cat(mask), torch.cat(sees) if sees else None)
