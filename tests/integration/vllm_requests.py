"""What the tests of the vLLM engines ask for: a small peaked policy, prompts, laws, and the torch engine's answers."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rlmm.config.engines import VllmEngineConfig, VllmServerConfig
from rlmm.config.policy import Lora, NewPolicy
from rlmm.policies.causal import CausalPolicy
from rlmm.policies.families.llama import build
from rlmm.policies.transformer import TransformerPolicy
from rlmm.train.engines import build_engine
from rlmm.train.recovery import Recovering
from rollouts.contract import Request
from rollouts.fingerprint import weights_fingerprint
from rollouts.interleaved import generate_spans
from rollouts.law import Law
from rollouts.torch_engine.causal import TorchEngine
from rollouts.trajectory import Span, Trajectory

LAWS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tempered": {"temperature": 0.7},
    "top-k": {"top_k": 9},
    "top-p": {"top_p": 0.8, "top_k": 30},
    "guided": {"guidance_scale": 3.0},
    "two scales, cut": {"guidance_scale": 2.0, "source_scale": 1.5, "top_k": 20, "temperature": 0.8},
}
# The second is longer than one block of the prefix cache, so that stale keys would be found and used.
PROMPTS = ["a", "two red circles and a very long blue line between them", 'render "HELLO"']


def local(**settings: Any) -> VllmEngineConfig:
    """vLLM in this process, with a compiled model where the program was started with `--compiled`."""
    given: dict[str, Any] = {"kv_megabytes": 32, "enforce_eager": "--compiled" not in sys.argv} | settings
    return VllmEngineConfig(**given)


def make_policy(
    *, lora: bool, tied: bool = False, row_ends: bool = False, null_token: bool = False, hidden: int = 64
) -> CausalPolicy:
    config = NewPolicy(
        hidden_size=hidden, num_layers=2, num_heads=2, intermediate_size=96, row_ends=row_ends, tie_embeddings=tied,
        null="token" if null_token else "prompt",
    )  # fmt: skip
    policy = build(config, num_codes=40, grid=(3, 4), seed=1)
    assert isinstance(policy, CausalPolicy)
    with torch.no_grad():  # a fresh head is nearly uniform; a peaked one makes a wrong law visible
        policy.model.lm_head.weight.mul_(40)
    if lora:
        policy.add_lora(Lora(rank=4, target_modules=("q_proj", "gate_proj", "lm_head")), seed=1)
    policy.model.eval()
    return policy


def change(policy: TransformerPolicy, seed: int) -> None:
    """What an optimiser step does to the trainable weights, only larger."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in policy.model.parameters():
            if weight.requires_grad:
                weight.add_(0.05 * torch.randn(weight.shape, generator=generator))


def requests(policy: TransformerPolicy, samples: int = 3) -> list[Request]:
    layout = policy.layout

    def streams(prompt: str) -> dict[str, tuple[int, ...]]:
        ids = policy.encode_prompt(prompt)
        return {"uncond": layout.prefix(layout.null(ids)), "source": layout.prefix([9, 10, 11])}

    return [
        Request(
            group_id=prompt,
            streams={"cond": layout.prefix(policy.encode_prompt(prompt)), **streams(prompt)},
            seeds=tuple((1 << 62) + 100 * p + s for s in range(samples)),
            sample_ids=tuple(f"{prompt}/{s}" for s in range(samples)),
        )
        for p, prompt in enumerate(PROMPTS)
    ]


def sample(engine: Any, policy: TransformerPolicy, law: dict[str, Any]) -> Trajectory:
    span = Span("image", Law(policy.layout.image, **law), policy.layout.grid.length)
    return engine.generate(requests(policy), [span])


@contextmanager
def served(policy: TransformerPolicy, **settings: Any) -> Iterator[Recovering]:
    """The policy by servers that are started here, over several devices of one processor where that is asked for."""
    change(policy, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # or two devices on one processor are refused
        config = VllmServerConfig(max_rows=7, max_prompt_tokens=300, kv_megabytes=32, **settings)
        made = build_engine(config, policy)
        assert isinstance(made, Recovering)
        yield made
        made.close()


def gap(policy: TransformerPolicy, made: Trajectory) -> float:
    with torch.no_grad():
        logp_BS = policy.log_probs(made).logp_BS
    return float((logp_BS - made.sampler_logp)[made.target_mask].abs().max())


def same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b if a is None or b is None else torch.equal(a, b)


def agrees(engine: Any, policy: TransformerPolicy) -> bool:
    return engine.fingerprint() == weights_fingerprint(policy.named_weights())


def check_laws(engine: Any, policy: TransformerPolicy) -> None:
    """The trainer's log-probs within 1e-4 and the torch engine's samples, under every law."""
    found = under_laws(engine, policy)
    assert set(found) == set(LAWS)
    for law, facts in found.items():
        assert facts.pop("gap") < 1e-4, law
        assert all(facts.values()), (law, facts)


def check_sync(engine: Any, policy: TransformerPolicy) -> None:
    """A skipped sync shows, in the fingerprint and in the log-probs; one that is made reaches what runs."""
    assert agrees(engine, policy)
    change(policy, 2)
    assert not agrees(engine, policy) and gap(policy, sample(engine, policy, {})) > 0.01
    engine.sync(policy.named_weights(), 7)
    made = sample(engine, policy, {})
    assert agrees(engine, policy) and gap(policy, made) < 1e-4 and made.weights_version == 7


def under_laws(engine: Any, policy: TransformerPolicy) -> dict[str, Any]:
    """For each law: the gap to the trainer, and in what the torch engine's trajectory is the same."""
    found, reference = {}, TorchEngine(policy, num_layers=2)
    for name, law in LAWS.items():
        made, wanted = sample(engine, policy, law), sample(reference, policy, law)
        found[name] = {
            "gap": gap(policy, made),
            "same tokens": torch.equal(made.ids, wanted.ids),
            "same support": same(made.support, wanted.support),
            "same masks": torch.equal(made.target_mask, wanted.target_mask),
            "same streams": all(torch.equal(made.streams[s].ids_BP, wanted.streams[s].ids_BP) for s in made.streams),
            "same names": (made.seed, made.group_id, made.sample_id)
            == (wanted.seed, wanted.group_id, wanted.sample_id),
        }
    return found


def writing(engine: Any, policy: TransformerPolicy) -> dict[str, Any]:
    """A text and a guided image after it: the gap to the trainer, the texts' lengths, and whether the torch engine's
    trajectory is the same."""
    layout = policy.layout
    text = Span("text", Law(layout.text, top_k=40), 9, stop=tuple(range(*layout.text))[::4])
    image = Span("image", Law(layout.image, guidance_scale=2.0), layout.grid.length)
    asked = [
        replace(request, streams={name: ids[: -len(layout.boi)] for name, ids in request.streams.items()})
        for request in requests(policy)
    ]
    made = generate_spans(engine, layout, asked, [text, image])
    wanted = generate_spans(TorchEngine(policy, num_layers=2), layout, asked, [text, image])
    return {
        "gap": gap(policy, made),
        "lengths": sorted({int(n) for n in (made.target_mask & (made.span == 0)).sum(1)}),
        "same tokens": torch.equal(made.ids, wanted.ids),
        "same masks": torch.equal(made.target_mask, wanted.target_mask),
    }


def check_writing(facts: dict[str, Any]) -> None:
    assert facts["gap"] < 1e-4 and facts["same tokens"] and facts["same masks"], facts
    assert len(facts["lengths"]) > 1, facts
