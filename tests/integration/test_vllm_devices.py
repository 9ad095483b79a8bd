"""Rollouts over more than one vLLM, and over one vLLM on more than one device, with weights over a process group."""

import importlib.util
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from rlmm.policies.causal import CausalPolicy
from rlmm.train.recovery import Recovering
from rollouts.law import Law
from rollouts.trajectory import Span
from rollouts.vllm_engine.broadcast import GroupTransfer
from rollouts.vllm_engine.engine import VllmEngine
from rollouts.vllm_engine.host import Host
from rollouts.vllm_engine.server import ServerHost
from tests.integration.vllm_requests import (
    agrees,
    change,
    check_laws,
    check_sync,
    gap,
    make_policy,
    requests,
    sample,
    served,
)

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]
WAYS: dict[str, dict[str, Any]] = {"two servers": {"replicas": 2}, "two devices": {"tensor_parallel": 2}}


@pytest.fixture(scope="module")
def policy() -> CausalPolicy:
    return make_policy(lora=True)


@pytest.fixture(scope="module", params=list(WAYS))
def engine(request: pytest.FixtureRequest, policy: CausalPolicy) -> Iterator[Recovering]:
    with served(policy, transfer="gloo", **WAYS[request.param]) as made:
        yield made


def inner(engine: Recovering) -> VllmEngine:
    assert isinstance(engine.engine, VllmEngine) and isinstance(engine.engine.load, GroupTransfer)
    return engine.engine


def test_trainer_and_torch_engine_agree(engine: Recovering, policy: CausalPolicy) -> None:
    check_laws(engine, policy)


def test_a_sync_reaches_every_device_and_a_skipped_one_shows(engine: Recovering, policy: CausalPolicy) -> None:
    check_sync(engine, policy)


@pytest.mark.parametrize("engine", ["two servers"], indirect=True)
def test_a_sync_that_one_of_two_missed_shows(engine: Recovering, policy: CausalPolicy) -> None:
    change(policy, 3)
    first, second = inner(engine).hosts
    assert isinstance(first, ServerHost)
    GroupTransfer([first], "127.0.0.1", "gloo", policy.base.device)(policy.named_weights())
    assert not agrees(engine, policy) and first.fingerprint() != second.fingerprint()


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("engine", ["two servers"], indirect=True)
def test_an_interrupted_rollout_leaves_both_servers_free(engine: Recovering, policy: CausalPolicy) -> None:
    """As another run finds them, and this one where it goes on: what is drawn afterwards is what was drawn before."""
    engine.sync(policy.named_weights(), 8)  # the test before left one of them with others
    expected, main, hosts = sample(engine, policy, {"guidance_scale": 2.0}), threading.get_ident(), inner(engine).hosts

    def interrupt() -> None:
        end = time.monotonic() + 60
        while time.monotonic() < end:
            if not all(map(is_free, hosts)):
                signal.pthread_kill(main, signal.SIGINT)
                return
            time.sleep(0.01)

    span = Span("image", Law(policy.layout.image), policy.layout.grid.length)
    many = [replace(one, seeds=tuple(range(400)), sample_ids=("x",) * 400) for one in requests(policy)]
    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt) as told:
        engine.generate(many, [span])
    assert not getattr(told.value, "__notes__", []) and all(map(is_free, hosts))
    assert sample(engine, policy, {"guidance_scale": 2.0}).ids.equal(expected.ids)


def is_free(host: Host) -> bool:
    try:
        host.forget()
    except RuntimeError:  # rows are running
        return False
    return True


@pytest.mark.long
@pytest.mark.parametrize("engine", ["two servers"], indirect=True)
def test_one_server_killed_is_every_server_built_again(engine: Recovering, policy: CausalPolicy) -> None:
    before = inner(engine)
    change(policy, 4)
    host = before.hosts[-1]
    assert isinstance(host, ServerHost) and host.own is not None
    os.killpg(host.own.process.pid, signal.SIGKILL)
    engine.sync(policy.named_weights(), 9)
    assert inner(engine) is not before and agrees(engine, policy)
    assert gap(policy, sample(engine, policy, {"guidance_scale": 2.0})) < 1e-4
