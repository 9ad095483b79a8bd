"""Samples of a real vLLM under schedules that part, split, delay and evict requests; prints one JSON object.

Arguments: how many samples, and families whose evictions are looked at in place of the small Llama's schedules.

A program of its own: vLLM changes the process it lives in.
"""

import json
import random
import sys
from typing import Any

import torch

from rlmm.policies.transformer import TransformerPolicy
from rollouts.contract import Request
from rollouts.law import Law
from rollouts.torch_engine.causal import TorchEngine
from rollouts.trajectory import Span, Trajectory
from rollouts.vllm_engine.host import BLOCK
from rollouts.vllm_engine.plugin import served_overrides
from tests.families.checkpoints import peaked
from tests.integration.vllm_requests import make_policy
from tests.integration.vllm_steps import Counted

LONGEST = 100
"""Characters of a prompt: LlamaGen takes 120 tokens."""


def mixed_requests(policy: TransformerPolicy, count: int, group: int) -> list[Request]:
    """Prompts of mixed lengths, each shared by a whole group."""
    luck, layout = random.Random(0), policy.layout
    made = []
    for i in range(count // group):
        ids = policy.encode_prompt("".join(luck.choice("abc de") for _ in range(luck.randint(1, LONGEST))) + "x")
        streams = {"cond": layout.prefix(ids), "uncond": layout.prefix(layout.null(ids))}
        streams["source"] = layout.prefix(ids[: len(ids) // 2])
        seeds = tuple(range(group * i, group * (i + 1)))
        made.append(Request(f"p{i}", streams, seeds, tuple(f"p{i}/{s}" for s in seeds)))
    return made


def replayed_gap(policy: TransformerPolicy, made: Trajectory) -> float:
    """The largest |trainer - sampler| log-prob over every sample."""
    gaps = []
    for at in range(0, len(made), 50):
        part = made.rows(range(at, min(at + 50, len(made))))
        with torch.no_grad():
            logp_BS = policy.log_probs(part).logp_BS
        gaps.append(float((logp_BS - part.sampler_logp)[part.target_mask].abs().max()))
    return max(gaps)


def measure(policy: TransformerPolicy, count: int, law: Law, *, blocks: int, **sizes: Any) -> dict[str, Any]:
    """`blocks`: of keys and values of one stream."""
    requests, base, shape = mixed_requests(policy, count, group=4), policy.base, policy.sizes
    together = len(law.streams()) > 1
    counted = Counted(
        policy, max_length=min(256, shape.max_position_embeddings),
        overrides=served_overrides(policy.layout, base.config, type(base).__name__, together=together),
        kv_bytes=blocks * 2 * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim * BLOCK * 4, **sizes,
    )  # fmt: skip
    span = Span("image", law, policy.layout.grid.length)
    made = counted.engine.generate(requests, [span])
    wanted = TorchEngine(policy, num_layers=shape.num_hidden_layers).generate(requests, [span])
    same = (made.ids == wanted.ids).all(1).float().mean()
    counted.host.close()
    return {
        "samples": len(made), "gap": replayed_gap(policy, made), "same samples": float(same),
        "evicted": counted.seen["_preempt_request"], "split": len(counted.split), "streams": counted.host.room.streams,
    }  # fmt: skip


def schedules(count: int) -> dict[str, Any]:
    few, one = {"max_rows": 5, "blocks": 40}, {"max_rows": 24, "blocks": 60}
    apart, together = (make_policy(lora=False, row_ends=True, null_token=null) for null in (False, True))
    image = apart.layout.image
    plain, guided = Law(image), Law(image, guidance_scale=3.0)
    scales = Law(image, guidance_scale=3.0, source_scale=1.5)
    return {
        "pairs, few slots": measure(apart, count, guided, **few, max_prompt_tokens=256),
        "two scales, few slots": measure(apart, count // 3, scales, max_rows=7, blocks=40, max_prompt_tokens=400),
        "one request, evictions": measure(together, count, guided, **one, max_prompt_tokens=256),
        "one request, chunks": measure(together, count, guided, **one, max_prompt_tokens=64, chunked_prefill=True),
        "unguided, evictions": measure(together, count, plain, max_rows=24, blocks=30, max_prompt_tokens=256),
    }


def evictions(name: str, count: int) -> dict[str, Any]:
    policy = peaked(name)
    return measure(policy, count, Law(policy.layout.image), max_rows=24, blocks=30, max_prompt_tokens=1024)


def main() -> None:
    count, families = int(sys.argv[1]), sys.argv[2:]
    found = {name: evictions(name, count) for name in families} if families else schedules(count)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
