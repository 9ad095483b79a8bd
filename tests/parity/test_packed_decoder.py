"""The packed decoder samples from the trainer's law, whatever the Llama, by compiled kernels and torch operations."""

import dataclasses
import gc
import logging
import weakref
from itertools import product
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, PreTrainedModel

from rlmm.config.engines import TorchEngineConfig
from rlmm.config.policy import Lora, NewPolicy
from rlmm.config.stages import Gates
from rlmm.policies.causal import CausalPolicy
from rlmm.policies.families.llama import build
from rlmm.train.engines import build_engine
from rlmm.train.gates import check_mismatch, measure_mismatch
from rollouts.fingerprint import weights_fingerprint
from rollouts.kernels.building import NoKernels
from rollouts.kernels.native import load_kernels
from rollouts.law import Law
from rollouts.torch_engine import graphs
from rollouts.torch_engine.causal import TorchEngine
from rollouts.torch_engine.graphs import Graphs, Step, extent_of
from rollouts.torch_engine.llama import Unsupported, llama_shape
from rollouts.torch_engine.packed import PackedLlama, Rows
from rollouts.trajectory import Span, Trajectory
from tests.parity.test_sampler_trainer import PROMPTS, requests

CODES, GRID = 40, (4, 5)
WAYS = ["kernels", "torch"]
LAWS: dict[str, dict[str, Any]] = {
    "none": {"mode": "none"},
    "guided, tempered": {"guidance_scale": 3.0, "temperature": 0.7},
    "two scales": {"guidance_scale": 2.0, "source_scale": 1.5},
    "top-k and top-p": {"top_k": 12, "top_p": 0.7, "guidance_scale": 1.5},
}
MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped queries": {"num_attention_heads": 4, "num_key_value_heads": 2},
    "one key head": {"num_attention_heads": 2, "num_key_value_heads": 1},
    "own head size": {"head_dim": 48},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "tied head": {"tie_word_embeddings": True},
    "scaled rope": {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 500.0}},
    "llama3 rope": {
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
        },
    },
    "odd intermediate": {"intermediate_size": 53},
}  # fmt: skip


def make_policy(model: str = "plain", *, row_ends: bool = False, lora: bool = False) -> CausalPolicy:
    """Peaked, far from its initial values: a wrong position, mask or norm is visible."""
    fresh = build(NewPolicy(row_ends=row_ends), num_codes=CODES, grid=GRID, seed=1)
    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 96,
    }
    settings = sizes | {"vocab_size": fresh.layout.vocab_size, "max_position_embeddings": 64} | MODELS[model]
    config = LlamaConfig(**settings)
    policy = CausalPolicy(cast(PreTrainedModel, LlamaForCausalLM(config)), fresh.tokenizer, fresh.layout)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in policy.model.named_parameters():
        spread = 0.3 if "norm" in name or "bias" in name else 0.12
        noise = torch.randn(parameter.shape, generator=generator) * spread
        parameter.data = parameter.data + noise if "norm" in name else noise
    if lora:
        policy.add_lora(Lora(rank=4, alpha=8, target_modules=("q_proj", "v_proj", "down_proj", "lm_head")), 0)
        move_adapter(policy, generator)
    policy.model.eval()
    return policy


def move_adapter(policy: CausalPolicy, generator: torch.Generator) -> None:
    for name, parameter in policy.model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1, generator=generator)


def engine_of(policy: CausalPolicy, way: str) -> TorchEngine:
    if way == "kernels":
        try:
            load_kernels()
        except NoKernels as error:
            pytest.skip(str(error))
    dtype = torch.bfloat16 if policy.precision == "bfloat16" else torch.float32
    packed = PackedLlama(llama_shape(policy.base), dtype, use_kernels=way == "kernels")
    assert (packed.kernels is not None) == (way == "kernels"), packed.without
    return TorchEngine(policy, num_layers=2, packed=packed)


def sample(engine: TorchEngine, law: Law, prompts: list[str] = PROMPTS) -> Trajectory:
    policy = cast(CausalPolicy, engine.decoder)
    return engine.generate(requests(policy, prompts), [Span("image", law, policy.layout.grid.length)])


def gap(policy: CausalPolicy, made: Trajectory) -> float:
    with torch.no_grad():
        logp = policy.log_probs(made).logp_BS
    return float((logp - made.sampler_logp)[made.target_mask].abs().max())


@pytest.mark.parametrize(("law", "way"), list(product(LAWS, WAYS)))
def test_log_probs_are_the_trainers_under_every_law(law: str, way: str) -> None:
    policy = make_policy()
    made = sample(engine_of(policy, way), Law(policy.layout.image, **LAWS[law]))
    assert gap(policy, made) < 3e-5
    plain = sample(TorchEngine(policy, num_layers=2), Law(policy.layout.image, **LAWS[law]))
    assert torch.equal(made.ids, plain.ids)


@pytest.mark.parametrize(("model", "way"), list(product(MODELS, WAYS)))
def test_log_probs_are_the_trainers_for_every_llama(model: str, way: str) -> None:
    policy = make_policy(model)
    engine = engine_of(policy, way)
    assert gap(policy, sample(engine, Law(policy.layout.image, guidance_scale=2.0))) < 3e-5
    assert engine.fingerprint() == weights_fingerprint(policy.named_weights())


@pytest.mark.parametrize("way", WAYS)
def test_adapters_and_forced_row_ends(way: str) -> None:
    policy = make_policy(row_ends=True, lora=True)
    made = sample(engine_of(policy, way), Law(policy.layout.image, guidance_scale=2.0, top_k=10))
    assert gap(policy, made) < 3e-5
    ends = made.ids[:, policy.layout.grid.cols :: policy.layout.grid.stride]
    assert set(ends.unique().tolist()) == {policy.layout.grid.row_end}


@pytest.mark.parametrize(("lora", "way"), list(product([False, True], WAYS)))
def test_bfloat16_stays_within_its_gate(lora: bool, way: str) -> None:
    policy = make_policy(lora=lora)
    in_float32 = policy.log_probs(sample(engine_of(policy, way), Law(policy.layout.image))).logp_BS
    policy.precision = "bfloat16"
    engine = engine_of(policy, way)
    made = sample(engine, Law(policy.layout.image))
    with torch.no_grad():
        logp_BS = policy.log_probs(made).logp_BS
    found = measure_mismatch(logp_BS, made.sampler_logp, made.target_mask)
    check_mismatch(found, Gates(), "bfloat16")
    assert found.mean > 1e-5, f"products were made in float32; log-probs there: {in_float32.mean()}"
    assert engine.fingerprint() == weights_fingerprint(policy.named_weights())


@pytest.mark.parametrize("way", WAYS)
def test_tokens_do_not_depend_on_the_batch_around_a_row(way: str) -> None:
    policy = make_policy()
    law, engine = Law(policy.layout.image, guidance_scale=2.0), engine_of(policy, way)
    whole = sample(engine, law)
    rows = {sample_id: row for row, sample_id in enumerate(whole.sample_id)}
    engine.max_rows = 7
    for other in (sample(engine, law, PROMPTS[::-1]), sample(engine, law, PROMPTS[1:2])):
        order = [rows[sample_id] for sample_id in other.sample_id]
        assert torch.equal(whole.ids[order], other.ids)
        torch.testing.assert_close(whole.sampler_logp[order], other.sampler_logp, rtol=0, atol=1e-5)


@pytest.mark.parametrize("lora", [False, True])
def test_a_sync_copies_and_the_fingerprint_is_of_the_copy(lora: bool) -> None:
    policy = make_policy(lora=lora)
    law, engine = Law(policy.layout.image), engine_of(policy, "kernels")
    before = sample(engine, law)
    if lora:
        move_adapter(policy, torch.Generator().manual_seed(7))
    else:
        for parameter in policy.model.parameters():  # in place, as an optimizer does: none may be shared
            parameter.data.mul_(1.3)
    assert engine.fingerprint() != weights_fingerprint(policy.named_weights())
    stale = sample(engine, law)
    assert torch.equal(stale.ids, before.ids)
    assert gap(policy, stale) > 0.01
    engine.sync(policy.named_weights(), 3)
    assert engine.fingerprint() == weights_fingerprint(policy.named_weights())
    fresh = sample(engine, law)
    assert fresh.weights_version == 3
    assert gap(policy, fresh) < 3e-5


def test_a_sync_that_lacks_a_weight_or_brings_a_strange_one_is_refused() -> None:
    policy = make_policy()
    engine, weights = engine_of(policy, "kernels"), list(policy.named_weights())
    with pytest.raises(ValueError, match=r"lacks 'lm_head.weight'"):
        engine.sync([pair for pair in weights if pair[0] != "lm_head.weight"], 1)
    with pytest.raises(ValueError, match="strange"):
        engine.sync([*weights, ("strange", torch.zeros(1))], 1)


def test_a_sequence_longer_than_the_model_is_refused() -> None:
    policy = make_policy()
    layout = dataclasses.replace(policy.layout, grid=dataclasses.replace(policy.layout.grid, rows=40))
    policy = CausalPolicy(policy.model, policy.tokenizer, layout)
    with pytest.raises(ValueError, match="64 positions"):
        sample(engine_of(policy, "kernels"), Law(layout.image))


def test_other_models_are_named_and_sampled_through_their_own_forward(caplog: pytest.LogCaptureFixture) -> None:
    policy = make_policy()
    other = MistralForCausalLM(MistralConfig(vocab_size=8, hidden_size=32, num_hidden_layers=1, intermediate_size=16))
    dynamic: Any = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 500.0}
    ropes = LlamaForCausalLM(LlamaConfig(vocab_size=8, num_hidden_layers=1, hidden_size=32, rope_parameters=dynamic))
    faults = {"Mistral": other, "float64": make_policy().model.double(), "'dynamic'": ropes}
    for word, model in faults.items():
        with pytest.raises(Unsupported, match=word):
            llama_shape(model)
    with caplog.at_level(logging.INFO):
        assert cast(TorchEngine, build_engine(TorchEngineConfig(), policy)).packed is not None
        assert "compiled kernels" in caplog.text
        policy.model.double()
        assert cast(TorchEngine, build_engine(TorchEngineConfig(), policy)).packed is None
    assert "not float32" in caplog.text


@pytest.mark.parametrize("model", ["plain", "one key head"])
def test_a_step_that_reads_more_of_the_cache_than_is_filled_is_the_same(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a CUDA graph does: whole buckets, what is not yet filled masked."""
    policy, widen, extents, made_rows = make_policy(model), PackedLlama.widen, [], []

    def widened(packed: PackedLlama, *given: Any) -> Rows:
        rows = widen(packed, *given)
        made_rows.append(weakref.ref(rows))
        return rows

    def unrecorded(graphs: Graphs, step: Step, ids_N: Tensor, position: int) -> Tensor:
        extents.append((extent_of(position, graphs.capacity), position))
        return step(ids_N, torch.tensor(position), extents[-1][0])

    monkeypatch.setattr(graphs, "BUCKET", 16)
    monkeypatch.setattr(PackedLlama, "widen", widened)
    monkeypatch.setattr(Graphs, "__call__", unrecorded)
    engine = engine_of(policy, "torch")
    assert engine.packed is not None
    engine.packed.graphs = True
    gc.disable()
    try:
        made = sample(engine, Law(policy.layout.image, guidance_scale=2.0))
        assert [rows() for rows in made_rows] == [None], "a cache outlives its rollout until the next collection"
    finally:
        gc.enable()
    assert {extent for extent, _ in extents} == {32, 48} and all(extent > position for extent, position in extents)
    assert gap(policy, made) < 3e-5
