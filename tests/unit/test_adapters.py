"""Adapters that are sent beside the weights they are of, and folded by who receives them."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from rlmm.config.engines import VllmServerConfig
from rlmm.config.pairs import PairsStage
from rlmm.config.policy import Lora, NewPolicy
from rlmm.config.stages import GrpoStage
from rlmm.policies.families.llama import build
from rlmm.policies.transformer import TransformerPolicy
from rollouts.adapters import BesideBase, adapters_alone
from rollouts.fingerprint import weights_fingerprint
from rollouts.vllm_engine.server import ServerHost
from rollouts.vllm_engine.transfer import AdapterTransfer

CPU = torch.device("cpu")


@pytest.fixture
def policy() -> TransformerPolicy:
    made = build(NewPolicy(), num_codes=4, grid=(1, 3), seed=0)
    made.add_lora(Lora(rank=2, alpha=3), seed=0)
    trained(made, 0)
    return made


def trained(policy: TransformerPolicy, seed: int) -> None:
    """Another adapter, by less than half precision keeps."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if "lora_" in name:
                parameter.add_(1e-3 * torch.randn_like(parameter))


class Server:
    """A server's part, without vLLM: `reads` so many of the weights of a pass before it fails."""

    def __init__(self) -> None:
        self.base: BesideBase | None = None
        self.reads: int | None = None
        self.arrived: list[str] = []

    def call(self, method: str) -> dict[str, Any]:
        assert method == "rollouts_held"
        return (
            {"key": "", "complete": False}
            if self.base is None
            else {"key": self.base.key, "complete": self.base.complete}
        )

    def take(self, weights: Iterable[tuple[str, Tensor]], key: str) -> None:
        self.arrived = []
        if self.base is None or self.base.key != key:
            self.base = BesideBase(key)
        self.base.take(self._some(weights))

    def _some(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in weights:
            if len(self.arrived) == self.reads:
                raise RuntimeError("broke off")
            self.arrived.append(name)
            yield name, tensor

    @property
    def weights(self) -> dict[str, Tensor]:
        assert self.base is not None
        return dict(self.base.folded(CPU))


class Way:
    """A transfer to servers in this process."""

    def __init__(self, *servers: Server) -> None:
        self.servers, self.hosts = servers, cast(Sequence[ServerHost], servers)

    def __call__(self, weights: Iterable[tuple[str, Tensor]], key: str = "") -> None:
        every = list(weights)
        for server in self.servers:
            server.take(every, key)


def equal(ours: dict[str, Tensor], policy: TransformerPolicy) -> bool:
    wanted = dict(policy.named_weights())
    return list(ours) == list(wanted) and all(ours[name].equal(weight) for name, weight in wanted.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_what_is_folded_of_the_parts_is_what_the_policy_folds(policy: TransformerPolicy, dtype: torch.dtype) -> None:
    cast(nn.Module, policy.model).to(dtype)
    held = BesideBase("")
    held.take(policy.weights_apart())
    assert equal(dict(held.folded(CPU)), policy)
    trained(policy, 1)
    assert not equal(dict(held.folded(CPU)), policy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peft_merges_to_the_same_weights(policy: TransformerPolicy, dtype: torch.dtype) -> None:
    cast(nn.Module, policy.model).to(dtype)
    ours = dict(policy.named_weights())
    theirs = cast(Any, policy.model).merge_and_unload().state_dict()
    named = {name: weight for name, weight in theirs.items() if name in ours}
    assert len(named) == len(ours) and all(torch.equal(ours[name], weight) for name, weight in named.items())


def test_after_the_base_adapters_alone_are_sent_and_arrive(policy: TransformerPolicy) -> None:
    servers = Server(), Server()
    load, every = AdapterTransfer(Way(*servers)), [name for name, _ in policy.weights_apart()]
    load(policy.weights_apart())
    assert all(one.arrived == every and equal(one.weights, policy) for one in servers)
    before = [one.base.fingerprint() for one in servers if one.base]
    trained(policy, 1)
    load(policy.weights_apart())
    alone = [name for name, _ in adapters_alone(policy.weights_apart())]
    assert all(one.arrived == alone and equal(one.weights, policy) for one in servers) and 0 < len(alone) < len(every)
    after = [one.base.fingerprint() for one in servers if one.base]
    assert after == [weights_fingerprint(policy.weights_apart())] * 2 and after[0] != before[0] == before[1]


@pytest.mark.parametrize("event", ["started anew", "another run", "broke off"])
def test_a_server_without_the_base_is_sent_all_again(policy: TransformerPolicy, event: str) -> None:
    first, second = Server(), Server()
    load = AdapterTransfer(Way(first, second))
    load(policy.weights_apart())
    if event == "started anew":
        second.base = None
    elif event == "another run":
        AdapterTransfer(Way(second))(policy.weights_apart())
    else:
        trained(policy, 1)
        second.reads = 3
        with pytest.raises(RuntimeError, match="broke off"):
            load(policy.weights_apart())
        second.reads = None
    trained(policy, 2)
    load(policy.weights_apart())
    assert all(len(one.arrived) == len(list(policy.weights_apart())) for one in (first, second))
    assert equal(first.weights, policy) and equal(second.weights, policy)


def test_what_is_held_does_not_change_with_the_trainers(policy: TransformerPolicy) -> None:
    held = BesideBase("")
    held.take(policy.weights_apart())
    before = held.fingerprint()
    trained(policy, 1)
    assert held.fingerprint() == before != weights_fingerprint(policy.weights_apart())


def test_a_worker_folds_what_came_and_says_where_something_else_runs(
    policy: TransformerPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = pytest.importorskip("rollouts.vllm_engine.worker", exc_type=ImportError)
    running = dict[str, Tensor]()
    monkeypatch.setattr(worker, "refresh_tied_head", lambda model: None)
    monkeypatch.setattr(worker, "running_fingerprint", lambda model: weights_fingerprint(running.items()))

    class Worker(worker.RolloutWorker):
        device, rank = CPU, 0
        model_runner = type("Runner", (), {"get_model": lambda self: None})()
        vllm_config = type("Config", (), {"model_config": type("Model", (), {"dtype": torch.float32})})

        def reload_weights(self, weights_iterator: Iterable[tuple[str, Tensor]]) -> None:
            running.update(weights_iterator)

    one = Worker()
    one._take(iter(policy.weights_apart()), "mine")
    assert equal(running, policy) and one.rollouts_held() == {"key": "mine", "complete": True}
    assert one.rollouts_fingerprint() == weights_fingerprint(policy.weights_apart())
    stale = dict(running)
    trained(policy, 1)
    one._take(adapters_alone(policy.weights_apart()), "mine")
    assert equal(running, policy) and one.rollouts_fingerprint() == weights_fingerprint(policy.weights_apart())
    running.update(stale)
    assert "was folded" in one.rollouts_fingerprint()
    one._take(iter(policy.named_weights()), "")
    assert not one.rollouts_held()["complete"] and one.rollouts_fingerprint() == weights_fingerprint(running.items())


def test_an_adapter_on_a_tied_head_is_refused_since_it_would_be_folded_into_the_embeddings() -> None:
    tied = build(NewPolicy(tie_embeddings=True), num_codes=4, grid=(1, 3), seed=0)
    with pytest.raises(ValueError, match="names the output head, whose matrix is that of the embeddings"):
        tied.add_lora(Lora(rank=2, target_modules=("q_proj", "lm_head")), seed=0)
    plain = build(NewPolicy(), num_codes=4, grid=(1, 3), seed=0)
    plain.add_lora(Lora(rank=2, target_modules=("q_proj", "lm_head")), seed=0)


def test_a_stage_without_an_adapter_has_none_to_send() -> None:
    engine = VllmServerConfig(sync="adapter")
    given: dict[str, Any] = {
        "start_from": "sft",
        "prompts_per_step": 2,
        "micro_batch_size": 4,
        "steps": 1,
        "learning_rate": 1,
    }
    with pytest.raises(ValueError, match="engine.sync: adapter sends the servers a LoRA adapter, and this stage"):
        GrpoStage(**given, engine=engine)
    assert GrpoStage(**given, engine=engine, lora=Lora()).engine == engine
    with pytest.raises(ValueError, match="engine.sync: adapter"):
        PairsStage(start_from="sft", engine=engine)
