"""Where a judge is served: address, model, key and limits, checked before anything is sent."""

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

SENT_BY_US = frozenset(
    {"model", "messages", "temperature", "max_completion_tokens", "logprobs", "top_logprobs", "response_format"}
    | {"n", "stream"}
)
"""What a request says because the reward's formula needs it, so that `extra_body` may not."""


@dataclass(frozen=True)
class Server:
    """A server that speaks the OpenAI chat completions format. Raises ValueError for settings that cannot work.

    `url` with or without a last ``/v1``. `api_key_env` names the environment variable that holds the key, ''
    sends none. `timeout_s`: seconds for the connection and for each wait for bytes. `retries`: further tries
    after a lost connection, a 429 or a 5xx, the first after `backoff_s` seconds, then after twice as long each
    time. `concurrency`: requests under way at once, in this process. After `failures` requests in a row without an
    answer (0: never) none goes out for `cooldown_s` seconds. `extra_body` joins every request, such as
    ``{"chat_template_kwargs": {"enable_thinking": False}}``.
    """

    url: str
    model: str
    api_key_env: str = ""
    timeout_s: float = 60.0
    retries: int = 3
    backoff_s: float = 0.5
    concurrency: int = 16
    extra_body: Mapping[str, Any] = field(default_factory=dict)
    failures: int = 20
    cooldown_s: float = 15.0

    def __post_init__(self) -> None:
        self._check_types()
        self._check_address()
        self._check_limits()
        if taken := sorted(SENT_BY_US & set(self.extra_body)):
            raise ValueError(f"extra_body sets {taken[0]!r}, which the reward itself sends; leave it out")
        try:
            json.dumps(self.extra_body, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"extra_body cannot be sent as JSON: {error}") from error

    @property
    def base(self) -> str:
        """The address that ``/models`` and ``/chat/completions`` stand under; it ends in ``/v1``."""
        bare = self.url.rstrip("/")
        return bare if bare.endswith("/v1") else f"{bare}/v1"

    def identity(self) -> str:
        """What of the server decides its answers: the model and `extra_body`, not where or how it is reached."""
        return f"model={self.model!r} extra={json.dumps(self.extra_body, sort_keys=True)}"

    def key(self) -> str:
        """The API key, '' for none. Raises ValueError, without the key, for one that is missing or cannot be sent."""
        if not self.api_key_env:
            return ""
        key = os.environ.get(self.api_key_env, "").strip()
        if not key:
            raise ValueError(
                f"the judge's API key is read from the environment variable {self.api_key_env}, which is "
                f"{'empty' if self.api_key_env in os.environ else 'not set'}: export it, or change api_key_env"
            )
        if not re.fullmatch(r"[!-~]+", key):
            raise ValueError(f"the API key in {self.api_key_env} has a space or a character outside ASCII")
        return key

    def _check_types(self) -> None:
        # A recipe's options come from YAML as they stand there.
        texts, numbers, counts = (
            ("url", "model", "api_key_env"),
            ("timeout_s", "backoff_s", "cooldown_s"),
            ("retries", "concurrency", "failures"),
        )
        wanted: dict[str, tuple[type, ...]] = {"extra_body": (Mapping,)}
        wanted |= dict.fromkeys(texts, (str,)) | dict.fromkeys(numbers, (int, float)) | dict.fromkeys(counts, (int,))
        for name, kinds in wanted.items():
            value = getattr(self, name)
            if not isinstance(value, kinds) or isinstance(value, bool):
                given, expected = type(value).__name__, " or ".join(kind.__name__ for kind in kinds)
                raise ValueError(f"{name} is a {given}; expected {expected}")

    def _check_address(self) -> None:
        parts = urlsplit(self.url)
        _ = parts.port  # raises ValueError for one that is no number
        if "@" in parts.netloc:
            raise ValueError("url holds a user or password; name the key's environment variable in api_key_env")
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise ValueError(
                f"url {self.url!r} is no server's address; expected one such as http://127.0.0.1:8000 (a last /v1 is "
                "added where it is missing)"
            )
        if not self.model:
            raise ValueError("model is empty; give the name under which the server serves the judge")
        # The text is not shown: where a key was put here by mistake, it would end up in a log.
        if self.api_key_env and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.api_key_env):
            raise ValueError("api_key_env is the name of an environment variable (as JUDGE_API_KEY), not the key")

    def _check_limits(self) -> None:
        seconds = (self.timeout_s, self.backoff_s)
        if not all(map(math.isfinite, seconds)) or self.timeout_s <= 0 or self.backoff_s < 0:
            raise ValueError(
                f"timeout_s must be above 0 and backoff_s at least 0 seconds, got {self.timeout_s} and {self.backoff_s}"
            )
        if self.retries < 0 or self.concurrency < 1:
            raise ValueError(
                f"retries must be at least 0 and concurrency at least 1, got {self.retries} and {self.concurrency}"
            )
        if self.failures < 0 or not 0 <= self.cooldown_s < math.inf:
            raise ValueError(
                f"failures and cooldown_s must be at least 0, got {self.failures} and {self.cooldown_s} seconds"
            )
