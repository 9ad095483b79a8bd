"""The memory plan of a masked policy's update is what its log-probs hold, forth and back."""

from functools import partial
from pathlib import Path

import pytest

from rlmm.config.policy import NewPolicy
from rlmm.config.recipe import read_recipe
from rlmm.config.stages import GrpoStage
from rlmm.dry_run import Live, dry_run
from rlmm.memory import PROMPT_TOKENS, _law, _update
from rlmm.policies.families import llama
from rlmm.train.grpo_source import estimator_of
from rollouts.contract import Request
from rollouts.torch_engine.masked import MaskedTorchEngine

TINY = Path(__file__).parents[1] / "recipes" / "tiny_masked.yaml"
SIZES = (
    "policy={kind: new, family: masked, hidden_size: 64, num_layers: 2, num_heads: 2, intermediate_size: 128}",
    "codec.levels=[8,8,8,5]",
    "codec.patch=4",
    "codec.image_size=[32,32]",
    "stages.grpo.lora=null",
    "stages.grpo.weight_decay=0.1",  # so that the whole head is trained, here as there
    "stages.grpo.prompts_per_step=4",
    "stages.grpo.micro_batch_size=16",
    "stages.grpo.sampling={unmasking: {steps: 8}}",
)
ESTIMATORS = {
    "whole trajectories": ("stages.grpo.objective={name: grpo}",),
    "a part of the steps": ("stages.grpo.objective={name: grpo}", "stages.grpo.estimator={steps: 2}"),
    "noise": ("stages.grpo.objective={name: gspo}", "stages.grpo.estimator={kind: stratified, draws: 4}"),
}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_an_update_holds_what_is_planned(name: str) -> None:
    recipe = read_recipe(TINY, [*SIZES, *ESTIMATORS[name]])
    stage = recipe.stages["grpo"]
    assert isinstance(stage, GrpoStage) and isinstance(recipe.policy, NewPolicy) and recipe.codec is not None
    make = partial(llama.build, recipe.policy, num_codes=recipe.codec.num_codes, grid=recipe.codec.grid, seed=0)
    policy = make()
    layout = policy.layout
    length = PROMPT_TOKENS + layout.grid.length
    planned = dry_run(make, _law(stage, layout), _update(stage, layout, length, 1)).passing
    prompt = layout.prefix((7,) * (PROMPT_TOKENS - len(layout.prefix(()))))
    requests = [Request(str(row), {"cond": prompt}, (row,), (str(row),)) for row in range(stage.micro_batch_size)]
    made = MaskedTorchEngine(policy).generate(requests, [stage.sampling.span(layout)])
    with Live() as live:
        found = policy.log_probs(made, model=policy.model, estimator=estimator_of(stage))
        found.logp_BS.sum().backward()
    assert planned > 10 << 20
    assert planned == pytest.approx(live.peak, rel=0.15)
