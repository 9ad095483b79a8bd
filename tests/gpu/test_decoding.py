"""Sampling on a GPU, by CUDA graphs and a kernel at a time: the trainer's law, and the same tokens."""

from typing import cast

import pytest
import torch

from rlmm.config.policy import NewPolicy
from rlmm.config.stages import Gates
from rlmm.policies.causal import CausalPolicy
from rlmm.policies.families.llama import build
from rlmm.train.gates import check_mismatch, measure_mismatch
from rollouts.law import Law
from rollouts.torch_engine import graphs
from rollouts.torch_engine.causal import TorchEngine
from rollouts.torch_engine.llama import llama_shape
from rollouts.torch_engine.packed import PackedLlama
from rollouts.trajectory import Span, Trajectory
from tests.parity.test_packed_decoder import LAWS, MODELS, make_policy
from tests.parity.test_sampler_trainer import PROMPTS, requests

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
CUDA = torch.device("cuda")


def sample(policy: CausalPolicy, law: Law, packed: PackedLlama | None) -> Trajectory:
    layers = policy.sizes.num_hidden_layers
    engine = TorchEngine(policy, num_layers=layers, packed=packed)
    return engine.generate(requests(policy, PROMPTS), [Span("image", law, policy.layout.grid.length)])


def decoder(policy: CausalPolicy, *, use_graphs: bool, dtype: torch.dtype = torch.float32) -> PackedLlama:
    packed = PackedLlama(llama_shape(policy.base), dtype, use_graphs=use_graphs)
    assert packed.graphs == use_graphs
    return packed


def trainer_logp(policy: CausalPolicy, made: Trajectory) -> torch.Tensor:
    with torch.no_grad():
        return policy.log_probs(made.to(CUDA)).logp_BS.cpu()


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("model", MODELS)
def test_all_ways_draw_the_same_tokens_with_the_trainers_log_probs(
    model: str, law: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "BUCKET", 16)  # several graphs within this short a sequence
    policy = make_policy(model)
    policy.to(CUDA)
    chosen = Law(policy.layout.image, **LAWS[law])
    recorded = sample(policy, chosen, decoder(policy, use_graphs=True))
    for other in (decoder(policy, use_graphs=False), None):
        assert torch.equal(sample(policy, chosen, other).ids, recorded.ids)
    gap_BS = (trainer_logp(policy, recorded) - recorded.sampler_logp).abs()
    assert float(gap_BS[recorded.target_mask].max()) < 1e-4


def test_a_second_batch_of_another_size_has_graphs_of_its_own() -> None:
    policy = make_policy()
    policy.to(CUDA)
    packed, law = decoder(policy, use_graphs=True), Law(policy.layout.image, guidance_scale=2.0)
    engine = TorchEngine(policy, num_layers=2, packed=packed)
    span = [Span("image", law, policy.layout.grid.length)]
    whole = engine.generate(requests(policy, PROMPTS), span)
    parts = [engine.generate(requests(policy, PROMPTS)[at : at + 1], span) for at in range(len(PROMPTS))]
    assert torch.equal(torch.cat([part.ids for part in parts]), whole.ids)


def test_bfloat16_stays_within_the_gates() -> None:
    shape = NewPolicy(hidden_size=256, num_layers=4, num_heads=4, intermediate_size=512, max_positions=512)
    policy = cast(CausalPolicy, build(shape, num_codes=256, grid=(16, 16), seed=0))
    policy.to(CUDA)
    policy.precision = "bfloat16"
    policy.model.eval()
    made = sample(policy, Law(policy.layout.image), decoder(policy, use_graphs=True, dtype=torch.bfloat16))
    found = measure_mismatch(trainer_logp(policy, made), made.sampler_logp, made.target_mask)
    check_mismatch(found, Gates(), "bfloat16")
