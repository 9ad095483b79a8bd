"""Runs one reward over many samples: batches, deadline, retries, cache, and the failure policy.

The policy: whatever goes wrong inside a judge makes its samples *unavailable* with the reason, and never a
number. A judge that breaks its contract (wrong number of answers, answers of a wrong type) is a bug in the
plug-in, and stops the run with a RewardContractError.
"""

import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from rewards.base import Reward, Sample, Score, SeesGroups
from rewards.cache import ScoreCache, Uncacheable, cache_key
from rewards.verdicts import RewardContractError, RunnerStats, Verdict, verdicts

T = TypeVar("T")
Key = str | int
"""A sample's cache key, or its index where it cannot be cached."""


class _DeadlineError(Exception):
    """A call did not come back in time."""


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


def _batches(units: Sequence[list[Key]], size: int) -> Iterator[list[list[Key]]]:
    """The units, as many to a batch as have at most `size` keys together; at least one."""
    batch: list[list[Key]] = []
    for unit in units:
        if batch and sum(map(len, batch)) + len(unit) > size:
            yield batch
            batch = []
        batch.append(unit)
    if batch:
        yield batch


class RewardRunner:
    """Scores samples with one reward.

    `batch_size` samples go to one call; for a reward that sees groups, as many whole groups as that holds, or one.
    `deadline_s` (seconds, None for none) bounds all the work on one batch, retries included. A reward that raises is
    called again `retries` times with the batch, then once with each sample (or group) alone, so that one bad sample
    does not cost its neighbours theirs. `cache` is the number of scores kept in memory (0 for none); with a cache,
    samples that are equal in all but their ids are scored once. `after_batch` is called as each batch is done.
    """

    def __init__(
        self,
        reward: Reward,
        *,
        batch_size: int = 32,
        deadline_s: float | None = None,
        retries: int = 1,
        cache: int = 0,
        after_batch: Callable[[], None] = lambda: None,
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
        self.after_batch = after_batch
        self.cache = ScoreCache(cache)
        self.stats = RunnerStats()

    def score(self, samples: Sequence[Sample]) -> list[Score]:
        """One score a sample, in order. Raises RewardContractError only; a failing judge gives unavailable
        scores.
        """
        keys = self._keys(samples)
        scores: dict[Key, Score] = {}
        wanted: dict[Key, Sample] = {}
        for key, sample in zip(keys, samples, strict=True):
            if key in wanted or key in scores:
                self.stats.cached += 1
            elif isinstance(key, str) and (hit := self.cache.get(key)) is not None:
                scores[key] = hit
                self.stats.cached += 1
            else:
                wanted[key] = sample
        for units in _batches(self._units(wanted), self.batch_size):
            batch = [key for unit in units for key in unit]
            found = self._score_batch([[wanted[key] for key in unit] for unit in units])
            self.after_batch()
            for key, verdict in zip(batch, found, strict=True):
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

    def cached(self, without: Collection[str] = ()) -> dict[str, Any]:
        """The cache, but for the keys `without`, as JSON has it, and the fingerprint of the judge."""
        return {"fingerprint": self.reward.fingerprint(), "scores": self.cache.record(without)}

    def remember(self, record: Mapping[str, Any]) -> bool:
        """Go on with a cache that `cached` gave; False where it is another judge's, of which nothing is used. Raises
        ValueError for what is none.
        """
        if record.get("fingerprint") != self.reward.fingerprint():
            return False
        self.cache.restore(record.get("scores", ()))
        return True

    def _keys(self, samples: Sequence[Sample]) -> list[Key]:
        """A cache key a sample, or its index where it cannot be cached: as where its score depends on its group."""
        if self.cache.capacity == 0 or isinstance(self.reward, SeesGroups):
            return list(range(len(samples)))
        fingerprint = self.reward.fingerprint()
        keys: list[Key] = []
        for index, sample in enumerate(samples):
            try:
                keys.append(cache_key(sample, fingerprint))
            except (Uncacheable, OSError):
                self.stats.uncacheable += 1
                keys.append(index)
        return keys

    def _units(self, wanted: Mapping[Key, Sample]) -> list[list[Key]]:
        """The keys that must go to one call: each alone, or those of a group where the reward sees groups."""
        if not isinstance(self.reward, SeesGroups):
            return [[key] for key in wanted]
        groups: dict[str, list[Key]] = {}
        for key, sample in wanted.items():
            groups.setdefault(sample.group_id, []).append(key)
        return list(groups.values())

    def _score_batch(self, units: list[list[Sample]]) -> list[Verdict]:
        """Scores a batch under one deadline: the whole of it, again after a failure, then unit by unit."""
        ends = None if self.deadline_s is None else time.monotonic() + self.deadline_s
        batch = [sample for unit in units for sample in unit]
        error: Exception | None = None
        for attempt in range(1 + self.retries):
            self.stats.retries += attempt > 0
            answers, error = self._attempt(batch, ends)
            if answers is not None:
                return answers
            if isinstance(error, _DeadlineError):
                break
        if len(units) == 1 or isinstance(error, _DeadlineError):
            return [self._failed(error) for _ in batch]
        self.stats.retries += len(units)
        alone = [(unit, *self._attempt(unit, ends)) for unit in units]
        return [one for unit, found, why in alone for one in found or [self._failed(why) for _ in unit]]

    def _attempt(self, batch: list[Sample], ends: float | None) -> tuple[list[Verdict] | None, Exception | None]:
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
        return verdicts(answers, len(batch), self.reward.name), None

    def _failed(self, error: Exception | None) -> Verdict:
        if isinstance(error, _DeadlineError):
            reason = f"reward {self.reward.name!r} did not answer within {self.deadline_s} s"
            return Verdict(Score.unavailable(reason), "deadline")
        kind = type(error).__name__
        return Verdict(Score.unavailable(f"reward {self.reward.name!r} raised {kind}: {error}"), kind)
