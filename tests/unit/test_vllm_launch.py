"""What a vLLM that is started here is told, and what is done where its port is taken; needs no vLLM and no GPU."""

import json
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from rollouts.contract import EngineLost
from rollouts.vllm_engine import launch
from rollouts.vllm_engine.launch import LOG_LINES, PortTaken, ServerPlan, log_end, serve, surroundings, visible_device
from rollouts.vllm_engine.server import start_servers


@pytest.mark.parametrize(("named", "seen"), [(None, "1"), ("", "1"), ("4, 6", "6"), ("GPU-a,GPU-b", "GPU-b")])
def test_a_server_sees_the_gpu_of_the_process_that_started_it(
    named: str | None, seen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if named is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    device = visible_device(torch.device("cuda", 1))
    assert device == seen and surroundings("key", device)["CUDA_VISIBLE_DEVICES"] == seen


def test_a_server_elsewhere_sees_what_its_process_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert visible_device(torch.device("cpu")) is None
    assert surroundings("key")["CUDA_VISIBLE_DEVICES"] == "0,1"


def test_vllm_does_not_ask_for_the_memory_that_training_holds() -> None:
    """Stock vLLM asks for 0.92 of the device to be free, even where the size of its cache is given."""
    command = ServerPlan(Path("model"), max_length=9).command(81)
    given = dict(zip(command, command[1:], strict=False))
    assert float(given["--gpu-memory-utilization"]) < 0.05 and int(given["--kv-cache-memory-bytes"]) > 0


ROOM = {"rows": 4, "prompt_tokens": 64, "blocks": 9, "length": 64}
ANSWERING = f"""
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer

class Answers(BaseHTTPRequestHandler):
    def do_GET(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{json.dumps({"results": [ROOM]})}')
    do_POST = do_GET

HTTPServer(("127.0.0.1", int(sys.argv[1])), Answers).serve_forever()
"""


class Small(ServerPlan):
    """A server that binds its port and answers, in place of vLLM."""

    def command(self, port: int) -> list[str]:
        return [sys.executable, "-c", ANSWERING, str(port)]


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The ports that servers are given first: one, which is taken."""
    free, ports = launch.free_port, list[int]()
    monkeypatch.setattr(launch, "free_port", lambda: ports.pop() if ports else free())
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        ports.append(other.getsockname()[1])
        yield ports


def test_a_server_whose_port_was_taken_is_started_once_more(chosen: list[int]) -> None:
    taken = chosen[0]
    hosts = start_servers(Small(Path("model"), max_length=1), 2, 60)
    assert len({host.url for host in hosts}) == 2 and not any(host.url.endswith(f":{taken}") for host in hosts)
    assert not chosen and all(host.room.length == ROOM["length"] for host in hosts)
    for host in hosts:
        host.close()


def test_a_second_port_that_was_taken_is_raised(chosen: list[int]) -> None:
    chosen *= 2
    with pytest.raises(PortTaken, match="(?s)ended with status 1:.*Address already in use"):
        start_servers(Small(Path("model"), max_length=1), 1, 60)
    assert not chosen


def test_a_proxy_of_the_environment_is_not_asked_for_a_server_that_is_started_here(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    (host,) = start_servers(Small(Path("model"), max_length=1), 1, 10)
    host.close()


CORE = "(EngineCore pid=7) ERROR 11-27 10:00:00 [core.py:1165]"
LOG = [
    "(APIServer pid=1) INFO 11-27 10:00:00 [utils.py:233] non-default args",
    "(APIServer pid=1) WARNING 11-27 10:00:00 [import.py:9] Failed: ModuleNotFoundError: No module named 'extra'",
    "(APIServer pid=1) INFO 11-27 10:00:00 [api.py:1] raises ValueError: never",
    f"{CORE} Traceback (most recent call last):",
    f"{CORE}     raise ValueError(",
    f"{CORE} ValueError: no backend for heads of 16",
]
ENDED = "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}"


def test_the_end_of_a_log_has_the_root_cause_that_stands_far_above() -> None:
    last = [*(f"  line {i}" for i in range(LOG_LINES)), ENDED]
    assert log_end("\n".join([*LOG, *last])).splitlines() == [LOG[-1], "...", *last[-LOG_LINES:]]
    bare = ["torch.OutOfMemoryError: CUDA out of memory", *last]
    assert log_end("\n".join(bare)).splitlines() == [bare[0], "...", *last[-LOG_LINES:]]
    plain = ["NotImplementedError", *last]
    assert log_end("\n".join(plain)).splitlines()[0] == "NotImplementedError"


def test_an_error_that_the_last_lines_show_is_shown_once() -> None:
    assert log_end("\n".join([*LOG, ENDED])).splitlines() == [*LOG, ENDED]
    again = [*(f"  line {i}" for i in range(LOG_LINES)), "(APIServer pid=1) ValueError: no backend for heads of 16"]
    assert log_end("\n".join([*LOG, *again])).splitlines() == again[-LOG_LINES:]
    quiet = [f"INFO line {i}" for i in range(LOG_LINES + 5)]
    assert log_end("\n".join(quiet)).splitlines() == quiet[-LOG_LINES:]


class Dying(ServerPlan):
    """A server that names its error first and says much afterwards."""

    def command(self, port: int) -> list[str]:
        said = ["ValueError: the root cause", *(f"  line {i}" for i in range(LOG_LINES)), ENDED]
        return [sys.executable, "-c", f"import sys; sys.exit({chr(10).join(said)!r})"]


def test_a_server_that_ends_at_its_start_is_told_with_the_root_cause() -> None:
    with pytest.raises(EngineLost, match=r"(?s)ended with status 1:\nValueError: the root cause\n\.\.\.\n.*See root"):
        start_servers(Dying(Path("model"), max_length=1), 1, 60)


def test_without_vllm_nobody_becomes_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    became = list[str]()
    monkeypatch.setattr(launch.os, "execve", lambda path, command, environment: became.extend(command))
    monkeypatch.setattr(launch, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="vLLM, which is not installed; install the extra"):
        serve(ServerPlan(Path("model"), max_length=1), 81, "key")
    assert not became
    monkeypatch.setattr(launch, "find_spec", lambda name: name)
    serve(ServerPlan(Path("model"), max_length=1), 81, "key")
    assert "model" in became
