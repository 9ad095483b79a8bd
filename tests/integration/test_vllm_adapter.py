"""A real vLLM server that is sent a LoRA adapter alone: laws, what travels, what is skipped, and a server that comes
back without the base."""

import importlib.util
import os
import signal
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from rlmm.policies.causal import CausalPolicy
from rlmm.train.recovery import Recovering
from rlmm.train.sync import synced
from rollouts.vllm_engine.engine import VllmEngine
from rollouts.vllm_engine.server import ServerHost
from rollouts.vllm_engine.transfer import AdapterTransfer
from tests.integration.vllm_requests import change, check_laws, make_policy, sample, served

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]

WAYS: dict[str, dict[str, Any]] = {
    "folder": {},
    "two devices": {"transfer": "gloo", "tensor_parallel": 2},
    "bfloat16": {"dtype": "bfloat16"},
}


@pytest.fixture(scope="module")
def policy() -> CausalPolicy:
    return make_policy(lora=True)


@pytest.fixture(scope="module", params=list(WAYS))
def engine(request: pytest.FixtureRequest, policy: CausalPolicy) -> Iterator[Recovering]:
    with served(policy, sync="adapter", **WAYS[request.param]) as made:
        yield made


def inner(engine: Recovering) -> tuple[AdapterTransfer, ServerHost]:
    assert isinstance(engine.engine, VllmEngine) and isinstance(engine.engine.load, AdapterTransfer)
    (host,) = engine.engine.hosts
    assert isinstance(host, ServerHost)
    return engine.engine.load, host


def sent(engine: Recovering, policy: CausalPolicy, version: int, patch: pytest.MonkeyPatch) -> list[str]:
    """The names that a sync sends; the last way's, where a server is started again in between."""
    names: list[str] = []
    kind = type(inner(engine)[0].way)
    send = kind.__call__

    def counted(self: Any, weights: Iterable[tuple[str, Tensor]], key: str = "") -> None:
        def through() -> Iterator[tuple[str, Tensor]]:
            names.clear()
            for name, tensor in weights:
                names.append(name)
                yield name, tensor

        send(self, through(), key)

    with patch.context() as counting:
        counting.setattr(kind, "__call__", counted)
        synced(policy, engine, version)
    return names


def test_the_base_is_sent_once_and_a_skipped_adapter_shows(
    engine: Recovering, policy: CausalPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    every = [name for name, _ in policy.weights_apart()]
    assert sent(engine, policy, 1, monkeypatch) == every
    change(policy, 2)
    with pytest.raises(RuntimeError, match="are not the trainer's"):
        monkeypatch.setattr(engine, "sync", lambda weights, version: None)
        synced(policy, engine, 2)
    monkeypatch.undo()
    alone = sent(engine, policy, 2, monkeypatch)
    assert 0 < len(alone) < len(every) and all(".lora_" in name for name in alone)


def test_trainer_and_torch_engine_agree(engine: Recovering, policy: CausalPolicy) -> None:
    synced(policy, engine, 3)
    if engine.dtype == torch.float32:
        check_laws(engine, policy)


def test_a_server_that_was_started_again_is_sent_the_base_again(
    engine: Recovering, policy: CausalPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = sample(engine, policy, {})
    _, host = inner(engine)
    assert host.own is not None
    os.killpg(host.own.process.pid, signal.SIGKILL)
    assert sample(engine, policy, {}).ids.equal(expected.ids)
    change(policy, 4)
    assert all(".lora_" in name for name in sent(engine, policy, 4, monkeypatch))
    _, host = inner(engine)
    assert host.own is not None
    os.killpg(host.own.process.pid, signal.SIGKILL)
    change(policy, 5)
    assert not all(".lora_" in name for name in sent(engine, policy, 5, monkeypatch))
