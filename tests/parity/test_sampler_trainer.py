"""The sampler's log-probs are the trainer's, under every law, cached or not, for any batch order and padding."""

import dataclasses
from itertools import product
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from rlmm.config.policy import NewPolicy
from rlmm.policies.families.llama import build
from rlmm.policies.transformer import TransformerPolicy
from rollouts.contract import Request
from rollouts.law import GuidanceMode, Law
from rollouts.torch_engine.causal import TorchEngine
from rollouts.trajectory import Span, Trajectory

CODES, GRID = 40, (3, 4)
PROMPTS = ["a", 'render "HELLO"', "two red circles", 'say "no"']


def make_policy(*, row_ends: bool = False, lora: bool = False) -> TransformerPolicy:
    config = NewPolicy(hidden_size=32, num_layers=2, num_heads=2, intermediate_size=48, row_ends=row_ends)
    policy = build(config, num_codes=CODES, grid=GRID, seed=1)
    with torch.no_grad():  # a fresh head is nearly uniform; a peaked one makes a wrong law visible
        policy.model.lm_head.weight.mul_(40)
    if lora:
        targets = ["q_proj", "down_proj", "lm_head"]
        policy.model = get_peft_model(policy.model, LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
        generator = torch.Generator().manual_seed(0)
        for name, parameter in policy.model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.3, generator=generator)
    policy.model.eval()
    return policy


def requests(policy: TransformerPolicy, prompts: list[str] = PROMPTS, samples: int = 3) -> list[Request]:
    layout = policy.layout
    return [
        Request(
            group_id=prompt,
            streams={
                "cond": layout.prefix(policy.encode_prompt(prompt)),
                "uncond": layout.prefix(layout.null_prompt),
                "source": layout.prefix([9, 10, 11]),
            },
            seeds=tuple(1000 * PROMPTS.index(prompt) + sample for sample in range(samples)),
            sample_ids=tuple(f"{prompt}/{sample}" for sample in range(samples)),
        )
        for prompt in prompts
    ]


def sample(policy: TransformerPolicy, law: Law, *, use_cache: bool = True, prompts: list[str] = PROMPTS) -> Trajectory:
    engine = TorchEngine(policy, num_layers=2, use_cache=use_cache)
    return engine.generate(requests(policy, prompts), [Span("image", law, policy.layout.grid.length)])


def gap(policy: TransformerPolicy, trajectory: Trajectory) -> float:
    with torch.no_grad():
        logp = policy.log_probs(trajectory).logp_BS
    return float((logp - trajectory.sampler_logp)[trajectory.target_mask].abs().max())


LAWS: dict[str, dict[str, Any]] = {
    "none": {"mode": "none"},
    "tempered": {"temperature": 0.7},
    "guided": {"guidance_scale": 3.0},
    "two scales": {"guidance_scale": 2.0, "source_scale": 1.5},
    "guided, tempered, top-k": {"guidance_scale": 2.0, "temperature": 0.8, "top_k": 9},
    "top-p": {"top_p": 0.8},
    "top-k and top-p": {"top_k": 12, "top_p": 0.7, "guidance_scale": 1.5},
}


@pytest.mark.parametrize(("law", "use_cache"), list(product(LAWS, [True, False])))
def test_sampler_log_probs_are_the_trainers(law: str, use_cache: bool) -> None:
    policy = make_policy()
    trajectory = sample(policy, Law(policy.layout.image, **LAWS[law]), use_cache=use_cache)
    assert trajectory.target_mask.all()
    assert gap(policy, trajectory) < 1e-5


def test_lora_on_the_head_and_forced_row_ends() -> None:
    policy = make_policy(row_ends=True, lora=True)
    law = Law(policy.layout.image, guidance_scale=2.0, top_k=10)
    trajectory = sample(policy, law)
    assert gap(policy, trajectory) < 1e-5
    ends = trajectory.ids[:, policy.layout.grid.cols :: policy.layout.grid.stride]
    assert set(ends.unique().tolist()) == {policy.layout.grid.row_end}
    assert int(trajectory.target_mask.sum(1).unique()) == GRID[0] * GRID[1]
    assert (trajectory.sampler_logp[~trajectory.target_mask] == 0).all()


def test_through_a_wrapper_log_probs_are_the_same() -> None:
    policy = make_policy(lora=True)
    trajectory = sample(policy, Law(policy.layout.image, guidance_scale=2.0))
    direct = policy.log_probs(trajectory).logp_BS
    wrapped = policy.log_probs(trajectory, model=policy.model).logp_BS
    torch.testing.assert_close(wrapped, direct, rtol=0, atol=1e-6)


def test_tokens_do_not_depend_on_the_batch_around_a_row() -> None:
    policy = make_policy()
    law = Law(policy.layout.image, guidance_scale=2.0, top_p=0.9)
    whole = sample(policy, law)
    turned = sample(policy, law, prompts=PROMPTS[::-1])
    alone = sample(policy, law, prompts=PROMPTS[1:2])
    rows = {sample_id: row for row, sample_id in enumerate(whole.sample_id)}
    for other in (turned, alone):
        order = [rows[sample_id] for sample_id in other.sample_id]
        assert torch.equal(whole.ids[order], other.ids)
        torch.testing.assert_close(whole.sampler_logp[order], other.sampler_logp, rtol=0, atol=1e-5)


def test_log_probs_do_not_depend_on_row_order_or_extra_padding() -> None:
    policy = make_policy()
    trajectory = sample(policy, Law(policy.layout.image, guidance_scale=2.0))
    base = policy.log_probs(trajectory).logp_BS
    order = torch.randperm(len(trajectory), generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(policy.log_probs(trajectory.rows(order)).logp_BS, base[order], rtol=0, atol=1e-5)
    padded = dataclasses.replace(
        trajectory,
        streams={
            name: type(s)(torch.nn.functional.pad(s.ids_BP, (5, 0)), torch.nn.functional.pad(s.mask_BP, (5, 0)))
            for name, s in trajectory.streams.items()
        },
    )
    torch.testing.assert_close(policy.log_probs(padded).logp_BS, base, rtol=0, atol=1e-5)


@pytest.mark.parametrize("mode", ["conditional_only", "rescaled"])
def test_published_guidance_conventions_are_another_law(mode: GuidanceMode) -> None:
    policy = make_policy()
    trajectory = sample(policy, Law(policy.layout.image, guidance_scale=3.0, mode=mode))
    assert gap(policy, trajectory) > 0.1


def test_replay_of_a_cut_law_without_its_support_is_refused() -> None:
    policy = make_policy()
    trajectory = sample(policy, Law(policy.layout.image, top_k=5))
    with pytest.raises(ValueError, match="support"):
        policy.log_probs(dataclasses.replace(trajectory, support=None))


def test_chunked_log_probs_and_gradients_equal_unchunked(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = make_policy()
    trajectory = sample(policy, Law(policy.layout.image, guidance_scale=2.0, top_k=9))

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        policy.model.zero_grad()
        logp = policy.log_probs(trajectory).logp_BS
        logp.sum().backward()
        return logp.detach(), policy.model.lm_head.weight.grad.clone()

    whole = run()
    monkeypatch.setattr("rlmm.policies.head.LOGIT_BYTES", 7 * 2 * 4 * CODES)  # 7 decisions of two streams
    torch.testing.assert_close(run(), whole, rtol=1e-5, atol=1e-5)
