"""A client of a judge's server: one chat at a time, tried again where that can help, and a check that takes seconds."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

try:
    import httpx
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "a judge's server is spoken to through httpx, which is not installed: pip install httpx", name="httpx"
    ) from error

from rewards.names import nearest
from rewards.verifier.answers import Answer, dig, read_answer
from rewards.verifier.errors import JudgeError, shown
from rewards.verifier.server import Server

CHECK_S = 5.0
"""Seconds that `check` waits for the server, at most."""
LONGEST_WAIT_S = 30.0
"""Seconds between two tries, at most, whatever the server asks for."""
MODELS_SHOWN = 10

LOST = (httpx.NetworkError, httpx.ConnectTimeout, httpx.RemoteProtocolError)
"""Connections that were refused or broke. A read timeout is none: to ask a slow server again makes it slower."""


@dataclass(frozen=True)
class _Again:
    """A try that failed in a way that may pass; `wait_s` is what the server asked for, if it did."""

    reason: str
    wait_s: float | None = None


class Client:
    """Asks the judge of a `Server`; threads may share one. The API key is read once, and stands in no error."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self._key = server.key()
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        self._http = httpx.Client(
            base_url=server.base,
            headers=headers,
            timeout=httpx.Timeout(server.timeout_s, pool=None),
            limits=httpx.Limits(max_connections=server.concurrency),
        )

    def chat(self, messages: Sequence[Mapping[str, Any]], max_tokens: int, **settings: Any) -> Answer:
        """The judge's answer at temperature 0. Raises JudgeError when there is none, after the retries."""
        body = {
            **self.server.extra_body,
            "model": self.server.model,
            "messages": messages,
            "temperature": 0,
            "max_completion_tokens": max_tokens,
            **settings,
        }
        return read_answer(self._payload(self._post(json.dumps(body).encode())))

    def check(self) -> None:
        """Whether the server answers, takes the key and serves the model. Raises JudgeError, which says what was
        given, what is served and what to do, within about CHECK_S seconds.
        """
        try:
            response = self._http.get("models", timeout=min(CHECK_S, self.server.timeout_s))
        except httpx.HTTPError as error:
            raise JudgeError(
                f"the judge's server {self.server.base} cannot be reached ({self._said(error)}). Start it, for example "
                f"with `vllm serve {self.server.model}`, or mend the option url"
            ) from error
        if response.status_code in (401, 403):
            given = f"the key in {self.server.api_key_env}" if self._key else "a request without a key"
            raise JudgeError(
                f"the judge's server {self.server.base} refuses {given} (status {response.status_code}). Put its key "
                "into an environment variable and name that in api_key_env"
            )
        if response.status_code != httpx.codes.OK:
            raise JudgeError(
                f"{self._failure(response)} to GET /models. Is url the address of an OpenAI-compatible server?"
            )
        self._check_model(self._payload(response))

    def _check_model(self, payload: Any) -> None:
        listed = dig(payload, "data")
        names = [name for item in listed if (name := dig(item, "id"))] if isinstance(listed, list) else []
        if self.server.model in names:
            return
        more = f" and {len(names) - MODELS_SHOWN} more" if len(names) > MODELS_SHOWN else ""
        served = ", ".join(map(str, names[:MODELS_SHOWN])) + more if names else "none"
        hint = f" {nearest(self.server.model, names)}" if more else ""
        raise JudgeError(
            f"the judge's server {self.server.base} does not serve the model {self.server.model!r}; it serves: "
            f"{served}.{hint} Set the option model to a name that it serves, or url to another server"
        )

    def _post(self, body: bytes) -> httpx.Response:
        wait_s, tries = self.server.backoff_s, 1 + self.server.retries
        for attempt in range(1, tries + 1):
            outcome = self._try(body)
            if not isinstance(outcome, _Again):
                return outcome
            if attempt == tries:
                raise JudgeError(f"{outcome.reason} ({tries} {'try' if tries == 1 else 'tries'})")
            time.sleep(min(LONGEST_WAIT_S, wait_s if outcome.wait_s is None else outcome.wait_s))
            wait_s *= 2
        raise AssertionError("the last try returns or raises")

    def _try(self, body: bytes) -> httpx.Response | _Again:
        try:
            response = self._http.post("chat/completions", content=body)
        except LOST as error:
            return _Again(f"the connection to {self.server.base} failed: {self._said(error)}")
        except httpx.TimeoutException as error:
            raise JudgeError(
                f"{self.server.base} did not answer within {self.server.timeout_s} s ({type(error).__name__}); raise "
                "timeout_s, or lower concurrency"
            ) from error
        except httpx.HTTPError as error:
            raise JudgeError(f"the request to {self.server.base} failed: {self._said(error)}") from error
        if response.status_code == httpx.codes.TOO_MANY_REQUESTS or response.is_server_error:
            return _Again(self._failure(response), _seconds(response.headers.get("Retry-After", "")))
        if response.status_code != httpx.codes.OK:
            raise JudgeError(self._failure(response))
        return response

    def _payload(self, response: httpx.Response) -> Any:
        try:
            return response.json()
        except ValueError as error:
            raise JudgeError(f"{self.server.base} answered no JSON: {self._hidden(shown(response.text))}") from error

    def _failure(self, response: httpx.Response) -> str:
        return f"{self.server.base} answered {response.status_code} {self._hidden(shown(response.text))}"

    def _said(self, error: httpx.HTTPError) -> str:
        return self._hidden(f"{type(error).__name__}: {error}")

    def _hidden(self, text: str) -> str:
        # Some servers repeat the key they refuse.
        return text.replace(self._key, "***") if self._key else text


def _seconds(header: str) -> float | None:
    """A Retry-After header in seconds, None for one that is a date or missing."""
    return float(header) if header.isascii() and header.isdigit() else None
