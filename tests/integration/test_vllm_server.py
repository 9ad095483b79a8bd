"""A real vLLM server behind the Engine contract: the same law and tokens, its weights, its key, and its death."""

import importlib.util
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path

import httpx
import pytest
import torch

from rlmm.config.engines import VllmServerConfig
from rlmm.policies.causal import CausalPolicy
from rlmm.train.engines import build_engine
from rlmm.train.recovery import Recovering
from rollouts.contract import EngineLost
from rollouts.vllm_engine.engine import VllmEngine
from rollouts.vllm_engine.launch import Server
from rollouts.vllm_engine.server import ServerHost
from rollouts.vllm_engine.transfer import FolderTransfer, write_shards
from tests.integration.vllm_requests import (
    agrees,
    change,
    check_laws,
    check_sync,
    check_writing,
    gap,
    make_policy,
    sample,
    writing,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]


@pytest.fixture(scope="module")
def policy() -> CausalPolicy:
    return make_policy(lora=True)


@pytest.fixture(
    scope="module",
    params=["eager", *(pytest.param(name, marks=pytest.mark.long) for name in ("compiled", "saved once"))],
)
def engine(
    request: pytest.FixtureRequest, policy: CausalPolicy, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Recovering]:
    change(policy, 1)
    config = VllmServerConfig(
        max_rows=7, max_prompt_tokens=300, kv_megabytes=32, exchange=str(tmp_path_factory.mktemp("exchange")),
        enforce_eager=request.param != "compiled",
    )  # fmt: skip
    made = build_engine(config, policy, parting=request.param == "saved once")
    assert isinstance(made, Recovering)
    yield made
    made.close()


def host_of(engine: Recovering) -> ServerHost:
    assert isinstance(engine.engine, VllmEngine)
    (host,) = engine.engine.hosts
    assert isinstance(host, ServerHost)
    return host


def server_of(engine: Recovering) -> Server:
    own = host_of(engine).own
    assert own is not None
    return own


@pytest.mark.skipif(
    torch.cuda.is_available() or not Path("/proc").is_dir() or not shutil.which("g++"),
    reason="a GPU, no /proc or no compiler",
)
def test_the_server_has_the_compiled_kernels(engine: Recovering) -> None:
    group, maps = server_of(engine).process.pid, ""
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it ended meanwhile
            maps += (folder / "maps").read_text() if os.getpgid(int(folder.name)) == group else ""
    assert "/rlmm/kernels-" in maps


def test_trainer_and_torch_engine_agree(engine: Recovering, policy: CausalPolicy) -> None:
    check_laws(engine, policy)


def test_a_text_and_its_image_are_the_torch_engines(engine: Recovering, policy: CausalPolicy) -> None:
    check_writing(writing(engine, policy))


def test_a_sync_reaches_the_weights_that_run_and_a_skipped_one_shows(engine: Recovering, policy: CausalPolicy) -> None:
    check_sync(engine, policy)
    assert isinstance(engine.engine, VllmEngine) and isinstance(engine.engine.load, FolderTransfer)
    assert not list(engine.engine.load.folder.iterdir())


def test_no_path_but_health_answers_without_the_key(engine: Recovering) -> None:
    url = server_of(engine).url
    assert httpx.get(f"{url}/health").status_code == httpx.codes.OK
    for path in ("/collective_rpc", "/reset_prefix_cache", "/inference/v1/generate"):
        assert httpx.post(url + path, json={}).status_code == httpx.codes.UNAUTHORIZED
        wrong = httpx.post(url + path, json={}, headers={"Authorization": "Bearer wrong"})
        assert wrong.status_code == httpx.codes.UNAUTHORIZED


def test_weights_that_the_server_cannot_read_are_its_workers_fault_and_it_goes_on(engine: Recovering) -> None:
    host, before = host_of(engine), engine.fingerprint()
    with pytest.raises(RuntimeError, match=r"failed in rollouts_load\(/nowhere, 2, \):.*can read 0; set"):
        host.call("rollouts_load", "/nowhere", "2", "")
    assert host_of(engine) is host and engine.fingerprint() == before
    with pytest.raises(PermissionError, match="token_env"):
        ServerHost(host.url, token="another")


def test_a_sync_that_broke_off_is_made_good_by_the_next(
    engine: Recovering, policy: CausalPolicy, tmp_path: Path
) -> None:
    weights = policy.named_weights()
    write_shards(islice(weights, 3), tmp_path)  # in the middle of matrices that vLLM joins into one
    (tmp_path / "00001.safetensors").write_bytes(b"cut short")
    with pytest.raises(RuntimeError, match=r"failed in rollouts_load\(.*, 2, \): .*(?i:header|deserializ)"):
        host_of(engine).call("rollouts_load", str(tmp_path), "2", "")
    engine.sync(policy.named_weights(), 7)
    assert agrees(engine, policy) and gap(policy, sample(engine, policy, {})) < 1e-4


def test_an_interrupted_rollout_leaves_no_rows_behind(engine: Recovering, policy: CausalPolicy) -> None:
    host, sent = host_of(engine), ServerHost._send

    async def interrupted(self: ServerHost, rows: object) -> list[list[int]]:
        raise KeyboardInterrupt

    ServerHost._send = interrupted  # pyrefly: ignore
    try:
        with pytest.raises(KeyboardInterrupt):
            sample(engine, policy, {})
    finally:
        ServerHost._send = sent
    assert host.own is not None
    assert gap(policy, sample(engine, policy, {"guidance_scale": 2.0})) < 1e-4


@pytest.mark.long
def test_a_server_killed_during_a_rollout_is_started_once_more_and_nothing_changes(
    engine: Recovering, policy: CausalPolicy, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    if request.node.callspec.params["engine"] == "saved once":  # as weights in parts cannot be
        monkeypatch.setattr(policy, "save", None)
    wanted, first = sample(engine, policy, {"guidance_scale": 2.0}), server_of(engine)
    change(policy, 3)
    change(policy, -3)  # the trainer's weights move on; the server that comes back must have these
    engine.sync(policy.named_weights(), 8)
    expected = sample(engine, policy, {"guidance_scale": 2.0})
    killer = threading.Thread(target=lambda: (time.sleep(0.05), os.killpg(first.process.pid, signal.SIGKILL)))
    killer.start()
    made = [sample(engine, policy, {"guidance_scale": 2.0}) for _ in range(8)]
    killer.join()
    assert server_of(engine) is not first and not first.scratch.exists()
    assert all(one.ids.equal(expected.ids) and one.weights_version == 8 for one in made)
    assert not expected.ids.equal(wanted.ids) and gap(policy, made[-1]) < 1e-4
    os.killpg(server_of(engine).process.pid, signal.SIGKILL)
    with pytest.raises(EngineLost, match="lost twice with the same weights"):
        sample(engine, policy, {})


def test_no_server_outlives_the_engine(engine: Recovering) -> None:
    group = server_of(engine).process.pid
    engine.close()
    end = time.monotonic() + 10
    while alive(group) and time.monotonic() < end:
        time.sleep(0.1)
    assert not alive(group)


def alive(group: int) -> list[str]:
    """Processes of a group, without those that are dead and wait to be reaped."""
    every = subprocess.run(["ps", "-eo", "pgid=,stat=,args="], capture_output=True, text=True, check=True)
    rows = [line.split(maxsplit=2) for line in every.stdout.splitlines()]
    return [args[0] for pgid, stat, *args in rows if int(pgid) == group and not stat.startswith("Z")]
