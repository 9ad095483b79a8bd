"""The law against brute force in float64: what is drawn, what is normalised, what truncation keeps."""

import itertools
from typing import Any

import pytest
import torch

from rollouts.law import Law, draw, law_log_probs, pack_support, row_uniforms, top_support, unpack_support

V = 6


def logits(seed: int, rows: int = 4) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(rows, V, dtype=torch.float64, generator=generator) * 2 for n in ("cond", "uncond", "source")}


def brute_force(law: Law, parts: dict[str, torch.Tensor]) -> torch.Tensor:
    """Probabilities from the definition, one row and one token at a time, on python floats."""
    rows = []
    for c, u, i in zip(parts["cond"].tolist(), parts["uncond"].tolist(), parts["source"].tolist(), strict=True):
        mixed = []
        for k in range(V):
            if law.source_scale is not None:
                mixed.append(u[k] + law.source_scale * (i[k] - u[k]) + law.guidance_scale * (c[k] - i[k]))
            else:
                mixed.append(u[k] + law.guidance_scale * (c[k] - u[k]))
        weight = [torch.tensor(m / law.temperature, dtype=torch.float64).exp().item() for m in mixed]
        keep = sorted(range(V), key=lambda k: -weight[k])[: law.top_k or V]
        mass = sum(weight[k] for k in keep)
        nucleus, reached = [], 0.0
        for k in keep:
            if reached < law.top_p:
                nucleus.append(k)
            reached += weight[k] / mass
        kept = sum(weight[k] for k in nucleus)
        rows.append([weight[k] / kept if k in nucleus else 0.0 for k in range(V)])
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize(
    ("scale", "source", "temperature", "top_k", "top_p"),
    list(itertools.product([1.0, 2.5], [None, 1.5], [0.6, 1.0], [0, 3], [1.0, 0.7])),
)
def test_log_probs_are_the_definitions(
    scale: float, source: float | None, temperature: float, top_k: int, top_p: float
) -> None:
    law = Law((0, V), temperature, scale, source, top_k=top_k, top_p=top_p)
    parts = logits(7)
    logp, support = law_log_probs(law, parts)
    torch.testing.assert_close(logp.exp(), brute_force(law, parts), rtol=0, atol=1e-12)
    assert (support is not None) == law.truncated


def test_replay_normalises_over_the_stored_support() -> None:
    law = Law((0, V), top_k=3)
    _, support = law_log_probs(law, logits(1))
    moved = logits(2)  # a policy that has changed: its own top 3 are others
    again = top_support(moved["cond"], law)
    assert support is not None and again is not None and not torch.equal(support, again)
    logp, _ = law_log_probs(law, moved, support_NV=support, replay=True)
    kept = moved["cond"].masked_fill(~support, -torch.inf).softmax(-1)
    torch.testing.assert_close(logp.exp(), kept)


def test_published_conventions_differentiate_what_they_say() -> None:
    parts, scale = logits(3), 4.0
    alone, _ = law_log_probs(Law((0, V), guidance_scale=scale, mode="conditional_only"), parts, replay=True)
    torch.testing.assert_close(alone, parts["cond"].log_softmax(-1))
    rescaled, _ = law_log_probs(Law((0, V), guidance_scale=scale, mode="rescaled"), parts, replay=True)
    at_s, _ = law_log_probs(Law((0, V), guidance_scale=scale, temperature=scale), parts)
    torch.testing.assert_close(rescaled, at_s)  # the guided law at temperature s
    sampled, _ = law_log_probs(Law((0, V), guidance_scale=scale, mode="rescaled"), parts)
    assert (rescaled - sampled).abs().max() > 0.1


def test_inverse_cdf_draws_have_the_laws_frequencies() -> None:
    logp, _ = law_log_probs(Law((0, V), top_p=0.9), logits(5, rows=1))
    uniforms = row_uniforms([11], 200_000)[0]
    drawn = draw(logp.expand(len(uniforms), -1), uniforms)
    counts = torch.bincount(drawn, minlength=V).double()
    expected = logp.exp()[0] * len(uniforms)
    assert (counts[expected == 0] == 0).all()
    where = expected > 0
    chi2 = ((counts - expected)[where] ** 2 / expected[where]).sum()
    assert chi2 < 25  # 99.9 % point of chi-square with at most 5 degrees of freedom is 20.5


def test_draws_at_the_edges_never_pick_an_impossible_token() -> None:
    logp = torch.tensor([[-torch.inf, 0.0, -torch.inf]])
    for uniform in (0.0, 1.0 - 2**-53):
        assert draw(logp, torch.tensor([uniform], dtype=torch.float64)).item() == 1


def test_row_uniforms_depend_on_their_own_seed_alone() -> None:
    many = row_uniforms([5, 6, 2**63 - 1], 9)
    assert torch.equal(many[1], row_uniforms([6], 9)[0])
    assert torch.equal(many[2, :4], row_uniforms([2**63 - 1], 4)[0])
    assert not torch.equal(many[0], many[1])


def test_packed_supports_come_back() -> None:
    support = torch.rand(3, 4, 13, generator=torch.Generator().manual_seed(0)) < 0.5
    assert torch.equal(unpack_support(pack_support(support), 13), support)


def impossible(fields: dict[str, Any]) -> Law:
    return Law(**fields)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"temperature": 0.0}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"mode": "none", "guidance_scale": 2.0}, "guidance"),
        ({"vocabulary": (4, 4)}, "vocabulary"),
    ],
)
def test_impossible_laws_are_refused(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        impossible({"vocabulary": (0, V)} | fields)
