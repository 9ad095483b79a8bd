"""Settings of vLLM servers: each where it is read, and what cannot work refused before anything starts."""

from pathlib import Path
from typing import Any, cast

import pytest

from rlmm.config.engines import RolloutServerConfig, TorchEngineConfig, VllmEngineConfig, VllmServerConfig
from rlmm.config.policy import NewPolicy
from rlmm.policies.causal import CausalPolicy
from rlmm.policies.families.llama import build
from rlmm.rollout_server import serve_rollouts, server_config, server_plan
from rlmm.train.engines import _served, build_engine, check_gpus, within
from rollouts.contract import EngineLost, Grid, Layout
from rollouts.vllm_engine.plugin import TWO_STREAMS

LAYOUT = Layout(vocab_size=9, text=(0, 4), image=(4, 9), bos=0, pad=1, boi=(2,), grid=Grid(1, 2))


def test_settings_of_a_server_are_checked_before_it_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    assert server_config(["kv_megabytes=64", "max_rows=8"]).kv_megabytes == 64
    with pytest.raises(ValueError, match="no setting; write key=value"):
        server_config(["kv_megabytes"])
    with pytest.raises(ValueError, match="unknown key 'kv_megabyte'"):
        server_config(["kv_megabyte=64"])
    monkeypatch.delenv("RLMM_ROLLOUT_TOKEN", raising=False)
    with pytest.raises(ValueError, match="RLMM_ROLLOUT_TOKEN is not set"):
        serve_rollouts(Path("nowhere"), "127.0.0.1", 8000, [])
    monkeypatch.setenv("OTHER", "x")
    with pytest.raises(ValueError, match="the environment variable ANOTHER is not set"):
        serve_rollouts(Path("nowhere"), "127.0.0.1", 8000, ["token_env=ANOTHER"])


def test_a_server_takes_what_it_reads_and_says_where_the_rest_belongs() -> None:
    theirs = ("exchange=x", "kind=vllm_server", "replicas=2", "start_seconds=5", "sync=adapter", "trainer_host=a",
              "transfer=nccl", "urls=[http://a:1]")  # fmt: skip
    for setting in theirs:
        name = setting.partition("=")[0]
        with pytest.raises(ValueError, match=rf"{name}: of the training run.*engine\.{name} in the recipe"):
            server_config([setting])
    assert {name for name, _, _ in (setting.partition("=") for setting in theirs)} == (
        VllmServerConfig.model_fields.keys() - RolloutServerConfig.model_fields.keys()
    )


def test_every_setting_of_a_server_changes_what_is_served(tmp_path: Path) -> None:
    """But the name of the variable that holds its key."""
    plan = _saved(tmp_path, null="token")
    plain = server_plan(plan, "127.0.0.1", RolloutServerConfig()).command(81)
    values: dict[str, Any] = {
        "max_rows": 8, "max_prompt_tokens": 9000, "kv_megabytes": 64, "dtype": "bfloat16", "enforce_eager": False,
        "two_streams": True, "tensor_parallel": 2, "max_length": 64,
    }  # fmt: skip
    assert {*values, "token_env"} == set(RolloutServerConfig.model_fields)
    for name, value in values.items():
        assert server_plan(plan, "127.0.0.1", RolloutServerConfig(**{name: value})).command(81) != plain, name


def test_a_vllm_has_the_checkpoints_positions_or_as_many_as_it_is_told(tmp_path: Path) -> None:
    policy = build(NewPolicy(max_positions=300), num_codes=4, grid=(1, 3), seed=0)
    policy.save(tmp_path)
    for told, found in ((None, 300), (300, 300), (64, 64)):
        served = server_plan(tmp_path, "127.0.0.1", RolloutServerConfig(max_length=told))
        assert served.max_length == _served(VllmEngineConfig(max_length=told), policy, None)["max_length"] == found
        assert within(VllmEngineConfig(max_length=told), policy.spelling).positions == found
    assert within(TorchEngineConfig(), policy.spelling).positions == 300
    too_many = r"max_length 301 .* more than the checkpoint's 300 positions; lower it"
    with pytest.raises(ValueError, match=too_many):
        server_plan(tmp_path, "127.0.0.1", RolloutServerConfig(max_length=301))
    with pytest.raises(ValueError, match=too_many):
        _served(VllmEngineConfig(max_length=301), policy, None)


def _saved(folder: Path, null: Any) -> Path:
    config = NewPolicy(hidden_size=64, num_layers=1, num_heads=2, intermediate_size=96, null=null)
    build(config, num_codes=4, grid=(1, 3), seed=0).save(folder)
    return folder


def test_a_server_draws_in_pairs_unless_told_that_every_sample_is_guided(tmp_path: Path) -> None:
    folder = _saved(tmp_path / "token", "token")
    assert "architectures" not in server_plan(folder, "127.0.0.1", server_config([])).overrides
    both = server_plan(folder, "127.0.0.1", server_config(["two_streams=true"]))
    assert both.overrides["architectures"] == [TWO_STREAMS]
    with pytest.raises(ValueError, match=r"no Llama whose layout has a null token.*leave out two_streams"):
        server_plan(_saved(tmp_path / "prompt", "prompt"), "127.0.0.1", server_config(["two_streams=true"]))


SERVERS_OWN: dict[str, Any] = {
    "dtype": "bfloat16", "enforce_eager": False, "max_rows": 8, "max_prompt_tokens": 9, "kv_megabytes": 64,
    "tensor_parallel": 2, "two_streams": False, "max_length": 64,
}  # fmt: skip


@pytest.mark.parametrize(
    ("given", "says"),
    [
        *((one, r"settings of a server that is started \(`rlmm rollout-server") for one in SERVERS_OWN.items()),
        (("replicas", 2), "of servers that are started here"),
        (("start_seconds", 5.0), "of servers that are started here"),
    ],
)
def test_urls_and_servers_of_ones_own_exclude_each_other(given: tuple[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=rf"{given[0]}: {says}.*"):
        VllmServerConfig.model_validate({"urls": ["http://a:1"], given[0]: given[1]})
    VllmServerConfig.model_validate(dict([given]))


def test_a_resolved_section_is_read_again() -> None:
    resolved = VllmServerConfig(urls=("http://a:1",), exchange="x").model_dump()
    assert VllmServerConfig.model_validate(resolved).urls == ("http://a:1",)


def test_what_nothing_would_read_is_refused() -> None:
    with pytest.raises(ValueError, match=r"trainer_host is for a process group.*set engine\.transfer to nccl or gloo"):
        VllmServerConfig(trainer_host="10.0.0.1")
    with pytest.raises(ValueError, match="token_env names the key of servers that urls name"):
        VllmServerConfig(token_env="MINE")
    VllmServerConfig(urls=("http://localhost:1",), token_env="MINE", transfer="gloo", trainer_host="10.0.0.1")


def test_a_server_is_named_once() -> None:
    with pytest.raises(ValueError, match="urls names http://localhost:1 2 times.*name it once"):
        VllmServerConfig(urls=("http://localhost:1", "http://localhost:2", "http://localhost:1/"))


@pytest.mark.parametrize("asked", [{"replicas": 2}, {"tensor_parallel": 2}])
def test_a_run_starts_no_servers_that_would_share_a_gpu(asked: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    config = VllmServerConfig.model_validate(asked)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    check_gpus(config)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    check_gpus(VllmServerConfig())
    policy = cast(CausalPolicy, type("P", (), {"layout": LAYOUT})())
    with pytest.raises(ValueError, match=r"(replicas|tensor_parallel): 2: a run starts its server.*in engine\.urls"):
        build_engine(config, policy)


@pytest.mark.parametrize("transfer", ["gloo", "nccl"])
@pytest.mark.parametrize("far", ["http://a:1", "http://10.0.0.5:8001", "https://[fd00::5]:8001"])
def test_servers_elsewhere_cannot_reach_a_trainer_that_names_itself_by_a_loopback(transfer: Any, far: str) -> None:
    near = ("http://127.0.0.1:1", "http://127.1.2.3:1", "http://LocalHost:2", "http://[::1]:3", "http://a.localhost:4")
    for host in ("127.0.0.1", "localhost", "LOCALHOST", "localhost.localdomain", "::1", "::ffff:127.0.0.1", "0.0.0.0"):
        with pytest.raises(ValueError, match="set engine.trainer_host to this machine's address as http"):
            VllmServerConfig(urls=(near[0], far), transfer=transfer, trainer_host=host)
    VllmServerConfig(urls=(near[0], far), transfer=transfer, trainer_host="10.0.0.1")
    VllmServerConfig(urls=near, transfer=transfer)
    VllmServerConfig(transfer=transfer)


@pytest.mark.parametrize("far", ["http://a:1", "http://10.0.0.5:8001", "https://[fd00::5]:8001"])
def test_servers_elsewhere_do_not_find_a_temporary_folder_of_this_machine(far: str) -> None:
    with pytest.raises(ValueError, match="set engine.exchange to a folder that both reach"):
        VllmServerConfig(urls=(far,))
    VllmServerConfig(urls=(far,), exchange="/shared")
    VllmServerConfig(urls=("http://localhost:2",))


def test_servers_of_a_run_need_its_key_and_must_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    config = VllmServerConfig(urls=("http://127.0.0.1:9",))
    policy = cast(CausalPolicy, type("P", (), {"layout": LAYOUT})())
    monkeypatch.delenv("RLMM_ROLLOUT_TOKEN", raising=False)
    with pytest.raises(ValueError, match="environment variable RLMM_ROLLOUT_TOKEN with their API key is not"):
        build_engine(config, policy)
    monkeypatch.setenv("RLMM_ROLLOUT_TOKEN", "x")
    with pytest.raises(EngineLost, match=r"http://127.0.0.1:9 is gone \(ConnectError"):
        build_engine(config, policy)
