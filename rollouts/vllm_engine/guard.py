"""The API key on every path of a vLLM server. vLLM's own check leaves out those that change weights and caches."""

import os
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

OPEN = "/health"
KEY_VARIABLE = "VLLM_API_KEY"

Messages = MutableMapping[str, Any]
Application = Callable[[Messages, Callable[[], Awaitable[Messages]], Callable[[Messages], Awaitable[None]]], Any]


class KeyMiddleware:
    """ASGI middleware, named in vLLM's `--middleware`. Without a key in the environment it refuses to be made."""

    def __init__(self, app: Application) -> None:
        self.app = app
        key = os.environ.get(KEY_VARIABLE)
        if not key:
            raise RuntimeError(f"{KEY_VARIABLE} is not set: a rollout server takes weights from whoever has its key")
        self.wanted = f"Bearer {key}".encode()

    async def __call__(self, scope: Messages, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and scope["path"] != OPEN and not self._allowed(scope):
            await send({"type": "http.response.start", "status": 401, "headers": [(b"content-type", b"text/plain")]})
            await send({"type": "http.response.body", "body": b"this server wants its API key\n"})
            return
        await self.app(scope, receive, send)

    def _allowed(self, scope: Messages) -> bool:
        given = dict(scope["headers"]).get(b"authorization", b"")
        return secrets.compare_digest(given, self.wanted)
