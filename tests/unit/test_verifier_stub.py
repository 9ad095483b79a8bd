"""A judge's server for the tests of the verifier rewards: real HTTP on this machine, with scripted answers. It refuses
whatever is not a chat completion request as OpenAI's format has it, so that a wrong request is no silent one.
"""

import base64
import io
import json
import math
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest
from PIL import Image

from rewards.verifier.client import Client
from rewards.verifier.server import Server

MODEL = "org/judge-7b"


@dataclass(frozen=True)
class Reply:
    """One scripted answer. `drop` closes the connection without any, `reset` breaks it off."""

    payload: Any = None
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    delay_s: float = 0.0
    raw: bytes | None = None
    drop: bool = False
    reset: bool = False


def says(text: str | None, finish: str = "stop") -> Reply:
    """A text answer."""
    return Reply(
        {"choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}]}
    )


def tokens(chances: Mapping[str, float], **fields: Any) -> Reply:
    """A one-token answer with the probabilities of the first token."""
    top = [{"token": token, "logprob": math.log(chance), "bytes": None} for token, chance in chances.items()]
    return first_token(top, **fields)


def first_token(top: Any, finish: str = "length") -> Reply:
    """A one-token answer with `top_logprobs` as given."""
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": "Yes"},
        "finish_reason": finish,
        "logprobs": {"content": [{"token": "Yes", "logprob": -0.1, "top_logprobs": top}]},
    }
    return Reply({"choices": [choice]})


class Stub:
    """What the server does and what it was sent. `answer` maps a request's body and its number, from 0, to a Reply."""

    def __init__(self, answer: Callable[[dict[str, Any], int], Reply]) -> None:
        self.answer = answer
        self.models = [MODEL, "org/other"]
        self.models_reply: Reply | None = None
        self.bodies: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.keys: list[str | None] = []
        self.most_at_once = 0
        self.url = ""
        self._now = 0
        self._lock = threading.Lock()

    def client(self, **settings: Any) -> Client:
        """A client of this server that loses no time between its tries."""
        defaults: dict[str, Any] = {"url": self.url, "model": MODEL, "backoff_s": 0.0, "timeout_s": 30.0}
        return Client(Server(**{**defaults, **settings}))

    def take(self, body: dict[str, Any]) -> Reply:
        with self._lock:
            number = len(self.bodies)
            self.bodies.append(body)
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
        try:
            if fault := fault_of(body):
                return Reply({"error": {"message": fault}}, status=422)
            if body["model"] not in self.models:
                return Reply({"error": {"message": f"The model {body['model']} does not exist."}}, status=404)
            reply = self.answer(body, number)
            time.sleep(reply.delay_s)
            return reply
        finally:
            with self._lock:
                self._now -= 1


def fault_of(body: Mapping[str, Any]) -> str:
    """What is wrong with a chat completion request, '' for nothing."""
    if [message["role"] for message in body["messages"]] != ["system", "user"]:
        return "roles"
    if body.get("temperature") != 0 or not isinstance(body.get("max_completion_tokens"), int):
        return "temperature or max_completion_tokens"
    for part in body["messages"][1]["content"]:
        if part["type"] == "image_url" and not part["image_url"]["url"].startswith("data:image/png;base64,"):
            return "image_url"
        if part["type"] == "text" and not part["text"]:
            return "text"
    return "" if pictures(body) else "no image"


def pictures(body: Mapping[str, Any]) -> list[Image.Image]:
    """The images of a request, decoded."""
    urls = [part["image_url"]["url"] for part in body["messages"][1]["content"] if part["type"] == "image_url"]
    return [Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2], validate=True))) for url in urls]


def words(body: Mapping[str, Any]) -> str:
    """The texts of a request's user message, in order."""
    return "\n".join(part["text"] for part in body["messages"][1]["content"] if part["type"] == "text")


def keys_of(body: Mapping[str, Any]) -> list[str]:
    """The scores that a request's JSON schema asks for."""
    schema = body["response_format"]["json_schema"]["schema"]
    return [key for key in schema["required"] if key != "reasoning"]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    stub: Stub

    def do_GET(self) -> None:
        self._note()
        listed = {"object": "list", "data": [{"id": name, "object": "model"} for name in self.stub.models]}
        reply = self.stub.models_reply or Reply(listed)
        time.sleep(reply.delay_s)
        self._send(reply if self.path == "/v1/models" else Reply({"detail": "Not Found"}, status=404))

    def do_POST(self) -> None:
        self._note()
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        right = self.path == "/v1/chat/completions" and self.headers["Content-Type"] == "application/json"
        self._send(self.stub.take(body) if right else Reply({"detail": "Not Found"}, status=404))

    def _note(self) -> None:
        self.stub.paths.append(self.path)
        self.stub.keys.append(self.headers["Authorization"])

    def _send(self, reply: Reply) -> None:
        if reply.reset:  # to close without lingering is to send RST
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        if reply.drop or reply.reset:
            self.close_connection = True
            return
        content = json.dumps(reply.payload).encode() if reply.raw is None else reply.raw
        self.send_response(reply.status)
        for name, value in {"Content-Length": str(len(content)), **reply.headers}.items():
            self.send_header(name, value)
        try:
            self.end_headers()
            self.wfile.write(content)
        except OSError:  # the client stopped waiting
            self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: a test's output is its own."""


@contextmanager
def serving(answer: Callable[[dict[str, Any], int], Reply] | Reply | list[Reply]) -> Iterator[Stub]:
    """A Stub that listens: one reply for all, one after the other with the last for the rest, or a function."""
    if isinstance(answer, Reply):
        answer = [answer]
    listed = answer
    stub = Stub((lambda body, at: listed[min(at, len(listed) - 1)]) if isinstance(listed, list) else listed)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"stub": stub}))
    server.daemon_threads = True
    stub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield stub
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({}, ""),
        ({"temperature": 0.7}, "temperature"),
        ({"messages": [{"role": "user", "content": []}]}, "roles"),
        ({"messages": [{"role": "system"}, {"role": "user", "content": [{"type": "text", "text": "a"}]}]}, "no image"),
    ],
)
def test_the_stub_refuses_a_wrong_request(change: dict[str, Any], fault: str) -> None:
    file = io.BytesIO()
    Image.new("RGB", (2, 2)).save(file, "PNG")
    image = {"url": "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()}
    user = {"role": "user", "content": [{"type": "image_url", "image_url": image}]}
    good = {"model": MODEL, "temperature": 0, "max_completion_tokens": 1, "messages": [{"role": "system"}, user]}
    with serving(says("Yes")) as stub:
        answer = httpx.post(f"{stub.url}/v1/chat/completions", json=good | change)
    assert answer.status_code == (422 if fault else 200)
    assert fault in answer.text
