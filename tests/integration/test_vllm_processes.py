"""Two training processes, each with a rollout server of its own that was started by hand, take one process's steps."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from rollouts.ports import free_port

ROOT = Path(__file__).parents[2]
RECIPE = str(ROOT / "tests" / "recipes" / "tiny.yaml")
TOKEN = "a key for this test"
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RLMM_ROLLOUT_TOKEN": TOKEN}
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]


def run(*command: str) -> None:
    answer = subprocess.run(
        [sys.executable, "-m", *command, "policy.hidden_size=64"], cwd=ROOT, env=ENVIRONMENT, capture_output=True,
        text=True, timeout=600,
    )  # fmt: skip
    assert answer.returncode == 0, (answer.stdout + answer.stderr)[-6000:]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process and the torch engine."""
    folder = tmp_path_factory.mktemp("alone")
    run("rlmm.cli", "run", RECIPE, f"run_dir={folder}")
    return folder


@pytest.fixture(scope="module")
def urls(alone: Path) -> Iterator[list[str]]:
    """Two servers of the policy that GRPO starts from, by the command that the docs give."""
    command = [sys.executable, "-m", "rlmm.cli", "rollout-server", str(alone / "stages" / "02-sft" / "model")]
    ports = [free_port(), free_port()]
    with ExitStack() as stack:
        for port in ports:
            server = subprocess.Popen(
                [*command, "--port", str(port), "kv_megabytes=32", "max_rows=16"], cwd=ROOT, env=ENVIRONMENT
            )
            stack.callback(server.wait, 300)
            stack.callback(server.terminate)
        made = [f"http://127.0.0.1:{port}" for port in ports]
        for url in made:
            wait_for(url)
        yield made


def wait_for(url: str, seconds: float = 600) -> None:
    end = time.monotonic() + seconds
    while True:
        try:
            if httpx.get(f"{url}/health", timeout=5).status_code == httpx.codes.OK:
                return
        except httpx.TransportError:
            pass
        assert time.monotonic() < end, f"{url} does not answer"
        time.sleep(1)


def test_two_processes_with_a_server_each_take_the_steps_of_one(alone: Path, urls: list[str], tmp_path: Path) -> None:
    both = tmp_path / "both"
    for stage in ("01-codec", "02-sft"):
        shutil.copytree(alone / "stages" / stage, both / "stages" / stage)
    engine = f"stages.grpo.engine={{kind: vllm_server, urls: [{', '.join(urls)}], exchange: {tmp_path}}}"
    launcher = ("torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "rlmm.cli")
    run(*launcher, "run", RECIPE, f"run_dir={both}", engine)
    one, two = (
        [json.loads(line) for line in (folder / "stages" / "03-grpo" / "metrics.jsonl").read_text().splitlines()]
        for folder in (alone, both)
    )
    assert len(one) == len(two) == 6
    for wanted, found in zip(one, two, strict=True):
        same = {name: value for name, value in wanted.items() if not name.startswith(("time/", "mismatch/"))}
        assert {name: found[name] for name in same} == pytest.approx(same, rel=1e-4, abs=1e-5)
        assert found.get("mismatch/max", 0.0) < 1e-4  # of a rollout's first update alone
