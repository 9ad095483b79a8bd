"""Rollouts over several hosts that end early: an interrupt, an error of one, a host that does not answer. No vLLM."""

import asyncio
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from rollouts.contract import EngineLost
from rollouts.vllm_engine import engine as engines
from rollouts.vllm_engine.drawn import Drawn
from rollouts.vllm_engine.engine import VllmEngine
from rollouts.vllm_engine.host import Row
from rollouts.vllm_engine.server import CALL, GENERATE, ServerHost
from tests.unit.test_vllm_answers import Answering
from tests.unit.test_vllm_parts import LAYOUT, FakeHost, ask, engine_of


class Drawing(Answering):
    """A server that does not end its rows until it is told to give them up, or the test ends."""

    def __init__(self, *, told: Callable[[], tuple[int, Any]] = lambda: (200, {})) -> None:
        super().__init__()
        self.asked, self.free, self.given_up = threading.Event(), threading.Event(), 0

        def draw() -> tuple[int, Any]:
            self.asked.set()
            self.free.wait(20)
            return 200, {}

        def give_up() -> tuple[int, Any]:
            self.given_up += 1
            return told()

        self.says |= {GENERATE: draw, "/abort_requests": give_up}


@pytest.fixture
def servers() -> Iterator[list[Drawing]]:
    made: list[Drawing] = []
    yield made
    for one in made:
        one.free.set()
        one.http.shutdown()
        one.http.server_close()


def over(servers: Sequence[Answering]) -> VllmEngine:
    return VllmEngine(LAYOUT, [ServerHost(one.url, token="x") for one in servers], lambda weights: None)


def rollout_threads(before: set[threading.Thread]) -> list[threading.Thread]:
    """Those of the engine that are still there; a server's own end with its answers."""
    return [one for one in set(threading.enumerate()) - before if "begin" in repr(getattr(one, "_target", None))]


def interrupt_when(*events: threading.Event) -> None:
    """As Ctrl-C does: in the main thread, which is this one."""
    main = threading.get_ident()

    def run() -> None:
        if all(event.wait(20) for event in events):
            signal.pthread_kill(main, signal.SIGINT)

    threading.Thread(target=run, daemon=True).start()


@pytest.mark.usefixtures("interruptible")
def test_an_interrupted_rollout_leaves_no_rows_on_any_server(servers: list[Drawing]) -> None:
    servers += [Drawing(), Drawing()]
    engine, before = over(servers), set(threading.enumerate())
    interrupt_when(*(one.asked for one in servers))
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt) as told:
        ask(engine, guided=False)
    assert [one.given_up for one in servers] == [1, 1] and not rollout_threads(before)
    assert not getattr(told.value, "__notes__", []) and time.monotonic() - began < 10


def in_a_loop(call: Callable[[], Any]) -> Any:
    """As a notebook runs a cell: the thread has a loop already, and the call blocks it."""

    async def cell() -> Any:
        return call()

    loop = asyncio.new_event_loop()
    try:
        return loop.run_until_complete(cell())
    finally:
        loop.close()


def test_a_notebook_draws_from_one_server(servers: list[Drawing]) -> None:
    servers += [Drawing()]
    host = ServerHost(servers[0].url, token="x")
    drawn = [{"token_ids": [7, 8], "finish_reason": "length"}]
    servers[0].says |= {GENERATE: lambda: (200, {"choices": drawn}), CALL: lambda: (200, {"results": [[]]})}
    assert in_a_loop(lambda: host.run([Row((1,), {}, 2)], [])) == ([[7, 8]], [])


@pytest.mark.usefixtures("interruptible")
def test_an_interrupted_notebook_leaves_no_rows_on_its_server(servers: list[Drawing]) -> None:
    servers += [Drawing()]
    engine, before = over(servers), set(threading.enumerate())
    interrupt_when(servers[0].asked)
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        in_a_loop(lambda: ask(engine, guided=False))
    assert servers[0].given_up == 1 and not rollout_threads(before) and time.monotonic() - began < 10


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_before_a_notebooks_rows_were_sent_ends_them(
    servers: list[Drawing], monkeypatch: pytest.MonkeyPatch
) -> None:
    servers += [Drawing()]
    sends, started = ServerHost._abandonable, threading.Event()

    async def late(self: ServerHost, rows: Sequence[Row]) -> list[list[int]]:
        await asyncio.sleep(0.2)  # until the main thread waits for this one
        started.set()
        await asyncio.sleep(0.5)
        return await sends(self, rows)

    monkeypatch.setattr(ServerHost, "_abandonable", late)
    engine, before = over(servers), set(threading.enumerate())
    interrupt_when(started)
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        in_a_loop(lambda: ask(engine, guided=False))
    assert servers[0].given_up == 1 and not rollout_threads(before) and time.monotonic() - began < 10


@pytest.mark.usefixtures("interruptible")
def test_a_server_that_is_gone_or_refuses_is_told_of_with_the_interrupt(servers: list[Drawing]) -> None:
    servers += [Drawing(told=lambda: (500, "no more")), Drawing()]
    interrupt_when(*(one.asked for one in servers))
    with pytest.raises(KeyboardInterrupt) as told:
        ask(over(servers), guided=False)
    (note,) = told.value.__notes__
    assert servers[1].given_up == 1 and "could not be given up: the vLLM server failed at /abort_requests" in note


def test_a_server_that_is_lost_ends_the_rollout_of_the_others_at_once(servers: list[Drawing]) -> None:
    lost = Drawing()
    servers += [Drawing(), lost]
    lost.says[GENERATE] = lambda: (servers[0].asked.wait(20), (503, "gone"))[1]
    began = time.monotonic()
    with pytest.raises(EngineLost, match=f"failed at {GENERATE} with 503"):
        ask(over(servers), guided=False)
    assert servers[0].given_up == 1 and time.monotonic() - began < 10


def test_nothing_is_given_up_where_no_rollout_is_under_way(servers: list[Drawing]) -> None:
    servers += [Drawing()]
    host = ServerHost(servers[0].url, token="x")
    host.abandon()
    assert servers[0].given_up == 0


class Stuck(FakeHost):
    """A host that draws until it is let go. `late`: it has not begun when it is told to end for the first time."""

    def __init__(self, *, deaf: bool = False, late: bool = False) -> None:
        super().__init__()
        self.deaf, self.late = deaf, late
        self.asked, self.free = threading.Event(), threading.Event()

    def abandon(self) -> None:
        super().abandon()
        if not self.deaf and self.abandoned > self.late:
            self.free.set()

    def run(self, rows: Sequence[Row], samples: Sequence[str]) -> tuple[list[list[int]], list[Drawn]]:
        self.asked.set()
        assert self.free.wait(20), "the rollout was waited for"
        return super().run(rows, samples)


def test_an_error_of_one_host_is_raised_when_the_others_have_ended() -> None:
    slow = Stuck(late=True)
    with pytest.raises(RuntimeError, match="did not follow"):
        ask(engine_of(FakeHost(wrong=True), slow))
    assert len(slow.rows) == 4 and slow.abandoned == 2


def test_a_host_that_does_not_end_is_left_and_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "ABANDON_SECONDS", 0.5)
    deaf = Stuck(deaf=True)
    try:
        with pytest.raises(RuntimeError, match="did not follow") as told:
            ask(engine_of(FakeHost(wrong=True), deaf))
        assert told.value.__notes__ == ["and 1 of 2 vLLMs did not end their rollouts in 0.5 s"]
    finally:
        deaf.free.set()


def test_who_is_interrupted_again_waits_for_no_host(monkeypatch: pytest.MonkeyPatch) -> None:
    hosts = [Stuck(deaf=True), Stuck(deaf=True)]

    def interrupted(*_: Any, **__: Any) -> None:
        assert all(host.asked.wait(20) for host in hosts)
        raise KeyboardInterrupt

    monkeypatch.setattr(engines, "wait", interrupted)
    before = set(threading.enumerate())
    with pytest.raises(KeyboardInterrupt):
        ask(engine_of(*hosts))
    left = rollout_threads(before)
    assert len(left) == 2 and all(thread.daemon for thread in left)  # which the end of the process does not wait for
    for host in hosts:
        host.free.set()
