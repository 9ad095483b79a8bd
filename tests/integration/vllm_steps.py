"""Several decode steps a turn of vLLM's scheduler, against one; prints one JSON object. `--compiled`: with a compiled
model.

A program of its own: vLLM changes the process it lives in.
"""

import json
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from vllm import SamplingParams
from vllm.compilation.counter import compilation_counter

from rlmm.config.policy import NewPolicy
from rlmm.policies.causal import CausalPolicy
from rlmm.policies.families.llama import build
from rlmm.policies.transformer import TransformerPolicy
from rollouts.law import Law
from rollouts.trajectory import Span
from rollouts.vllm_engine.arguments import row_arguments
from rollouts.vllm_engine.engine import VllmEngine
from rollouts.vllm_engine.flat import FlatLlama
from rollouts.vllm_engine.host import BLOCK, Row
from rollouts.vllm_engine.local import LocalHost
from rollouts.vllm_engine.plugin import two_stream_overrides
from tests.integration.vllm_requests import gap, requests

PAGE = 2 * 2 * BLOCK * 64 * 4
"""Bytes of keys and values of two layers, float32."""
FLAT: Counter[str] = Counter()
"""Steps that went past the model's modules."""
COMPILED = "--compiled" in sys.argv


def count_flat() -> None:
    call = FlatLlama.__call__

    def counted(self: FlatLlama, ids_N: Tensor, position_N: Tensor) -> Tensor:
        FLAT["steps"] += 1
        return call(self, ids_N, position_N)

    FlatLlama.__call__ = counted


def make_policy(hidden: int = 64, *, token: bool = False) -> CausalPolicy:
    config = NewPolicy(
        hidden_size=hidden, num_layers=2, num_heads=2, intermediate_size=96, null="token" if token else "prompt"
    )
    policy = build(config, num_codes=40, grid=(9, 8), seed=1)
    assert isinstance(policy, CausalPolicy)
    with torch.no_grad():
        policy.model.lm_head.weight.mul_(40)
    policy.model.eval()
    return policy


class Counted:
    """A vLLM with a count of its scheduler's turns and evictions, and of prompts that it reads in parts."""

    def __init__(self, policy: TransformerPolicy, **sizes: Any) -> None:
        given: dict[str, Any] = {
            "max_length": 160, "dtype": "float32", "enforce_eager": not COMPILED, "max_rows": 16,
            "max_prompt_tokens": 512, "kv_bytes": 200 * PAGE,
        }  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            policy.save(Path(folder))
            self.host = LocalHost(Path(folder), **given | sizes)
        self.engine = VllmEngine(policy.layout, [self.host], self.host.load)
        self.scheduler = self.host.llm.llm_engine.engine_core.engine_core.scheduler
        self.seen: Counter[str] = Counter()
        self.split: set[str] = set()
        for name in ("schedule", "_preempt_request"):
            setattr(self.scheduler, name, self._counting(name))

    def _counting(self, name: str) -> Any:
        call = getattr(self.scheduler, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.seen[name] += 1
            made = call(*args, **kwargs)
            if name == "schedule":
                self.split.update(filter(self._unread, made.num_scheduled_tokens))
            return made

        return counted

    def _unread(self, name: str) -> bool:
        """Whether a request has more of its prompt to read after the step that is planned."""
        request = self.scheduler.requests[name]
        return request.num_computed_tokens < request.num_prompt_tokens

    def both(self, call: Any) -> tuple[Any, Any, Counter[str]]:
        """What `call` gives with several steps a turn and with one; the first's turns and evictions, the tokens that it
        goes on reserving, and the second's evictions."""
        self.seen.clear()
        FLAT.clear()
        several, seen = call(), self.seen.copy()
        seen["flat"] = FLAT["steps"]
        seen["reserving"] = self.scheduler.num_lookahead_tokens or int(self.scheduler.goes_on)
        self.scheduler.goes_on, self.scheduler.num_lookahead_tokens = False, 0
        self.seen.clear()
        single = call()
        seen["evicted by single steps"] = self.seen["_preempt_request"]
        self.scheduler.goes_on = True
        return several, single, seen


def samples(counted: Counted, policy: TransformerPolicy, count: int, **law: Any) -> dict[str, Any]:
    span = Span("image", Law(policy.layout.image, **law), policy.layout.grid.length)
    several, single, seen = counted.both(lambda: counted.engine.generate(requests(policy, count), [span]))
    return {
        "same tokens": torch.equal(several.ids, single.ids),
        "same log-probs": torch.equal(several.sampler_logp, single.sampler_logp),
        "gap": gap(policy, several),
        "turns": seen["schedule"],
        "flat": seen["flat"],
        "evicted": seen["_preempt_request"],
        "evicted by single steps": seen["evicted by single steps"],
        "reserving": seen["reserving"],
        "held afterwards": counted.scheduler.kv_cache_manager.usage,
    }


def again(counted: Counted, policy: TransformerPolicy) -> dict[str, Any]:
    """A prefix that ends inside a turn's tokens is found in the cache, with the keys that a step of its own wrote."""
    span = Span("image", Law(policy.layout.image), policy.layout.grid.length)
    first = counted.engine.generate(requests(policy, 1), [span])
    row = first.ids[0, : -policy.layout.grid.length].tolist()
    start = [token for token in row if token != policy.layout.pad]
    longer = (*start, *first.ids[0, -policy.layout.grid.length :][:50].tolist())
    tokens, drawn = counted.host.run([_row(policy, "longer", longer, 9)], ["longer"])
    assert counted.host.llm.reset_prefix_cache()
    wanted, fresh = counted.host.run([_row(policy, "fresh", longer, 9)], ["fresh"])
    return {"same": tokens == wanted, "gap": float(abs(drawn[0].logp_S - fresh[0].logp_S).max())}


def _row(policy: TransformerPolicy, name: str, prefix: Sequence[int], length: int) -> Row:
    law = Law(policy.layout.image)
    return Row(tuple(prefix), row_arguments(name, ("cond",), law, {}, 7 + length, length, None), length)


def lengths(counted: Counted, policy: TransformerPolicy) -> dict[str, Any]:
    """Rows of 1 to 72 tokens in one batch: no turn goes past the end of one."""
    prefix = policy.layout.prefix(policy.encode_prompt("a"))
    rows = [_row(policy, f"{length}", prefix, length) for length in (1, 2, 7, 33, 34, 72)]
    names = [f"{row.length}" for row in rows]
    several, single, seen = counted.both(lambda: counted.host.run(rows, names))
    return {
        "same": several[0] == single[0],
        "lengths": [len(tokens) for tokens in several[0]],
        "drawn": [int((one.tokens_S >= 0).sum()) for one in several[1]],
        "turns": seen["schedule"],
    }


def beside(counted: Counted, policy: TransformerPolicy) -> dict[str, Any]:
    """A request that is no sample of a law, which may want what only a step of its own gives."""
    prefix = policy.layout.prefix(policy.encode_prompt("a"))
    row = _row(policy, "ours", prefix, 40)
    ours = SamplingParams(
        temperature=0.0, max_tokens=40, ignore_eos=True, detokenize=False, extra_args={"rollouts": row.arguments}
    )
    other = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True, detokenize=False, logprobs=1)
    prompts: Any = [{"prompt_token_ids": list(prefix)}] * 2

    def call() -> list[Any]:
        return counted.host.llm.generate(prompts, [ours, other], use_tqdm=False)

    several, single, seen = counted.both(call)
    tokens = [[list(one.outputs[0].token_ids) for one in made] for made in (several, single)]
    return {"same": tokens[0] == tokens[1], "turns": seen["schedule"], "log-probs": len(several[1].outputs[0].logprobs)}


def main() -> None:
    count_flat()
    policy = make_policy()
    counted = Counted(policy)
    found: dict[str, Any] = {
        "plain": samples(counted, policy, 5),
        "guided": samples(counted, policy, 2, guidance_scale=3.0),
    }
    found |= {"again": again(counted, policy), "lengths": lengths(counted, policy), "beside": beside(counted, policy)}
    counted.host.close()
    small = Counted(policy, max_rows=6, kv_bytes=13 * PAGE)
    found["evicting"] = samples(small, policy, 2)
    small.host.close()
    both = make_policy(token=True)
    paired = Counted(both, overrides=two_stream_overrides(both.layout))
    found["two streams"] = samples(paired, both, 2, guidance_scale=3.0)
    paired.host.close()
    half = Counted(policy, dtype="bfloat16")
    found["bfloat16"] = samples(half, policy, 2)
    half.host.close()
    wide = make_policy(160)
    stock = Counted(wide)
    found["stock attention"] = samples(stock, wide, 2)
    stock.host.close()
    found["compiled models"] = compilation_counter.num_aot_compiles + compilation_counter.num_aot_artifacts_loaded
    print(json.dumps(found))


if __name__ == "__main__":
    main()
