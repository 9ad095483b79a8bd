"""Rewards in processes of their own: `rlmm reward serve` started for a run, in the environment that it names, and ended
with the run. Of a run's training processes one a machine starts them, and tells the others where they listen.
"""

import atexit
import json
import os
import re
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import httpx

from rewards.base import Reward
from rewards.remote import connect
from rlmm.config.rewards import Rewards, RewardTerm
from rlmm.train.processes import everywhere, gather, world
from rollouts.ports import free_port
from rollouts.vllm_engine.launch import end_group, end_with_parent

LOG_LINES = 20
"""Last lines of a server's log that an error shows."""
TOKEN = "RLMM_REWARD_TOKEN"
HOST = "127.0.0.1"
LAUNCHED = re.compile(
    r"((LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)|(TORCHELASTIC|ACCELERATE)_.*)"
)
"""Environment variables by which a launcher tells a process what it is among others; a reward's is not one of them."""


class Address(NamedTuple):
    """Where a reward's process listens, on the loopback of its machine."""

    url: str
    token: str


class RewardProcess:
    """A reward's server on the loopback, in a process group of its own. Nobody else has its token."""

    def __init__(self, term: RewardTerm) -> None:
        assert term.serve is not None, "called for terms that are served"
        self.term, self.settings = term, term.serve
        self.token, self.port = secrets.token_hex(16), free_port()
        self._scratch = tempfile.TemporaryDirectory(prefix="rlmm-reward-")
        self.log = Path(self._scratch.name) / "log.txt"
        with self.log.open("wb") as out:
            try:
                self.process = subprocess.Popen(
                    self.command(), env=self.environment(), stdout=out, stderr=subprocess.STDOUT,
                    start_new_session=True, preexec_fn=end_with_parent,
                )  # fmt: skip
            except OSError as error:
                raise ValueError(f"{term.key} cannot be served by serve.python {self.python}: {error}") from error

    @property
    def python(self) -> str:
        return self.settings.python or sys.executable

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    @property
    def address(self) -> Address:
        return Address(self.url, self.token)

    def command(self) -> list[str]:
        options = [f"{key}={json.dumps(value)}" for key, value in self.term.options.items()]
        limit = str(self.settings.concurrency)
        served = self.term.function or self.term.name
        return [
            self.python, "-m", "rlmm.cli", "reward", "serve", served, *options, "--host", HOST,
            "--port", str(self.port), "--token-env", TOKEN, "--concurrency", limit,
        ]  # fmt: skip

    def environment(self) -> dict[str, str]:
        """This process's environment, without its place among those of a run; another interpreter does not get its
        PYTHONPATH, which is about this one."""
        mine = {name: value for name, value in os.environ.items() if not LAUNCHED.fullmatch(name)}
        given = mine.pop("PYTHONPATH", None)
        paths = [str(Path(__file__).parents[1]), *([given] if given else [])]
        own = {} if self.settings.python else {"PYTHONPATH": os.pathsep.join(paths)}
        return mine | own | self.settings.environment | {TOKEN: self.token}

    def wait(self) -> None:
        """Until it answers. Raises ValueError, with the end of its log, where it dies or takes longer."""
        end = time.monotonic() + self.settings.start_seconds
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise ValueError(f"{self._name} ended with status {self.process.returncode}:\n{self.tail()}")
            with suppress(httpx.TransportError):
                if httpx.get(f"{self.url}/health", timeout=5).status_code == httpx.codes.OK:
                    return
            time.sleep(0.1)
        raise ValueError(
            f"{self._name} did not answer within {self.settings.start_seconds:g} s; raise serve.start_seconds if its "
            f"log looks well:\n{self.tail()}"
        )

    @property
    def _name(self) -> str:
        return f"the process that serves the reward {self.term.key!r} ({self.python})"

    def tail(self) -> str:
        """The last lines of its log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-LOG_LINES:])

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def stop(self) -> None:
        """End it and forget its files. May be called again."""
        end_group(self.process, seconds=5)
        self._scratch.cleanup()


_RUNNING: dict[str, RewardProcess] = {}
"""By what is served and how: all parts of a run that build the same term share a process."""
_SHARED: dict[str, Address] = {}
"""Those that another training process of this machine has started, by the same."""


def share_served(every: Iterable[Rewards]) -> None:
    """Start what of these rewards is served, in a run of several processes: one of each machine's starts it, and the
    others are told where it listens. Every process must come here, with the same rewards.

    Raises ValueError, or in the other processes OtherProcessError, for a process that does not come up.
    """
    rank, size = world()
    terms = {_key(term): term for rewards in every for term in rewards.terms if term.serve is not None}
    if size == 1 or not terms:
        return  # who builds it first starts it
    machines = gather(_machine())
    starts = machines.index(machines[rank]) == rank
    mine = everywhere(lambda: {key: _started(key, term).address for key, term in terms.items()} if starts else {})
    told = gather({key: list(address) for key, address in mine.items()})
    for machine, found in zip(machines, told, strict=True):
        if machine == machines[rank]:
            _SHARED.update({key: Address(*address) for key, address in found.items()})


def served_reward(term: RewardTerm) -> Reward:
    """The reward of a term with `serve`, as a client of its process. Where none runs yet it is started, by a run's only
    process, or by its first one, which does some work alone; the others need `share_served` before.

    Raises ValueError for a process that does not come up; RemoteError where it does not speak this version's protocol.
    """
    assert term.serve is not None, "called for terms that are served"
    key = _key(term)
    if world()[0] and key not in _RUNNING:
        assert key in _SHARED, f"{term.key} was not started for all processes"
        address = _SHARED[key]
    else:
        address = _started(key, term).address
    return connect(
        *address, timeout_s=term.serve.timeout_s, retries=2, backoff_s=0.5, concurrency=term.serve.concurrency,
        failures=5, cooldown_s=15.0,
    )  # fmt: skip


def _key(term: RewardTerm) -> str:
    return term.model_dump_json(include={"name", "function", "options", "serve"})


def _started(key: str, term: RewardTerm) -> RewardProcess:
    running = _RUNNING.get(key)
    if running is None or not running.alive:
        running = _RUNNING[key] = RewardProcess(term)
        try:
            running.wait()
        except BaseException:
            _RUNNING.pop(key).stop()
            raise
    return running


def _machine() -> str:
    """What the processes have in common that reach one another by the loopback."""
    found = [socket.gethostname()]
    with suppress(OSError):  # Linux has both
        found += [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/net")]
    return " ".join(found)


def stop_served() -> None:
    """End every reward's process that this one has started, and forget the others."""
    _SHARED.clear()
    while _RUNNING:
        _RUNNING.popitem()[1].stop()


atexit.register(stop_served)
