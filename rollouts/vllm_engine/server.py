"""A vLLM server as a host: rows over its token endpoint, all else through its calls to the worker."""

import asyncio
import json
import logging
import time
from collections.abc import Sequence
from typing import Any

import httpx

from rollouts.contract import EngineLost
from rollouts.vllm_engine.connections import CONNECTIONS
from rollouts.vllm_engine.drawn import KEY, Drawn
from rollouts.vllm_engine.host import Room, Row
from rollouts.vllm_engine.launch import PortTaken, Server, ServerPlan

log = logging.getLogger(__name__)

GENERATE = "/inference/v1/generate"
CALL = "/collective_rpc"
HEALTH_SECONDS = 10
"""How long a server may take to say that it is well."""
DYING_SECONDS = 1
"""How long a server may still say so when one of its processes has died."""
ABORT_SECONDS = 60
"""How long it may take to give up rows."""


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
        self.client = httpx.Client(base_url=self.url, headers=self.headers, timeout=timeout)
        self.room = Room(**self.call("rollouts_room"))

    def run(self, rows: Sequence[Row], samples: Sequence[str]) -> tuple[list[list[int]], list[Drawn]]:
        with CONNECTIONS.held_for(len(rows)):
            try:
                taken = asyncio.run(self._send(rows))
            except BaseException as error:
                first = _first(error)
                self._give_up(first)
                raise first from (None if first is error else error)
        return taken, [Drawn.from_wire(record) for record in self.call("rollouts_collect", json.dumps(list(samples)))]

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
            _checked(self._post("/abort_requests", {}, min(ABORT_SECONDS, self.timeout)))
        except (RuntimeError, OSError) as second:  # EngineLost and TimeoutError among them
            first.add_note(f"and the rows of this rollout could not be given up: {second}")

    async def _send(self, rows: Sequence[Row]) -> list[list[int]]:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        async with (
            httpx.AsyncClient(base_url=self.url, headers=self.headers, timeout=self.timeout, limits=limits) as client,
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
        return _checked(answer).json()["choices"][0]["token_ids"]

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
    servers: list[Server] = []
    try:
        for _ in range(count):
            servers.append(Server(plan))
        for at, server in enumerate(servers):
            try:
                server.wait(seconds)
            except PortTaken as error:
                log.warning("a vLLM server is started again: %s", error)
                server.stop()
                servers[at] = Server(plan)
                servers[at].wait(seconds)
        return [ServerHost(one.url, token=one.token, own=one) for one in servers]
    except BaseException:
        for server in servers:
            server.stop()
        raise


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
