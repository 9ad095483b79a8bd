"""Prompts that see themselves alone: the law is that of its definition, and reading them once changes nothing."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rlmm.config.policy import NewPolicy
from rlmm.policies.layout_io import Supervised, supervised_batch
from rlmm.policies.masked import MaskedPolicy
from rollouts.contract import Layout
from rollouts.law import Law
from rollouts.torch_engine.masked import MaskedTorchEngine
from rollouts.trajectory import Span, Trajectory
from rollouts.unmasking import Unmasking
from tests.exact.masked_enumerable import (
    IMAGES_NS,
    LAWS,
    LENGTH,
    law_named,
    make_policy,
    request_for,
    state,
    step_log_prob,
    table,
    trajectory_of,
)

PROMPTS = ("ab", 'say "no"', "a")
ORDERINGS = {
    "random": Unmasking(2, order="random"),
    "ancestral": Unmasking(4, order="ancestral"),
    "confidence": Unmasking(2, order="confidence"),
    "threshold": Unmasking(3, order="threshold", threshold=0.5),
}


@pytest.fixture(scope="module")
def policy() -> MaskedPolicy:
    return make_policy(prompt_attention="causal")


def sample(policy: MaskedPolicy, law: Law, unmasking: Unmasking, **engine: Any) -> Trajectory:
    """Five samples of each of three prompts of different lengths."""
    requests = [request_for(policy, range(10 * i, 10 * i + 5), prompt) for i, prompt in enumerate(PROMPTS)]
    span = Span("image", law, LENGTH, unmasking=unmasking)
    return MaskedTorchEngine(policy, **engine).generate(requests, [span])


@pytest.mark.parametrize("name", LAWS)
@pytest.mark.parametrize("steps", [(0, 1, 2), (2, 0, 1), (1, 0, 1), (0, 0, 0)])
def test_a_trajectory_has_the_log_prob_of_its_states(policy: MaskedPolicy, name: str, steps: Sequence[int]) -> None:
    law, how = law_named(name, policy), ORDERINGS["random"]
    for prompt in PROMPTS:
        made = trajectory_of(policy, law, how, IMAGES_NS, torch.tensor(steps).expand(len(IMAGES_NS), -1), prompt)
        with torch.no_grad():
            chances = table(policy, law, prompt)
            wanted = torch.stack([step_log_prob(chances, image, steps) for image in IMAGES_NS.tolist()])
            torch.testing.assert_close(policy.log_probs(made).logp_BS.sum(1), wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", LAWS)
@pytest.mark.parametrize("ordering", ORDERINGS)
def test_reading_prompts_once_changes_nothing(policy: MaskedPolicy, name: str, ordering: str) -> None:
    law, how = law_named(name, policy), ORDERINGS[ordering]
    again = sample(policy, law, how, cache_prompts=False)
    for max_rows in (512, 4):
        once = sample(policy, law, how, max_rows=max_rows)
        assert once.ids.equal(again.ids) and once.step.equal(again.step) and once.sample_id == again.sample_id
        torch.testing.assert_close(once.sampler_logp, again.sampler_logp, rtol=0, atol=1e-12)
        with torch.no_grad():
            torch.testing.assert_close(policy.log_probs(once).logp_BS, once.sampler_logp, rtol=0, atol=1e-10)
    assert len(once.ids.unique(dim=0)) > 1


def test_a_prompt_is_read_once_a_request_whatever_the_steps_and_samples(
    policy: MaskedPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    fed: list[Tensor] = []
    hidden = policy.hidden

    def watched(ids_BT: Tensor, mask_BT: Tensor, *, cache: Any = None) -> Tensor:
        fed.append(ids_BT[:, 0 if cache is None else cache.get_seq_length() :])
        return hidden(ids_BT, mask_BT, cache=cache)

    monkeypatch.setattr(policy, "hidden", watched)
    sample(policy, law_named("guidance", policy), Unmasking(3, schedule="linear"), max_rows=4)
    prompts = [row for ids in fed for row in ids.tolist() if policy.layout.boi[0] in row]
    assert len(prompts) == 2 * len(PROMPTS)  # a stream each, of three requests cut into eight batches
    spans = [ids for ids in fed if policy.layout.boi[0] not in ids]
    assert len(spans) == 3 * 8 and all(ids.shape[1] == LENGTH for ids in spans)


def test_a_prompt_sees_neither_the_image_nor_what_comes_after() -> None:
    causal, full = make_policy(prompt_attention="causal"), make_policy()
    prefix = list(causal.layout.prefix([5, 6]))
    one, image = torch.tensor([[*prefix, *range(causal.layout.image[0], causal.layout.image[0] + LENGTH)]]), len(prefix)
    seen = torch.ones_like(one, dtype=torch.bool)

    def change(policy: MaskedPolicy, position: int) -> list[bool]:
        """Which positions a token's change reaches."""
        other = one.clone()
        other[0, position] += 1
        with torch.no_grad():
            moved = (policy.hidden(one, seen) - policy.hidden(other, seen)).abs().amax(-1)[0]
        return (moved > 1e-9).tolist()

    for position in range(image - 1):  # the last one announces the image
        assert change(causal, position) == [False] * position + [True] * (one.shape[1] - position)
    for position in range(image, one.shape[1]):
        assert change(causal, position) == [False] * image + [True] * LENGTH
        assert all(change(full, position))
    one, seen = one[:, : image - 1], seen[:, : image - 1]  # nothing announces an image
    assert change(causal, 1) == [False] + [True] * (image - 2)


def test_padding_and_supervised_batches_keep_the_law(policy: MaskedPolicy) -> None:
    law, low = law_named("plain", policy), policy.layout.image[0]
    made = sample(policy, law_named("guidance", policy), ORDERINGS["random"])
    wider = {
        name: type(stream)(
            torch.nn.functional.pad(stream.ids_BP, (17, 0), value=policy.layout.pad),
            torch.nn.functional.pad(stream.mask_BP, (17, 0)),
        )
        for name, stream in made.streams.items()
    }
    with torch.no_grad():
        found = policy.log_probs(replace(made, streams=wider)).logp_BS
    torch.testing.assert_close(found, made.sampler_logp, rtol=0, atol=1e-10)
    image, known = [2, 0, 3], [1]
    batch = supervised_batch(policy.layout, [Supervised(policy.encode_prompt(p), image) for p in PROMPTS])
    noised_BT = (batch.ids_BT == low + 2) | (batch.ids_BT == low + 3)
    with torch.no_grad():
        logp_BT = policy.sequence_log_probs(replace(batch, noised_BT=noised_BT))
        for row, prompt in enumerate(PROMPTS):
            chances = table(policy, law, prompt)[state(image, known)]
            wanted = torch.stack([chances[0, 2], chances[2, 3]])
            torch.testing.assert_close(logp_BT[row, noised_BT[row]], wanted, rtol=0, atol=1e-12)


def test_what_would_be_an_approximation_is_refused(policy: MaskedPolicy) -> None:
    with pytest.raises(ValueError, match="that would be another function"):
        MaskedTorchEngine(make_policy(), cache_prompts=True)
    with pytest.raises(ValueError, match="of masked policies"):
        NewPolicy(prompt_attention="causal")
    policy.base.config._attn_implementation = "eager"
    try:
        with pytest.raises(ValueError, match="attention 'eager' does not take"):
            MaskedPolicy(policy.model, policy.tokenizer, policy.layout)
    finally:
        policy.base.config._attn_implementation = "sdpa"


def test_a_layout_keeps_it_and_one_from_before_has_none(policy: MaskedPolicy) -> None:
    record = policy.layout.to_dict()
    assert Layout.from_dict(record).causal_prompt
    del record["causal_prompt"]
    assert not Layout.from_dict(record).causal_prompt
