"""Image-to-text on the published classes: answers about a source image are sampled, and trained."""

import numpy as np
import pytest
import torch
from PIL import Image

from rlmm.config.policy import Lora
from rlmm.config.sampling import Sampling, Written
from rlmm.config.stages import GrpoStage
from rlmm.policies.responses import response_of, texts_of
from rlmm.policies.transformer import TransformerPolicy
from rlmm.train.grpo import grpo_loss
from rlmm.train.grpo_batch import GrpoBatch
from rlmm.train.metrics import Meter
from rollouts.contract import Request
from rollouts.interleaved import generate_spans
from rollouts.torch_engine.causal import TorchEngine
from rollouts.trajectory import Trajectory
from tests.families.checkpoints import WRITERS, peaked

STEP = GrpoStage(steps=1, learning_rate=1e-2, sampling=Sampling(answer=Written(length_limit=5, top_k=30)))


def source(policy: TransformerPolicy, seed: int) -> list[int]:
    """A picture of random codes, spelled as one that is drawn; for who sees pictures, one of random pixels."""
    grid, (low, high) = policy.layout.grid, policy.layout.image
    if policy.pictures is not None:
        return policy.pictures.spell([picture(seed)])[0]
    ids = torch.randint(low, high, (grid.length,), generator=torch.Generator().manual_seed(seed))
    for place, token in grid.forced().items():
        ids[place] = token
    return ids.tolist()


def picture(seed: int) -> Image.Image:
    """[48, 48] pixels of noise."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (48, 48, 3), dtype=np.uint8))


def answers(policy: TransformerPolicy, image: list[int]) -> Trajectory:
    response = response_of(policy, STEP.sampling)
    streams = response.streams("what is shown", [image])
    asked = Request("a", streams, tuple(range(4)), tuple(f"a/{i}" for i in range(4)))
    engine = TorchEngine(policy, num_layers=policy.sizes.num_hidden_layers)
    return generate_spans(engine, policy.layout, [asked], response.spans)


@pytest.mark.parametrize("name", WRITERS)
def test_a_grpo_step_on_answers_about_an_image(name: str) -> None:
    policy = peaked(name)
    policy.add_lora(Lora(rank=2, alpha=2), seed=0)
    policy.model.eval()
    made = answers(policy, source(policy, 0))
    low, high = policy.layout.text
    said = made.ids[made.target_mask]
    assert int(said.min()) >= low and int(said.max()) < high and len(said.unique()) > 1
    assert len(texts_of(policy.tokenizer, made)) == 4
    other = answers(policy, source(policy, 1))
    assert float((other.sampler_logp - made.sampler_logp)[:, 0].abs().max()) > 1e-3  # the image is read
    advantage_B = torch.tensor([1.0, -1.0, 1.0, -1.0])
    weight_BS = made.target_mask / made.target_mask.sum()
    batch = GrpoBatch(made, advantage_B, torch.ones(4).bool(), weight_BS, gate=True)
    optimizer, meter = torch.optim.SGD([p for p in policy.model.parameters() if p.requires_grad], lr=1e-2), Meter()
    grpo_loss(policy, STEP, policy.model, batch, meter).backward()  # the gate is the mismatch's, at 1e-5 in the mean
    assert 0 < meter.flush()["mismatch/max"] < 1e-4
    moved = [p.grad for n, p in policy.model.named_parameters() if "lora_B" in n]
    assert moved and all(gradient is not None and gradient.abs().sum() > 0 for gradient in moved)
    optimizer.step()
    with torch.no_grad():
        gain_BS = policy.log_probs(made).logp_BS - made.sampler_logp
    assert float((gain_BS * weight_BS * advantage_B[:, None]).sum()) > 0
