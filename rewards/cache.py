"""Cache of finished scores: the key over everything a reward may look at, and an LRU store that can be written down."""

import hashlib
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, Protocol

import numpy as np
from PIL import Image

from rewards.base import Sample, Score
from rewards.wire import WireScore


class Uncacheable(TypeError):
    """A row holds a value whose content cannot be hashed; its sample is scored each time."""


class _Hash(Protocol):
    def update(self, data: bytes, /) -> None: ...


def _put(digest: _Hash, tag: str, payload: bytes) -> None:
    # Tag and length make the encoding injective: ("ab", "c") and ("a", "bc") differ.
    digest.update(f"{tag}{len(payload)}:".encode())
    digest.update(payload)


def _feed(digest: _Hash, value: Any) -> None:
    if isinstance(value, Image.Image):
        _put(digest, f"image {value.mode} {value.size} ", value.tobytes())
        if value.mode == "P":
            _put(digest, "palette", bytes(value.getpalette() or []))
    elif isinstance(value, np.ndarray) and not value.dtype.hasobject:
        _put(digest, f"array {value.dtype.str} {value.shape} ", np.ascontiguousarray(value).tobytes())
    elif isinstance(value, str):
        _put(digest, "str", value.encode("utf-8", "surrogatepass"))
    elif isinstance(value, bytes):
        _put(digest, "bytes", value)
    elif value is None or isinstance(value, bool | Integral):
        _put(digest, "int", repr(value).encode())
    elif isinstance(value, Real):
        _put(digest, "real", float(value).hex().encode())
    elif isinstance(value, Mapping):
        _put(digest, f"map {len(value)} ", b"")
        for key in sorted(value, key=str):
            _feed(digest, str(key))
            _feed(digest, value[key])
    elif isinstance(value, Sequence):
        _put(digest, f"list {len(value)} ", b"")
        for item in value:
            _feed(digest, item)
    else:
        raise Uncacheable(f"no content hash for a {type(value).__name__}")


def cache_key(sample: Sample, fingerprint: str) -> str:
    """SHA-256 over the judge's fingerprint and all a judge may look at, ids excepted.

    Images enter by pixels, mode and size, in their roles; prompt, text and row columns by content. Raises
    Uncacheable for a row value without a content hash, OSError for an image that does not decode.
    """
    digest = hashlib.sha256()
    _feed(digest, fingerprint)
    _feed(digest, sample.prompt)
    _feed(digest, sample.text)
    _feed(digest, sample.target_texts)
    for images in (sample.images, sample.source_images, sample.target_images):
        _feed(digest, images)
    _feed(digest, sample.row)
    return digest.hexdigest()


class ScoreCache:
    """At most `capacity` scores, the least recently used one dropped first. Holds no `unavailable` score."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._scores: OrderedDict[str, Score] = OrderedDict()

    def __len__(self) -> int:
        return len(self._scores)

    def get(self, key: str) -> Score | None:
        """The stored score, now the most recently used one, or None."""
        score = self._scores.get(key)
        if score is not None:
            self._scores.move_to_end(key)
        return score

    def put(self, key: str, score: Score) -> None:
        """Stores a finished score; a failure of the judge is not stored, so it is asked again."""
        if score.status == "unavailable" or self.capacity == 0:
            return
        self._scores[key] = score
        self._scores.move_to_end(key)
        if len(self._scores) > self.capacity:
            self._scores.popitem(last=False)

    def keys(self) -> frozenset[str]:
        """Of the scores there are."""
        return frozenset(self._scores)

    def record(self, without: Collection[str] = ()) -> list[dict[str, Any]]:
        """{key, score} of every score, but those of the keys `without`, as JSON has them, the least recently used
        first."""
        return [{"key": key, "score": _written(score)} for key, score in self._scores.items() if key not in without]

    def restore(self, record: Sequence[Mapping[str, Any]]) -> None:
        """Put in what `record` gave, as if it had been used in that order. Raises ValueError for what is none."""
        try:
            found = [(str(item["key"]), _read(WireScore.model_validate(item["score"]))) for item in record]
        except (KeyError, TypeError) as error:
            raise ValueError(f"no record of scores: {type(error).__name__}: {error}") from error
        for key, score in found:
            self.put(key, score)


def _written(score: Score) -> dict[str, Any]:
    """As JSON of Python's, which has numbers that are not finite: unlike what is sent, a score keeps such a part."""
    parts = {name: float(value) for name, value in score.parts.items()}
    sent = WireScore(status=score.status, value=score.value, reason=score.reason, parts=parts, steps=list(score.steps))
    return sent.model_dump()


def _read(sent: WireScore) -> Score:
    if (sent.status == "ok") != (sent.value is not None):
        raise ValueError(f"a score of status {sent.status} has the value {sent.value}")
    return Score(sent.status, sent.value, sent.reason, sent.parts, tuple(sent.steps))
