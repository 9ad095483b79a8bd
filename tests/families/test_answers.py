"""Image-to-text on the published classes: answers about a source image are sampled, and trained."""

from pathlib import Path

import pytest
import torch

from rlmm.config.policy import Lora
from rlmm.config.recipe import validate_recipe
from rlmm.config.sampling import Sampling, Written
from rlmm.pipeline import run_recipe
from rlmm.policies.families.loading import load_policy
from rlmm.policies.responses import response_of, texts_of
from rlmm.policies.transformer import TransformerPolicy
from rlmm.train.metrics import MetricsFile
from rollouts.contract import Request
from rollouts.interleaved import generate_spans
from rollouts.torch_engine.causal import TorchEngine
from rollouts.trajectory import Trajectory
from tests.families.checkpoints import WRITERS, peaked, tiny

STEPPED = {"janus": (), "chameleon": (), "emu3": pytest.mark.long, "simplear": pytest.mark.long,
           "blip3o_next": pytest.mark.long}  # fmt: skip
"""Families that take the generated scenes' 48x48 pixels, one GRPO step each."""


def source(policy: TransformerPolicy, seed: int) -> list[int]:
    """A picture of random codes, spelled as one that is drawn."""
    grid, (low, high) = policy.layout.grid, policy.layout.image
    ids = torch.randint(low, high, (grid.length,), generator=torch.Generator().manual_seed(seed))
    for place, token in grid.forced().items():
        ids[place] = token
    return ids.tolist()


def answers(policy: TransformerPolicy, image: list[int]) -> Trajectory:
    response = response_of(policy, Sampling(answer=Written(length_limit=5, top_k=30)))
    streams = response.streams("what is shown", [image])
    asked = Request("a", streams, tuple(range(4)), tuple(f"a/{i}" for i in range(4)))
    engine = TorchEngine(policy, num_layers=policy.sizes.num_hidden_layers)
    return generate_spans(engine, policy.layout, [asked], response.spans)


@pytest.mark.parametrize("name", WRITERS)
def test_an_answer_has_the_sampled_log_probs_reads_its_image_and_trains_the_adapter(name: str) -> None:
    policy = peaked(name)
    policy.add_lora(Lora(rank=2, alpha=2), seed=0)
    policy.model.eval()
    made = answers(policy, source(policy, 0))
    found = policy.log_probs(made).logp_BS
    assert float((found.detach() - made.sampler_logp)[made.target_mask].abs().max()) < 1e-4
    low, high = policy.layout.text
    said = made.ids[made.target_mask]
    assert int(said.min()) >= low and int(said.max()) < high and len(said.unique()) > 1
    assert len(texts_of(policy.tokenizer, made)) == 4
    other = answers(policy, source(policy, 1))
    assert float((other.sampler_logp - made.sampler_logp)[:, 0].abs().max()) > 1e-3
    (found * made.target_mask).sum().backward()
    gradients = [p.grad for n, p in policy.model.named_parameters() if "lora_B" in n]
    assert gradients and all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients)


@pytest.mark.parametrize("name", [pytest.param(name, marks=marks) for name, marks in STEPPED.items()])
def test_a_grpo_step_on_answers_moves_the_language_model_alone(name: str, tmp_path: Path) -> None:
    raw = {
        "name": name, "run_dir": str(tmp_path / "run"),
        "data": {"kind": "scenes", "variant": "describe", "train_images": 8, "held_out": 8},
        "policy": tiny(name).model_dump(),
        "rewards": {"terms": [{"function": "tests/recipes/rewards.py:alternating"}]},
        "held_out": {"terms": [{"name": "wer"}]},
        "stages": {"grpo": {
            "kind": "grpo", "steps": 1, "learning_rate": 1.0e-3, "warmup_steps": 0, "micro_batch_size": 4,
            "prompts_per_step": 2, "samples_per_prompt": 4, "lora": {"rank": 4, "alpha": 8},
            "sampling": {"answer": {"length_limit": 6}}, "gates": {"duplicate_share": 1.0, "flat_share": 1.0},
        }},
    }  # fmt: skip
    run = run_recipe(validate_recipe(raw, name), lambda line: None)
    (row,) = MetricsFile(run.stage("grpo") / "metrics.jsonl").read()
    assert row["mismatch/max"] < 1e-4 and row["grad_norm"] > 0
    before = load_policy(tiny(name).path, tiny(name))
    kept = dict(load_policy(run.stage("grpo") / "model").base.named_parameters())
    moved = {n for n, w in before.base.named_parameters() if not kept[n].equal(w)}
    assert moved and not any(n.startswith(before.frozen_parts) for n in moved)
    assert {n.rpartition(".")[0].rpartition(".")[2] for n in moved} <= set(Lora().target_modules)
