"""What was opened for an engine that could not be made is closed again: servers of our own, connections. No vLLM."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx
import pytest
import torch

from rlmm.config.engines import VllmServerConfig
from rlmm.policies.causal import CausalPolicy
from rlmm.train import engines
from rollouts.contract import EngineLost
from rollouts.vllm_engine import launch, server
from rollouts.vllm_engine.server import ServerHost, start_servers
from tests.unit.test_vllm_answers import Answering
from tests.unit.test_vllm_launch import Small
from tests.unit.test_vllm_parts import LAYOUT


class Opened:
    """Servers that were started, and clients."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.servers: list[launch.Server] = []
        self.clients: list[httpx.Client] = []
        servers, clients = self.servers, self.clients

        class Server(launch.Server):
            def __init__(self, plan: launch.ServerPlan) -> None:
                super().__init__(plan)
                servers.append(self)

        class Client(httpx.Client):
            def __init__(self, **settings: Any) -> None:
                super().__init__(**settings)
                clients.append(self)

        patch.setattr(server, "Server", Server)
        patch.setattr(httpx, "Client", Client)

    def left(self) -> int:
        running = [one for one in self.servers if one.process.poll() is None or one.scratch.exists()]
        return len(running) + len([one for one in self.clients if not one.is_closed])


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Opened:
    return Opened(monkeypatch)


def policy() -> CausalPolicy:
    made = SimpleNamespace(layout=LAYOUT, base=SimpleNamespace(device=torch.device("cpu")), save=lambda folder: None)
    return cast(CausalPolicy, made)


def test_of_servers_of_which_one_does_not_answer_nothing_is_left(
    opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = ServerHost.call

    def second_fails(host: ServerHost, method: str, *arguments: str) -> Any:
        if len(opened.clients) == 2:
            raise EngineLost("the second")
        return call(host, method, *arguments)

    monkeypatch.setattr(ServerHost, "call", second_fails)
    with pytest.raises(EngineLost, match="the second"):
        start_servers(Small(Path("model"), max_length=1), 2, 60)
    assert len(opened.servers) == len(opened.clients) == 2 and opened.left() == 0


def test_a_server_that_was_started_ends_where_the_group_cannot_be_made(
    opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "ServerPlan", lambda folder, **_: Small(folder, max_length=1))
    monkeypatch.setattr(engines, "_served", lambda *_: {})
    monkeypatch.setattr(engines, "check_gpus", lambda _: None)

    def refused(*_: Any) -> Any:
        raise OSError("no such address")

    monkeypatch.setattr(engines, "_transfer", refused)
    with pytest.raises(OSError, match="no such address"):
        engines.build_engine(VllmServerConfig(transfer="gloo"), policy())
    assert len(opened.servers) == len(opened.clients) == 1 and opened.left() == 0


def test_of_urls_of_which_one_does_not_answer_no_connection_is_left(
    opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RLMM_ROLLOUT_TOKEN", "x")
    answers = Answering()
    with pytest.raises(EngineLost, match="http://127.0.0.1:9 is gone"):
        engines.build_engine(VllmServerConfig(urls=(answers.url, "http://127.0.0.1:9")), policy())
    assert len(opened.clients) == 2 and opened.left() == 0
    answers.http.shutdown()
    answers.http.server_close()
