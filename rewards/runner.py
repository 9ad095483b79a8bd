"""Runs one reward over many samples: batches, deadline, retries, cache, and the failure policy.

The policy: whatever goes wrong inside a judge makes its samples *unavailable* with the reason, and never a
number. A judge that breaks its contract (wrong number of answers, answers of a wrong type) is a bug in the
plug-in, and stops the run with a RewardContractError.
"""

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, TypeVar

from rewards.base import Reward, Sample, Score
from rewards.cache import ScoreCache, Uncacheable, cache_key

LATENCIES_KEPT = 1024
T = TypeVar("T")


class RewardContractError(TypeError):
    """A reward answered something that is not one score a sample."""


class _DeadlineError(Exception):
    """A call did not come back in time."""


@dataclass
class RunnerStats:
    """Counts since the runner was made.

    `unavailable` counts samples by kind of reason: ``deadline``, the exception's type name, ``not a finite
    number``, ``not applicable`` (the reward answered None) and ``declared`` (the reward itself answered
    unavailable).
    """

    samples: int = 0
    calls: int = 0
    cached: int = 0
    uncacheable: int = 0
    retries: int = 0
    invalid_output: int = 0
    unavailable: Counter[str] = field(default_factory=Counter)
    latencies_s: deque[float] = field(default_factory=lambda: deque(maxlen=LATENCIES_KEPT))

    def as_metrics(self) -> dict[str, float]:
        """Flat numbers for a metrics log; latencies are seconds a call, over the last 1024 calls."""
        metrics: dict[str, float] = {
            "samples": self.samples,
            "calls": self.calls,
            "cached": self.cached,
            "uncacheable": self.uncacheable,
            "retries": self.retries,
            "invalid_output": self.invalid_output,
            "unavailable": sum(self.unavailable.values()),
        }
        metrics.update({f"unavailable/{kind}": count for kind, count in sorted(self.unavailable.items())})
        if self.latencies_s:
            ordered = sorted(self.latencies_s)
            metrics["latency_p50_s"] = ordered[(len(ordered) - 1) // 2]
            metrics["latency_p95_s"] = ordered[round(0.95 * (len(ordered) - 1))]
        return metrics


@dataclass(frozen=True)
class _Verdict:
    """A score and, where it is unavailable, the kind it is counted under."""

    score: Score
    kind: str = ""


def _verdict(item: Any, name: str) -> _Verdict:
    """Reads one answer of a reward: a Score, a real number, or None for 'not applicable'."""
    if item is None:
        return _Verdict(Score.unavailable("not applicable"), "not applicable")
    if isinstance(item, Score):
        if item.status == "ok":
            return _number(item.value, item, name)
        return _Verdict(item, "declared" if item.status == "unavailable" else "")
    return _number(item, None, name)


def _verdicts(answers: Any, expected: int, name: str) -> list[_Verdict]:
    """Reads the answers of one call; RewardContractError unless there is one a sample."""
    if not isinstance(answers, Iterable) or isinstance(answers, str | bytes | Mapping):
        raise RewardContractError(
            f"reward {name!r} answered a {type(answers).__name__} for {expected} samples; "
            f"expected a list of {expected} scores"
        )
    listed = list(answers)
    if len(listed) != expected:
        raise RewardContractError(
            f"reward {name!r} answered {len(listed)} scores for {expected} samples; "
            f"expected {expected}, one a sample and in order"
        )
    return [_verdict(answer, name) for answer in listed]


def _number(value: Any, given: Score | None, name: str) -> _Verdict:
    if not isinstance(value, Real):
        raise RewardContractError(
            f"reward {name!r} answered {value!r} of type {type(value).__name__} for a sample; "
            "it must answer a Score, a plain number or None (for a tensor: tensor.tolist())"
        )
    checked = Score.ok(float(value))
    if checked.status == "unavailable":
        return _Verdict(checked, "not a finite number")
    return _Verdict(given if given is not None else checked)


def call_with_deadline(call: Callable[[], T], timeout_s: float | None) -> T:
    """Runs `call`, for at most `timeout_s` seconds where one is given, and returns or raises what it did.

    Python cannot stop a thread: a late call goes on in a daemon thread whose outcome is dropped. So a reward
    with a deadline may be called again while an earlier, late call still runs.
    """
    if timeout_s is None:
        return call()
    result: list[T] = []
    failure: list[BaseException] = []

    def work() -> None:
        try:
            result.append(call())
        except BaseException as error:  # handed to the waiting thread, which raises it
            failure.append(error)

    thread = threading.Thread(target=work, name="reward", daemon=True)
    thread.start()
    thread.join(max(timeout_s, 0.0))
    if failure:
        raise failure[0]
    if not result:
        raise _DeadlineError
    return result[0]


class RewardRunner:
    """Scores samples with one reward.

    `batch_size` samples go to one call. `deadline_s` (seconds, None for none) bounds all the work on one
    batch, retries included. A reward that raises is called again `retries` times with the batch, then once
    with each sample alone, so that one bad sample does not cost its neighbours theirs. `cache` is the number
    of scores kept in memory (0 for none); with a cache, samples that are equal in all but their ids are
    scored once.
    """

    def __init__(
        self,
        reward: Reward,
        *,
        batch_size: int = 32,
        deadline_s: float | None = None,
        retries: int = 1,
        cache: int = 0,
    ) -> None:
        if batch_size < 1 or retries < 0 or cache < 0 or (deadline_s is not None and deadline_s <= 0):
            raise ValueError(
                "a reward runner needs batch_size >= 1, retries >= 0, cache >= 0 and deadline_s > 0 or None; "
                f"got {batch_size=}, {retries=}, {cache=}, {deadline_s=}"
            )
        self.reward = reward
        self.batch_size = batch_size
        self.deadline_s = deadline_s
        self.retries = retries
        self.cache = ScoreCache(cache)
        self.stats = RunnerStats()

    def score(self, samples: Sequence[Sample]) -> list[Score]:
        """One score a sample, in order. Raises RewardContractError only; a failing judge gives unavailable
        scores.
        """
        keys = self._keys(samples)
        scores: dict[str | int, Score] = {}
        wanted: dict[str | int, Sample] = {}
        for key, sample in zip(keys, samples, strict=True):
            if key in wanted or key in scores:
                self.stats.cached += 1
            elif isinstance(key, str) and (hit := self.cache.get(key)) is not None:
                scores[key] = hit
                self.stats.cached += 1
            else:
                wanted[key] = sample
        todo = list(wanted)
        for start in range(0, len(todo), self.batch_size):
            batch = todo[start : start + self.batch_size]
            for key, verdict in zip(batch, self._score_batch([wanted[key] for key in batch]), strict=True):
                scores[key] = verdict.score
                if verdict.kind:
                    # Copies of one sample share a key, and each of them is unavailable.
                    self.stats.unavailable[verdict.kind] += keys.count(key)
                if isinstance(key, str):
                    self.cache.put(key, verdict.score)
        answers = [scores[key] for key in keys]
        self.stats.samples += len(answers)
        self.stats.invalid_output += sum(score.status == "invalid_output" for score in answers)
        return answers

    def _keys(self, samples: Sequence[Sample]) -> list[str | int]:
        """A cache key a sample, or its index where it cannot be cached."""
        if self.cache.capacity == 0:
            return list(range(len(samples)))
        fingerprint = self.reward.fingerprint()
        keys: list[str | int] = []
        for index, sample in enumerate(samples):
            try:
                keys.append(cache_key(sample, fingerprint))
            except (Uncacheable, OSError):
                self.stats.uncacheable += 1
                keys.append(index)
        return keys

    def _score_batch(self, batch: list[Sample]) -> list[_Verdict]:
        """Scores a batch under one deadline: the whole of it, again after a failure, then sample by
        sample.
        """
        ends = None if self.deadline_s is None else time.monotonic() + self.deadline_s
        error: Exception | None = None
        for attempt in range(1 + self.retries):
            self.stats.retries += attempt > 0
            verdicts, error = self._attempt(batch, ends)
            if verdicts is not None:
                return verdicts
            if isinstance(error, _DeadlineError):
                break
        if len(batch) == 1 or isinstance(error, _DeadlineError):
            return [self._failed(error) for _ in batch]
        self.stats.retries += len(batch)
        alone = [self._attempt([sample], ends) for sample in batch]
        return [self._failed(error) if verdicts is None else verdicts[0] for verdicts, error in alone]

    def _attempt(self, batch: list[Sample], ends: float | None) -> tuple[list[_Verdict] | None, Exception | None]:
        """One call: its verdicts, or what the judge raised."""
        remaining = None if ends is None else ends - time.monotonic()
        if remaining is not None and remaining <= 0:
            return None, _DeadlineError()
        started = time.perf_counter()
        self.stats.calls += 1
        try:
            answers = call_with_deadline(lambda: self.reward.score(batch), remaining)
        except RewardContractError:
            raise
        except Exception as error:  # the one place where a judge's own exceptions become unavailable scores
            return None, error
        finally:
            self.stats.latencies_s.append(time.perf_counter() - started)
        return _verdicts(answers, len(batch), self.reward.name), None

    def _failed(self, error: Exception | None) -> _Verdict:
        if isinstance(error, _DeadlineError):
            reason = f"reward {self.reward.name!r} did not answer within {self.deadline_s} s"
            return _Verdict(Score.unavailable(reason), "deadline")
        kind = type(error).__name__
        return _Verdict(Score.unavailable(f"reward {self.reward.name!r} raised {kind}: {error}"), kind)
