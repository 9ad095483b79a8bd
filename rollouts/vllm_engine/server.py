"""A vLLM server as a host: rows over its token endpoint, all else through its calls to the worker."""

import asyncio
import json
import logging
import time
from collections.abc import Sequence
from concurrent.futures import wait
from contextlib import ExitStack, closing
from threading import Lock
from typing import Any

import httpx

from rollouts.contract import EngineLost
from rollouts.vllm_engine.beside import begin
from rollouts.vllm_engine.connections import CONNECTIONS
from rollouts.vllm_engine.drawn import KEY, Drawn
from rollouts.vllm_engine.host import ABANDON_SECONDS, AGAIN_SECONDS, Room, Row
from rollouts.vllm_engine.launch import PortTaken, Server, ServerPlan

log = logging.getLogger(__name__)

GENERATE = "/inference/v1/generate"
CALL = "/collective_rpc"
HEALTH_SECONDS = 10
"""How long a server may take to say that it is well."""
DYING_SECONDS = 1
"""How long a server may still say so when one of its processes has died."""


class ServerHost:
    """A server started with `launch.ServerPlan`'s flags, here or elsewhere.

    Args:
        url: e.g. http://127.0.0.1:8000
        token: its API key.
        own: the server where it is this process's own, to be stopped with it.
        timeout: seconds a rollout's slowest row may take.
    """

    def __init__(self, url: str, *, token: str, own: Server | None = None, timeout: float = 3600) -> None:
        self.url, self.own, self.timeout = url.rstrip("/"), own, timeout
        self.headers = {"Authorization": f"Bearer {token}"}
        # No connection is kept: a server closes one that is idle, and where the next call comes just then, that would
        # look like its loss.
        once = httpx.Limits(max_keepalive_connections=0)
        self.client = httpx.Client(
            base_url=self.url, headers=self.headers, timeout=timeout, trust_env=self.by_proxy, limits=once
        )  # fmt: skip
        self._lock = Lock()
        self._sending: tuple[asyncio.AbstractEventLoop, asyncio.Task[Any]] | None = None
        try:
            self.room = Room(**self.call("rollouts_room"))
        except BaseException:
            self.client.close()
            raise

    @property
    def by_proxy(self) -> bool:
        """A proxy that the environment names leads elsewhere, and not to a server of our own on this machine."""
        return self.own is None

    def run(self, rows: Sequence[Row], samples: Sequence[str]) -> tuple[list[list[int]], list[Drawn]]:
        with CONNECTIONS.held_for(len(rows)):
            try:
                taken = self._taken(rows)
            except BaseException as error:
                first = _first(error)
                self._give_up(first)
                raise first from (None if first is error else error)
        return taken, [Drawn.from_wire(record) for record in self.call("rollouts_collect", json.dumps(list(samples)))]

    def abandon(self) -> None:
        with self._lock:
            if self._sending is not None:
                loop, task = self._sending
                loop.call_soon_threadsafe(task.cancel)
                self._sending = None  # once: again would disturb it while it leaves

    def forget(self) -> None:
        if not _checked(self._post("/reset_prefix_cache", {}, self.timeout)).json()["success"]:
            raise RuntimeError("vLLM kept keys and values of the old weights: requests are still running; finish them")

    def fingerprint(self) -> str:
        return self.call("rollouts_fingerprint")

    def close(self) -> None:
        self.client.close()
        if self.own is not None:
            self.own.stop()

    def _give_up(self, first: BaseException) -> None:
        """No rows are left behind, whatever happened. What went wrong first is what is told first."""
        try:
            _checked(self._post("/abort_requests", {}, min(ABANDON_SECONDS, self.timeout)))
        except (RuntimeError, OSError) as second:  # EngineLost and TimeoutError among them
            first.add_note(f"and the rows of this rollout could not be given up: {second}")

    def _taken(self, rows: Sequence[Row]) -> list[list[int]]:
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return asyncio.run(self._abandonable(rows))
        # A thread runs one loop, and in a notebook that is the notebook's.
        (future,) = begin([lambda: asyncio.run(self._abandonable(rows))])
        try:
            return future.result()
        except BaseException:
            end = time.monotonic() + ABANDON_SECONDS
            while not future.done() and time.monotonic() < end:
                self.abandon()
                wait([future], AGAIN_SECONDS)
            raise

    async def _abandonable(self, rows: Sequence[Row]) -> list[list[int]]:
        task = asyncio.current_task()
        assert task is not None, "within asyncio.run"
        with self._lock:
            self._sending = asyncio.get_running_loop(), task
        try:
            return await self._send(rows)
        finally:
            with self._lock:  # as long as it is held here, the loop is not closed
                self._sending = None

    async def _send(self, rows: Sequence[Row]) -> list[list[int]]:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        async with (
            httpx.AsyncClient(
                base_url=self.url, headers=self.headers, timeout=self.timeout, limits=limits, trust_env=self.by_proxy
            ) as client,
            asyncio.TaskGroup() as group,
        ):
            tasks = [group.create_task(self._row(client, row)) for row in rows]
        return [task.result() for task in tasks]

    async def _row(self, client: httpx.AsyncClient, row: Row) -> list[int]:
        body = {
            "token_ids": list(row.prefix),
            "sampling_params": {
                # Greedy: the processor leaves one token to take.
                "temperature": 0.0, "max_tokens": row.length, "ignore_eos": True, "detokenize": False,
                "stop_token_ids": list(row.stop), "extra_args": {KEY: row.arguments},
                "skip_reading_prefix_cache": self.room.whole_prompts,
            },
        }  # fmt: skip
        try:
            answer = await client.post(GENERATE, json=body)
        except httpx.TransportError as error:
            raise self._unanswered(GENERATE, self.timeout, error) from error
        (choice,) = _checked(answer).json()["choices"]
        if choice.get("finish_reason") == "abort":
            raise RuntimeError(
                f"the vLLM server at {self.url} was told by somebody else to give up what it draws; a vLLM serves one "
                "engine at a time, so give every run, and every training process, its own"
            )
        return choice["token_ids"]

    def call(self, method: str, *arguments: str) -> Any:
        """What the first worker answers to `RolloutWorker`'s method; with tensor parallelism all of them draw alike.

        Raises:
            RuntimeError: the method failed in a server that goes on; a new server would fail in it, too.
            EngineLost: the server is gone.
        """
        answer = self._post(CALL, {"method": method, "args": list(arguments)}, self.timeout)
        if answer.is_server_error and self._is_well():
            asked = f"{method}({', '.join(arguments)[:200]})"
            raise RuntimeError(f"the vLLM server at {self.url} failed in {asked}: {_said(answer)}")
        return _checked(answer).json()["results"][0]

    def _post(self, path: str, body: dict[str, Any], seconds: float) -> httpx.Response:
        try:
            return self.client.post(path, json=body, timeout=seconds)
        except httpx.TransportError as error:
            raise self._unanswered(path, seconds, error) from error

    def _is_well(self) -> bool:
        time.sleep(DYING_SECONDS)
        try:
            return self.client.get("/health", timeout=HEALTH_SECONDS).is_success
        except httpx.TransportError:
            return False

    def _unanswered(self, path: str, seconds: float, error: httpx.TransportError) -> EngineLost | TimeoutError:
        end = "" if self.own is None else f"; the end of its log:\n{self.own.tail()}"
        if isinstance(error, httpx.ReadTimeout):  # the connection stands
            return TimeoutError(
                f"the vLLM server at {self.url} did not answer {path} within {seconds:g} s: a rollout that takes "
                f"longer needs more servers or fewer or shorter samples, unless the server hangs{end}"
            )
        return EngineLost(f"the vLLM server at {self.url} is gone ({type(error).__name__}: {error}){end}")


def _first(error: BaseException) -> BaseException:
    """What went wrong first, of the group in which asyncio hands it over."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def start_servers(plan: ServerPlan, count: int, seconds: float) -> list[ServerHost]:
    """Servers on this machine, all starting at once; one whose port was taken meanwhile is started once more. None is
    left behind where one of them fails."""
    with ExitStack() as started:

        def start() -> Server:
            server = Server(plan)
            started.callback(server.stop)
            return server

        servers = [start() for _ in range(count)]
        for at, server in enumerate(servers):
            try:
                server.wait(seconds)
            except PortTaken as error:
                log.warning("a vLLM server is started again: %s", error)
                server.stop()
                servers[at] = start()
                servers[at].wait(seconds)
        hosts = [started.enter_context(closing(ServerHost(one.url, token=one.token, own=one))) for one in servers]
        started.pop_all()
    return hosts


def _checked(answer: httpx.Response) -> httpx.Response:
    path, code = answer.url.path, answer.status_code
    if answer.is_server_error:
        raise EngineLost(f"the vLLM server failed at {path} with {code}: {_said(answer)}")
    if code == httpx.codes.UNAUTHORIZED:
        raise PermissionError(
            f"the vLLM server refused {path} with {code}: its key is not the trainer's. Each reads it from the "
            "environment variable that its own token_env names (RLMM_ROLLOUT_TOKEN unless set); set both to one value"
        )
    if answer.is_error:
        raise RuntimeError(
            f"the vLLM server refused {path} with {code}: {_said(answer)}; start it with `rlmm rollout-server`, so "
            "that it has the endpoints that a trainer needs"
        )
    return answer


def _said(answer: httpx.Response) -> str:
    """The message of vLLM's error, or what else came."""
    try:
        return answer.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return answer.text[:1000]
