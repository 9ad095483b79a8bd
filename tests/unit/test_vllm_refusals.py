"""What this project's parts of vLLM cannot do is said by them. vLLM is imported here, and not started."""

import importlib.util
from collections.abc import Iterable, Iterator
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest
import torch

# vLLM is imported by the tests alone: whoever only collects them does not wait for it.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Of which this process is the first, as far as vLLM's layers ask."""
    group = SimpleNamespace(world_size=request.param, rank_in_group=0, all_gather=lambda part, dim: part)
    monkeypatch.setattr("vllm.distributed.parallel_state._TP", group)


def on(*counts: int) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("devices", counts, indirect=True)


def weights(layer: Any) -> Any:
    """What `running_weights` reads of a model of this layer alone."""
    from rollouts.vllm_engine.weights import running_weights

    model: Any = torch.nn.Module()
    model.config, model.packed_modules_mapping = SimpleNamespace(tie_word_embeddings=False), {}
    model.layer = layer
    return list(running_weights(model))


def config(**settings: Any) -> Any:
    """vLLM's, as far as models look before they are built."""
    return SimpleNamespace(
        model_config=SimpleNamespace(hf_config=SimpleNamespace(**settings), enforce_eager=settings.get("eager")),
        scheduler_config=SimpleNamespace(enable_chunked_prefill=settings.get("chunks")),
    )


@on(2)
@pytest.mark.usefixtures("devices")
def test_key_heads_that_devices_repeat_are_not_compared() -> None:
    from vllm.model_executor.layers.linear import QKVParallelLinear

    with pytest.raises(NotImplementedError, match=r"layer repeats key heads .* than the model has key heads \(1\)"):
        weights(QKVParallelLinear(32, 32, 4, 1, bias=False))


@on(1)
@pytest.mark.usefixtures("devices")
def test_quantised_weights_are_not_compared() -> None:
    from vllm.model_executor.layers.linear import ReplicatedLinear

    layer: Any = ReplicatedLinear(32, 32, bias=False)
    layer.weight = torch.nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(NotImplementedError, match=r"ReplicatedLinear of type torch\.int8 .*run the engine unquantised"):
        weights(layer)


@on(2)
@pytest.mark.usefixtures("devices")
def test_chameleon_and_glm_image_are_not_spread_over_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.models.llama import LlamaAttention

    from rollouts.vllm_engine.families import ChameleonAttention
    from rollouts.vllm_engine.glm_image import GlmImage

    monkeypatch.setattr(LlamaAttention, "__init__", lambda self: None)
    with pytest.raises(NotImplementedError, match="Chameleon's norms are .* not spread over devices; use one"):
        ChameleonAttention()
    with pytest.raises(NotImplementedError, match="GLM-Image's joined gate .* not spread over devices; use one"):
        GlmImage(vllm_config=config())


def test_the_order_of_norms_of_the_larger_chameleon_is_refused() -> None:
    from rollouts.vllm_engine.families import Chameleon

    with pytest.raises(NotImplementedError, match=r"swin_norm.*engine\.kind torch"):
        Chameleon(vllm_config=config(swin_norm=True))


@pytest.mark.parametrize(
    ("settings", "says"),
    [({"chunks": True}, "chunked prefill is not possible"), ({}, "leave engine.enforce_eager true")],
)
def test_llamagen_of_text_reads_prompts_whole_and_is_not_compiled(settings: dict[str, Any], says: str) -> None:
    from rollouts.vllm_engine.llamagen import LlamaGenText

    with pytest.raises(NotImplementedError, match=says):
        LlamaGenText(vllm_config=config(**settings))


def test_a_prompt_that_comes_in_parts_is_an_error() -> None:
    from rollouts.vllm_engine.llamagen import LlamaGenTextModel

    model: Any = SimpleNamespace(captions=SimpleNamespace(null=9, pad=0), embed_tokens=torch.nn.Embedding(20, 4))
    with pytest.raises(RuntimeError, match="from its middle on"):
        LlamaGenTextModel.embedded(model, torch.tensor([3, 4]), torch.tensor([5, 6]))


@pytest.mark.parametrize(
    ("named", "says"),
    [("two_streams:TwoStreamModel", "takes token ids"), ("llamagen:LlamaGenTextModel", "are token ids")],
)
def test_prompts_of_these_are_not_embeddings(named: str, says: str) -> None:
    module, name = named.split(":")
    model = getattr(import_module(f"rollouts.vllm_engine.{module}"), name)
    with pytest.raises(NotImplementedError, match=says):
        model.forward(None, None, torch.zeros(1), None)


def test_weights_that_vllm_refuses_are_told_from_weights_that_stop_coming() -> None:
    from rollouts.vllm_engine.weights import reload_all

    def stops() -> Iterator[tuple[str, torch.Tensor]]:
        yield "head", torch.zeros(2)
        raise EOFError("the trainer is gone")

    def load(weights_iterator: Iterable[tuple[str, torch.Tensor]]) -> None:
        found = dict(weights_iterator)
        if found.keys() != {"head", "norm"} or found["norm"].shape != (2,):
            raise ValueError(f"norm does not fit: {sorted(found)}")

    reload_all(load, {"head": torch.zeros(2), "norm": torch.zeros(2)}.items())
    with pytest.raises(RuntimeError, match=r"norm does not fit: \['head', 'norm'\].* start it anew for the checkpoint"):
        reload_all(load, {"head": torch.zeros(2), "norm": torch.zeros(3)}.items())
    with pytest.raises(EOFError, match="the trainer is gone"):
        reload_all(load, stops())
