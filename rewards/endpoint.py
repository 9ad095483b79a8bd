"""A server spoken to over HTTP: tried again where that can help, never for ever, and its key in no error."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

try:
    import httpx
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "a reward's server is spoken to through httpx, which is not installed: pip install httpx", name="httpx"
    ) from error

from rewards.breaker import Breaker
from rewards.verifier.errors import EndpointError, shown

LONGEST_WAIT_S = 30.0
"""Seconds between two tries, at most, whatever the server asks for."""
LOST = (httpx.NetworkError, httpx.ConnectTimeout, httpx.RemoteProtocolError)
"""Connections that were refused or broke. A read timeout is none: to ask a slow server again makes it slower."""


class _Limit:
    """At most so many requests to one address at once, over all rewards of this process that use it; the least that any
    of them allows."""

    def __init__(self) -> None:
        self.most: int | None = None
        self._now = 0
        self._free = threading.Condition()

    def lower(self, most: int) -> None:
        self.most = most if self.most is None else min(self.most, most)

    @contextmanager
    def place(self) -> Iterator[None]:
        with self._free:
            self._free.wait_for(lambda: self.most is None or self._now < self.most)
            self._now += 1
        try:
            yield
        finally:
            with self._free:
                self._now -= 1
                self._free.notify()


_LIMITS: WeakValueDictionary[str, _Limit] = WeakValueDictionary()
"""By address, for as long as any endpoint has it."""


@dataclass(frozen=True)
class _Again:
    """A try that failed in a way that may pass; `wait_s` is what the server asked for, if it did."""

    reason: str
    wait_s: float | None = None


class Endpoint:
    """The address `base` (what paths stand under). `key` goes along as a bearer token, '' for none. A connection that
    is lost, a 429 or a 5xx is tried again `retries` times, the first time after `backoff_s` seconds, then after twice
    as long each time. `concurrency` requests are under way at once, counted over all endpoints of this process with its
    address. After `failures` requests in a row without an answer (a refusal, such as a 400, is one) none goes out for
    `cooldown_s` seconds (`breaker.Breaker`). `failure` is the exception raised. Threads may share one.
    """

    def __init__(
        self,
        base: str,
        *,
        key: str = "",
        timeout_s: float = 60.0,
        retries: int = 3,
        backoff_s: float = 0.5,
        concurrency: int = 16,
        failures: int = 20,
        cooldown_s: float = 15.0,
        failure: type[EndpointError] = EndpointError,
    ) -> None:
        self.base, self._key, self.timeout_s = base, key, timeout_s
        self._retries, self._backoff_s, self.failure = retries, backoff_s, failure
        self._limit = _LIMITS.setdefault(base, _Limit())
        self._limit.lower(concurrency)
        self._breaker = Breaker(failures, cooldown_s)
        self._http = httpx.Client(
            base_url=base,
            headers={"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {}),
            timeout=httpx.Timeout(timeout_s, pool=None),
            limits=httpx.Limits(max_connections=concurrency),
        )

    @property
    def has_key(self) -> bool:
        return bool(self._key)

    def get(self, path: str, timeout_s: float) -> httpx.Response:
        """One try, whatever its status. Raises `failure` where there is no answer."""
        try:
            return self._http.get(path, timeout=min(timeout_s, self.timeout_s))
        except httpx.HTTPError as error:
            raise self.failure(self._said(error)) from error

    def post(self, path: str, body: bytes) -> httpx.Response:
        """The answer with status 200. Raises `failure` when there is none, after the retries, and at once while the
        breaker is open.
        """
        if refusal := self._breaker.refusal():
            raise self.failure(f"{self.base} was {refusal}")
        failed = "the request was broken off"
        try:
            response = self._post(path, body)
            failed = ""
        except EndpointError as error:
            failed = str(error)
            raise
        finally:
            self._breaker.note(failed)
        if response.status_code != httpx.codes.OK:
            raise self.failure(self.refusal(response))
        return response

    def _post(self, path: str, body: bytes) -> httpx.Response:
        wait_s, tries = self._backoff_s, 1 + self._retries
        for attempt in range(1, tries + 1):
            outcome = self._try(path, body)
            if not isinstance(outcome, _Again):
                return outcome
            if attempt == tries:
                raise self.failure(f"{outcome.reason} ({tries} {'try' if tries == 1 else 'tries'})")
            time.sleep(min(LONGEST_WAIT_S, wait_s if outcome.wait_s is None else outcome.wait_s))
            wait_s *= 2
        raise AssertionError("the last try returns or raises")

    def payload(self, response: httpx.Response) -> Any:
        """The JSON of an answer. Raises `failure` for an answer that is none."""
        try:
            return response.json()
        except ValueError as error:
            raise self.failure(f"{self.base} answered no JSON: {self._hidden(shown(response.text))}") from error

    def refusal(self, response: httpx.Response) -> str:
        """What an answer of another status than 200 says."""
        return f"{self.base} answered {response.status_code} {self._hidden(shown(response.text))}"

    def _said(self, error: httpx.HTTPError) -> str:
        return self._hidden(f"{type(error).__name__}: {error}")

    def _try(self, path: str, body: bytes) -> httpx.Response | _Again:
        try:
            with self._limit.place():
                response = self._http.post(path, content=body)
        except LOST as error:
            return _Again(f"the connection to {self.base} failed: {self._said(error)}")
        except httpx.TimeoutException as error:
            raise self.failure(
                f"{self.base} did not answer within {self.timeout_s} s ({type(error).__name__}); raise "
                "timeout_s, or lower concurrency"
            ) from error
        except httpx.HTTPError as error:
            raise self.failure(f"the request to {self.base} failed: {self._said(error)}") from error
        if response.status_code == httpx.codes.TOO_MANY_REQUESTS or response.is_server_error:
            return _Again(self.refusal(response), _seconds(response.headers.get("Retry-After", "")))
        return response

    def _hidden(self, text: str) -> str:
        # Some servers repeat the key they refuse.
        return text.replace(self._key, "***") if self._key else text


def _seconds(header: str) -> float | None:
    """A Retry-After header in seconds, None for one that is a date or missing."""
    return float(header) if header.isascii() and header.isdigit() else None
