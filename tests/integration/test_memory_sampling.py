"""What sampling from a next-token policy is planned to hold is what the torch engine holds."""

import pytest
import torch

from rlmm import dry_sampling
from rlmm.config.stages import GrpoStage
from rlmm.dry_run import Live
from rlmm.dry_sampling import sampled
from rlmm.memory import _drawing
from rlmm.planned_update import law_of
from rollouts.torch_engine.causal import TorchEngine
from rollouts.torch_engine.llama import llama_shape
from rollouts.torch_engine.packed import PackedLlama
from tests.integration.planned import planned, sizes

ROWS = ("stages.grpo.prompts_per_step=3", "stages.grpo.micro_batch_size=4", "stages.grpo.objective={name: grpo}")
CASES = {
    "plain": (),
    "guided": ("sampling={guidance_scale: 2.0}",),
    "editing": ("sampling={guidance_scale: 2.0, source_scale: 1.5}",),
    "top-p": ("sampling={top_p: 0.9}",),
    "bfloat16": ("precision=bfloat16",),
    "two batches": ("sampling={guidance_scale: 2.0}", "engine={kind: torch, max_rows: 20}"),
}


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_sampling_holds_what_is_planned(name: str, packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = [f"stages.grpo.{one}" for one in CASES[name]]
    made = planned("tiny.yaml", "grpo", sizes(128, 256).replace("num_layers: 2", "num_layers: 4"), *ROWS, *settings)
    stage, policy = made.stage, made.policy
    assert isinstance(stage, GrpoStage)
    policy.precision = stage.precision
    if not packed:
        monkeypatch.setattr(dry_sampling, "packed_shape", lambda policy: None)
    law = law_of(stage, policy.layout)
    found = sampled(made.make, law, _drawing(stage, policy.layout, len(law.streams()), made.length, 1))
    dtype = torch.bfloat16 if stage.precision == "bfloat16" else torch.float32
    decoder = PackedLlama(llama_shape(policy.base), dtype, use_kernels=False) if packed else None
    engine = TorchEngine(policy, num_layers=4, max_rows=stage.engine.max_rows, packed=decoder)
    requests = made.requests(stage.prompts_per_step, stage.samples_per_prompt, law.streams(), name == "editing")
    with Live() as live:
        engine.generate(requests, [stage.sampling.span(policy.layout)])
    assert found > 1 << 20
    assert found == pytest.approx(live.peak, rel=0.15)
