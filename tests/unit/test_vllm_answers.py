"""What a server's answers are told as: its worker's fault, another key, a slow rollout, a loss. Needs no vLLM."""

import json
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any, cast

import pytest

from rollouts.contract import EngineLost
from rollouts.vllm_engine import broadcast, server
from rollouts.vllm_engine.broadcast import BROKE_OFF
from rollouts.vllm_engine.connections import SPARE, Connections
from rollouts.vllm_engine.host import Row
from rollouts.vllm_engine.server import CALL, GENERATE, ServerHost

ROOM = {"rows": 4, "prompt_tokens": 64, "blocks": 9, "length": 64}
ROW = Row((1,), {}, 1)
Answer = tuple[int, Any]


class Answering:
    """A server in a thread. `says`: status and body of the paths that the test changes; a function is called first."""

    def __init__(self) -> None:
        self.says: dict[str, Answer | Callable[[], Answer]] = {}
        said = self.says

        class Answers(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                found = said.get(self.path, (200, {"results": [ROOM]}))
                status, body = found() if callable(found) else found
                self.send_response(status)
                self.end_headers()
                self.wfile.write(json.dumps(body).encode())

            do_POST = do_GET

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


@pytest.fixture
def far(monkeypatch: pytest.MonkeyPatch) -> Iterator[Answering]:
    monkeypatch.setattr(server, "DYING_SECONDS", 0.0)
    made = Answering()
    yield made
    made.http.shutdown()
    made.http.server_close()


def failure(text: str) -> Answer:
    """As vLLM words it."""
    return 500, {"error": {"message": text, "type": "InternalServerError", "param": None, "code": 500}}


def test_a_worker_that_fails_in_a_server_that_goes_on_is_no_loss(far: Answering) -> None:
    host = ServerHost(far.url, token="x")
    far.says[CALL] = failure("Call to collective_rpc method failed: shape (3, 4) is not (4, 3)")
    with pytest.raises(
        RuntimeError, match=r"failed in rollouts_load\(/some/where, 3\): Call.* \(3, 4\) is not"
    ) as told:
        host.call("rollouts_load", "/some/where", "3")
    assert not isinstance(told.value, EngineLost)


@pytest.mark.parametrize("health", [503, 500])
def test_a_worker_that_fails_with_its_server_is_a_loss(far: Answering, health: int) -> None:
    host = ServerHost(far.url, token="x")
    far.says |= {CALL: failure("EngineCore encountered an issue"), "/health": (health, {})}
    with pytest.raises(EngineLost, match="failed at /collective_rpc with 500: EngineCore encountered an issue"):
        host.call("rollouts_fingerprint")


def test_a_rollout_that_fails_is_a_loss(far: Answering) -> None:
    host = ServerHost(far.url, token="x")
    far.says[GENERATE] = (500, "no json of vLLM's")
    with pytest.raises(EngineLost, match="failed at /inference/v1/generate with 500: .no json of vLLM's"):
        host.run([ROW], ["a"])


def test_another_key_is_told_as_such(far: Answering) -> None:
    far.says[CALL] = (401, "this server wants its API key")
    with pytest.raises(PermissionError, match=r"refused /collective_rpc with 401: its key is not.*token_env"):
        ServerHost(far.url, token="x")
    far.says[CALL] = (404, {"detail": "Not Found"})
    with pytest.raises(RuntimeError, match="404.*start it with `rlmm rollout-server`"):
        ServerHost(far.url, token="x")


def test_a_rollout_that_is_longer_than_its_time_is_no_loss(far: Answering) -> None:
    host = ServerHost(far.url, token="x", timeout=0.5)
    slow = threading.Event()
    far.says[GENERATE] = lambda: (slow.wait(10), (200, {}))[1]
    far.says["/abort_requests"] = lambda: (time.sleep(1), (200, {}))[1]
    try:
        with pytest.raises(TimeoutError, match=rf"{far.url} did not answer {GENERATE} within 0.5 s: a rollout") as told:
            host.run([ROW], ["a"])
        assert "could not be given up" in told.value.__notes__[0]
    finally:
        slow.set()


def test_rows_that_somebody_else_gave_up_are_told_as_such(far: Answering) -> None:
    host = ServerHost(far.url, token="x")
    far.says[GENERATE] = 200, {"choices": [{"token_ids": [], "finish_reason": "abort"}]}
    with pytest.raises(RuntimeError, match=rf"{far.url} was told by somebody else to give up.*one engine at a time"):
        host.run([ROW], ["a"])


class Closing(BaseHTTPRequestHandler):
    """As a server that closes a connection for its idleness just when the next call comes."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        body = json.dumps({"results": [ROOM]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        self.rfile.peek(1)  # pyrefly: ignore  (a buffered reader)
        self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        pass


def test_a_connection_that_is_closed_while_idle_is_no_loss() -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Closing) as served:
        served.daemon_threads = True
        threading.Thread(target=served.serve_forever, daemon=True).start()
        host = ServerHost(f"http://127.0.0.1:{served.server_port}", token="x")
        assert host.call("rollouts_room") == ROOM == host.call("rollouts_room")
        host.close()
        served.shutdown()


def test_a_proxy_of_the_environment_does_not_lead_to_a_server_of_our_own(
    monkeypatch: pytest.MonkeyPatch, far: Answering
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    far.says[GENERATE] = 200, {"choices": [{"token_ids": [7], "finish_reason": "length"}]}
    far.says[CALL] = lambda: (200, {"results": [ROOM if not rooms else []]})
    rooms: list[Any] = []
    host = ServerHost(far.url, token="x", own=cast(Any, SimpleNamespace(tail=str, stop=lambda: None)))
    rooms.append(host.room)
    assert host.run([ROW], []) == ([[7]], [])
    with pytest.raises(EngineLost, match="is gone"):
        ServerHost(far.url, token="x")  # one elsewhere may be behind it


def test_of_several_servers_the_one_that_is_gone_is_told_first() -> None:
    """The others' pass breaks off with it, which is no fault of theirs; a fault of theirs is told before a break."""
    gone, broke, fault = EngineLost("gone"), RuntimeError(f"failed in x: {BROKE_OFF}"), RuntimeError("another shape")
    for errors, kind, says in (
        ([broke, gone], EngineLost, "gone"),
        ([broke, fault], RuntimeError, "another shape"),
        ([broke], EngineLost, BROKE_OFF),
    ):
        with pytest.raises(kind, match=says):
            broadcast._raise_first([_failed(error) for error in errors])


def test_a_server_that_waits_for_weights_does_not_keep_a_trainer_that_failed() -> None:
    waits, before = threading.Event(), set(threading.enumerate())
    host = cast(Any, SimpleNamespace(call=lambda *_: waits.wait(20)))

    def fails() -> None:
        raise ValueError("no such weight")

    with pytest.raises(ValueError, match="no such weight"):
        broadcast._beside([host], [("rollouts_receive",)], fails)
    (left,) = set(threading.enumerate()) - before
    assert left.daemon  # the process's end does not wait for it
    waits.set()


def _failed(error: Exception) -> Any:
    made = broadcast.Future[Any]()
    made.set_exception(error)
    return made


HOLDING = f"""
import json, sys, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
together = threading.Barrier(int(sys.argv[1]))

class Answers(BaseHTTPRequestHandler):
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if "method" in asked:
            body = {{"results": [{ROOM} if asked["method"] == "rollouts_room" else []]}}
        else:
            together.wait(30)
            body = {{"choices": [{{"token_ids": [7]}}]}}
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, *_):
        pass

class Server(ThreadingHTTPServer):
    request_queue_size = 256

made = Server(("127.0.0.1", 0), Answers)
print(made.server_port, flush=True)
made.serve_forever()
"""


def holding(rows: int) -> tuple["subprocess.Popen[str]", str]:
    """A server, in a process of its own, that answers no row before all are there, as a wave is held."""
    process = subprocess.Popen([sys.executable, "-c", HOLDING, str(rows)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, f"http://127.0.0.1:{int(process.stdout.readline())}"


def test_a_wave_of_more_rows_than_open_files_is_sent(limits: tuple[int, int]) -> None:
    rows = 150
    process, url = holding(rows)
    try:
        host = ServerHost(url, token="x")
        resource.setrlimit(resource.RLIMIT_NOFILE, (open_files() + rows // 2, limits[1]))
        taken, _ = host.run([ROW] * rows, [])
        assert taken == [[7]] * rows
        host.close()
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def limits() -> Iterator[tuple[int, int]]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield before
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def open_files() -> int:
    return len(os.listdir("/dev/fd"))


def set_limits(monkeypatch: pytest.MonkeyPatch, soft: int, hard: int) -> Sequence[tuple[int, int]]:
    """The limits that this process seems to have; what it sets follows."""
    now = [(soft, hard)]
    monkeypatch.setattr(resource, "getrlimit", lambda which: now[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda which, pair: now.append(pair))
    return now


def test_servers_that_are_sent_rows_at_the_same_time_are_counted_together(monkeypatch: pytest.MonkeyPatch) -> None:
    base = open_files() + SPARE
    now, made = set_limits(monkeypatch, base, base + 5000), Connections()
    with made.held_for(1000), made.held_for(2000):
        pass
    with made.held_for(2500):
        pass
    assert [hard for _, hard in now] == [base + 5000] * 3 and [soft - base for soft, _ in now] == [0, 1000, 3000]


def test_a_limit_that_is_too_low_is_told_before_a_row_is_sent(monkeypatch: pytest.MonkeyPatch, far: Answering) -> None:
    host = ServerHost(far.url, token="x")
    set_limits(monkeypatch, 100, 200)
    with pytest.raises(OSError, match=r"this process may have 200 at most; raise the hard limit of open files"):
        host.run([ROW] * 300, ["a"])
    set_limits(monkeypatch, 100, resource.RLIM_INFINITY)
    with Connections().held_for(300):
        pass
