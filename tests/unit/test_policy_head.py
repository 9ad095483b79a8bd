"""The log-probs and entropies of decisions, and their gradients, are those of the plain computation."""

from typing import Any, cast

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from rlmm.policies import head as module
from rlmm.policies.head import OutputHead, decision_log_probs, sliced_head
from rollouts.law import Law, law_log_probs, pack_support

SLICE = (3, 14)
LAWS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tempered": {"temperature": 0.7},
    "guided": {"guidance_scale": 3.0, "temperature": 1.3},
    "two scales": {"guidance_scale": 2.0, "source_scale": 1.5},
    "rescaled": {"guidance_scale": 2.0, "mode": "rescaled"},
    "top-k, guided": {"guidance_scale": 2.0, "top_k": 4},
}


def make_head(kind: str) -> nn.Module:
    torch.manual_seed(1)
    linear = nn.Linear(6, 17, bias=kind == "bias", dtype=torch.float64)
    if kind != "lora":
        return linear
    lora = LoraLinear(linear.requires_grad_(False), "default", config=LoraConfig(r=2), r=2, lora_alpha=6).double()
    nn.init.normal_(cast(nn.Linear, lora.lora_B["default"]).weight)
    return lora


def output_head(kind: str) -> OutputHead:
    """`body`: a head of the family's own, whose first row is not token 0 and which has a layer before it."""
    if kind != "body":
        return OutputHead(make_head(kind))
    linear = make_head("bias")
    return OutputHead(linear, 2, nn.Sequential(nn.Linear(6, 6, dtype=torch.float64), nn.GELU()))


def plain(
    head: OutputHead, law: Law, hidden_KNH: Tensor, tokens_N: Tensor, support_NV: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The definition: every logit at once, differentiated by autograd."""
    by_stream = dict(zip(law.streams(replay=True), sliced_head(head, hidden_KNH, law.vocabulary), strict=True))
    logp_NV, _ = law_log_probs(law, by_stream, support_NV=support_NV, replay=True)
    chosen_N = logp_NV.gather(-1, (tokens_N - law.vocabulary[0]).unsqueeze(-1)).squeeze(-1)
    kept_NV = logp_NV if support_NV is None else logp_NV.masked_fill(~support_NV, 0.0)
    return chosen_N, -(logp_NV.exp() * kept_NV).sum(-1)


def gradients(head: OutputHead, hidden_KNH: Tensor, outputs: tuple[Tensor, Tensor], entropy: bool) -> list[Tensor]:
    factor_N = torch.linspace(-1, 2, len(outputs[0]), dtype=torch.float64)
    value = (factor_N * outputs[0]).sum() + (((factor_N**2) * outputs[1]).sum() if entropy else 0.0)
    wanted = [hidden_KNH, *(p for p in parameters(head) if p.requires_grad)]
    return list(torch.autograd.grad(value, wanted))


def parameters(head: OutputHead) -> list[nn.Parameter]:
    body = head.body.parameters() if isinstance(head.body, nn.Module) else []
    return [*head.linear.parameters(), *body]


@pytest.mark.parametrize("kind", ["linear", "bias", "lora", "body"])
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("chunk_bytes", [1 << 20, 700])
@pytest.mark.parametrize("name", LAWS)
def test_values_and_gradients_are_the_plain_ones(
    name: str, chunk_bytes: int, entropy: bool, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    law, head = Law(SLICE, **LAWS[name]), output_head(kind)
    names = law.streams(replay=True)
    torch.manual_seed(2)
    hidden_KNH = torch.randn(len(names), 9, 6, dtype=torch.float64, requires_grad=True)
    tokens_N = torch.randint(*SLICE, (9,))
    support_NV = None
    if law.truncated:
        support_NV = torch.rand(9, SLICE[1] - SLICE[0]) < 0.4
        support_NV[torch.arange(9), tokens_N - SLICE[0]] = True
    packed = None if support_NV is None else pack_support(support_NV)
    expected = plain(head, law, hidden_KNH, tokens_N, support_NV)
    monkeypatch.setattr(module, "LOGIT_BYTES", chunk_bytes)
    found = decision_log_probs(head, law, hidden_KNH, tokens_N, packed, entropy_gradient=entropy)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert found[1].requires_grad == entropy
    torch.testing.assert_close(
        gradients(head, hidden_KNH, found, entropy),
        gradients(head, hidden_KNH, expected, entropy),
        rtol=1e-10,
        atol=1e-12,
    )


def test_rows_of_the_head_outside_the_slice_have_no_gradient() -> None:
    head = make_head("linear")
    hidden_KNH = torch.randn(1, 5, 6, dtype=torch.float64)
    decision_log_probs(OutputHead(head), Law(SLICE), hidden_KNH, torch.full((5,), 4))[0].sum().backward()
    gradient_VH = cast(nn.Linear, head).weight.grad
    assert gradient_VH is not None
    moved = gradient_VH.abs().sum(-1) > 0
    assert moved.nonzero().squeeze(-1).tolist() == list(range(*SLICE))


def test_without_gradients_nothing_is_left_behind() -> None:
    head = make_head("linear")
    with torch.no_grad():
        logp_N, entropy_N = decision_log_probs(
            OutputHead(head), Law(SLICE), torch.randn(1, 5, 6, dtype=torch.float64), torch.full((5,), 4)
        )
    assert logp_N.grad_fn is None and entropy_N.grad_fn is None
