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

SEEN = 1 << 61
"""Ids from here on are no tokens of a vocabulary: they refer to a source image that the policy sees by an encoder."""


@dataclass(frozen=True)
class Seeing:
    """How a question about images is spelled that the policy sees through an encoder of its own, and not as codes.

    `length`: positions of an image. `lead`: ids between `bos` and the images, `template`: the question after them.
    `mean` and `std`: what pixels in [0, 1] are normed by, a number a channel; None where the checkpoint does not say.
    """

    length: int
    lead: tuple[int, ...] = ()
    template: str = "{prompt}"
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Grid:
    """The grammar of an image span: `rows` x `cols` codes in row-major order, then what the family forces.

    `row_end` is forced after each row (None: rows follow each other directly), `ending` after the last one. Forced
    tokens are no decisions of the policy: they have no log-prob and are outside `target_mask`. `preview`: (rows, cols)
    of codes that the policy decides first, of the same picture in small.
    """

    rows: int
    cols: int
    row_end: int | None = None
    ending: tuple[int, ...] = ()
    preview: tuple[int, int] | None = None

    @property
    def ahead(self) -> int:
        """Positions of the preview."""
        return 0 if self.preview is None else self.preview[0] * self.preview[1]

    @property
    def stride(self) -> int:
        return self.cols + (self.row_end is not None)

    @property
    def length(self) -> int:
        """Positions of the whole span, forced ones included."""
        return self.ahead + self.rows * self.stride + len(self.ending)

    def forced(self) -> dict[int, int]:
        """Position in the span -> the token forced there."""
        last = [self.ahead + (row + 1) * self.stride - 1 for row in range(self.rows)]
        ends = {} if self.row_end is None else dict.fromkeys(last, self.row_end)
        return ends | {self.length - len(self.ending) + i: token for i, token in enumerate(self.ending)}

    def decided(self) -> list[int]:
        """Positions the policy decides, in order: one a code."""
        forced = self.forced()
        return [position for position in range(self.length) if position not in forced]


@dataclass(frozen=True)
class Layout:
    """Where text and image live in one vocabulary, and how a prompt and an image are spelled.

    `text` and `image` are half-open slices of token ids; code c of the codec is token `image[0] + c`. `template` says
    how a prompt's text is written before it is tokenized; `boi` are the tokens that announce an image (its size too,
    where a family writes it), `before_source` those in front of a source image where they are others, `after_source`
    those that follow one. `bos` is None where nothing stands
    before the prompt. The unconditional stream's prompt is `null_prompt` (without `bos` and `boi`), or, where there is
    a `null_token`, the prompt with every token of it replaced by that one, as Janus does: then the stream is a function
    of the tokens alone. `mask` stands for a position that is not decided yet; only masked families have one, in neither
    slice, so it is never drawn. Of those, with `causal_prompt`, what stands before the image sees what stands before it
    alone (Show-o's attention, arXiv 2408.12528, but for its begin-of-image, which sees all).
    """

    vocab_size: int
    text: tuple[int, int]
    image: tuple[int, int]
    bos: int | None
    pad: int
    boi: tuple[int, ...]
    grid: Grid
    null_prompt: tuple[int, ...] = ()
    null_token: int | None = None
    mask: int | None = None
    template: str = "{prompt}"
    before_source: tuple[int, ...] | None = None
    after_source: tuple[int, ...] = ()
    takes_sources: bool = True
    """Whether a source image has a place before the prompt."""
    causal_prompt: bool = False
    family: str = "llama"
    """Who reads the checkpoint: a name of `rlmm.policies.families`, or file.py:NAME."""
    decides_text: bool = True
    """Whether the policy can learn text; where it has no head for it, or reads it causally beside masked images, a
    prompt is a condition alone."""
    text_end: int | None = None
    """What ends a text that the policy writes; None: the tokenizer's end of sequence."""
    seeing: Seeing | None = None
    """How source images enter before a text that the policy writes; None: as codes, as before an image."""
    lead: tuple[int, ...] = ()
    """What stands between `bos` and source images."""

    def prefix(self, prompt_ids: Sequence[int], sources: Sequence[Sequence[int]] = ()) -> tuple[int, ...]:
        """The conditioning ids before an image span: `question`, begin-of-image."""
        return (*self.question(prompt_ids, sources), *self.boi)

    def question(self, prompt_ids: Sequence[int], sources: Sequence[Sequence[int]] = ()) -> tuple[int, ...]:
        """The conditioning ids before a text span: bos, source images (each with what stands before and after one),
        prompt. `sources` are spelled images: token ids, forced ones included, or ids from `SEEN` on."""
        before = self.boi if self.before_source is None else self.before_source
        images = [token for source in sources for token in (*before, *source, *self.after_source)]
        return (*self._first, *(self.lead if sources else ()), *images, *prompt_ids)

    @property
    def _first(self) -> tuple[int, ...]:
        return () if self.bos is None else (self.bos,)

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
        return tuple(
            sorted(
                {*self._first, *self.boi, *(self.before_source or ()), *self.after_source, *self.grid.forced().values()}
            )
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(record: Mapping[str, Any]) -> "Layout":
        grid = Grid(**_tuples(record["grid"], ("ending", "preview")))
        tuples = _tuples(record, ("text", "image", "boi", "null_prompt", "before_source", "after_source", "lead"))
        told = record.get("seeing")
        seeing = None if told is None else Seeing(**_tuples(told, ("lead", "mean", "std")))
        return Layout(**(tuples | {"grid": grid, "seeing": seeing}))


def _tuples(record: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The record with its lists of these names as tuples again."""
    found = {name: tuple(record[name]) for name in names if record.get(name) is not None}
    return {**record, **found}


@dataclass(frozen=True)
class Request:
    """One prompt and the samples wanted of it: its streams are prefilled once, whatever the number of seeds.

    `streams` maps a stream's name to its prefix ids: what stands before the first span, so up to and including
    begin-of-image where that is an image. `given`:
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
        """Final hidden states [B, T, H] of whole sequences; with a cache, of the positions that it lacks alone."""
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
        """Final hidden states [B, T, H] of whole sequences, of which an image's each see all. Where prompts see
        themselves alone a cache may hold them: then of the positions that it lacks."""
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

    @property
    def reads_policy(self) -> bool:
        """Whether it draws by the policy's own modules, and not by a copy of the weights: then the policy has to be
        whole for as long as it draws."""
        ...

    @property
    def takes_adapters(self) -> bool:
        """Whether a sync hands it a weight and the adapters on it apart (`rollouts.adapters`), and it folds them. Its
        fingerprint is then of what it was handed, in float32, and vouches for the weights that it made of that."""
        ...

    def generate(self, requests: Sequence[Request], spans: Sequence[Span]) -> Trajectory:
        """One span; several are chained by `rollouts.interleaved.generate_spans`."""
        ...

    def sync(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Take the policy's full weights, one parameter at a time; adapters folded in, or apart (`takes_adapters`)."""
        ...

    def fingerprint(self) -> str:
        """A digest of the weights it now samples from; equal to `weights_fingerprint` of the trainer's, at `dtype`."""
        ...

    def close(self) -> None: ...
