"""A client of a judge's server: one chat at a time, tried again where that can help, and a check that takes seconds."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rewards.endpoint import Endpoint
from rewards.names import nearest
from rewards.verifier.answers import Answer, dig, read_answer
from rewards.verifier.errors import JudgeError
from rewards.verifier.server import Server

CHECK_S = 5.0
"""Seconds that `check` waits for the server, at most."""
MODELS_SHOWN = 10


class Client:
    """Asks the judge of a `Server`; threads may share one. The API key is read once, and stands in no error."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self._endpoint = Endpoint(
            server.base,
            key=server.key(),
            timeout_s=server.timeout_s,
            retries=server.retries,
            backoff_s=server.backoff_s,
            concurrency=server.concurrency,
            failures=server.failures,
            cooldown_s=server.cooldown_s,
            failure=JudgeError,
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
        response = self._endpoint.post("chat/completions", json.dumps(body).encode())
        return read_answer(self._endpoint.payload(response))

    def check(self) -> None:
        """Whether the server answers, takes the key and serves the model. Raises JudgeError, which says what was
        given, what is served and what to do, within about CHECK_S seconds.
        """
        try:
            response = self._endpoint.get("models", CHECK_S)
        except JudgeError as error:
            raise JudgeError(
                f"the judge's server {self.server.base} cannot be reached ({error}). Start it, for example with "
                f"`vllm serve {self.server.model}`, or mend the option url"
            ) from error
        if response.status_code in (401, 403):
            given = f"the key in {self.server.api_key_env}" if self._endpoint.has_key else "a request without a key"
            raise JudgeError(
                f"the judge's server {self.server.base} refuses {given} (status {response.status_code}). Put its key "
                "into an environment variable and name that in api_key_env"
            )
        if response.status_code != 200:
            raise JudgeError(
                f"{self._endpoint.refusal(response)} to GET /models. Is url the address of an OpenAI-compatible server?"
            )
        self._check_model(self._endpoint.payload(response))

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
