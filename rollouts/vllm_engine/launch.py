"""Starts `vllm serve` as this engine needs it, and waits until it answers."""

import ctypes
import errno
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import torch

from rollouts.contract import EngineLost
from rollouts.ports import free_port
from rollouts.vllm_engine.faults import NOT_INSTALLED, memory_advice
from rollouts.vllm_engine.guard import KEY_VARIABLE
from rollouts.vllm_engine.host import BLOCK, MEMORY_SHARE, SURROUNDINGS
from rollouts.vllm_engine.plugin import WORKER

LOG_LINES = 20
"""Last lines of a server's log that an error shows."""
NAMED_ERROR = re.compile(r"^(?!.*\b(?:DEBUG|INFO|WARNING)\b).*?(\b[\w.]*(?:Error|Exception)(?:: .*|$))", re.MULTILINE)
"""A line of a log that names an error, behind whatever stands before it. What a process got over is no error."""
ADDRESS_IN_USE = os.strerror(errno.EADDRINUSE).lower()


@dataclass(frozen=True)
class ServerPlan:
    """How to serve a transformers model folder. Sizes as in `host.Room`; `kv_bytes` for keys and values."""

    folder: Path
    max_length: int
    dtype: str = "float32"
    max_rows: int = 256
    max_prompt_tokens: int = 8192
    kv_bytes: int = 1 << 30
    tensor_parallel: int = 1
    host: str = "127.0.0.1"
    enforce_eager: bool = True
    overrides: Mapping[str, Any] = field(default_factory=dict)
    """Laid over the checkpoint's config.json (`plugin.two_stream_overrides`)."""
    device: str | None = None
    """The only GPU that it sees (`visible_device`); None: all that this process sees."""

    def command(self, port: int) -> list[str]:
        """The command line. Flags are stock vLLM's; what they name is this package's."""
        return [
            sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(self.folder),
            "--host", self.host, "--port", str(port), "--tokens-only", "--skip-tokenizer-init",
            "--dtype", self.dtype, "--max-model-len", str(self.max_length), "--max-num-seqs", str(self.max_rows),
            "--max-num-batched-tokens", str(max(self.max_prompt_tokens, self.max_length)),
            "--kv-cache-memory-bytes", str(self.kv_bytes), "--block-size", str(BLOCK),
            "--gpu-memory-utilization", str(MEMORY_SHARE),
            "--tensor-parallel-size", str(self.tensor_parallel), *(["--enforce-eager"] if self.enforce_eager else []),
            "--no-enable-chunked-prefill", "--no-async-scheduling", "--enable-prefix-caching",
            "--disable-log-stats", "--disable-uvicorn-access-log",
            "--logits-processors", "rollouts.vllm_engine.processor:LawProcessor",
            "--scheduler-cls", "rollouts.vllm_engine.scheduler.WaveScheduler",
            "--worker-cls", WORKER,
            "--worker-extension-cls", "rollouts.vllm_engine.worker.RolloutWorker",
            "--hf-overrides", json.dumps(dict(self.overrides)),
            "--middleware", "rollouts.vllm_engine.guard.KeyMiddleware",
        ]  # fmt: skip


class PortTaken(EngineLost):
    """The server's port was free when it was chosen and is another process's now."""


ENVIRONMENT = SURROUNDINGS | {
    "VLLM_SERVER_DEV_MODE": "1",  # the endpoints that a trainer needs: weights, caches, calls to the workers
}


class Server:
    """A vLLM server of our own, in a process group of its own. `scratch` holds its log and what is handed to it."""

    def __init__(self, plan: ServerPlan) -> None:
        self.plan, self.token, self.port = plan, secrets.token_hex(16), free_port()
        self._scratch = tempfile.TemporaryDirectory(prefix="rlmm-vllm-")
        self.scratch = Path(self._scratch.name)
        self.log = self.scratch / "log.txt"
        with self.log.open("wb") as out:
            self.process = subprocess.Popen(
                plan.command(self.port), env=surroundings(self.token, plan.device), stdout=out,
                stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=end_with_parent,
            )  # fmt: skip

    @property
    def url(self) -> str:
        return f"http://{self.plan.host}:{self.port}"

    def wait(self, seconds: float) -> None:
        """Until it answers. Raises EngineLost, with the end of its log, where it dies or takes longer: PortTaken where
        its log tells of that, and what to set where it tells of memory."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise self._ended()
            with suppress(httpx.TransportError):
                if httpx.get(f"{self.url}/health", timeout=5, trust_env=False).status_code == httpx.codes.OK:
                    return
            time.sleep(0.2)
        raise EngineLost(
            f"the vLLM server did not answer within {seconds:.0f} s; raise engine.start_seconds if its log looks well:"
            f"\n{self.tail()}"
        )

    def _ended(self) -> EngineLost:
        said = self.log.read_text(errors="replace")
        advice = memory_advice(said, self.plan.max_length)
        kind = PortTaken if ADDRESS_IN_USE in said.lower() else EngineLost
        ended = f"the vLLM server ended with status {self.process.returncode}"
        return kind(f"{ended}{f' ({advice})' if advice else ''}:\n{self.tail()}")

    def tail(self) -> str:
        """The last lines of its log; before them the first that names an error."""
        return log_end(self.log.read_text(errors="replace"))

    def stop(self, seconds: float = 10) -> None:
        """End every process it started and forget its files. May be called again."""
        end_group(self.process, seconds)
        self._scratch.cleanup()


def log_end(said: str) -> str:
    """The last lines of a log. Before them, unless they say it, the first error: vLLM's processes end one by one, and
    the last one's log says no more than that another failed."""
    last, first = said.splitlines()[-LOG_LINES:], NAMED_ERROR.search(said)
    if first is None or any(first[1] in line for line in last):
        return "\n".join(last)
    return "\n".join([first[0], "...", *last])


def visible_device(device: torch.device) -> str | None:
    """A training process's GPU as CUDA_VISIBLE_DEVICES names it, for the server that samples beside it; None elsewhere.
    Left alone, the servers of all processes would start on the first."""
    if device.type != "cuda":
        return None
    index = torch.cuda.current_device() if device.index is None else device.index
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",")[index].strip() if named else str(index)


def surroundings(token: str, device: str | None = None) -> dict[str, str]:
    """The environment of a server: this package on its path, whatever folder it is started in."""
    paths = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    seen = {} if device is None else {"CUDA_VISIBLE_DEVICES": device}
    return os.environ | ENVIRONMENT | seen | {KEY_VARIABLE: token, "PYTHONPATH": os.pathsep.join(paths)}


def serve(plan: ServerPlan, port: int, token: str) -> None:
    """Become a server; does not return. Raises ImportError where there is no vLLM."""
    if find_spec("vllm") is None:
        raise ImportError(NOT_INSTALLED)
    command = plan.command(port)
    os.execve(command[0], command, surroundings(token))


def end_group(process: "subprocess.Popen[bytes]", seconds: float) -> None:
    """End a process that leads a group, and all of the group; by force after so many seconds."""
    for signum in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signum)
        with suppress(subprocess.TimeoutExpired):
            process.wait(seconds)


def end_with_parent() -> None:
    """On Linux the kernel ends the server when the process that started it is gone, however it went."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
