"""What rollout engines and policies know of each other.

A policy family describes its sequence in a serialisable `Layout`; an engine reads it. The trainer asks an `Engine` for
a `Trajectory`, hands it new weights, and compares fingerprints. Neither side knows about rewards.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from rollouts.trajectory import Span, Trajectory


@dataclass(frozen=True)
class Grid:
    """The grammar of an image span: `rows` x `cols` codes in row-major order, then what the family forces.

    `row_end` is forced after each row (None: rows follow each other directly), `ending` after the last one. Forced
    tokens are no decisions of the policy: they have no log-prob and are outside `target_mask`.
    """

    rows: int
    cols: int
    row_end: int | None = None
    ending: tuple[int, ...] = ()

    @property
    def stride(self) -> int:
        return self.cols + (self.row_end is not None)

    @property
    def length(self) -> int:
        """Positions of the whole span, forced ones included."""
        return self.rows * self.stride + len(self.ending)

    def forced(self) -> dict[int, int]:
        """Position in the span -> the token forced there."""
        ends = {} if self.row_end is None else {(row + 1) * self.stride - 1: self.row_end for row in range(self.rows)}
        return ends | {self.rows * self.stride + i: token for i, token in enumerate(self.ending)}

    def decided(self) -> list[int]:
        """Positions the policy decides, in order: one a code."""
        forced = self.forced()
        return [position for position in range(self.length) if position not in forced]


@dataclass(frozen=True)
class Layout:
    """Where text and image live in one vocabulary, and how a prompt and an image are spelled.

    `text` and `image` are half-open slices of token ids; code c of the codec is token `image[0] + c`. `template` says
    how a prompt's text is written before it is tokenized; `boi` are the tokens that announce an image (its size too,
    where a family writes it), `after_source` those that follow a source image. The unconditional stream's prompt is
    `null_prompt` (without `bos` and `boi`), or, where there is a `null_token`, the prompt with every token of it
    replaced by that one, as Janus does: then the stream is a function of the tokens alone. `mask` stands for a position
    that is not decided yet; only masked families have one, in neither slice, so it is never drawn. Of those, with
    `causal_prompt`, what stands before the image sees what stands before it alone, as in Show-o (arXiv 2408.12528).
    """

    vocab_size: int
    text: tuple[int, int]
    image: tuple[int, int]
    bos: int
    pad: int
    boi: tuple[int, ...]
    grid: Grid
    null_prompt: tuple[int, ...] = ()
    null_token: int | None = None
    mask: int | None = None
    template: str = "{prompt}"
    after_source: tuple[int, ...] = ()
    causal_prompt: bool = False
    family: str = "llama"
    """Who reads the checkpoint: a name of `rlmm.policies.families`, or file.py:NAME."""

    def prefix(self, prompt_ids: Sequence[int], sources: Sequence[Sequence[int]] = ()) -> tuple[int, ...]:
        """The conditioning ids before an image span: bos, source images (each with its begin-of-image), prompt,
        begin-of-image. `sources` are spelled images: token ids, forced ones included."""
        images = [token for source in sources for token in (*self.boi, *source, *self.after_source)]
        return (self.bos, *images, *prompt_ids, *self.boi)

    def null(self, prompt_ids: Sequence[int]) -> tuple[int, ...]:
        """The prompt of the unconditional stream beside a prompt."""
        return self.null_prompt if self.null_token is None else (self.null_token,) * len(prompt_ids)

    def unconditional(self, prefix: Sequence[int]) -> tuple[int, ...] | None:
        """The unconditional prefix beside a conditional one, token by token; None without a `null_token`."""
        if self.null_token is None:
            return None
        (low, high), given = self.text, self.given()
        return tuple(self.null_token if low <= t < high and t not in given else t for t in prefix)

    def given(self) -> tuple[int, ...]:
        """Tokens of the text slice that belong to no prompt: both streams have them."""
        return tuple(sorted({self.bos, *self.boi, *self.after_source, *self.grid.forced().values()}))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(record: Mapping[str, Any]) -> "Layout":
        inner: dict[str, Any] = {**record["grid"], "ending": tuple(record["grid"]["ending"])}
        tuples: dict[str, Any] = {
            key: tuple(record[key]) for key in ("text", "image", "boi", "null_prompt", "after_source")
        }
        fields: dict[str, Any] = {**record, **tuples, "grid": Grid(**inner)}
        return Layout(**fields)


@dataclass(frozen=True)
class Request:
    """One prompt and the samples wanted of it: its streams are prefilled once, whatever the number of seeds.

    `streams` maps a stream's name to its prefix ids (the sequence up to and including begin-of-image). `given`:
    (position in the span, token id) pairs that are kept as they are (infilling), which masked families alone can do.
    """

    group_id: str
    streams: Mapping[str, tuple[int, ...]]
    seeds: tuple[int, ...]
    sample_ids: tuple[str, ...]
    sources: tuple[str, ...] = ()
    given: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        if len(self.seeds) != len(self.sample_ids):
            raise ValueError(
                f"request {self.group_id}: {len(self.seeds)} seeds for {len(self.sample_ids)} sample ids; give one each"
            )


class CausalDecoder(Protocol):
    """What an in-process sampler needs of a next-token policy. Shapes: T positions fed, N rows of hidden states."""

    layout: Layout

    def hidden(self, ids_BT: Tensor, mask_BT: Tensor, *, cache: Any = None) -> Tensor:
        """Final hidden states [B, T, H] of `ids_BT`; `mask_BT` covers what the cache already holds, too."""
        ...

    def head(self, hidden_NH: Tensor, vocabulary: tuple[int, int]) -> Tensor:
        """Logits [N, V] of the slice alone."""
        ...

    def named_weights(self) -> Iterable[tuple[str, Tensor]]:
        """The full weights, adapters folded in, one at a time, under the checkpoint's names."""
        ...


class MaskedDecoder(Protocol):
    """What an in-process sampler needs of a masked policy. Shapes: T positions of the whole sequence, N hidden rows."""

    layout: Layout

    def hidden(self, ids_BT: Tensor, mask_BT: Tensor, *, cache: Any = None) -> Tensor:
        """Final hidden states [B, T, H]; an image's each see the whole sequence. `mask_BT` covers what the cache holds,
        too: prompts, where those see themselves alone."""
        ...

    def head(self, hidden_NH: Tensor, vocabulary: tuple[int, int]) -> Tensor:
        """Logits [N, V] of the slice alone."""
        ...

    def named_weights(self) -> Iterable[tuple[str, Tensor]]:
        """The full weights, adapters folded in, one at a time, under the checkpoint's names."""
        ...


class EngineLost(RuntimeError):
    """What an engine samples with is gone: a killed process, a closed connection. A new one may do the work again."""


@runtime_checkable
class Engine(Protocol):
    """Makes trajectories. Rows come back in request order, one a seed. `dtype`: what it holds the weights in."""

    @property
    def dtype(self) -> torch.dtype: ...

    def generate(self, requests: Sequence[Request], spans: Sequence[Span]) -> Trajectory: ...

    def sync(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Take the policy's full weights (adapters folded in), one parameter at a time."""
        ...

    def fingerprint(self) -> str:
        """A digest of the weights it now samples from; equal to `weights_fingerprint` of the trainer's, at `dtype`."""
        ...

    def close(self) -> None: ...
