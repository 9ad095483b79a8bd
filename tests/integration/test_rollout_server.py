"""A server as `rlmm rollout-server` plans it takes guided and unguided samples alike, in pairs or by both streams."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlmm.config.engines import VllmServerConfig
from rlmm.policies.causal import CausalPolicy
from rlmm.rollout_server import server_config, server_plan
from rlmm.train.engines import build_engine
from rlmm.train.recovery import Recovering
from rollouts.vllm_engine.engine import VllmEngine
from rollouts.vllm_engine.launch import Server
from tests.integration.vllm_requests import check_laws, check_sync, make_policy

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]


@pytest.fixture(scope="module")
def policy() -> CausalPolicy:
    return make_policy(lora=False, null_token=True)


@pytest.fixture(scope="module", params=[1, 2])
def engine(
    request: pytest.FixtureRequest, policy: CausalPolicy, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Recovering]:
    """`request.param`: the streams that a request of the server carries."""
    folder: Path = tmp_path_factory.mktemp("model")
    policy.save(folder)
    both = ["two_streams=true"] if request.param == 2 else []
    server = Server(server_plan(folder, "127.0.0.1", server_config(["kv_megabytes=32", "max_rows=8", *both])))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLMM_ROLLOUT_TOKEN", server.token)
        try:
            server.wait(300)
            made = build_engine(VllmServerConfig(urls=(server.url,)), policy)
            assert isinstance(made, Recovering) and isinstance(made.engine, VllmEngine)
            assert made.engine.hosts[0].room.streams == request.param
            yield made
            made.close()
        finally:
            server.stop()


def test_trainer_and_torch_engine_agree(engine: Recovering, policy: CausalPolicy) -> None:
    check_laws(engine, policy)


def test_a_sync_reaches_the_weights_that_run_and_a_skipped_one_shows(engine: Recovering, policy: CausalPolicy) -> None:
    check_sync(engine, policy)
