"""Rewards in processes of their own: `rlmm reward serve` started for a run, in the environment that it names, and ended
with the run.
"""

import atexit
import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import httpx

from rewards.base import Reward
from rewards.remote import connect
from rlmm.config.rewards import RewardTerm
from rlmm.train.processes import world
from rollouts.vllm_engine.launch import end_group, end_with_parent, free_port

LOG_LINES = 20
"""Last lines of a server's log that an error shows."""
TOKEN = "RLMM_REWARD_TOKEN"
HOST = "127.0.0.1"


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

    def command(self) -> list[str]:
        options = [f"{key}={json.dumps(value)}" for key, value in self.term.options.items()]
        limit = str(self.settings.concurrency)
        served = self.term.function or self.term.name
        return [
            self.python, "-m", "rlmm.cli", "reward", "serve", served, *options, "--host", HOST,
            "--port", str(self.port), "--token-env", TOKEN, "--concurrency", limit,
        ]  # fmt: skip

    def environment(self) -> dict[str, str]:
        """This process's environment; another interpreter does not get its PYTHONPATH, which is about this one."""
        mine = dict(os.environ)
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


def served_reward(term: RewardTerm) -> Reward:
    """The reward of a term with `serve`, as a client of its process, which is started where none runs yet.

    Raises ValueError in a run of several processes, each of which would start one, and for a process that does not
    come up; RemoteError where it does not speak this version's protocol.
    """
    assert term.serve is not None, "called for terms that are served"
    if world()[1] > 1:
        raise ValueError(
            f"{term.key}: serve starts a reward for a run of one process, and this one has {world()[1]}; start it with "
            "`rlmm reward serve` and name it as `remote`"
        )
    key = term.model_dump_json(include={"name", "function", "options", "serve"})
    running = _RUNNING.get(key)
    if running is None or not running.alive:
        running = _RUNNING[key] = RewardProcess(term)
        try:
            running.wait()
        except BaseException:
            _RUNNING.pop(key).stop()
            raise
    return connect(
        running.url, running.token, timeout_s=term.serve.timeout_s, retries=2, backoff_s=0.5,
        concurrency=term.serve.concurrency, failures=5, cooldown_s=15.0,
    )  # fmt: skip


def stop_served() -> None:
    """End every reward's process of this run."""
    while _RUNNING:
        _RUNNING.popitem()[1].stop()


atexit.register(stop_served)
