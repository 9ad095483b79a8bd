"""Masked trajectories against enumeration: the log-prob of a sampled chain, and its gradient."""

from dataclasses import replace
from itertools import product
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from rlmm.objectives.estimators import Estimator
from rlmm.objectives.legality import LogProbKind
from rlmm.policies.masked import MaskedPolicy
from rollouts.law import Law
from rollouts.torch_engine.causal import TorchEngine
from rollouts.torch_engine.masked import MaskedTorchEngine
from rollouts.trajectory import Span
from rollouts.unmasking import Unmasking, masked_counts
from tests.exact import enumerable as next_token
from tests.exact.masked_enumerable import (
    IMAGES_NS,
    LAWS,
    LENGTH,
    MASKED,
    ORDERS,
    STATES_CS,
    confident_paths,
    image_log_probs,
    law_named,
    make_policy,
    request_for,
    sample,
    state,
    step_log_prob,
    table,
    trajectory_of,
)

STEPWISE = Unmasking(LENGTH, order="random", schedule="linear")
REWARD_N = torch.rand(len(IMAGES_NS), generator=torch.Generator().manual_seed(5), dtype=torch.float64)


@pytest.fixture(scope="module")
def policy() -> MaskedPolicy:
    return make_policy()


def every_order(policy: MaskedPolicy, law: Law, unmasking: Unmasking = STEPWISE) -> tuple[Tensor, Tensor]:
    """Every image with every order of one position a step: images and steps."""
    steps = torch.tensor([[order.index(i) for i in range(LENGTH)] for order in ORDERS])
    return IMAGES_NS.repeat_interleave(len(ORDERS), 0), steps.repeat(len(IMAGES_NS), 1)


def gradient(policy: MaskedPolicy, value: Tensor) -> Tensor:
    found = torch.autograd.grad(value, list(policy.model.parameters()), allow_unused=True)
    return torch.cat([g.flatten() for g in found if g is not None])


@pytest.mark.parametrize("name", LAWS)
@pytest.mark.parametrize("steps", [(0, 1, 2), (2, 0, 1), (0, 0, 1), (1, 0, 1), (0, 0, 0)])
def test_a_trajectory_has_the_log_prob_of_its_states(policy: MaskedPolicy, name: str, steps: tuple[int, ...]) -> None:
    law = law_named(name, policy)
    made = trajectory_of(policy, law, STEPWISE, IMAGES_NS, torch.tensor(steps).expand(len(IMAGES_NS), -1))
    with torch.no_grad():
        wanted = torch.stack([step_log_prob(table(policy, law), image, steps) for image in IMAGES_NS.tolist()])
        found = policy.log_probs(made).logp_BS.sum(1)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


def test_the_chances_of_every_image_and_order_sum_to_one(policy: MaskedPolicy) -> None:
    law = law_named("guidance", policy)
    made = trajectory_of(policy, law, STEPWISE, *every_order(policy, law))
    with torch.no_grad():
        chance = policy.log_probs(made).logp_BS.sum(1).exp() / len(ORDERS)
        assert float(chance.sum()) == pytest.approx(1, abs=1e-12)
        by_image = chance.view(len(IMAGES_NS), -1).sum(1)
        torch.testing.assert_close(by_image.log(), image_log_probs(table(policy, law)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["plain", "guidance, temperature"])
def test_the_policy_gradient_over_trajectories_is_that_of_the_expected_reward(policy: MaskedPolicy, name: str) -> None:
    law = law_named(name, policy)
    wanted = gradient(policy, (image_log_probs(table(policy, law)).exp() * REWARD_N).sum())
    made = trajectory_of(policy, law, STEPWISE, *every_order(policy, law))
    logp_B = policy.log_probs(made).logp_BS.sum(1)
    reward_B = REWARD_N.repeat_interleave(len(ORDERS))
    found = gradient(policy, (logp_B.detach().exp() / len(ORDERS) * reward_B * logp_B).sum())
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "unmasking",
    [
        Unmasking(2, order="confidence", schedule="linear"),
        Unmasking(3, order="confidence", schedule="cosine"),
        Unmasking(3, order="threshold", threshold=0.4),
        Unmasking(2, order="threshold", threshold=0.3),
    ],
)
@pytest.mark.parametrize("name", ["plain", "guidance"])
def test_confident_decoding_has_the_log_prob_of_all_proposals_that_lead_there(
    policy: MaskedPolicy, unmasking: Unmasking, name: str
) -> None:
    law = law_named(name, policy)
    counts = masked_counts(unmasking.schedule, unmasking.steps, LENGTH)
    paths = confident_paths(table(policy, law), counts, unmasking.threshold)
    made = trajectory_of(
        policy, law, unmasking, torch.tensor([p.image for p in paths]), torch.tensor([p.steps for p in paths])
    )
    logp_P = policy.log_probs(made).logp_BS.sum(1)
    chance_P = torch.stack([path.chance for path in paths])
    assert float(logp_P.detach().exp().sum()) == pytest.approx(1, abs=1e-10)
    torch.testing.assert_close(logp_P.detach(), chance_P.detach().log(), rtol=0, atol=1e-10)
    rewards = {tuple(image): float(r) for image, r in zip(IMAGES_NS.tolist(), REWARD_N, strict=True)}
    reward_P = torch.tensor([rewards[path.image] for path in paths]).double()
    wanted = gradient(policy, (chance_P * reward_P).sum())
    found = gradient(policy, (logp_P.detach().exp() * reward_P * logp_P).sum())
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("ordering", ["one by one", "confidence", "threshold"])
def test_the_policy_gradient_is_the_slope_of_the_expected_reward(ordering: str) -> None:
    """By finite differences along random directions: what confidence keeps is a step function of the weights, which
    autograd sees nothing of."""
    policy, unmasking = make_policy(), ORDERINGS[ordering]
    law = law_named("guidance", policy)
    weights, generator = list(policy.model.parameters()), torch.Generator().manual_seed(2)

    def paths() -> tuple[Tensor, Tensor, Tensor]:
        """Images, steps and chances of every way."""
        chances = table(policy, law)
        if not unmasking.policy_free:
            found = confident_paths(
                chances, masked_counts(unmasking.schedule, unmasking.steps, LENGTH), unmasking.threshold
            )
            parts = [torch.tensor(part) for part in zip(*((p.image, p.steps) for p in found), strict=True)]
            return parts[0], parts[1], torch.stack([p.chance for p in found])
        images, steps = every_order(policy, law)
        rows = zip(images.tolist(), steps.tolist(), strict=True)
        return images, steps, torch.stack([step_log_prob(chances, *row) for row in rows]).exp() / len(ORDERS)

    def expected() -> float:
        images, _, chance_P = paths()
        return float((chance_P * REWARD_N[images @ torch.tensor([16, 4, 1])]).sum())

    with torch.no_grad():
        images, steps, chance_P = paths()
    reward_P = REWARD_N[images @ torch.tensor([16, 4, 1])]
    logp_P = policy.log_probs(trajectory_of(policy, law, unmasking, images, steps)).logp_BS.sum(1)
    found = torch.autograd.grad((chance_P * reward_P * logp_P).sum(), weights, allow_unused=True)
    for _ in range(3):
        ways = [torch.randn(w.shape, generator=generator, dtype=w.dtype) for w in weights]
        slope = sum(float((g * way).sum()) for g, way in zip(found, ways, strict=True) if g is not None)
        sides = []
        for change in (1e-6, -2e-6):  # to one side, then to the other
            with torch.no_grad():
                for weight, way in zip(weights, ways, strict=True):
                    weight.add_(way, alpha=change)
                sides.append(expected())
        with torch.no_grad():
            for weight, way in zip(weights, ways, strict=True):
                weight.add_(way, alpha=1e-6)
        assert (sides[0] - sides[1]) / 2e-6 == pytest.approx(slope, rel=1e-5, abs=1e-8)


def test_saturated_proposals_tie_and_the_chances_still_sum_to_one() -> None:
    """Of a policy that is all but certain everywhere; the sampler's samples have the log-prob of what happened."""
    policy = make_policy(3)
    with torch.no_grad():
        cast(nn.Module, policy.base.get_output_embeddings()).get_parameter("weight").mul_(40)
    law, unmasking = Law(policy.layout.image, temperature=0.2), Unmasking(2, order="confidence", schedule="linear")
    with torch.no_grad():
        paths = confident_paths(table(policy, law), masked_counts("linear", 2, LENGTH))
        paths = [path for path in paths if float(path.chance) > 0]
        made = trajectory_of(
            policy, law, unmasking, torch.tensor([p.image for p in paths]), torch.tensor([p.steps for p in paths])
        )
        chance_P = torch.stack([path.chance for path in paths])
        torch.testing.assert_close(policy.log_probs(made).logp_BS.sum(1), chance_P.log(), rtol=1e-9, atol=1e-8)
        likely = sample(policy, law, unmasking, 64).sampler_logp.sum(1)
    assert float(chance_P.sum()) == pytest.approx(1, abs=1e-9) and float(likely.min()) > -10


def test_entropies_have_a_gradient_under_every_order_where_it_is_asked_for(policy: MaskedPolicy) -> None:
    for name in ("random", "confidence", "threshold"):
        made = sample(policy, law_named("guidance", policy), ORDERINGS[name], 6)
        with_gradient = policy.log_probs(made, entropy_gradient=True).entropy_BS
        without = policy.log_probs(made).entropy_BS
        assert with_gradient.requires_grad and not without.requires_grad
        torch.testing.assert_close(with_gradient.detach(), without)
        assert float(gradient(policy, with_gradient.sum()).abs().sum()) > 0


def test_without_the_order_term_confident_decoding_would_have_another_gradient(policy: MaskedPolicy) -> None:
    law, unmasking = law_named("plain", policy), Unmasking(2, order="confidence", schedule="linear")
    paths = confident_paths(table(policy, law), masked_counts("linear", 2, LENGTH))
    images, steps = torch.tensor([p.image for p in paths]), torch.tensor([p.steps for p in paths])
    chance_P = torch.stack([path.chance for path in paths]).detach()
    reward_P = REWARD_N[(images * torch.tensor([16, 4, 1])).sum(1)]
    made = trajectory_of(policy, law, unmasking, images, steps)
    without = policy.log_probs(made, estimator=Estimator(order_term=False))
    wanted_P = torch.stack([step_log_prob(table(policy, law), p.image, p.steps) for p in paths])
    torch.testing.assert_close(without.logp_BS.sum(1), wanted_P, rtol=0, atol=1e-12)
    assert without.kind == LogProbKind.SURROGATE
    full, chosen_only = (
        gradient(policy, (chance_P * reward_P * found.logp_BS.sum(1)).sum())
        for found in (policy.log_probs(made), without)
    )
    cosine = float(torch.nn.functional.cosine_similarity(full, chosen_only, dim=0))
    assert cosine < 0.99


ORDERINGS = {
    "random": Unmasking(2, order="random"),
    "one by one": Unmasking(3, order="random", schedule="square"),
    "blocks": Unmasking(2, order="blocks", block=2, schedule="linear"),
    "ancestral": Unmasking(4, order="ancestral"),
    "confidence": Unmasking(2, order="confidence"),
    "threshold": Unmasking(3, order="threshold", threshold=0.5),
}


@pytest.mark.parametrize("name", LAWS)
@pytest.mark.parametrize("ordering", ORDERINGS)
def test_sampler_and_trainer_agree_under_every_law_and_order(policy: MaskedPolicy, name: str, ordering: str) -> None:
    made = sample(policy, law_named(name, policy), ORDERINGS[ordering], 40)
    with torch.no_grad():
        found = policy.log_probs(made).logp_BS
    torch.testing.assert_close(found, made.sampler_logp, rtol=0, atol=1e-10)
    assert (made.ids != policy.mask).all() and made.target_mask.all()


@pytest.mark.parametrize("law", [{"top_k": 2}, {"top_p": 0.7}, {"top_k": 3, "guidance_scale": 2.0}])
def test_sampler_and_trainer_agree_on_a_cut_support(policy: MaskedPolicy, law: dict[str, Any]) -> None:
    made = sample(policy, Law(policy.layout.image, **law), ORDERINGS["random"], 40)
    with torch.no_grad():
        torch.testing.assert_close(policy.log_probs(made).logp_BS, made.sampler_logp, rtol=0, atol=1e-6)
    made = sample(policy, Law(policy.layout.image, **law), ORDERINGS["confidence"], 4)
    with pytest.raises(ValueError, match="supports of what was not kept, are not stored"):
        policy.log_probs(made)


def test_noise_on_the_confidence_has_no_log_prob(policy: MaskedPolicy) -> None:
    made = sample(policy, law_named("plain", policy), Unmasking(2, order="noisy_confidence", noise=2.0), 4)
    assert made.order_logp is None
    with pytest.raises(ValueError, match="proposals that noise put aside"):
        policy.log_probs(made)


@pytest.mark.parametrize("ordering", ["random", "confidence", "threshold"])
def test_images_are_as_frequent_as_their_chances(policy: MaskedPolicy, ordering: str) -> None:
    """4000 samples against the chance of each (image, steps), by a chi-square of those expected often."""
    law, unmasking = law_named("guidance", policy), ORDERINGS[ordering]
    made = sample(policy, law, unmasking, 4000)
    counts = masked_counts(unmasking.schedule, unmasking.steps, LENGTH)
    with torch.no_grad():
        chances = table(policy, law)
        if unmasking.policy_free:
            ways = [s for s in product(range(2), repeat=LENGTH) if sum(s) == counts[0]]
            expected = {
                (tuple(image), way): float(step_log_prob(chances, image, way).exp()) / len(ways)
                for image in IMAGES_NS.tolist()
                for way in ways
            }
        else:
            paths = confident_paths(chances, counts, unmasking.threshold)
            expected = {(path.image, path.steps): float(path.chance) for path in paths}
    seen: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = {}
    for image, steps in zip((made.ids - policy.layout.image[0]).tolist(), made.step.tolist(), strict=True):
        seen[tuple(image), tuple(steps)] = seen.get((tuple(image), tuple(steps)), 0) + 1
    assert set(seen) <= set(expected)
    often = [key for key, chance in expected.items() if chance * 4000 >= 5]
    square = sum((seen.get(key, 0) - 4000 * expected[key]) ** 2 / (4000 * expected[key]) for key in often)
    assert square < len(often) + 4 * (2 * len(often)) ** 0.5


def test_padding_batch_size_and_the_other_rows_change_nothing(policy: MaskedPolicy) -> None:
    law, how = law_named("guidance", policy), ORDERINGS["random"]
    whole, alone = sample(policy, law, how, 12), sample(policy, law, how, 12, max_rows=2)
    assert whole.ids.equal(alone.ids) and whole.step.equal(alone.step)
    with torch.no_grad():
        wide = policy.log_probs(whole).logp_BS
        stretched = {
            name: type(stream)(
                torch.nn.functional.pad(stream.ids_BP, (17, 0), value=policy.layout.pad),
                torch.nn.functional.pad(stream.mask_BP, (17, 0)),
            )
            for name, stream in whole.streams.items()
        }
        padded = policy.log_probs(replace(whole, streams=stretched)).logp_BS
        single = torch.cat([policy.log_probs(whole.rows([i])).logp_BS for i in range(12)])
    torch.testing.assert_close(padded, wide, rtol=0, atol=1e-12)
    torch.testing.assert_close(single, wide, rtol=0, atol=1e-12)


@pytest.mark.parametrize("ordering", ORDERINGS)
def test_given_tokens_are_kept_and_seen_and_are_no_decisions(policy: MaskedPolicy, ordering: str) -> None:
    law, low = law_named("guidance", policy), policy.layout.image[0]
    span = Span("image", law, LENGTH, unmasking=ORDERINGS[ordering])
    request = replace(request_for(policy, range(40)), given=((1, low + 2),))
    made = MaskedTorchEngine(policy).generate([request], [span])
    assert (made.ids[:, 1] == low + 2).all() and made.target_mask.tolist() == [[True, False, True]] * 40
    assert (made.sampler_logp[:, 1] == 0).all()
    with torch.no_grad():
        torch.testing.assert_close(policy.log_probs(made).logp_BS, made.sampler_logp, rtol=0, atol=1e-10)
        first = table(policy, law)[state([0, 2, 0], [1])]
    if ordering == "one by one":
        alone = made.step[:, 0] == 0
        wanted = first[0].gather(0, made.ids[alone, 0] - low)
        torch.testing.assert_close(made.sampler_logp[alone, 0], wanted, rtol=0, atol=1e-10)
    for given in (((1, low + 2), (1, low)), ((3, low),), ((0, policy.mask),)):
        with pytest.raises(ValueError, match="positions are decided ones of the grid"):
            MaskedTorchEngine(policy).generate([replace(request, given=given)], [span])


def test_an_engine_that_goes_from_left_to_right_takes_no_given_tokens() -> None:
    causal = next_token.make_policy()
    request = replace(next_token.request_for(causal, "a", [1]), given=((1, causal.layout.image[0]),))
    with pytest.raises(ValueError, match="use a masked policy"):
        TorchEngine(causal, num_layers=2).generate([request], [next_token.span_of(Law(causal.layout.image))])


def test_the_first_position_sees_the_last(policy: MaskedPolicy) -> None:
    """transformers drops a mask that hides nothing, and its Llama is causal then unless it is told otherwise."""
    ids = torch.tensor([[*policy.layout.prefix([5, 6]), *(policy.layout.image[0] + torch.tensor([0, 1, 2])).tolist()]])
    other = ids.clone()
    other[0, -1] += 1
    seen = torch.ones_like(ids, dtype=torch.bool)
    with torch.no_grad():
        assert (policy.hidden(ids, seen)[:, 0] - policy.hidden(other, seen)[:, 0]).abs().max() > 1e-6
        wrapped = policy.hidden(ids, seen, model=policy.model)
        torch.testing.assert_close(wrapped, policy.hidden(ids, seen), rtol=0, atol=1e-12)
        logits = policy.model(input_ids=ids, attention_mask=torch.zeros(1, 1, ids.shape[1], ids.shape[1]).double())
        chosen = logits.logits[:, -3:, slice(*policy.layout.image)]
        torch.testing.assert_close(policy.head(policy.hidden(ids, seen)[:, -3:], policy.layout.image), chosen)


def test_fewer_steps_keep_the_expectation(policy: MaskedPolicy) -> None:
    """Over all choices of 2 of 3 steps the weighed log-prob is the whole one."""
    law = law_named("plain", policy)
    made = sample(policy, law, STEPWISE, 900)
    with torch.no_grad():
        whole = policy.log_probs(made).logp_BS
        part = policy.log_probs(made, estimator=Estimator(steps=2))
    assert part.scale_BS is not None
    assert (part.scale_BS.sum(1) == 3).all() and set(part.scale_BS.unique().tolist()) == {0.0, 1.5}
    torch.testing.assert_close(part.logp_BS, torch.where(part.scale_BS > 0, whole, 0.0), rtol=0, atol=1e-12)
    share_S = (part.scale_BS > 0).double().mean(0)
    assert ((share_S - 2 / 3).abs() < 4 * (2 / 9 / 900) ** 0.5).all()


def test_no_gradient_and_no_chance_reach_other_vocabulary(policy: MaskedPolicy) -> None:
    made = sample(policy, law_named("plain", policy), STEPWISE, 6)
    head = cast(nn.Module, policy.base.get_output_embeddings()).get_parameter("weight")
    (found,) = torch.autograd.grad(policy.log_probs(made).logp_BS.sum(), [head])
    low, high = policy.layout.image
    assert found[low:high].abs().sum() > 0
    assert float(found[:low].abs().sum()) == 0 and float(found[high:].abs().sum()) == 0


def test_states_are_numbered_as_they_are_listed() -> None:
    assert STATES_CS[state([1, 2, 3], [0, 2])].tolist() == [1, MASKED, 3]
