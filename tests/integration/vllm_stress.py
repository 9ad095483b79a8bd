"""Guided samples of a real vLLM under schedules that part, split, delay and evict requests; prints one JSON object.

A program of its own: vLLM changes the process it lives in.
"""

import json
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from rlmm.policies.causal import CausalPolicy
from rollouts.contract import Request
from rollouts.law import Law
from rollouts.torch_engine.causal import TorchEngine
from rollouts.trajectory import Span, Trajectory
from rollouts.vllm_engine.engine import VllmEngine
from rollouts.vllm_engine.host import BLOCK
from rollouts.vllm_engine.local import LocalHost
from rollouts.vllm_engine.plugin import two_stream_overrides
from tests.integration.vllm_requests import make_policy


def mixed_requests(policy: CausalPolicy, count: int, group: int) -> list[Request]:
    """Prompts of 1 to 120 characters, some of them shared by a whole group."""
    luck, layout = random.Random(0), policy.layout
    made = []
    for i in range(count // group):
        ids = policy.encode_prompt("".join(luck.choice("abc de") for _ in range(luck.randint(1, 120))) + "x")
        streams = {"cond": layout.prefix(ids), "uncond": layout.prefix(layout.null(ids))}
        seeds = tuple(range(group * i, group * (i + 1)))
        made.append(Request(f"p{i}", streams, seeds, tuple(f"p{i}/{s}" for s in seeds)))
    return made


def replayed_gap(policy: CausalPolicy, made: Trajectory) -> float:
    """The largest |trainer - sampler| log-prob over every sample."""
    gaps = []
    for at in range(0, len(made), 50):
        part = made.rows(range(at, min(at + 50, len(made))))
        with torch.no_grad():
            logp_BS = policy.log_probs(part).logp_BS
        gaps.append(float((logp_BS - part.sampler_logp)[part.target_mask].abs().max()))
    return max(gaps)


def measure(null_token: bool, count: int, scale: float, **sizes: Any) -> dict[str, Any]:
    policy = make_policy(lora=False, row_ends=True, null_token=null_token)
    law, requests = Law(policy.layout.image, guidance_scale=scale), mixed_requests(policy, count, group=4)
    with tempfile.TemporaryDirectory() as folder:
        policy.save(Path(folder))
        overrides = two_stream_overrides(policy.layout) if null_token and scale != 1 else {}
        host = LocalHost(Path(folder), max_length=256, dtype="float32", overrides=overrides, **sizes)
    scheduler = host.llm.llm_engine.engine_core.engine_core.scheduler
    evicted, evict = [0], scheduler._preempt_request

    def counted(*args: Any, **kwargs: Any) -> Any:
        evicted[0] += 1
        return evict(*args, **kwargs)

    scheduler._preempt_request = counted
    span = Span("image", law, policy.layout.grid.length)
    made = VllmEngine(policy.layout, [host], host.load).generate(requests, [span])
    wanted = TorchEngine(policy, num_layers=2).generate(requests, [span])
    same = (made.ids == wanted.ids).all(1).float().mean()
    host.close()
    return {
        "samples": len(made), "gap": replayed_gap(policy, made), "same samples": float(same), "evicted": evicted[0],
        "streams": host.room.streams,
    }  # fmt: skip


def main() -> None:
    block = 2 * 2 * BLOCK * 64 * 4  # keys and values of two layers, float32
    small = {"max_rows": 5, "max_prompt_tokens": 256, "kv_bytes": 40 * block}
    one = {"max_rows": 24, "max_prompt_tokens": 256, "kv_bytes": 2 * 30 * block}
    count = int(sys.argv[1])
    found = {
        "pairs, few slots": measure(False, count, 3.0, **small),
        "one request, evictions": measure(True, count, 3.0, **one),
        "one request, chunks": measure(True, count, 3.0, **one | {"max_prompt_tokens": 64}, chunked_prefill=True),
        "unguided, evictions": measure(True, count, 1.0, **one | {"kv_bytes": 30 * block}),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
